"""A run folder of somebody else is data: nothing outside of it is read, and whatever is wrong is one line."""

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_report import HOSTILE, made

from neco import report
from neco.eval.runner import _incomplete
from neco.report import collect
from neco.runs import foreign
from neco.runs.results import Results
from neco.utils.errors import NecoError


def picture(path: Path, side: int = 8) -> Path:
    Image.fromarray(np.full((side, side, 3), 77, np.uint8)).save(path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder beside a file that is nobody's business."""
    picture(tmp_path / "secret.png")
    (tmp_path / "secret.txt").write_text("SECRET")
    return made(tmp_path / "runs/foreign", {"a": "b"}, {"miou": 0.5})


def change_record(run: Path, **values: object) -> None:
    records = json.loads((run / "results.json").read_text())
    records[-1] |= values
    (run / "results.json").write_text(json.dumps(records))


def replace_by_link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def drawn(name: str) -> list[dict[str, object]]:
    return [{"kind": "prediction", "key": "b", "caption": None, "file": name}]


def outside(run: Path) -> Path:
    return run.parents[1]


OUTSIDE: dict[str, Callable[[Path], object]] = {
    "an absolute path": lambda run: change_record(run, pictures=drawn(str(outside(run) / "secret.png"))),
    "dots": lambda run: change_record(run, pictures=drawn("../../secret.png")),
    "dots within": lambda run: change_record(run, pictures=drawn("pictures/../../../secret.png")),
    "a link": lambda run: (
        (run / "pictures/x.png").symlink_to(outside(run) / "secret.png"),
        change_record(run, pictures=drawn("pictures/x.png")),
    ),
    "a link of folders": lambda run: (
        (run / "pictures/y").symlink_to(outside(run)),
        change_record(run, pictures=drawn("pictures/y/secret.png")),
    ),
    "an image of the gallery": lambda run: replace_by_link(run / "pictures/image-001.jpg", outside(run) / "secret.png"),
    "a mask of the gallery": lambda run: replace_by_link(run / "pictures/label-001.png", outside(run) / "secret.png"),
    "features": lambda run: (
        shutil.move(run / "pictures/features-teacher-9.safetensors", outside(run) / "f"),
        (run / "pictures/features-teacher-9.safetensors").symlink_to(outside(run) / "f"),
    ),
    **{
        name: lambda run, name=name: replace_by_link(run / name, outside(run) / "secret.txt")
        for name in ("results.json", "config.yaml", "overrides.txt", "environment.json", "metrics.csv")
    },
}  # fmt: skip


@pytest.mark.parametrize("way", OUTSIDE)
def test_nothing_outside_of_a_run_folder_is_read(way: str, run: Path, caplog) -> None:
    report.write([collect.read(run)], run.parent, {"html"})  # sound before
    assert "left out" not in caplog.text
    OUTSIDE[way](run)
    try:
        (page,) = report.write([collect.read(run)], run.parent, {"html"})
        secret = base64.b64encode((outside(run) / "secret.png").read_bytes()).decode()
        assert secret not in page.read_text() and "left out" in caplog.text
        told = caplog.text
    except NecoError as error:  # without these there is no run
        told = str(error)
    assert "leads out of the run folder: it is not read" in told


def test_pictures_are_pictures(run: Path, caplog) -> None:
    data = picture(run / "good.png").read_bytes()
    change_record(run, pictures=drawn("good.png"))
    (page,) = report.write([collect.read(run)], run.parent, {"html"})
    assert base64.b64encode(data).decode() in page.read_text()
    picture(run / "large.png", foreign.MAX_SIDE + 1)
    for name in ("config.yaml", "large.png"):
        change_record(run, pictures=drawn(name))
        report.write([collect.read(run)], run.parent, {"html"})
        assert f"{name} is no picture" in caplog.text


def test_what_a_record_saved_is_looked_for_inside(run: Path) -> None:
    assert _incomplete({"saved": {"a": "heads/a"}}, run, 0) and not _incomplete({"saved": {"a": "config.yaml"}}, run, 0)
    for name in ("../../secret.txt", str(outside(run) / "secret.txt"), "a\0b", "x" * 5000):
        with pytest.raises(NecoError):
            _incomplete({"saved": {"a": name}}, run, 0)


def bomb(path: Path) -> None:
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else '1'}]" for i in range(12)]
    path.write_text("\n".join(["task: train", *lines]))


