"""Peak memory: what a training step will need, and what it took."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from neco.distributed.device_memory import current, total
from neco.training.align import pair_order

ROOM = 0.8  # an estimate may be a quarter too low


class _Attention(torch.autograd.Function):
    """What a fused attention keeps for its backward: q, k, v, its output and one number a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("only traced, never run")


@contextlib.contextmanager
def _instead(owner: Any, name: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, real)


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """While entered, notes what autograd keeps, parameters apart: each storage once."""

    def __init__(self) -> None:
        super().__init__(self.note, lambda tensor: tensor)
        self.tensors: dict[int, Tensor] = {}

    def note(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not (tensor._base is not None and tensor._base.is_leaf):
            self.tensors.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    def size(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


def saved_for_backward(function: Callable[[], Any]) -> int:
    """Bytes of distinct storages that autograd keeps for `function`'s backward, parameters apart.

    Of a checkpointed call that is its inputs; the largest of these calls adds what it keeps while it is repeated.
    `function` runs on the meta device, so nothing is computed and nothing allocated.
    """
    kept, repeated = _Kept(), [0]

    def checkpoint(call: Callable[..., Any], *inputs: Any, use_reentrant: bool) -> Any:
        inside = _Kept()
        with inside:
            output = call(*inputs)
        if output.requires_grad:
            for value in inputs:
                if isinstance(value, Tensor):
                    kept.note(value)
            repeated.append(inside.size())
        return output

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _Attention.apply(q, k, v)

    with (
        kept,
        _instead(F, "scaled_dot_product_attention", attention),
        _instead(torch.utils.checkpoint, "checkpoint", checkpoint),
    ):
        function()
    return kept.size() + max(repeated)


def estimate(module: Any, sizes: list[tuple[int, int]], batch: int, bf16: bool, device: torch.device) -> int:
    """Bytes at the peak of a training step of `batch` images with views of `sizes` (height, width), before any is run.

    In use now (the networks) + gradients + AdamW's two moments + what autograd keeps of the student + what the loss
    takes. What is kept is counted by tracing the student on the meta device, so it holds for any network. The loss has
    the similarities of student and teacher and a gradient in float32, or one of them in float64 on the way; and the
    aligned patches, also in float64.
    """
    views = len(sizes) + (module.global_views == 1)  # a single global view is the teacher's alone
    images = len(pair_order(module.global_views, views)) * batch
    patches, others = module.loss.grid**2, module.loss.compared
    compared = 16 * images * patches * others + 12 * images * (2 * patches + others) * module.student.head.out
    student = copy.deepcopy(module.student).to("meta").train()
    if bf16:
        student = student.bfloat16()
    dtype = torch.bfloat16 if bf16 else torch.float32
    inputs = [torch.empty(batch * sizes.count(size), 3, *size, device="meta", dtype=dtype) for size in set(sizes)]
    traced = saved_for_backward(lambda: [student(images) for images in inputs])
    trained = sum(p.numel() * p.element_size() for p in module.student.parameters() if p.requires_grad)
    to_come = sum(p.numel() * p.element_size() for p in module.parameters() if p.device.type != device.type)
    return current(device) + to_come + 3 * trained + traced + compared


def largest_batch(module: Any, sizes: list[tuple[int, int]], bf16: bool, device: torch.device) -> int:
    """Images for which `estimate` stays within ROOM of the device's memory; the module may be on the meta device."""
    one, two = (estimate(module, sizes, batch, bf16, device) for batch in (1, 2))
    return max(0, 1 + int((ROOM * total(device) - one) // (two - one)))
