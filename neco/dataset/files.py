"""Where files are and how they are read: folders, and archives as if they were folders."""

import codecs
import errno
import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, features

from neco.dataset import archive, digests, file_state
from neco.dataset.archive import LEFT_OUT, Content, Member, Store, is_archive
from neco.dataset.digests import Ref
from neco.dataset.file_state import State, state_of
from neco.utils.atomic_files import CACHE_TAG, is_cache_tag
from neco.utils.errors import NecoError


def _pil_reads_avif() -> bool:
    Image.init()
    return "AVIF" in Image.OPEN


log = logging.getLogger(__name__)
MARKS = {*archive.RUN, CACHE_TAG}
SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    *((".jp2", ".j2k") if features.check("jpg_2000") else ()), *((".avif",) if _pil_reads_avif() else ()),
)  # fmt: skip
# Pictures and arrays that are not read: counted, so that nobody wonders where they are
OTHER_SUFFIXES = (
    ".jp2", ".j2k", ".avif", ".heic", ".heif", ".jxl", ".tga", ".psd", ".svg", ".ico", ".exr", ".hdr", ".pfm", ".dng",
    ".cr2", ".cr3", ".nef", ".arw", ".raf", ".dcm", ".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".npy", ".npz", ".mat",
    ".h5", ".mp4", ".avi", ".mov", ".webm", ".apng", ".jxr", ".dds", ".qoi",
)  # fmt: skip
DANGLING = "@"  # ends the name of a link to nothing in a listing
PACKED = {  # compressed as a whole: a member cannot be read without all before it -> what helps
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tbz2": "bunzip2", ".tar.xz": "unxz",
    ".txz": "unxz", ".tar.zst": "unzstd", ".rar": "unrar x", ".7z": "7z x",
}  # fmt: skip
BYTE_ORDER_MARKS = {  # the longer first
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
KINDS = " ".join((*SUFFIXES, *OTHER_SUFFIXES))  # that a kept listing knows
WAYS = 100  # by which links may lead to a folder
KEEP = 10_000  # names: a listing of fewer is as fast as reading it


def read_bytes(ref: Ref) -> bytes:
    """The content of a file. Raises NecoError that names it."""
    try:
        if isinstance(ref, Member):
            state, data = digests.settled_state(ref), archive.read(ref)
        else:
            with Path(ref).open("rb") as file:
                if (size := os.fstat(file.fileno()).st_size) > archive.LARGEST:
                    raise OSError(f"{size:.3g} bytes are more than any image has")
                state, data = digests.settled_state(file.fileno()), file.read()
        digests.note_read(ref, state, data)
        return data
    except OSError as error:
        raise NecoError(f"cannot read {ref}: {error.strerror or error}") from error


def read_text(ref: Ref) -> list[str]:
    """The lines of a text file in UTF-8, or in what its byte-order mark says: Windows writes UTF-16.

    File names are any bytes: those that are no UTF-8 become surrogates, as Python's own functions have them. Raises
    NecoError that names a file which cannot be read, or is no text.
    """
    data = read_bytes(ref)
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            data = data.decode(encoding, "replace").encode("utf-8", "surrogatepass")
            break
    else:
        if b"\0" in data[:1000]:  # UTF-16 without its mark: every second byte of plain letters
            little = data[1:1000:2].count(0) > data[0:1000:2].count(0)
            data = data.decode("utf-16-le" if little else "utf-16-be", "replace").encode("utf-8", "surrogatepass")
    if b"\0" in data:
        raise NecoError(f"{ref} is no text: save it in UTF-8, one name a line")
    return re.split(r"\r\n|\r|\n", data.decode("utf-8", "surrogateescape"))


def listing(folder: str, index: Path | None = None) -> dict[str, list[str]]:
    """All folders below one, itself included, and what lies in them, without hidden files.

    A long listing is kept in `index`; then only folders that have changed are read again.

    Returns:
        path relative to `folder` with `/` at the end ("" itself) -> names of images, of other pictures, archives and,
        with `/` at the end, of folders, sorted. Links are followed, but not to a folder above; one to nothing has `@`
        at the end. Folders of runs and caches of neco, other than `folder`, are not entered; their only name is
        LEFT_OUT.

    Raises:
        NecoError: a folder cannot be read, or links lead to it in more than 100 ways.
    """
    store = Store(index, "listing", folder)
    kept = _load(store)
    found: dict[str, tuple[State | None, list[str]]] = {}
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    ways: Counter[tuple[int, int]] = Counter()
    while waiting:
        relative, above = waiting.pop()
        path = f"{folder}/{relative}"
        try:
            status = Path(path).stat()
            here = status.st_dev, status.st_ino
            if here in above:
                continue
            ways[here] += 1
            if ways[here] > WAYS:  # folders that link to each other: as many ways as there are orders of them
                raise NecoError(f"{path}: links lead to this folder in more than {WAYS} ways: remove some")
            before, names = kept.get(relative, (None, []))
            now = state_of(status)
            state: State | None = now
            if now != before:
                state = now if now[2] and file_state.is_settled(now) else None  # 0 is no time
                names = _names(path)
                if any(name[-1:] == DANGLING for name in names):
                    state = None  # a link's target may come back without a trace here
            if names[:1] == [LEFT_OUT]:
                names = [LEFT_OUT] if relative else names[1:]
        except PermissionError:
            if not relative:
                raise NecoError(f"cannot list {path}: permission denied") from None
            log.warning("%s is left out: permission denied", path)
            continue
        except OSError as error:
            raise NecoError(f"cannot list {path}: {error.strerror}") from error
        found[relative] = state, names
        above |= {here}
        waiting += [(f"{relative}{name}", above) for name in reversed(names) if name[-1] == "/"]
    if found != kept and sum(len(names) for _, names in found.values()) >= KEEP:
        states = np.array([state or (0, 0, 0, 0) for state, _ in found.values()], np.int64)
        counts = np.array([len(names) for _, names in found.values()], np.int64)
        names = [name for _, names in found.values() for name in names]
        store.save(KINDS, folders=list(found), states=states, counts=counts, names=names)
    return {relative: names for relative, (_, names) in found.items()}


def _load(store: Store) -> dict[str, tuple[State | None, list[str]]]:
    """Folder -> its state when it was read, None where that may not show a change, and names."""
    if not (kept := store.load(KINDS)) or "states" not in kept:
        return {}
    ends = np.cumsum(kept["counts"]).tolist()
    names = [kept["names"][start:end] for start, end in zip([0, *ends], ends, strict=False)]
    states = [
        (inode, size, modified, changed) if changed else None
        for inode, size, modified, changed in kept["states"].tolist()
    ]
    return dict(zip(kept["folders"], zip(states, names, strict=True), strict=True))


def _names(folder: str) -> list[str]:
    """Of images, archives and folders in a folder; LEFT_OUT before them where it is that of a run or a cache."""
    wanted = (*SUFFIXES, *OTHER_SUFFIXES, *archive.ARCHIVES, *PACKED)
    found, marks = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":  # "._x.jpg": a macOS resource fork
                continue
            if name in MARKS:
                marks.add(name)
            try:
                if entry.is_dir():
                    if name != "__MACOSX":
                        found.append(f"{name}/")
                elif entry.is_symlink() and not Path(entry).exists():
                    found.append(f"{name}{DANGLING}")
                elif name.lower().endswith(wanted) and entry.is_file():  # a pipe would be waited for
                    found.append(name)
            except OSError as error:
                if error.errno != errno.ELOOP:  # a link to itself leads to nothing, as any to what is not there
                    raise
                found.append(f"{name}{DANGLING}")
    ours = marks >= archive.RUN or (CACHE_TAG in marks and is_cache_tag(Path(folder, CACHE_TAG)))
    return [*([LEFT_OUT] if ours else []), *sorted(found)]


class Place(NamedTuple):
    """A file or folder: `path` on disk or, with `content`, `name` in the archive at `path`.

    `shared`: other archives beside may hold more of this folder.
    """

    path: str
    content: Content | None = None
    name: str = ""
    shared: bool = False

    def __str__(self) -> str:
        return f"{self.path}/{self.name}" if self.name else self.path

    def child(self, name: str) -> "Place":
        if self.content:
            return self._replace(name=f"{self.name}/{name}" if self.name else name)
        return self._replace(path=posixpath.join(self.path, name))

    def is_dir(self) -> bool:
        return self.content.is_dir(self.name) if self.content else os.path.isdir(self.path)  # noqa: PTH112

    def file(self) -> Ref | None:
        if self.content:
            return self.content.find(self.name)
        return self.path if os.path.isfile(self.path) else None  # noqa: PTH113  # a name may be too long to ask for

    def found(self, name: str) -> Ref:
        """A file that the folder is known to hold."""
        if not self.content:
            return f"{self.path}/{name}"
        member = self.content.find(f"{self.name}/{name}" if self.name else name)
        assert member
        return member

    def exists(self) -> bool:
        return self.is_dir() or self.file() is not None

    def children(self) -> Iterator[str]:
        """Names of what lies in the folder, without hidden files."""
        if self.content:
            return (name.rstrip("/") for name in self.content.children(self.name))
        return (entry.name for entry in Path(self.path).iterdir() if not entry.name.startswith("."))

    def walk(self, index: Path | None) -> Iterator[tuple[str, list[str]]]:
        """As `listing`, but for other files among the names."""
        return self.content.walk(self.name) if self.content else iter(listing(self.path, index).items())


class Gathered(NamedTuple):
    """What was found below a folder: images by key, archives compressed as a whole, folders of runs and caches.

    `other`: names of pictures that are not read, and of links to nothing.
    """

    images: dict[str, Ref]
    packed: list[Place]
    left: list[Place]
    other: list[str]


class Tree:
    """The files below `root`. All paths are relative to it, with `/`; `""` is `root` itself. No I/O on construction.

    Tar and zip archives look like folders. What a folder X does not hold under a name is looked for in its archives:
    first in `X/name.tar` and `X/name.zip`, whose content lies at `X/name`, then in each archive of X whose top level
    has that name, as if it was unpacked there. An archive that holds but one folder or archive of its own name is that.
    Archives in archives look the same. `root` may be an archive, also named without its suffix.

    Args:
        root: a folder or an archive.
        index: folder for what takes long to find out about `root`; null = nowhere.

    Raises:
        NecoError (all methods): an archive of that name is broken. Others that are broken are left out, with a warning.
    """

    def __init__(self, root: str | Path, index: str | Path | None = None) -> None:
        self.root = Path(root).expanduser()
        self.index = Path(index).expanduser() if index else None
        self._archives: dict[str, list[str]] = {}
        self._broken: dict[str, NecoError] = {}
        self._left_out: dict[str, str] = {}  # folder -> what was said of files there that are not read

    def __str__(self) -> str:
        return str(self.root)

    def is_dir(self, path: str = "") -> bool:
        return any(place.is_dir() for place in self._places(path))

    def ref(self, path: str) -> Ref | None:
        """The file at `path`, None where there is none."""
        return next((ref for place in self._places(path) if (ref := place.file()) is not None), None)

    def text(self, path: str) -> list[str] | None:
        """The lines of a text file, None where there is none."""
        ref = self.ref(path)
        return read_text(ref) if ref else None

    def names(self, path: str = "") -> list[str]:
        """What lies directly in a folder, sorted, without hidden files; archives without their suffix."""
        found = set()
        for place in self._folders(path):
            archives = self._archives_in(place)
            found |= {name[:-4] if name in archives else name for name in place.children()}
        return sorted(found)

    def images(self, path: str = "") -> dict[str, Ref]:
        """Image files anywhere below a folder, sorted: path relative to it (with `/` and suffix) -> the file.

        Archives are folders of the name without suffix, unless that folder or all that they hold lies beside them.
        Folders of runs and of caches of neco are left out, unless `path` lies in one.
        """
        gathered = Gathered({}, [], [], [])
        for place in self._folders(path):
            self._collect(place, "", gathered)
        found, packed, left = gathered.images, gathered.packed, gathered.left
        if left:
            _tell(f"{len(left)} folders of runs and caches are left out below {self.root / path}, like {left[0]}")
        if gathered.other and path not in self._left_out:
            self._left_out[path] = _counted(gathered.other, path)
            log.warning("%s: %s", self, self._left_out[path])
        if packed and not found:
            raise NecoError(f"no image files in {self.root / path}, but {_advice(packed[0])}")
        if packed:
            log.warning("%d compressed archives are left out: %s", len(packed), _advice(packed[0]))
        return {key: found[key] for key in sorted(found)}

    def missing(self, what: str, looked: Sequence[str], advice: str) -> NecoError:
        """The error for a data set that is not there: where it was looked for, what is there, what to do."""
        folders = self._folders("")
        if folders:
            names = sorted({name for folder in folders for name in folder.children()})
            there = f"{self} holds {', '.join(names[:8]) or 'nothing'}{' ...' if len(names) > 8 else ''}"
        else:
            there = f"{self} is a file" if self.root.is_file() else f"{self} does not exist"
        above = {path[:end] for path in looked for end, sign in enumerate(f"{path}/") if sign == "/"}
        beside = [folder for path in sorted({"", *above}) for folder in self._folders(path)]
        packed = [folder.child(name) for folder in beside for name in sorted(folder.children()) if _is_packed(name)]
        more = [*map(_advice, packed[:3]), *self._broken.values(), *self._left_out.values()]
        hints = "".join(f"\n{hint}" for hint in more)
        places = "".join(f"\n  {self.root / path}" for path in looked)
        return NecoError(
            f"no {what}. Looked in{places}\n{there}.{hints}\n{advice}\nSet its place with dataset.root=FOLDER."
        )

    def _places(self, path: str) -> Iterator[Place]:
        """Where `path` may be, best first; on disk, only if it is there."""
        parent, _, name = path.strip("/").rpartition("/")
        if not name:
            yield from self._roots()
            return
        for above in self._places(parent):
            if (here := above.child(name)).exists():
                yield here
            archives = self._archives_in(above)
            yield from (self._mounted(above, found) for found in archives if found[:-4] == name)
            for found in archives:
                if (inside := self._sound(above, found)) and inside.child(name).exists():
                    yield inside.child(name)._replace(shared=True)

    def _roots(self) -> Iterator[Place]:
        if self.root.is_dir():
            yield Place(str(self.root))
            return
        above = Place("" if self.root.parent == Path() else str(self.root.parent))
        for suffix in ("", *archive.ARCHIVES):
            name = f"{self.root.name}{suffix}"
            if is_archive(name) and above.child(name).file():
                yield self._mounted(above, name)
                return
        for suffix in ("", *PACKED):
            place = above.child(f"{self.root.name}{suffix}")
            if _is_packed(place.path) and place.file():
                raise NecoError(_advice(place))

    def _folders(self, path: str) -> list[Place]:
        """The places that make up a folder: one, or all archives that it would be unpacked from."""
        found = []
        for place in self._places(path):
            if place.is_dir() and place not in found:
                found.append(place)
                if not place.shared:
                    break
        return found

    def _archives_in(self, folder: Place) -> list[str]:
        """File names of archives; those of a folder on disk are looked for once."""
        if str(folder) not in self._archives:
            names = sorted(name for name in folder.children() if is_archive(name)) if folder.is_dir() else []
            self._archives[str(folder)] = [name for name in names if folder.content or folder.child(name).file()]
        return self._archives[str(folder)]

    def _opened(self, folder: Place, name: str) -> Place:
        """The inside of an archive that lies in a folder."""
        place = folder.child(name)
        if not place.content:
            return place._replace(content=archive.content(place.path, self.index))
        member = place.content.find(place.name)
        if not member:  # stored: its content is in the index
            return place
        inside = archive.inflated(member, place.content, self.index)
        return place._replace(path=inside.path, content=inside, name="")

    def _sound(self, folder: Place, name: str) -> Place | None:
        """The inside of an archive that may have nothing to do with what is looked for; None where it is broken."""
        place = str(folder.child(name))
        if place not in self._broken:
            try:
                return self._opened(folder, name)
            except NecoError as error:
                log.warning("%s", error)
                self._broken[place] = error
        return None

    def _mounted(self, folder: Place, name: str) -> Place:
        """What an archive shows as the folder of its name."""
        place = self._opened(folder, name)
        tops = list(islice(place.children(), 2))
        if tops == [name[:-4]]:
            return place.child(name[:-4]) if place.child(name[:-4]).is_dir() else place
        only_archive = len(tops) == 1 and is_archive(tops[0]) and tops[0][:-4] == name[:-4]
        return self._mounted(place, tops[0]) if only_archive else place

    def _collect(self, place: Place, above: str, into: Gathered) -> None:
        """Add the images below a place, under keys that begin with `above`, and what is not read."""
        for relative, names in place.walk(self.index):
            here = place.child(relative[:-1]) if relative else place
            if names == [LEFT_OUT]:
                into.left.append(here)
                continue
            for name in names:
                if name.lower().endswith(SUFFIXES):
                    into.images.setdefault(f"{above}{relative}{name}", here.found(name))
                elif _is_packed(name):
                    into.packed.append(here.child(name))
                elif is_archive(name):
                    self._enter(here, name, names, f"{above}{relative}{name[:-4]}/", into)
                elif name[-1] == DANGLING or name.lower().endswith(OTHER_SUFFIXES):
                    into.other.append(f"{above}{relative}{name}")

    def _enter(self, folder: Place, name: str, beside: list[str], above: str, into: Gathered) -> None:
        """Add the images in an archive, unless it lies unpacked beside it."""
        if f"{name[:-4]}/" in beside or all(
            top != name and folder.child(top).exists() for top in self._opened(folder, name).children()
        ):
            inside = into._replace(images={})
            self._collect(self._opened(folder, name), "", inside)
            beside_it = folder.child(name[:-4]) if f"{name[:-4]}/" in beside else folder
            keys = sorted(inside.images)[:: max(1, len(inside.images) // 100)]
            if lost := [key for key in keys if not (folder.child(key).file() or beside_it.child(key).file())]:
                raise NecoError(
                    f"{folder.child(name)} is only partly unpacked beside it, {lost[0]} for one is not: unpack all of "
                    "it, or remove one of the two"
                )
            log.info("%s is left out: what it holds lies beside it", folder.child(name))
        else:
            self._collect(self._mounted(folder, name), above, into)


@lru_cache
def _tell(message: str) -> None:
    """Once: a folder is listed for each split, and for masks."""
    log.info("%s", message)


def _counted(names: Sequence[str], folder: str) -> str:
    """A line on files that are left out."""
    kinds = Counter("links to nothing" if name[-1] == DANGLING else _suffix(name) for name in names)
    listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(6))
    first = "/".join(filter(None, (folder, names[0].removesuffix(DANGLING))))
    return f"{len(names)} files are left out, the first is {first}: {listed}. What is read: {' '.join(SUFFIXES)}"


def _suffix(name: str) -> str:
    return max((suffix for suffix in OTHER_SUFFIXES if name.lower().endswith(suffix)), key=len)


def _is_packed(name: str) -> bool:
    return name.lower().endswith(tuple(PACKED))


def _advice(packed: Place) -> str:
    command = next(command for suffix, command in PACKED.items() if str(packed).lower().endswith(suffix))
    result = "unpacks it" if " " in command else "makes a .tar of it, which needs no unpacking"
    return f"{packed} is compressed as a whole, so no single image can be read. `{command} {packed}` {result}."
