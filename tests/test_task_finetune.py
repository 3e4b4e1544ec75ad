"""The whole of task=finetune on tiny data: exact resume, rates, what is kept, what it gives, what is refused."""

import csv
import dataclasses
import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from conftest import FEW, losses
from PIL import Image
from test_task_train import Stopped, assert_same_run, state, stop_after  # noqa: F401

from neco import load_backbone
from neco.config import validate
from neco.config.schema import Finetune, Optim
from neco.eval.common.sliding import SlidingWindows
from neco.eval.evaluation import Result
from neco.model import last_checkpoint
from neco.model.weights import read, recognise, weights_hash
from neco.training.finetune import FineTuning
from neco.utils.errors import NecoError

FEWER = ["model.arch.depth=2"]
LINEAR = ["finetune.decoder=linear"]


def records(folder):
    return json.loads((folder / "results.json").read_text())


VARIANTS = {
    "plain": [],
    "linear, accumulate": [*LINEAR, "finetune.accumulate=2", "optim.layer_decay=0.5"],
    "bf16": ["finetune.precision=bf16", "finetune.clip=0.5", "finetune.checkpoint_activations=true"],
}


def without_numbers(monkeypatch):
    monkeypatch.setattr(SlidingWindows, "__call__", lambda *a, **k: Result("none", {"miou": 0.0}, {}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_equal_five_and_resume_and_five(finetune, monkeypatch, stop_after, variant):  # noqa: F811
    without_numbers(monkeypatch)
    # an epoch is 3 steps: 5 is inside one
    options = [*FEWER, *VARIANTS[variant], "finetune.steps=10", "finetune.save_minutes=1e-9"]
    whole = finetune(*options, folder="whole")
    stop_after(5)
    with pytest.raises(Stopped):
        finetune(*options, folder="halves")
    assert state(whole)["global_step"] == 10 and state(whole.parent / "halves")["global_step"] == 5
    monkeypatch.undo()
    without_numbers(monkeypatch)
    halves = finetune(*options, "finetune.workers=2", folder="halves")
    rows = ("loss", "grad_norm", "lr_backbone", "lr_head", "weight_decay")
    for row in rows:
        assert losses(whole, row) == losses(halves, row) and len(losses(whole, row)) == 10
    a, b = state(whole), state(halves)
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert_same_run(whole, halves)


MOVES = {  # key -> another value that changes what is trained
    "epochs": None,  # `steps` stand in its place
    "steps": 2,
    "batch_size": 2,
    "drop_path": 0.9,
    "clip": 1e-3,
    "precision": "bf16",
    "decoder": "linear",
    "decoder_layers": 1,
    "decoder_dropout": 0.5,
    "crop": 24,
    "side": 64,
    "scale": "[1,1]",
    "flip": 0,
    "jitter": "[0.4,0,0,0]",
    "optim.lr": 2e-3,
    "optim.head_lr": 2e-3,
    "optim.layer_decay": 0.5,
    "optim.weight_decay": "[0.5,0.5]",
    "optim.betas": "[0.5,0.9]",
    "optim.power": "null",
}
STAYS = {  # ... and that does not
    "workers": 1,
    "resume": "never",
    "patience": 3,
    "stride": 8,
    "eval_epochs": 1,
    "save_epochs": 1,
    "save_minutes": 1e-9,
    "wait_minutes": 5.0,
    "log_steps": 3,
}
ELSEWHERE = {"accumulate", "devices", "nodes", "checkpoint_activations", "deterministic"}  # the same but for rounding


def test_every_key_does_what_it_says_and_no_other_exists(finetune, monkeypatch):
    without_numbers(monkeypatch)
    keys = {field.name for field in dataclasses.fields(Finetune)}
    keys |= {f"optim.{field.name}" for field in dataclasses.fields(Optim)}
    assert keys == MOVES.keys() | STAYS.keys() | ELSEWHERE
    short = [*FEWER, "finetune.steps=3"]
    first = finetune(*short, folder="first")
    held = state(first)["state_dict"]
    for key, value in MOVES.items():
        name = key if "." in key else f"finetune.{key}"
        change = [f"{name}={value}"] if value is not None else ["finetune.steps=null", "finetune.epochs=2"]
        other = state(finetune(*short, *change, folder=key))["state_dict"]
        assert held.keys() != other.keys() or any(not torch.equal(held[k], other[k]) for k in held), key
    assert_same_run(
        first, finetune(*short, *(f"finetune.{key}={value}" for key, value in STAYS.items()), folder="same")
    )


def test_rates_by_layer_and_step(finetune, monkeypatch):
    without_numbers(monkeypatch)
    folder = finetune("optim.layer_decay=0.5", "optim.lr=8e-3", "optim.head_lr=3e-3", "optim.power=2")
    assert losses(folder, "lr_backbone") == pytest.approx([8e-3, 4.5e-3, 2e-3, 0.5e-3])  # (1 - step / 4)^2
    assert losses(folder, "lr_head") == pytest.approx([3e-3, 1.6875e-3, 0.75e-3, 0.1875e-3])
    assert losses(folder, "weight_decay") == [0.05] * 4
    groups = {group["name"]: group["lr"] for group in state(folder)["optimizer_states"][0]["param_groups"]}
    for name, rate in {"": 0.5, "/block2": 0.25, "/block1": 0.125, "/block0": 0.0625, "/embeddings": 0.03125}.items():
        assert groups[f"backbone{name}"] == pytest.approx(rate * 1e-3), name


def scores(monkeypatch, *values):
    queue = iter(values)
    monkeypatch.setattr(
        SlidingWindows, "__call__", lambda *a, **k: Result("chosen", {"miou": next(queue), "accuracy": 1.0}, {})
    )


def step_of(path):
    return torch.load(path, weights_only=True, mmap=True)["global_step"]


def test_best_and_last(finetune, monkeypatch, cache):
    from neco.task import finetune as task

    scores(monkeypatch, 0.1, 0.4, 0.2, 0.3)
    options = [*FEWER, "finetune.eval_epochs=1", "finetune.steps=12"]
    folder = finetune(*options)
    kept = folder / "checkpoints"
    assert [r["step"] for r in records(folder)] == [3, 6, 9, 12], "an untrained decoder is of no interest"
    assert (step_of(kept / "best.ckpt"), step_of(kept / "last.ckpt")) == (6, 12)
    wanted = validate.load(*FEW, *options, f"run_dir={folder}", f"cache_dir={cache}")
    assert task.main(wanted, task.prepare(wanted), folder) == ("segmentation/segmenter/miou", 0.4), (
        "a finished run says it again"
    )
    assert step_of(kept / "best.ckpt") == 6
    scores(monkeypatch, 0.4, 0.3, 0.2, 0.1)
    assert step_of(finetune(*options, "finetune.patience=2", folder="patient") / "checkpoints/last.ckpt") == 9


def test_a_finished_run_is_scored_by_other_windows(finetune, caplog):
    folder = finetune(*FEWER)
    finetune(*FEWER)
    first, *more = records(folder)
    assert not more and first["protocol"].endswith("side=48/window=32/stride=32/full_size")
    finetune(*FEWER, "finetune.stride=8")
    assert [r["protocol"].split("/")[-2] for r in records(folder)] == ["stride=32", "stride=8"]
    assert {r["weights"] for r in records(folder)} == {first["weights"]}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert "looked for anew" not in caplog.text


def test_what_it_predicts_can_be_seen(finetune):
    folder = finetune(*FEWER)
    finetune(*FEWER, "show=2")  # of a finished run, too
    (record,) = records(folder)
    assert [picture["kind"] for picture in record["pictures"]] == ["prediction"] * 2 + ["confusion"]
    page = (folder / "report.html").read_text()
    assert page.count("<figcaption>ground truth") == page.count("<figcaption>principal components") == 2
    assert "components of features, segmenter, step" in page


def test_evaluations_do_not_change_the_training(finetune):
    assert_same_run(finetune(*FEWER, folder="quiet"), finetune(*FEWER, "finetune.eval_epochs=1", folder="watched"))


def test_its_backbone_is_one_for_other_tasks(finetune, train, tmp_path):
    folder = finetune("model.arch.depth=2", "model.size=32")
    held = {k.removeprefix("segmenter.backbone."): v for k, v in state(folder)["state_dict"].items()}
    for source in (folder, folder / "checkpoints/best.ckpt"):
        backbone = load_backbone(str(source))
        assert recognise(read(Path(last_checkpoint(str(source)))))[0] == "fine-tuned neco checkpoint"
        assert all(torch.equal(value, held[name]) for name, value in backbone.state_dict().items())
        assert backbone.depth == 2, "the network is the run's"
    from neco.task import eval as task

    evals = ("eval=overcluster", "eval.overcluster.k=4", "eval.overcluster.restarts=1", "dataset.val=4")
    wanted = validate.load("task=eval", f"checkpoint={folder}", *evals, "extract.workers=0", "dataset.train=12")
    task.main(wanted, task.prepare(wanted), tmp_path / "eval")
    (record,) = records(tmp_path / "eval")
    assert record["weights"] == weights_hash(backbone) and record["network"] == "backbone"
    again = finetune("weights=auto", f"checkpoint={folder}", "optim.lr=0", "finetune.steps=1", folder="again")
    assert weights_hash(load_backbone(str(again))) == weights_hash(backbone), "also the start of another"
    post = train(
        "weights=auto", f"checkpoint={folder}", "model.arch.depth=2", "model.size=32", "train.steps=1", folder="post"
    )
    assert load_backbone(str(post)).depth == 2


@pytest.mark.parametrize(("decoder", "miou"), [("mask_transformer", 0.15), ("linear", 0.12)])
def test_it_learns_to_segment(finetune, decoder, miou):
    folder = finetune(
        "dataset.train=400", "dataset.val=20", "finetune.crop=64", "finetune.side=128", "finetune.batch_size=8",
        "finetune.steps=60", "finetune.scale=[1,1]", "finetune.jitter=[0,0,0,0]", "finetune.drop_path=0",
        f"finetune.decoder={decoder}", "weights=auto", "optim.lr=3e-4", "optim.head_lr=1e-3",
    )  # fmt: skip
    found = losses(folder)
    assert sum(found[-10:]) < 0.9 * sum(found[:10])
    (record,) = records(folder)
    assert record["metrics"]["miou"] > miou, "always the background: 0.064"
    assert record["dataset"] == "shapes" and record["network"] == "segmenter" and record["seconds"] > 0


def test_no_labelled_pixel_is_no_loss():
    options = validate.load(*FEW)
    module = FineTuning(
        options.build("model"), 8, options=options.spine["finetune"], optim=options.spine["optim"], steps=1, seed=0
    )
    batch = {"images": torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "masks": torch.full((2, 16, 16), 255)}
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss == 0 and all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    batch["masks"][:, :, :8] = 3
    labelled = module.training_step(batch, 0)
    batch["masks"][:] = 3
    assert labelled > 1 and labelled < 2 * module.training_step(batch, 0), "the mean of labelled pixels, not of all"


@pytest.fixture
def folder(tmp_path):
    """Ten labelled photographs, two of which are broken: an image, a mask."""
    for split, count in (("train", 10), ("val", 2)):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / kind / split).mkdir(parents=True)
            for index in range(count):
                Image.new(mode, (40, 30), 1 if mode == "L" else (200, 9, 9)).save(
                    tmp_path / kind / split / f"{index}.png"
                )
    (tmp_path / "images/train/3.png").write_bytes(b"no image")
    Image.new("L", (30, 40)).save(tmp_path / "masks/train/5.png")
    root = ["dataset=folder", f"dataset.root={tmp_path / 'images'}", f"dataset.masks={tmp_path / 'masks'}"]
    return [*root, "dataset.classes=[sky,road]"]


def test_broken_pairs_are_replaced_and_named(tmp_path, folder):
    from neco.task import finetune as task

    small = [option for option in FEW if not option.startswith("dataset.")]
    wanted = validate.load(*small, *FEWER, *folder, "dataset.max_bad=0.2", f"run_dir={tmp_path / 'run'}")
    task.main(wanted, task.prepare(wanted), tmp_path / "run")
    named = sorted(line.split("\t")[0] for line in (tmp_path / "run/bad_images.txt").read_text().splitlines())
    assert named == ["3", "5"]
    with pytest.raises(NecoError, match=r"1 of \d+ images looked at cannot be read.*max_bad"):
        task.prepare(validate.load(*small, *folder, "dataset.max_bad=0"))


def test_a_signal_saves_and_says_how_to_go_on(inside, monkeypatch, tmp_path):
    without_numbers(monkeypatch)
    real = FineTuning.training_step

    def stopped(self, batch, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, index)

    monkeypatch.setattr(FineTuning, "training_step", stopped)
    code, said = inside(*FEW, *FEWER, "run_dir=run")
    assert code == 143 and state(tmp_path / "run")["global_step"] == 3
    monkeypatch.setattr(FineTuning, "training_step", real)
    again = shlex.split(said.strip().splitlines()[-1].split("python -m neco ")[1])
    assert inside(*again)[0] == 0 and state(tmp_path / "run")["global_step"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (["finetune.crop=100"], r"finetune\.crop=100 is no multiple of the backbone's patch, 8: take 96 or 104"),
        (["finetune.crop=3"], r"finetune\.crop=3 .* take 8$"),
        (["finetune.stride=33"], r"finetune\.stride=33: windows of 32 pixels would leave gaps"),
        (["finetune.side=24"], r"finetune\.side=24: windows of 32 pixels do not fit"),
        (["finetune.scale=[2,1]"], r"finetune: scale=\[2\.0, 1\.0\]: the lower end comes first"),
        (["finetune.jitter=[0,0,0,0.6]"], r"finetune\.jitter="),
        ([*LINEAR, "finetune.decoder_layers=3"], r"finetune\.decoder_layers: decoder=linear has none"),
        (["finetune.batch_size=6", "finetune.accumulate=4"], r"batch_size=6 cannot be split"),
        (["finetune.batch_size=auto"], r"finetune\.batch_size='auto'"),
        (["eval=retrieval"], r"eval=\[retrieval\]: task=finetune scores its own segmenter; then: task=eval"),
        (["finetune.resume=nowhere.ckpt"], r"finetune\.resume=nowhere\.ckpt: no such file"),
        (["finetune.nodes=2"], r"finetune\.nodes=2: start one process a device"),
        (["+finetune.decodr=linear"], r"finetune\.decodr: no such key; did you mean 'decoder'"),
    ),
)
def test_what_makes_no_sense_is_refused_at_once(options, message):
    from neco.task import finetune as task

    with pytest.raises(NecoError, match=message):
        task.prepare(validate.load(*FEW, *options))


