"""Measured numbers stand beside the published ones that they belong to, and beside no others."""

import csv
import json
from pathlib import Path

import pytest

from neco.report import collect, published, tables
from neco.runs.results import comparison


def made(run: Path, model: str, state: str, *records: dict) -> Path:
    """A run folder with these results."""
    run.mkdir(parents=True)
    common = {"dataset": "voc", "protocol": "x/standard/448", "weights": "w", "asked": "x", "fraction": 1.0}
    common |= {"model": model, "state": state}
    (run / "results.json").write_text(json.dumps([{**common, **record} for record in records]))
    return run


def record(evaluation: str, network: str, metrics: dict[str, float | None], step: int = 0, **more) -> dict:
    return {"evaluation": evaluation, "network": network, "step": step, "metrics": metrics, **more}


def beside(run: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
    """(network, evaluation, metric) -> what is published, with the difference, before and after."""
    table = tables.headline([collect.read(run)])
    rows = [{"published before": "", "published": "", **dict(zip(table.head, row, strict=True))} for row in table.rows]
    return {(r["network"], r["evaluation"], r["metric"]): (r["published before"], r["published"]) for r in rows}


def test_a_training_is_compared_before_and_after(tmp_path: Path) -> None:
    records = [
        record("retrieval", n, {"miou_k30": 0.74 + step / 1e4}, step, weights=str(step) + n * (step > 0), state=state)
        for step, state in ((0, "before"), (300, "after"), (600, "after"))
        for n in ("student", "teacher")
    ]
    run = made(tmp_path / "run", "dinov2r_vits14", "", *records)
    row = "75.0 NeCo (-1.0*); 79.4 DIP (-5.4*)", "80.7 NeCo (-0.7*); 81.0 DIP (-1.0*)"
    assert beside(run) == {(network, "retrieval", "miou_k30"): row for network in ("student", "teacher")}
    table = tables.headline([collect.read(run)])
    found = dict(zip(table.head, table.rows[0], strict=True))
    assert (found["before"], found["after"], found["change"]) == ("74.0", "80.0", "+6.0") and tables.MARK in table.notes


def test_a_step_within_a_training_is_not_before_it(tmp_path: Path) -> None:
    records = [record("segmentation", "segmenter", {"miou": step / 10}, step, weights=str(step)) for step in (4, 8)]
    run = collect.read(made(tmp_path / "run", "dino_vits16", "", *records))
    table = tables.headline([run])
    found = dict(zip(table.head, table.rows[0], strict=True))
    assert found["measured"] == "80.0" and len(table.rows) == 1 and not {"before", "change"} & {*table.head}
    head, row = comparison(run.records)
    assert dict(zip(head, row, strict=True))["value"] == 0.8 and "before" not in head


def test_rows_say_which_weights_they_are_and_where_from(tmp_path: Path) -> None:
    sources = {"none": "random", "runs/a/checkpoints/last.ckpt": "last.ckpt", None: "published"}
    for i, (held, said) in enumerate(sources.items()):
        state = "before" if held is None else ""
        seeds = record("overcluster", "backbone", {"miou_k9": 0.5}, checkpoint=held, state=state, weights=f"abc{i}")
        table = tables.headline([collect.read(made(tmp_path / str(i), "dino_vits16", "", seeds))])
        row = dict(zip(table.head, table.rows[0], strict=True))
        assert (row["weights"], row["from"]) == (f"abc{i}", said) and "std" not in table.head
    trained = record("overcluster", "teacher", {"miou_k9": 0.5}, 7, checkpoint=None, state="", weights="x")
    folder = made(tmp_path / "trained", "dinov2_vits14", "", trained)
    for start, said in ((None, "trained from published weights"), ("../a/file.pth", "trained from file.pth")):
        config = {"task": "finetune", "checkpoint": start, "model": {"weights": "hub"}}
        (folder / "config.yaml").write_text(json.dumps(config))
        table = tables.headline([collect.read(folder)])
        found = dict(zip(table.head, table.rows[0], strict=True))["from"]
        assert found == said
    seeds["details"] = {"miou_k9": {"std": 0.012}}
    table = tables.headline([collect.read(made(tmp_path / "std", "dino_vits16", "", seeds))])
    assert dict(zip(table.head, table.rows[0], strict=True))["std"] == "1.2"


def test_only_what_is_published_has_a_number(tmp_path: Path) -> None:
    same = [record("linear", "teacher", {"miou": 0.8}, state=state) for state in ("after", "before", "")]
    found = [beside(made(tmp_path / str(i), "dinov2r_xr_vitb14", "", one)) for i, one in enumerate(same)]
    assert [rows["teacher", "linear", "miou"][1] for rows in found] == ["83.3 NeCo (-3.3*)", "", ""]
    numbers = {"miou_k300": 0.139}
    same = record("overcluster", "backbone", numbers, protocol="overcluster/reference/448", state="before")
    plain = made(tmp_path / "plain", "dino_vits16", "", same)
    assert beside(plain)["backbone", "overcluster", "miou_k300"] == ("", "13.9 NeCo (+0.0)"), "the same protocol"
    after = record("overcluster", "teacher", {"miou_k300": 0.2}, weights="v", state="after", protocol=same["protocol"])
    both = made(tmp_path / "both", "dino_vits16", "", {**same, "network": "compared"}, after)
    assert beside(both) == {("teacher", "overcluster", "miou_k300"): ("13.9 NeCo (+0.0)", "")}


def test_parts_of_the_labels_and_presets_find_their_own_numbers(tmp_path: Path) -> None:
    number = record("retrieval", "backbone", {"miou_k30": 0.5, "miou_k10": 0.5}, fraction=1 / 8)
    eighth = made(tmp_path / "a", "dinov2r_vits14", "before", number)
    assert beside(eighth)["backbone", "retrieval", "miou_k30"][1] == "68.2 NeCo (-18.2*); 75.2 DIP (-25.2*)"
    assert beside(eighth)["backbone", "retrieval", "miou_k10"][1] == ""
    assert "voc x 1/8" in tables.headline([collect.read(eighth)]).rows[0]
    preset = made(tmp_path / "b", "dinov2r_vits14", "before", record("unsupervised_vits", "backbone", {"miou": 0.3}))
    assert beside(preset)["backbone", "unsupervised", "miou"][1] == "35.1 NeCo (-5.1*)"


def test_the_table_is_printed_and_written(inside, tmp_path: Path) -> None:
    made(tmp_path / "runs/eval/many/3", "ibot_vits16", "before", record("linear", "backbone", {"miou": 0.7}))
    (tmp_path / "runs/eval/empty").mkdir()
    (tmp_path / "weights").mkdir()  # a folder of the name of a key is no group of options
    code, text = inside("task=report", "runs=[runs/eval/*]", "weights=teacher", "run_dir=report")
    assert code == 0 and "66.1 NeCo (+3.9*)" in text, text
    head, row = csv.reader((tmp_path / "report/report.csv").open())
    assert dict(zip(head, row, strict=True))["published"] == "66.1 NeCo (+3.9*)"
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {
        f"report.{kind}" for kind in ("html", "md", "tex")
    }
    code, text = inside("task=report", "runs=[runs/eval/*]", "formats=[latex]", "run_dir=tables")
    assert code == 0 and [path.name for path in (tmp_path / "tables").glob("report*")] == ["report.tex"]
    code, text = inside("task=report", "runs=[runs/eval/*]", "formats=[pdf]")
    assert code == 2 and "formats=['pdf']" in text and "'latex'" in text
    code, text = inside("task=report", "runs=[nowhere/*]")
    assert code == 2 and "runs=[nowhere/*]: 0 folders fit" in text
    made(tmp_path / "runs/eval/b", "ibot_vits16", "", record("linear", "teacher", {"miou": None}))
    (tmp_path / "runs/eval/many/3/results.json").write_text("{")
    code, text = inside("task=report", "runs=[runs/eval/*]")
    assert (
        code == 2
        and "results.json is damaged" in text
        and "metrics.miou: Input should be a valid number, not None" in text
    )


def test_records_say_where_weights_are_from(train, neco, tmp_path: Path) -> None:
    def states(run: Path) -> dict[tuple[int, str], str]:
        return {(r["step"], r["network"]): r["state"] for r in json.loads((run / "results.json").read_text())}

    light = ["eval=[retrieval]", "eval.retrieval.k=3", "dataset.val=5"]
    here = ["task=eval", "dataset=shapes", "dataset.train=8", *light]
    run = train(*light, "weights=auto", "optim.lr=1e-4", "train.steps=2", folder="own")
    steps = [(step, network) for step in (0, 2) for network in ("student", "teacher")]
    assert states(run) == dict(zip(steps, ["before", "before", "after", "after"], strict=True))
    assert {*states(train(*light, folder="random")).values()} == {""}, "weights=none"
    neco(*here, f"checkpoint={run}", "compare=own", f"run_dir={tmp_path / 'a'}", ok=True)
    assert states(tmp_path / "a") == {(0, "compared"): "before", (0, "teacher"): "after"}
    sources = {r["network"]: r["checkpoint"] for r in json.loads((tmp_path / "a/results.json").read_text())}
    assert sources == {"compared": None, "teacher": str(run / "checkpoints/last.ckpt")}
    neco(*here, f"checkpoint={tmp_path / 'random'}", f"run_dir={tmp_path / 'b'}", ok=True)
    assert {*states(tmp_path / "b").values()} == {""}
    neco(*here, "model.pos_interp=timm", f"run_dir={tmp_path / 'c'}", ok=True)
    assert {*states(tmp_path / "c").values()} == {""}, "a changed network"


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
