"""Files and folders that appear whole or not at all. What processes that died left of them is removed by the next."""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from neco.errors import NecoError

PATTERN = ".*.part"


@contextlib.contextmanager
def whole(path: Path, mode: str = "wb", **how: Any) -> Iterator[IO[Any]]:
    """A file to write that becomes `path` when the block ends well: a temporary beside it, synced, then renamed.

    Args:
        mode, how: as `open` takes them.

    Raises:
        OSError: it cannot be written; then what was there before still is.
    """
    tidy(path.parent)
    file, part = _begin(path, mode, how)
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    sync(path.parent)


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder in `parent`, removed with what is left in it; so that its files can be renamed from there."""
    tidy(parent)
    folder = parent / f".{uuid.uuid4().hex}.part"
    folder.mkdir()
    with _lock(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove what `whole` and `scratch` of processes that are no more left in a folder."""
    for part in folder.glob(PATTERN):
        with contextlib.suppress(OSError), _lock(part, wait=False):  # else in use, or no locks are to be had here
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def refused(path: Path, error: BaseException) -> NecoError:
    """For people: why a file could not be written."""
    cause = error if isinstance(error, OSError) else error.__context__  # torch has its own words for a full disk
    told = getattr(cause, "strerror", None) or str(error).partition("\n")[0]
    return NecoError(f"cannot write {path}: {told}")


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, outlast a power cut: a renamed file may have its old name again."""
    with contextlib.suppress(OSError):  # not on all file systems
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _begin(path: Path, mode: str, how: dict[str, Any]) -> tuple[IO[Any], Path]:
    while True:
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        file = part.open(mode.replace("w", "x"), **how)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if part.exists():  # else it was tidied up before it was locked
            return file, part
        file.close()


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a temporary. Raises OSError where that cannot be, unless it is to `wait`."""
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        with contextlib.suppress(OSError) if wait else contextlib.nullcontext():
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(number)
