"""Who starts the processes of a run, by what torchrun, SLURM and others leave in the environment."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, losses

from neco.distributed import collectives
from neco.utils import processes
from neco.utils.errors import NecoError
from neco.utils.processes import ALONE, Place, find_place

PARENT = 77
STEP = {"SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
TASK = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
BATCH = {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
RANKS = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "20000"}
TORCHRUN = {**RANKS, "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
OURS = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0", processes.PARENT: str(PARENT)}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, ALONE),
        ({"LOCAL_RANK": "", "RANK": ""}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, ALONE),
        ({"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}, ALONE),
        (TORCHRUN, Place("torchrun", 1, 4, 1, 2)),
        (RANKS, Place("torchrun", 1, 4, 1)),
        ({**TASK, **TORCHRUN}, Place("torchrun", 1, 4, 1, 2)),
        ({**TASK, "RANK": "0", "WORLD_SIZE": "8"}, Place("srun", 1, 2, 1, 2)),  # exported by the batch script
        (TASK, Place("srun", 1, 2, 1, 2)),
        (
            {**TASK, "SLURM_NODEID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "6"}
            | {"SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x2),2"},
            Place("srun", 5, 6, 0, 2, 2),
        ),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, ALONE),
        ({**TASK, "SLURM_PTY_PORT": "1"}, ALONE),  # a shell of srun --pty
        (BATCH, ALONE),  # sbatch, Open OnDemand, JupyterHub, VS Code
        ({**BATCH, "SLURM_STEP_ID": "4294967290"}, ALONE),  # salloc with use_interactive_step
        ({**BATCH, "SLURM_STEP_ID": "4294967291", "SLURM_NTASKS_PER_NODE": "1"}, ALONE),
        ({"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4"}, ALONE),  # salloc
        ({**OURS, **BATCH}, Place("neco", 1, 2, 1, 2)),
        ({**OURS, "LOCAL_RANK": "0"}, ALONE),  # started by the first process for something else
    ],
)
def test_who_started_this_process(environment, place):
    assert find_place(environment, PARENT, terminal=True) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "3"}, r"RANK=3: set, but neither torchrun nor srun started .* train\.devices"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2: set, but neither"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1: set, but neither"),
        ({**OURS, processes.PARENT: "3"}, r"the first process \(3\), which started this one, has ended"),
        ({"RANK": "first"}, "RANK=first: must be a whole number"),
        ({**RANKS, "RANK": "4"}, "RANK=4, WORLD_SIZE=4, .* contradict"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "RANK, WORLD_SIZE, LOCAL_RANK: not set, though TORCHELASTIC_RUN_ID"),
        ({**BATCH, "SLURM_PROCID": "1"}, r"SLURM_PROCID=1 without SLURM_STEP_ID: .*--ntasks=1.* train\.devices"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2: mpirun started several"),
    ],
)
def test_what_contradicts_itself_is_refused(environment, message):
    with pytest.raises(NecoError, match=message):
        find_place(environment, PARENT, terminal=False)


@pytest.fixture(autouse=True)
def same_environment():
    before = {**os.environ}
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def adopt(monkeypatch):
    """`adopt({...})` is the start of the program with these variables; returns what there is then."""

    def run(environment):
        monkeypatch.setattr(processes, "here", ALONE)
        environment = {**environment}
        processes.adopt(environment)
        for name in (*processes.RANKS, "MASTER_ADDR", "MASTER_PORT", "SLURM_CPUS_PER_TASK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return environment

    return run


def test_the_environment_is_that_of_torchrun_or_has_no_ranks(adopt):
    here = adopt(
        {"LOCAL_RANK": "", "SLURM_CPUS_PER_TASK": "", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    )
    assert here == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} and collectives.leader()
    here = adopt(TASK)
    assert (here["RANK"], here["WORLD_SIZE"], here["LOCAL_RANK"], here["MASTER_ADDR"]) == ("1", "2", "1", "127.0.0.1")
    assert here["MASTER_PORT"] == adopt({**TASK, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})["MASTER_PORT"]
    assert processes.launched_elsewhere() and processes.describe().startswith("srun started 2 tasks")
    nodes = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NUM_NODES": "2"}
    assert adopt({**TASK, **nodes, "SLURM_STEP_NODELIST": "gpu[07-08],x1"})["MASTER_ADDR"] == "gpu07"
    assert adopt({**TASK, **nodes, "MASTER_ADDR": "mine"})["MASTER_ADDR"] == "mine"
    with pytest.raises(NecoError, match="MASTER_PORT=auto: must be a whole number"):
        adopt({"MASTER_PORT": "auto"})


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"RANK": "3"}, ["task=report"], "error (process 3): RANK=3: set, but neither torchrun nor srun started"),
        (TASK, [*SMALL, "run_dir=run"], "srun started 2 tasks (--ntasks, SLURM_STEP_NUM_TASKS), train.devices=1 x"),
        (TASK, [*SMALL], "run_dir: the processes of srun must share one folder"),
        (TASK, ["task=check", "run_dir=run"], "task=check runs in one process, but srun started 2 tasks"),
        (TASK, ["task=embed", "run_dir=run"], "task=embed runs in one process, but srun started 2 tasks"),
        (
            TORCHRUN,
            [*SMALL, "train.devices=4", "run_dir=run"],
            "2 of them on this node, train.devices=4 x train.nodes=1",
        ),
        ({}, [*SMALL, "train.nodes=2"], "train.nodes=2: start one process a device with torchrun or SLURM's srun"),
        (TASK, ["-m", "hydra/launcher=local", "seed=1,2", "run_dir=run"], "each of which would start these jobs"),
    ],
)
def test_the_program_refuses_in_one_line(inside, adopt, monkeypatch, environment, arguments, message):
    adopt({})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, said = inside(*arguments)
    assert code == 2 and message in said and said.count("\n") == 1, said


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


MEET = """
import sys
from neco.distributed import collectives
from neco.utils import processes, signals
from neco.utils.errors import NecoError
processes.adopt()
try:
    with signals.handled():
        collectives.join(minutes=float(sys.argv[1]) / 60)
        print("met", collectives.world(), collectives.merge(collectives.rank()))
