"""Segmentation heads on frozen patch features: what they are, what they are trained on, how they are scored.

Shapes: B images, H W pixels, h w patches, D channels, C classes; G = GRID.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neco.config.types import Size, sides
from neco.dataset.base import IGNORE, Dataset, Sample
from neco.distributed import collectives
from neco.distributed.devices import full_precision
from neco.eval.common import metrics
from neco.features.extractor import Draw, Extract, Nearest, PatchFeatures, resize_nearest, token_grid
from neco.runs import foreign
from neco.utils.errors import NecoError
from neco.utils.progress import track
from neco.utils.random import generator

Kind = Literal["linear", "fcn"]
Key = TypeVar("Key")
Batch = tuple[Tensor, Tensor]  # tokens (B, h, w, D) and masks (B, G, G)

GRID, SCALE = 100, (0.8, 1.0)  # published
HIDDEN = 512  # channels of the FCN head
ABOUT = ("trained", "kind", "dim", "classes", "size", "patch", "weights")  # in the header of a saved head
LOGITS = 2**27  # held at once when heads are scored


class Head(nn.Sequential):
    """Logits of a token map: a 1x1 convolution, for `fcn` after two blocks of 3x3 convolution, BatchNorm and ReLU.

    The published code upsamples the tokens and convolves there. A 1x1 convolution commutes with bilinear upsampling,
    so the logits are upsampled instead: the same numbers, D / C times cheaper. The FCN head works on the map, too.
    """

    def __init__(self, kind: Kind, dim: int, classes: int) -> None:
        layers: list[nn.Module] = []
        if kind == "fcn":
            for width in (dim, HIDDEN):
                layers += [nn.Conv2d(width, HIDDEN, 3, padding=1, bias=False), nn.BatchNorm2d(HIDDEN), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(HIDDEN if layers else dim, classes, 1))
        self.classes = classes

    def forward(self, tokens: Tensor, pixels: Size) -> Tensor:  # type: ignore[override]
        """(B, h, w, D) -> (B, C, *pixels)."""
        logits = super().forward(tokens.permute(0, 3, 1, 2))
        return F.interpolate(logits, size=sides(pixels), mode="bilinear")


def new_head(kind: Kind, dim: int, classes: int, seed: int) -> Head:
    """A head with torch's own start (published), a function of `seed`; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Head(kind, dim, classes)


def load_head(path: str | Path) -> tuple[Head, dict[str, str], str]:
    """A saved head, what its file says of it, and the first 12 digits of the file's SHA-256.

    Raises:
        NecoError: no such file, or it holds no head.
    """
    path = Path(path).expanduser()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        with safetensors.safe_open(path, "pt") as file:
            about, state = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        names = foreign.check(foreign.parse_json(about["classes"]), list[str])
        kind, dim, classes = about["kind"], int(about["dim"]), len(names)
        about = {key: about[key] for key in ABOUT}
        if not re.fullmatch(r"\d{1,5}(x\d{1,5})?", about["size"]):
            raise ValueError(f"its size is {about['size']!r:.40}")
        with torch.device("meta"):  # a header can claim any size: memory is taken for what the tensors bear out
            Head(kind, dim, classes).load_state_dict(state, assign=True)  # type: ignore[arg-type]
        head = Head(kind, dim, classes)  # type: ignore[arg-type]
        head.load_state_dict(state)
    except OSError as error:
        raise NecoError(f"head={path}: {error.strerror or error}; a run's are in its folder heads/") from error
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise NecoError(f"head={path} holds no head that eval=linear wrote: {error}") from error
    return head.eval(), about, digest


def cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over the labelled pixels of (B, C, G, G), (B, G, G); 0 where there are none (F.cross_entropy says NaN)."""
    # Its own sum has no fixed order.
    each = F.cross_entropy(logits, masks.long(), ignore_index=IGNORE, reduction="none")
    return each.sum() / (masks != IGNORE).sum().clamp(min=1)


def regroup(parts: Iterable[Batch], sizes: Sequence[int], empty: Batch) -> Iterator[Batch]:
    """The rows of consecutive `parts` in groups of these sizes; `empty` is a part without rows."""
    parts, held = iter(parts), empty
    for size in sizes:
        while len(held[0]) < size:
            tokens, masks = next(parts)
            held = torch.cat([held[0], tokens]), torch.cat([held[1], masks])
        yield held[0][:size], held[1][:size]
        held = held[0][size:], held[1][size:]


def mates(count: int, seed: int) -> np.ndarray:
    """For each image another one, every one once: a cycle through all of them in random order."""
    order = generator(seed, "shuffled").permutation(count)
    found = np.empty(count, int)
    found[order] = np.roll(order, 1)
    return found


class Batches:
    """What heads are trained on: features and masks of `samples` under random crops and flips, batch by batch.

    Crops, flips and order are a function of (seed, epoch). Of each batch every process yields its part.

    Args:
        draws: None = new crops in every epoch; else so many take turns, their features in the cache of `extract`
            (without one they are extracted in every epoch again).
        shuffled: every image has the mask of another, whole.
    """

    def __init__(
        self,
        backbone: PatchFeatures,
        dataset: Dataset,
        samples: Sequence[Sample],
        size: tuple[int, int],
        *,
        extract: Extract,
        seed: int,
        batch_size: int,
        draws: int | None = None,
        shuffled: bool = False,
    ) -> None:
        self.read = partial(extract.stream, backbone, dataset, size=size)
        self.read_all = partial(extract, backbone, dataset, size=size)
        self.samples, self.seed, self.batch_size, self.draws = samples, seed, batch_size, draws
        tokens = torch.empty(0, *token_grid(size, backbone.patch), backbone.dim)
        self.empty = tokens, torch.empty(0, GRID, GRID, dtype=torch.uint8)
        self.own, self.aspect = collectives.share(range(len(samples))), size[1] / size[0]
        self.mixed = None
        if shuffled:
            masks = [resize_nearest(masks, GRID) for _, masks in extract.masks(dataset, samples, size)]
            self.mixed = torch.cat(masks)[mates(len(samples), seed)]
        self.labels = [self._extract(turn) for turn in range(draws or 0)]
        self.mapped: dict[int, np.ndarray] = {}

    def __call__(self, epoch: int, what: str) -> Iterator[Batch]:
        """Tokens (b, h, w, D) and masks (b, G, G) of each batch of an epoch, counted from 0; `what` for the display."""
        order = generator(self.seed, epoch, "order").permutation(len(self.samples)).tolist()
        batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        if self.draws:
            return self._kept(batches, epoch % self.draws, what)
        parts = [[*collectives.share(batch)] for batch in batches]
        return regroup(self._fresh([*chain(*parts)], epoch, what), [len(part) for part in parts], self.empty)

    def _draw(self, turn: int) -> Draw:
        return Draw(SCALE, self.seed, turn, flips=True, colours=False, aspect=self.aspect)

    def _fresh(self, rows: list[int], epoch: int, what: str) -> Iterator[Batch]:
        nearest: Nearest | None = "centre" if self.mixed is None else None
        samples = [self.samples[row] for row in rows]
        stream = self.read(samples=samples, nearest=nearest, draw=self._draw(epoch), keep=False, what=what)
        for place, tokens, masks in stream:
            yield tokens, resize_nearest(masks, GRID) if self.mixed is None else self.mixed[rows[place]]

    def _extract(self, turn: int) -> Tensor:
        """Fill the cache with the features of a draw; the masks (n, G, G) of this process's images."""
        labels = torch.empty(len(self.own), GRID, GRID, dtype=torch.uint8)
        samples, what = [self.samples[row] for row in self.own], f"train, draw {turn + 1} of {self.draws}"
        for place, _, masks in self.read(samples=samples, draw=self._draw(turn), what=what):
            labels[place] = resize_nearest(masks, GRID)
        return labels if self.mixed is None else self.mixed[self.own]

    def _kept(self, batches: list[list[int]], turn: int, what: str) -> Iterator[Batch]:
        features = self.mapped.get(turn)
        if features is None:
            samples = [self.samples[row] for row in self.own]
            features = self.read_all(samples=samples, draw=self._draw(turn), what=f"train, draw {turn + 1}")
            if isinstance(features, np.memmap):  # not in memory
                self.mapped[turn] = features
        for batch in track(batches, what):
            places = [self.own.index(row) for row in batch if row in self.own]
            yield torch.from_numpy(np.array(features[places])), self.labels[turn][places]


@torch.no_grad()
def score(
    heads: Mapping[Key, Head],
    stream: Iterable[tuple[slice, Tensor, Tensor]],
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
) -> dict[tuple[Key, tuple[int, int]], Tensor]:
    """Confusion matrices (C, C) by (head, size in pixels) of what `Extract.stream` yields, over all processes."""
    classes = next(iter(heads.values())).classes
    matrices = {(key, size): torch.zeros(classes, classes, dtype=torch.long) for key in heads for size in sizes}
    for _, tokens, masks in stream:
        for size in sizes:
            targets = masks if masks.shape[1:] == size else resize_nearest(masks, size)
            step = max(1, LOGITS // (classes * math.prod(size)))
            for part, target in zip(tokens.split(step), targets.split(step), strict=True):
                part, target = part.to(device), target.to(device)
                for key, head in heads.items():
                    with torch.autocast(device.type, enabled=False), full_precision():
                        predicted = head(part, size).argmax(1)
                    matrices[key, size] += metrics.confusion(predicted, target, classes, classes).cpu()
    return {key: collectives.total(matrix) for key, matrix in matrices.items()}
