"""A sweep: one run for each combination, by every launcher and sweeper, and what they say together."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, SMALL, losses
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from neco.config import discovery, validate
from neco.runs.status import status
from neco.sweep.jobs import Job
from neco.sweep.launcher import Launcher, name
from neco.sweep.summary import summary
from neco.utils.errors import NecoError

RECORD = {"network": "student", "evaluation": "retrieval", "protocol": "p", "weights": "w", "dataset": "d"}


def run(folder, name, overrides, *numbers, status="done"):
    """Status and results of a run: the student's miou at step 0, 5, ..."""
    place = folder / name
    place.mkdir()
    said = {"status": status, "job": 0, "objective": None, "overrides": ["sweep=loss", *overrides]}
    (place / "status.json").write_text(json.dumps(said))
    records = [{**RECORD, "step": 5 * i, "metrics": {"miou": number}} for i, number in enumerate(numbers)]
    (place / "results.json").write_text(json.dumps(records))


def test_summary_is_mean_and_deviation_over_seeds(tmp_path):
    run(tmp_path, "a0", ["loss=a", "seed=0"], 0.25, 0.9, 0.5)
    run(tmp_path, "a1", ["loss=a", "seed=1", "launcher.detach=true"], 0.5, 0.9, 1.0)
    run(tmp_path, "b0", ["loss=b", "seed=0"], 0.25, 0.125)
    run(tmp_path, "b1", ["loss=b", "seed=1"], 0.25, status="queued")
    lines = [line.split("  ") for line in summary(tmp_path).splitlines()]
    before = [line[-1].strip() for line in lines if line[0] == "before"]
    found = {line[0].strip(): line[-1].strip() for line in lines}
    assert found["loss=a"] == "+37.50 ± 17.68 (2)" and found["loss=b"] == "-12.50 (1)"
    assert before == ["37.50 ± 17.68 (2)", "25.00 (1)"] and "retrieval/miou" in found["runs"]
    assert found["loss=b seed=1"] == "queued"
    assert "| loss=a | student | done | +37.50 ± 17.68 (2) |" in (tmp_path / "summary.md").read_text()
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = {row["folder"]: row for row in csv.DictReader(file)}
    assert rows["a1"]["retrieval/miou"] == "1.0" and rows["a1"]["retrieval/miou before"] == "0.5"
    assert rows["b1"]["status"] == "queued" and len(rows) == 4


def test_summary_of_runs_with_one_step_is_their_number(tmp_path):
    run(tmp_path, "0", ["model=x"], 0.25)
    run(tmp_path, "1", ["model=y"], 0.5)
    said = summary(tmp_path)
    assert "model=x  student  done    25.00 (1)" in said and "before" not in said and "sweep=loss" not in said
    assert "no jobs" in summary(tmp_path / "0")


def test_before_is_of_the_same_runs_once_and_of_step_0_alone(tmp_path):
    for data, number in (("x", 0.25), ("y", 0.5)):
        for loss in ("a", "b"):
            for seed in range(3):
                run(tmp_path, f"{data}{loss}{seed}", [f"dataset={data}", f"loss={loss}", f"seed={seed}"], number, 0.75)
    rows = [line for line in summary(tmp_path).splitlines() if line.startswith(("before", "dataset="))]
    assert [row.split()[0] for row in rows] == [
        *["before", "dataset=x", "dataset=x"],
        *["before", "dataset=y", "dataset=y"],
    ]
    assert [row.split("  ")[-1].strip() for row in rows[::3]] == ["25.00 ± 0.00 (3)", "50.00 ± 0.00 (3)"]
    later = tmp_path / "later"
    later.mkdir()
    run(later, "0", ["seed=0"], 0.25, 0.5, 0.75)
    run(later, "1", ["seed=1"], 0.25, 0.5, 1.0)
    for path in later.glob("*/results.json"):  # task=finetune has none before it trains
        path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    said = summary(later)
    assert "before" not in said and "87.50 ± 17.68 (2)" in said and "+" not in said
    assert "before" not in (later / "summary.csv").read_text()


