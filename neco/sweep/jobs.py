"""A job of a sweep: its folder, what it depends on, how it runs in a process of its own."""

import dataclasses
import hashlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import submitit
from hydra._internal.callbacks import Callbacks
from hydra.core.utils import run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from submitit.core.utils import UncompletedJobError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from neco.config.compose import plain, told
from neco.distributed.collectives import READERS
from neco.runs.results import write
from neco.runs.status import STATUS, status
from neco.sweep.slurm_queue import preempted
from neco.utils import atomic_files, processes, signals
from neco.utils.errors import NecoError
from neco.utils.masking import mask_nested, print_line

ASIDE = ("sweep", "launcher", "run_dir", "debug")  # keys that cannot change what comes out


REQUEUE = 128 + signal.SIGUSR2


@dataclasses.dataclass(eq=False)
class Job:
    """A run of a sweep in a folder of its own; called, it is one of its processes that submitit started.

    Attributes:
        config: of this run, with Hydra's.
        command: of the sweep, as sys.argv.
        options: of the launcher that submits it.
        place: which of the jobs at once it is, and `gpus`, which it may use (all if empty).
        said: what its status.json says.
        task: what runs it, by its name in a module: other processes find it there.
    """

    config: DictConfig
    command: list[str]
    options: Any = None
    place: int = 0
    gpus: Sequence[str] = ()
    said: dict[str, Any] = dataclasses.field(default_factory=dict)
    task: Callable[[Any], Any] | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.hydra.sweep.dir, self.config.hydra.sweep.subdir)

    @property
    def training(self) -> Any:
        """The node that says how it trains, if it does."""
        return self.config.get("train") or self.config.get("finetune") or {}

    @property
    def workers(self) -> int:
        """Data workers of each process; `auto`: the most there can be."""
        wanted = (self.training or self.config.get("extract") or {}).get("workers", 0)
        return wanted if wanted != "auto" else 2 if self.config.device == "cpu" else READERS

    @property
    def nodes(self) -> int:
        return self.training.get("nodes", 1)

    @property
    def devices(self) -> int:
        """Processes on each node: where the task has no key for it, the GPUs that are asked for."""
        gpus = getattr(self.options, "gpus", 1)
        return self.training.get("devices", gpus if gpus != "auto" else 1) or 1

    @cached_property  # a job that is submitted takes along what it was asked for
    def digest(self) -> str:
        """Of all that can change what comes out, the files that it names included."""
        config = plain(self.config)
        settings = mask_nested({k: v for k, v in config.items() if k not in ASIDE})  # signed again, it is the same
        named = [str(value) for key in ("checkpoint", "compare") if (value := config.get(key))]
        index = Path(cache, "index") if (cache := config.get("cache_dir")) else None
        held = [state(name, index) for name in named]
        given = [node["masks"] for node in (config.get("eval") or {}).values() if node and node.get("masks")]
        held += [contents(masks, index) for name in given if (masks := Path(name).expanduser()).is_dir()]
        return hashlib.sha256(json.dumps([settings, *held], sort_keys=True).encode()).hexdigest()[:16]

    def note(self, how: str, **said: Any) -> None:
        """Write status.json. Of several processes the one that fails first does it: the others follow from that."""
        hydra = self.config.hydra
        job = {"job": hydra.job.num, "overrides": told(hydra), "config": self.digest}
        self.said = {"status": how, **said, **job}
        if status(self.folder).get("status") != "failed" if how == "failed" else leads():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)  # where nothing was begun it is not there any more
                write(self.folder / STATUS, json.dumps(self.said, indent=1) + "\n")
            except (NecoError, OSError) as error:  # the others may do without, and the end of the sweep tells it
                say(f"{how:<12} {self.folder}, which could not be noted there: {error}")

    def run(self, task: Callable[[Any], Any]) -> None:
        """The job in this process."""

        def kept(config: Any) -> None:
            try:
                objective = task(config)
                number = {"objective_name": objective.name} if objective else {}
                self.note("done", objective=objective and objective.value, **number)
            except Exception as error:
                expected = isinstance(error, NecoError | OmegaConfBaseException) and not config.debug
                self.note("failed", message=str(error) if expected else f"{type(error).__name__}: {error}")
                logging.getLogger("neco").error("error: %s", error if expected else traceback.format_exc())

        context = HydraContext(config_loader=None, callbacks=Callbacks())  # type: ignore[arg-type]
        try:
            _ = run_job(kept, self.config, "hydra.sweep.dir", "hydra.sweep.subdir", context).return_value
        except (OSError, ValueError) as error:  # Hydra makes the folder and its log
            self.note("failed", message=f"{self.folder}: {error.__cause__ or error}")

    def __call__(self) -> None:
        here = submitit.JobEnvironment()
        # As torchrun has it, for Lightning and for us: Lightning's own handling of SLURM would queue the job, too.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ["TORCHELASTIC_RUN_ID"] = here.job_id
        if self.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_files.open_for_appending(self.folder / f"output_{here.global_rank}.txt") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.argv = self.command
        setup_globals()
        self.note("running", id=here.job_id)
        try:
            with signals.handled():
                if os.environ["SUBMITIT_EXECUTOR"] == "local":
                    signals.with_parent()  # submitit's process, which sees the time and ends the others
                assert self.task
                self.run(self.task)
            if self.said["status"] == "failed":
                raise SystemExit(1)  # SLURM ends the other processes
        except signals.Interrupted as stop:
            if here.global_rank:
                raise SystemExit(0) from None  # any other end would kill the first, which is not through
            if stop.code != REQUEUE and not preempted(here.job_id):
                self.note("stopped", message=str(stop).split(". To go on")[0])
                raise SystemExit(stop.code) from None
            say(str(stop).split(". To go on")[0])
            try:
                signal.raise_signal(signal.SIGUSR2)  # submitit's handler, now that all is saved: queues it again
            except UncompletedJobError as error:
                self.note("stopped", message=str(error))
                raise

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after a requeue: the same, which goes on."""
        return DelayedSubmission(self)


def state(source: str, index: Path | None) -> str | None:
    """What the file or folder behind a `checkpoint` holds: a run that went on has other weights."""
    from neco.model import last_checkpoint

    try:
        return contents(Path(last_checkpoint(source)).expanduser(), index)
    except (NecoError, OSError):  # of no file, or the job will say what is wrong
        return None


def contents(path: Path, index: Path | None) -> str:
    """The digest of a file, or of all files below a folder. Raises NecoError for one that cannot be read."""
    from neco.dataset.digests import Contents

    held = sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]
    return Contents([str(found) for found in held], index).digest()


def leads() -> bool:
    """Whether this is the first of the processes; asked before torch is there."""
    return not processes.number("RANK")


def say(text: str) -> None:
    """To the terminal, by one process."""
    if leads():
        print_line(text, sys.stderr)
