"""A look at a split: can some of its images be read, do masks fit them, what classes do they hold."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from neco.dataset.base import IGNORE, Dataset, Sample, read_image, read_label, same_frame
from neco.dataset.decode import describe_values
from neco.dataset.masks import kind_of
from neco.dataset.own_masks import OwnMasks
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
# Of 255. Pixels of 16 bits that use the lowest 12 become 0..15, of the lowest 14 0..63
FLAT, DEEP_FLAT = 16, 64


@dataclass
class FlatImages:
    """Images that are nearly one value as they are read, because their range is another, or they are masks."""

    looked: int = 0
    deep: list[str] = field(default_factory=list)  # of more than 8 bits
    plain: list[str] = field(default_factory=list)

    def note(self, sample: Sample, image: np.ndarray) -> None:
        """Look at an image."""
        self.looked += 1
        low, high = int(image.min()), int(image.max())
        if high - low >= DEEP_FLAT:
            return
        bits, stored = describe_values(sample.image)
        if bits > 8 or high - low < FLAT:
            found = self.deep if bits > 8 else self.plain
            found.append(f"{sample.image} is read as {low} to {high} of 255 (it stores {stored})")

    def warn(self, what: str) -> str:
        """Warn of deep images, and of others where they are most; returns what was said, if anything."""
        found = self.deep + (self.plain if 2 * len(self.plain) > self.looked else [])
        if found:
            advice = "set dataset.range=[LOW,HIGH], the stored values of black and white" if self.deep else (
                "are they masks, or is dataset.range wrong?"
            )  # fmt: skip
            few = f"{what}: {len(found)} of {self.looked} images looked at are nearly one value, like {found[0]}"
            log.warning("%s: %s", few, advice)
            return few
        return ""


@dataclass
class Look:
    """What was found in a split.

    Attributes:
        images, masks: how many are listed.
        looked: how many of them were read.
        sizes: (width, height) of each.
        pixels: of each class in the masks read, (C + 1,), the last those to ignore; empty without masks.
        bad: key -> why it cannot be used.
        flat: those that are nearly one value.
    """

    images: int
    masks: int
    looked: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    bad: dict[str, str] = field(default_factory=dict)
    flat: FlatImages = field(default_factory=FlatImages)

    @property
    def seen(self) -> list[int]:
        """The classes that occur."""
        return np.flatnonzero(self.pixels[:-1]).tolist()

    @property
    def ignored(self) -> float:
        """Share of the pixels that are ignored."""
        return float(self.pixels[-1] / max(1, self.pixels.sum())) if self.pixels.size else 0.0


def places(count: int, looks: int) -> list[int]:
    """Up to `looks` of `count` places, spread evenly, in a fixed random order for those who stop early."""
    spread = np.unique(np.linspace(0, count - 1, min(looks, count)).round().astype(int))
    return np.random.Generator(np.random.Philox(0)).permutation(spread).tolist()


def inspect(dataset: Dataset, split: str, looks: int = 48, seconds: float = 10.0) -> Look:
    """Read `looks` pairs of image and mask, or as many as that time allows.

    Raises NecoError where the split cannot be listed.
    """
    samples = dataset.samples(split)
    found = Look(len(samples), sum(sample.mask is not None for sample in samples))
    if found.masks:
        found.pixels = np.zeros(len(dataset.classes) + 1, np.int64)
    end = time.monotonic() + seconds
    for place in places(len(samples), looks):
        if found.looked and time.monotonic() > end:
            break
        sample = samples[place]
        found.looked += 1
        try:
            image, label = read_pair(dataset, sample)
        except NecoError as error:
            found.bad[sample.key] = str(error)
            continue
        found.flat.note(sample, image)
        found.sizes.append((image.shape[1], image.shape[0]))
        if label is not None:
            label = np.where(label == IGNORE, len(dataset.classes), label)
            found.pixels += np.bincount(label.ravel(), minlength=len(found.pixels))
    if found.masks and (dataset.numbering.colours or dataset.numbering.few):
        _compare_kinds(dataset, samples, found, seconds)
    return found


def _compare_kinds(dataset: Dataset, samples: Sequence[Sample], found: Look, seconds: float) -> None:
    """Read a mask of each palette there is: those that contradict others are bad. Headers take little time."""
    end, kinds = time.monotonic() + seconds, set()
    for sample in samples:
        if time.monotonic() > end:
            break
        try:
            if sample.mask and (kind := kind_of(sample.mask)) not in kinds:
                kinds.add(kind)
                read_label(dataset, sample)
        except NecoError as error:
            found.bad.setdefault(sample.key, str(error))


def check_classes(dataset: Dataset, split: str, look: Look) -> None:
    """Warn of classes that no mask holds, where all masks were looked at, and of masks that hold one class alone.

    Raises NecoError where ignored pixels take the place of all other classes: numbers would be perfect, and mean
    nothing.
    """
    if len(dataset.classes) < 2 or not look.pixels.any():
        return
    if len(look.seen) < 2 and look.looked < look.images:  # few masks may hold one class by chance
        look = inspect(dataset, split, looks=1000)
    masks = f"{len(look.sizes)} masks" if look.looked == look.images else f"{len(look.sizes)} masks looked at"
    advice = ", which are 255 in most programs" if look.ignored else ""
    if look.ignored and isinstance(dataset, OwnMasks) and dataset.values is None and IGNORE in dataset.ignore:
        advice = ". If 255 is a class: write its number instead, or set dataset.values" + (
            "=[0,255]" if len(dataset.classes) == 2 else " to the value of each class"
        )
    share = f"; {100 * look.ignored:.1f}% of the pixels are ignored{advice}" if look.ignored else ""
    if not look.seen:
        raise NecoError(f"{split}: all pixels of {masks} are ignored (255){advice}")
    absent = [name for number, name in enumerate(dataset.classes) if number not in look.seen]
    if len(look.seen) == 1:
        text = f"{split}: the {masks} hold one class alone, {dataset.classes[look.seen[0]]}{share}"
        if look.ignored and look.looked == look.images:
            raise NecoError(text)
        log.warning("%s", text)
    elif absent and look.looked == look.images:
        log.warning("%s: no mask holds %s%s", split, ", ".join(absent), share)


def read_pair(dataset: Dataset, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
    """The image, and its mask where there is one. Raises NecoError for what is wrong with either or both."""
    image = read_image(sample)
    if sample.mask is None:
        return image, None
    label = read_label(dataset, sample)
    same_frame(sample, image.shape[1::-1], label.shape[::-1])
    return image, label


def reason(sample: Sample, labelled: Dataset | None = None, flat: FlatImages | None = None) -> str | None:
    """Why an image (of a labelled set: or its mask) cannot be read; None where it can, and `flat` looks at it."""
    try:
        image = read_pair(labelled, sample)[0] if labelled else read_image(sample)
    except NecoError as error:
        return str(error)
    if flat:
        flat.note(sample, image)
    return None
