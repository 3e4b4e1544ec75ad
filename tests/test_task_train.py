"""The whole of task=train on tiny data: exact resume, what is logged, what is saved, what stops it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

from neco.errors import NecoError
from neco.training import loop
from neco.training.module import PostTraining


def state(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")


def tensors(node, prefix=""):
    """Every tensor of a checkpoint, by its place."""
    if isinstance(node, torch.Tensor):
        yield prefix, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from tensors(value, f"{prefix}/{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from tensors(value, f"{prefix}/{index}")


def assert_same_run(one: Path, other: Path) -> None:
    a, b = dict(tensors(state(one))), dict(tensors(state(other)))
    assert a.keys() == b.keys() and len(a) > 100
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Stopped(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """Make training die right after a step, as a kill would."""

    def at(step: int) -> None:
        real = loop.Loop.on_train_batch_end

        def die(self, trainer, *arguments):
            real(self, trainer, *arguments)
            if trainer.global_step == step:
                raise Stopped

        monkeypatch.setattr(loop.Loop, "on_train_batch_end", die)

    yield at
    monkeypatch.undo()


VARIANTS = {
    "plain": [],
    "accumulate": ["train.accumulate=2"],
    "queue": ["loss.references=queue", "loss.queue_size=64"],
    "bf16": ["train.precision=bf16", "train.clip=0.5"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_equal_five_and_resume_and_five(train, monkeypatch, stop_after, variant):
    options = [*VARIANTS[variant], "train.steps=10", "train.save_minutes=1e-9"]  # an epoch is 3 steps: 5 is inside one
    whole = train(*options, folder="whole")
    stop_after(5)
    with pytest.raises(Stopped):
        train(*options, folder="halves")
    assert state(whole)["global_step"] == 10 and state(whole.parent / "halves")["global_step"] == 5
    monkeypatch.undo()
    halves = train(*options, "train.workers=2", folder="halves")
    assert_same_run(whole, halves)
    same = ("step", "loss", "kl", "grad_norm", "momentum", "weight_decay", "lr_backbone")
    assert [[row[key] for key in same] for row in metrics(whole)] == [
        [row[key] for key in same] for row in metrics(halves)
    ]
    assert [int(row["step"]) for row in metrics(halves)] == list(range(1, 11))


@pytest.mark.slow
def test_resume_after_kill_9(tmp_path, cache):
    options = [*SMALL, "train.steps=60", "train.save_minutes=1e-9", "train.workers=1"]
    command = [sys.executable, "-m", "neco", *options]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, f"run_dir={whole}"], env=env, check=True, capture_output=True)
    process = subprocess.Popen([*command, f"run_dir={killed}"], env=env, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not ((killed / "metrics.csv").is_file() and len(metrics(killed)) > 10):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state(killed)["global_step"] < 60
    subprocess.run([*command, f"run_dir={killed}"], env=env, check=True, capture_output=True)
    assert_same_run(whole, killed)
    assert [int(row["step"]) for row in metrics(killed)] == list(range(1, 61))


def test_seed_changes_the_run_and_nothing_else_does(train):
    one = train(folder="one")
    assert_same_run(one, train("train.workers=2", "train.log_steps=3", folder="again"))
    other = dict(tensors(state(train("seed=1", folder="other"))))
    assert any(not torch.equal(value, other[key]) for key, value in tensors(state(one)))


def test_evaluations_do_not_change_the_training(train):
    quiet = train(folder="quiet")
    options = ["eval=[overcluster,retrieval]", "eval.retrieval.k=3", "eval.overcluster.k=4", "train.eval_epochs=1"]
    watched = train(*options, folder="watched")
    assert_same_run(quiet, watched)
    records = json.loads((watched / "results.json").read_text())
    assert {r["step"] for r in records} == {0, 3, 4} and {r["network"] for r in records} == {"student", "teacher"}
    wanted = {"protocol", "weights", "dataset", "seconds", "peak_memory_gb", "metrics", "seed", "epoch"}
    assert all(wanted <= r.keys() for r in records)
    at_start = {(r["network"], r["weights"]) for r in records if r["step"] == 0}
    assert len({weights for _, weights in at_start}) == 1, "the teacher starts as the student"
    at_end = {r["network"]: r["weights"] for r in records if r["step"] == 4}
    assert at_end["student"] != at_end["teacher"]


def test_run_folder_is_complete(train):
    folder = train("train.save_epochs=1")
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "overrides.txt", "environment.json", "metrics.csv", "checkpoints"} <= names
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.ckpt", "epoch_0001.ckpt"}
    row = metrics(folder)[-1]
    for key in (
        "loss",
        "kl",
        "entropy",
        "agreement",
        "lr_backbone",
        "lr_head",
        "weight_decay",
        "momentum",
        "grad_norm",
    ):
        assert float(row[key]) >= 0, key
    assert abs(float(row["loss"]) - float(row["kl"]) - float(row["entropy"])) < 1e-4
    assert {"images_per_second", "data_wait", "peak_memory_gb"} <= row.keys()
    held = state(folder)
    assert any(key.startswith("student.backbone.") for key in held["state_dict"])
    assert any(key.startswith("teacher.head.") for key in held["state_dict"])


def test_teacher_follows_and_is_never_trained(train):
    folder = train("train.momentum=[1.0,1.0]")
    held = state(folder)["state_dict"]
    moved = [
        k
        for k in held
        if k.startswith("student.") and not torch.equal(held[k], held[k.replace("student", "teacher", 1)])
    ]
    assert moved, "the student trains"
    first = state(train("train.momentum=[1.0,1.0]", "train.steps=1", folder="short"))["state_dict"]
    teacher = [key for key in held if key.startswith("teacher.")]
    assert all(torch.equal(held[key], first[key]) for key in teacher), "momentum 1 leaves the teacher where it began"


def test_finished_run_is_not_repeated(train):
    folder = train()
    before = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    train()
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_another_configuration_does_not_continue_a_run(train):
    folder = train()
    with pytest.raises(NecoError, match=r"optim\.lr: 0\.001 -> 0\.01"):
        train("optim.lr=1e-2")
    with pytest.raises(NecoError, match="resume=never"):
        train("train.resume=never")
    train("train.log_steps=5", "train.save_epochs=2")  # these don't make it another run
    on = train("optim.lr=1e-2", "train.steps=6", f"train.resume={folder}/checkpoints/last.ckpt", folder="on")
    assert state(on)["global_step"] == 6


def test_nan_stops_with_step_and_checkpoint(train, monkeypatch, tmp_path):
    real = PostTraining.pair_loss

    def poisoned(self, teacher, student, small, crops, index):
        loss, extra = real(self, teacher, student, small, crops, index)
        return (loss * torch.nan if index == 2 else loss), extra

    monkeypatch.setattr(PostTraining, "pair_loss", poisoned)
    with pytest.raises(NecoError, match=r"step 3.*last good checkpoint.*last\.ckpt"):
        train("train.save_minutes=1e-9", folder="nan")
    assert state(tmp_path / "nan")["global_step"] == 2, "nothing is saved after it"


def test_a_second_process_is_kept_out_and_an_orphan_is_not(train, tmp_path):
    hold = (
        "import os, sys, time; from pathlib import Path; from neco.task.common import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    if not os.fork(): time.sleep(30)  # as a data worker whose process is killed\n"
        "    print('held', flush=True); time.sleep(30)"
    )
    command = [sys.executable, "-c", hold, tmp_path / "run"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        with pytest.raises(NecoError, match="another process"):
            train()
        process.kill()
        process.wait()
        train()
        os.killpg(process.pid, signal.SIGKILL)


def test_memory_estimate_is_within_a_quarter(tmp_path, cache):
    arguments = [
        "augment.global_size=128", "augment.local_size=32", "train.batch_size=16", "train.steps=2", "eval=[]",
        "weights=none", "dataset.train=12", "dataset.val=4", "train.workers=0", "train.log_steps=1", "head.hidden=256",
    ]  # fmt: skip
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "neco", *arguments, f"run_dir={tmp_path / 'run'}"]
    said = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stderr
    estimate = float(said.split("memory      about ")[1].split(" GB")[0])
    measured = float(metrics(tmp_path / "run")[-1]["peak_memory_gb"])
    assert 0.75 < estimate / measured < 1.25, (estimate, measured)
