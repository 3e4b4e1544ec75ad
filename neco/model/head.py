"""The projection head: what the loss compares. Shapes: ... any leading dimensions, D channels."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neco.config.types import Few, Width
from neco.model.linear import hasten


class Head(nn.Module):
    """MLP with GELU between its layers, output of length 1 per patch: (..., dim) -> (..., out), float32 or better.

    NeCo, section 3 and appendix: three layers, `dim -> 2048 -> 2048 -> 256`.
    A zero vector stays zero. The norm is taken in float32, since under bf16 lengths would be off by 0.4%.

    Args:
        dim: channels of the backbone.
        hidden: width between the layers.
        out: channels of the result.
        layers: number of linear layers.
    """

    def __init__(self, dim: int, *, hidden: Width = 2048, out: Width = 256, layers: Few = 3) -> None:
        super().__init__()
        widths = [dim, *[hidden] * (layers - 1), out]
        steps: list[nn.Module] = []
        for before, after in pairwise(widths):
            steps += [nn.Linear(before, after), nn.GELU()]
        self.layers = hasten(nn.Sequential(*steps[:-1]))
        self.out = out

    def forward(self, tokens: Tensor) -> Tensor:
        projected = self.layers(tokens)
        # eps 1e-6: with the default 1e-12 the gradient of a zero vector would be 1e12
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1, eps=1e-6)
