"""Tar and zip archives: what they hold, found out once, and reading of single members by their offset."""

import contextlib
import hashlib
import logging
import os
import posixpath
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from neco.dataset import file_state
from neco.dataset.file_state import State, state_of
from neco.utils import atomic_files
from neco.utils.errors import NecoError
from neco.utils.progress import track

log = logging.getLogger(__name__)
ARCHIVES = (".tar", ".zip")
# How a member is stored: zip's own numbers, of which two are read, and what else there is
STORED, DEFLATED, TAR, ENCRYPTED, SPARSE, DANGLING = 0, 8, -1, -2, -3, -4
RUN = frozenset(("config.yaml", "environment.json"))  # what every run writes into its folder, see neco.runs.results
LEFT_OUT = ".left out"  # stands for all that is in a folder that neco wrote; no name of a file that is listed: hidden
REFUSED = {
    ENCRYPTED: "it is encrypted: unpack the archive with its password",
    SPARSE: "it is a sparse file: unpack the archive",
    DANGLING: "it is a link to what the archive does not hold: unpack the archive where the link's target is",
}
CHUNK = 1 << 22
LARGEST = 1 << 31  # bytes of a file to read: as many as the largest image has, with 8 a pixel
BOMB = 1 << 28, 100  # more bytes than that, inflated from less than a hundredth, are no image
TAIL = 1 << 20  # zeros at most behind the end of a tar: it is filled up to a record, of 10 kB mostly
ODD = (
    struct.error,
    RuntimeError,
    OverflowError,
    IndexError,
    MemoryError,
)  # what the readers raise besides on damaged archives
LINKED = 1_000_000, 20  # more names than that, by links to folders and beyond 20 times what there is, are no images
HEADER = 512  # bytes of a tar's member, right before its content
LOOKS = 16  # members by which an index is checked where the file system does not tell whether the archive is the same
# Offset of the content (tar) or of the local header (zip), bytes there, bytes of the content, CRC-32 (tar: of the
# header, which holds the name), how it is stored
Row = tuple[int, int, int, int, int]


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES)


class Member(NamedTuple):
    """A file in an archive: all that a worker needs to read it. `time` is the archive's last change, in ns."""

    archive: str
    time: int
    name: str
    offset: int
    stored: int
    size: int
    crc: int
    method: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


def read(member: Member) -> bytes:
    """The content. Raises OSError that says what is wrong with it; the archive may also have changed since `time`."""
    if member.method not in (TAR, STORED, DEFLATED):
        raise OSError(REFUSED.get(member.method) or f"zip method {member.method} is not supported: unpack the archive")
    if member.size > LARGEST or (member.size > BOMB[0] and member.size > BOMB[1] * member.stored):
        raise OSError(f"{member.size:.3g} bytes, {member.stored:.3g} of them stored, are no image: unpack the archive")
    handle = opened(member.archive, member.time)
    start = member.offset - (HEADER if member.method == TAR else 0)
    if start + member.stored > handle.size:  # before as much memory is asked for
        raise OSError("the archive is cut off")
    ahead = _pread(handle.number, member.stored + HEADER, start)  # header, mostly with all of the content
    if member.method == TAR and zlib.crc32(ahead[:HEADER]) != member.crc:
        raise OSError("the archive was changed while it was in use, or is damaged: start again")
    begin = HEADER if member.method == TAR else _header_size(ahead)
    start, ahead = start + begin, ahead[begin : begin + member.stored]
    data = ahead + _pread(handle.number, member.stored - len(ahead), start + len(ahead))
    if len(data) < member.stored:
        raise OSError("the archive is cut off")
    if member.method == DEFLATED:
        data = _inflated(zlib.decompressobj(-15), data, member.size)
    if member.method != TAR and (len(data), zlib.crc32(data)) != (member.size, member.crc):
        raise OSError("its checksum is wrong: download the archive again")
    return data


