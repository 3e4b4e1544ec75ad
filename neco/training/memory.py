"""Peak memory: what a training step will need, and what it took."""

import contextlib
import copy
import functools
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GB = 1024**3


def reset_peak(device: torch.device) -> None:
    """Start measuring anew (on the CPU where Linux allows it)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes at the highest point since `reset_peak`: of the GPU's allocator, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found.group(1)) * 1024 if found else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def current(device: torch.device) -> int:
    """Bytes in use now, measured as `peak` does."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found.group(1)) * 1024 if found else 0
    return peak(device)


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
def _fused_attention() -> Iterator[None]:
    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *args, **kwargs: _Attention.apply(q, k, v)  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


def saved_for_backward(function: Callable[[], Any]) -> int:
    """Bytes of distinct storages that autograd keeps for `function`'s backward, parameters apart.

    `function` runs on the meta device, so nothing is computed and nothing allocated.
    """
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not (tensor._base is not None and tensor._base.is_leaf):
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _fused_attention():
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def estimate(module: Any, sizes: list[int], batch: int, bf16: bool, device: torch.device) -> int:
    """Bytes at the peak of a training step of `batch` images with views of `sizes` pixels, before any is run.

    In use now (the networks) + gradients + AdamW's two moments + what autograd keeps of the student. The last is
    counted by tracing the student on the meta device, so it holds for any network.
    """
    student = copy.deepcopy(module.student).to("meta").train()
    if bf16:
        student = student.bfloat16()
    dtype = torch.bfloat16 if bf16 else torch.float32
    traced = sum(
        saved_for_backward(
            functools.partial(
                student, torch.empty(batch * sizes.count(size), 3, size, size, device="meta", dtype=dtype)
            )
        )
        for size in set(sizes)
    )
    trained = sum(p.numel() * p.element_size() for p in module.student.parameters() if p.requires_grad)
    networks = 0 if device.type == "cpu" else sum(p.numel() * p.element_size() for p in module.parameters())
    return current(device) + networks + 3 * trained + traced


def total(device: torch.device) -> int:
    """Bytes that the device has: a GPU's memory, or the machine's (or container's) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(installed, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return installed
