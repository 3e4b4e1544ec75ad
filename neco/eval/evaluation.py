"""What every evaluation stands on: its result, the input size, what it is called, random numbers.

Shapes: N images of a split, B of a batch, H W pixels of the input, h w patches, D channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from neco.config.types import Size, sides
from neco.dataset.base import IGNORE, Dataset, Sample
from neco.eval.common.metrics import Compat
from neco.report.pictures import Picture
from neco.utils.errors import NecoError


class Trained(NamedTuple):
    """What an evaluation trained: a file of its own in the run folder, with a header that says what it is."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, str]


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        protocol: the name of what was computed. Numbers of different protocols are not comparable.
        metrics: numbers by name, like {"miou_k30": 0.412}.
        details: what is behind each, ready for JSON, like {"miou_k30": {"iou": {"sky": 0.9, ...}}}.
        heads: what was trained, if anything was, by the metric that it has.
        pictures: what is to be seen of `show` images.
    """

    protocol: str
    metrics: dict[str, float]
    details: dict[str, Any]
    heads: Mapping[str, Trained] = field(default_factory=dict, compare=False)
    pictures: Sequence[Picture] = field(default=(), compare=False)


def input_size(given: int | Sequence[int] | None, published: int, patch: int, dataset: Dataset) -> tuple[int, int]:
    """Height and width of the input: `given`, else squares of the multiple of the patch nearest to the published size.

    Drawn data of one small size are not enlarged for it: there it is the nearest multiple within `dataset.image_size`.

    Raises:
        NecoError: `given` is no multiple of the patch.
    """
    if given is not None:
        for side in sides(given):
            if side % patch:
                low = max(1, side // patch) * patch
                what = f"size={side}" if len({*sides(given)}) == 1 else f"size={[*sides(given)]}: {side}"
                raise NecoError(f"{what} is no multiple of the backbone's patch {patch}: use {low} or {low + patch}")
        return sides(given)
    size = max(1, round(min(published, dataset.image_size or published) / patch)) * patch
    size -= patch if dataset.image_size and patch < size and dataset.image_size < size else 0
    return size, size


def size_name(size: Size) -> str:
    """What protocols call a size: `448` for squares, else height x width, `448x896`."""
    height, width = sides(size)
    return str(height) if height == width else f"{height}x{width}"


def check_protocol(compat: Compat, size: Size | None, drop_last: int = 0) -> None:
    """Raises NecoError for what `compat` doesn't allow: images left out, or inputs that are no squares."""
    if drop_last and compat == "standard":
        raise NecoError(f"drop_last={drop_last}: compat=standard uses every image; set compat=reference or drop_last=0")
    if size and compat == "reference" and len({*sides(size)}) > 1:
        raise NecoError(f"size={list(sides(size))}: the published code knows squares only; set compat=standard")


def labelled(dataset: Dataset, split: str, drop_last: int = 0) -> list[Sample]:
    """The samples of a split sorted by key, without those that do not fill a last batch of `drop_last` (0 = all).

    Raises:
        NecoError: there are none, or no labels.
    """
    samples = sorted(dataset.samples(split), key=lambda sample: sample.key)
    if not dataset.classes or any(sample.mask is None for sample in samples):
        raise NecoError(f"{type(dataset).__name__} has no labels on {split}: choose a labelled data set to evaluate on")
    if len(dataset.classes) == 1:
        raise NecoError(
            f"{type(dataset).__name__} has one class, {dataset.classes[0]}: every prediction would be right. Name a "
            "second one, like background, and give its pixels a number of their own"
        )
    if len(dataset.classes) > IGNORE:
        raise NecoError(
            f"{type(dataset).__name__} has {len(dataset.classes)} classes: evaluations tell at most {IGNORE} apart, as "
            f"masks of 8 bits do, where {IGNORE} is ignored"
        )
    kept = samples[: len(samples) // drop_last * drop_last] if drop_last else samples
    if not kept:
        raise NecoError(
            f"{type(dataset).__name__} has {len(samples)} images in {split}, drop_last={drop_last} leaves none"
        )
    return kept


def part_of_train(dataset: Dataset) -> list[str]:
    """What protocols of evaluations that use train say of a choice from it."""
    return [f"train={len(dataset.samples('train'))}"] if dataset.chooses else []


def background_of(dataset: Dataset) -> int:
    """The class that is no foreground. Raises NecoError where the data set has none."""
    if dataset.background is None:
        raise NecoError(
            f"{type(dataset).__name__} has no class called background, so no foreground to find: choose a data set of "
            "objects, like voc or shapes"
        )
    return dataset.background
