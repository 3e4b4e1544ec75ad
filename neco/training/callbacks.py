"""What happens around the training steps: logging, saving, evaluating. None of it can change the training."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from rich.console import Console

from neco.config.schema import Trainings
from neco.distributed import collectives, device_memory
from neco.training.base import Module
from neco.training.unreadable import Unreadable
from neco.utils import atomic_files, progress, signals, startup
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How many steps a run has and at which of them something is due. An epoch is `images` images, in whole steps."""

    images: int
    options: Trainings

    def __post_init__(self) -> None:
        if (epochs := self.epoch(self.steps)) > 1e6:
            node, key = self.options.node, "steps" if self.options.steps else "epochs"
            raise NecoError(
                f"{node}.{key}: {self.steps} steps of {self.options.images} images ({node}.batch_size) are "
                f"{epochs:.3g} epochs, more than a million"
            )

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.options.steps or max(1, self.options.epochs * self.images // self.options.images)

    def epoch(self, step: int) -> float:
        """Passes over the data that `step` steps are."""
        return step * self.options.images / self.images

    def marks(self, every: int) -> dict[int, int]:
        """Step -> epoch at the end of each `every`-th epoch before the end; none for 0."""
        if not every:
            return {}
        ends = {
            ceil(epoch * self.images / self.options.images): epoch
            for epoch in range(every, ceil(self.epoch(self.steps)) + 1, every)
        }
        return {step: epoch for step, epoch in ends.items() if step < self.steps}


class Checkpoints(TorchCheckpointIO):
    """checkpoints/last.ckpt, and epoch_NNNN.ckpt to keep.

    A file is written under another name, synced and renamed: what was saved stays until the new one is whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.last, self.saved_at = folder, folder / "last.ckpt", time.monotonic()

    def save(self, trainer: pl.Trainer, keep_as: str | None = None) -> None:
        """Renew last.ckpt; `keep_as` is a second name under which it stays. Raises NecoError if it cannot be saved."""
        temporary = self.folder / "last.ckpt.tmp"
        trainer.save_checkpoint(temporary)  # a task of all processes, written by the first
        self.saved_at = time.monotonic()
        if not collectives.leader():
            return
        if keep_as:
            self.keep(temporary, keep_as)
        atomic_files.rename(temporary, self.last)
        atomic_files.sync(self.folder)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """For Lightning, whose own goes through memory and the folder of temporary files, where a kill leaves it."""
        try:
            self.folder.mkdir(exist_ok=True)
            with Path(path).open("wb") as file:
                torch.save(checkpoint, file)
                atomic_files.flush(file)
        except BaseException as error:
            with contextlib.suppress(OSError):
                Path(path).unlink(missing_ok=True)
            if not isinstance(error, OSError | RuntimeError) or signals.find(error):
                raise
            kept = f"{self.last} is the one before" if self.last.is_file() else "none was saved before"
            raise NecoError(
                f"{atomic_files.refused(path, error)}. {kept}; the same command goes on from there"
            ) from error

    def set_aside(self, name: str, other: str) -> bool:
        """Another name for what is called `name`, if anything but the last is; whether it was."""
        path = self.folder / name
        if found := path.exists() and not atomic_files.has_same_content(path, self.last):
            with self.tolerated(self.folder / other):
                atomic_files.rename(path, self.folder / other)
        return found

    def keep(self, path: Path, name: str) -> None:
        """Another name for a checkpoint, under which it stays."""
        with self.tolerated(self.folder / name):
            atomic_files.link_or_copy(path, self.folder / name)

    @contextlib.contextmanager
    def tolerated(self, path: Path) -> Iterator[None]:
        """Warn that a checkpoint is not kept and go on: the run can do without, it continues from last.ckpt."""
        try:
            yield
        except OSError as error:
            log.warning("%s is not kept: %s. The run goes on", path, error.strerror or error)


def together(values: dict[str, float], late: bool, asked: int | None) -> tuple[dict[str, float], bool, int | None]:
    """Means of a row's values over all processes, whether the first finds a checkpoint late, a signal any was sent."""
    found = collectives.merge((values, late, asked))
    means = {name: sum(own[name] for own, _, _ in found) / len(found) for name in values}
    return means, found[0][1], next((number for _, _, number in found if number is not None), None)


@dataclass
class Clock:
    """Seconds that training waited for data and that it was busy, since it began; moments are (step, both)."""

    images: int
    waited: float = 0.0
    busy: float = 0.0

    def now(self, step: int) -> tuple[int, float, float]:
        return step, self.waited, self.busy

    def seconds(self, since: tuple[int, float, float] = (0, 0.0, 0.0), more: float = 0.0) -> float:
        """Of training, since a moment."""
        return self.waited + self.busy - sum(since[1:]) + more

    def speed(self, since: tuple[int, float, float], step: int) -> dict[str, float]:
        """Since a moment: images per second, and which share of the time was waiting for them."""
        seconds = max(self.seconds(since), 1e-9)
        done = (step - since[0]) * self.images
        return {"images_per_second": done / seconds, "data_wait": (self.waited - since[1]) / seconds}


class Loop(pl.Callback):
    """After each step, in this order: log, save, evaluate. Only the first is part of the measured speed.

    `evaluate(module, step)` is called at the marks and, unless the `start` is of no interest, before the first step; a
    resumed run makes up for a missed one. It returns whether this is enough. `track(row, step)` takes what is logged. A
    signal ends the run when a step is done and saved, or the evaluation at once.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoints: Checkpoints,
        evaluate: Callable[[Module, int], bool],
        track: Callable[[dict[str, float], int], None],
        start: bool = True,
    ) -> None:
        self.plan, self.checkpoints, self.evaluate, self.track = plan, checkpoints, evaluate, track
        self.keep = plan.marks(plan.options.save_epochs)
        self.evaluated = {*plan.marks(plan.options.eval_epochs), *([0] if start else [])}
        self.begun = self.ended = self.printed = 0.0
        self.clock = Clock(plan.options.images)
        self.first = 0
        self.agree = 1  # steps between two agreements of the processes: about a second
        self.bar: progress.Captioned | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        begins = trainer.global_step == 0 and not (trainer.ckpt_path and self.checkpoints.last.is_file())
        if self.plan.options.monitor and begins and 0 in self.evaluated:
            self.checkpoints.save(trainer)  # the start may turn out to be the best
        signals.listen()  # Lightning has taken SIGTERM
        if trainer.global_step in self.evaluated:
            trainer.should_stop = self.evaluate(module, trainer.global_step)
            startup.mark("evaluation")
        signals.put_off()
        device_memory.reset_peak(module.device)
        self.first = trainer.global_step
        self.logged = self.shown = self.clock.now(self.first)
        self.checkpoints.saved_at = self.ended = self.printed = time.monotonic()
        if sys.stderr.isatty() and collectives.leader():
            self.bar = progress.Captioned(*progress.columns(), console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("training", total=self.plan.steps, completed=self.first)
            self.bar.start()

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if not self.begun:
            startup.mark("first images")
        self.begun = time.monotonic()
        self.clock.waited += self.begun - self.ended

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, options = trainer.global_step, self.plan.options
        is_step = (batch_idx + 1) % options.accumulate == 0
        if is_step and step == self.first + 1:
            startup.mark("first step")
            log.info("start-up    %s", startup.told())
        row = is_step and (step % options.log_steps == 0 or step in (1, self.plan.steps))
        late = time.monotonic() - self.checkpoints.saved_at > 60 * options.save_minutes
        asked = signals.asked
        agreed = is_step and (row or collectives.world() == 1 or step % self.agree == 0)
        if agreed and collectives.world() > 1 and not row:
            _, late, asked = together({}, late, asked)
        values: dict[str, float] = {}
        if row:
            module.raise_if_broken(self.checkpoints.last)
            values = {name: float(value) for name, value in module.step_metrics.items()}  # on a GPU, waits for the step
            values["seconds"] = self.clock.seconds(self.logged, time.monotonic() - self.begun) / (step - self.logged[0])
            values, late, asked = together(values, late, asked)
            self.agree = max(1, round(1 / max(values.pop("seconds"), 1e-3)))
        elif is_step and collectives.leader() and time.monotonic() - self.printed > progress.every:
            values = {name: float(module.step_metrics[name]) for name in module.shown if name in module.step_metrics}
        self.clock.busy += time.monotonic() - self.begun
        if row and collectives.leader():
            self.log_row(module, step, values)
        if is_step and collectives.leader():
            self.show(module, step, values)
        if is_step:
            due = step in self.keep or step in self.evaluated or step == self.plan.steps
            ends = asked if agreed else None  # all processes save, so they agree when
            if due or ends or (late and agreed):
                module.raise_if_broken(self.checkpoints.last, saving=True)
                name = f"epoch_{self.keep[step]:04d}.ckpt" if step in self.keep else None
                self.checkpoints.save(trainer, name)
            if ends:
                raise signals.Interrupted(ends)
            if step in self.evaluated:
                signals.put_off(False)
                with self.hidden():
                    trainer.should_stop = self.evaluate(module, step)
                signals.put_off()
        self.ended = time.monotonic()

    def log_row(self, module: Module, step: int, values: dict[str, float]) -> None:
        """Tell the trackers what the loss and the machine did since the last row."""
        speed = self.clock.speed(self.logged, step)
        peak = {"peak_memory_gb": device_memory.peak(module.device) / device_memory.GB}
        self.track({"epoch": round(self.plan.epoch(step), 4), **values, **speed, **peak}, step)
        self.logged = self.clock.now(step)

    def show(self, module: Module, step: int, values: dict[str, float]) -> None:
        """Move the bar; with `values`, say what was done since that was said last, as plain text every few seconds."""
        if self.bar:
            self.bar.update(self.task, completed=step)
        due = time.monotonic() - self.printed > progress.every or step == self.plan.steps
        if not values or not (self.bar or due):
            return
        speed = self.clock.speed(self.shown, step)
        used = f"mem {device_memory.current(torch.device('cpu')) / device_memory.GB:.1f} GB"
        if module.device.type == "cuda":
            used += f", gpu {device_memory.current(module.device) / device_memory.GB:.1f} GB"
        text = "  ".join([
            f"epoch {self.plan.epoch(step):.2f}/{self.plan.epoch(self.plan.steps):.4g}",
            *(f"{name} {values[name]:.3f}" for name in module.shown if name in values),
            f"{speed['images_per_second']:.1f} images/s",
            f"data wait {speed['data_wait']:.0%}",
            used,
        ])  # fmt: skip
        if self.bar:
            self.bar.caption = text
        else:
            left = (self.plan.steps - step) * self.clock.seconds() / (step - self.first)
            log.info("step %d/%d  %s  eta %s", step, self.plan.steps, text, progress.duration(left))
        self.printed, self.shown = time.monotonic(), self.clock.now(step)

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Without the bar: an evaluation has one of its own."""
        if self.bar:
            self.bar.stop()
        yield
        if self.bar:
            self.bar.start()

    def teardown(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        if self.bar:
            self.bar.stop()
        signals.put_off(False)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Save the last step before images were gone. Of several processes each would have to know."""
        if self.bar:
            self.bar.stop()
        if isinstance(exception, Unreadable) and collectives.world() == 1 and trainer.global_step > self.first:
            module.raise_if_broken(self.checkpoints.last, saving=True)
            self.checkpoints.save(trainer)
            log.info(
                "saved       step %d: once they can be read the same command goes on from there", trainer.global_step
            )
