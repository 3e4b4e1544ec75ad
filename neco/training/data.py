"""Training input: which image at which position, and its views as uint8 tensors."""

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from neco.augment.views import Views, view_rng
from neco.dataset.base import Sample, read_image

Position = tuple[int, int]  # epoch, index of the sample


class Positions(Sampler[list[Position]]):
    """Batches of (epoch, index) as one stream over all epochs, each epoch its own permutation.

    A pure function of (seed, batch number): a run that resumes at any batch sees what it would have seen. A batch may
    hold the end of one epoch and the start of the next, so no image is dropped and none is repeated within an epoch.
    """

    def __init__(self, images: int, batch: int, batches: int, seed: int, start: int = 0) -> None:
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
                    current = epoch
                positions.append((epoch, int(order[index])))
            yield positions


class MultiView(Dataset[dict[str, Any]]):
    """The views of the image at a position, drawn from (seed, epoch, index) alone."""

    def __init__(self, samples: list[Sample], views: Views, seed: int) -> None:
        self.samples, self.views, self.seed = samples, views, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: Position) -> dict[str, Any]:
        epoch, index = position
        image = read_image(self.samples[index].image)
        params = self.views.sample(view_rng(self.seed, epoch, index), *image.shape[:2])
        global_views, local_views = self.views.apply(image, params)
        return {"global_views": global_views, "local_views": local_views, "crops": torch.as_tensor(params.crops)}


def single_thread(worker: int) -> None:
    """A worker uses one core: as many workers as cores, not cores squared."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def loader(data: MultiView, positions: Positions, workers: int, pin: bool) -> DataLoader:
    """Batches of views, in the order of `positions` for any number of workers."""
    return DataLoader(
        data,
        batch_sampler=positions,
        num_workers=workers,
        worker_init_fn=single_thread,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
