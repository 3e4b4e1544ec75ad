"""Measured numbers stand beside the published ones that they belong to, and beside no others."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from neco import published
from neco.task.report import identity, table


def made(run: Path, task: str, model: str, records: list[dict], **config) -> Path:
    """A run folder with these results."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"task": task, "dataset": {"fraction": 1.0}, **config}))
    (run / "environment.json").write_text(json.dumps({"choices": {"model": model}}))
    common = {"dataset": "voc", "protocol": "a protocol", "weights": "w", "asked": "x"}
    (run / "results.json").write_text(json.dumps([{**common, **record} for record in records]))
    return run


def record(evaluation: str, network: str, step: int = 0, weights: str = "w", **metrics: float) -> dict:
    return {"evaluation": evaluation, "network": network, "step": step, "weights": weights, "metrics": metrics}


def beside(run: Path) -> dict[tuple[str, str, str], list[tuple[str, str]]]:
    """(weights, evaluation, metric) -> what stands in `published` and `difference`."""
    found: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for _, _, weights, _, evaluation, metric, _, value, difference, _ in table(run):
        found.setdefault((weights, evaluation, metric), []).append((value, difference))
    return found


def test_a_training_is_compared_before_and_after(tmp_path: Path) -> None:
    records = [
        record("retrieval", network, step, str(step) + network * (step > 0), miou_k30=0.74 + step / 1e4)
        for step in (0, 300, 600)
        for network in ("student", "teacher")
    ]
    run = made(tmp_path / "run", "train", "dinov2r_vits14", records)
    found = beside(run)
    assert found.keys() == {(weights, "retrieval", "miou_k30") for weights in ("before", "student", "teacher")}
    assert found["before", "retrieval", "miou_k30"] == [("75.0 (NeCo)", "-1.0"), ("79.4 (DIP)", "-5.4")]
    assert found["teacher", "retrieval", "miou_k30"] == [("80.7 (NeCo)", "-0.7"), ("81.0 (DIP)", "-1.0")]


def test_an_evaluation_is_what_its_checkpoint_is(tmp_path: Path) -> None:
    trained = made(tmp_path / "trained", "train", "dinov2r_xr_vitb14", [])
    numbers = [record("linear", "teacher", miou=0.8), record("linear", "compared", weights="v", miou=0.7)]
    numbers = [{**number, "checkpoint": str(trained / "checkpoints" / "best.ckpt")} for number in numbers]
    run = made(tmp_path / "eval", "eval", "tiny", numbers)
    checkpoint = str(trained / "checkpoints" / "best.ckpt")
    assert identity(run, {"checkpoint": checkpoint}) == ("dinov2r_xr_vitb14", "after")
    assert identity(run, {"checkpoint": str(run / "x.pth"), "model": "tiny"}) == ("tiny", "after"), "in its own folder"
    assert beside(run)["teacher", "linear", "miou"] == [("83.3 (NeCo)", "-3.3")]
    assert beside(run)["before", "linear", "miou"] == [("", "")], "nothing is published of it"
    plain = made(tmp_path / "plain", "eval", "dino_vits16", [record("overcluster", "teacher", miou_k300=0.139)])
    assert identity(plain, {"checkpoint": None}) == ("dino_vits16", "before")
    assert beside(plain)["teacher", "overcluster", "miou_k300"] == [("13.9 (NeCo)", "+0.0")]


def test_parts_of_the_labels_and_presets_find_their_own_numbers(tmp_path: Path) -> None:
    numbers = [record("retrieval", "teacher", miou_k30=0.5, miou_k10=0.5)]
    eighth = made(tmp_path / "a", "eval", "dinov2r_vits14", [{**number, "fraction": 1 / 8} for number in numbers])
    assert beside(eighth)["teacher", "retrieval", "miou_k30"] == [("68.2 (NeCo)", "-18.2"), ("75.2 (DIP)", "-25.2")]
    assert beside(eighth)["teacher", "retrieval", "miou_k10"] == [("", "")]
    preset = made(tmp_path / "b", "eval", "dinov2r_vits14", [record("unsupervised_vits", "teacher", miou=0.3)])
    assert beside(preset)["teacher", "unsupervised", "miou"] == [("35.1 (NeCo)", "-5.1")]


def test_the_table_is_printed_and_written(inside, tmp_path: Path) -> None:
    made(tmp_path / "runs/eval/a", "eval", "ibot_vits16", [record("linear", "teacher", miou=0.7)])
    (tmp_path / "runs/eval/empty").mkdir()
    (tmp_path / "weights").mkdir()  # a folder of the name of a key is no group of options
    code, text = inside("task=report", "runs=[runs/*/*]", "weights=teacher", "run_dir=report")
    assert code == 0 and "66.1 (NeCo)" in text and "+3.9" in text, text
    head, row = csv.reader((tmp_path / "report/report.csv").open())
    assert dict(zip(head, row, strict=True))["published"] == "66.1 (NeCo)"
    assert (tmp_path / "report/report.md").read_text().count("\n") == 3
    code, text = inside("task=report", "runs=[nowhere/*]")
    assert code == 2 and "runs=[nowhere/*]: 0 folders fit nowhere/*" in text
    made(tmp_path / "runs/eval/b", "eval", "ibot_vits16", [record("linear", "teacher", miou=None)])
    (tmp_path / "runs/eval/a/environment.json").write_text("{")
    code, text = inside("task=report", "runs=[runs/eval/*]")
    assert code == 2 and "runs/eval/a is no whole run folder" in text and "linear/miou is None, no number" in text
    for broken in ("", "text", "run: 1"):
        (tmp_path / "runs/eval/b/config.yaml").write_text(broken)
        code, text = inside("task=report", "runs=[runs/eval/b]")
        assert code == 2 and "runs/eval/b is no whole run folder" in text


@pytest.mark.parametrize(
    ("model", "state", "dataset", "metric", "fraction", "percent"),
    [  # typed from NUMBERS.md
        ("dinov2_vits14", "after", "voc", "overcluster/miou_k500", 1, 57.7),
        ("dino_vits16", "after", "voc", "retrieval/miou_k30", 1, 65.8),
        ("dino_vits16", "after", "voc", "linear/miou", 1, 61.3),
        ("dino_vits16", "before", "coco_things", "overcluster/miou_k12", 1, 5.4),
        ("dinov2r_xr_vits14", "after", "coco_things", "overcluster/miou_k500", 1, 64.5),
        ("timet_vits16", "after", "voc", "overcluster/miou_k500", 1, 52.1),
        ("dinov2r_vitb14", "before", "coco_stuff", "linear/miou", 1, 57.6),
        ("dinov2r_xr_vitb14", "after", "ade20k", "linear/miou", 1, 44.9),
        ("dinov2r_xr_vits14", "after", "ade20k", "retrieval/miou_k30", 1 / 128, 23.7),
        ("dinov2r_xr_vits14", "after", "voc", "unsupervised/miou", 1, 55.1),
        ("cribo_vits16", "before", "voc", "linear/miou", 1, 71.6),
    ],
)
def test_published_numbers(model, state, dataset, metric, fraction, percent) -> None:
    assert percent in [row.percent for row in published.find(model, state, dataset, metric, fraction)]
