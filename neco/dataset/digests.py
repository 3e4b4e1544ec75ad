"""Digests of what files hold. They are remembered: a file is read again only when its inode, size or times change.

Whether two files are the same is decided by their content alone: copies, other places and restored times make no
difference, one replaced byte does. How far the times can be trusted is told in `neco.dataset.file_state`; where they
tell nothing, every process reads a file once.
"""

import contextlib
import functools
import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import cast

from neco.dataset import archive, file_state
from neco.dataset.archive import Member
from neco.dataset.file_state import State, state_of
from neco.utils import atomic_files
from neco.utils.errors import NecoError
from neco.utils.progress import track

log = logging.getLogger(__name__)
Ref = str | Member  # path of a file, or where in an archive it is
Note = Callable[[Ref, State | None, bytes], None]  # takes the digest of a file, and its state if that is settled
BYTES = 16  # of a digest
RECORD = struct.Struct(f"<{BYTES}s{BYTES}sI")  # digest of place and state, digest of the content, CRC-32 of both
RECORDS = 1 << 19  # 19 MB: more are cut to the newer half
READERS = 8  # threads, which wait for a disk or network most of the time
DAMAGE = 4096  # bytes to skip in search of a whole record; behind more the rest is given up


def states_of(refs: Sequence[Ref]) -> list[State]:
    """The state of each file, or of the archive that it is in. Raises NecoError for one that is not there."""
    known: dict[str, State] = {}  # of archives, asked once
    found = []
    for ref in refs:
        path = ref.archive if isinstance(ref, Member) else ref
        try:
            state = known.get(path) or state_of(os.stat(path))  # noqa: PTH116  # a hundred thousand: Path is slow
        except OSError as error:
            raise NecoError(f"cannot read {ref}: {error.strerror}") from error
        if isinstance(ref, Member):
            known[path] = state
        found.append(state)
    return found


def read_digest(ref: Ref) -> tuple[State | None, bytes]:
    """The state of a file, None where it may not show the next change, and the digest of what it holds.

    Raises NecoError where it cannot be read.
    """
    try:
        if isinstance(ref, Member):
            return settled_state(ref), _digest(archive.read(ref))
        with Path(ref).open("rb") as file:
            state = settled_state(file.fileno())
            return state, hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=BYTES)).digest()
    except OSError as error:
        raise NecoError(f"cannot read {ref}: {error.strerror or error}") from error


def settled_state(file: int | Member) -> State | None:
    """The state of an open file, or of the archive that a member is read from; None where it may not show a change."""
    handle = archive.opened(file.archive, file.time) if isinstance(file, Member) else None  # closed when it is let go
    state = state_of(os.fstat(handle.number if handle else cast(int, file)))
    return state if file_state.is_settled(state) else None


def note_read(ref: Ref, state: State | None, data: bytes) -> None:
    """Pass on what a file held that was read, within a block of `noting`; `state` is that from before it was read."""
    if note := _note.get():
        note(ref, state, _digest(data))


@contextlib.contextmanager
def noting(note: Note) -> Iterator[None]:
    """A block in which `note` is called for each image and mask that is read, like `DigestStore.remember`."""
    token = _note.set(note)
    try:
        yield
    finally:
        _note.reset(token)


class Contents:
    """What some files hold, and whether they stay as they are while they are used.

    Args:
        refs: the files; their order counts.
        index: folder in which digests are remembered; None = in this process alone.

    Raises:
        NecoError: a file is not there.
    """

    def __init__(self, refs: Sequence[Ref], index: str | Path | None) -> None:
        self.refs, self.store, self.states = refs, store_in(index), states_of(refs)

    def digests(self) -> list[str]:
        """Of each file, in hexadecimal; reads those that are not remembered. Raises NecoError for one it cannot."""
        return self.store.digests(self.refs)

    def digest(self) -> str:
        """Of all, in 32 hexadecimal digits."""
        return joined(self.digests())

    def changed(self) -> Ref | None:
        """The first file that may hold something else than when this object was made; None where all are the same."""
        pairs = zip(self.refs, self.states, states_of(self.refs), strict=True)
        touched = [(ref, before) for ref, before, now in pairs if before != now]  # renewed rights, another link to it
        digests = self.store.digests([ref for ref, _ in touched])
        same = (
            self.store.recall(ref, before) == digest for (ref, before), digest in zip(touched, digests, strict=True)
        )
        return next((ref for (ref, _), sure in zip(touched, same, strict=True) if not sure), None)


