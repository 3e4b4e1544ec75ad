"""Files and folders that appear whole or not at all. What processes that died left of them is removed by the next.

Everything that not every file system can do stands here, with what is done instead: exFAT and SMB have no hard links,
mounts of object stores no locks and no renaming, some network file systems no fsync.
"""

import contextlib
import errno
import fcntl
import filecmp
import functools
import logging
import mmap
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
PATTERN = ".*.part"
# What a file system answers that cannot do what is asked, whatever the file
UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EXDEV, errno.EINVAL, errno.EMLINK}
BLOCK = 1 << 24  # bytes copied at once
CACHE_TAG = "CACHEDIR.TAG"  # as bford.info/cachedir has it: backups leave such folders out, too
SIGNATURE = "Signature: 8a477f597d28d172789f06e886806bcd\n# neco "


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
            flush(file)
            rename(part, path)
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


def make_cache_folder(folder: Path) -> None:
    """Make a folder, if it is not there, for what can be made again; it is marked, so that its files are no images."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CACHE_TAG).write_text(
            f"{SIGNATURE}makes again what is lost here, and reads no images in this folder.\n"
        )


def is_cache_tag(path: Path) -> bool:
    """Whether a file of that name says that its folder was made by `make_cache_folder`."""
    try:
        return path.read_text().startswith(SIGNATURE)
    except (OSError, UnicodeDecodeError):
        return False


def tidy(folder: Path) -> None:
    """Remove what `whole` and `scratch` of processes that are no more left in a folder."""
    for part in folder.glob(PATTERN):
        # An error: it is in use, it is a link, or there are no locks here.
        with contextlib.suppress(OSError), _lock(part, wait=False):
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def flush(file: IO[Any]) -> None:
    """Write what is buffered to the disk itself, where the file system can promise that. Raises OSError if it fails."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:  # a full disk may only be told here
        if error.errno not in UNSUPPORTED:
            raise


def rename(source: Path, target: Path) -> None:
    """Rename a file, over another if there is one, or a folder; copy it where the file system cannot rename.

    Raises:
        OSError: it can be neither renamed nor copied.
    """
    try:
        source.replace(target)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_once(
            f"{target.parent} cannot rename ({error.strerror}): files are copied; an interrupted copy is damaged"
        )
        if source.is_dir():
            shutil.copytree(source, target)
            shutil.rmtree(source)
        else:
            with source.open("rb") as held, target.open("wb") as file:
                shutil.copyfileobj(held, file, BLOCK)
                flush(file)
            source.unlink()


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, in place of what had that name; where there are no hard links, copy it.

    Raises:
        OSError: it cannot be copied either; then what was there before still is.
    """
    if target.exists() and _is_one_file(source, target):
        return  # renaming one name of a file to another of it does nothing, and the temporary name would stay
    link = target.with_name(f".{target.name}.part")
    link.unlink(missing_ok=True)
    try:
        os.link(source, link)
    except OSError:
        with whole(target) as file, source.open("rb") as held:
            shutil.copyfileobj(held, file, BLOCK)
        return
    rename(link, target)


def has_same_content(path: Path, other: Path) -> bool:
    """Return True for two names of a file and for a file and its copy."""
    return _is_one_file(path, other) or filecmp.cmp(path, other, shallow=False)


def _is_one_file(path: Path, other: Path) -> bool:
    """Return True for hard links to one file. Some file systems number all files 0, but count one name for each."""
    return path.samefile(other) and path.stat().st_nlink > 1


def open_for_appending(path: Path, **how: Any) -> IO[Any]:
    """Open a text file of ours to append to, or to lock, and make it if it is not there. It is never emptied.

    In a folder that somebody else made, such a file may be a link to any other: links, pipes and devices are refused.

    Raises:
        NecoError: it is one of these.
        OSError: it cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        number = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)  # no waiting for a pipe
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(errno.ELOOP, "no file")
        return number

    try:
        return open(path, "a", opener=opener, **how)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EMLINK):
            raise NecoError(f"{path} is a link, a pipe or a device, not a file: remove it") from error
        raise


def lock(file: IO[Any], *, wait: bool = False, shared_with_children: bool = False) -> bool:
    """Lock an open file until it is closed; return False if another process holds it.

    Where the file system has no locks, this says so once and returns True.

    Args:
        wait: until no other process holds it.
        shared_with_children: flock, which forked processes keep for as long as they live, instead of a POSIX lock.
    """
    try:
        (fcntl.flock if shared_with_children else fcntl.lockf)(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        folder = Path(file.name).parent
        _warn_once(f"{folder} has no locks ({error.strerror}): nothing keeps a second process from writing there")
    return True


def expand_user(text: str) -> str:
    """A path with `~` or `~NAME` at its beginning replaced by that home folder.

    Raises:
        NecoError: nobody is called so.
    """
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        user = text[1:].partition("/")[0]
        raise NecoError(f"{text}: there is no user '{user}'; for a folder of that name write ./{text}") from None


def normalize_environment() -> None:
    """Let an empty variable that names a folder count as one that is not set, and replace `~` in others.

    XDG's standard says so; torch, Hugging Face and Hydra would write to `/neco`, or below the working folder.
    """
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        if not (value := os.environ.get(name, "").strip()):
            os.environ.pop(name, None)
        elif value.startswith("~") and name != "HOME":
            os.environ[name] = expand_user(value)
    with contextlib.suppress(RuntimeError):  # nobody's home
        os.environ.setdefault("HOME", str(Path.home()))


def touch(path: Path) -> None:
    """Note that a file was used now, where that can be noted."""
    with contextlib.suppress(OSError):
        os.utime(path)


def can_be_mapped(path: Path) -> bool:
    """Return False where the file system maps no files into memory. Raises OSError for a file that cannot be opened."""
    with path.open("rb") as file:
        try:
            mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ).close()
        except (OSError, ValueError) as error:  # ValueError: it is empty
            return getattr(error, "errno", None) not in {errno.ENODEV, *UNSUPPORTED}
    return True


@functools.lru_cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


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
    number = os.open(path, os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
    try:
        with contextlib.suppress(OSError) if wait else contextlib.nullcontext():
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(number)
