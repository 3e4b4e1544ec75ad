"""Processes that train together watch each other: who dies, hangs or is too slow is named, and all end."""

import contextlib
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist

from neco.distributed import collectives
from neco.utils.errors import NecoError

BEAT = 0.5  # seconds between two signs of life
SILENT = 4.0  # seconds without one, after which a process is dead or stopped


class Peers(pl.Callback):
    """A thread of each process that tells the others how far it has come, and a block around the training.

    When this process waits for `seconds`, and others have not come as far or give no sign of life, it names them and
    ends. What ends it earlier, as a connection that is lost, becomes a NecoError with their names.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.thread, self.over = seconds, threading.Thread(target=self._watch, daemon=True), False
        self.seen: dict[int, tuple[str, float]] = {}  # of each other process: its last sign of life, and since when
        self.children: list[Any] = []

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._explain(error)
        finally:
            self.over = True

    def _explain(self, error: BaseException | None) -> None:
        if not self.thread.is_alive() or not isinstance(error, RuntimeError) or isinstance(error, NecoError):
            return
        until = time.monotonic() + SILENT + 2 * BEAT
        while time.monotonic() < until:  # a process that died needs some time to be missed
            if found := self._missing():
                raise NecoError(self._told(found, "has ended or hangs")) from error
            time.sleep(BEAT / 5)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if collectives.world() == 1:
            return
        self.children = getattr(trainer.strategy.launcher, "procs", [])
        host, limit = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=SILENT)
        store = partial(dist.TCPStore, host, wait_for_workers=False, timeout=limit)
        ours = store(0, is_master=True) if collectives.leader() else None
        port = collectives.merge(ours.port if ours else 0)[0]
        self.store = ours or store(port)
        self._beat(0)
        self.heard = time.monotonic()
        collectives.merge(None)  # all have
        self.thread.start()

    def on_train_batch_start(self, *_: Any) -> None:
        collectives.reached += 1

    def on_before_backward(self, *_: Any) -> None:
        collectives.reached += 1

    def _beat(self, number: int) -> None:
        self.store.set(str(collectives.rank()), f"{collectives.reached} {number}")

    def _talk(self) -> None:
        """Say how far this process is, and listen to the others; of a first process that hangs this never returns."""
        number = 0
        with contextlib.suppress(RuntimeError):  # the first process, which holds what is said, is gone
            while not self.over:
                self._beat(number := number + 1)
                for rank in set(range(collectives.world())) - {collectives.rank()}:
                    said = self.store.get(str(rank)).decode()
                    if said != self.seen.get(rank, ("", 0.0))[0]:
                        self.seen[rank] = said, time.monotonic()
                self.heard = time.monotonic()
                time.sleep(BEAT)

    def _watch(self) -> None:
        threading.Thread(target=self._talk, daemon=True).start()
        place, since = collectives.reached, time.monotonic()
        while not self.over:
            begun = time.monotonic()
            time.sleep(BEAT)
            now = time.monotonic()
            if collectives.reached != place or now - begun > SILENT:  # this process itself was suspended
                place, since = collectives.reached, now
            elif now - since > self.seconds and (found := self._missing() or self._behind(place)):
                self._end(found)

    def _missing(self) -> list[int]:
        """Who gives no sign of life."""
        now = time.monotonic()
        if dead := [rank for rank, child in enumerate(self.children, 1) if child.poll()]:
            return dead
        if now - self.heard > SILENT and not collectives.leader():
            return [0]
        return [rank for rank, (_, since) in self.seen.items() if now - since > SILENT]

    def _behind(self, place: int) -> list[int]:
        """Who has not come as far as others, if any has not."""
        places = {rank: int(said.split()[0]) for rank, (said, _) in self.seen.items()} | {collectives.rank(): place}
        return [rank for rank, reached in places.items() if reached < max(places.values())]

    def _told(self, ranks: list[int], what: str) -> str:
        who = ", ".join(f"process {rank} of {collectives.world()}" for rank in sorted(ranks))
        return f"{who} {what}, so the others cannot go on; the same command goes on from the last checkpoint"

    def _end(self, found: list[int]) -> None:
        """Now: the other thread waits in a library, which no exception can reach."""
        told = self._told(found, f"does not come ({self.seconds:g} s)")
        os.write(2, f"error (process {collectives.rank()}): {told}\n".encode())
        for child in self.children:
            child.send_signal(signal.SIGKILL)  # also what was stopped
        sys.stderr.flush()
        os._exit(1)
