"""One job: its configuration validated, its task prepared and run."""

import errno
import importlib
import logging
import sys
from pathlib import Path
from typing import Any

from neco.config.compose import settings, told, traced
from neco.config.user_options import machine_files
from neco.utils import processes, signals, startup
from neco.utils.errors import NecoError

SHARED = ("train", "finetune", "eval")  # tasks that several processes can share


# What a disk does to a run
DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENAMETOOLONG, errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP),
}


@signals.handled()
def run(cfg: Any) -> Any:
    """One job: validate, then hand over to `neco.task.<task>`; returns the `Objective` of a sweep, if there is one."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from neco.sweep.launcher import resume_command
    from neco.utils import progress

    startup.begin()
    logging.raiseExceptions = False  # else each line for a log on a full disk is a traceback
    hydra = HydraConfig.get()
    overrides = told(hydra)
    output = Path(hydra.runtime.output_dir)
    try:
        if processes.launched_elsewhere() and not any(o.startswith("run_dir=") for o in overrides):
            launcher = processes.here.started_by
            raise NecoError(
                f"run_dir: the processes of {launcher} must share one folder; name it with run_dir=runs/NAME"
            )
        with traced(hydra):
            chosen = settings(cfg, hydra)
            if processes.number("WORLD_SIZE", 1) > 1 and chosen.run.task not in SHARED:
                raise NecoError(f"task={chosen.run.task} runs in one process, but {processes.describe()}: start one")
            task = importlib.import_module(f"neco.task.{chosen.run.task}")
            startup.mark("imports")
            progress.every = chosen.run.log_seconds
            prepared = task.prepare(chosen)
            startup.mark("checks")
    except NecoError:
        if output.is_dir() and not any(output.iterdir()):  # Hydra made it before anything was known to be wrong
            output.rmdir()
        raise
    from neco.distributed import collectives  # imports torch, as the task did

    if not collectives.leader():
        logging.getLogger("neco").setLevel(logging.WARNING)
    if chosen.run.show and chosen.run.task in ("embed", "export", "report"):
        logging.getLogger(__name__).warning("show=%d: task=%s draws no images", chosen.run.show, chosen.run.task)
    for path in machine_files(chosen.choices):
        logging.getLogger(__name__).info("settings    read from %s", path)
    try:
        with signals.uncovered(), collectives.fast_attention():
            return task.main(chosen, prepared, output)
    except signals.Interrupted as stop:
        saved = kept(output)
        if hydra.mode == RunMode.MULTIRUN:  # all of it: jobs that are done stay so
            overrides, output = sys.argv[1:], Path(hydra.sweep.dir)
        stop.args = (f"{stop}; {saved}. {resume_command(overrides, output)}",)
        raise
    except OSError as error:
        if error.errno not in DISK and output.is_dir():
            raise
        place = error.filename2 or error.filename or "a file of run_dir, cache_dir or the folder of temporary files"
        gone = "" if output.is_dir() else f"; run_dir={output} was removed while the run was in it"
        raise NecoError(f"{place}: {error.strerror}{gone}. With that mended, the same command goes on") from error


def kept(output: Path) -> str:
    """What an interrupted job leaves; stopped twice, it has not saved its last steps."""
    from neco.model import sources

    last = output / "checkpoints" / "last.ckpt"
    if not last.is_file():
        return f"what is done is in {output}"
    try:
        return f"step {sources.contents(last)['global_step']} is saved in {last}"
    except (NecoError, KeyError):  # it is read again before it is used
        return f"saved in {last}"
