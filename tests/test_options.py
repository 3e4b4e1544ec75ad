"""Every option of every group is reachable and runs on tiny data; a new option is tested by existing."""

import importlib
import json
import time
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from conftest import CONF, losses

from neco.config import schema, validate
from neco.config.validate import locate
from neco.model.export import FILES
from neco.utils.errors import NecoError


def options(group: str) -> list[str]:
    return sorted(path.stem for path in CONF.glob(f"{group}/[!_]*.yaml"))


def test_groups_and_packages_are_the_same_tree():
    for path in CONF.glob("*/[!_]*.yaml"):
        group, node = path.parent.name, yaml.safe_load(path.read_text()) or {}
        if "_target_" not in node:
            bases = [base for base in node.get("defaults", []) if str(base).endswith("@_here_")]
            assert bases or group in ("task", "experiment", "sweep"), f"{path} names no class"
        else:
            assert node["_target_"].startswith(f"neco.{group}."), path
            assert locate(node["_target_"])
    assert {p.stem for p in (CONF / "task").glob("*.yaml")} <= {
        p.stem for p in (CONF.parent / "neco/task").glob("*.py")
    }


@pytest.mark.parametrize("name", options("task"))
def test_task_has_its_keys_and_its_two_parts(name):
    chosen, task = validate.load(f"task={name}"), importlib.import_module(f"neco.task.{name}")
    assert chosen.run.task == name and callable(task.prepare) and callable(task.main)
    node = yaml.safe_load((CONF / "task" / f"{name}.yaml").read_text()).get(name)
    assert (node is None) == (name not in validate.SPINE) and (
        node is None or getattr(chosen.spine[name], "node", name) == name
    )


@pytest.mark.parametrize("decoder", get_args(get_type_hints(schema.Finetune)["decoder"]))
def test_decoder_trains(finetune, decoder):
    found = losses(finetune(f"finetune.decoder={decoder}", "finetune.steps=2"))
    assert len(found) == 2 and all(torch.isfinite(torch.tensor(found)))


def test_formats_of_weights_are_those_that_can_be_chosen():
    assert {*get_args(get_type_hints(schema.Run)["format"])} == FILES.keys()


@pytest.mark.parametrize("name", options("loss"))
def test_loss_trains(train, name):
    folder = train(f"loss={name}", "loss.grid=3", "train.steps=2")
    found = losses(folder)
    assert len(found) == 2 and all(torch.isfinite(torch.tensor(found)))


@pytest.mark.parametrize("name", ("logistic", "logistic_phi", "gaussian", "reciprocal", "optimal"))
def test_relaxation_trains(train, name):
    extra = ["loss.art_lambda=0.5"] if name == "logistic_phi" else ["loss.steepness=[30,20]"]
    found = losses(train(f"loss.relaxation={name}", *extra, "train.steps=2"))
    assert len(found) == 2 and all(torch.isfinite(torch.tensor(found)))


def test_lambda_of_another_relaxation_is_refused():
    with pytest.raises(NecoError, match=r"loss: art_lambda=0\.5 belongs to relaxation=logistic_phi"):
        validate.load("loss.art_lambda=0.5")


@pytest.mark.parametrize("name", options("loss"))
def test_loss_gives_gradient_to_the_student_alone(name):
    wanted = validate.load(f"loss={name}", "loss.grid=3")
    loss, generator = wanted.build("loss"), torch.Generator().manual_seed(0)
    loss.attach(8)
    student, teacher, references = (
        torch.randn(2, 3, 9, 8, generator=generator, requires_grad=r) for r in (True, True, False)
    )
    value, extra = loss(student, teacher, references)
    value.backward()
    assert value.isfinite() and student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None or not teacher.grad.any()
    assert all(v.isfinite() and not v.requires_grad for v in extra.values())


@pytest.mark.parametrize("name", options("augment"))
def test_augment_trains(train, name):
    assert losses(train(f"augment={name}", "train.steps=1"))
    assert losses(train(f"augment={name}", "train.steps=1", "augment.applier=pil", folder="pil"))


@pytest.mark.parametrize("name", options("eval"))
def test_eval_runs_before_and_after(train, name):
    light = {
        "linear": ["eval.linear.epochs=2"],
        "overcluster": ["eval.overcluster.seeds=[0]", "eval.overcluster.restarts=1"],
        "retrieval": ["eval.retrieval.k=3"],
    }
    few = ("k=20", "k_community=10", "seeds=[0]", "restarts=1")
    light |= {key: [f"eval.{key}.{k}" for k in few] for key in options("eval") if key.startswith("unsupervised")}
    folder = train(f"eval={name}", "train.steps=1", "dataset.val=8", *light.get(name, []))
    records = json.loads((folder / "results.json").read_text())
    assert {(r["step"], r["network"]) for r in records} == {(s, n) for s in (0, 1) for n in ("student", "teacher")}
    for record in records:
        assert record["metrics"] and all(0 <= value <= 1 for value in record["metrics"].values())


@pytest.mark.parametrize("name", options("logger"))
def test_logger_records_a_run(train, name, tmp_path):
    folder = train(f"logger=[{name}]", "train.steps=2")
    assert (folder / "metrics.csv").is_file() == (name == "csv")
    if name == "wandb":
        (stored,) = folder.glob("wandb/offline-run-*/*.wandb")
        end = time.monotonic() + 30
        while b"images_per_second" not in (data := stored.read_bytes()) and time.monotonic() < end:
            time.sleep(0.1)  # its service writes on after the run has ended
        assert b"lr_backbone" in data and b"images_per_second" in data
        assert (folder / "wandb_id.txt").read_text().encode() in data


@pytest.mark.parametrize("group", ["dataset", "val_dataset"])
@pytest.mark.parametrize("name", options("dataset"))
def test_data_sets_take_the_common_keys(name, group):
    chosen = "dataset" if group == "dataset" else "dataset@val_dataset"
    needed = {"mix": [f"{group}.parts={{shapes:1}}"], "folder": [f"{group}.root=my/images"]}
    wanted = [f"{chosen}={name}", *needed.get(name, [])]
    keys = ("max_bad=0.05", "weight=0.5", "fraction=1/8", "subset_seed=3")
    dataset = validate.load(*wanted, *(f"{group}.{key}" for key in keys)).build(group)
    assert (dataset.max_bad, dataset.weight, dataset.fraction, dataset.subset_seed) == (0.05, 0.5, 1 / 8, 3)
    assert dataset.index.endswith("/index") and dataset.chooses
    with pytest.raises(NecoError, match=rf"{group}\.max_bda: no such key; did you mean 'max_bad'"):
        validate.load(*wanted, f"+{group}.max_bda=0.05")


@pytest.mark.parametrize("name", options("experiment"))
def test_experiment_trains_with_the_tiny_backbone_in_its_place(train, name):
    chosen = validate.load(f"experiment={name}")
    assert chosen.run.task == "train"
    if chosen.choices["dataset"] == "shapes":
        assert losses(train(f"experiment={name}", "train.steps=2"))
    else:
        assert losses(train(f"experiment={name}", "model=tiny", "dataset=shapes", "dataset.train=12", "train.steps=2"))