def test_summary_of_damaged_files_and_numbers_that_are_none(tmp_path, capsys):
    for i in range(5):
        run(tmp_path, f"{i}", ["loss=a", f"seed={i}"], math.nan if i else 0.5)
    (tmp_path / "2/results.json").write_text("[{")
    for i, text in ((3, '{"status": "do'), (4, "[]")):
        (tmp_path / f"{i}/status.json").write_text(text)
    said = summary(tmp_path)
    assert "nan ± nan (2)" in said and re.search(r"^seed=2 +damaged", said, re.MULTILINE)
    assert f"{tmp_path / '2/results.json'} is damaged" in said
    told = sorted(capsys.readouterr().err.splitlines())
    assert all(f"{tmp_path / f'{i}/status.json'} is damaged" in line for i, line in zip((3, 4), told, strict=True))


EVAL = (
    "task=eval", "model=tiny", "dataset=shapes", "weights=none", "dataset.train=12", "dataset.val=4",
    "eval=overcluster", "eval.overcluster.size=64",
    "eval.overcluster.k=4", "eval.overcluster.restarts=1", "extract.workers=0", "report=false", "run_dir=out",
)  # fmt: skip
TINY = (*SMALL, "train.steps=2", "eval=overcluster", "eval.overcluster.k=4", "loss.grid=3", "run_dir=out")


def test_a_sweep_is_its_runs_and_a_table(inside, tmp_path):
    few = ["hydra.sweeper.params.loss='neco,cosine'", "hydra.sweeper.params.seed='3'"]
    code, said = inside("sweep=loss", *few, *TINY)
    assert code == 0, said
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {
        f"seed-3+loss-{loss}" for loss in ("neco", "cosine")
    }
    assert losses(tmp_path / "out/seed-3+loss-neco") != losses(tmp_path / "out/seed-3+loss-cosine")
    table = said[said.index("runs  ") :].splitlines()[:7]
    assert [line.split()[0] for line in table[2:]] == ["before", *["loss=neco"] * 2, *["loss=cosine"] * 2]
    assert all(line.endswith("(1)") for line in table[2:])
    whole = said[said.index("runs  ") :].splitlines()[:9]
    assert whole[7].startswith("(n): runs") and whole[8].startswith("protocol  overcluster: overcluster/standard/")
    assert (tmp_path / "out/summary.txt").read_text().splitlines() == whole
    page = (tmp_path / "out/report.html").read_text()
    assert "\nreport out/report.html" in said and "2 runs" in page and "seed-3+loss-cosine" in page


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    (
        (["model=tiny", "eval.overcluster.k=9", "seed=0"], "model-tiny+k-9"),
        (["eval.overcluster.k=9", "+eval.linear.k=1"], "eval.overcluster.k-9+eval.linear.k-1"),
        (["+eval.linear.k=[1,null]"], "k-1_null-4706d5b3"),
        (["seed=0"], "."),
    ),
)
def test_a_job_is_called_what_it_changes(overrides, wanted):
    changing = {"model", "eval.overcluster.k", "+eval.linear.k"}
    assert name(overrides, changing) == wanted
    assert validate.load(f"checkpoint=runs/{wanted}").run.checkpoint == f"runs/{wanted}", "Hydra takes it unquoted"


def test_names_are_short_and_tell_all_jobs_apart():
    several = [[f"model={'x' * 200}{i}", f"optim.lr=0.00012345678{i}", "checkpoint=a/b c.pth"] for i in range(3)]
    names = [name(job, {"model", "optim.lr", "checkpoint"}) for job in several]
    assert len({*names}) == 3 and all(len(n) <= 100 and "/" not in n for n in names)
    assert names[0] == name([*several[0], "run_dir=out"], {"model", "optim.lr", "checkpoint"})
    assert name(["lr=0.000123456789"], {"lr"}).startswith("lr-0.000123-")
    assert len({name([f"k={value}"], {"k"}) for value in ("4", "[4]", "'4'", "[[4]]")}) == 4


def test_jobs_in_one_folder_are_the_same_or_refused(inside, tmp_path):
    code, said = inside("-m", *EVAL, "seed=0,1", "hydra.sweep.subdir=x")
    assert code == 2 and "out/x would be the folder of two jobs: " in said and not (tmp_path / "out/x").exists()
    code, said = inside("-m", *EVAL, "seed=0,0")
    assert code == 0 and said.count("seed-0/results.json") == 1


