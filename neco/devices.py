"""Several processes as one: which this is, and what they have together. Without a process group there is only this one.

Everything that is shared goes through `gather`, `total` and `merge`, in the same order in every process.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from neco.values import READERS

T = TypeVar("T")
reached = 0  # how far this process has come: the same number at the same place in all


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def launched() -> int:
    """Number of processes that a launcher (torchrun, SLURM's is Lightning's business) says there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def leader() -> bool:
    """Whether this is the process that writes and speaks; known before there is a process group, too."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "NODE_RANK", "LOCAL_RANK"))


def readers(workers: int | Literal["auto"], device: torch.device | str, processes: int | None = None) -> int:
    """How many processes read images for this one.

    `auto`: 2; for a GPU up to 8, as far as this process's share of the cores goes.

    Args:
        processes: that share this machine's cores; None = as many as torchrun says, else all there are.
    """
    if workers != "auto":
        return workers
    if not str(device).startswith("cuda"):
        return 2
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or cores // processes
    return max(1, min(READERS, share - 1))


def fast_attention() -> contextlib.AbstractContextManager[None]:
    """A block in which cuDNN's attention is the first choice: on Hopper it is the faster one, and torch asks it last.

    Where it cannot (other GPUs, the CPU, `train.deterministic`) torch's own are taken as ever.
    """
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def join() -> None:
    """Become one of the processes that torchrun started; nothing without it."""
    if launched() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of `items`: consecutive, in the order of the processes, of nearly equal length."""
    first, last = (len(items) * place // world() for place in (rank(), rank() + 1))
    return items[first:last]


def gather(x: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all processes along `dim`, in their order. Equal shapes: nothing waits. Gradients flow."""
    if world() == 1:
        return x
    _reach()
    if x.requires_grad:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x.contiguous()), dim)  # type: ignore[arg-type]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on a device, without waiting for it: from memory that is not pinned a copy waits for all that is queued."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def gather_uneven(x: Tensor) -> Tensor:
    """The rows (of the first dimension) of all processes, in their order; from any device, on the device of x."""
    if world() == 1:
        return x
    _reach()
    local = x.detach().contiguous().to(_place(x))
    lengths = [torch.zeros(1, dtype=torch.long, device=local.device) for _ in range(world())]
    dist.all_gather(lengths, lengths[0].new_tensor([len(local)]))
    longest = max(int(length) for length in lengths)
    padded = local.new_zeros(longest, *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)]).to(x.device)


def total(x: Tensor) -> Tensor:
    """Sum over all processes, element by element; no gradient."""
    if world() == 1:
        return x
    _reach()
    summed = x.detach().to(_place(x), copy=True)
    dist.all_reduce(summed)
    return summed.to(x.device)


def merge(value: T) -> list[T]:
    """Any small value of each process, in their order."""
    if world() == 1:
        return [value]
    _reach()
    values: list[T | None] = [None] * world()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def _reach() -> None:
    global reached
    reached += 1


def _place(x: Tensor) -> torch.device:
    """Where the process group wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
