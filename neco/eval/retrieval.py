"""Dense nearest-neighbour retrieval ("Hummingbird": Balazevic et al., Towards In-Context Scene Understanding, 2023).

Every patch of the training images is a memory entry with the shares of the classes in it; a patch of a validation image
takes the label of its nearest entries.

Shapes: B images, H W pixels, h w patches, p pixels of a patch, D channels, M memory entries, Q queries,
k neighbours, C classes.
"""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from neco.config.types import STD, NonNegative, Positive, PositiveFloat, Size
from neco.dataset.base import IGNORE, Dataset, Sample, read_image
from neco.distributed import collectives
from neco.eval.common import metrics
from neco.eval.common.metrics import Compat
from neco.eval.common.neighbors import LEAST, Engine, Neighbours, bank, check_engine
from neco.eval.evaluation import Result, check_protocol, input_size, labelled, part_of_train, size_name
from neco.features.extractor import Draw, Extract, PatchFeatures, token_grid
from neco.report.pictures import Picture, patch_view, predictions, shown, strip
from neco.utils.errors import NecoError
from neco.utils.random import generator

SIZE = 512  # published
NEAREST = 7  # that are shown
REFERENCE_STD = (0.229, 0.224, 0.255)  # a slip of the published code that its numbers depend on


def soft_labels(masks: Tensor, patch: int, classes: int, compat: Compat = "standard") -> Tensor:
    """Share of each class among a patch's pixels: masks (B, H, W) of labels and 255 -> float32 (B, h, w, C).

    Pixels to ignore carry no class (`standard`: the shares of a patch then sum to less than 1) or are class 0
    (`reference`).
    """
    if compat == "reference":
        masks = masks.masked_fill(masks == IGNORE, 0)
    if ((masks >= classes) & (masks != IGNORE)).any():
        raise ValueError(f"masks hold {int(masks[masks != IGNORE].max())}, but there are {classes} classes")
    h, w = token_grid(masks.shape[1:], patch)
    label = masks.long().reshape(-1, h, patch, w, patch).transpose(2, 3).flatten(3)
    label = label.masked_fill(label == IGNORE, classes)
    counts = torch.zeros(*label.shape[:3], classes + 1).scatter_add_(3, label, torch.ones(label.shape))
    return counts[..., :classes] / patch**2


def patch_scores(labels: Tensor, uniform: Tensor | float = 1.0) -> Tensor:
    """How expendable each patch of a bounded memory is: soft labels (B, h, w, C) -> (B, h, w); the smallest are kept.

    For each patch the sum, over the classes in it, of the number of patches of the image that hold the class, times
    `uniform`, one random number a patch: rare classes are favoured. Infinite for patches without any class.
    """
    present = labels > 0
    scores = (present * present.sum((1, 2), keepdim=True)).sum(3) * uniform
    return scores.masked_fill(~present.any(3), torch.inf)


def vote(similarities: Tensor, labels: Tensor, temperature: float = 0.02) -> Tensor:
    """Mean of the neighbours' labels, weighted by softmax(cosine / temperature): (Q, k), (Q, k, C) -> (Q, C)."""
    weights = (similarities / temperature).softmax(1)
    return (weights[:, None] @ labels)[:, 0]


def typical(labels: Tensor, count: int = 2) -> list[int]:
    """A patch for each of the `count` largest classes of an image: of those that are mostly it, the innermost.

    Soft labels (h, w, C) -> places in h w. Innermost is what is nearest to their mean place.
    """
    found = []
    for one in labels.sum((0, 1)).argsort(descending=True, stable=True)[:count].tolist():
        inside = (labels[..., one] > 0.5).nonzero()
        if len(inside):
            middle = (inside - inside.float().mean(0)).square().sum(1).argmin()
            found.append(int(inside[middle] @ torch.tensor([labels.shape[1], 1])))
    return found


