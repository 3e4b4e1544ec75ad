"""Signals: an end that says how to go on. Training puts it off to the end of the step, to save that.

Ctrl-C, SIGTERM, SIGUSR2, by which SLURM and submitit say that a job's time is nearly up, and SIGHUP, when a terminal is
gone; that one not under `nohup`.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from neco.utils import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
UNHEARD = 20.0  # seconds that a library may keep the main thread, which alone hears signals
GRACE = 30  # seconds that a data worker goes on after a SIGTERM, which may be meant for its parent


class Interrupted(BaseException):
    """A signal ended the program. No Exception, so that nothing on the way takes it for an error of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{'interrupted' if number == signal.SIGINT else 'stopped'} ({signal.Signals(number).name})")
        self.code = 128 + number


def find(error: BaseException | None) -> Interrupted | None:
    """The Interrupted during which an error arose: a file that is being written fails to close when it is cut short."""
    while error:
        if isinstance(error, Interrupted):
            return error
        error = error.__context__
    return None


asked: int | None = None  # the signal that a block of `put_off` was sent
meant = False  # it was sent twice: at once, whatever is lost
_waits = _held = False
_heard = 0.0  # when a signal last reached the main thread
_bell: int | None = None  # what a signal writes to at once, whatever the main thread does


def _handle(number: int, frame: FrameType | None) -> None:
    global asked, meant, _heard
    _heard = time.monotonic()
    meant, asked = asked is not None, number  # also when it is raised: that may be lost in a callback of the system
    if _held:
        return
    if not _waits or meant:
        raise Interrupted(number)
    if not processes.number("LOCAL_RANK"):
        with contextlib.suppress(OSError):  # a terminal that is gone; a bar takes a line back
            os.write(2, b"\nstopping when this step is done and saved; once more: at once\n\n")


def listen() -> None:
    """Take the signals, also from whoever took them since."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _handle)


def _insist(rings: int) -> None:
    """End the process when a signal does not reach the main thread, because that waits in a library.

    A first signal that is put off may find the main thread in a long step, but hardly so where there are other
    processes, for which it may wait. SLURM ends its jobs by itself, and queues again those that end in time.
    """
    first, count, number = 0.0, 0, 0
    while True:
        ready = select.select([rings], [], [], 0.5 if count else None)[0]
        now = time.monotonic()
        for byte in os.read(rings, 64) if ready else b"":
            if byte in SIGNALS and byte != signal.SIGUSR2:
                first, count, number = first if count else now, count + 1, byte
        if count and _heard > first - 1:  # it may have been before this thread saw the signal
            count = 0
            continue
        several = processes.number("WORLD_SIZE", 1) > 1
        patience = UNHEARD if count > _waits else 3 * UNHEARD if several else float("inf")
        if count and now - first > patience and not _held and os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):
                os.write(2, f"\nstopped ({name}) while waiting in a library; the same command goes on\n".encode())
            os._exit(128 + number)


def _ring() -> int:
    """Have signals ring the bell; returns what they rang before."""
    global _bell
    if _bell is None:
        rings, _bell = os.pipe()
        os.set_blocking(_bell, False)
        threading.Thread(target=_insist, args=(rings,), name="signals", daemon=True).start()
    return signal.set_wakeup_fd(_bell, warn_on_full_buffer=False)


def _leave_bell() -> None:
    """In a process that was forked, the bell is the parent's."""
    global _bell
    if _bell is not None:
        _bell = None
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_bell)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """In this block the signals raise Interrupted, or end the process if a library keeps it from hearing them."""
    global asked, meant, _waits, _held
    before, asked, meant = [signal.getsignal(number) for number in SIGNALS], None, False
    _waits = _held = False
    listen()
    main = threading.current_thread() is threading.main_thread()
    rang = _ring() if main else -1
    try:
        with uncovered():
            yield
    finally:
        asked, _waits, _held = None, False, False
        if main:
            signal.set_wakeup_fd(rang, warn_on_full_buffer=False)
            for number, handler in zip(SIGNALS, before, strict=True):
                signal.signal(number, handler)


def put_off(waits: bool = True) -> None:
    """From now on a first signal is only noted in `asked`; with False it raises again, and so does one noted before."""
    global _waits
    _waits = waits
    if asked is not None and not waits:
        raise Interrupted(asked)


def check() -> None:
    """Raises the Interrupted that got lost, unless it is put off."""
    if asked is not None and not _waits:
        raise Interrupted(asked)


@contextlib.contextmanager
def uncovered() -> Iterator[None]:
    """Raise the Interrupted in place of an error that arose on its way out of this block."""
    try:
        yield
    except Exception as error:
        if stop := find(error):
            raise stop from None
        raise


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Signals count after the block, in which processes are forked."""
    global _held
    _held = True  # no mask: another thread would take them
    try:
        yield
    finally:
        _held = False
    check()


def with_parent() -> None:
    """Get a SIGTERM when the parent ends, however it does. Only Linux has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:  # it already has
            raise Interrupted(signal.SIGTERM)


def ignore(worker: int) -> None:
    """For data workers: they end when their parent does, or some time after they were told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
