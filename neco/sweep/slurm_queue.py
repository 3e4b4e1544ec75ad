"""What SLURM's queue says of jobs."""

import os
import re
import subprocess
import time

POLL = 10  # seconds between two questions to SLURM


_queue: tuple[float, list[str]] = 0.0, []


def listed(job: str) -> bool:
    """Whether SLURM has it in its queue. (sacct, which submitit asks, would need SLURM's accounting.)"""
    global _queue
    if job not in _queue[1] or time.monotonic() - _queue[0] > POLL:
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode:
            return True  # a controller that does not answer for a while
        _queue = time.monotonic(), asked.stdout.split()
    return job in _queue[1]


def told(job: str) -> str:
    """What SLURM knows about a job; of one that ended minutes ago nothing."""
    return subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout


def preempted(job: str) -> bool:
    """Whether SLURM wants the place for another: a job that ends in time for that is not queued again by itself."""
    return os.environ["SUBMITIT_EXECUTOR"] == "slurm" and bool(re.search(r"PreemptTime=\d", told(job)))
