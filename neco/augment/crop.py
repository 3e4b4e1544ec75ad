"""One view of an image on bytes, in a worker: crop, resize, colour. Within a few grey levels of `reference.py`."""

import numpy as np
import torch
from torch.nn.functional import interpolate

from neco.augment import colour
from neco.config.types import sides


def resized_crop(image: np.ndarray, crop: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """The rectangle `crop` (x1, y1, x2, y2) of uint8 (H, W, 3) as (h, w, 3): antialiased, within 1 level of PIL.

    OpenCV's resize has no antialiasing: up to 60 levels off on local views.
    """
    x1, y1, x2, y2 = crop.tolist()
    region = image[y1:y2, x1:x2].copy()  # one block of memory: the resize is 3 to 10 times slower on rows with gaps
    pixels = torch.from_numpy(region.reshape(1, *region.shape)).permute(0, 3, 1, 2)
    pixels = interpolate(pixels, sides(size), mode="bilinear", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def view(
    image: np.ndarray,
    size: int | tuple[int, int],
    crop: np.ndarray,
    jitter: bool,
    order: np.ndarray,
    factors: np.ndarray,
    grey: bool,
    sigma: float,
) -> np.ndarray:
    """uint8 (H, W, 3) -> (h, w, 3), or (h, w) where `grey`; the parameters are a row of `ViewParams`."""
    pixels = resized_crop(image, crop, size)
    if jitter:
        pixels = colour.jitter(pixels, order, factors)
    if grey:
        pixels = colour.grey(pixels)
    return colour.blur(pixels, sigma) if sigma else pixels