def deep(text: str, path: Path) -> None:
    path.write_text(text * 100_000)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "results.json is nested": lambda run: deep("[", run / "results.json"),
    "environment.json is nested": lambda run: deep('{"a":', run / "environment.json"),
    "shown.json is nested": lambda run: deep("[", run / "pictures/shown.json"),
    "status.json is nested": lambda run: deep("[", run / "status.json"),
    "config.yaml is nested": lambda run: deep("[", run / "config.yaml"),
    "config.yaml is a bomb": lambda run: bomb(run / "config.yaml"),
    "config.yaml holds itself": lambda run: (run / "config.yaml").write_text("a: &a\n  b: *a\n"),
    "a pipe": lambda run: ((run / "metrics.csv").unlink(), os.mkfifo(run / "metrics.csv")),
    "results.json is a pipe": lambda run: ((run / "results.json").unlink(), os.mkfifo(run / "results.json")),
    "huge": lambda run: os.truncate(run / "metrics.csv", 2**40),
    "a huge list": lambda run: os.truncate(run / "overrides.txt", 2**40),
    "a field": lambda run: (run / "metrics.csv").write_text(f"step,loss\n1,{'9' * 200_000}\n"),
    "NUL": lambda run: (run / "metrics.csv").write_bytes(b"step,loss\n1,\0\n"),
    "more cells": lambda run: (run / "metrics.csv").write_text("step,loss\n1,2,3,4\n2,1\n"),
    "a huge step": lambda run: (run / "metrics.csv").write_text(f"step,loss\n{'9' * 400},1\n2,1e400\n3,nan\n"),
    "no shape": lambda run: save_file(
        {"features": torch.zeros(3)}, run / "pictures/features-a-1.safetensors",
        {"keys": json.dumps([HOSTILE, "b", "c"]), "network": "a", "weights": "x"},
    ),
    "no header": lambda run: save_file({"features": torch.zeros(3)}, run / "pictures/features-a-1.safetensors"),
    "a name": lambda run: (run / "pictures/features-a-b.safetensors").write_bytes(b"x"),
    "images of another size": lambda run: picture(run / "pictures/image-000.jpg", 9),
    "images gone": lambda run: (run / "pictures/image-000.jpg").unlink(),
    "a task": lambda run: (run / "config.yaml").write_text("task: [train]\nmodel: 3\ntrain: 5\n[train]: 4\n"),
    "a date": lambda run: (run / "config.yaml").write_text("task: 2020-01-01\n1: 2\n"),
    "choices": lambda run: (run / "environment.json").write_text('{"choices": 3}'),
    "packages": lambda run: (run / "environment.json").write_text('{"packages": {"torch": 3}}'),
    "an override": lambda run: (run / "overrides.txt").write_bytes(b"\xff\xfe=\0\n=\n"),
    "a job": lambda run: (run / "status.json").write_text('{"status": 3, "job": 0, "overrides": []}'),
}  # fmt: skip
VALUES = (None, 3, -1, "x", [], {}, [3], {"a": 3}, True, 10**400, float("nan"), float("inf"), {"a": {"b": [{}]}})


@pytest.mark.parametrize("way", DAMAGE)
def test_damage_is_one_line_or_is_left_out(way: str, run: Path, capsys) -> None:
    DAMAGE[way](run)
    try:
        report.write([collect.read(run)], run.parent, {"html", "markdown", "latex", "csv"})
    except NecoError as error:
        assert str(run) in str(error) and "\n" not in str(error) and len(str(error)) < 600


@pytest.mark.parametrize("file", ["results.json", "environment.json", "status.json", "pictures/shown.json"])
def test_every_value_of_another_type_is_one_line_or_is_shown(file: str, run: Path) -> None:
    (run / "environment.json").write_text(json.dumps({"choices": {"a": "b"}, "packages": {"a": "1"}, "git": "x"}))
    (run / "status.json").write_text(json.dumps({"status": "done", "job": 0, "overrides": ["a"], "message": "m"}))
    change_record(
        run, saved={"a": "b"}, fraction=0.5, seconds=1.0, peak_memory_gb=1.0, model="m", state="", checkpoint="c",
        split="val", show=1, details={"miou": {"iou": {"b": 0.5}, "std": 0.1}},
    )  # fmt: skip
    sound = json.loads((run / file).read_text())
    node = sound[-1] if isinstance(sound, list) else sound
    refused = shown = 0
    for key in [*node, *(["pictures.file", "details.iou"] if file == "results.json" else [])]:
        for value in VALUES:
            changed = json.loads(json.dumps(sound))
            target = changed[-1] if isinstance(changed, list) else changed
            if key == "pictures.file":
                target["pictures"][0]["file"] = value
            elif key == "details.iou":
                target["details"]["miou"]["iou"] = value
            else:
                target[key] = value
            (run / file).write_text(json.dumps(changed))
            try:
                report.write([collect.read(run)], run.parent, {"html", "markdown", "latex", "csv"})
                shown += 1
            except NecoError as error:
                assert "\n" not in str(error)
                refused += 1
    assert shown and (refused or file == "status.json"), "without a status it is a run like any other"


def test_results_of_others_are_kept_as_they_are(run: Path) -> None:
    change_record(run, ours="unknown")
    records = Results(run).records
    assert records[-1]["ours"] == "unknown" and records[0]["fraction"] == 1.0 and Results(run.parent).records == []
