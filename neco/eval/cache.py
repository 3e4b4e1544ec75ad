"""Features on disk, under a name that holds everything they depend on, in a folder of bounded size."""

import contextlib
import hashlib
import json
import logging
import math
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from neco import files

log = logging.getLogger(__name__)
Spec = dict[str, Any]
BLOCK = 64  # images


class Cache:
    """A folder of `features-<hash of the spec>.npy`, a CRC-32 at the end; files appear in it whole or not at all.

    Args:
        folder: None keeps nothing. A spec of None is never kept either.
        gigabytes: bound of the folder, in 10^9 bytes: what was not used for longest goes first.
    """

    def __init__(self, folder: Path | None, gigabytes: float) -> None:
        self.folder, self.limit = folder, gigabytes * 1e9

    def path(self, spec: Spec | None) -> Path | None:
        if self.folder is None or spec is None:
            return None
        text = json.dumps(spec, sort_keys=True, default=repr)
        return self.folder / f"features-{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"

    def find(self, spec: Spec | None) -> np.ndarray | None:
        """The features of `spec`, memory-mapped, if they are there."""
        path = self.path(spec)
        if path is None:
            return None
        try:
            features = np.load(path, mmap_mode="r" if files.can_be_mapped(path) else None)
            with path.open("rb") as file:
                file.seek(features.nbytes + features.offset)
                sound = file.read() == checksum(features)
            files.touch(path)
        except FileNotFoundError:
            return None
        except Exception:  # of numpy, which raises just anything for a damaged header
            sound = False
        if not sound:
            log.warning("%s is damaged; its features are computed again", path)
            return None
        log.info("features read from %s", path)
        return features

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether float32 features of this shape are within the bound."""
        return math.prod(shape) * 4 <= self.limit

    def trim(self) -> None:
        found = []
        for path in (self.folder or Path()).glob("features-*"):
            try:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another process trims too
                continue
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total > self.limit:
                path.unlink(missing_ok=True)
                total -= size


def checksum(features: np.ndarray, before: int = 0) -> bytes:
    """CRC-32 of features, or of what goes on after those with the checksum `before`."""
    for start in range(0, len(features), BLOCK):
        before = zlib.crc32(np.ascontiguousarray(features[start : start + BLOCK]).data, before)
    return before.to_bytes(4, "little")


class Entry:
    """Features on their way into the cache, a context: a temporary file, synced and renamed when the block ends well.

    A cache that cannot be written (full, read-only, too small) is a warning, not the end of an evaluation.
    """

    def __init__(self, cache: Cache, spec: Spec | None, images: int) -> None:
        self.cache, self.path, self.images = cache, cache.path(spec), images
        self.stack = contextlib.ExitStack()
        self.file: IO[bytes] | None = None
        self.sum = bytes(4)

    def __enter__(self) -> "Entry":
        return self

    def write(self, features: np.ndarray) -> None:
        """Append the next images, float32 (B, h, w, D)."""
        if self.path is None:
            return
        try:
            if self.file is None:
                self.file = self._open(self.path, (self.images, *features.shape[1:]))
            self.file.write(np.ascontiguousarray(features).data)
            self.sum = checksum(features, int.from_bytes(self.sum, "little"))
        except OSError as error:
            self._drop(error)

    def _open(self, path: Path, shape: tuple[int, ...]) -> IO[bytes]:
        if not self.cache.fits(shape):
            raise OSError(f"{math.prod(shape) * 4 / 1e9:.1f} GB would be more than cache_gb={self.cache.limit / 1e9:g}")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = self.stack.enter_context(files.whole(path))
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return file

    def _drop(self, error: BaseException) -> None:
        """Remove the file, which makes room for others."""
        if isinstance(error, OSError):
            log.warning("features are not kept in %s: %s", self.cache.folder, error)
        with contextlib.suppress(OSError):  # of closing it on a full disk
            self.stack.__exit__(type(error), error, None)
        self.file = self.path = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error:
                self._drop(error)
            elif self.file:
                self.file.write(self.sum)
                self.stack.close()
                self.cache.trim()
        except OSError as full:
            self._drop(full)
