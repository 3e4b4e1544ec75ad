"""Trackers: what an offline run stored, resumed, failed and swept runs, and trackers that are broken or hang."""

import atexit
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, SMALL, losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neco.config import validate
from neco.logger import background, trackers, wandb
from neco.logger.base import About, Tracker
from neco.runs.results import Results, comparison
from neco.training import callbacks
from neco.utils import signals
from neco.utils.errors import NecoError

WATCH = ("eval=overcluster", "eval.overcluster.k=4", "eval.overcluster.restarts=1")
FEW = ("dataset.train=12", "dataset.val=4", "extract.workers=0", "weights=none")


def history(path: Path, data: bytes) -> list[Any]:
    path.write_bytes(data)
    return [record for record in wandb.records(path) if record.HasField("history")]


def offline(folder: Path, *but: Path) -> list[SimpleNamespace]:
    """What W&B stored of a run folder, by start: run, config, history by step, summary, exit code, preempting."""
    found, paths = [], set(folder.glob("wandb/offline-run-*/*.wandb")) - {*but}
    for path in sorted(paths, key=lambda path: path.stat().st_ctime_ns):
        end = time.monotonic() + 30
        while not (
            records := [r for r in wandb.records(path) if r.HasField("exit")]
        ):  # its service writes on for a moment
            assert time.monotonic() < end
            time.sleep(0.05)
        records = wandb.records(path)
        run = SimpleNamespace(
            about=next(r.run for r in records if r.HasField("run")), config={}, history={}, summary={}
        )
        for record in records:
            for name, part in (("config", record.config.update), ("summary", record.summary.update)):
                getattr(run, name).update((i.key or "/".join(i.nested_key), json.loads(i.value_json)) for i in part)
            if record.HasField("history"):
                row: dict[str, Any] = {}
                for item in record.history.item:
                    *path_to, last = [item.key] if item.key else item.nested_key
                    place = row
                    for name in path_to:
                        place = place.setdefault(name, {})
                    place[last] = json.loads(item.value_json)
                run.history[row["_step"]] = row
        run.code = next(r.exit.exit_code for r in records if r.HasField("exit"))
        run.preempting = any(r.HasField("preempting") for r in records)
        run.files = path.parent / "files"
        found.append(run)
    return found


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def text(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_a_run_is_read_back(train) -> None:
    folder = train(*WATCH, "logger=[csv,wandb,tensorboard]", "show=1", "train.steps=3", "logger.wandb.tags=[mine]")
    (run,), board = offline(folder), events(folder)
    assert run.code == 0 and run.summary["ended"] == "success" == text(board, "ended")
    assert run.about.run_id == (folder / "wandb_id.txt").read_text()
    assert [*run.about.tags] == ["tiny", "shapes", "neco", "mine"] and run.about.job_type == "train"
    assert run.about.display_name.startswith("dataset.train=12") and "run_dir" not in run.about.display_name
    wanted = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: run.config[key] for key in wanted} == wanted
    assert yaml.safe_load(text(board, "config").strip("`\n")) == wanted
    for column in ("loss", "kl", "images_per_second", "data_wait", "peak_memory_gb"):
        values = losses(folder, column)
        assert [run.history[step][column] for step in (1, 2, 3)] == values
        assert [e.value for e in board.Scalars(column)] == pytest.approx(values, rel=1e-6)
    records = json.loads((folder / "results.json").read_text())
    assert {r["step"] for r in records} == {0, 3}
    for record in records:
        step, place = record["step"], f"overcluster/{record['network']}"
        value = record["metrics"]["miou_k4"]
        assert run.history[step][f"eval/{place}/miou_k4"] == value
        assert {e.step: e.value for e in board.Scalars(f"eval/{place}/miou_k4")}[step] == pytest.approx(value)
        assert run.summary[f"about/{place}/protocol"] == record["protocol"] == text(board, f"about/{place}/protocol")
        kinds = [picture["kind"] for picture in record["pictures"]]
        assert len(kinds) == 3 == len({*kinds})
        for kind in kinds:
            (name,) = run.history[step][f"pictures/{place}/{kind}"]["filenames"]
            assert (run.files / name).is_file()
            assert step in [image.step for image in board.Images(f"pictures/{place}/{kind}/0")]
        classes = json.loads((run.files / run.history[step][f"tables/{place}/classes"]["path"]).read_text())
        assert dict(classes["data"]) == record["details"]["miou_k4"]["iou"]
    table = json.loads((run.files / run.history[3]["results"]["path"]).read_text())
    head, *rows = comparison(records)
    assert (table["columns"], table["data"]) == (head, rows) and len(rows) == 2
    assert f"| {rows[0][4]:.4f} | {rows[0][5]:.4f} |" in text(board, "results")


