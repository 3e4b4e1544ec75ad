"""Foreground of an image from the attention of its backbone, for `loss.mask=fg|bg` and for evaluations.

Shapes: K images, h w patches.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MASS = 0.6  # of the attention that the foreground holds
SIGMA, TAPS = 0.6, 7  # of the blur, in patches


def foreground(attention: Tensor, mass: float = MASS) -> Tensor:
    """The smallest set of patches that holds `mass` of the blurred attention, without specks of one or two patches.

    Args:
        attention: (K, heads, h, w) of CLS to the patches; heads are averaged.

    Returns:
        (K, h, w) bool. Specks are 8-connected components; the blur reflects at the border.
    """
    return without_specks(heaviest(blur(attention.float().mean(1)), mass))


def heaviest(maps: Tensor, mass: float) -> Tensor:
    """The smallest set of patches that holds `mass` of each map, (K, h, w) -> bool."""
    value, place = maps.flatten(1).sort(1)
    kept = value.cumsum(1) > (1 - mass) * value.sum(1, keepdim=True)
    return torch.zeros_like(kept).scatter(1, place, kept).view_as(maps)


def blur(maps: Tensor) -> Tensor:
    """Gaussian of 7 taps and sigma 0.6 over (K, h, w)."""
    at = torch.arange(TAPS, device=maps.device, dtype=maps.dtype) - TAPS // 2
    taps = (-0.5 * (at / SIGMA) ** 2).exp()
    taps = taps / taps.sum()
    reach = [min(TAPS // 2, side - 1) for side in maps.shape[1:]]  # a map of few patches reflects fewer of them
    out = F.pad(maps[:, None], (reach[1], reach[1], reach[0], reach[0]), mode="reflect")
    out = F.pad(out, [TAPS // 2 - r for r in (reach[1], reach[1], reach[0], reach[0])], mode="replicate")
    return F.conv2d(F.conv2d(out, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))[:, 0]


def without_specks(mask: Tensor) -> Tensor:
    """(K, h, w) bool without its 8-connected components of one or two patches.

    Counted, not labelled: alone is who has no neighbour, of a pair is who has one that has no other.
    """
    neighbours = _around(mask)
    single = mask & (neighbours == 1)
    speck = (neighbours == 0) | (single & (_around(single) == 1))
    return mask & ~speck


def _around(mask: Tensor) -> Tensor:
    """How many of the eight patches around each are set."""
    ones = torch.ones(1, 1, 3, 3, device=mask.device)
    return F.conv2d(mask[:, None].float(), ones, padding=1)[:, 0] - mask.float()
