"""Memory, descriptors and threads of a process do not grow with its steps."""

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from soak import Outcome, kills, life, trial

GROWTH = 24  # MB, between the middle and the end


def used() -> tuple[int, int, int]:
    """Resident memory (MB), open descriptors, threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 >> 20, len([*Path("/proc/self/fd").iterdir()]), len([*Path("/proc/self/task").iterdir()])


def sampled(path: Path, every: int) -> None:
    """In a life: note `used` every so many steps."""
    from neco.training.callbacks import Loop

    real, found = Loop.on_train_batch_end, []

    def then(self, trainer, *arguments):
        real(self, trainer, *arguments)
        if trainer.global_step % every == 0:
            found.append((trainer.global_step, *used()))
            path.write_text(json.dumps(found))

    Loop.on_train_batch_end = then


@trial(small=90, full=5000)
def steps(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """Steps, with data workers, a row each, evaluations and saves."""
    epochs = count // 3 // 8  # between two of eight evaluations
    options = [f"train.steps={count}", f"train.eval_epochs={epochs}", "train.save_minutes=0.05", "run_dir=run"]
    options += ["train.workers=1"]
    it = folder / "it"
    process = life.begin(it, [*life.TINY, *options], partial(sampled, folder / "used.json", count // 30))
    ended = life.end(process, it, seconds=3600)
    assert ended.code == 0, ended.said
    assert len(kills.rows(it)) == count
    found = json.loads((folder / "used.json").read_text())
    (_, *start), (_, *middle), (_, *end) = found[1], found[len(found) // 2], found[-1]
    assert end[0] <= middle[0] + GROWTH, found
    assert end[1] <= middle[1] and end[2] <= middle[2], found
    for name, *values in zip(("MB resident", "descriptors", "threads"), start, middle, end, strict=True):
        yield Outcome(f"{count} steps: {name}", "start {}, middle {}, end {}".format(*values))