def test_a_failed_run_is_marked_and_resumed_as_the_same(train, monkeypatch, tmp_path) -> None:
    options = ["logger=[csv,wandb,tensorboard]", "train.save_minutes=1e-9", "train.steps=4"]
    real = callbacks.Loop.on_train_batch_end

    def die(self, trainer, *arguments):
        if trainer.global_step == 3:  # logged, not saved
            self.track({"loss": 9.0}, 3)
            raise RuntimeError("no more")
        real(self, trainer, *arguments)

    monkeypatch.setattr(callbacks.Loop, "on_train_batch_end", die)
    with pytest.raises(RuntimeError, match="no more"):
        train(*options)
    assert text(events(tmp_path / "run"), "ended") == "failed"
    monkeypatch.undo()
    time.sleep(1)  # W&B names folders by the second
    folder = train(*options)
    first, second = offline(folder)
    assert (first.code, first.summary["ended"]) == (1, "failed") and (second.code, second.summary["ended"]) == (
        0,
        "success",
    )
    assert first.about.run_id == second.about.run_id
    assert [*first.history] == [1, 2, 3] and [*second.history] == [3, 4]
    board = events(folder)
    assert [e.step for e in board.Scalars("loss")] == [1, 2, 3, 4] and text(board, "ended") == "success"
    assert [e.value for e in board.Scalars("loss")] == pytest.approx(losses(folder))


def test_what_wandb_had_not_got_when_it_was_killed_comes_later(train) -> None:
    options = ["logger=[csv,wandb]"]
    folder = train(*options, "train.steps=4")
    (first,), (path,) = offline(folder), folder.glob("wandb/offline-run-*/*.wandb")
    assert [*first.history] == [1, 2, 3, 4]
    data = path.read_bytes()
    cut = next(n for n in range(len(data), 0, -1) if len(history(path, data[:n])) == 2)
    path.write_bytes(data[:cut])  # within a record
    train(*options, "train.steps=6", f"train.resume={folder}/checkpoints/last.ckpt")
    (second,) = offline(folder, path)
    assert second.about.run_id == first.about.run_id and [*second.history] == [3, 4, 5, 6]
    assert [second.history[step]["loss"] for step in (3, 4)] == [first.history[step]["loss"] for step in (3, 4)]


def test_an_interrupted_run_is_one_that_will_go_on(tmp_path) -> None:
    settings = validate.load("logger=wandb")
    with pytest.raises(signals.Interrupted), trackers.Trackers(settings, Results(tmp_path)):
        raise signals.Interrupted(2)
    (run,) = offline(tmp_path)
    assert run.preempting and (run.code, run.summary["ended"]) == (130, "interrupted")


def test_jobs_of_a_sweep_are_runs_of_a_group(inside, tmp_path) -> None:
    small = [override for override in SMALL if not override.startswith(("optim.lr", "train.steps"))]
    code, said = inside("-m", *small, "train.steps=1", "logger=wandb", "run_dir=out", "optim.lr=1e-3,2e-3", "seed=1")
    assert code == 0, said
    runs = [run.about for folder in (tmp_path / "out").iterdir() if folder.is_dir() for run in offline(folder)]
    assert len({run.run_id for run in runs}) == 2 and {run.run_group for run in runs} == {"out"}
    assert sorted(run.display_name for run in runs) == ["optim.lr=0.001", "optim.lr=0.002"]


