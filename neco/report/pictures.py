"""What evaluations show of a few images: predictions, clusters, attention, neighbours, confusion, features as colours.

Shapes: H W pixels of an image (at most SIDE), h w of a map of any size, n images, D channels, C classes.
"""

import colorsys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from neco.dataset.base import Dataset, Sample, read_image, read_label
from neco.dataset.inspect import places

T = TypeVar("T")
SIDE = 420  # pixels of a picture's longer side
GLOW = np.array([255, 60, 0])  # of attention


@dataclass(frozen=True)
class Picture:
    """Something to look at.

    Attributes:
        kind: what it is, in a word or two: `prediction`.
        pixels: uint8 (H, W, 3).
        key: of the image it belongs to; None = the whole set.
        caption: what else is to be said.
    """

    kind: str
    pixels: np.ndarray
    key: str | None = None
    caption: str = ""


def colours(count: int) -> np.ndarray:
    """uint8 (count, 3): colours that neighbours in number do not share."""
    steps = ((i * 0.618034 % 1, (0.6, 1)[i % 2], (1, 0.75, 0.5)[i // 2 % 3]) for i in range(count))
    return (255 * np.array([colorsys.hsv_to_rgb(*step) for step in steps]).reshape(-1, 3)).astype(np.uint8)


def overlay(image: np.ndarray, label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The classes of (H, W) over a uint8 image (H, W, 3); what is no class stays dark."""
    classes = label < len(palette)
    painted = np.where(classes[..., None], palette[np.where(classes, label, 0)], 0)
    return (0.4 * image + 0.6 * painted).astype(np.uint8)


def shown(samples: Sequence[T], show: int) -> list[T]:
    """`show` of the samples, spread evenly, in their order."""
    return [samples[place] for place in sorted(places(len(samples), show))]


def thumbnail(sample: Sample) -> np.ndarray:
    """The image, uint8 (H, W, 3), at most SIDE pixels large."""
    image = Image.fromarray(read_image(sample))
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)


def stretched(values: np.ndarray, image: np.ndarray, how: Image.Resampling = Image.Resampling.NEAREST) -> np.ndarray:
    """A map (h, w) or (h, w, 3) in the size of an image."""
    return np.asarray(Image.fromarray(values).resize(image.shape[1::-1], how))


def labels_over(
    sample: Sample, labels: Tensor | np.ndarray, count: int, kind: str, caption: str = "", first: int = 0
) -> Picture:
    """Labels (h, w) in 0..count-1 over the image, in the colours from number `first`; those beyond are dark."""
    image, labels = thumbnail(sample), np.asarray(labels).astype(np.int32)
    painted = overlay(image, stretched(labels, image), colours(first + count)[first:])
    return Picture(kind, painted, sample.key, caption)


def groups_over(dataset: Dataset, sample: Sample, labels: Tensor | np.ndarray, count: int, kind: str) -> Picture:
    """Groups (h, w) in 0..count-1 that are no classes, in colours that no class has."""
    return labels_over(sample, labels, count, kind, "colours are arbitrary", len(dataset.classes))


def predictions(
    dataset: Dataset, samples: Sequence[Sample], labels: Iterable[Tensor], matrix: Tensor, of: str = ""
) -> list[Picture]:
    """Predicted classes (h, w) over each of the samples, and the confusion (C, C) of all; nothing without samples."""
    count, kind = len(dataset.classes), f"prediction{of}"
    drawn = [labels_over(sample, part, count, kind) for sample, part in zip(samples, labels, strict=True)]
    return [*drawn, replace(confusion(matrix, dataset.classes), kind=f"confusion{of}")] if drawn else []


def truth(dataset: Dataset, sample: Sample) -> Picture:
    """The mask over its image."""
    return labels_over(sample, read_label(dataset, sample), len(dataset.classes), "ground truth")


def glow_over(sample: Sample, values: Tensor, kept: Tensor, kind: str, caption: str = "") -> Picture:
    """A map (h, w) of attention as light over a darkened image, the `kept` cells of it (h, w) bool framed."""
    image = thumbnail(sample)
    light = np.asarray(values.float() / values.max().clamp(min=1e-12))
    light = stretched(light, image, Image.Resampling.BILINEAR)[..., None]
    drawn = 0.5 * image * (1 - light) + light * GLOW
    inside = stretched(kept.numpy().astype(np.uint8), image)
    edge = np.zeros(inside.shape, bool)
    edge[1:] |= inside[1:] != inside[:-1]
    edge[:, 1:] |= inside[:, 1:] != inside[:, :-1]
    drawn[edge] = 255
    return Picture(kind, drawn.astype(np.uint8), sample.key, caption)


def confusion(matrix: Tensor, classes: Sequence[str]) -> Picture:
    """Of each class in the ground truth (row) how much was called what (column): darker is more."""
    shares = (matrix.T / matrix.sum(0).clamp(min=1)[:, None]).numpy()  # (K, C) counts by (prediction, truth)
    count, cell = len(classes), max(4, min(28, 700 // len(classes)))
    shade = np.rint(255 * (1 - shares[..., None] * [0.9, 0.7, 0.35])).astype(np.uint8)
    cells = Image.fromarray(shade).resize((count * cell, count * cell), Image.Resampling.NEAREST)
    if cell < 9:  # names would not fit
        return Picture(
            "confusion", np.asarray(cells), caption="row: ground truth, column: prediction, in the order of classes"
        )
    font = ImageFont.load_default(min(13, cell))
    margin = int(max(font.getlength(name) for name in classes)) + 8
    sheet = Image.new("RGB", (margin + cells.width + 1, margin + cells.height + 1), "white")
    sheet.paste(cells, (margin, margin))
    for at, anchor in ((margin - 4, "rm"), (4, "lm")):
        names = Image.new("RGB", (margin, cells.height), "white")
        for row, name in enumerate(classes):
            ImageDraw.Draw(names).text((at, (row + 0.5) * cell), name, "black", font, anchor=anchor)
        if anchor == "rm":
            sheet.paste(names, (0, margin))
        else:
            sheet.paste(names.transpose(Image.Transpose.ROTATE_90), (margin, 0))
    return Picture(
        "confusion", np.asarray(sheet), caption="row: ground truth, column: prediction; dark: most of the row"
    )


def patch_view(image: Image.Image, patch: int, grid: Sequence[int], around: int = 3, side: int = 112) -> Image.Image:
    """A patch of an image cut into a grid (h, w), framed, with so many patches around it: side x side pixels."""
    row, column = divmod(patch, grid[1])
    x, y = image.width / grid[1], image.height / grid[0]
    box = (column - around) * x, (row - around) * y, (column + around + 1) * x, (row + around + 1) * y
    view = image.crop(box).resize((side, side), Image.Resampling.BILINEAR)
    scale = side / (2 * around + 1)
    edge = (around * scale - 1, around * scale - 1, (around + 1) * scale, (around + 1) * scale)
    ImageDraw.Draw(view).rectangle(edge, outline=(255, 220, 0), width=2)
    return view


def strip(views: Sequence[Image.Image], gap: int = 4) -> np.ndarray:
    """Views side by side, uint8 (H, W, 3); the first stands apart."""
    sheet = Image.new("RGB", (sum(view.width + gap for view in views) + 3 * gap, views[0].height), "white")
    left = 0
    for number, view in enumerate(views):
        sheet.paste(view, (left, 0))
        left += view.width + gap * (1 if number else 4)
    return np.asarray(sheet)


def as_colours(features: Sequence[Tensor]) -> list[np.ndarray]:
    """Features (n, h, w, D) of several networks as uint8 (n, h, w, 3): three principal components of all of them.

    One basis and one scale for all: what has the same colour has the same features. Each component covers its 1st to
    99th percentile.
    """
    rows = torch.cat([part.flatten(0, 2).double() for part in features])
    rows = rows - rows.mean(0)
    axes = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(0)[None]).sign()  # else the signs are the library's choice
    points = rows @ axes
    low, high = (torch.quantile(points[:: max(1, len(points) // 100_000)], q, dim=0) for q in (0.01, 0.99))
    shades = ((points - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    shades = torch.nn.functional.pad(shades, (0, 3 - shades.shape[1]))
    parts = (255 * shades).round().byte().split([len(part.flatten(0, 2)) for part in features])
    return [part.view(*given.shape[:3], 3).numpy() for part, given in zip(parts, features, strict=True)]
