"""Trials in a forked process: a hang, a crash of the interpreter or too much memory is an outcome, not the end.

Topics with thousands of quick trials share it.
"""

import contextlib
import io
import logging
import multiprocessing
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from neco.utils.errors import NecoError

SECONDS = 5.0  # of CPU that one trial may take
PATIENCE = 24  # times as long before the process is ended: machines are shared
MEMORY = 1 << 30  # bytes that one trial may add


class Wrong(Exception):
    """An outcome that nobody should see: says what."""


@dataclass(frozen=True)
class Verdict:
    """What a trial came to: `said` holds the message of an error or what was wrong."""

    kind: str
    said: str = ""
    seconds: float = 0.0
    memory: int = 0

    @property
    def bad(self) -> bool:
        return self.kind in ("crash", "hang", "killed", "memory", "wrong")


def run(
    trials: Sequence[Any], act: Callable[[Any], str], memory: int = MEMORY, seconds: float = SECONDS
) -> list[Verdict]:
    """`act(trial)` for each, in processes forked from this one. It returns the kind of outcome, or raises.

    NecoError is the kind `refused`, Wrong is `wrong`, every other exception `crash`; `hang`, `killed` (by a signal)
    and `memory` are what the parent sees.
    """
    context, found = multiprocessing.get_context("fork"), []
    while len(found) < len(trials):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(ours, theirs, trials[len(found) :], act, memory, seconds))
        child.start()
        theirs.close()
        while len(found) < len(trials):
            if not ours.poll(seconds * PATIENCE):
                found.append(Verdict("hang", f"no end after {seconds * PATIENCE:.0f} s"))
                break
            try:
                found.append(ours.recv())
            except EOFError:
                child.join()
                found.append(Verdict("killed", f"exit code {child.exitcode}"))
                break
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
        child.join()
        ours.close()
    return found


def _child(
    parents: Connection, pipe: Connection, trials: Sequence[Any], act: Callable[[Any], str], memory: int, seconds: float
) -> None:
    parents.close()  # else it would go on without its parent
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where libtiff writes
    warnings.simplefilter("ignore")
    room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 4 * memory
    resource.setrlimit(resource.RLIMIT_AS, (room, room))  # a bomb ends this process, not the machine
    for trial in trials:
        before, start = _peak(reset=True), time.process_time()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            kind, said = _judged(trial, act)
        took, added = time.process_time() - start, _peak() - before
        if kind not in ("crash", "wrong") and added > memory:
            kind, said = "memory", f"{added / 1e9:.2f} GB more; {kind} {said}"
        if kind not in ("crash", "wrong") and took > seconds:
            kind, said = "hang", f"{took:.1f} s; {kind} {said}"
        pipe.send(Verdict(kind, said[:500], took, added))
    os._exit(0)


def _judged(trial: Any, act: Callable[[Any], str]) -> tuple[str, str]:
    try:
        return act(trial), ""
    except NecoError as error:
        return "refused", str(error)
    except Wrong as error:
        return "wrong", str(error)
    except BaseException as error:
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        return "crash", f"{type(error).__name__}: {error} ({' '.join(frames[-4:])})"


def _peak(reset: bool = False) -> int:
    """Bytes of memory at the most, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS" if reset else "VmHWM"))
