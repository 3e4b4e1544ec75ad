"""Low-rank adapters (LoRA, arXiv 2106.09685) of attention weights, and their way back into plain weights.

Shapes: o outputs and i inputs of a linear layer, r the rank.
"""

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from neco.utils.errors import NecoError

LAYERS = ("qkv", "q_proj", "k_proj", "v_proj", "proj")  # timm's names, of which a network has some
PARTS = ("original", "0.up", "0.down", "0.scale")  # what `merged` takes, as torch names it in a state


def merged(weight: Tensor, up: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    """weight + scale * up @ down: (o, i), (o, r), (r, i), () -> (o, i)."""
    return weight + scale * (up @ down)


class LoRA(nn.Module):
    """What is added to a weight (o, i): alpha / rank * up (o, r) @ down (r, i), nothing at the start.

    A parametrisation of `weight` rather than a layer of its own: timm reads `qkv.weight` past the layer's forward, and
    whoever reads it must see the adapted one. Each pass keeps the merged weights, small beside the activations.

    A teacher averages the factors, and the product of averages is not the average of products: its merged weights are
    not the moving average of the student's.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))
        self.down = nn.Parameter(weight.new_empty(rank, inputs))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear's
        self.register_buffer("scale", weight.new_tensor(alpha / rank))  # a checkpoint alone says how to merge

    def forward(self, weight: Tensor) -> Tensor:
        return merged(weight, self.up, self.down, self.scale)


def adapt(block: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a block and give its attention adapters, which train. Raises NecoError for attention of another kind."""
    block.requires_grad_(False)
    layers = [getattr(getattr(block, "attn", None), name, None) for name in LAYERS]
    found = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not found:
        raise NecoError(f"a {type(block).__name__} has no attention that takes adapters: no {', '.join(LAYERS)}")
    for layer in found:
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight.detach(), rank, alpha))


def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's state with each adapter merged into its weight, on the CPU; without adapters the state as it is."""
    folded = dict(state)
    for layer in [key.removesuffix(f"parametrizations.weight.{PARTS[1]}") for key in state if key.endswith(PARTS[1])]:
        names = [f"{layer}parametrizations.weight.{part}" for part in PARTS]
        if state.keys() >= set(names):
            weight, up, down, scale = parts = [folded.pop(name).detach().cpu() for name in names]
            if f"{layer}weight" in state:
                raise NecoError(f"{layer}weight is there twice: plain, and with adapters")
            # As large as the weight: two thin factors alone could claim any size.
            if up.ndim != 2 or down.ndim != 2 or weight.shape != (len(up), down.shape[1]) or scale.numel() != 1:
                shapes = ", ".join(str(tuple(part.shape)) for part in parts)
                raise NecoError(f"the adapters of {layer}weight do not fit: {shapes}")
            try:
                folded[f"{layer}weight"] = merged(*parts)
            except RuntimeError as error:
                raise NecoError(f"the adapters of {layer}weight do not fit: {error}") from error
    return folded
