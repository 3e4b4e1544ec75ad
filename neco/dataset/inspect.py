"""A look at a split: can some of its images be read, do masks fit them, what classes do they hold."""

import time
from dataclasses import dataclass, field

import numpy as np

from neco.dataset.base import IGNORE, Dataset, Sample, read_image, read_label, same_frame
from neco.errors import NecoError


@dataclass
class Look:
    """What was found in a split.

    Attributes:
        images, masks: how many are listed.
        looked: how many of them were read.
        sizes: (width, height) of each.
        pixels: of each class in the masks read, (C + 1,), the last those to ignore; empty without masks.
        bad: key -> why it cannot be used.
    """

    images: int
    masks: int
    looked: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    bad: dict[str, str] = field(default_factory=dict)


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
        found.sizes.append((image.shape[1], image.shape[0]))
        if label is not None:
            label = np.where(label == IGNORE, len(dataset.classes), label)
            found.pixels += np.bincount(label.ravel(), minlength=len(found.pixels))
    return found


def read_pair(dataset: Dataset, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
    """The image, and its mask where there is one. Raises NecoError for what is wrong with either or both."""
    image = read_image(sample.image)
    if sample.mask is None:
        return image, None
    label = read_label(dataset, sample)
    same_frame(sample, image.shape[1::-1], label.shape[::-1])
    return image, label
