"""Who starts the processes of a run: torchrun, srun or this program. docs/slurm.md states the rule.

The program asks once, at its start. From then on the environment holds torchrun's variables (RANK, WORLD_SIZE, ...) if
another program started the processes, or this one did and this is not the first; else it holds none of them.
"""

import contextlib
import os
import random
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Literal

from neco.utils.errors import NecoError

Environment = MutableMapping[str, str]
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK")
PARENT = "NECO_PARENT_PROCESS"  # the process id of the first process, for those that it starts
NO_STEP = 0xFFFFFFF0  # SLURM numbers batch scripts, interactive shells and the like from here on
# Launchers whose processes cannot meet here: what they call the number of processes
UNKNOWN = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun", "JSM_NAMESPACE_SIZE": "jsrun"}


@dataclass(frozen=True)
class Place:
    """Which of the processes of a run this is. `local` means on this node; `local_world_size` 0 is unknown."""

    started_by: Literal["neco", "torchrun", "srun"]
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 0
    node_rank: int = 0


ALONE = Place("neco")  # this program starts the others, if the configuration asks for some


def find_place(environment: Environment, parent: int, terminal: bool) -> Place:
    """Find out who started this process, and as which of how many.

    Args:
        parent: the process id of the parent.
        terminal: whether this process has a controlling terminal.

    Raises:
        NecoError: the variables contradict each other, or name a launcher that is not supported.
    """
    if environment.get(PARENT) == str(parent):  # else it is that of a process further up
        return _from_ranks(environment, "neco", rank="LOCAL_RANK") if _number(environment, "LOCAL_RANK") else ALONE
    if PARENT in environment and _number(environment, "LOCAL_RANK"):
        raise NecoError(
            f"the first process ({environment[PARENT]}), which started this one, has ended; its message says why"
        )
    if "TORCHELASTIC_RUN_ID" in environment:
        return _from_ranks(environment, "torchrun")
    if _number(environment, "SLURM_STEP_ID", NO_STEP) < NO_STEP:
        return _from_step(environment, terminal)
    if task := _number(environment, "SLURM_PROCID"):
        raise NecoError(
            f"SLURM_PROCID={task} without SLURM_STEP_ID: srun, which numbers tasks, sets both. Start one task "
            "(--ntasks=1), and train.devices=N makes it N processes; or start N tasks with srun; or unset SLURM_PROCID"
        )
    if all(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")):
        return _from_ranks(environment, "torchrun")
    for name, launcher in UNKNOWN.items():
        if _number(environment, name, 1) > 1:
            raise NecoError(
                f"{name}={environment[name]}: {launcher} started several processes, which is not supported. Start one, "
                "and train.devices=N makes it N; or start them with torchrun or srun"
            )
    several = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}  # more than these say that there are other processes
    if left := [f"{name}={environment[name]}" for name in RANKS if _number(environment, name) > several.get(name, 0)]:
        raise NecoError(
            f"{', '.join(left)}: set, but neither torchrun nor srun started this process (they set RANK, WORLD_SIZE, "
            "LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or SLURM_STEP_ID). Unset this; train.devices=N starts N processes"
        )
    return ALONE


