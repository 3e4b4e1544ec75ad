"""results.json and metrics.csv: whole files, each step once, also after a resume."""

import csv
import json
import os
import subprocess
from pathlib import Path

import pytest

from neco.logger.base import About
from neco.logger.csv import Csv
from neco.runs import folder, results
from neco.utils.errors import NecoError


def record(step, network="teacher", value=0.5, evaluation="retrieval", asked="k=30"):
    return {
        "step": step, "network": network, "evaluation": evaluation, "weights": "abc", "dataset": "shapes",
        "protocol": "p", "asked": asked, "metrics": {"miou": value},
    }  # fmt: skip


def test_results_replace_and_forget(tmp_path):
    store = results.Results(tmp_path)
    for step in (0, 5, 10):
        store.add(record(step))
    store.add(record(5, value=0.7))
    again = results.Results(tmp_path)
    assert [(r["step"], r["metrics"]["miou"]) for r in again.records] == [(0, 0.5), (10, 0.5), (5, 0.7)]
    again.drop_after(5)
    assert sorted(r["step"] for r in json.loads((tmp_path / "results.json").read_text())) == [0, 5]
    wanted = {"step": 5, "network": "teacher", "evaluation": "retrieval", "weights": "abc"}
    assert again.find(**wanted)["metrics"] == {"miou": 0.7}
    assert again.find(**wanted | {"weights": "others"}) is None and again.find(**wanted | {"asked": "k=4"}) is None
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_what_was_asked_otherwise_is_another_number(tmp_path):
    store = results.Results(tmp_path)
    for step, value in ((0, 0.9), (5, 0.8)):
        store.add(record(step, value=value))
    for step, value in ((0, 0.1), (5, 0.2)):
        store.add(record(step, value=value, asked="k=4"))
    assert len(store.records) == 4
    assert store.history("retrieval/teacher/miou") == [(0, 0.1), (5, 0.2)]
    changes = [line.split()[-1] for line in results.table(store.records).splitlines() if " teacher  " in line]
    assert changes == ["-10.00", "+10.00"]


SPOILT = {"0.step": {"step": None}, "0.metrics": {"metrics": []}, "0.metrics.miou": {"metrics": {"miou": "a"}}}


@pytest.mark.parametrize("said", SPOILT)
def test_a_record_of_other_types_is_damaged(tmp_path, said):
    (tmp_path / "results.json").write_text(json.dumps([{**record(0), **SPOILT[said]}]))
    with pytest.raises(NecoError, match=rf"results\.json is damaged \(.*{said}"):
        results.Results(tmp_path)


@pytest.mark.parametrize("text", ["[{", '{"a": 1}', "[1]"])
def test_a_damaged_file_is_named_and_kept(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(NecoError, match=r"results\.json is damaged"):
        results.Results(tmp_path)
    assert (tmp_path / "results.json").read_text() == text


def test_table_shows_before_after_and_change():
    text = results.table([record(0, value=0.25), record(8, value=0.5)])
    assert "25.00" in text and "50.00" in text and "+25.00" in text and "in percent" in text
    assert "change" not in results.table([record(0)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tracker(folder: Path, step: int = 0, rows: int | None = None) -> Csv:
    csv = Csv()
    csv.start(About(folder, step, {}, "", None, [], rows))
    return csv


def test_csv_has_each_step_once_after_a_resume(tmp_path):
    log = tracker(tmp_path)
    for step in (1, 2, 3, 4):
        log.metrics({"loss": step / 10}, step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5,0.")  # killed in the middle of a row
    log = tracker(tmp_path, 2)
    log.metrics({"loss": 0.35, "new": 1}, 3)
    found = rows(tmp_path / "metrics.csv")
    assert [row["step"] for row in found] == ["1", "2", "3"]
    assert found[-1] == {"step": "3", "loss": "0.35", "new": "1"} and found[0]["new"] == ""


@pytest.mark.parametrize(
    ("spoil", "left", "kept"),
    [
        (lambda text: text.replace(b"2,0.2", b"2,0.\xff"), ["1", "3", "4"], True),
        (lambda text: text.replace(b"2,0.2", b"\0\0\0\0\0"), ["1", "3", "4"], True),
        (lambda text: text.replace(b"step", b"st\xfep"), [], True),
        (lambda text: b"", [], False),
        (lambda text: text.replace(b"2,0.2\r\n", b""), ["1", "3", "4"], False),
    ],
)
def test_damaged_lines_are_set_aside_and_missing_ones_told(tmp_path, caplog, spoil, left, kept):
    log, path, aside = tracker(tmp_path), tmp_path / "metrics.csv", tmp_path / "metrics.damaged.csv"
    for step in (1, 2, 3, 4):
        log.metrics({"loss": step / 10}, step)
    path.write_bytes(damaged := spoil(path.read_bytes()))
    log = tracker(tmp_path, 4, rows=4)
    log.metrics({"loss": 0.5}, 5)
    assert [row["step"] for row in rows(path)] == [*left, "5"]
    assert f"metrics.csv has {len(left)} of the 4 rows up to step 4" in caplog.text
    assert aside.read_bytes() == damaged if kept else not aside.exists()


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    results.write(path, "first")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(NecoError, match=r"cannot write .*a\.txt: disk full"):
        results.write(path, "second")
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]


def checkout(folder: Path) -> str:
    """A checkout that has a file of our package; returns its revision."""
    (folder / "neco/runs").mkdir(parents=True)
    (folder / "neco/runs/results.py").touch()
    as_us = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*as_us, *command], check=True)
    return subprocess.run([*as_us, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def test_the_git_revision_of_anybodys_checkout_or_why_there_is_none(tmp_path, monkeypatch):
    revision = checkout(tmp_path / "ours")
    assert folder.git_state(tmp_path / "ours/neco/runs") == {"git": revision}
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # a clone of another user
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as git sets it for its hooks
    assert folder.git_state(tmp_path / "ours/neco/runs") == {"git": revision}
    (tmp_path / "ours/neco/runs/results.py").write_text("changed")
    assert folder.git_state(tmp_path / "ours/neco/runs") == {"git": f"{revision}+changes"}
    (tmp_path / "other/neco/runs").mkdir(parents=True)
    none = folder.git_state(tmp_path / "other/neco/runs")
    assert none["git"] is None and "not a git repository" in str(none["git_problem"])
    subprocess.run(["git", "init", "-q", tmp_path / "other"], check=True, env={"PATH": os.environ["PATH"]})
    assert folder.git_state(tmp_path / "other/neco/runs")["git_problem"] == "installed inside another checkout"
    monkeypatch.setenv("PATH", "")
    assert folder.git_state(tmp_path / "ours/neco/runs") == {
        "git": None,
        "git_problem": "git: No such file or directory",
    }
