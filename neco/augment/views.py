"""Views of an image: which crops, which colours (`Views.sample`, all the randomness) and their pixels (`Views.apply`).

Legend: V views of an image, G global first, then L local; (H, W), (h, w) size of a global, local view in pixels.
Crops are integer (x1, y1, x2, y2) in image pixels, x2 and y2 exclusive.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple, Self

import cv2
import numpy as np
import torch
from annotated_types import Gt, MinLen
from PIL import Image
from torch import Tensor

from neco.augment import crop as fast
from neco.augment import reference
from neco.config.types import Factor, Few, Fraction, NoneOrFew, NonNegativeFloat, PositiveFloat, Size, sides
from neco.utils.errors import NecoError

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

    def plain(self) -> "ViewParams":
        """The same crops in the image's own colours, sharp."""
        return self._replace(**{name: np.zeros_like(getattr(self, name)) for name in ("jitter", "grey", "sigma")})


def view_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample's views in one epoch: a counter-based stream of its own, whoever draws it."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, index]))


def batch_scale(seed: int, batch: int, scales: Sequence[float]) -> float:
    """The one of `scales` that the sizes of a batch are multiplied by: a function of (seed, batch), as `view_rng`."""
    rng = np.random.Generator(np.random.Philox(key=[seed, batch], counter=[0, 1, 0, 0]))  # no view has this counter
    return scales[int(rng.integers(len(scales)))]


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


def show(size: tuple[int, int]) -> int | list[int]:
    """A (height, width) as it is written in YAML."""
    return size[0] if size[0] == size[1] else list(size)