def test_done_before_means_with_these_weights_and_results(inside, tmp_path):
    job = ["-m", *(o for o in EVAL if o != "weights=none"), "checkpoint=w.safetensors", "seed=0,1"]
    shutil.copy(ROOT / "neco/model/tiny.safetensors", tmp_path / "w.safetensors")
    assert inside(*job)[0] == 0 and "done before  out/seed-0" in inside(*job)[1]
    (tmp_path / "w.safetensors").touch()
    assert "done before  out/seed-0" in inside(*job)[1], "the same weights"

    def retrain():
        state = load_file(tmp_path / "w.safetensors")
        save_file({key: value + 1e-3 for key, value in state.items()}, tmp_path / "w.safetensors")

    for spoil in (retrain, (tmp_path / "out/seed-0/results.json").unlink):
        spoil()
        code, said = inside(*job)
        assert code == 0 and "done before  out/seed-0" not in said and (tmp_path / "out/seed-0/results.json").is_file()
    (tmp_path / "out/seed-0/results.json").write_text("[{")
    code, said = inside(*job)
    assert code == 0 and "out/seed-0/results.json is damaged: kept as results.damaged.json" in said
    assert (tmp_path / "out/seed-0/results.damaged.json").read_text() == "[{"
    assert "done before  out/seed-0" in inside(*job)[1]


def test_a_job_is_another_one_with_other_given_masks(tmp_path):
    (tmp_path / "masks").mkdir()
    node = {"unsupervised": {"masks": str(tmp_path / "masks")}, "retrieval": {}}
    found = set()
    for content in ("0", "1", "1"):
        (tmp_path / "masks/0.png").write_text(content)
        config = OmegaConf.create({"cache_dir": str(tmp_path / "cache"), "eval": node})
        found.add(Job(config, []).digest)
    assert len(found) == 2


def test_done_before_means_with_this_data(inside, tmp_path):
    for kind in ("i", "m"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for n in range(6):
            Image.new("L", (16, 16), n % 2 if kind == "m" else 40 * n).save(tmp_path / f"data/{kind}/{n}.png", "BMP")
    data = ["dataset=folder", "dataset.root=data/i", "dataset.masks=data/m", "dataset.classes=[a,b]"]
    job = ["-m", *(o for o in EVAL if not o.startswith("dataset.")), *data, "dataset.val_fraction=0.5", "seed=0,1"]
    assert inside(*job)[0] == 0 and inside(*job)[1].count("done before  out/seed-") == 2
    before = (tmp_path / "data/m/1.png").stat()
    for n in range(6):  # of the same size and time
        Image.new("L", (16, 16), 1).save(tmp_path / f"data/m/{n}.png", "BMP")
        os.utime(tmp_path / f"data/m/{n}.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    code, said = inside(*job)
    assert code == 0 and "again        out/seed-0: " in said and "done before" not in said
    assert len(json.loads((tmp_path / "out/seed-0/results.json").read_text())) == 2
    (tmp_path / "data").rename(tmp_path / "away")
    code, said = inside(*job)
    assert code == 0 and said.count("not compared out/seed-") == said.count("done before") == 2


def test_what_another_job_says_in_the_folder_is_not_taken_for_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    cfg = OmegaConf.create(
        {"hydra": {"sweep": {"dir": str(tmp_path), "subdir": "x"}, "job": {"num": 0}, "overrides": {"task": []}}}
    )
    over = SimpleNamespace(ended=lambda *about: True, fate=lambda started: "ended without a word")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/status.json").write_text(
        json.dumps({"status": "done", "objective": 0.5, "config": "another", "job": 0, "overrides": []})
    )
    launcher, job = Launcher("local"), Job(cfg, [], over)
    launcher.folder = tmp_path
    launcher.wait({job: None})
    assert job.said["status"] == "failed" and job.said.get("objective") is None


def test_one_that_fails_does_not_end_the_others_and_those_done_are_left_out(inside, tmp_path):
    jobs = ["-m", *TINY, "eval.overcluster.k=4,many", "checkpoint=null"]
    code, said = inside(*jobs)
    assert said.index("failed       out/k-many") < said.index("evaluating"), "before any work"
    assert code == 2 and "jobs that did not end well: 1. To go on: python -m neco -m" in said
    assert "out/k-many: failed: eval.overcluster.k='many'" in said.replace(str(tmp_path), "")
    assert status(tmp_path / "out/k-many")["message"].startswith("eval.overcluster.k='many'")
    done = status(tmp_path / "out/k-4")
    assert done["status"] == "done" and 0 < done["objective"] < 1
    assert "many" in (tmp_path / "out/summary.csv").read_text()
    again = [o.replace("many", "5") for o in jobs]
    code, said = inside(*again)
    assert code == 0 and "done before  out/k-4" in said and status(tmp_path / "out/k-5")["status"] == "done"
    code, said = inside(*again, "train.steps=3")  # another job in the same place
    assert code == 2 and "done before" not in said and "train.steps: 2 -> 3" in said
    code, said = inside(*again, "sweep.skip_done=false")
    assert (
        code == 0
        and "done before" not in said
        and said.count("all 2 steps are done; another run_dir trains again") == 2
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="runs as root, who can mount a small disk")
@pytest.mark.parametrize("launcher", ("sequential", "local"))
def test_a_full_disk_ends_jobs_but_not_the_sweep(inside, tmp_path, launcher):
    (tmp_path / "out").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path / "out"], capture_output=True
    ).returncode:
        pytest.skip("runs where a tmpfs can be mounted")
    try:
        code, said = inside("-m", f"hydra/launcher={launcher}", *EVAL, "seed=0,1,2,3")
    finally:
        subprocess.run(["umount", "--lazy", tmp_path / "out"], check=True)
    assert code == 2 and "jobs that did not end well: " in said and "To go on: python -m neco -m" in said
    assert "out/seed-3: failed: " in said and "No space left" in said
    assert ("runs  " in said or launcher == "local") and "Logging error" not in said and "Traceback" not in said


