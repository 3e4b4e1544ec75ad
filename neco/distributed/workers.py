"""Processes that read images for another one: how they start, how they hand over batches, what is said when they fail.

torch hands tensors over in /dev/shm, which has 64 MB in a container of docker. What does not fit there goes through the
pipe between the processes: slower, and always possible.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import default_collate, get_worker_info
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from neco.utils import signals
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
SHARED = "/dev/shm"
ROOM = "a larger /dev/shm (docker run --shm-size=8g) or fewer workers (train.workers, extract.workers; 0: none)"
_full = False  # no room was found


def start_worker(worker: int) -> None:
    """Set up a worker: it uses one core, leaves signals to the process that it works for, and needs no /dev/shm."""
    signals.ignore(worker)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    ForkingPickler.register(Tensor, _reduce)


def stack(items: Sequence[Any]) -> Any:
    """`default_collate`; where torch finds no room for the batch in /dev/shm, in the memory of this process."""
    if not _full:
        try:
            return default_collate([*items])
        except RuntimeError as error:
            if get_worker_info() is None or "shared memory" not in str(error):
                raise
            _give_up(error)
    return collate([*items], collate_fn_map={**default_collate_fn_map, Tensor: _stack})


def _stack(tensors: Sequence[Tensor], *, collate_fn_map: Any = None) -> Tensor:
    return torch.stack([*tensors])


def _reduce(tensor: Tensor) -> Any:
    """How a tensor is pickled: its place in shared memory or, without room there, what it holds."""
    if not _full:
        try:
            return reduce_tensor(tensor.share_memory_())
        except RuntimeError as error:
            _give_up(error)
    return reduce_tensor(tensor) if tensor.is_shared() else (torch.from_numpy, (tensor.numpy(),))


def _give_up(error: RuntimeError) -> None:
    """From now on this worker uses pipes: each attempt leaves an empty file in /dev/shm. The first worker says so."""
    global _full
    _full = True
    info = get_worker_info()
    if info is None or info.id == 0:  # torch pickles in a thread of the worker
        log.warning("%s (%s): they go through pipes, which is slower. Better: %s", _shared(), error, ROOM)


def _shared() -> str:
    with contextlib.suppress(OSError):
        held = os.statvfs(SHARED)
        return f"{SHARED} has {held.f_frsize * held.f_blocks / 2**20:.0f} MB, not enough for batches of images"
    return f"there is no {SHARED}"


@contextlib.contextmanager
def named_workers() -> Iterator[None]:
    """A block in which the end of a worker is a NecoError."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:  # from any line: torch raises in a signal's handler
        errors: list[BaseException] = [error]  # what Lightning raises while it cleans up hides torch's
        while before := errors[-1].__cause__ or errors[-1].__context__:
            errors.append(before)
        said = "\n".join(map(str, errors))
        told = re.search(r"DataLoader (worker.* (killed|exited)|timed out).*|received 0 items of ancdata", said)
        if not told and isinstance(error, RuntimeError):  # the others: in the middle of handing over a batch
            raise
        why = told[0].rstrip(".") if told else f"{type(error).__name__}: {error}"
        advice = "Mostly memory is short: lower the number of workers (train.workers, extract.workers)"
        if "Bus error" in why:
            why, advice = why.partition(". It is")[0], f"{_shared()}; take {ROOM}"
        elif "ancdata" in why:
            advice = "Too many files are open: raise the limit (ulimit -n 65536) or lower the number of workers"
        raise NecoError(
            f"a process that reads images is gone or hangs ({why}). {advice}. "
            "The same command goes on from what is saved"
        ) from error
