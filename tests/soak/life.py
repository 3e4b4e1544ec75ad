"""`python -m neco ...` as a process forked from one that is warm, so that a life costs its own work and no imports."""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from neco.cli import main as program

TINY = (
    "model=tiny", "weights=none", "device=cpu", "dataset.train=12", "dataset.val=4", "head.hidden=32", "head.out=16",
    "loss.grid=3", "augment.global_size=32", "augment.local_size=16", "augment.local_views=1", "optim.lr=1e-3",
    "train.batch_size=4", "train.workers=0", "train.log_steps=1", "extract.workers=0", "eval=[overcluster]",
    "eval.overcluster.k=4",
)  # fmt: skip
Setup = Callable[[], object]


class End(NamedTuple):
    """How a life ended: the exit code, or minus the signal; and what it said."""

    code: int | None
    said: str


def begin(folder: Path, arguments: Sequence[str], *setup: Setup, **environment: str) -> BaseProcess:
    """Start `python -m neco` in `folder`, after `setup` in its process; it writes what it says to said.txt there.

    `folder` is its cache and its folder of temporary files, too: all that it leaves behind is found there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = server().Process(target=_live, args=(folder, [*arguments], setup, environment))
    process.start()
    return process


def end(process: BaseProcess, folder: Path, seconds: float = 300) -> End:
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"it goes on after {seconds} s")
    return End(process.exitcode, (folder / "said.txt").read_text(errors="replace"))


def live(folder: Path, arguments: Sequence[str], *setup: Setup, **environment: str) -> End:
    return end(begin(folder, arguments, *setup, **environment), folder)


def _live(folder: Path, arguments: list[str], setup: Sequence[Setup], environment: dict[str, str]) -> None:
    os.chdir(folder)
    (folder / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = str(folder / "tmp")
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), **environment}
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)

    sys.argv[1:] = arguments
    for prepare in setup:
        prepare()
    program.main()


def server() -> Any:
    """A context of processes forked from one that has loaded all and done nothing else."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    here = str(Path(__file__).parents[1])
    if here not in sys.path:
        sys.path.insert(0, here)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soak.warm"])
    return context


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class At:
    """Counts what a life writes below its folder, in trace.txt there, and does `act` before the `number`-th time.

    What counts: a file is opened for writing, synced, renamed, linked or removed. With `size` it instead lives on and
    dies when a file grows beyond so many bytes before the next time.
    """

    def __init__(self, number: int = 0, act: Callable[[], object] = kill, size: int | None = None) -> None:
        self.number, self.act, self.size, self.count, self.acting = number, act, size, 0, False

    def __call__(self) -> None:
        self.trace, self.process = os.open("trace.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.getpid()
        self.folder, sync = f"{Path.cwd()}/", os.fsync
        os.fsync = lambda number: (self.event("sync", str(Path(f"/proc/self/fd/{number}").readlink())), sync(number))[1]
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        sys.addaudithook(self.audit)

    def audit(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            if flags & (os.O_WRONLY | os.O_RDWR) and not isinstance(path, int):
                self.event("open", path)
        elif event in ("os.rename", "os.link", "os.remove", "os.rmdir"):
            self.event(event[3:], given[0])

    def event(self, kind: str, path: Any) -> None:
        name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - a Path would raise events of its own
        if self.acting or os.getpid() != self.process:  # in a data worker
            return
        if not name.startswith(self.folder) or name.endswith(("/trace.txt", "/said.txt")):
            return
        self.count += 1
        os.write(self.trace, f"{kind} {name.removeprefix(self.folder)}\n".encode())
        if self.size is not None:
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size if self.count == self.number else most, most))
        elif self.count == self.number:
            self.acting = True
            self.act()
            self.acting = False