def test_a_table_that_cannot_be_written_is_printed_and_an_error(inside, tmp_path):
    (tmp_path / "out/summary.txt").mkdir(parents=True)
    code, said = inside("-m", *EVAL, "seed=0,1")
    assert code == 2 and "error: cannot write out/summary.txt: Is a directory" in said and "(n): runs" in said


def test_a_fault_of_the_program_in_a_job_is_told_with_its_traceback(inside, tmp_path, monkeypatch):
    from neco.task import train

    def broken(settings):
        return {}[settings.run.seed]

    monkeypatch.setattr(train, "prepare", broken)
    code, said = inside("-m", *TINY, "seed=0,1")
    assert code == 2 and said.count("Traceback") == 2 and "out/seed-1: failed: KeyError: 1" in said


def test_several_devices_in_a_sweep_need_a_launcher(inside, tmp_path):
    code, said = inside("-m", *TINY, "seed=0,1", "train.devices=2")
    assert code == 2 and "2 devices for a job of a sweep" in said and "hydra/launcher=local" in said
    assert "torchrun" in said and not (tmp_path / "out/seed-0").exists()


@pytest.mark.parametrize(
    ("cluster", "key", "message"),
    (
        (
            "slurm",
            "launcher.partion=main",
            "launcher.partion: no such key or group; did you mean 'launcher.partition'?",
        ),
        ("slurm", "launcher.time=soon", "launcher.time='soon': input should be a valid integer"),
        ("local", "launcher.time=1", "launcher.signal_seconds=90 is more than launcher.time=1.0 has"),
        ("local", "launcher.detach=true", "launcher.detach: a key of hydra/launcher=slurm, not of this command"),
    ),
)
def test_wrong_keys_of_a_launcher_are_told_before_anything_is_started(inside, tmp_path, cluster, key, message):
    code, said = inside(f"hydra/launcher={cluster}", *TINY, "seed=0,1", key)
    assert code == 2 and message in said and not (tmp_path / "out/.submitit").exists()