def test_other_tasks_are_tracked(inside, finetune, tmp_path) -> None:
    code, said = inside("task=eval", *FEW, *WATCH, "logger=[wandb,tensorboard]", "run_dir=eval")
    assert code == 0, said
    folder = tmp_path / "eval"
    (record,), (run,) = json.loads((folder / "results.json").read_text()), offline(folder)
    key, value = "eval/overcluster/backbone/miou_k4", record["metrics"]["miou_k4"]
    assert run.history[0][key] == value and run.about.job_type == "eval" and "results" in run.history[0]
    assert events(folder).Scalars(key)[0].value == pytest.approx(value)
    board = events(finetune("finetune.steps=1", "logger=[csv,tensorboard]", folder="tuned"))
    assert len(board.Scalars("loss")) == 1 and len(board.Scalars("eval/segmentation/segmenter/miou")) == 1
    assert "segmentation" in text(board, "results")


class Raises(Tracker):
    wait = 5

    def metrics(self, row: Any, step: int) -> None:
        raise SystemExit("no disk")


class Sleeps(Tracker):
    """Hangs, as its library does at the end of the program."""

    def __init__(self, *, wait: float = 0.2) -> None:
        self.wait = wait

    def start(self, about: About) -> None:
        atexit.register(time.sleep, 600)
        time.sleep(600)


@pytest.fixture
def no_exit(monkeypatch):
    monkeypatch.setattr(atexit, "register", lambda *_: None)
    monkeypatch.setattr(background, "all_of_them", [])


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working folder with trackers of the user's own, those of this file."""
    (tmp_path / "logger").mkdir()
    for name in ("Raises", "Sleeps"):
        text = f"# @package logger.{name.lower()}\n_target_: test_logger.{name}\n"
        (tmp_path / f"logger/{name.lower()}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)


def test_broken_and_hanging_trackers_change_nothing(own, train, monkeypatch, caplog, no_exit) -> None:
    monkeypatch.setattr(background, "WAITING", 3)
    began = time.monotonic()
    plain, plain_took = train("train.steps=8", folder="plain"), time.monotonic() - began
    bad = [f"+logger.{name.lower()}._target_=test_logger.{name}" for name in ("Raises", "Sleeps")]
    began = time.monotonic()
    with caplog.at_level("INFO", "neco"):
        other = train(*bad, "train.steps=8", folder="other")
    assert time.monotonic() - began < plain_took + 2
    said = [r.message for r in caplog.records if r.name == "neco.logger.background"]
    assert len(said) == 2, said
    assert any("logger.raises" in line and "metrics: SystemExit: no disk" in line for line in said)
    assert any("logger.sleeps" in line and "3 entries wait" in line for line in said)
    one, two = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (plain, other))
    assert all(torch.equal(one[key], two[key]) for key in one) and losses(plain) == losses(other)


