"""Signals: put off, lost, and in data workers."""

import contextlib
import hashlib
import os
import signal
import sys
import time

import pytest
import torch

from neco.training.callbacks import Checkpoints
from neco.utils import signals
from neco.utils.errors import NecoError


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handled():
    with signals.handled():
        yield


def test_at_once_put_off_and_a_second_one():
    with pytest.raises(signals.Interrupted, match="SIGTERM") as stop:
        send()
    assert stop.value.code == 143
    with signals.handled():
        signals.put_off()
        send(signal.SIGINT)
        assert signals.asked == signal.SIGINT
        signals.check()
        with pytest.raises(signals.Interrupted):
            send(signal.SIGINT)
        with pytest.raises(signals.Interrupted, match="SIGINT"):
            signals.put_off(False)


def test_one_that_is_swallowed_is_raised_again():
    with contextlib.suppress(signals.Interrupted):  # as Python does in callbacks
        send()
    with pytest.raises(signals.Interrupted):
        signals.check()


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_second_one_during_a_save_is_no_failed_save(tmp_path, number):
    last = tmp_path / "checkpoints/last.ckpt"

    class Cut(torch.nn.Module):
        def __reduce__(self):
            send(number)
            send(number)

    with pytest.raises(signals.Interrupted) as stop, signals.handled():
        signals.put_off()
        Checkpoints(last.parent).save_checkpoint({"a": torch.zeros(1000), "b": Cut()}, last)
    assert stop.value.code == 128 + number and not last.exists()


def test_an_error_that_a_signal_caused_is_the_signal():
    for error in (RuntimeError("unexpected pos"), OSError("bad file"), NecoError("cannot write")):
        with pytest.raises(signals.Interrupted) as stop, signals.handled():
            try:
                send(signal.SIGINT)
            finally:
                raise error
        assert stop.value.code == 130
    with pytest.raises(NecoError), signals.handled():  # the first, put off, is not the cause
        signals.put_off()
        send(signal.SIGINT)
        raise NecoError("no space left on device")


def test_a_hangup_counts_but_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with pytest.raises(signals.Interrupted) if stops else contextlib.nullcontext(), signals.handled():
                signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_held_back_in_a_block():
    with pytest.raises(signals.Interrupted), signals.held():
        send()
        reached = True
    assert reached


def test_a_worker_outlives_a_signal_for_a_while(monkeypatch):
    monkeypatch.setattr(signals, "GRACE", 1)
    with signals.held():
        child = os.fork()
        if not child:
            try:
                signals.ignore(0)
                time.sleep(60)
                time.sleep(60)
            finally:
                os._exit(1)
    time.sleep(0.2)
    os.kill(child, signal.SIGINT)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGALRM


@pytest.mark.skipif(
    sys.platform != "linux", reason="runs on Linux, which alone tells a process that its parent has ended"
)
def test_a_process_ends_with_its_parent_even_when_that_is_killed():
    ends, begun = os.pipe(), os.pipe()
    parent = os.fork()
    if not parent:
        if not os.fork():
            signals.with_parent()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.write(begun[1], b"!")
            time.sleep(20)
            os.write(ends[1], b"still there")
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    os.close(ends[1])
    assert os.read(begun[0], 1) == b"!"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(ends[0], 20) == b"", "its end of the pipe is closed"


@pytest.mark.parametrize("put_off", [0, 1])
def test_a_library_that_keeps_the_main_thread_is_left(monkeypatch, put_off):
    monkeypatch.setattr(signals, "UNHEARD", 0.5)
    child = os.fork()
    if not child:
        with signals.handled():
            signals.put_off(bool(put_off))
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # of minutes, in which no handler runs
        os._exit(1)
    time.sleep(1)
    for _ in range(put_off):
        os.kill(child, signal.SIGTERM)
        time.sleep(2)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "a step may take long"
    begun = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143 and time.monotonic() - begun < 10


def test_a_signal_that_is_heard_late_ends_nothing(monkeypatch):
    monkeypatch.setattr(signals, "UNHEARD", 0.2)
    with pytest.raises(signals.Interrupted), signals.handled():
        send()
    with signals.handled():
        signals.put_off()
        send()
        time.sleep(1.5)
        assert signals.asked == signal.SIGTERM


def test_a_signal_before_the_job_is_told(inside, monkeypatch):
    import hydra

    monkeypatch.setattr(hydra, "main", lambda **about: lambda job: send)
    assert inside("-m", "seed=0,1") == (143, "stopped (SIGTERM)\n")
