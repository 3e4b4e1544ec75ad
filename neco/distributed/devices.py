"""The device of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neco.utils import processes
from neco.utils.errors import NecoError


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep float32 products on a GPU in float32, whatever the training around has chosen (TF32 keeps 10 bits)."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # of convolutions, true by default
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises NecoError when a GPU is asked for and none is there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise NecoError("device=cuda: no GPU is available here; use device=auto or device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if (local := processes.number("LOCAL_RANK")) < torch.cuda.device_count():
        torch.cuda.set_device(local)  # else whatever is tried before the processes meet takes memory of the first GPU
    return torch.device("cuda")


def device_name(device: torch.device) -> str:
    """What to call the device in reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