def _inflated(unpacker: Any, data: bytes, size: int) -> bytes:
    try:
        return unpacker.decompress(data, max(size, 1))  # no more: 0 would be no limit
    except zlib.error as error:
        raise OSError(f"it does not inflate ({error}): download the archive again") from error


def _header_size(data: bytes) -> int:
    """Of the local header of a zip member, whose name and extra field are not those of the directory."""
    if data[:4] != b"PK\3\4" or len(data) < 30:
        raise OSError("the archive is damaged: there is no header where its directory says")
    name, extra = struct.unpack_from("<HH", data, 26)
    return 30 + name + extra


def _pread(number: int, size: int, offset: int) -> bytes:
    data = os.pread(number, size, offset)
    while len(data) < size and (more := os.pread(number, size - len(data), offset + len(data))):
        data += more  # the system reads at most 2 GB
    return data


class _Handle:
    """An open file, closed when neither the cache nor a reading thread needs it. `pread` shares no position."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.number).st_size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the very end `os` is gone
        if number := vars(self).get("number"):
            close(number)


@lru_cache(maxsize=128)
def opened(path: str, time: int) -> _Handle:
    handle = _Handle(path)
    if os.fstat(handle.number).st_mtime_ns != time:
        raise OSError("the archive was changed while it was in use: start again")
    return handle


class Content:
    """What an archive holds, without hidden files: sorted names, with `/` between folders, and their `Row`s.

    An archive stored in it is a folder under its file name; one compressed in it is a file.
    """

    def __init__(self, path: str, time: int, names: list[str], rows: np.ndarray) -> None:
        self.path, self.time, self.names, self.rows = path, time, names, rows

    def find(self, name: str) -> Member | None:
        place = bisect_left(self.names, name)
        if self.names[place : place + 1] != [name]:
            return None
        offset, stored, size, crc, method = self.rows[place].tolist()
        return Member(self.path, self.time, name, offset, stored, size, crc, method)

    @cached_property
    def to_inflate(self) -> tuple[int, int]:
        """Bytes stored of all archives that lie compressed in it, and bytes of their copies."""
        rows = self.rows[[is_archive(name) for name in self.names]]
        rows = rows[rows[:, 4] == DEFLATED]
        return int(rows[:, 1].sum()), int(rows[:, 2].sum())

    def fits(self) -> bool:
        """Whether some members, spread evenly, lie where they are said to be."""
        for name in self.names[:: max(1, len(self.names) // LOOKS)]:
            member = self.find(name)
            try:
                if member and member.method in (TAR, STORED, DEFLATED) and member.size <= BOMB[0]:
                    read(member)
            except OSError:
                return False
        return True

    def is_dir(self, name: str) -> bool:
        return next(self.children(name), None) is not None or not name

    def children(self, folder: str) -> Iterator[str]:
        """What lies directly in a folder; names of folders end with `/`."""
        prefix = f"{folder}/" if folder else ""
        place = bisect_left(self.names, prefix)
        while place < len(self.names) and (name := self.names[place]).startswith(prefix):
            child, slash, _ = name[len(prefix) :].partition("/")
            yield child + slash
            place = bisect_left(self.names, f"{prefix}{child}0", place) if slash else place + 1  # "0" follows "/"

    def walk(self, folder: str) -> Iterator[tuple[str, list[str]]]:
        """Folders below (relative, `/` at the end) and what lies in each; archives are not entered, nor run folders."""
        waiting = [""]
        while waiting:
            relative = waiting.pop()
            names = list(self.children(f"{folder}/{relative}".strip("/")))
            if relative and RUN.issubset(names):
                yield relative, [LEFT_OUT]
                continue
            yield relative, [name.rstrip("/") if is_archive(name.rstrip("/")) else name for name in names]
            waiting += [f"{relative}{name}" for name in names if name[-1] == "/" and not is_archive(name[:-1])]


def content(path: str, index: Path | None) -> Content:
    """What the archive at `path` holds; found out once and kept in `index`. Raises NecoError where it is broken."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise NecoError(f"cannot read {path}: {error.strerror}") from error
    if not os.access(path, os.R_OK):
        raise NecoError(f"cannot read {path}: permission denied")
    return _content(path, state_of(status), index)


