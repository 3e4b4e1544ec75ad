"""A disk is full, turns read-only or loses the run folder while a run writes; files are cut off or have a bit flipped.

An error says what cannot be written or read, what was saved before stays, and once the disk is as it should be the same
command ends in the state of the run that nobody disturbed. What is damaged is never taken for what it was.
"""

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from neco.dataset.archive import Store
from neco.dataset.digests import Contents
from neco.features.cache import Cache, Entry
from neco.model import sources
from neco.utils.errors import NecoError
from soak import Outcome, kills, life, trial

ROOM = 64 << 20
DONE = "the run, equal to the undisturbed one"


@contextlib.contextmanager
def small(folder: Path) -> Iterator[Path]:
    """A file system of `ROOM` bytes. Skips where this user may not mount one."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "soak", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"runs where a tmpfs can be mounted: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def refusal(ended: life.End, *words: str) -> str:
    """The error that ended a life, without names and numbers. Raises AssertionError for any other end."""
    assert ended.code == 2 and "Traceback" not in ended.said.split("--- Logging error ---")[0], ended.said
    error = next(line for line in reversed(ended.said.splitlines()) if line.startswith("error: "))
    assert any(word in error for word in words), error
    return next(f"error: {word}" for word in words if word in error)


def recover(run: Path) -> None:
    """What is saved can be read, and the same command ends as the undisturbed run did."""
    if (last := run / "run/checkpoints/last.ckpt").is_file():
        sources.contents(last)
    ended = life.live(run, kills.RUN)
    assert ended.code == 0, ended.said
    (run / "trace.txt").touch()
    kills.assert_same(run, kills.undisturbed().folder)


@trial(small=1, full=20)
def full(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    whole = kills.undisturbed().folder
    used = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for number in range(count):
        with small(folder / f"disk {number}") as disk:
            run, ballast = disk / "it", disk / "ballast"
            kills.photos(run)
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, ROOM - int(used * rng.uniform(0.01, 1)) - (1 << 16))
            ended = life.live(run, kills.RUN, life.At())
            if ended.code:
                told = refusal(ended, "No space left on device", "there is not so much room")
                yield Outcome(f"disk full, {kills.place(run)}", f"{told}; with room again: {DONE}")
            else:
                yield Outcome("disk full, caches are dropped", DONE)
            ballast.unlink()
            recover(run)


def make_read_only(path: Path) -> None:
    """For whoever opens files from now on."""
    subprocess.run(["mount", "--bind", path, path], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)


@trial(small=1, full=10)
def read_only(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    writes = kills.undisturbed().writes
    for number in range(count):
        with small(folder / f"disk {number}") as disk:
            run = disk / "it"
            kills.photos(run)
            (run / "run").mkdir()
            if number % 5 == 4:
                make_read_only(run / "run")
                ended, fault = life.live(run, kills.RUN), "read-only from the start"
            else:
                when = life.At(rng.randrange(writes // 3, writes), partial(make_read_only, run / "run"))
                ended = life.live(run, kills.RUN, when)
                fault = f"read-only, {kills.place(run)}"
            yield Outcome(fault, f"{refusal(ended, 'Read-only file system')}; writable again: {DONE}")
            subprocess.run(["umount", "--lazy", run / "run"], check=True)
            recover(run)


@trial(small=1, full=10)
def removed(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    writes = kills.undisturbed().writes
    for number in range(count):
        run = folder / f"run {number}"
        kills.photos(run)
        when = life.At(rng.randrange(writes // 3, writes), partial(shutil.rmtree, run / "run"))
        ended = life.live(run, kills.RUN, when)
        yield Outcome(f"run folder deleted, {kills.place(run)}", f"{refusal(ended, 'No such file')}; again: {DONE}")
        recover(run)


def damaged(rng: random.Random, whole: bytes) -> tuple[str, bytes]:
    """Cut off, or with a bit flipped: anywhere, or near the end, where archives have their directory."""
    place = rng.randrange(len(whole)) if rng.random() < 0.5 else len(whole) - 1 - rng.randrange(min(len(whole), 16384))
    if rng.random() < 0.3:
        return "cut off", whole[:place]
    return "a bit flipped", whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]


@trial(small=60, full=3000)
def checkpoint(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    saved = {"neco": {"seed": 1}, "state_dict": {f"w{i}": torch.randn(64, 64 + i) for i in range(12)}, "step": 5}
    path = folder / "last.ckpt"
    torch.save(saved, path)
    whole, wanted = path.read_bytes(), dict(kills.tensors(saved))
    for _ in range(count):
        how, content = damaged(rng, whole)
        path.write_bytes(content)
        try:
            found = sources.contents(path)
        except NecoError as error:
            assert str(path) in str(error)
            yield Outcome(f"checkpoint {how}", "error that names the file")
            continue
        read = dict(kills.tensors(found))
        assert found["neco"] == saved["neco"] and read.keys() == wanted.keys(), "another checkpoint was read"
        assert all(torch.equal(read[key], wanted[key]) for key in wanted), "other weights were read"
        yield Outcome(f"checkpoint {how}", "read as it was written: the bit means nothing")


@trial(small=60, full=3000)
def caches(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    features = np.arange(5 * 4 * 4 * 8, dtype=np.float32).reshape(5, 4, 4, 8)
    cache, index = Cache(folder / "features", 1), Store(folder, "archive", "some.tar")
    for number in range(len(features)):
        (folder / f"{number}.png").write_bytes(bytes([number]))
    images = Contents([str(folder / f"{number}.png") for number in range(len(features))], None)
    with Entry(cache, {"a": 1}, images) as entry:
        entry.write(features)
    (kept,) = (folder / "features").glob("features-*.npy")
    index.save("key", names=["a", "b"], rows=np.arange(200))
    for _ in range(count):
        what, path = rng.choice((("features", kept), ("index", index.path)))
        assert path
        whole = path.read_bytes()
        how, content = damaged(rng, whole)
        path.write_bytes(content)
        if what == "features":
            found = cache.find({"a": 1}, images)
            assert found is None or np.array_equal(found, features)
        else:
            found = index.load("key")
            assert found is None or (found["names"] == ["a", "b"] and np.array_equal(found["rows"], np.arange(200)))
        result = "not taken, made again" if found is None else "read as it was written: the bit means nothing"
        yield Outcome(f"cached {what} {how}", result)
        path.write_bytes(whole)


@trial(small=1, full=5)
def damaged_run(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    whole = kills.undisturbed().folder
    for number in range(count):
        run = folder / f"run {number}"
        shutil.copytree(whole, run)
        last = run / "run/checkpoints/last.ckpt"
        how, content = damaged(rng, last.read_bytes())
        last.unlink()  # the best may be another name of it
        last.write_bytes(content)
        ended = life.live(run, kills.RUN)
        if ended.code == 0:
            yield Outcome(f"last.ckpt {how}", "read as it was written: the bit means nothing")
            continue
        said = refusal(ended, "kept are: ")
        kept = sorted(path for path in last.parent.glob("epoch_*.ckpt") if str(path) in ended.said)
        ended = life.live(run, [*kills.RUN, f"train.resume={rng.choice(kept)}"])
        assert ended.code == 0, ended.said
        kills.assert_same(run, whole, "run")
        yield Outcome(f"last.ckpt {how}", f"{said}epoch_NNNN.ckpt; from that: {DONE}")
