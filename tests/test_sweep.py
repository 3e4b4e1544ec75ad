"""A sweep: one run for each combination, and what they say together."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import SMALL, losses

from neco import config
from neco.errors import NecoError
from neco.sweep import summary


def run(folder, name, overrides, *numbers):
    """Overrides and results of a run: the student's miou at step 0, 5, ..."""
    place = folder / name
    place.mkdir()
    (place / "overrides.txt").write_text("".join(f"{o}\n" for o in ("sweep=loss", *overrides)))
    records = [
        {"step": 5 * i, "network": "student", "evaluation": "retrieval", "metrics": {"miou": number}}
        for i, number in enumerate(numbers)
    ]
    (place / "results.json").write_text(json.dumps(records))


def test_summary_is_mean_and_deviation_over_seeds(tmp_path):
    run(tmp_path, "a0", ["loss=a", "seed=0"], 0.25, 0.9, 0.5)
    run(tmp_path, "a1", ["loss=a", "seed=1"], 0.5, 0.9, 1.0)
    run(tmp_path, "b0", ["loss=b", "seed=0"], 0.25, 0.125)
    run(tmp_path, "b1", ["loss=b", "seed=1"], 0.25)  # has only begun
    lines = [line.split("  ") for line in summary(tmp_path).splitlines()]
    found = {line[0].strip(): line[-1].strip() for line in lines}
    assert found["loss=a"] == "+0.3750 ± 0.1768 (2)" and found["loss=b"] == "-0.1250 (1)"
    assert found["before"] == "0.3750 ± 0.1768 (2)" and "retrieval/miou" in found["runs"]


def test_summary_of_runs_with_one_step_is_their_number(tmp_path):
    run(tmp_path, "0", ["model=x"], 0.25)
    run(tmp_path, "1", ["model=y"], 0.5)
    said = summary(tmp_path)
    assert "model=x  student  0.2500 (1)" in said and "before" not in said and "sweep=loss" not in said
    assert "no results" in summary(tmp_path / "0")


TINY = (*SMALL, "train.steps=2", "eval=overcluster", "eval.overcluster.k=4", "loss.grid=3", "run_dir=out")


def test_a_sweep_is_its_runs_and_a_table(inside, tmp_path):
    few = ["hydra.sweeper.params.loss='neco,cosine'", "hydra.sweeper.params.seed='3'"]
    code, said = inside("sweep=loss", *few, *TINY)
    assert code == 0, said
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {"neco-3", "cosine-3"}
    assert losses(tmp_path / "out/neco-3") != losses(tmp_path / "out/cosine-3")
    table = said[said.index("runs  ") :].splitlines()[:7]
    assert [line.split()[0] for line in table[2:]] == ["before", *["loss=cosine"] * 2, *["loss=neco"] * 2]
    assert all(line.endswith("(1)") for line in table[2:])
    assert (tmp_path / "out/summary.txt").read_text().splitlines() == said[said.index("runs  ") :].splitlines()[:7]


SWEPT = {  # where the values are too large for here
    "train_data": "shapes",
    "batch_size": "2,4",
    "grid": "2,3",
    "paper_eval": "shapes",
    "loss": "neco,leopart",
}


@pytest.mark.parametrize("name", config.options("sweep"))
def test_every_sweep_changes_one_thing_and_runs(name, inside, tmp_path):
    node = yaml.safe_load((config.folder() / f"sweep/{name}.yaml").read_text())
    params = node["hydra"]["sweeper"]["params"]
    (key,) = (key for key in params if key not in ("seed", "model"))
    values = SWEPT.get(name, str(params[key]).strip("'"))
    small = [o for o in SMALL if not o.startswith(f"{key}=")] + ["train.steps=2", "seed=0"]
    if name == "paper_eval":
        dropped = [f"eval.{e}.drop_last=2" for e in ("linear", "overcluster", "retrieval")]
        small = ["dataset.train=6", "dataset.val=5", "weights=none", "eval.linear.epochs=1", *dropped]
        small += ["eval.overcluster.k=[null,9]", "eval.overcluster.seeds=[0]"]
    code, said = inside(f"sweep={name}", "model=tiny", "dataset=shapes", *small, f"{key}={values}", "run_dir=out")
    assert code == 0, said
    runs = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert len(runs) == {"steepness": 5, "crop_scale": 3}.get(name, len(values.split(",")))
    if name == "paper_eval":
        metrics = [r["metrics"] for r in json.loads((runs[0] / "results.json").read_text())]
        assert [*map(len, metrics)] == [1, 2, 1] and metrics[1].keys() == {"miou_k8", "miou_k9"}
    else:
        assert all(len(losses(run)) == 2 for run in runs)


def test_loss_sweep_has_every_loss():
    params = yaml.safe_load((config.folder() / "sweep/loss.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert sorted(params["loss"].split(",")) == config.options("loss")


def test_keys_of_a_preset_for_another_loss_fall_away(caplog):
    with caplog.at_level("INFO", "neco"):
        chosen = config.load("experiment=demo", "loss=cosine")
    assert chosen.config["loss"] == {"_target_": "neco.loss.cosine.Cosine", "grid": 5, "mask": "all"}
    assert "experiment=demo without loss.steepness: loss=cosine has none" in caplog.text
    assert config.load("experiment=demo", "loss=shuffled").config["loss"]["steepness"] == [100, 1000]
    for wrong in (["loss.steepness=5"], ["+loss.stepness=5"]):
        with pytest.raises(NecoError, match=wrong[0].strip("+").split("=")[0]):
            config.load("experiment=demo", "loss=cosine", *wrong)


@pytest.mark.slow
def test_an_interrupted_sweep_says_how_to_go_on(tmp_path, cache):
    command = [sys.executable, "-m", "neco", "sweep=loss", *TINY[:-1], "train.steps=500", "run_dir=out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    limit = time.monotonic() + 120
    while not (tmp_path / "out/neco-0/metrics.csv").is_file():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "python -m neco sweep=loss" in said and said.rstrip().endswith("run_dir=out")
    assert not (tmp_path / "out/shuffled-0").exists()
