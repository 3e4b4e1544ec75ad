"""Training input: which image at which position, and what is drawn from it as uint8 tensors."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from neco.augment import batched
from neco.augment.joint import JointCrop
from neco.augment.views import Views, batch_scale, view_rng
from neco.dataset.base import Dataset as Labelled
from neco.dataset.base import Sample, read_image
from neco.dataset.inspect import read_pair
from neco.distributed import collectives
from neco.distributed.workers import stack, start_worker
from neco.utils import signals
from neco.utils.errors import NecoError

# Epoch, index of the sample (its second time in an epoch: index + number of samples, ...), number of the batch
Position = tuple[int, int, int]
OTHERS = 100  # images tried in the place of one that cannot be read


def contents(shares: Sequence[tuple[int, int]], epoch: int, seed: int) -> np.ndarray:
    """The indices that an epoch sees, before they are shuffled, of shares (images, how many of them an epoch sees).

    An epoch goes on where the one before it stopped in a fixed random round over the images of a share, so none comes
    again before all the others came.
    """
    total, first, parts = sum(images for images, _ in shares), 0, []
    for part, (images, seen) in enumerate(shares):
        places = np.arange(seen)
        indices = (epoch * seen + places) % images
        if seen % images:
            philox = np.random.Philox(key=[seed, 0], counter=[0, 2, 0, part])
            indices = np.random.Generator(philox).permutation(images)[indices]
        parts.append(first + indices + places // images * total)
        first += images
    return np.concatenate(parts)


class Positions(Sampler[list[Position]]):
    """Batches of (epoch, index, number of the batch) as one stream over all epochs, each epoch its own permutation.

    A pure function of (seed, batch number): a run that resumes at any batch sees what it would have seen. A batch may
    hold the end of one epoch and the start of the next, so no image is dropped and none is repeated within an epoch,
    except where `shares` (see `contents`) say so; without them an epoch sees each of `images` once. `batch` counts the
    images of all processes; each takes a consecutive part.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        batches: int,
        seed: int,
        start: int = 0,
        shares: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.shares = shares or [(images, images)]
        self.images, self.batch, self.batches, self.seed, self.start = images, batch, batches, seed, start

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Position]]:
        order, current = np.empty(0, np.int64), -1
        for number in range(self.start, self.batches):
            positions = []
            for position in range(number * self.batch, (number + 1) * self.batch):
                epoch, index = divmod(position, self.images)
                if epoch != current:
                    order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.images)
                    if any(images != seen for images, seen in self.shares):  # else in their order, each once
                        order = contents(self.shares, epoch, self.seed)[order]
                    current = epoch
                positions.append((epoch, int(order[index]), number))
            yield list(collectives.share(positions))


class Drawn(Dataset[dict[str, Any]], ABC):
    """What is drawn from the sample at a position: a function of (seed, epoch, index) and the number of the batch.

    Where it cannot be read another one takes its place, itself a function of (seed, epoch, index) and the files; the
    item's `bad` holds (index, reason) of each that was tried in vain, and is all there is when none could be read.
    """

    def __init__(self, samples: list[Sample], seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: Position) -> dict[str, Any]:
        epoch, index, batch = position
        bad: list[tuple[int, str]] = []
        for number in self._candidates(epoch, index):
            try:
                item = self.draw(self.samples[number], view_rng(self.seed, epoch, index), batch)
            except NecoError as error:  # raised here, the loader would wrap it into a traceback
                bad.append((number, str(error)))
            else:
                return {**item, "bad": bad}
        return {"bad": bad}

    @abstractmethod
    def draw(self, sample: Sample, rng: np.random.Generator, batch: int) -> dict[str, Any]:
        """The item of a sample. Raises NecoError for one that cannot be read."""

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index % len(self.samples)
        philox = np.random.Philox(key=[self.seed, epoch], counter=[0, 1, 0, index])
        yield from np.random.Generator(philox).integers(len(self.samples), size=OTHERS).tolist()


class MultiView(Drawn):
    """The views of an image, at the scale of its batch; `plain` ones come with the `Colours` that they are to get."""

    def __init__(self, samples: list[Sample], views: Views, seed: int, plain: bool = False) -> None:
        super().__init__(samples, seed)
        self.views, self.plain = views, plain

    def draw(self, sample: Sample, rng: np.random.Generator, batch: int) -> dict[str, Any]:
        image = read_image(sample)
        params = self.views.sample(rng, *image.shape[:2])
        views = self.views.scaled(batch_scale(self.seed, batch, self.views.multi_scale))
        global_views, local_views = views.apply(image, params.plain() if self.plain else params)
        item: dict[str, Any] = {
            "global_views": global_views,
            "local_views": local_views,
            "crops": torch.as_tensor(params.crops),
        }
        if self.plain:
            item["colours"] = batched.parameters(params, views.largest_sigma)
        elif views.teacher == "clean":
            item["teacher_views"] = views.clean(image, params)
        return item


class Scenes(Drawn):
    """A crop of an image with its mask: uint8 `images` (3, S, S) and `masks` (S, S)."""

    def __init__(self, dataset: Labelled, samples: list[Sample], crops: JointCrop, seed: int) -> None:
        super().__init__(samples, seed)
        self.dataset, self.crops = dataset, crops

    def draw(self, sample: Sample, rng: np.random.Generator, batch: int) -> dict[str, Any]:
        image, mask = read_pair(self.dataset, sample)
        assert mask is not None  # unlabelled sets are refused before
        pixels, label = self.crops(image, mask.astype(np.uint8), rng)
        return {"images": torch.from_numpy(pixels).permute(2, 0, 1), "masks": torch.from_numpy(label)}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors stacked, `bad` joined; only `bad` where an item has no tensors."""
    bad = [found for item in items for found in item["bad"]]
    tensors = [{name: value for name, value in item.items() if name != "bad"} for item in items]
    return {**(stack(tensors) if all(tensors) else {}), "bad": bad}


class Loader(DataLoader):
    """A loader whose workers start undisturbed by signals."""

    def __iter__(self) -> Any:
        with signals.held():
            return super().__iter__()


def loader(data: Drawn, positions: Positions, workers: int, pin: bool, seconds: float = 0) -> DataLoader:
    """Batches of items, in the order of `positions` for any number of workers, which have `seconds` for each."""
    return Loader(
        data,
        batch_sampler=positions,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=pin,
        prefetch_factor=max(2, 8 // workers) if workers else None,
        timeout=seconds if workers else 0,
    )