except signals.Interrupted as stop:
    sys.exit(str(stop))
except NecoError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def start():
    """Starts one of two processes that are to meet."""
    port, started = free_port(), []

    def run(rank, seconds=120):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = {**os.environ, **env, "MASTER_PORT": port, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", MEET, str(seconds)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_processes_meet_or_name_who_did_not_come(start):
    two = [start(0), start(1)]
    assert [process.communicate()[0] for process in two] == ["met 2 [0, 1]\n"] * 2
    alone = [start(1, 3), start(0, 3)]
    alone[1].kill()
    assert (
        alone[0].communicate()[1].startswith("process 0 of 2 did not come in 3 s (MASTER_ADDR=127.0.0.1, MASTER_PORT=")
    )
    assert "of 2 processes these did not come: 1 in 3 s" in start(0, 3).communicate()[1]


@pytest.mark.slow
def test_who_waits_for_the_others_hears_signals_and_their_end(start):
    first, other = start(0), start(1)
    other.send_signal(signal.SIGSTOP)
    time.sleep(30)
    first.terminate()
    assert first.communicate(timeout=15)[1] == "stopped (SIGTERM)\n"
    other.kill()
    second = start(1)
    time.sleep(30)
    begun = time.monotonic()
    second.terminate()
    assert second.communicate(timeout=15)[1] == "stopped (SIGTERM)\n" and time.monotonic() - begun < 10


@pytest.mark.slow
def test_variables_of_a_batch_script_start_no_other_run(neco, tmp_path):
    several = [*SMALL, "train.drop_path=0", "device=cpu", "train.devices=2"]
    said = neco(*several, f"run_dir={tmp_path / 'run'}", **BATCH, SLURM_NTASKS_PER_NODE="4", LOCAL_RANK="", ok=True)
    assert "2 processes (ddp)" in said.stderr and len(losses(tmp_path / "run")) == 4
