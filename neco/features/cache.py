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

from neco.dataset.digests import Contents
from neco.utils import atomic_files
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
Spec = dict[str, Any]
BLOCK = 64  # images


class Cache:
    """A folder of `features-<hash of the spec>-<digest of the images>.npy`, a CRC-32 at the end.

    Files appear in it whole or not at all. The content of the images has a name of its own, so that they need not be
    read to know that there are no features of them.

    Args:
        folder: None keeps nothing. A spec of None is never kept either.
        gigabytes: bound of the folder, in 10^9 bytes: what was not used for longest goes first.
    """

    def __init__(self, folder: Path | None, gigabytes: float) -> None:
        self.folder, self.limit = folder, gigabytes * 1e9

    def prefix(self, spec: Spec | None) -> str | None:
        """What the names of files with features of `spec` begin with; None where none are kept."""
        if self.folder is None or spec is None:
            return None
        text = json.dumps(spec, sort_keys=True, default=repr)
        return f"features-{hashlib.sha256(text.encode()).hexdigest()[:32]}-"

    def find(self, spec: Spec | None, images: Contents | None) -> np.ndarray | None:
        """The features of `images` by `spec`, memory-mapped, if they are there."""
        prefix = self.prefix(spec)
        if not (prefix and self.folder and images and any(self.folder.glob(f"{prefix}*.npy"))):
            return None
        path = self.folder / f"{prefix}{images.digest()}.npy"
        try:
            features = np.load(path, mmap_mode="r" if atomic_files.can_be_mapped(path) else None)
            with path.open("rb") as file:
                file.seek(features.nbytes + features.offset)
                sound = file.read() == checksum(features)
            atomic_files.touch(path)
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

    def __init__(self, cache: Cache, spec: Spec | None, images: Contents | None) -> None:
        self.cache, self.prefix, self.images = cache, cache.prefix(spec) if images else None, images
        self.stack = contextlib.ExitStack()
        self.file: IO[bytes] | None = None
        self.sum = bytes(4)

    def __enter__(self) -> "Entry":
        return self

    def write(self, features: np.ndarray) -> None:
        """Append the next images, float32 (B, h, w, D)."""
        if self.prefix is None or self.images is None:
            return
        try:
            if self.file is None:
                self.file = self._open((len(self.images.refs), *features.shape[1:]))
            self.file.write(np.ascontiguousarray(features).data)
            self.sum = checksum(features, int.from_bytes(self.sum, "little"))
        except OSError as error:
            self._drop(error)

    def _open(self, shape: tuple[int, ...]) -> IO[bytes]:
        if not self.cache.fits(shape):
            raise OSError(f"{math.prod(shape) * 4 / 1e9:.1f} GB would be more than cache_gb={self.cache.limit / 1e9:g}")
        assert self.cache.folder
        atomic_files.make_cache_folder(self.cache.folder)
        self.part = self.stack.enter_context(atomic_files.scratch(self.cache.folder))
        file = self.stack.enter_context((self.part / "features").open("wb"))
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return file

    def _drop(self, error: BaseException) -> None:
        """Remove the file, which makes room for others."""
        if isinstance(error, OSError | NecoError):
            log.warning("features are not kept in %s: %s", self.cache.folder, error)
        with contextlib.suppress(OSError):  # of closing it on a full disk
            self.stack.__exit__(type(error), error, None)
        self.file = self.prefix = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error:
                self._drop(error)
            elif self.file and self.images:
                self._finish(self.file, self.images)
        except (OSError, NecoError) as why:
            self._drop(why)

    def _finish(self, file: IO[bytes], images: Contents) -> None:
        """Give the file its name. Raises NecoError where the images are not those that were read, or may be others."""
        file.write(self.sum)
        atomic_files.flush(file)
        digest = images.digest()
        if changed := images.changed():
            raise NecoError(f"{changed} was changed while features were computed")
        assert self.cache.folder
        atomic_files.rename(self.part / "features", self.cache.folder / f"{self.prefix}{digest}.npy")
        atomic_files.sync(self.cache.folder)
        self.stack.close()
        self.cache.trim()