def test_unlabelled_images_are_refused(folder):
    from neco.task import finetune as task

    small = [option for option in FEW if not option.startswith("dataset.")]
    with pytest.raises(NecoError, match=r"dataset=folder has no labels: choose a labelled set"):
        task.prepare(validate.load(*small, *folder[:2]))
    with pytest.raises(NecoError, match=r"dataset=folder has one class, sky"):
        task.prepare(validate.load(*small, *folder[:3], "dataset.classes=[sky]"))


def test_the_crop_follows_patch_and_data(folder):
    from neco.task import finetune as task

    small = [option for option in FEW if not option.startswith(("dataset.", "finetune.crop", "finetune.side"))]
    drawn = ["dataset.train=2", "dataset.val=2"]
    for model, data, crop in (("dinov2_vits14", folder, 518), ("dino_vits16", folder, 512), ("tiny", drawn, 128)):
        job = task.prepare(validate.load(*small, f"model={model}", *data, "dataset.max_bad=1"))
        assert (job.crops.crop, job.crops.side, job.windows.crop, job.windows.stride) == (crop,) * 4
    job = task.prepare(validate.load(*small, *folder, "finetune.side=image", "dataset.max_bad=1"))
    assert job.crops.side is None and "/own_size>=512/" in job.windows.protocol


