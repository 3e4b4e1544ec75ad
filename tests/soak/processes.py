"""One of two processes is killed, stopped or made slow, data workers are killed, the port is taken, the clock jumps.

The others end in the stated time with a line that names the process, and the same command ends in the state of the run
that nobody disturbed; or nothing comes of it.
"""

import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from soak import Outcome, kills, life, trial
from soak.disk import DONE, refusal

WAIT = 10.0  # seconds, the stated time
PAIR = [
    *life.TINY, f"train.steps={kills.STEPS}", "train.save_minutes=1e-9", "train.devices=2", "train.drop_path=0",
    f"train.wait_minutes={WAIT / 60}",
]  # fmt: skip


def at_step(step: int, act: Callable[[], object]) -> None:
    """In a life: do something before a step."""
    from neco.training.callbacks import Loop

    real = Loop.on_train_batch_start

    def then(self, trainer, *arguments):
        if trainer.global_step == step:
            act()
        real(self, trainer, *arguments)

    Loop.on_train_batch_start = then


def pair(folder: Path, *setup: life.Setup, which: int = 1, port: str = "") -> list[BaseProcess]:
    """Two processes that train together, as torchrun starts them; `setup` happens in one of them."""
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "soak"}
    shared |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "XDG_CACHE_HOME": str(folder / "cache")}
    return [
        life.begin(
            folder / f"process {rank}", [*PAIR, f"run_dir={folder / 'run'}"], *(setup if rank == which else ()),
            RANK=str(rank), LOCAL_RANK=str(rank), **shared,
        )
        for rank in range(2)
    ]  # fmt: skip


def ends(folder: Path, processes: list[BaseProcess]) -> list[life.End]:
    return [life.end(process, folder / f"process {rank}") for rank, process in enumerate(processes)]


def noted(path: Path, act: Callable[[], object]) -> None:
    path.write_text(str(time.monotonic()))
    act()


@trial(small=1, full=12)
def ranks(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    whole, first = folder / "whole", rng.randrange(3)
    assert [ended.code for ended in ends(whole, pair(whole))] == [0, 0]
    faults = {
        "killed": partial(signal.raise_signal, signal.SIGKILL),
        "stopped": partial(signal.raise_signal, signal.SIGSTOP),
        "slow": partial(time.sleep, 100 * WAIT),
    }
    for number in range(first, first + count):
        run, how, which = folder / f"pair {number}", [*faults][number % 3], rng.randrange(2)
        act = partial(noted, folder / "since", faults[how])
        processes = pair(run, partial(at_step, rng.randrange(1, kills.STEPS), act), which=which)
        ended = life.end(processes[1 - which], run / f"process {1 - which}")
        seconds = time.monotonic() - float((folder / "since").read_text())
        processes[which].kill()
        processes[which].join()
        said = [line for line in ended.said.splitlines() if line.startswith("error")]
        assert ended.code in (1, 2) and any(f"process {which} of 2" in line for line in said), ended.said
        assert seconds < WAIT + 30, f"{seconds} s instead of {WAIT} s"
        again = ends(run, pair(run))
        assert [ended.code for ended in again] == [0, 0], again
        kills.assert_same(run, whole, "run")
        limit = "30 s" if how == "killed" else f"wait_minutes, here {WAIT:g} s, and 30"
        yield Outcome(f"one of two processes is {how}", f"the other names it and ends within {limit}; again: {DONE}")


@trial(small=1, full=2)
def port(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    for number in range(count):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            first, second = pair(folder / f"pair {number}", port=str(taken.getsockname()[1]))
            ended = life.end(first, folder / f"pair {number}/process 0")
            second.kill()  # as torchrun does
            yield Outcome("MASTER_PORT is taken", refusal(ended, "another program has this port"))


def kill_workers() -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGKILL)


@trial(small=1, full=6)
def workers(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    for number in range(count):
        run = folder / f"run {number}"
        kills.photos(run)
        act = partial(at_step, rng.randrange(1, 3), kill_workers)
        ended = life.live(run, [*kills.RUN, "train.workers=2"], act)
        told = refusal(ended, "a process that reads images is gone")
        ended = life.live(run, kills.RUN)
        assert ended.code == 0, ended.said
        kills.assert_same(run, kills.undisturbed().folder, "run")
        yield Outcome("data workers are killed", f"{told}; again: {DONE}")


def unsteady(seed: int) -> None:
    """The clock jumps by up to a month with each look at it."""
    now, rng = time.time, random.Random(seed)
    time.time = lambda: now() + rng.uniform(-3e6, 3e6)


@trial(small=1, full=6)
def clock(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    for number in range(count):
        run = folder / f"run {number}"
        kills.photos(run)
        ended = life.live(run, kills.RUN, partial(unsteady, rng.randrange(1000)))
        assert ended.code == 0, ended.said
        kills.assert_same(run, kills.undisturbed().folder, "run")
        yield Outcome("the clock jumps to and fro by days", DONE)
