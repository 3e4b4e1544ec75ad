"""Who runs the jobs of a sweep outside of its process: this machine, or SLURM. The schema of `launcher`, too."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import submitit
from annotated_types import Le
from submitit.core.utils import UncompletedJobError

from neco.config.types import Line, NonNegative, Positive, PositiveFloat
from neco.sweep.slurm_queue import listed, told
from neco.utils import atomic_files
from neco.utils.errors import NecoError

if TYPE_CHECKING:
    from neco.sweep.jobs import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """`hydra/launcher=local`: each job a process for each device, some jobs at once, each with GPUs of its own."""

    parallel: Positive | None
    time: PositiveFloat | None
    signal_seconds: NonNegative
    requeues: Annotated[NonNegative, Le(5)]  # submitit has no more

    def __post_init__(self) -> None:
        if self.time and self.signal_seconds >= 60 * self.time:
            raise NecoError(f"launcher.signal_seconds={self.signal_seconds} is more than launcher.time={self.time} has")

    def parameters(self, job: "Job") -> dict[str, Any]:
        """What submitit is told."""
        minutes = self.time or 10 * 365 * 24 * 60
        return {"timeout_min": minutes, "tasks_per_node": job.devices, "signal_delay_s": self.signal_seconds}

    def start(self, waiting: list["Job"], running: dict["Job", Any], folder: Path) -> None:
        """Move jobs from `waiting` to `running`, as many as there are places for."""
        import torch

        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
        width = max(job.devices for job in [*waiting, *running])
        places = range(self.parallel or max(1, len(gpus) // width))
        while waiting and (free := [place for place in places if place not in {job.place for job in running}]):
            job = waiting.pop(0)
            job.place = free[0]
            own = (gpus[(job.place * width + i) % len(gpus)] for i in range(job.devices if gpus else 0))
            job.gpus = [*dict.fromkeys(own)]
            executor = submitit.LocalExecutor(folder, max_num_timeout=job.options.requeues)
            executor.update_parameters(stderr_to_stdout=True, **job.options.parameters(job))
            # A terminal sends Ctrl-C to all its processes; these are told by `stop`, and once.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                running[job] = executor.submit(job)
            except OSError as error:  # a full disk; the jobs that run go on
                job.note("failed", message=str(atomic_files.refused(folder, error)))
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def ended(self, started: Any, status: str | None) -> bool:
        """Whether a job is over, which says `status` itself."""
        return started.done()

    def stop(self, started: Any) -> None:
        """Let a job save, and end it."""
        os.kill(int(started.job_id), signal.SIGTERM)  # submitit's own way leaves it a second

    def fate(self, started: Any) -> str:
        """What became of a job that left no word."""
        return "ended without a word"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm(Local):
    """`hydra/launcher=slurm`: arrays, one task a GPU. A job is known by its number, which outlives this process."""

    parallel: Positive
    time: Positive
    requeues: NonNegative
    detach: bool
    partition: Line | None  # a second line would be one of the shell: submitit writes them into a script
    account: Line | None
    constraint: Line | None
    qos: Line | None
    gpus: NonNegative | Literal["auto"]
    cpus: Positive | Literal["auto"]
    mem_gb: PositiveFloat | None
    setup: list[str]
    extra: dict[Line, Line | bool | int | float] | None

    def parameters(self, job: "Job") -> dict[str, Any]:
        gpus = (job.config.device != "cpu") * job.devices if self.gpus == "auto" else self.gpus
        cpus = 1 + job.workers if self.cpus == "auto" else self.cpus
        same = {key: getattr(self, key) for key in ("partition", "account", "constraint", "qos", "time", "setup")}
        return {
            **same,
            "job_name": f"neco-{Path(job.config.hydra.sweep.dir).name}",
            "nodes": job.nodes,
            "ntasks_per_node": job.devices,
            "gpus_per_node": gpus or None,
            "cpus_per_task": cpus,
            "mem": f"{self.mem_gb * 1024:.0f}M" if self.mem_gb else None,
            "signal_delay_s": self.signal_seconds,
            "array_parallelism": self.parallel,
            "additional_parameters": self.extra,
            # From SLURM 22.05 on srun has to be told the CPUs, too. A process that is left alone would wait for ever.
            "srun_args": [f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"],
        }

    def start(self, waiting: list["Job"], running: dict["Job", Any], folder: Path) -> None:
        """Submit all, those that ask for the same as one array."""
        if waiting and not shutil.which("sbatch"):
            raise NecoError("hydra/launcher=slurm: there is no sbatch here; hydra/launcher=local needs no SLURM")
        groups: dict[str, list[Job]] = {}
        for job in waiting:
            groups.setdefault(repr((job.options, job.options.parameters(job))), []).append(job)
        waiting.clear()
        for jobs in groups.values():
            options = jobs[0].options
            executor = submitit.SlurmExecutor(folder, max_num_timeout=options.requeues)
            executor.update_parameters(stderr_to_stdout=True, **options.parameters(jobs[0]))
            try:
                started = executor.submit_array(jobs)
            except UncompletedJobError as error:
                raise NecoError(f"hydra/launcher=slurm: {str(error).strip().splitlines()[-1]}") from error
            running.update({job: queued.job_id for job, queued in zip(jobs, started, strict=True)})

    def ended(self, started: str, status: str | None) -> bool:
        return status in ("done", "failed") or not listed(started)  # one that was stopped may be queued again

    def stop(self, started: str) -> None:
        subprocess.run(["scancel", started], check=False)

    def fate(self, started: str) -> str:
        found = re.search(r"JobState=(\w+) Reason=(\w+)", told(started))
        return f"ended as {found.group(1)} ({found.group(2)})" if found else super().fate(started)


CLUSTERS = {"local": Local, "slurm": Slurm}