def test_a_run_goes_on_only_as_the_same(finetune, train, folder):
    run = finetune(*FEWER)
    last = run / "checkpoints/last.ckpt"
    for change in (LINEAR[0], "finetune.decoder_layers=1", "optim.layer_decay=0.9"):
        with pytest.raises(NecoError, match=rf"{change.split('=')[0]}: .* -> .*checkpoint="):
            finetune(*FEWER, change, "finetune.steps=6", f"finetune.resume={last}", folder="on")
    with pytest.raises(NecoError, match=r"finetune\.flip: 0\.5 -> 0"):
        finetune(*FEWER, "finetune.flip=0")
    with pytest.raises(NecoError, match=r"finetune\.steps=2: .*last\.ckpt is at step 4 already"):
        finetune(*FEWER, "finetune.steps=2", f"finetune.resume={last}", folder="shorter")
    with pytest.raises(NecoError, match=r"task: train -> finetune"):
        finetune(f"finetune.resume={train(folder='post')}/checkpoints/last.ckpt", folder="other")
    on = finetune(*FEWER, "finetune.flip=0", "finetune.steps=5", f"finetune.resume={last}", folder="on")
    assert step_of(on / "checkpoints/last.ckpt") == 5
    with (on / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["5"]


@pytest.mark.slow
def test_two_devices_train_as_one(neco, finetune, tmp_path):
    plain = ["finetune.drop_path=0.5", "finetune.decoder_dropout=0", "device=cpu"]
    one = finetune(*plain, folder="one")
    neco(*FEW, *plain, "finetune.devices=2", f"run_dir={tmp_path / 'two'}", ok=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    assert losses(tmp_path / "two", "grad_norm") == pytest.approx(losses(one, "grad_norm"), rel=1e-3)
    assert records(tmp_path / "two")[0]["metrics"] == pytest.approx(records(one)[0]["metrics"], abs=0.02)