@lru_cache(maxsize=2048)  # a class each
def _content(path: str, state: State, index: Path | None) -> Content:
    store = Store(index, "archive", path)
    key, settled, (_, size, time, _) = " ".join(map(str, state)), file_state.is_settled(state), state
    with store.alone():
        kept = store.load(key)
        if kept and len(kept["names"]) == len(kept["rows"]):
            found = Content(path, time, kept["names"], kept["rows"])
            if file_state.is_telling(state) or found.fits():
                return found
        opened.cache_clear()  # an archive in the place of another may have its time
        with Path(path).open("rb") as file:
            scanned = _scan(file.fileno(), 0, size, path)
            members = _linked(dict(track(scanned, f"index of {path}")), path)
        names = sorted(members)
        rows = np.array([members[name] for name in names], np.int64).reshape(-1, 5)
        if settled:
            store.save(key, names=names, rows=rows)
    return Content(path, time, names, rows)


def _scan(number: int, start: int, size: int, path: str) -> Iterator[tuple[str, Row | str]]:
    """Name and row, or target, of what lies in an archive, that is `size` bytes of a file, and in those stored in it.

    A later member of the same name replaces an earlier one, as in unpacking.
    """
    file, is_tar = cast(BinaryIO, BufferedReader(_Window(number, start, size))), path.lower().endswith(".tar")
    try:
        for given, entry in (_tar if is_tar else _zip)(file, start):
            name = _clean(given)
            if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
                continue
            if isinstance(entry, str) or not is_archive(name) or entry[-1] not in (TAR, STORED):
                yield name, entry
                continue
            begin = entry[0] + (0 if is_tar else _header_size(os.pread(number, 30, entry[0])))
            for inner, found in _scan(number, begin, entry[1], f"{path}/{name}"):
                yield f"{name}/{inner}", found if isinstance(found, tuple) else f"{name}/{found}"
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, *ODD) as error:
        raise NecoError(f"{path} is cut off, damaged or no {path[-3:]} file ({error}): download it again") from error


def _clean(name: str) -> str:
    return posixpath.normpath("/" + name.lstrip("/"))[1:]


def _tar(file: BinaryIO, start: int) -> Iterator[tuple[str, Row | str]]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        at = 0
        while info := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep a million
            if tar.offset <= at:  # of a negative size, which would be read for ever
                raise tarfile.ReadError(f"no valid size at byte {at}")
            at = tar.offset
            if info.islnk():
                yield info.name, _clean(info.linkname)
            elif info.issym():
                yield info.name, _clean(posixpath.join(posixpath.dirname(info.name), info.linkname))
            elif info.isreg():
                method = SPARSE if info.issparse() else TAR
                file.seek(info.offset_data - HEADER)
                crc = zlib.crc32(file.read(HEADER))
                yield info.name, (start + info.offset_data, info.size, info.size, crc, method)
        file.seek(tar.offset)
        if file.read(512) != bytes(512):  # tarfile takes any broken header for the end
            raise tarfile.ReadError(f"no valid header or end at byte {tar.offset}")
        rest = file.read(TAIL + 1)
        if len(rest) > TAIL or rest.strip(b"\0"):  # a hole in a file that was not written whole, or two files as one
            raise tarfile.ReadError(f"it goes on behind its end at byte {tar.offset}")


