"""Signals: put off, lost, and in data workers."""

import contextlib
import os
import signal
import time

import pytest

from neco import interrupt


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handled():
    with interrupt.handled():
        yield


def test_at_once_put_off_and_a_second_one():
    with pytest.raises(interrupt.Interrupted, match="SIGTERM") as stop:
        send()
    assert stop.value.code == 143
    with interrupt.handled():
        interrupt.put_off()
        send(signal.SIGINT)
        assert interrupt.asked == signal.SIGINT
        interrupt.check()
        with pytest.raises(interrupt.Interrupted):
            send(signal.SIGINT)
        with pytest.raises(interrupt.Interrupted, match="SIGINT"):
            interrupt.put_off(False)


def test_one_that_is_swallowed_is_raised_again():
    with contextlib.suppress(interrupt.Interrupted):  # as Python does in callbacks
        send()
    with pytest.raises(interrupt.Interrupted):
        interrupt.check()


def test_held_back_in_a_block():
    with pytest.raises(interrupt.Interrupted), interrupt.held():
        send()
        reached = True
    assert reached


def test_a_worker_outlives_a_signal_for_a_while(monkeypatch):
    monkeypatch.setattr(interrupt, "GRACE", 1)
    with interrupt.held():
        child = os.fork()
        if not child:
            try:
                interrupt.ignore(0)
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
