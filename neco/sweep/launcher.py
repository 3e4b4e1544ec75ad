"""The jobs of a sweep: named, left out when done, run here or submitted. One that fails does not end the others."""

import dataclasses
import glob
import hashlib
import inspect
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins import launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from neco.config.compose import told
from neco.config.validate import check, register_resolvers
from neco.runs.results import Results, percent
from neco.runs.status import STATUS, status
from neco.sweep.backends import CLUSTERS, Slurm
from neco.sweep.jobs import Job, leads, say
from neco.utils import atomic_files, processes, signals
from neco.utils.commands import escape_interpolation, format_command, key_of, override
from neco.utils.errors import NecoError
from neco.utils.masking import mask_secrets

register_resolvers()  # also for a process that submitit started
failed: list[tuple[Path, Path, str]] = []  # the folders of the sweep and of the job, what became of it


def resume_command(overrides: Iterable[str], folder: Any) -> str:
    """The command that goes on."""
    same = [o for o in overrides if key_of(o) != "run_dir"]
    command = format_command([*same, override("run_dir", folder)])
    secret = " (with the secrets in place of ***)" if mask_secrets(command) != command else ""
    return f"To go on: {command}{secret}"


def collect_command(folder: Path) -> str:
    """The command that puts the results of a sweep beside each other."""
    return format_command(["task=report", override("runs", [f"{glob.escape(str(folder))}/*"])])


def name(overrides: Sequence[str], changing: set[str]) -> str:
    """What a job changes as the name of a folder, which shells and Hydra take unquoted; `.` where it is nothing."""
    pairs = [(key.lstrip("+~"), value) for key, _, value in (o.partition("=") for o in overrides) if key in changing]
    last = [key.rpartition(".")[2] for key, _ in pairs]
    parts, whole = [], True
    for (key, value), short in zip(pairs, last, strict=True):
        bare = re.sub(r"[\[\](){}'\" ]", "", mask_secrets(value)).replace(",", "_")
        safe = re.sub(r"[^\w.@-]", "_", bare)
        if len(safe) > 8 and re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", safe):
            safe = f"{float(safe):.3g}"
        whole &= safe == value  # `4` and `[4]` are two jobs
        parts.append(f"{short if last.count(short) == 1 else key}-{safe}")
    text = "+".join(parts)
    if whole and len(text) <= 100:
        return text or "."
    return f"{text[:90]}-{hashlib.sha256(repr(pairs).encode()).hexdigest()[:8]}"


def recorded(folder: Path, said: dict[str, Any]) -> bool:
    """Whether the results of a job that gave a number are there and can be read."""
    try:
        return said.get("objective") is None or bool(Results(folder, writes=False).records)
    except NecoError:
        damaged, aside = folder / "results.json", folder / "results.damaged.json"
        atomic_files.rename(damaged, aside)
        say(f"again        {damaged} is damaged: kept as {aside.name}")
        return False


def same_data(job: Job) -> bool:
    """Whether a job that is done would find the data that it used; data that are not there are no other ones."""
    from neco.config.compose import settings
    from neco.runs import used_data

    try:
        if changed := used_data.changed(job.folder, settings(job.config, job.config.hydra).build):
            say(f"again        {job.folder}: {changed} holds something else now")
        return not changed
    except NecoError as error:
        say(f"not compared {job.folder}: {str(error).partition(chr(10))[0]}")
        return True