def _zip(file: BinaryIO, start: int) -> Iterator[tuple[str, Row | str]]:
    with zipfile.ZipFile(file) as archive:
        end = 0
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            if info.header_offset < end:  # else one piece of data could be inflated a million times
                raise zipfile.BadZipFile(f"{info.filename} overlaps another member")
            end = info.header_offset + 30 + info.compress_size
        for info in archive.infolist():
            method = ENCRYPTED if info.flag_bits & 1 else info.compress_type
            if stat.S_ISLNK(info.external_attr >> 16) and method in (STORED, DEFLATED):
                if info.file_size > 4096:
                    raise zipfile.BadZipFile(f"{info.filename} is a link to a name of {info.file_size} bytes")
                target = os.fsdecode(archive.read(info))
                yield info.filename, _clean(posixpath.join(posixpath.dirname(info.filename), target))
            elif not info.is_dir():
                row = start + info.header_offset, info.compress_size, info.file_size, info.CRC, method
                yield info.filename, row


def _linked(found: dict[str, Row | str], path: str) -> dict[str, Row]:
    """Links replaced by what they lead to: a file, or all that is in a folder.

    Raises NecoError where links make far more of the archive at `path` than there is.
    """
    files: dict[str, Row] = {}
    folders: dict[str, str] = {}
    for name, entry in found.items():
        for _ in range(40):  # as many as the system follows
            entry = found.get(entry, entry) if isinstance(entry, str) else entry
        if isinstance(entry, str):
            folders[name] = entry
        else:
            files[name] = entry
    names = sorted(files) if folders else []
    for name, target in folders.items():
        below = names[bisect_left(names, f"{target}/") : bisect_left(names, f"{target}0")]  # "0" follows "/"
        if len(files) + len(below) > max(LINKED[0], LINKED[1] * len(found)):
            raise NecoError(
                f"{path}: links to folders make more than {len(files):,} files of {len(found):,}, as in no set of "
                "images. If you trust where it is from, unpack it"
            )
        if below and not f"{name}/".startswith(f"{target}/"):
            files |= {name + other[len(target) :]: files[other] for other in below}
        else:
            files[name] = (0, 0, 0, 0, DANGLING)
    return files


class _Window(RawIOBase):
    """A part of an open file as a file."""

    def __init__(self, number: int, start: int, size: int) -> None:
        self.number, self.start, self.size, self.at = number, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        if self.at < 0:
            raise OSError(f"there is no byte {self.at}")
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self.number, max(0, min(len(buffer), self.size - self.at)), self.start + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def inflated(member: Member, outer: Content, index: Path | None) -> Content:
    """What an archive holds that lies compressed within another, `outer`, read from a copy in `index`, made once.

    Raises NecoError where it is not copied: there is no room, it is damaged, or it and its like would take far more
    room than what they are made of. Then nothing of it is left in `index`.
    """
    if not index:
        raise NecoError(f"{member} is compressed within {member.archive}: unpack {member.archive}")
    if Path(member.archive).parent == index:
        raise NecoError(f"{member} is compressed in an archive that was itself compressed: unpack the outer one")
    stored, size = outer.to_inflate
    if size > BOMB[0] and size > BOMB[1] * stored:
        raise NecoError(
            f"{member.archive}: the archives in it would grow from {stored:.3g} to {size:.3g} bytes, as no images do. "
            f"If you trust where it is from, unpack {member.archive}"
        )
    store = Store(index, "copy", str(member), f"-{member.size:x}-{member.crc:08x}{Path(member.name).suffix.lower()}")
    path = cast(Path, store.path)
    with store.alone():
        if not (path.is_file() and path.stat().st_size == member.size):
            try:
                store.write(lambda file: _inflate(member, file), member.size)
            except OSError as error:
                raise NecoError(
                    f"{member} is compressed: a copy of {member.size / 1e9:.1f} GB is wanted in {index}. That failed: "
                    f"{error.strerror or error}. Make room there or unpack {member.archive}."
                ) from error
            for other in index.glob(f"copy-{path.name.split('-')[1]}-*{path.suffix}"):
                if other != path:  # of what was in its place before
                    other.unlink(missing_ok=True)
    try:
        return content(str(path), index)
    except NecoError:
        path.unlink(missing_ok=True)
        raise


