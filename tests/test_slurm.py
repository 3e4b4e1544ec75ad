"""Jobs of a real SLURM, which scripts/slurm_node.sh starts: arrays, several tasks, time-outs, all kinds of ends."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, losses

from neco.runs.status import status

NODE = ROOT / "scripts/slurm_node.sh"
missing = [command for command in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(command)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing), reason=f"runs where {', '.join(missing)} are, as in CI: scripts/slurm_node.sh install"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="runs as root, who starts SLURM"),
]

# SLURM looks at the time each half minute, and signals up to a minute early: jobs of slow steps outlive that.
SLOW = """
import time
from neco.loss.neco import NeCo

class Slow(NeCo):
    def forward(self, *arguments, **keywords):
        time.sleep(0.3)
        return super().forward(*arguments, **keywords)
"""
JOB = ("hydra/launcher=slurm", *SMALL, "train.drop_path=0", "device=cpu", "launcher.cpus=1", "launcher.time=5")
LONG = ("loss=slow", "loss.grid=3", "train.steps=250")


@pytest.fixture(scope="module")
def node(tmp_path_factory, cache):
    """A working folder in which SLURM can be used."""
    folder, slurm = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("slurm")
    (folder / "slow.py").write_text(SLOW)
    (folder / "loss").mkdir()
    (folder / "loss/slow.yaml").write_text("defaults: [neco]\n_target_: slow.Slow\n")
    with pytest.MonkeyPatch.context() as patch:
        env = {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for key, value in {**env, "SLURM_CONF": str(slurm / "slurm.conf")}.items():
            patch.setenv(key, value)
        started = subprocess.run([NODE, "start", slurm], capture_output=True, text=True)
        assert started.returncode == 0, started.stderr
        yield folder
        subprocess.run([NODE, "stop", slurm])


@pytest.fixture(scope="module")
def program(node):
    """Starts `python -m neco ...` there."""

    started = []

    def start(*arguments):
        command = [sys.executable, "-m", "neco", *arguments]
        started.append(subprocess.Popen(command, cwd=node, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="module", autouse=True)
def timed(program):
    """A job that runs out of time while the other tests run, and makes way for none."""
    keys = ("launcher.time=2", "launcher.signal_seconds=15", "launcher.partition=urgent")
    return program(*JOB, *LONG, *keys, "run_dir=timed")


def until(reached, seconds=300):
    limit = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < limit
        time.sleep(0.5)


def show(job):
    """What SLURM says about it."""
    said = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    return dict(pair.split("=", 1) for pair in said.split() if "=" in pair)


def queued(said):
    """The number of the first job that neco says is queued."""
    return next(line.split()[-1] for line in said.splitlines() if line.startswith("queued"))


def test_four_jobs_of_one_and_two_tasks_of_which_two_fail(program, node):
    wrong = node / "none.pth"
    done = program(*JOB, "weights=auto", "run_dir=four", "train.devices=1,2", f"checkpoint=null,{wrong}")
    said = "".join(done.communicate(timeout=500))
    assert done.returncode == 2 and said.count("none.pth: no such file") >= 2, said
    assert "jobs that did not end well: 2" in said
    jobs = {path.parent.name: status(path.parent) for path in (node / "four").glob("*/status.json")}
    good = sorted(name for name, job in jobs.items() if job["status"] == "done")
    assert good == [f"devices-{n}+checkpoint-null" for n in (1, 2)] and len(jobs) == 4
    assert len({line.split(": ")[1].split("_")[0] for line in said.splitlines() if line.startswith("queued")}) == 2
    one, two = (losses(node / "four" / name) for name in good)
    assert two == pytest.approx(one, rel=1e-5) and len(one) == 4
    assert "2 processes (ddp)" in (node / "four" / good[1] / "output_0.txt").read_text()
    assert (node / "four" / good[1] / "output_1.txt").is_file()
    assert (node / "four/summary.md").read_text().count("| failed |") == 2


def test_a_detached_job_is_taken_over_by_the_same_command_and_told_to_be_cancelled(program, node):
    command = (*JOB, *LONG, "run_dir=kept")
    detached = program(*command, "launcher.detach=true")
    said = "".join(detached.communicate(timeout=300))
    assert detached.returncode == 0 and "To collect their results: python -m neco task=report" in said
    job = status(node / "kept")["id"]
    attached = program(*command)
    until((node / "kept/metrics.csv").is_file)
    time.sleep(1)
    assert subprocess.run(["scancel", job]).returncode == 0
    said = "".join(attached.communicate(timeout=300))
    assert (
        attached.returncode == 2
        and "queued  " not in said
        and re.search(r"kept: stopped: stopped \(SIGTERM\); step \d+ is saved in", said)
    )
    assert show(job)["JobState"] == "CANCELLED" and (node / "kept/checkpoints/last.ckpt").is_file()


def test_a_job_that_makes_way_for_another_goes_on_later(program, node):
    first = program(*JOB, *LONG, "train.steps=40", "run_dir=away", "train.devices=2")
    until((node / "away/metrics.csv").is_file)
    time.sleep(1)
    urgent = ["sbatch", "--partition=urgent", "--ntasks=3", f"--output={node}/urgent.txt", "--wrap=sleep 1"]
    assert subprocess.run(urgent).returncode == 0
    said = "".join(first.communicate(timeout=300))
    assert first.returncode == 0, said
    assert len(losses(node / "away")) == 40 and int(show(queued(said))["Restarts"]) == 1
    assert (node / "away/output_0.txt").read_text().count("2 processes (ddp)") == 2


def test_a_job_out_of_time_goes_on_where_it_was(timed, train, node):
    said = "".join(timed.communicate(timeout=500))
    assert timed.returncode == 0, said
    told = (node / "timed/output_0.txt").read_text()
    assert "this job is timed-out" in told and "start       step " in told
    assert int(show(queued(said))["Restarts"]) >= 1
    whole = train("train.drop_path=0", "train.steps=250")
    assert losses(node / "timed") == losses(whole)
    one, two = (torch.load(run / "checkpoints/last.ckpt")["state_dict"] for run in (node / "timed", whole))
    assert all(torch.equal(one[key], two[key]) for key in two)
