"""Views of an image: which crops, which colours (`Views.sample`, all the randomness) and their pixels (`Views.apply`).

Legend: V views of an image, G global first, then L local; S, s side of a global, local view in pixels.
Crops are integer (x1, y1, x2, y2) in image pixels, x2 and y2 exclusive.
"""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neco.augment import crop as fast
from neco.augment import reference
from neco.errors import NecoError
from neco.values import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat

Crop = tuple[int, int, int, int]
DRAWS = 200  # crops tried for a view before it falls back to the centred one
LOCAL_SIZE = 98  # local views are at most this many pixels wide, unless asked for


class ViewParams(NamedTuple):
    """Everything random about the V views of an image; `zip(*params)` iterates over views."""

    crops: np.ndarray  # (V, 4) int64
    jitter: np.ndarray  # (V,) bool: is the colour jittered
    order: np.ndarray  # (V, 4) int64: a permutation of brightness 0, contrast 1, saturation 2, hue 3
    factors: np.ndarray  # (V, 4) float64, in that numbering; hue is a shift in turns
    grey: np.ndarray  # (V,) bool
    sigma: np.ndarray  # (V,) float64: Gaussian blur in view pixels, 0 = none


def view_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample's views in one epoch: a counter-based stream of its own, whoever draws it."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, index]))