@pytest.mark.slow
def test_a_failed_program_ends_beside_a_hanging_tracker(own, neco) -> None:
    fails = ["optim.lr=1e9", "optim.head_lr=1e9", "train.steps=99", "logger=[csv,sleeps]"]
    began = time.monotonic()
    done = neco(*SMALL[:-1], *fails, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert time.monotonic() - began < 100
    assert done.returncode == 2 and "not a finite number" in done.stderr, done.stderr
    assert "it had 0.2 s after the end (logger.sleeps.wait)" in done.stderr


def test_one_that_is_slow_gets_its_time_unless_stopped_twice(monkeypatch, no_exit) -> None:
    told: list[str] = []

    class Slow(Tracker):
        wait = 20

        def finish(self, ended: Any) -> None:
            time.sleep(0.3)
            told.append(ended)

    for meant in (False, True):
        monkeypatch.setattr(signals, "meant", meant)
        slow = background.Guard("slow", Slow())
        slow.tell("finish", "success")
        slow.close()
        assert told == ["success"] and slow.dropped == meant


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def test_offline_by_itself(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(wandb, "REACH", 0.2)
    assert "no key" in wandb._unreachable()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", url := f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert f"{url} does not answer (timed out)" in wandb._unreachable()
    assert "refused" in wandb._unreachable()
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    assert wandb._unreachable() == ""
    server.shutdown()


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": ""}, "auto"),
        ({"WANDB_MODE": "online"}, "auto"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "false", "WANDB_MODE": "offline"}, "offline"),
    ],
)
def test_the_mode_of_the_environment_counts_unless_one_is_given(monkeypatch, environment, mode) -> None:
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb.Wandb().mode == mode
    for given in ("online", "offline", "disabled"):
        assert wandb.Wandb(mode=given).mode == given
    monkeypatch.setenv("WANDB_MODE", "of")
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    with pytest.raises(NecoError, match=r"logger\.wandb: WANDB_MODE=of: must be online, offline or disabled"):
        validate.load("logger=wandb")


def test_variables_of_the_environment_are_honoured(monkeypatch, tmp_path) -> None:
    names = {"PROJECT": "mine", "ENTITY": "us", "RUN_GROUP": "grouped", "TAGS": "one, two", "NAME": "called"}
    names |= {"NOTES": "noted", "JOB_TYPE": "trial", "DIR": str(tmp_path / "elsewhere"), "RUN_ID": "given"}
    for name, value in names.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "run").mkdir()
    with trackers.Trackers(validate.load("logger=wandb"), Results(tmp_path / "run")):
        pass
    (run,) = offline(tmp_path / "elsewhere")
    about = run.about
    assert (about.project, about.entity, about.run_group, about.display_name) == ("mine", "us", "grouped", "called")
    assert (about.notes, about.job_type, about.run_id) == ("noted", "trial", "given")
    assert {"one", "two", "tiny"} <= {*about.tags}
    given = [f"logger.wandb.{key}" for key in ("project=yours", "entity=them", "group=other", "tags=[three]")]
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "again"))
    with trackers.Trackers(validate.load("logger=wandb", *given), Results(tmp_path / "run")):
        pass
    (run,) = offline(tmp_path / "again")
    about = run.about
    assert (about.project, about.entity, about.run_group) == ("yours", "them", "other") and about.run_id == "given"
    assert "three" in about.tags and "one" not in about.tags


def test_disabled_keeps_nothing(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with trackers.Trackers(validate.load("logger=wandb"), Results(tmp_path)) as told:
        told.tell("metrics", {"loss": 1.0}, 1)
    assert not [*tmp_path.glob("wandb*")]


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_told_at_once(monkeypatch, name, package) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NecoError, match=rf"logger\.{name}: {name} is not installed .*pip install"):
        validate.load(f"logger={name}")


@pytest.mark.parametrize("fault", ["raise RuntimeError('no GLIBC')", "raise SystemExit('no GLIBC')"])
def test_a_broken_package_is_told_at_once(monkeypatch, tmp_path, fault) -> None:
    (tmp_path / "wandb.py").write_text(fault)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb")
    with pytest.raises(NecoError, match=r"logger\.wandb: wandb cannot be imported \(\w+: no GLIBC\): .*pip install"):
        validate.load("logger=wandb")


def test_an_unknown_tracker_of_several_is_named(inside) -> None:
    code, said = inside("logger=[csv,wand]")
    assert code == 2 and "logger=wand: no such option; did you mean 'wandb'?" in said and "search path" not in said


def test_an_empty_id_or_tag_is_none(tmp_path) -> None:
    (tmp_path / "wandb_id.txt").write_text("")
    with trackers.Trackers(validate.load("logger=wandb", "logger.wandb.tags=['',mine]"), Results(tmp_path)):
        pass
    (run,) = offline(tmp_path)
    assert run.about.run_id == (tmp_path / "wandb_id.txt").read_text() != ""
    assert "mine" in run.about.tags and "" not in run.about.tags
