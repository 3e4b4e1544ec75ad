"""What happens to runs of weeks, really done: trials by topic, a few by pytest, all of them by `make soak`.

A topic is a module here. A trial of it is a function of (rng, folder, count) under `@trial`: it does its fault `count`
times in an empty folder and yields what came of each. It raises AssertionError where that is wrong.
"""

import datetime
import importlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TOPICS = ["kills", "disk", "processes", "determinism", "long", "inputs", "hostile", "configs", "weights", "numbers"]


class Outcome(NamedTuple):
    """What was done, in words that equal faults share, and what came of it."""

    fault: str
    result: str


Try = Callable[[random.Random, Path, int], Iterable[Outcome]]


class Trial(NamedTuple):
    """`small` is the count for pytest, `full` that of `make soak`."""

    topic: str
    name: str
    run: Try
    small: int
    full: int

    def __call__(self, folder: Path, count: int) -> Iterator[Outcome]:
        """Run it with the seed of today; an error says which that is."""
        try:
            yield from self.run(random.Random(f"{seed()} {self.name}"), folder, count)
        except BaseException as error:
            error.add_note(f"to see it again: NECO_SOAK_SEED={seed()}")
            raise


_trials: list[Trial] = []


def trial(small: int, full: int) -> Callable[[Try], Try]:
    """Makes a function a trial of its module's topic."""

    def register(run: Try) -> Try:
        _trials.append(Trial(run.__module__.rpartition(".")[2], run.__name__, run, small, full))
        return run

    return register


def trials(topic: str) -> list[Trial]:
    importlib.import_module(f"soak.{topic}")
    return [found for found in _trials if found.topic == topic]


def seed() -> str:
    """NECO_SOAK_SEED, or the date: others each day, the same for whoever repeats today's."""
    return os.environ.get("NECO_SOAK_SEED") or datetime.datetime.now(datetime.UTC).strftime("%Y%m%d")
