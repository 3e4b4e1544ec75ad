"""A tracker in a thread of its own: whatever it does, training neither stops nor waits for it."""

import contextlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from neco.utils import signals

if TYPE_CHECKING:  # `python -m neco --help` imports this
    from neco.logger.base import Tracker

log = logging.getLogger(__name__)
WAITING = 1000  # things told and not yet taken note of
PATIENT = 2  # seconds of waiting that need no explanation
AT_EXIT = 3
all_of_them: list["Guard"] = []


class Guard:
    """Passes on what it is told. What raises, does not keep up or does not end is dropped, with one warning."""

    def __init__(self, name: str, tracker: "Tracker") -> None:
        self.name, self.tracker, self.dropped = name, tracker, False
        self.told: queue.Queue[tuple[str, tuple]] = queue.Queue(WAITING)
        self.ended = threading.Event()  # Python 3.11 takes a thread for ended once its join was interrupted
        threading.Thread(target=self._work, name=f"logger.{name}", daemon=True).start()
        all_of_them.append(self)

    def tell(self, event: str, *values: Any) -> None:
        if not self.dropped:
            try:
                self.told.put_nowait((event, values))
            except queue.Full:
                self._drop(f"does not answer, {WAITING} entries wait")

    def close(self) -> None:
        """Wait for the rest, at most `wait` seconds, and not at all for who stopped the program twice."""
        wait = 0.0 if signals.meant else self.tracker.wait or 0.0
        try:
            if not self.ended.wait(0 if self.dropped else min(wait, PATIENT)) and not self.dropped and wait > PATIENT:
                log.info("logger.%s is sending the rest, at most %g s more", self.name, wait - PATIENT)
                self.ended.wait(wait - PATIENT)
        finally:
            if not self.ended.is_set():
                had = f"it had {wait:g} s after the end (logger.{self.name}.wait)"
                self._drop("stopped twice, so it was not waited for" if signals.meant else had)

    def _work(self) -> None:
        event = ""
        try:
            while event != "finish":
                event, values = self.told.get()
                self.tracker.tell(event, *values)
        except BaseException as error:  # also a library's sys.exit
            self._drop(f"{event}: {type(error).__name__}: {error}")
        self.ended.set()

    def _drop(self, why: str) -> None:
        if not self.dropped:
            self.dropped = True
            rest = f". {self.tracker.rest}" if self.tracker.rest else ""
            log.warning("logger.%s is left out from here on: %s%s", self.name, why, rest)


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """The program's main block. What the libraries of trackers do at exit may not end: it gets a few seconds."""
    code: Any = 1
    try:
        yield
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        raise
    finally:
        if all_of_them:
            last = threading.Timer(1 if signals.meant else AT_EXIT, _leave, [code if isinstance(code, int) else 1])
            last.daemon = True
            last.start()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
