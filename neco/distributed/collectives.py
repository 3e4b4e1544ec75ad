"""Several processes as one: which this is, and what they have together. Without a process group there is only this one.

Everything that is shared goes through `gather`, `total` and `merge`, in the same order in every process.
"""

import atexit
import contextlib
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from neco.utils import processes
from neco.utils.errors import NecoError

READERS = 8  # processes that read images for a GPU, at most, where their number is `auto`


MEETING_MINUTES = 10.0  # that processes without a key for it wait for each other at the start
ANSWER = timedelta(seconds=20)  # in which the store of the first process answers
T = TypeVar("T")
reached = 0  # how far this process has come: the same number at the same place in all


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def leader() -> bool:
    """Whether this is the process that writes and speaks; known before there is a process group, too."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not any(processes.number(name) for name in ("RANK", "NODE_RANK", "LOCAL_RANK"))


def readers(workers: int | Literal["auto"], device: torch.device | str, sharing: int | None = None) -> int:
    """How many processes read images for this one.

    `auto`: 2; for a GPU up to 8, as far as this process's share of the cores goes.

    Args:
        sharing: processes that share this machine's cores; None = as many as torchrun says, else all there are.
    """
    if workers != "auto":
        return workers
    if not str(device).startswith("cuda"):
        return 2
    sharing = sharing or processes.number("LOCAL_WORLD_SIZE", world())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if of_task := processes.number("SLURM_CPUS_PER_TASK"):
        cores, sharing = of_task, 1 if processes.is_task_of_slurm() else sharing
    return max(1, min(READERS, cores // sharing - 1))


def fast_attention() -> contextlib.AbstractContextManager[None]:
    """A block in which cuDNN's attention is the first choice: on Hopper it is the faster one, and torch asks it last.

    Where it cannot (other GPUs, the CPU, `train.deterministic`) torch's own are taken as ever.
    """
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def join(
    device: torch.device | None = None,
    timeout: timedelta | None = None,
    minutes: float = MEETING_MINUTES,
    children: Sequence[Any] = (),
) -> None:
    """Become one of the processes that were started together; does nothing if this one is alone.

    Args:
        device: on which it computes; None = its GPU if there are any.
        timeout: of each exchange later on; None = torch's.
        minutes: that the others are waited for.
        children: the other processes, `Popen`, where this process has started them.

    Raises:
        NecoError: some have not come in time, or have ended.
    """
    if processes.number("WORLD_SIZE", 1) == 1 or dist.is_initialized():
        return
    if device is None:
        there = torch.cuda.is_available()
        device = torch.device("cuda", processes.number("LOCAL_RANK")) if there else torch.device("cpu")
    store = meet(60 * minutes, children)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=processes.own_rank(), world_size=processes.number("WORLD_SIZE"),
        timeout=timeout, device_id=device if cuda else None,
    )  # fmt: skip


def meet(seconds: float, children: Sequence[Any] = ()) -> dist.Store:
    """Wait until all processes are here, in Python, where signals are heard; returns the store that they share.

    Raises NecoError for those that have not come after `seconds`, and for `children` that have ended.
    """
    rank, world_size, end = processes.own_rank(), processes.number("WORLD_SIZE"), time.monotonic() + seconds
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), processes.number("MASTER_PORT")
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then it has the store
    place = f"MASTER_ADDR={host}, MASTER_PORT={port}"

    def wait(why: str) -> None:
        for number, child in enumerate(children, 1):
            if code := child.poll():
                how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                raise NecoError(f"process {number} of {world_size} has ended ({how}) before the processes met")
        if time.monotonic() > end:
            raise NecoError(f"{why} in {seconds:g} s ({place}); were all processes started, and do they still run?")
        time.sleep(0.1)

    first = rank == 0 and not of_torchrun
    while not first:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
            break
        wait(f"process 0 of {world_size} did not come")
    try:
        store: dist.Store = dist.TCPStore(host, port, is_master=first, wait_for_workers=False, timeout=ANSWER)
        if of_torchrun:
            store = dist.PrefixStore(f"/worker/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        store.set(f"here/{rank}", "")
        store.add("here", 1)
        while store.add("here", 0) < world_size:
            missing = [str(r) for r in range(world_size) if not store.check([f"here/{r}"])]
            wait(f"of {world_size} processes these did not come: {', '.join(missing[:8])}")
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            why = "another program has this port; choose another or unset it"
            raise NecoError(f"MASTER_PORT={port}: {why}") from error
        raise NecoError(f"process 0 of {world_size} has ended before the processes met ({place})") from error
    return store


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
