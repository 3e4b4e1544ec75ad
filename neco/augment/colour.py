"""Colour of a view: jitter, greyscale and blur on bytes (OpenCV, in a worker); normalisation. Of batches: `batched.py`.

The references are PIL's `ImageEnhance`, `convert` and `GaussianBlur`, which the published models were trained with.
"""

import functools
import math

import cv2
import numpy as np
import torch
from torch import Tensor

from neco.config.types import MEAN, STD

# Parts of (3, 4) colour matrices, whose last column is added: the pixel itself, its grey level (ITU-R 601), a constant
PIXEL, CONSTANT = np.eye(3, 4), np.eye(1, 4, 3)
GREY = np.array([0.299, 0.587, 0.114, 0])


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Times `factor`; equals PIL."""
    return _transform(image, factor * PIXEL)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from the mean grey level by `factor`; equals PIL where the rounded mean does."""
    mean = int(cv2.mean(grey(image))[0] + 0.5)
    return _transform(image, factor * PIXEL + (1 - factor) * mean * CONSTANT)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from the pixel's own grey level by `factor`; within 1 level of PIL."""
    return _transform(image, factor * PIXEL + (1 - factor) * GREY)


def hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turn the hue by `shift` turns (-0.5..0.5) in 8-bit HSV; within 7 levels of PIL, 0.5 on average."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    turn = np.zeros_like(hsv[0])  # a whole row: three times faster than adding to every third byte
    turn[:, 0] = (int(shift * 255) - 1) % 256  # -1: PIL truncates the hue, OpenCV rounds it
    return cv2.cvtColor(hsv + turn, cv2.COLOR_HSV2RGB_FULL)


def jitter(image: np.ndarray, order: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Brightness 0, contrast 1, saturation 2, hue 3 by their `factors` (4,), in the drawn `order` (4,)."""
    steps = brightness, contrast, saturation, hue
    for step in order.tolist():
        image = steps[step](image, factors[step])
    return image


def grey(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> (H, W); within 1 level of PIL."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """PIL's GaussianBlur: three passes of a box with soft edges (Gwosdek et al. 2011), border pixels repeated.

    Within 3 levels of PIL, at the border too; a true Gaussian is up to 30 off there and no faster.
    """
    taps = box(sigma)
    for _ in range(3):
        image = cv2.sepFilter2D(image, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)
    return image


def box(sigma: float) -> np.ndarray:
    """Weights of one of the three passes of `blur`, an odd number of them."""
    variance = sigma**2 / 3
    radius = int((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * radius + 1) * (radius * (radius + 1) - 3 * variance) / (6 * (variance - (radius + 1) ** 2))
    kernel = np.array([edge] + [1.0] * (2 * radius + 1) + [edge], np.float32)
    kernel /= kernel.sum()
    kernel[radius + 1] += 1 - kernel.sum(dtype=np.float64)  # OpenCV's integer path wants a sum of exactly 1
    return kernel


def normalise(images: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) in 0..255 -> float32: ImageNet mean subtracted, divided by its standard deviation."""
    mean, std = _statistics(images.device)
    return images.float().sub_(mean).div_(std)


@functools.cache  # a fresh tensor each time would be a copy to the device that the host waits for
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (255 * torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return mean.float().to(device), std.float().to(device)


def _transform(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The (3, 4) matrix times each pixel, cut to 0..255. Less just under a half, rounding truncates, as PIL does."""
    return cv2.transform(image, matrix - 0.499 * CONSTANT)