def test_slurm_that_is_not_there(inside, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, said = inside("hydra/launcher=slurm", *TINY)
    assert code == 2 and "there is no sbatch here; hydra/launcher=local needs no SLURM" in said


@pytest.mark.slow
def test_jobs_as_processes(neco, tmp_path):
    wrong = str(tmp_path / "none.pth")
    jobs = [
        "hydra/launcher=local",
        *SMALL,
        "run_dir=out",
        "train.steps=2",
        "device=cpu",
        "train.devices=2",
        "launcher.parallel=2",
    ]
    done = neco(*jobs, f"checkpoint=null,{wrong}", "weights=auto", ok=False)
    ended = {path.parent.name: status(path.parent)["status"] for path in tmp_path.glob("out/*/status.json")}
    assert ended.pop("checkpoint-null") == "done" and [*ended.values()] == ["failed"], done.stderr
    assert done.stderr.count("none.pth: no such file") >= 2 and "jobs that did not end well: 1" in done.stderr
    good = tmp_path / "out/checkpoint-null"
    assert len(losses(good)) == 2 and "2 processes (ddp)" in (good / "output_0.txt").read_text()
    assert len([*good.glob("output_*.txt")]) == 2 and "| done |" in (tmp_path / "out/summary.md").read_text()


SEARCH = ("hydra/sweeper=optuna", *TINY, "optim.head_lr=choice(1e-3,-1)", "optim.lr=tag(log, interval(1e-5, 1e-2))")


def test_search(inside, tmp_path):
    optuna = pytest.importorskip("optuna", reason="runs where optuna is installed")
    code, said = inside(*SEARCH, "loss.grid=range(2, 4)", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2")
    study = optuna.load_study(study_name="neco", storage=f"sqlite:///{tmp_path / 'out/study.db'}")
    states = [trial.state.name for trial in study.trials]
    assert len(states) == 4 and {*states} == {"COMPLETE", "FAIL"}, said
    assert all((t.state.name == "FAIL") == (t.params["optim.head_lr"] == "-1") for t in study.trials)
    assert all(1e-5 <= t.params["optim.lr"] <= 1e-2 and t.params["loss.grid"] in (2, 3) for t in study.trials)
    best = yaml.safe_load((tmp_path / "out/best.yaml").read_text())
    assert best["value"] == study.best_value == max(t.value for t in study.trials if t.value is not None)
    job = status(tmp_path / best["folder"])
    assert job["objective"] == best["value"] and job["objective_name"] == best["objective"]
    assert (
        best["objective"].split("/")[1] == "teacher" and f"{best['objective']} {100 * best['value']:.2f} % with" in said
    )
    assert code == 2 and f"jobs that did not end well: {states.count('FAIL')}" in said
    cut = study.ask(study.trials[0].distributions)  # as a search leaves it that is killed
    inside(*SEARCH, "loss.grid=range(2, 4)", "hydra.sweeper.n_trials=6")
    assert study.trials[cut.number].state.name in ("COMPLETE", "FAIL"), "the same command goes on with it first"
    values = [trial.params["optim.lr"] for trial in study.trials]
    assert len(values) == len({*values}) == 6, "and with others than before"


def test_a_search_goes_on_only_as_the_same_one(inside, tmp_path):
    pytest.importorskip("optuna", reason="runs where optuna is installed")
    jobs = ["hydra/sweeper=optuna", *EVAL[:-1], "seed=0,1", "hydra.sweeper.n_trials=1"]
    jobs += [
        f"hydra.sweeper.storage='sqlite:///{tmp_path}/s.db'",
        "+hydra.sweeper.params={eval.overcluster.iterations:20}",
    ]
    assert inside(*jobs, "run_dir=out")[0] == 0
    assert (tmp_path / yaml.safe_load((tmp_path / "out/best.yaml").read_text())["folder"] / "results.json").is_file()
    for changed, message in (
        (["run_dir=out", "hydra.sweeper.direction=minimize"], "direction was maximize, is minimize"),
        (["run_dir=out", "dataset.seed=5"], "fixed was "),
        (["run_dir=out", "dataset.seed=5,6"], "searched was ['seed'], is ['dataset.seed', 'seed']"),
        (["run_dir=other"], f"run_dir was {tmp_path}/out, is {tmp_path}/other"),
    ):
        code, said = inside(*jobs, *changed)
        assert code == 2 and f"hydra.sweeper.storage holds another search ({message}" in said
    code, said = inside(*jobs, "run_dir=out", "debug=false", "hydra.sweeper.n_trials=2")
    assert code == 0 and "best of 2 trials" in said
    (tmp_path / "out/study.db").write_text("garbage" * 1000)
    code, said = inside(*jobs, "run_dir=out", "hydra.sweeper.storage=null")
    assert code == 2 and "out/study.db: cannot be opened as a study of Optuna: " in said and "SQL:" not in said


def test_search_needs_optuna_and_something_to_search(inside, monkeypatch):
    code, said = inside("hydra/sweeper=optuna", *TINY)
    assert code == 2 and "nothing to search" in said
    code, said = inside("hydra/sweeper=optuna", *TINY, "seed=0,1", "hydra.sweeper.n_trials=0")
    assert code == 2 and "hydra.sweeper.n_trials=0: input should be greater" in said
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, said = inside(*SEARCH)
    assert code == 2 and "pip install 'neco[optuna]'" in said


SWEPT = {  # where the values are too large for here
    "train_data": "shapes",
    "batch_size": "2,4",
    "grid": "2,3",
    "k": "null,4",
    "paper_eval": "shapes",
    "loss": "neco,leopart",
}


@pytest.mark.parametrize("name", discovery.options("sweep"))
def test_every_sweep_changes_one_thing_and_runs(name, inside, tmp_path):
    node = yaml.safe_load((discovery.folder() / f"sweep/{name}.yaml").read_text())
    params = node["hydra"]["sweeper"]["params"]
    (key,) = (key for key in params if key not in ("seed", "model"))
    values = SWEPT.get(name, str(params[key]).strip("'"))
    small = [o for o in SMALL if not o.startswith(f"{key}=")] + ["train.steps=2", "seed=0"]
    if name == "k":
        small = ["dataset.train=6", "dataset.val=5", "weights=none", "eval.overcluster.seeds=[0]"]
    if name == "paper_eval":
        dropped = [f"eval.{e}.drop_last=2" for e in ("linear", "overcluster", "retrieval")]
        small = ["dataset.train=6", "dataset.val=5", "weights=none", "eval.linear.epochs=1", *dropped]
        small += ["eval.overcluster.k=[null,9]", "eval.overcluster.seeds=[0]"]
    code, said = inside(f"sweep={name}", "model=tiny", "dataset=shapes", *small, f"{key}={values}", "run_dir=out")
    assert code == 0, said
    runs = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert len(runs) == {"steepness": 5, "crop_scale": 3}.get(name, len(values.split(",")))
    if name == "k":
        assert {run.name for run in runs} == {"k-null", "k-4"}
    elif name == "paper_eval":
        metrics = [r["metrics"] for r in json.loads((runs[0] / "results.json").read_text())]
        assert [*map(len, metrics)] == [1, 2, 1] and metrics[1].keys() == {"miou_k8", "miou_k9"}
    else:
        assert all(len(losses(run)) == 2 for run in runs)


def test_loss_sweep_has_every_loss():
    params = yaml.safe_load((discovery.folder() / "sweep/loss.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert sorted(params["loss"].split(",")) == discovery.options("loss")


def test_keys_of_a_preset_for_another_loss_fall_away(caplog):
    with caplog.at_level("INFO", "neco"):
        chosen = validate.load("experiment=demo", "loss=cosine")
    assert chosen.config["loss"] == {"_target_": "neco.loss.cosine.Cosine", "grid": 5, "mask": "all"}
    assert "experiment=demo without loss.steepness: loss=cosine has none" in caplog.text
    assert validate.load("experiment=demo", "loss=shuffled").config["loss"]["steepness"] == [100, 1000]
    for wrong in (["loss.steepness=5"], ["+loss.stepness=5"]):
        with pytest.raises(NecoError, match=wrong[0].strip("+").split("=")[0]):
            validate.load("experiment=demo", "loss=cosine", *wrong)


@pytest.mark.slow
def test_an_interrupted_sweep_says_how_to_go_on(tmp_path, cache):
    command = [sys.executable, "-m", "neco", "sweep=loss", *TINY[:-1], "train.steps=500", "run_dir=out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    limit = time.monotonic() + 120
    while not (tmp_path / "out/seed-0+loss-neco/metrics.csv").is_file():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "python -m neco sweep=loss" in said and said.rstrip().endswith("run_dir=out")
    assert not (tmp_path / "out/seed-0+loss-shuffled").exists()
    assert status(tmp_path / "out/seed-0+loss-neco")["status"] == "stopped"
