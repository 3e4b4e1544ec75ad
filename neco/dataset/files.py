"""Where files are and how they are read: folders, and archives as if they were folders."""

import os
from collections.abc import Sequence
from pathlib import Path

from neco.errors import NecoError

Ref = str  # path of a file
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_bytes(ref: Ref) -> bytes:
    """The content of a file. Raises NecoError that names it."""
    try:
        return Path(ref).read_bytes()
    except OSError as error:
        raise NecoError(f"cannot read {ref}: {error.strerror or error}") from error


def stamp(ref: Ref) -> tuple[str, int, int]:
    """What changes when a file does: its place, bytes and nanoseconds of the last change."""
    status = Path(ref).stat()
    return ref, status.st_size, status.st_mtime_ns


class Tree:
    """The files below `root`. All paths are relative to it, with `/`; `""` is `root` itself. No I/O on construction.

    Args:
        root: a folder.
        index: folder for what takes long to find out about `root`; null = nowhere.
    """

    def __init__(self, root: str | Path, index: str | Path | None = None) -> None:
        self.root = Path(root).expanduser()
        self.index = Path(index).expanduser() if index else None

    def __str__(self) -> str:
        return str(self.root)

    def is_dir(self, path: str = "") -> bool:
        return (self.root / path).is_dir()

    def ref(self, path: str) -> Ref | None:
        """The file at `path`, None where there is none."""
        return str(self.root / path) if (self.root / path).is_file() else None

    def text(self, path: str) -> str | None:
        """The content of a text file, None where there is none."""
        ref = self.ref(path)
        return read_bytes(ref).decode("utf-8-sig", "replace") if ref else None

    def names(self, path: str = "") -> list[str]:
        """What lies directly in a folder, sorted, without hidden files."""
        return sorted(entry.name for entry in (self.root / path).iterdir() if not entry.name.startswith("."))

    def images(self, path: str = "") -> dict[str, Ref]:
        """Image files anywhere below a folder, sorted: path relative to it (with `/` and suffix) -> the file."""
        folder, found = self.root / path, {}
        for parent, folders, names in os.walk(folder, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            above = "" if parent == str(folder) else f"{Path(parent).relative_to(folder).as_posix()}/"
            for name in names:
                if name.lower().endswith(SUFFIXES) and not name.startswith("."):  # "._x.jpg": a macOS resource fork
                    found[above + name] = f"{parent}{os.sep}{name}"
        return dict(sorted(found.items()))

    def missing(self, what: str, looked: Sequence[str], advice: str) -> NecoError:
        """The error for a data set that is not there: where it was looked for, what is there, what to do."""
        if self.root.is_file():
            there = f"{self} is a file"
        elif self.is_dir():
            names = self.names()
            there = f"{self} holds {', '.join(names[:8]) or 'nothing'}{' ...' if len(names) > 8 else ''}"
        else:
            there = f"{self} does not exist"
        places = "".join(f"\n  {self.root / path}" for path in looked)
        return NecoError(f"no {what}. Looked in{places}\n{there}.\n{advice}\nSet its place with dataset.root=FOLDER.")