def _from_step(environment: Environment, terminal: bool) -> Place:
    """A task of srun. A step of one task, or a shell in a step (`srun --pty bash`), starts its processes itself."""
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))
    if tasks < 2 or (terminal and "SLURM_PTY_PORT" in environment):
        return ALONE
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", _number(environment, "SLURM_NNODES", 1))
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # 2(x3),1
    rank, local, node = (_number(environment, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "NODEID"))
    of_node = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
    here = of_node[node] if node < len(of_node) else tasks if nodes == 1 else 0
    return _checked(Place("srun", rank, tasks, local, here, node), "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


def _from_ranks(environment: Environment, started_by: Literal["neco", "torchrun"], rank: str = "RANK") -> Place:
    wanted = (rank, "WORLD_SIZE", "LOCAL_RANK")
    if lacking := [name for name in wanted if name not in environment]:
        raise NecoError(
            f"{', '.join(lacking)}: not set, though TORCHELASTIC_RUN_ID says that torchrun started this process; "
            "unset TORCHELASTIC_RUN_ID, or start with torchrun"
        )
    number, world, local = (_number(environment, name) for name in wanted)
    node = _number(environment, "GROUP_RANK", _number(environment, "NODE_RANK"))
    here = _number(environment, "LOCAL_WORLD_SIZE", world if started_by == "neco" else 0)
    return _checked(Place(started_by, number, world, local, here, node), rank, "WORLD_SIZE")


def _checked(place: Place, rank: str, world: str) -> Place:
    if not (
        0 <= place.rank < place.world_size and 0 <= place.local_rank < (place.local_world_size or place.world_size)
    ):
        raise NecoError(
            f"{rank}={place.rank}, {world}={place.world_size}, local rank {place.local_rank}: these contradict each "
            "other; unset them, or start with torchrun or srun"
        )
    return place


def _number(environment: Environment, name: str, default: int = 0) -> int:
    value = environment.get(name) or default
    try:
        return int(value)
    except ValueError:
        raise NecoError(f"{name}={value}: must be a whole number; unset it, or start with torchrun or srun") from None


here = ALONE


def adopt(environment: Environment = os.environ) -> None:
    """Leave torchrun's variables in the environment if they are true, and none otherwise. Raises NecoError.

    Empty variables count as not set.
    """
    global here
    for name in [*environment]:
        if environment[name] == "" and (
            name in (*RANKS, "TORCHELASTIC_RUN_ID") or name.startswith(("MASTER_", "SLURM_"))
        ):
            del environment[name]
    here = find_place(environment, os.getppid(), _has_terminal())
    _number(environment, "MASTER_PORT")
    for name in RANKS:
        environment.pop(name, None)
    if here == ALONE:
        environment["MASTER_ADDR"] = "127.0.0.1"  # all processes will be on this machine
        return
    ranks = here.rank, here.world_size, here.local_rank, here.local_world_size, here.node_rank, here.node_rank
    environment.update(
        {name: str(value) for name, value in zip(RANKS, ranks, strict=True) if value or "LOCAL_W" not in name}
    )
    if here.started_by == "srun":
        nodes = environment.get("SLURM_STEP_NODELIST", "")
        several = here.local_world_size != here.world_size
        environment.setdefault("MASTER_ADDR", _first_host(nodes) if several else "127.0.0.1")
        step = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
        environment.setdefault("MASTER_PORT", str(random.Random(step).randrange(20000, 32000)))  # the same in all tasks


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: `gpu07` of `gpu[07-09,12],big1`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _has_terminal() -> bool:
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
        return True
    return False


def number(name: str, default: int = 0) -> int:
    """One of torchrun's variables of this process."""
    return int(os.environ.get(name) or default)


def own_rank() -> int:
    """The rank of this process; the first of those that this program starts has none in its environment."""
    return number("RANK", number("LOCAL_RANK"))


def is_task_of_slurm() -> bool:
    """Whether this process has the CPUs of a task for itself, as those of srun and of our launcher."""
    return here.started_by == "srun" or os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def are_started() -> bool:
    """Whether all processes are there already, so that this one starts none."""
    return "RANK" in os.environ


def launched_elsewhere() -> bool:
    """Whether torchrun or srun started several processes, each by the same command."""
    return number("WORLD_SIZE", 1) > 1 and here.started_by != "neco" and "SUBMITIT_EXECUTOR" not in os.environ


def describe() -> str:
    """Who started how many processes, for messages."""
    world = number("WORLD_SIZE", 1)
    if here.started_by == "srun":
        return f"srun started {world} tasks (--ntasks, SLURM_STEP_NUM_TASKS)"
    return f"torchrun started {world} processes (WORLD_SIZE)"