class Views:
    """Random crops that overlap, each with its own colour jitter, greyscale and blur; no flips (NeCo, appendix).

    Every view after the first shares more than `min_overlap` of the image's area with each global view before it, the
    second global view more than twice that. A view that finds no such crop in 200 draws (a very thin image, a wanted
    overlap above the crop's own area) gets the centred crop, with one warning (in each worker).

    Args:
        teacher: `clean` = it sees the same crops of the global views as the student, without jitter, greyscale, blur.
        global_size, local_size: side in pixels, or [height, width]; None = chosen by `resolve` for the backbone.
        multi_scale: factors of all sizes, each batch takes one of them at random (`batch_scale`). Crops, and the blur
            in pixels, stay what they are.
        global_scale, local_scale: area of a crop as a share of the image's, lowest and highest.
        ratio: width / height of a crop over that of its view, lowest and highest, log-uniform.
        jitter: strengths of brightness, contrast, saturation (factor within 1 -+ strength) and hue (turns).
        blur_sigma: lowest and highest, in pixels of the view.
        applier: `uint8` = torch and OpenCV on bytes; `pil` = the published PIL pipeline, five to ten times slower.
        colour: where jitter, greyscale and blur are applied in training: by the `worker` that reads the image, or to
            the batch on the `device` (`batched.py`), the same within a grey level; `auto` = on a GPU.

    Raises:
        NecoError: no pair of views, a range that is upside down, a hue shift of more than half a turn, or PIL's colours
            on the device.
    """

    def __init__(
        self,
        *,
        global_views: Few = 2,
        local_views: NoneOrFew = 4,
        teacher: Literal["augmented", "clean"] = "augmented",
        global_size: Size | None = None,
        local_size: Size | None = None,
        multi_scale: Annotated[tuple[Annotated[Factor, Gt(0)], ...], MinLen(1)] = (1.0,),
        global_scale: tuple[PositiveFloat, Fraction] = (0.25, 1.0),
        local_scale: tuple[PositiveFloat, Fraction] = (0.05, 0.25),
        ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3),
        min_overlap: Fraction = 0.01,
        jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.8, 0.8, 0.8, 0.2),
        jitter_strength: Factor = 1.0,
        jitter_probability: Fraction = 0.8,
        grey_probability: Fraction = 0.2,
        blur_sigma: tuple[Factor, Factor] = (0.1, 2.0),
        blur_strength: Factor = 1.0,
        blur_probability: Fraction = 0.5,
        applier: Literal["uint8", "pil"] = "uint8",
        colour: Literal["auto", "worker", "device"] = "auto",
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
        if applier == "pil" and colour == "device":
            raise NecoError("colour=device: PIL works in the workers only; take applier=uint8, or colour=worker")
        self.global_views, self.local_views = global_views, local_views
        self.global_size, self.local_size = (
            None if size is None else sides(size) for size in (global_size, local_size)
        )
        self.patch = 1
        self.scales = [global_scale] * global_views + [local_scale] * local_views
        # Fixed here, as `scaled` rounds the sizes: a batch's scale must not change its crops
        aspects = (width / height for height, width in (size or (1, 1) for size in (self.global_size, self.local_size)))
        global_ratio, local_ratio = ((ratio[0] * aspect, ratio[1] * aspect) for aspect in aspects)
        self.ratios = [global_ratio] * global_views + [local_ratio] * local_views
        self.teacher, self.multi_scale, self.min_overlap = teacher, multi_scale, min_overlap
        self.applier, self.colour = applier, colour
        neutral = np.array([1.0, 1.0, 1.0, 0.0])
        sigma = np.multiply(blur_sigma, blur_strength)
        self.lowest = np.append(np.maximum(neutral - strength, [0, 0, 0, -0.5]), sigma[0])  # four factors, sigma
        self.highest = np.append(neutral + strength, sigma[1])
        self.probabilities = jitter_probability, grey_probability, blur_probability
        self._warned = False

    def resolve(self, patch: int, size: int) -> Self:
        """A copy with concrete sizes for a backbone of this patch and pretraining size.

        Left open, views are square; global ones have the pretraining size, local ones at most 98 pixels and half the
        shorter side of a global view, in whole patches: 518/98 for patch 14, 224/96 for patch 16.

        Raises:
            NecoError: a size that is no multiple of the patch.
        """
        views = copy.copy(self)
        views.patch = patch
        views.global_size = self.global_size or sides(size // patch * patch)
        longest = min(LOCAL_SIZE, min(views.global_size) // 2)
        views.local_size = self.local_size or sides(max(1, longest // patch) * patch)
        for name, (height, width) in (("global_size", views.global_size), ("local_size", views.local_size)):
            if height % patch or width % patch:
                valid = _near(height, patch) if height == width else f"[{_near(height, patch)}, {_near(width, patch)}]"
                shown = show((height, width))
                raise NecoError(f"{name}={shown} is no multiple of the backbone's patch, {patch} pixels: take {valid}")
        return views

    def scaled(self, factor: float) -> Self:
        """A copy with sizes `factor` times as large, to the nearest whole patch; its crops are the same."""
        _ = self.sizes  # all there
        views = copy.copy(self)
        views.global_size, views.local_size = (
            size and sides([self.patch * max(1, round(factor * side / self.patch)) for side in size])
            for size in (self.global_size, self.local_size)
        )
        return views

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each of the V views. Raises NecoError before `resolve` where a size was left open."""
        wanted = [self.global_size] * self.global_views + [self.local_size] * self.local_views
        sizes = [size for size in wanted if size is not None]
        if len(sizes) < len(wanted):
            raise NecoError("the sizes of the views are open: give global_size and local_size, or call resolve")
        return sizes

    def batched(self, device: torch.device) -> bool:
        """Whether a training on `device` applies the colours there."""
        return self.colour == "device" or (self.colour, self.applier, device.type) == ("auto", "uint8", "cuda")

    @property
    def largest_sigma(self) -> float:
        """Of the blur, in pixels of the view; 0 = none."""
        return float(self.highest[-1]) if self.probabilities[-1] else 0.0

    def sample(self, rng: np.random.Generator, height: int, width: int) -> ViewParams:
        """Draw the views of an image of this size: a function of the generator's state and the size alone."""
        crops = np.array(self._crops(rng, height, width))
        chance = rng.random((len(crops), 12))
        jitter, grey, blur = (chance[:, :3] < self.probabilities).T
        values = self.lowest + (self.highest - self.lowest) * chance[:, 3:8]
        return ViewParams(crops, jitter, chance[:, 8:].argsort(axis=1), values[:, :4], grey, values[:, 4] * blur)

    def apply(self, image: np.ndarray, params: ViewParams) -> tuple[Tensor, Tensor]:
        """The pixels of views: uint8 RGB (height, width, 3) -> uint8 global (G, 3, H, W) and local (L, 3, h, w)."""
        _ = self.sizes  # all there
        global_views, local_views = (
            torch.empty(count, 3, *(size or (0, 0)), dtype=torch.uint8)
            for count, size in ((self.global_views, self.global_size), (self.local_views, self.local_size))
        )
        self._fill([*global_views.numpy(), *local_views.numpy()], image, params)
        return global_views, local_views

    def clean(self, image: np.ndarray, params: ViewParams) -> Tensor:
        """What a clean teacher sees: the global views (G, 3, H, W) of `apply` in the image's own colours, sharp."""
        views = torch.empty(self.global_views, 3, *self.sizes[0], dtype=torch.uint8)
        self._fill([*views.numpy()], image, ViewParams(*(values[: self.global_views] for values in params.plain())))
        return views

    def _fill(self, targets: list[np.ndarray], image: np.ndarray, params: ViewParams) -> None:
        """Draw each view of `params` into its target (3, H, W)."""
        source: np.ndarray | Image.Image = Image.fromarray(image) if self.applier == "pil" else image
        view: Callable[..., np.ndarray | Image.Image] = reference.view if self.applier == "pil" else fast.view
        for target, *row in zip(targets, *params, strict=True):
            pixels = np.asarray(view(source, target.shape[1:], *row))
            if pixels.ndim == 2:
                target[:] = pixels
            else:
                cv2.split(pixels, list(target))

    def _crops(self, rng: np.random.Generator, height: int, width: int) -> list[Crop]:
        crops: list[Crop] = []
        for view, (scale, ratio) in enumerate(zip(self.scales, self.ratios, strict=True)):
            wanted = self.min_overlap * height * width * (2 if view == 1 < self.global_views else 1)
            for _ in range(DRAWS):
                crop = random_crop(rng, height, width, scale, ratio)
                if all(overlap(crop, other) > wanted for other in crops[: self.global_views]):
                    break
            else:
                self._warn(height, width)
                crop = centred_crop(height, width, ratio)
                if not all(overlap(crop, other) for other in crops[: self.global_views]):
                    # A global view beside the centre of a long image: no box would be left
                    crops = [centred_crop(height, width, other) for other in self.ratios[:view]]
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


def _near(side: int, patch: int) -> str:
    """The multiples of the patch around `side`."""
    multiples = sorted({side // patch * patch, -(-side // patch) * patch} - {0})
    return " or ".join(map(str, multiples))