def centred_crop(height: int, width: int, ratio: tuple[float, float]) -> Crop:
    """The largest centred crop whose width / height lies in `ratio`."""
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def random_crop(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Crop:
    """A draw of torchvision's `RandomResizedCrop.get_params`.

    Area uniform in `scale` times the image's, aspect ratio log-uniform in `ratio`; ten tries to fit it into the image,
    then the centred crop.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for a, r, left, top in rng.random((10, 4)).tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * a)
        aspect = math.exp(low + (high - low) * r)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    return centred_crop(height, width, ratio)


def overlap(a: Crop, b: Crop) -> int:
    """Pixels that two crops share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


class Views:
    """Random crops that overlap, each with its own colour jitter, greyscale and blur; no flips (NeCo, appendix).

    Every view after the first shares more than `min_overlap` of the image's area with each global view before it, the
    second global view more than twice that. A view that finds no such crop in 200 draws (a very thin image, a wanted
    overlap above the crop's own area) gets the centred crop, with one warning (in each worker).

    Args:
        global_size, local_size: sides in pixels; None = chosen by `resolve` for the backbone.
        global_scale, local_scale: area of a crop as a share of the image's, lowest and highest.
        ratio: width / height of a crop, lowest and highest, log-uniform.
        jitter: strengths of brightness, contrast, saturation (factor within 1 -+ strength) and hue (turns).
        blur_sigma: lowest and highest, in pixels of the view.
        applier: `uint8` = torch and OpenCV on bytes; `pil` = the published PIL pipeline, five to ten times slower.

    Raises:
        NecoError: no pair of views, a range that is upside down, or a hue shift of more than half a turn.
    """

    def __init__(
        self,
        *,
        global_views: Positive = 2,
        local_views: NonNegative = 4,
        global_size: Positive | None = None,
        local_size: Positive | None = None,
        global_scale: tuple[PositiveFloat, Fraction] = (0.25, 1.0),
        local_scale: tuple[PositiveFloat, Fraction] = (0.05, 0.25),
        ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3),
        min_overlap: Fraction = 0.01,
        jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.8, 0.8, 0.8, 0.2),
        jitter_strength: NonNegativeFloat = 1.0,
        jitter_probability: Fraction = 0.8,
        grey_probability: Fraction = 0.2,
        blur_sigma: tuple[NonNegativeFloat, NonNegativeFloat] = (0.1, 2.0),
        blur_strength: NonNegativeFloat = 1.0,
        blur_probability: Fraction = 0.5,
        applier: Literal["uint8", "pil"] = "uint8",
    ) -> None:
        if global_views + local_views < 2:
            raise NecoError("global_views=1 with local_views=0 leaves no pair to compare: ask for at least two views")
        ranges = {"global_scale": global_scale, "local_scale": local_scale, "ratio": ratio, "blur_sigma": blur_sigma}
        for name, (low, high) in ranges.items():
            if low > high:
                raise NecoError(f"{name}={[low, high]}: the lower end comes first")
        strength = np.multiply(jitter, jitter_strength)
        if strength[3] > 0.5:
            raise NecoError(f"jitter[3]={jitter[3]} x jitter_strength={jitter_strength}: hue turns by at most 0.5")
        self.global_views, self.local_views = global_views, local_views
        self.global_size, self.local_size = global_size, local_size
        self.scales = [global_scale] * global_views + [local_scale] * local_views
        self.ratio, self.min_overlap, self.applier = ratio, min_overlap, applier
        neutral = np.array([1.0, 1.0, 1.0, 0.0])
        sigma = np.multiply(blur_sigma, blur_strength)
        self.lowest = np.append(np.maximum(neutral - strength, [0, 0, 0, -0.5]), sigma[0])  # four factors, sigma
        self.highest = np.append(neutral + strength, sigma[1])
        self.probabilities = jitter_probability, grey_probability, blur_probability
        self._warned = False

    def resolve(self, patch: int, size: int) -> Self:
        """A copy with concrete sizes for a backbone of this patch and pretraining size.

        Left open, global views have the pretraining size and local ones at most 98 pixels and half a global view, in
        whole patches: 518/98 for patch 14, 224/96 for patch 16.

        Raises:
            NecoError: a size that is no multiple of the patch.
        """
        views = copy.copy(self)
        views.global_size = self.global_size or size // patch * patch
        views.local_size = self.local_size or max(1, min(LOCAL_SIZE, views.global_size // 2) // patch) * patch
        for name in ("global_size", "local_size"):
            value = getattr(views, name)
            if value % patch:
                below, above = value // patch * patch, (value // patch + 1) * patch
                valid = f"{below} or {above}" if below else above
                raise NecoError(f"{name}={value} is no multiple of the backbone's patch, {patch} pixels: take {valid}")
        return views

    @property
    def sizes(self) -> list[int]:
        """Side of each of the V views in pixels. Raises NecoError before `resolve` where a size was left open."""
        sides = [self.global_size] * self.global_views + [self.local_size] * self.local_views
        sizes = [side for side in sides if side is not None]
        if len(sizes) < len(sides):
            raise NecoError("the sizes of the views are open: give global_size and local_size, or call resolve")
        return sizes

    def sample(self, rng: np.random.Generator, height: int, width: int) -> ViewParams:
        """Draw the views of an image of this size: a function of the generator's state and the size alone."""
        crops = np.array(self._crops(rng, height, width))
        chance = rng.random((len(crops), 12))
        jitter, grey, blur = (chance[:, :3] < self.probabilities).T
        values = self.lowest + (self.highest - self.lowest) * chance[:, 3:8]
        return ViewParams(crops, jitter, chance[:, 8:].argsort(axis=1), values[:, :4], grey, values[:, 4] * blur)

    def apply(self, image: np.ndarray, params: ViewParams) -> tuple[Tensor, Tensor]:
        """The views' pixels: uint8 (H, W, 3) RGB -> uint8 global views (G, 3, S, S) and local views (L, 3, s, s)."""
        _ = self.sizes  # all there
        global_views, local_views = (
            torch.empty(count, 3, side or 0, side or 0, dtype=torch.uint8)
            for count, side in ((self.global_views, self.global_size), (self.local_views, self.local_size))
        )
        source: np.ndarray | Image.Image = Image.fromarray(image) if self.applier == "pil" else image
        view: Callable[..., np.ndarray | Image.Image] = reference.view if self.applier == "pil" else fast.view
        targets = [*global_views.numpy(), *local_views.numpy()]
        for target, *row in zip(targets, *params, strict=True):
            pixels = np.asarray(view(source, target.shape[-1], *row))
            if pixels.ndim == 2:
                target[:] = pixels
            else:
                cv2.split(pixels, list(target))
        return global_views, local_views

    def _crops(self, rng: np.random.Generator, height: int, width: int) -> list[Crop]:
        crops: list[Crop] = []
        for view, scale in enumerate(self.scales):
            wanted = self.min_overlap * height * width * (2 if view == 1 < self.global_views else 1)
            for _ in range(DRAWS):
                crop = random_crop(rng, height, width, scale, self.ratio)
                if all(overlap(crop, other) > wanted for other in crops[: self.global_views]):
                    break
            else:
                self._warn(height, width)
                crop = centred_crop(height, width, self.ratio)
                if not all(overlap(crop, other) for other in crops[: self.global_views]):
                    crops = [crop] * view  # a global view beside the centre of a long image: no box would be left
            crops.append(crop)
        return crops

    def _warn(self, height: int, width: int) -> None:
        if not self._warned:
            warnings.warn(
                f"no crop of an image of {width} x {height} pixels overlaps its other views by {self.min_overlap:.0%} "
                f"of the area in {DRAWS} draws: centred crops are used (said once)",
                stacklevel=3,
            )
        self._warned = True
