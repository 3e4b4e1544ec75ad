"""Colour of a whole batch of views on any device: what `colour.py` does to one view in a worker, to the same bytes.

Everything random comes with the batch (`parameters`). No view takes a branch of its own and nothing is read back, so
the host never waits. Numbers are rounded, whole and below 2^24, which float32 holds; matrix products and convolutions
would not do, for they may run in TF32. OpenCV's integer arithmetic is followed to its constants: about one pixel of
100,000 differs from the worker's by a level, where sums are rounded in another order, and hardly any by more, where a
later step stretches that.

Legend: K views of H x W pixels, S jitter steps, T taps.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from neco.augment.colour import CONSTANT, GREY, PIXEL, box
from neco.augment.views import ViewParams

_, CONTRAST, SATURATION, HUE = range(4)


class Colours(NamedTuple):
    """The colours of V views, in a batch (B, V, ...), as `recolour` wants them."""

    mix: Tensor  # (V, S, 3, 4) float64: a step's colour matrix, whose last column is times the mean grey level
    turn: Tensor  # (V, S): what a step adds to the hue in 256ths of a turn, -1 where it is none of hue
    grey: Tensor  # (V,) bool
    taps: Tensor  # (V, T): one pass of the blur


def parameters(params: ViewParams, largest_sigma: float) -> Colours:
    """The colours of an image's views; the blur has room for `largest_sigma`."""
    mix = np.tile(PIXEL, (*params.order.shape, 1, 1))
    turn = np.full(params.order.shape, -1)
    for view in np.flatnonzero(params.jitter):
        for step, kind in enumerate(params.order[view].tolist()):
            factor = params.factors[view, kind]
            if kind == HUE:
                turn[view, step] = (int(factor * 255) - 1) % 256  # as in `colour.hue`
            elif kind == SATURATION:
                mix[view, step] = np.rint(1024 * (factor * PIXEL + (1 - factor) * GREY)) / 1024  # OpenCV's precision
            else:
                mix[view, step] = factor * PIXEL + (kind == CONTRAST) * (1 - factor) * CONSTANT
    taps = np.zeros((len(params.sigma), len(box(largest_sigma)) if largest_sigma else 1))
    for row, sigma in zip(taps, params.sigma, strict=True):
        kernel = box(sigma) if sigma else np.ones(1)
        row[(len(row) - len(kernel)) // 2 :][: len(kernel)] = kernel
    turned, weights = (torch.from_numpy(x).float() for x in (turn, taps))
    return Colours(torch.from_numpy(mix), turned, torch.from_numpy(params.grey), weights)


def recolour(images: Tensor, mix: Tensor, turn: Tensor, grey: Tensor, taps: Tensor) -> Tensor:
    """uint8 (K, 3, H, W) -> uint8, jittered, greyed and blurred by the K rows of `Colours`."""
    pixels = images.float()
    for step in range(mix.shape[1]):
        shift = turn[:, step, None, None, None]
        pixels = torch.where(shift < 0, _mixed(pixels, mix[:, step]), _turned(pixels, shift))
    pixels = torch.where(grey[:, None, None, None], _level(pixels), pixels)
    return _blurred(pixels, taps).byte()


def _level(pixels: Tensor) -> Tensor:
    """Grey level (K, 1, H, W), rounded: ITU-R 601 in 15 bits."""
    red, green, blue = pixels.split(1, 1)
    return ((9798 * red + 19235 * green + 3735 * blue + 16384) / 32768).floor()


def _mixed(pixels: Tensor, matrix: Tensor) -> Tensor:
    """`colour._transform` by matrices (K, 3, 4)."""
    mean = (_level(pixels).mean((1, 2, 3), keepdim=True, dtype=torch.float64) + 0.5).floor()
    *channels, constant = matrix[..., None, None].unbind(2)  # (K, 3, 1, 1) each
    red, green, blue = (weight.float() * x for weight, x in zip(channels, pixels.split(1, 1), strict=True))
    return (red + green + blue + (constant * mean - 0.499).float()).round().clamp(0, 255)


def _turned(pixels: Tensor, shift: Tensor) -> Tensor:
    """`colour.hue` by (K, 1, 1, 1) 256ths of a turn: to 8-bit HSV and back, which is 255ths to OpenCV."""
    red, green, blue = pixels.split(1, 1)
    value = pixels.amax(1, keepdim=True)
    spread = value - pixels.amin(1, keepdim=True)
    saturation = ((spread * (255 * 4096 / value.clamp(min=1)).round() + 2048) / 4096).floor()
    hue = torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    hue = torch.where(value == red, green - blue, hue)
    hue = ((hue * (256 * 4096 / (6 * spread.clamp(min=1))).round() + 2048) / 4096).floor()
    sector = (hue + shift) % 256 * (6 / 255)
    sector = torch.cat([sector + 5, sector + 3, sector + 1], 1) % 6
    return (value - value * (saturation / 255) * torch.minimum(sector, 4 - sector).clamp(0, 1)).round()


def _blurred(pixels: Tensor, taps: Tensor) -> Tensor:
    """`colour.blur` by taps (K, T)."""
    reach = taps.shape[1] // 2
    weights = taps[:, :, None, None, None].unbind(1)
    for _ in range(3 if reach else 0):
        for axis, pad in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
            length, padded = pixels.shape[axis], F.pad(pixels, pad, mode="replicate")
            parts = (weight * padded.narrow(axis, i, length) for i, weight in enumerate(weights))
            pixels = functools.reduce(torch.add, parts)
        pixels = pixels.round()
    return pixels
