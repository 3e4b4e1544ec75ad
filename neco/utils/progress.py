"""Progress over long work: a bar with ETA in a terminal, a plain line every few seconds elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from neco.utils import atomic_files, signals

T = TypeVar("T")
log = logging.getLogger(__name__)
every = 15.0  # seconds between plain lines: log_seconds of the configuration


class Lines(logging.StreamHandler):
    """Log lines in the terminal, above a bar that is shown: rich takes the place of sys.stderr meanwhile."""

    stream = property(lambda self: sys.stderr, lambda self, stream: None)  # type: ignore[assignment]


class LogFile(logging.FileHandler):
    """A log that is appended to, in a folder that may be somebody else's."""

    def _open(self) -> Any:
        return atomic_files.open_for_appending(Path(self.baseFilename), encoding=self.encoding, errors=self.errors)


def columns() -> tuple:
    """The columns that every bar of the project shows: what, bar, done/total, elapsed, remaining."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )


class Captioned(Progress):
    """Bars with a line of text below."""

    caption = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.caption, no_wrap=True, overflow="ellipsis")


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
                signals.check()
                yield item
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last > every:
            last, left = now, ""
            if total:
                left = f"/{total}, eta {duration((now - start) / done * (total - done))}"
            log.info("%s: %d%s", what, done, left)
        signals.check()
        yield item


@contextlib.contextmanager
def transfers() -> Iterator[Callable[[str, int | None], Callable[[int, int | None], None]]]:
    """In this block `bar(name, bytes)` gives what is to be called with (bytes done, bytes in all or None).

    For any number of downloads at the same time, each from a thread of its own.
    """
    from rich.console import Console

    terminal, shown = sys.stderr.isatty(), time.monotonic()
    what = "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*what, console=Console(stderr=True), disable=not terminal, transient=True) as bars:

        def bar(name: str, size: int | None = None) -> Callable[[int, int | None], None]:
            task = bars.add_task(name, total=size)

            def report(done: int, total: int | None) -> None:
                nonlocal shown
                bars.update(task, completed=done, total=total or size)
                if not terminal and time.monotonic() - shown > every:
                    shown = time.monotonic()
                    log.info("%s: %.2f of %s GB", name, done / 1e9, f"{total / 1e9:.2f}" if total else "?")

            return report

        yield bar