class DigestStore:
    """Remembered digests: a table in `folder` that processes append to, of bounded size. What is damaged is dropped."""

    def __init__(self, folder: Path | None) -> None:
        self.path = folder and folder / "digests.bin"
        self.known: dict[bytes, bytes] = {}
        self.latest: dict[tuple[Ref, State], str] = {}  # those asked for in this process, whose keys take time
        self.seen = 0, 0  # inode of the table, bytes of it that are in `known`
        self.output: int | None = None

    def digests(self, refs: Sequence[Ref]) -> list[str]:
        """The digest of each file, in hexadecimal; reads those that are not remembered."""
        self._load()
        states = states_of(refs)
        asked = [pair for pair in zip(refs, states, strict=True) if pair not in self.latest]
        keys = {pair: _key(*pair) for pair in asked}
        unknown = {key: ref for (ref, _), key in keys.items() if key not in self.known}
        fresh: dict[bytes, bytes] = {}
        if unknown:
            with ThreadPoolExecutor(READERS) as pool:
                read = pool.map(read_digest, unknown.values())
                told = track(read, "digests of new or changed files", total=len(unknown))
                for (key, ref), (state, digest) in zip(unknown.items(), told, strict=True):
                    fresh[key] = digest
                    self.remember(ref, state, digest)
        self.latest.update((pair, self.known[key].hex()) for pair, key in keys.items() if key in self.known)
        return [self.latest.get(pair) or fresh[keys[pair]].hex() for pair in zip(refs, states, strict=True)]

    def recall(self, ref: Ref, state: State) -> str | None:
        """The digest of a file in a state, None where it is not remembered."""
        return digest.hex() if (digest := self.known.get(_key(ref, state))) else None

    def remember(self, ref: Ref, state: State | None, digest: bytes) -> None:
        if state is None or self.known.get(key := _key(ref, state)) == digest:
            return
        self.known[key] = digest
        if file_state.is_telling(state):
            self._append(RECORD.pack(key, digest, zlib.crc32(key + digest)))

    def _append(self, record: bytes) -> None:
        """To the end of the table, which the system does as one step."""
        if not self.path:
            return
        with contextlib.suppress(OSError):  # a folder that cannot be written remembers nothing
            if self.output is None:
                atomic_files.make_cache_folder(self.path.parent)
                self.output = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.write(self.output, record)

    def _load(self) -> None:
        """What this and other processes have appended since the last time."""
        try:
            if not self.path:
                return
            with self.path.open("rb") as file:
                inode, size = state_of(os.fstat(file.fileno()))[:2]
                start = self.seen[1] if self.seen[0] == inode and self.seen[1] <= size else 0
                file.seek(start)
                data = file.read(size - start)
        except OSError:
            return
        self.seen = inode, start + _take(data, self.known)
        if size > RECORDS * RECORD.size:
            self._shorten()

    def _shorten(self) -> None:
        assert self.path
        whole: dict[bytes, bytes] = {}
        with contextlib.suppress(OSError):
            _take(self.path.read_bytes(), whole)
            newer = [*whole.items()][-RECORDS // 2 :]
            with atomic_files.whole(self.path) as file:
                file.write(b"".join(RECORD.pack(*pair, zlib.crc32(b"".join(pair))) for pair in newer))
            if self.output is not None:
                os.close(self.output)
            self.output = None


def _take(data: bytes, known: dict[bytes, bytes]) -> int:
    """Add the records in a piece of the table to `known`; returns how many bytes of it are dealt with."""
    at = skipped = 0
    while at + RECORD.size <= len(data) and skipped < DAMAGE:
        key, digest, crc = RECORD.unpack_from(data, at)
        if zlib.crc32(key + digest) == crc:
            known[key] = digest
            at += RECORD.size
        else:  # of a record that was not written whole
            at, skipped = at + 1, skipped + 1
    return len(data) if skipped >= DAMAGE else at


def joined(parts: Sequence[object]) -> str:
    """A digest of digests or states, in 32 hexadecimal digits; their order counts."""
    return _digest(repr([*parts]).encode()).hex()


def store_in(index: str | Path | None) -> DigestStore:
    """The memory in an index folder, the same for all who ask in a process."""
    return _store(os.path.abspath(Path(index).expanduser()) if index else None)  # noqa: PTH100


@functools.cache
def _store(index: str | None) -> DigestStore:
    return DigestStore(Path(index) if index else None)


def _key(ref: Ref, state: State) -> bytes:
    """A digest of where a file is and of its state."""
    path, *inside = (ref.archive, ref.name, ref.offset, ref.size) if isinstance(ref, Member) else (ref,)
    place = os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118
    return _digest(os.fsencode(f"{place}\0{inside}\0{state}"))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=BYTES).digest()


_note: ContextVar[Note | None] = ContextVar("note", default=None)
