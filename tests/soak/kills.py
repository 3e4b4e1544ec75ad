"""A run is killed (SIGKILL) again and again, at random moments, before a write or inside one, and started again.

In the end weights, optimiser and metrics are those of the run that nobody disturbed, bit for bit, metrics.csv has each
step once, and there are the same files: nothing half or left over.
"""

import atexit
import csv
import functools
import io
import json
import random
import re
import shutil
import signal
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from soak import Outcome, life, trial

STEPS = 9
RUN = [
    *(option for option in life.TINY if not option.startswith("dataset.")), "dataset=folder", "dataset.root=photos.tar",
    "dataset@val_dataset=shapes", "val_dataset.train=4", "val_dataset.val=4", f"train.steps={STEPS}",
    "train.eval_epochs=1", "train.save_epochs=1", "train.save_minutes=1e-9", "run_dir=run",
    "train.monitor=overcluster/teacher/miou_k4",
]  # fmt: skip
KINDS = {
    "a checkpoint": r"/checkpoints/",
    "metrics.csv": r"/\.?metrics\.",
    "results.json": r"/\.?results\.json",
    "cached features": r"/features/",
    "an index of files": r"/index/",
    "drawing a data set": r"/shapes/",
    "the notes of a run": r"run/",
    "a temporary file": r"tmp/",
}


def photos(folder: Path) -> None:
    """photos.tar: images to train on."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for number in range(12):
            held = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(held, "jpeg")
            about = tarfile.TarInfo(f"{number}.jpg")
            about.size = len(held.getvalue())
            tar.addfile(about, io.BytesIO(held.getvalue()))


def tensors(node: object, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint, by its place."""
    if isinstance(node, torch.Tensor):
        yield prefix, node
    elif isinstance(node, dict | list | tuple):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from tensors(value, f"{prefix}/{key}")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return dict(tensors(torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)))


def rows(folder: Path) -> list[list[str]]:
    """What cannot depend on the machine's load, of each row of metrics.csv."""
    with (folder / "run/metrics.csv").open(newline="") as file:
        return [[row[key] for key in ("step", "loss", "kl", "grad_norm", "lr_head")] for row in csv.DictReader(file)]


def results(folder: Path) -> list[tuple]:
    records = json.loads((folder / "run/results.json").read_text())
    return [(r["step"], r["network"], r["evaluation"], r["weights"], r["metrics"]) for r in records]


def names(folder: Path) -> Counter[str]:
    """Names of all files; what is named after a hash of a path only counts, what wandb and torch 2.7 leave does not."""
    left = r".*wandb[^/]*" + r"|tmp/tmp\w{8}(/_remote_module_non_scriptable\.py)?" * (torch.__version__ < "2.8")
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return Counter(re.sub("[0-9a-f]{24,}", "#", name) for name in found if not re.fullmatch(left, name))


def assert_same(folder: Path, whole: Path, files: str = "") -> None:
    """Raises AssertionError unless two folders hold the same run and, below `files`, the same files."""
    one, other = state(folder), state(whole)
    assert one.keys() == other.keys() and len(one) > 100
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert rows(folder) == rows(whole) and [int(row[0]) for row in rows(whole)] == list(range(1, STEPS + 1))
    assert results(folder) == results(whole)
    ours, theirs = names(folder / files), names(whole / files)
    assert ours == theirs, (ours - theirs, theirs - ours)


def place(folder: Path) -> str:
    """Where a life ended: in the write that its trace ends with, or between two."""
    trace = (folder / "trace.txt").read_text().splitlines() if (folder / "trace.txt").is_file() else []
    if not trace:
        return "before it wrote anything"
    kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, trace[-1].split(" ", 1)[1])), "other")
    if trace[-1].split(" ")[0] in ("open", "sync"):
        return f"writing: {kind}"
    last = (folder / "said.txt").read_text().splitlines()[-1:]
    return "in an evaluation" if last and re.match("evaluating|features|k-means", last[0]) else f"after: {kind}"


class Whole(NamedTuple):
    """The run in one go, its seconds and number of writes."""

    folder: Path
    seconds: float
    writes: int


@functools.cache
def undisturbed() -> Whole:
    folder = Path(tempfile.mkdtemp(prefix="neco-soak-"))
    atexit.register(shutil.rmtree, folder)
    photos(folder / "whole")
    begun = time.monotonic()
    ended = life.live(folder / "whole", RUN, life.At())
    assert ended.code == 0, ended.said
    writes = len((folder / "whole/trace.txt").read_text().splitlines())
    return Whole(folder / "whole", time.monotonic() - begun, writes)


@trial(small=3, full=100)
def killed(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    whole, seconds, writes = undisturbed()
    kills = runs = 0
    while kills < count:
        runs += 1
        run = folder / f"run {runs}"
        photos(run)
        disturbed: list[str] = []
        while True:
            number, how = 0, rng.choice(("at a random moment", "before a write", "within a write"))
            if kills == count:
                how = "never"
            elif how != "at a random moment":
                number = 1 + int(writes * rng.random() ** 2)  # later lives write less
            size = int(10 ** rng.uniform(0, 6.5)) if how == "within a write" else None
            begun = time.monotonic()
            process = life.begin(run, RUN, life.At(number, size=size))
            if how == "at a random moment":
                process.join(rng.uniform(0, seconds))
                process.kill()
            ended = life.end(process, run)
            if ended.code == 0:
                seconds = 0.5 * seconds + 0.5 * (time.monotonic() - begun)
                break
            assert ended.code in (-signal.SIGKILL, -signal.SIGXFSZ), ended.said
            kills += 1
            disturbed.append(f"killed {how} | {place(run)}")
        assert_same(run, whole)
        for fault in disturbed:
            yield Outcome(*fault.split(" | "))