class Launcher(launcher.Launcher):
    """Hydra's plugin: jobs one after the other in this process, or by submitit as processes or jobs of SLURM."""

    __module__ = "hydra_plugins.neco"  # see neco.__main__

    def __init__(self, cluster: str | None) -> None:
        self.cluster = CLUSTERS[cluster] if cluster else None

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        self.loader, self.task, self.config = hydra_context.config_loader, task_function, config
        self.folder = Path(config.hydra.sweep.dir)
        overrides = OverridesParser.create(self.loader).parse_overrides(list(config.hydra.overrides.task))
        swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
        self.changing = swept | {*(config.hydra.sweeper.get("params") or {})}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run what is not done. A job that gave no number returns None; `failed` says which have failed."""
        setup_globals()
        folders: dict[Path, Job] = {}
        jobs = [self.job(initial_job_idx + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
        for i, job in enumerate(jobs):
            jobs[i] = folders.setdefault(job.folder, job)  # a search may ask for the same job twice
            if jobs[i].digest != job.digest:
                both = " and ".join(format_command(told(each.config.hydra)) for each in (jobs[i], job))
                raise NecoError(f"{job.folder} would be the folder of two jobs: {both}; give each a sweep of its own")
        todo = [job for job in folders.values() if not self.done(job)]
        if self.cluster:
            self.submit(todo)
        else:
            self.run([job for job in todo if self.valid(job)])
        failed.extend(
            (self.folder, job.folder, f"{job.said['status']}: {job.said['message']}")
            for job in folders.values()
            if "message" in job.said
        )
        returns = [JobReturn(overrides=[*overrides], status=JobStatus.COMPLETED) for overrides in job_overrides]
        for job, returned in zip(jobs, returns, strict=True):
            returned.return_value = job.said.get("objective")
        return returns

    def job(self, number: int, overrides: list[str]) -> Job:
        """Compose one. Raises NecoError for wrong keys of the launcher."""
        config = self.loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            config.hydra.sweep.dir = escape_interpolation(str(self.folder))
            config.hydra.sweep.subdir = config.hydra.sweep.subdir or name(overrides, self.changing)
        job = Job(config, sys.argv, task=inspect.unwrap(self.task))
        config.run_dir = escape_interpolation(str(job.folder))
        if self.cluster:
            known, others = ({f.name for f in dataclasses.fields(c)} for c in (self.cluster, Slurm))
            keys: Any = OmegaConf.to_container(config.launcher, resolve=True)
            keys = {k: v for k, v in keys.items() if k in known or k not in others}  # machine.yaml may hold SLURM's
            job.options = self.cluster(**check(self.cluster, keys, "launcher"))
        return job

    def done(self, job: Job) -> bool:
        """Whether this very job has ended well in its folder; of one that SLURM may still have it notes the number."""
        said = status(job.folder)
        same = said.get("config") == job.digest
        done = same and said["status"] == "done" and self.config.sweep.skip_done
        if done and recorded(job.folder, said) and same_data(job):
            job.said = said
            say(f"done before  {job.folder}")
            return True
        if same and self.cluster is Slurm and "id" in said:
            job.said = said
        elif leads():
            (job.folder / STATUS).unlink(missing_ok=True)
        return False

    def run(self, jobs: list[Job]) -> None:
        """One after the other in this process. Raises NecoError where one would start others."""
        most = max((job.nodes * job.devices for job in jobs), default=1)
        if most > 1 and not processes.are_started():
            raise NecoError(
                f"{most} devices for a job of a sweep: each would start the sweep again. Add hydra/launcher=local "
                "or hydra/launcher=slurm, or start the sweep with torchrun and run_dir=runs/NAME"
            )
        for job in jobs:
            try:
                job.run(self.task)
            except signals.Interrupted as stop:
                job.note("stopped", message=str(stop).split(". To go on")[0])
                raise
            configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)

    def submit(self, jobs: list[Job]) -> None:
        """Start those that can run, and wait for them unless they are detached."""
        if processes.launched_elsewhere():
            raise NecoError(f"{processes.describe()}, each of which would start these jobs: start one")
        running = {job: job.said["id"] for job in jobs if job.said and not job.options.ended(job.said["id"], None)}
        waiting = [job for job in jobs if job not in running and self.valid(job)]
        try:
            with signals.handled():
                while waiting or running:
                    with signals.held():
                        self.start(waiting, running)
                    if getattr(jobs[0].options, "detach", False):
                        say(f"{len(running)} jobs are queued. To collect their results: {collect_command(self.folder)}")
                        return
                    self.wait(running)
        except signals.Interrupted as stop:
            say("stopping all jobs; once more: without waiting for what they save")
            for job, started in running.items():
                job.options.stop(started)
            with signals.handled():
                while running:
                    self.wait(running)
            stop.args = (f"{stop}. {resume_command(sys.argv[1:], self.folder)}",)
            raise

    def valid(self, job: Job) -> bool:
        """Whether its configuration is right; else it has failed."""
        from neco.config.compose import settings, traced

        job.said = {}
        (job.folder / STATUS).unlink(missing_ok=True)
        try:
            with traced(job.config.hydra):
                settings(job.config, job.config.hydra)
        except NecoError as error:
            job.note("failed", message=str(error))
            say(f"failed       {job.folder}: {error}")
        return not job.said

    def start(self, waiting: list[Job], running: dict[Job, Any]) -> None:
        """What there is place for; of the jobs of SLURM note the number."""
        before = {*running}
        if waiting:
            waiting[0].options.start(waiting, running, self.folder / ".submitit")
        for job in running.keys() - before:
            if isinstance(number := running[job], str):
                if not status(job.folder):  # it may be over by now
                    job.note("queued", id=number)
                say(f"queued       {job.folder}: {number}")
            else:
                say(f"started      {job.folder}: what it says is in its output_0.txt")

    def wait(self, running: dict[Job, Any]) -> None:
        """For a second; take out those that have ended, and say how."""
        time.sleep(1)
        for job, started in [*running.items()]:
            now = status(job.folder).get("status")
            if now == "running" and job.said.get("status") == "queued":
                job.said["status"] = now
                say(f"running      {job.folder}")
            if job.options.ended(started, now):
                del running[job]
                said = status(job.folder)
                job.said = said if said.get("config") == job.digest else {}
                if job.said.get("status") not in ("done", "failed", "stopped"):
                    output = job.folder / "output_0.txt"
                    where = output if output.is_file() else self.folder / ".submitit"
                    job.note("failed", message=f"{job.options.fate(started)}; see {where}")
                value = job.said.get("objective")
                text = job.said.get("message") or ("" if value is None else f"{percent(value)} %")
                say(f"{job.said['status']:<12} {job.folder}: {text}".rstrip(": "))
