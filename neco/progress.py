"""Progress over long work: a bar with ETA in a terminal, a plain line every few seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from neco import interrupt

T = TypeVar("T")
log = logging.getLogger(__name__)
PLAIN_SECONDS = 15.0


def columns(*extra: TextColumn) -> tuple:
    """The columns that every bar of the project shows: what, bar, done/total, elapsed, remaining."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        *extra,
    )


def duration(seconds: float) -> str:
    """`3:07` or `1:02:45`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, showing how far it is. `total` defaults to `len(items)` where that exists."""
    total = total if total is not None else getattr(items, "__len__", lambda: None)()
    if sys.stderr.isatty():
        from rich.console import Console

        with Progress(*columns(), console=Console(stderr=True), transient=True) as bar:
            for item in bar.track(items, total=total, description=what):
                interrupt.check()
                yield item
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last > PLAIN_SECONDS:
            last, left = now, ""
            if total:
                left = f"/{total}, eta {duration((now - start) / done * (total - done))}"
            log.info("%s: %d%s", what, done, left)
        interrupt.check()
        yield item
