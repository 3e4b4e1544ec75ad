"""Linear layers that multiply by oneDNN on CPUs with AVX-512, patch embeddings that multiply at all on a GPU.

torch takes MKL for float32, which on AMD's CPUs uses half the width of the unit: 200 GFLOP/s of 450 that oneDNN reaches
on two cores of Zen 5. On Intel's both are as fast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 128  # channels; below, what oneDNN takes to begin is more than it saves


def available() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, float32 on the CPU: (..., i), (o, i), (o,) -> (..., o)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, rows = grads[0].flatten(0, -2), x.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(grad, weight.mT).view_as(x) if of_x else None,
            product(grad.mT, rows.mT) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


class Linear(nn.Linear):
    """`nn.Linear` in all but speed; float32 on the CPU outside autocast and compilation goes through oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            input.is_cpu
            and {input.dtype, self.weight.dtype} == {torch.float32}
            and input.dim() > 1
            and input.numel()
            and not (torch.is_autocast_enabled("cpu") or torch.jit.is_tracing() or torch.compiler.is_compiling())
        ):
            return _Linear.apply(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


class Patches(nn.Conv2d):
    """A convolution whose stride is its kernel. On a GPU one matrix product: cuDNN has no fast kernel for 14 x 14."""

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input) if input.is_cuda else super().forward(input)

    def product(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        high, wide = self.kernel_size
        rows = images.unflatten(3, (-1, wide)).unflatten(2, (-1, high))  # (B, C, h, high, w, wide)
        rows, weight = rows.permute(0, 2, 4, 1, 3, 5).flatten(3), self.weight.flatten(1)
        if short := -rows.shape[-1] % 8:  # the tensor cores take rows of whole 16 bytes
            rows, weight = F.pad(rows, (0, short)), F.pad(weight, (0, short))
        return F.linear(rows, weight, self.bias).permute(0, 3, 1, 2)


def hasten(module: nn.Module) -> nn.Module:
    """Let a network's patch embedding, and its larger linear layers where oneDNN is the faster, take the fast way.

    Returns the module.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d and layer.stride == layer.kernel_size != (1, 1):
            layer.__class__ = Patches
    for layer in module.modules() if available() else ():
        if type(layer) is nn.Linear and min(layer.weight.shape) >= SMALLEST:
            layer.__class__ = Linear
    return module