def _inflate(member: Member, file: Any) -> None:
    if member.method != DEFLATED:
        raise OSError(REFUSED.get(member.method) or f"zip method {member.method} is not supported")
    handle = opened(member.archive, member.time)  # closed when it is let go
    begin = member.offset + _header_size(os.pread(handle.number, 30, member.offset))
    unpacker, crc, size = zlib.decompressobj(-15), 0, 0
    for at in track(range(0, member.stored, CHUNK), f"a copy of {member}, 4 MB each"):
        data = os.pread(handle.number, min(CHUNK, member.stored - at), begin + at)
        while data:
            part = _inflated(unpacker, data, CHUNK)
            data, crc, size = unpacker.unconsumed_tail, zlib.crc32(part, crc), size + len(part)
            if size > member.size:
                raise OSError(f"it is larger than the {member.size} bytes that its directory says: download it again")
            file.write(part)
            if not part:
                break
    if (size, crc) != (member.size, member.crc):
        raise OSError("its checksum is wrong: download it again")


class Store:
    """A file in the index folder for what takes long to find out about `about`: whole or not there.

    Args:
        index: None keeps nothing; nor does a folder that cannot be written, with a warning.
    """

    def __init__(self, index: Path | None, kind: str, about: str, suffix: str = ".npz") -> None:
        self.about = str(Path(about).absolute())
        name = hashlib.sha256(os.fsencode(self.about)).hexdigest()[:24]
        self.path = index / f"{kind}-{name}{suffix}" if index else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Only one process at a time is in such a block; all are, where the file system has no locks."""
        with contextlib.ExitStack() as stack:
            if self.path:
                with contextlib.suppress(OSError):
                    atomic_files.make_cache_folder(self.path.parent)
                    file = stack.enter_context(atomic_files.open_for_appending(self.path.with_suffix(".lock")))
                    atomic_files.lock(file, wait=True, shared_with_children=True)
            yield

    def load(self, key: str) -> dict[str, Any] | None:
        """What was saved under this key: arrays, and lists of text. None where there is nothing whole."""
        if not self.path:
            return None
        try:
            with np.load(self.path) as file:  # zip's checksums, which leave out names
                kept = {name: file[name] for name in file.files}
            texts = {name[1:]: _unpacked(kept.pop(name)) for name in list(kept) if name[0] == "_"}
            said, values = texts.pop("key"), {**kept, **texts}
            return values if said == [self.about, key, *sorted(values)] else None
        except Exception:  # on broken files readers raise just anything
            return None

    def save(self, key: str, **values: np.ndarray | list[str]) -> None:
        texts = {
            "key": [self.about, key, *sorted(values)],
            **{name: value for name, value in values.items() if isinstance(value, list)},
        }
        arrays = {name: value for name, value in values.items() if not isinstance(value, list)}
        packed = {f"_{name}": _packed(text) for name, text in texts.items()}
        try:
            self.write(lambda file: np.savez(file, **arrays, **packed))  # type: ignore[arg-type]
        except OSError as error:
            place = self.path and self.path.parent
            _warn(f"what takes long to find out is not kept in {place}: {error.strerror or error}")

    def write(self, write: Callable[[Any], None], size: int = 0) -> None:
        """Make the file, of `size` bytes as far as it is known. Raises OSError where it cannot be."""
        if not self.path:
            return
        folder = self.path.parent
        atomic_files.make_cache_folder(folder)
        if size > shutil.disk_usage(folder).free:
            raise OSError(f"there is not so much room in {folder}")
        with atomic_files.whole(self.path) as file:
            write(file)


@lru_cache
def _warn(message: str) -> None:
    """Once."""
    log.warning("%s", message)


def _packed(texts: list[str]) -> np.ndarray:
    return np.frombuffer("".join(f"{text}\0" for text in texts).encode("utf-8", "surrogateescape"), np.uint8)


def _unpacked(packed: np.ndarray) -> list[str]:
    return packed.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
