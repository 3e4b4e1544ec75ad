"""Memory of a device: in use, at the peak, in all."""

import contextlib
import os
import re
import resource
import sys
from pathlib import Path

import torch.utils.checkpoint

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
        return _process_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def current(device: torch.device) -> int:
    """Bytes in use now, measured as `peak` does."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _process_status("VmRSS") if sys.platform == "linux" else peak(device)


def _process_status(field: str) -> int:
    """Bytes that Linux gives for a field of this process's status; 0 where it has none."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def total(device: torch.device) -> int:
    """Bytes that the device has: a GPU's memory, or the machine's (or container's) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(installed, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return installed