class Retrieval:
    """mIoU of nearest-neighbour labels on val, with train as the memory, at the size of the input.

    `compat=reference` does what the open-hummingbird code does: std 0.255 in the normalisation, void pixels are class 0
    in the memory, crop scales up to 2 (which fall back to the whole frame), masks resized by torch's `nearest` (the
    first pixel of a cell, not the middle one), classes re-matched by the Hungarian algorithm, absent classes count 0.

    Args:
        size: of the input in pixels, or [height, width]; null = the multiple of the patch nearest to 512 (to the
            data's own size if drawn).
        k: number of neighbours, or several from one search.
        temperature: of the vote.
        augment: `published` = random crops and jitter of the memory images, `none` = the whole images.
        passes: over the training images; null = 2 with augmentation, 1 without (the same entries again).
        memory_size: entries at most, shared evenly by passes and images; null = all patches.
        engine: of the search.
        storage: of the memory's features; half the bytes with float16, in which neighbours at nearly equal distance can
            change places.
        bank_dir: folder for a memory that is mapped from a file instead of held in RAM; null = RAM.
        cells: 0 = exact search; else that of faiss's inverted file of so many cells, `probes` of them searched.
        probes: cells searched for each query.
        drop_last: of `reference`: images are left out that do not fill a last batch of so many (published: 64);
            0 = none.

    Raises:
        NecoError: `drop_last` with `standard`, k empty, or no faiss where it is asked for.
    """

    def __init__(
        self,
        *,
        compat: Compat = "standard",
        size: Size | None = None,
        k: Positive | list[Positive] = 30,
        temperature: PositiveFloat = 0.02,
        augment: Literal["published", "none"] = "published",
        passes: Positive | None = None,
        memory_size: Positive | None = 10_240_000,
        engine: Engine = "faiss",
        storage: Literal["float32", "float16"] = "float32",
        bank_dir: str | None = None,
        cells: NonNegative = 0,
        probes: Positive = 64,
        drop_last: NonNegative = 0,
    ) -> None:
        check_engine(engine)
        check_protocol(compat, size, drop_last)
        if cells and engine == "torch":
            raise NecoError(f"cells={cells}: the inverted file is faiss's; use engine=faiss or cells=0")
        self.storage, self.bank_dir = storage, Path(bank_dir).expanduser() if bank_dir else None
        self.cells, self.probes = cells, probes
        self.compat = compat
        self.size = size
        self.ks = sorted({k} if isinstance(k, int) else {*k})
        self.temperature = temperature
        self.augment = augment
        self.passes = passes or (2 if augment == "published" else 1)
        self.memory_size = memory_size
        self.engine = engine
        self.drop_last = drop_last
        if not self.ks:
            raise NecoError("k=[]: give at least one number of neighbours")

    def plan(self, patch: int, dataset: Dataset) -> tuple[tuple[int, int], int, list[Sample], list[Sample]]:
        """Size of the input, memory entries an image and pass, and the training and validation images.

        Raises NecoError for everything that can be seen to fail before the first image is read.
        """
        size = input_size(self.size, SIZE, patch, dataset)
        train, val = (labelled(dataset, split, self.drop_last) for split in ("train", "val"))
        share = patches = prod(token_grid(size, patch))
        if self.memory_size is not None:
            share = min(patches, self.memory_size // (len(train) * self.passes))
        if share == 0:
            raise NecoError(
                f"memory_size={self.memory_size} is less than one entry for each of {len(train)} images in each of "
                f"{self.passes} passes"
            )
        if self.ks[-1] > (entries := len(train) * self.passes * share):
            raise NecoError(f"k={self.ks[-1]} nearest of at most {entries} memory entries: use a smaller k")
        if self.cells * LEAST > entries:
            raise NecoError(f"cells={self.cells} of at most {entries} memory entries: {entries // LEAST} are possible")
        return size, share, train, val

    def names(self, dataset: Dataset) -> list[str]:
        """Of the metrics."""
        return [f"miou_k{k}" for k in self.ks]

    def __call__(
        self, backbone: PatchFeatures, dataset: Dataset, *, extract: Extract | None = None, seed: int = 0, show: int = 0
    ) -> Result:
        """Evaluate `backbone`; `seed` is that of crops, jitter and the choice of memory entries. `show`: so many images
        are drawn with what is predicted, and patches of them with their nearest in the memory.

        Returns: metrics `miou_k<k>`, with the IoU of each class in the details.
        """
        extract, classes = extract or Extract(), len(dataset.classes)
        size, share, train, val = self.plan(backbone.patch, dataset)
        memory, labels, sources = self._remember(backbone, dataset, train, size, share, extract, seed, bool(show))
        cells = -(-self.cells // collectives.world())  # of each process's part
        index = Neighbours(memory, engine=self.engine, device=extract.place(backbone), cells=cells, probes=self.probes)
        labels = collectives.gather_uneven(labels).to(index.device)
        if not len(labels):
            raise NecoError("no patch of the training images has a labelled pixel: there is nothing to retrieve")
        matrices = {k: torch.zeros(classes, classes, dtype=torch.long) for k in self.ks}
        own = collectives.share(val)
        batches = max(collectives.merge(-(-len(own) // extract.batch_size)))  # of the process that has most

        def answers(features: Tensor) -> Iterator[tuple[dict[int, Tensor], Tensor, Tensor]]:
            """Of each image classes (H, W) by k, similarities (h w, k) and entries (h w, k)."""
            side = features.shape[1:3]
            # The whole batch at once: faiss is 8 times slower at a few hundred queries than at a thousand.
            near, where = index.together(F.normalize(features.flatten(0, 2), dim=1), self.ks[-1])
            for cosines, places in zip(near.split(side.numel()), where.split(side.numel()), strict=True):
                found, predicted = labels[places].float() / backbone.patch**2, {}
                for k in self.ks:
                    shares = vote(cosines[:, :k], found[:, :k], self.temperature).T.reshape(1, classes, *side)
                    predicted[k] = F.interpolate(shares, size=size, mode="bilinear").argmax(1)[0].cpu()
                yield predicted, cosines, places

        for _, features, masks in extract.stream(backbone, dataset, own, size, **self._reading, what="val"):
            batches -= 1
            for mask, (predicted, _, _) in zip(masks, answers(features), strict=True):
                for k, matrix in matrices.items():
                    matrix += metrics.confusion(predicted[k], mask, classes, classes)
        for _ in range(batches):
            index.together(torch.empty(0, backbone.dim), self.ks[-1])
        matrices = {k: collectives.total(matrix) for k, matrix in matrices.items()}
        if self.compat == "reference":
            matrices = {k: metrics.remap(matrix, metrics.match_one_to_one(matrix)) for k, matrix in matrices.items()}
        drawn: list[Picture] = []
        seen: dict[int, list[Tensor]] = {k: [] for k in self.ks}
        some = shown(val, show)
        for rows, features, masks in extract.stream(backbone, dataset, some, size, **self._reading, keep=False):
            for sample, mask, (predicted, cosines, places) in zip(some[rows], masks, answers(features), strict=True):
                soft = soft_labels(mask[None], backbone.patch, classes, self.compat)[0]
                for k in self.ks:
                    seen[k].append(predicted[k])
                for patch in typical(soft):
                    near, at = (part[patch, :NEAREST].cpu() for part in (cosines, places))
                    views = [patch_view(Image.fromarray(read_image(sample)), patch, soft.shape[:2])]
                    views += [self._view(train, source, soft.shape[:2], size, seed) for source in sources[at].tolist()]
                    caption = "a patch and its nearest in train, cosine " + ", ".join(f"{c:.2f}" for c in near.tolist())
                    drawn.append(Picture("nearest patches", strip(views), sample.key, caption))
        for k in self.ks:
            drawn += predictions(dataset, some, seen[k], matrices[k], f", k={k}")
        return Result(
            "/".join([self._protocol(size), *part_of_train(dataset)]),
            {f"miou_k{k}": metrics.miou(matrix, self.compat) for k, matrix in matrices.items()},
            {
                f"miou_k{k}": {
                    "memory": len(labels),
                    "iou": metrics.by_class(metrics.class_iou(matrix), dataset.classes),
                    **metrics.absent(matrix, dataset.classes),
                }
                for k, matrix in matrices.items()
            },
            pictures=drawn,
        )

    def _draw(self, size: tuple[int, int], seed: int, turn: int) -> Draw | None:
        """What is drawn for each memory image of a pass."""
        scale = (0.5, 2.0) if self.compat == "reference" else (0.5, 1.0)
        return Draw(scale, seed, turn, aspect=size[1] / size[0]) if self.augment == "published" else None

    def _view(
        self, train: Sequence[Sample], source: list[int], grid: Sequence[int], size: tuple[int, int], seed: int
    ) -> Image.Image:
        """A memory entry as it lies in its image."""
        turn, row, patch = source
        image, draw = Image.fromarray(read_image(train[row])), self._draw(size, seed, turn)
        return patch_view(draw.cut(train[row].key, image) if draw else image, patch, grid)

    @property
    def _reading(self) -> dict[str, Any]:
        """How `compat` wants images and masks."""
        if self.compat == "reference":
            return {"std": REFERENCE_STD, "nearest": "floor"}
        return {"std": STD, "nearest": "centre"}

    def _remember(
        self,
        backbone: PatchFeatures,
        dataset: Dataset,
        samples: Sequence[Sample],
        size: tuple[int, int],
        share: int,
        extract: Extract,
        seed: int,
        traced: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised features (M, D) and pixels of each class (M, C) of this process's part of the memory.

        Traced, also where each entry of the whole memory is from, (M, 3): pass, number of the image, of the patch.
        """
        first, samples = len(samples) * collectives.rank() // collectives.world(), collectives.share(samples)
        room, pixels = len(samples) * self.passes * share, backbone.patch**2
        memory = bank(room, backbone.dim, getattr(torch, self.storage), self.bank_dir)
        labels = torch.empty(room, len(dataset.classes), dtype=torch.uint8 if pixels < 256 else torch.int16)
        sources = torch.empty(room if traced else 0, 3, dtype=torch.int32)
        filled = 0
        for turn in range(self.passes):
            draw = self._draw(size, seed, turn)
            what = f"train, pass {turn + 1} of {self.passes}"
            for rows, features, masks in extract.stream(
                backbone, dataset, samples, size, **self._reading, draw=draw, what=what
            ):
                soft = soft_labels(masks, backbone.patch, len(dataset.classes), self.compat)
                uniform = [
                    generator(seed, turn, sample.key, "patches").random(soft.shape[1:3]) for sample in samples[rows]
                ]
                scores = patch_scores(soft, torch.tensor(np.stack(uniform)))
                best = scores.flatten(1).topk(share, largest=False)
                kept = best.values.isfinite()
                image = torch.arange(len(soft))[:, None].expand_as(kept)[kept]
                for store, values in ((memory, F.normalize(features, dim=3)), (labels, (soft * pixels).round())):
                    store[filled : filled + len(image)] = values.flatten(1, 2)[image, best.indices[kept]]
                if traced:
                    place = torch.full_like(image, turn), first + rows.start + image, best.indices[kept]
                    sources[filled : filled + len(image)] = torch.stack(place, 1).int()
                filled += len(image)
        return memory[:filled], labels[:filled], collectives.gather_uneven(sources[:filled])

    def _protocol(self, size: Size) -> str:
        parts = [
            f"retrieval/{self.compat}/{size_name(size)}",
            f"k={','.join(map(str, self.ks))}",
            f"augment={self.augment}",
            f"passes={self.passes}",
            f"memory={self.memory_size or 'all'}",
            f"temperature={self.temperature:g}",
        ]
        parts += [self.storage] * (self.storage != "float32")
        parts += [f"cells={self.cells}x{self.probes}"] * bool(self.cells)
        return "/".join(parts + [f"drop_last={self.drop_last}"] * bool(self.drop_last))
