"""The whole of task=train on tiny data: exact resume, what is logged, what is saved, what stops it."""

import csv
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SMALL, losses
from PIL import Image

from neco import load_backbone
from neco.config import validate
from neco.distributed import device_memory
from neco.loss.neco import NeCo
from neco.model.weights import weights_hash
from neco.runs import results
from neco.training import callbacks, optim
from neco.training.module import PostTraining
from neco.utils.errors import NecoError


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
        real = callbacks.Loop.on_train_batch_end

        def die(self, trainer, *arguments):
            real(self, trainer, *arguments)
            if trainer.global_step == step:
                raise Stopped

        monkeypatch.setattr(callbacks.Loop, "on_train_batch_end", die)

    yield at
    monkeypatch.undo()


VARIANTS = {
    "plain": [],
    "accumulate": ["train.accumulate=2"],
    "queue": ["loss.references=queue", "loss.queue_size=64", "loss.mask=fg"],
    "no teacher": ["train.teacher=none", "loss.references=batch_any", "loss.reference_count=5"],
    "bf16": ["train.precision=bf16", "train.clip=0.5"],
    "multi_scale": ["augment.multi_scale=[0.5,1.0,1.5]", "train.accumulate=2", "augment.colour=device"],
    "adapters": ["train.lora_rank=2", "train.checkpoint_activations=true"],
    "prototypes": ["loss=leopart", "loss.prototypes=8", "train.accumulate=2"],
    "layers": ["optim.layer_decay=0.5", "train.blocks=[0,2]"],
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


@pytest.mark.parametrize("references", ["batch", "queue"])
@pytest.mark.parametrize(("global_views", "local_views"), [(1, 1), (2, 0), (1, 6), (3, 4)])
def test_any_number_of_views_trains(train, monkeypatch, caplog, global_views, local_views, references):
    real, aligned = NeCo.forward, []
    monkeypatch.setattr(NeCo, "forward", lambda self, *cells: aligned.append(cells) or real(self, *cells))
    with caplog.at_level("INFO", "neco"):
        folder = train(
            f"augment.global_views={global_views}", f"augment.local_views={local_views}",
            f"loss.references={references}", "loss.queue_size=64", "train.steps=3",
        )  # fmt: skip
    assert f"{global_views} x 32{f' + {local_views} x 16' if local_views else ''} pixels" in caplog.text
    pairs = global_views * (global_views + local_views - 1)
    assert [{tuple(x.shape) for x in cells[:3]} for cells in aligned] == [{(pairs, 4, 9, 16)}] * 3
    assert all(0 < float(row["grad_norm"]) < 1e3 for row in metrics(folder))


@pytest.mark.parametrize("applier", ["uint8", "pil"])
def test_rectangular_views_train(train, caplog, applier):
    with caplog.at_level("INFO", "neco"):
        folder = train(
            "augment.global_views=1", "augment.local_views=1", "augment.global_size=[32,64]",
            "augment.local_size=[24,16]", f"augment.applier={applier}", "augment.teacher=clean",
        )  # fmt: skip
    assert "1 x [32, 64] + 1 x [24, 16] pixels; the teacher sees them clean" in caplog.text
    assert all(0 < float(row["grad_norm"]) < 1e3 for row in metrics(folder))


def test_a_scale_is_the_run_at_the_scaled_sizes(train, caplog):
    """Crops are drawn in image pixels, so a single factor is the run with those sizes, bit for bit."""
    one = train("augment.global_size=[32,48]", "augment.local_size=[16,24]", folder="one")
    sizes = ["augment.global_size=[64,96]", "augment.local_size=[32,48]"]
    assert_same_run(one, train(*sizes, "augment.multi_scale=[0.5]", folder="other"))
    with caplog.at_level("INFO", "neco"):
        train(*sizes, "augment.multi_scale=[1,0.5,0.25]", "train.steps=1", folder="mixed")
    said = "2 x [16, 24] + 1 x [8, 16] or 2 x [32, 48] + 1 x [16, 24] or 2 x [64, 96] + 1 x [32, 48] pixels"
    assert said in caplog.text


def test_clean_teacher_differs_by_the_colours_alone(train):
    colourless = [f"augment.{name}_probability=0" for name in ("jitter", "grey", "blur")]
    assert_same_run(train(*colourless, folder="a"), train(*colourless, "augment.teacher=clean", folder="b"))
    coloured, clean = train(folder="c"), train("augment.teacher=clean", folder="d")
    assert metrics(coloured)[0]["loss"] != metrics(clean)[0]["loss"]


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


@pytest.mark.parametrize("content", (b"", b"some text\n", "cut", [1, 2], {"a": 1}, None))
def test_a_damaged_checkpoint_is_named_and_what_else_is_kept(train, tmp_path, content):
    folder = train("train.save_epochs=1", "train.steps=6")
    last = folder / "checkpoints/last.ckpt"
    whole = last.read_bytes()
    last.unlink()
    if content is None:
        last.mkdir()
    elif isinstance(content, bytes | str):
        last.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    else:
        torch.save(content, last)
    damaged = r"last\.ckpt cannot be read.*kept are: .*epoch_0001\.ckpt"
    wanted = r"is no checkpoint of a run" if content == {"a": 1} else damaged
    with pytest.raises(NecoError, match=wanted):
        train("train.save_epochs=1", "train.steps=6")
    with pytest.raises(NecoError, match=r"last\.ckpt"):
        load_backbone(str(folder), model="tiny")
    last.rmdir() if content is None else last.unlink()
    kept = folder / "checkpoints/epoch_0001.ckpt"
    assert state(train("train.save_epochs=1", "train.steps=6", f"train.resume={kept}"))["global_step"] == 6


def test_without_its_last_checkpoint_a_run_goes_on_from_what_is_kept(train, caplog):
    folder = train("train.save_epochs=1", "train.steps=6")
    kept = {path: path.read_bytes() for path in folder.glob("checkpoints/epoch_*.ckpt")}
    (folder / "checkpoints/last.ckpt").unlink()
    with pytest.raises(NecoError, match=r"resume=never, but .*epoch_0001\.ckpt exists"):
        train("train.resume=never")
    caplog.set_level("INFO")
    assert state(train("train.save_epochs=1", "train.steps=6"))["global_step"] == 6
    assert re.search(r"last\.ckpt is gone: going on from .*epoch_0001\.ckpt", caplog.text) and kept
    assert "step 3 of" in caplog.text and {path: path.read_bytes() for path in kept} == kept
    assert [int(row["step"]) for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_rows_that_were_lost_are_told_when_the_run_goes_on(train, caplog):
    folder = train("train.save_epochs=1")
    rows = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(rows[:2] + rows[3:]))
    train("train.save_epochs=1", "train.steps=6", f"train.resume={folder}/checkpoints/last.ckpt")
    assert "metrics.csv has 3 of the 4 rows up to step 4" in caplog.text
    caplog.clear()
    train("train.save_epochs=1", "train.steps=8", f"train.resume={folder}/checkpoints/last.ckpt")
    assert "metrics.csv has 5 of the 6 rows up to step 6" in caplog.text
    caplog.clear()
    train("train.steps=10", f"train.resume={folder}/checkpoints/last.ckpt", folder="branch")
    assert "rows up to step" not in caplog.text


def test_a_checkpoint_that_is_not_finite_is_refused(train):
    folder = train("train.save_epochs=1", "train.steps=6")
    held = state(folder)
    held["state_dict"]["student.backbone.net.norm.weight"][3] = torch.nan
    torch.save(held, folder / "checkpoints/last.ckpt")
    with pytest.raises(
        NecoError, match=r"last\.ckpt holds weights that are not finite \(student.*kept are: .*epoch_0001"
    ):
        train("train.save_epochs=1", "train.steps=6")


def test_a_damaged_configuration_is_named(train):
    folder = train()
    (folder / "config.yaml").write_text("")
    with pytest.raises(NecoError, match=r"config\.yaml is damaged: remove it, and the same command goes on"):
        train()
    (folder / "config.yaml").unlink()
    assert state(train())["global_step"] == 4


def test_closed_descriptors_and_no_home_are_no_matter(tmp_path, cache):
    small = [*SMALL, "train.steps=2", "report=false"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shell = (
        f"exec {shlex.join([sys.executable, '-m', 'neco', *small, 'run_dir=run', f'cache_dir={cache}'])} >&- 2>&- <&-"
    )
    assert subprocess.run(["sh", "-c", shell], cwd=tmp_path, env=environment, timeout=300).returncode == 0
    assert state(tmp_path / "run")["global_step"] == 2 and "wrote" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.slow
def test_a_signal_ends_the_run_saved_and_says_how_to_go_on(tmp_path, cache):
    """To the whole process group, as a terminal and SLURM send it."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*SMALL, "run_dir=run", "train.steps=400", "train.workers=2", "train.save_minutes=60"]
    rows = tmp_path / "run" / "metrics.csv"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        process = subprocess.Popen(
            [sys.executable, "-m", "neco", *command], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
        )  # fmt: skip
        before = len(losses(rows.parent)) if rows.is_file() else 0
        while not rows.is_file() or rows.read_text().count("\n") < before + 5:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == code and "Traceback" not in said, said
        done = torch.load(rows.parent / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        assert before < done == len(losses(rows.parent)) < 400, "nothing of what was trained is lost"
        command = shlex.split(said.split("python -m neco ")[-1])
    assert f"run_dir={rows.parent}" in command


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


def test_a_run_says_how_much_of_its_start_the_teacher_keeps(train, caplog):
    caplog.set_level("INFO")
    rows = metrics(train("train.steps=3"))
    assert float(rows[0]["momentum"]) == pytest.approx(optim.ema_momentum(3)[0])
    remains = optim.teacher_start_fraction(optim.ema_momentum(3), 3)
    assert f"after 3 steps {remains:.0%} of it is its start" in caplog.text and "hardly move" not in caplog.text
    train("train.steps=3", "train.momentum=[0.9995,1]", folder="slow")
    assert "the teacher will hardly move: 100% of it will be its start" in caplog.text


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


@pytest.mark.parametrize("kind", ("frozen", "head_ema", "none"))
def test_other_teachers(train, kind):
    options = [f"train.teacher={kind}", "train.momentum=[0.5,0.5]"]
    folder = train(*options, "eval=overcluster", "eval.overcluster.k=4")
    held = state(folder)["state_dict"]
    start = state(train("optim.lr=0", "optim.head_lr=0", "train.steps=1", folder="start"))["state_dict"]

    def moved(part: str) -> bool:
        keys = [key for key in held if key.startswith(part)]
        return any(not torch.equal(held[key], start[key.replace("teacher", "student", 1)]) for key in keys)

    assert moved("student.backbone") and moved("student.head")
    assert not moved("teacher.backbone") and moved("teacher.head") == (kind == "head_ema")
    assert any(key.startswith("teacher.") for key in held) == (kind != "none")
    records = json.loads((folder / "results.json").read_text())
    assert {r["network"] for r in records} == {"student"}
    train(*options, "eval=overcluster", "eval.overcluster.k=4")  # a finished run is found again


@pytest.mark.parametrize("kind", ("ema", "head_ema", "frozen", "none"))
def test_prototypes_go_with_the_head(train, kind):
    options = ["loss=leopart", "loss.prototypes=8", f"train.teacher={kind}", "train.momentum=[0.5,0.5]"]
    held = state(train(*options, "train.steps=1"))
    start = state(train(*options, "train.steps=1", "optim.head_lr=0", folder="start"))["state_dict"]
    first, moved, copied = (x[f"loss.{side}.weight"] for x, side in (
        (start, "student"), (held["state_dict"], "student"), (held["state_dict"], "teacher"),
    ))  # fmt: skip
    assert not torch.equal(first, moved), "they are in the optimiser"
    expected = {"frozen": first, "none": moved}.get(kind, (first + moved) / 2)
    assert torch.allclose(copied, expected, rtol=1e-6, atol=1e-8)


def test_another_loss_is_another_run(train):
    train("train.steps=1")
    with pytest.raises(NecoError, match=r"holds other parameters: loss\._target_: neco\.loss\.neco\.NeCo ->"):
        train("train.steps=1", "loss=leopart")


def test_losses_without_references_get_none(train, monkeypatch):
    from neco.loss.gram import Gram

    real, seen = Gram.compare, []
    monkeypatch.setattr(Gram, "compare", lambda self, *cells: seen.append(cells[2:]) or real(self, *cells))
    folder = train("loss=gram", "loss.mask=fg", "train.steps=1")
    assert seen[0][0] is None and seen[0][1].shape == (4, 4, 9) and "kl" not in metrics(folder)[0]


def test_without_a_teacher_the_references_carry_gradient(train, monkeypatch):
    seen = []
    real = PostTraining.pair_loss

    def look(self, teacher, *arguments):
        seen.append(teacher.requires_grad)
        return real(self, teacher, *arguments)

    monkeypatch.setattr(PostTraining, "pair_loss", look)
    train("train.steps=1", folder="with")
    train("train.steps=1", "train.teacher=none", folder="without")
    train("train.steps=1", "train.teacher=none", "loss.mask=fg", folder="masked")
    assert seen == [False, True, True]


@pytest.mark.parametrize("source", ("batch", "batch_other", "batch_any"))
def test_references_and_grid_are_independent(train, source):
    folder = train(f"loss.references={source}", "loss.grid=2", "loss.reference_count=11")
    assert all(entropy < torch.tensor(11.0).log() for entropy in losses(folder, "entropy"))
    assert losses(folder, "entropy")[0] > torch.tensor(4.0).log(), "orders of 11 references, not of 2 x 2"


def test_batch_of_one_has_no_other_image(train):
    with pytest.raises(NecoError, match="batch_other"):
        train("loss.references=batch_other", "train.accumulate=4")


def test_finished_run_is_not_repeated(train):
    folder = train()
    before = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    train()
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_a_run_cannot_be_made_shorter(train):
    last = train() / "checkpoints/last.ckpt"
    with pytest.raises(NecoError, match=r"train\.steps=2: .*last\.ckpt is at step 4 already"):
        train("train.steps=2", f"train.resume={last}", folder="shorter")


def test_another_runs_checkpoint_does_not_replace_ones_own(train):
    other, own = train(folder="other"), train("seed=2", folder="own")
    before = (own / "checkpoints/last.ckpt").read_bytes()
    with pytest.raises(NecoError, match=r"own/checkpoints/last\.ckpt is another run's"):
        train(f"train.resume={other}/checkpoints/last.ckpt", folder="own")
    assert (own / "checkpoints/last.ckpt").read_bytes() == before


def test_the_best_of_other_values_is_set_aside(train, monkeypatch):
    numbers(monkeypatch, [0.1, 0.5, 0.0, 0.2, 0.0, 0.2, 0.0, 0.1, 0.0, 0.1, 0.0])
    folder = train(*WATCH, "train.steps=4")
    train(*WATCH, "train.steps=8", "eval.overcluster.restarts=2", f"train.resume={folder}/checkpoints/last.ckpt")
    best = {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("checkpoints/best*")}
    assert len(best) == 2 and max(best.values()) > 4 and min(best.values()) < 4, best


def test_numbers_best_and_patience_stay_with_data_that_moved(train, monkeypatch, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        for folder, array in (("images", pixels), ("masks", pixels[..., 0] // 128)):
            (first / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(first / folder / f"{number:02d}.png")
    (first / "train.txt").write_text("".join(f"{number:02d}\n" for number in range(8)))
    (first / "val.txt").write_text("".join(f"{number:02d}\n" for number in range(8, 12)))

    def data(root: Path) -> list[str]:
        given = {"root": root / "images", "masks": root / "masks", "classes": "[dark,light]"}
        given |= {"train_list": root / "train.txt", "val_list": root / "val.txt"}
        return ["dataset=folder", *(f"dataset.{key}={value}" for key, value in given.items())]

    numbers(monkeypatch, [0.1, 0.5, 0.0, 0.2, 0.0])  # at steps 0 (both networks), 2 and 4
    watch = [*WATCH, "train.patience=3", "~dataset@val_dataset"]
    folder = train(*data(first), *watch, "train.steps=4")
    shutil.copytree(first, second, copy_function=shutil.copyfile)  # with new times
    shutil.rmtree(first)
    numbers(monkeypatch, [0.3, 0.0, 0.4, 0.0])  # of what is measured anew; two more without a better one are enough
    last = f"train.resume={folder}/checkpoints/last.ckpt"
    train(*data(second), *watch, "train.steps=12", last)
    held = json.loads((folder / "results.json").read_text())
    student = {r["step"]: r["metrics"]["miou_k4"] for r in held if r["network"] == "student"}
    assert list(student.values())[:3] == [0.1, 0.5, 0.2] and len({r["asked"] for r in held}) == 1, student
    kept = {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("checkpoints/*")}
    assert kept["best.ckpt"] == 2 and "best_before_6.ckpt" not in kept and kept["last.ckpt"] < 12, kept
    assert "before" in results.table(held).splitlines()[0], results.table(held)


def test_numbers_of_another_data_set_are_not_taken_over(train):
    watch = ["eval=overcluster", "eval.overcluster.k=4", "eval.overcluster.restarts=1"]
    folder = train(*watch)
    other = ["dataset@val_dataset=shapes", "val_dataset.train=12", "val_dataset.val=6", "train.steps=6"]
    train(*watch, *other, f"train.resume={folder}/checkpoints/last.ckpt")
    records = json.loads((folder / "results.json").read_text())
    found = {(r["step"], r["asked"]) for r in records if r["network"] == "teacher"}
    assert [step for step, _ in sorted(found)] == [0, 4, 6] and len({asked for _, asked in found}) == 2


def test_a_run_goes_on_with_the_same_images_elsewhere_and_not_with_others(train, tmp_path, caplog):
    caplog.set_level("INFO")
    for number in range(12):
        (tmp_path / "a").mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"a/{number:02d}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    shutil.copytree(tmp_path / "a", tmp_path / "c", copy_function=shutil.copyfile)
    for number in (5, 7):
        Image.new("RGB", (40, 40), "red").save(tmp_path / f"c/{number:02d}.png")
    data = ["dataset=folder", f"dataset.root={tmp_path}/a"]
    folder = train(*data)
    train(*data)
    assert "lie elsewhere" not in caplog.text
    train(data[0], f"dataset.root={tmp_path}/b")
    assert caplog.text.count(f"the training images lie elsewhere: {tmp_path}/b/00.png was {tmp_path}/a/00.png") == 1
    before = (folder / "checkpoints/last.ckpt").read_bytes()
    other = rf"what training images hold \({tmp_path}/c/05\.png is not what {tmp_path}/a/05\.png was\)"
    with pytest.raises(NecoError, match=other):
        train(data[0], f"dataset.root={tmp_path}/c")
    shutil.copyfile(tmp_path / "c/05.png", tmp_path / "a/05.png")
    with pytest.raises(NecoError, match=rf"{tmp_path}/a/05\.png is not what it was"):
        train(*data)
    assert (folder / "checkpoints/last.ckpt").read_bytes() == before
    train(data[0], f"dataset.root={tmp_path}/c", f"train.resume={folder}/checkpoints/last.ckpt")
    assert "with changes: what training images hold" in caplog.text, "when it is asked for by name"


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

    def poisoned(self, teacher, student, small, crops, index, *rest):
        loss, extra = real(self, teacher, student, small, crops, index, *rest)
        return (loss * torch.nan if index == 2 else loss), extra

    monkeypatch.setattr(PostTraining, "pair_loss", poisoned)
    with pytest.raises(NecoError, match=r"step 3.*last good checkpoint.*last\.ckpt"):
        train("train.save_minutes=1e-9", folder="nan")
    assert state(tmp_path / "nan")["global_step"] == 2, "nothing is saved after it"


def test_a_second_process_is_kept_out_and_an_orphan_is_not(train, tmp_path):
    hold = (
        "import os, sys, time; from pathlib import Path; from neco.runs.folder import locked\n"
        "with locked(Path(sys.argv[1]), 'train'):\n"
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


def moved(folder: Path) -> set[str]:
    """What differs between the student and a teacher that stands still."""
    held = state(folder)["state_dict"]
    names = [key.removeprefix("student.") for key in held if key.startswith("student.")]
    return {name for name in names if not torch.equal(held[f"student.{name}"], held[f"teacher.{name}"])}


def test_frozen_parameters_do_not_move(train):
    folder = train("train.blocks=[1]", "train.momentum=[1,1]")
    names = {key.removeprefix("student.") for key in state(folder)["state_dict"] if key.startswith("student.")}
    trained = {n for n in names if n.startswith(("backbone.net.blocks.1.", "backbone.net.norm.", "head."))}
    assert moved(folder) == trained and 10 < len(trained) < len(names)
    (optimizer,) = state(folder)["optimizer_states"]
    assert len(optimizer["state"]) == sum(len(group["params"]) for group in optimizer["param_groups"]) == len(trained)


def test_frozen_parameters_of_the_teacher_keep_their_bits(train):
    folder = train("train.blocks=0", "train.momentum=[0.7,0.3]")
    assert moved(folder) and all(name.startswith("head.") for name in moved(folder))
    assert "lr_backbone" not in metrics(folder)[0] and float(metrics(folder)[0]["lr_head"]) > 0


def test_first_step_of_adapters_moves_nothing_else(train):
    changed = moved(train("train.lora_rank=2", "train.momentum=[1,1]", "train.steps=1"))
    ups = {f"backbone.net.blocks.{i}.attn.{n}.parametrizations.weight.0.up" for i in range(4) for n in ("qkv", "proj")}
    assert ups <= changed
    assert all(name in ups or name.startswith("head.") or name.endswith("weight.0.down") for name in changed)


def test_run_with_adapters_loads_as_a_plain_backbone(train):
    folder = train("train.lora_rank=2")
    plain, held = load_backbone(str(folder)), state(folder)["state_dict"]
    place = "teacher.backbone.net.blocks.2.attn.qkv.parametrizations.weight"
    weight, up, down = (held[f"{place}.{name}"] for name in ("original", "0.up", "0.down"))
    wanted = weight + 16 / 2 * up @ down
    torch.testing.assert_close(plain.net.blocks[2].attn.qkv.weight, wanted, rtol=0, atol=1e-7)
    assert not torch.equal(wanted, weight)
    on = train(f"checkpoint={folder}", "weights=teacher", "train.blocks=0", "train.steps=1", folder="on")
    assert weights_hash(load_backbone(str(on))) == weights_hash(plain)
    again = train(f"checkpoint={folder}", "weights=teacher", "train.lora_rank=1", "optim.lr=0", folder="again")
    assert weights_hash(load_backbone(str(again), weights="student")) == weights_hash(plain)


def test_recomputed_activations_give_the_same_run(train, stop_after, monkeypatch):
    options = ["train.drop_path=0.5", "train.steps=4", "train.save_minutes=1e-9"]
    plain = train(*options, folder="plain")
    assert_same_run(plain, train(*options, "train.checkpoint_activations=true", folder="recomputed"))
    stop_after(2)
    with pytest.raises(Stopped):
        train(*options, folder="mixed")
    monkeypatch.undo()
    assert_same_run(plain, train(*options, "train.checkpoint_activations=true", folder="mixed"))


def test_layer_decay_is_in_the_rates_of_the_run(train):
    folder = train("optim.layer_decay=0.5", "optim.lr=1e-3")
    groups = {group["name"]: group["lr"] for group in state(folder)["optimizer_states"][0]["param_groups"]}
    assert groups["backbone/block0/no_decay"] == pytest.approx(groups["backbone"] / 8)
    assert groups["backbone/embeddings"] == pytest.approx(groups["backbone"] / 16)
    assert float(metrics(folder)[-1]["lr_backbone"]) == pytest.approx(groups["backbone"])
    assert not [key for key in metrics(folder)[0] if "block" in key]


def test_going_on_with_other_rates_and_not_with_other_parameters(train):
    folder = train()
    for change in ("train.blocks=2", "train.lora_rank=2", "optim.layer_decay=0.9"):
        with pytest.raises(NecoError, match=rf"{change.split('=')[0]}: .* -> .*checkpoint="):
            train(change, "train.steps=6", f"train.resume={folder}/checkpoints/last.ckpt", folder="on")
    train("optim.lr=1e-2", "train.steps=6", f"train.resume={folder}/checkpoints/last.ckpt", folder="on")
    slow = train("train.steps=6", f"train.resume={folder}/checkpoints/last.ckpt", folder="slow")
    fast, slow = (float(metrics(f)[-1]["lr_backbone"]) for f in (folder.parent / "on", slow))
    assert fast == pytest.approx(10 * slow)


@pytest.mark.parametrize(
    "views",
    [
        ["augment.global_size=128", "augment.local_size=32"],
        ["augment.global_size=128", "augment.local_size=32", "train.checkpoint_activations=true"],
        ["augment.global_size=[32,128]", "augment.local_size=16", "augment.multi_scale=[0.5,2.0]"],
    ],
    ids=["square", "recomputed", "multi_scale"],
)
def test_memory_estimate_is_within_a_quarter(tmp_path, cache, views):
    arguments = [
        *views, "train.batch_size=16", "train.steps=2", "eval=[]",
        "weights=none", "dataset.train=12", "dataset.val=4", "train.workers=0", "train.log_steps=1", "head.hidden=256",
    ]  # fmt: skip
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "neco", *arguments, f"run_dir={tmp_path / 'run'}"]
    said = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stderr
    estimate = float(said.split("memory      about ")[1].split(" GB")[0])
    measured = float(metrics(tmp_path / "run")[-1]["peak_memory_gb"])
    assert 0.75 < estimate / measured < 1.25, (estimate, measured)


def numbers(monkeypatch, values):
    """Evaluations that return chosen numbers, one after another (both networks share each)."""
    from neco.eval.evaluation import Result
    from neco.eval.overcluster import Overcluster

    queue = iter(values)
    monkeypatch.setattr(Overcluster, "__call__", lambda *a, **k: Result("chosen", {"miou_k4": next(queue)}, {}))


WATCH = ["eval=overcluster", "eval.overcluster.k=4", "train.eval_epochs=1", "train.monitor=overcluster/student/miou_k4"]


def refuse(number: int):
    """A system call that fails."""

    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_without_hard_links_checkpoints_are_copied(train, monkeypatch, caplog):
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(fcntl, "lockf", refuse(errno.ENOSYS))
    options = [*WATCH, "train.save_epochs=1"]
    numbers(monkeypatch, [0.1, 0.0, 0.3, 0.0, 0.2, 0.0])  # at steps 0 (both), 3 and 6
    monkeypatch.setattr(callbacks.Loop, "on_train_batch_end", refuse(errno.EIO))
    with pytest.raises(OSError):  # it ends after the evaluation of the start
        train(*options, "train.steps=6")
    monkeypatch.undo()
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    numbers(monkeypatch, [0.3, 0.0, 0.2, 0.0])
    folder = train(*options, "train.steps=6")
    found = {path.name: path for path in (folder / "checkpoints").iterdir()}
    steps = {name: torch.load(path, weights_only=True)["global_step"] for name, path in found.items()}
    assert steps == {"last.ckpt": 6, "epoch_0001.ckpt": 3, "best.ckpt": 3}
    assert "evaluated by other values" not in caplog.text, "a copy of the last is none of another evaluation"


def test_a_checkpoint_that_cannot_be_kept_ends_no_run(train, monkeypatch, caplog):
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(shutil, "copyfileobj", refuse(errno.ENOSPC))
    numbers(monkeypatch, [0.1, 0.3, 0.0, 0.2, 0.0])
    folder = train(*WATCH, "train.save_epochs=1", "train.steps=6")
    assert state(folder)["global_step"] == 6
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt"}
    for name in ("epoch_0001.ckpt", "best.ckpt"):
        assert re.search(rf"{name} is not kept: No space left on device\. The run goes on", caplog.text)


def test_best_checkpoint_and_early_stopping(train, monkeypatch):
    def best(folder: Path) -> int:
        return torch.load(folder / "checkpoints/best.ckpt", weights_only=True, mmap=True)["global_step"]

    # student and teacher at steps 0 (the same weights), 3, 6, 9, ...; an epoch is 3 steps
    numbers(monkeypatch, [0.1, 0.3, 0.0, 0.2, 0.0, 0.1, 0.0])
    options = [*WATCH, "train.steps=30", "train.patience=2"]
    folder = train(*options)
    assert best(folder) == 3 and state(folder)["global_step"] == 9, "two evaluations were not better"
    train(*options)
    assert state(folder)["global_step"] == 9, "and the same command does not go on"
    numbers(monkeypatch, [0.5, 0.3, 0.0, 0.2, 0.0])
    assert best(train(*WATCH, "train.steps=4", folder="worse")) == 0, "the start was the best"
    numbers(monkeypatch, [0.1, 0.3, 0.0, 0.4, 0.0])
    assert best(train(*WATCH, "train.steps=4", folder="last")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ([*WATCH, "train.monitor=retrieval/teacher/miou"], "no such EVALUATION/NETWORK/METRIC"),
        ([*WATCH, "train.monitor=overcluster/teacher"], "did you mean 'overcluster/teacher/miou_k4'"),
        ([*WATCH, "train.monitor=overcluster/teacher/miou_k4", "train.teacher=frozen"], "overcluster/student/miou_k4"),
        (["eval=[]", "train.monitor=overcluster/teacher/miou_k4"], "nothing is evaluated here"),
        ([*WATCH, "train.monitor=overcluster/student/miou_k5"], r"did you mean 'overcluster/student/miou_k4'"),
        (["train.patience=3"], "waits for monitor"),
    ),
)
def test_monitor_errors(train, options, message):
    with pytest.raises(NecoError, match=message):
        train(*options)


@pytest.mark.parametrize("precision", ("bf16", "fp32"))
def test_a_fused_optimiser_gets_clipped_gradients(train, monkeypatch, precision):
    norms = []

    def fused(module):
        def note(optimizer, *_):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

        optimizer = torch.optim.AdamW(module.groups(), betas=module.optim_options.betas, fused=True)  # as on a GPU
        optimizer.register_step_post_hook(note)
        return optimizer

    monkeypatch.setattr(PostTraining, "configure_optimizers", fused)
    folder = train("train.clip=0.01", "train.steps=2", f"train.precision={precision}")
    assert min(losses(folder, "grad_norm")) > 0.02, "before clipping"
    assert norms == pytest.approx([0.01] * 2, rel=1e-3)


def test_largest_batch_that_fits(train, monkeypatch, caplog):
    from neco.training import memory

    free = device_memory.current(torch.device("cpu"))
    monkeypatch.setattr(memory, "current", lambda device: free)
    monkeypatch.setattr(memory, "total", lambda device: (free + 40_000_000) / memory.ROOM)
    options = ["train.batch_size=auto", "train.steps=2", "loss.references=batch_other", "train.accumulate=2"]
    with caplog.at_level("INFO", "neco"):
        folder = train(*options)
    batch = int(caplog.text.split("train.batch_size=auto: ")[1].split()[0])
    assert batch % 2 == 0 and yaml.safe_load((folder / "config.yaml").read_text())["train"]["batch_size"] == batch
    assert "likely to run out of memory" not in caplog.text
    train(*options)  # found again
    monkeypatch.setattr(memory, "total", lambda device: free)
    with pytest.raises(NecoError, match="not even one image fits"):
        train(*options, folder="none")
    needed = [
        memory.estimate(module, [(32, 32), (32, 32), (16, 16)], images, False, torch.device("cpu"))
        for module, images in ((fitted(), batch // 2), (fitted(), batch // 2 + 1))
    ]
    assert needed[0] <= free + 40_000_000 < needed[1]


def fitted() -> PostTraining:
    """The training module of SMALL, on the meta device."""
    from neco.task.train import _module

    settings = validate.load(*SMALL, "loss.references=batch_other", "train.accumulate=2")
    views = settings.build("augment").resolve(8, 64)
    with torch.device("meta"):
        return _module(settings, settings.build("model"), settings.spine["train"], views, 1)
