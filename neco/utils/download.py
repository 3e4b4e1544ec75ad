"""A file from a web server: resumed where an earlier try ended, its length checked, tried again where that may help."""

import contextlib
import errno
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from neco.utils import atomic_files, signals
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
TIMEOUT = 30.0  # seconds without a byte
TRIES = 5  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the second try, doubled for each one after
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG)  # trying again does not help
Show = Callable[[int, int | None], None]  # bytes that are there, bytes of the whole file if they are known


class Stopped(Exception):
    """Somebody set `stop`."""


def fetch(
    url: str,
    path: Path,
    show: Show,
    *,
    size: int | None = None,
    pinned: bool = False,
    tries: int | None = None,
    stop: threading.Event | None = None,
) -> Path:
    """Download to `path`.part, going on where an earlier try ended; the finished .part, for the caller to check.

    Args:
        size: bytes that the file must have, where that is known.
        pinned: the caller knows a checksum: a rest may be appended although the server names no version of the file.
        tries: in a row that may bring nothing new (TRIES).

    Raises:
        NecoError: the server does not have it, it is another file, or the tries are used up. What came is kept.
        Stopped: `stop` was set.
    """
    part, version = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.version")
    path.parent.mkdir(parents=True, exist_ok=True)
    best, failures, stop, tries = bytes_of(part), 0, stop or threading.Event(), tries or TRIES
    while True:
        try:
            total = _attempt(url, part, version, show, size, pinned, stop)
            if total is None or bytes_of(part) == total:
                version.unlink(missing_ok=True)
                return part
            problem: Exception = EOFError(f"{bytes_of(part)} of {total} bytes came")
        except HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise NecoError(
                    f"{url}: HTTP {error.code} {error.reason}. The file may have moved: "
                    f"find {path.name} elsewhere, put it at {path} and give the same command again"
                ) from error
            problem = error
        except (OSError, HTTPException) as error:
            if getattr(error, "errno", None) in LOCAL:
                raise NecoError(f"cannot write {part}: {error}") from error
            problem = error
        failures = 0 if bytes_of(part) > best else failures + 1
        best = max(best, bytes_of(part))
        if failures >= tries:
            raise NecoError(
                f"{url}: {tries} tries failed, the last with: {problem}"
                + (f". {best / 1e6:.1f} MB are kept in {part}: the same command goes on from there" if best else "")
            ) from problem
        if stop.wait(min(60.0, PAUSE * 2**failures / 2)):
            raise Stopped


def _attempt(
    url: str, part: Path, version: Path, show: Show, size: int | None, pinned: bool, stop: threading.Event
) -> int | None:
    """One request. Appends to `part` what is missing, or writes it anew; the size of the whole file if it is known."""
    have, known = bytes_of(part), version.read_text() if version.exists() else ""
    if not (known or pinned):
        have = 0  # nothing would tell a rest of another version
    headers = {"User-Agent": "neco"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": known} if known else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # nothing is left to send, or the file became shorter
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return have
            part.unlink(missing_ok=True)
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise NecoError(f"{url} sent a web page, not the file: it moved, or a login is asked for")
        now, length = _version(response.headers), response.headers.get("Content-Length")
        if response.status == 206:
            extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not extent or int(extent[1]) != have or (known and now != known):
                part.unlink()
                raise OSError("the file changed on the server")
            length = extent[2]
        else:
            have = 0  # the server ignores Range, or the file changed
        total = int(length) if length else None
        if size and total not in (None, size):
            raise NecoError(f"{url} has {total} bytes instead of {size}: it is another version")
        version.write_text(now)
        with part.open("ab" if have else "wb") as file:
            while block := response.read1(1 << 20):  # what is there: a timeout loses nothing
                file.write(block)
                show(file.tell(), total)
                if stop.is_set():
                    raise Stopped
    return total


def _version(headers: HTTPMessage) -> str:
    """What If-Range takes: a strong ETag, else the date."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def bytes_of(path: Path) -> int:
    """Size of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold .`path`.lock, once no other process does: of many that want the same file one downloads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.open_for_appending(path.with_name(f".{path.name}.lock")) as file:
        told = False
        while not atomic_files.lock(file):
            if not told:
                log.info("waiting for another process that downloads %s", path.name)
            told = True
            signals.check()
            time.sleep(0.1)
        yield
