"""`python -m neco`: compose conf/, validate all of it, run the task."""

from neco import import_path  # noqa: F401  # first, so that what follows is not taken from the working folder

# isort: split
import contextlib
import errno
import functools
import importlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from neco import config, files, interrupt, processes, startup
from neco.errors import NecoError
from neco.masking import print_exception, print_line
from neco.user_options import check_option_file, check_option_name, check_override, is_option_file, machine_files
from neco.yaml_file import load_yaml

USAGE = """neco: dense post-training of vision transformers, and what it does to their features

  python -m neco [GROUP=OPTION ...] [KEY=VALUE ...]       -m: one job for every combination of comma-separated values

examples
  python -m neco task=train dataset=coco model=dinov2r_vits14 dataset@val_dataset=camvid
  python -m neco task=eval checkpoint=runs/my_run weights=teacher dataset=camvid eval=[retrieval,overcluster]
  python -m neco task=finetune checkpoint=runs/my_run dataset=camvid finetune.decoder=linear
  python -m neco -m task=eval model=dinov2_vits14,dino_vits16 dataset=camvid eval=overcluster eval.overcluster.k=11,300

"""


def usage() -> str:
    """The groups and their options, each with the first comment of its file; imports nothing heavy."""
    lines = [USAGE + "groups"]
    for group in ("task", "model", "dataset", "eval", "loss", "augment", "logger", "experiment", "sweep", *HYDRA):
        for index, name in enumerate(config.options(group)):
            lines.append(f"  {group if not index else '':<14} {name:<20} {first_comment(group, name)}".rstrip())
    lines.append("\nkeys: python -m neco task=train --cfg job      errors with a traceback: debug=true")
    return "\n".join(lines)


def first_comment(group: str, name: str) -> str:
    """What the file of an option says of it in its first comment, or why it cannot be read."""
    try:
        path = config.find(group, name)
        load_yaml(path)
        comments = (line[2:] for line in path.read_text("utf-8-sig").splitlines() if line.startswith("# "))
        return next((line for line in comments if not line.startswith("@package")), "")
    except (NecoError, OSError) as error:
        return f"cannot be used: {error}"


HYDRA = ("hydra/launcher", "hydra/sweeper")
SHARED = ("train", "finetune", "eval")  # tasks that several processes can share
MODES = {"-m", "--multirun", "-c", "--cfg", "--info"}
# What a disk does to a run
DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENAMETOOLONG, errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP),
}
started = False
failure: NecoError | None = None


def job(cfg: Any) -> Any:
    """`run` for Hydra, which would announce an error of a single run in words of its own."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    global started, failure
    started = True
    try:
        return run(cfg)
    except NecoError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        failure = error
        return None


def settings(cfg: Any, hydra: Any) -> config.Settings:
    """The validated configuration of a job."""
    from neco.launch import plain, told

    return config.validate(plain(cfg), choices(hydra), told(hydra))


def choices(hydra: Any) -> dict[str, Any]:
    return {k: v for k, v in hydra.runtime.choices.items() if not k.startswith("hydra/")}


@contextlib.contextmanager
def traced(hydra: Any) -> Iterator[None]:
    """Errors say where the value was set."""
    from neco.launch import told

    try:
        yield
    except NecoError as error:
        node, key = re.match(r"([^=:]*)(?:: (\w+)=)?", str(error)).groups()  # type: ignore[union-attr]
        if place := config.origin(f"{node}.{key}" if key else node, told(hydra), choices(hydra)):
            raise NecoError(f"{error} [from {place}]") from error
        raise


@interrupt.handled()
def run(cfg: Any) -> Any:
    """One job: validate, then hand over to `neco.task.<task>`; returns the `Objective` of a sweep, if there is one."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from neco import progress
    from neco.launch import resume_command, told

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
    from neco import devices  # imports torch, as the task did

    if not devices.leader():
        logging.getLogger("neco").setLevel(logging.WARNING)
    if chosen.run.show and chosen.run.task in ("embed", "export", "report"):
        logging.getLogger(__name__).warning("show=%d: task=%s draws no images", chosen.run.show, chosen.run.task)
    for path in machine_files(chosen.choices):
        logging.getLogger(__name__).info("settings    read from %s", path)
    try:
        with interrupt.uncovered(), devices.fast_attention():
            return task.main(chosen, prepared, output)
    except interrupt.Interrupted as stop:
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


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Signals end the program with a message, from its first second on and between jobs."""
    try:
        with interrupt.handled():
            yield
    except (KeyboardInterrupt, interrupt.Interrupted) as stop:
        if os.environ.get("RANK", "0") == "0":
            print_line(str(stop) or "interrupted (SIGINT)", sys.stderr)
        raise SystemExit(getattr(stop, "code", 130)) from None


@functools.cache
def extend_hydra() -> None:
    """Users' folders of options, our launchers and searches; once a process, Hydra keeps all that it is given."""
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.config_source import ConfigResult
    from hydra.plugins.search_path_plugin import SearchPathPlugin
    from omegaconf import OmegaConf

    from neco import launch, search

    groups = config.groups() - {"hydra"}  # whose options Hydra builds itself

    class Options(FileConfigSource):
        """Of a user's folder only the groups: a folder called `weights` does not make `weights` a choice of files."""

        @staticmethod
        def scheme() -> str:
            return "options"

        def is_group(self, config_path: str) -> bool:
            return (not config_path or is_option(config_path)) and super().is_group(config_path)

        def is_config(self, config_path: str) -> bool:
            return is_option(config_path) and is_option_file(self.file(config_path))

        def load_config(self, config_path: str) -> ConfigResult:
            path = self.file(config_path)
            load_yaml(path)
            try:
                header = self._get_header_dict(path.read_text("utf-8-sig"))
            except ValueError as error:  # of Hydra
                raise NecoError(f"{path}: its first lines: {error}") from error
            check_option_file(path, config_path.split("/")[0], header["package"])
            found = OmegaConf.load(path) or OmegaConf.create()
            return ConfigResult(provider=self.provider, path=self.full_path(), config=found, header=header)

        def file(self, config_path: str) -> Path:
            return Path(self.path, self._normalize_file_name(config_path))

    def is_option(config_path: str) -> bool:
        return config_path.split("/")[0] in groups

    class Names(FileConfigSource):
        """Asked first, it has nothing and refuses names by which the sources after it would read other folders."""

        @staticmethod
        def scheme() -> str:
            return "names"

        def is_group(self, config_path: str) -> bool:
            check_option_name(config_path)
            return False

        is_config = is_group

        def available(self) -> bool:
            return True

    class UserFolders(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.prepend("neco-names", "names://")
            for path in config.user_folders():
                search_path.append("neco-user", f"options://{path}")

    with config.without_working_folder():
        Plugins.instance()  # imports all of hydra_plugins that it finds
    for source in (Names, Options):
        SourcesRegistry.instance().register(source)
    for plugin in (UserFolders, launch.Launcher, search.Optuna):
        Plugins.instance().register(plugin)
    elsewhere: Any = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))  # Hydra takes none from here
    elsewhere.neco = SimpleNamespace(Launcher=launch.Launcher, Optuna=search.Optuna)


@stoppable()
def main() -> None:
    """Entry: exit code 0, 1 for a fault of the program (with traceback), 2 for what the user can put right."""
    arguments = sys.argv[1:]
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started it
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115
    files.normalize_environment()
    try:
        config.user_folders()
    except NecoError as lacking:
        print_line(f"error: {lacking}", sys.stderr)
        raise SystemExit(2) from None
    if not arguments or {"--help", "-h"} & set(arguments):
        print(usage())
        return
    # Threads that spin while they wait take a busy machine's cores from the data workers: k-means took 15 times longer.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises, and the messages below are ours
    import hydra
    from omegaconf.errors import OmegaConfBaseException

    from neco import explain, launch, sweep

    extend_hydra()
    launch.failed.clear()
    sweep.unwritten.clear()
    debug = "debug=true" in arguments or bool(os.environ.get("NECO_DEBUG"))
    try:
        for argument in arguments:
            check_override(argument)
        sys.argv[1:] = explain.arrange(arguments)
        if any(a.startswith(tuple(f"{group}=" for group in HYDRA)) for a in arguments) and not MODES & set(arguments):
            sys.argv.append("-m")  # else Hydra would leave them out
        processes.adopt()
        if processes.here.started_by == "neco" and processes.here.rank:
            interrupt.with_parent()
        version = {} if hydra.__version__ >= "1.4" else {"version_base": "1.3"}
        hydra.main(config_path=str(config.folder()), config_name="config", **version)(job)()
        if failed := launch.failed:
            told = "\n".join(f"  {folder}: {message}" for _, folder, message in failed)
            raise NecoError(
                f"jobs that did not end well: {len(failed)}. {launch.resume_command(arguments, failed[0][0])}\n{told}"
            )
        for error in (*sweep.unwritten, *([failure] if failure else [])):
            raise error
    except Exception as error:
        process = os.environ.get("RANK") or "0"
        who = f"error (process {process})" if process != "0" else "error"
        if debug:
            print_line(traceback.format_exc(), sys.stderr)
        if started and not isinstance(error, (NecoError, OmegaConfBaseException)):
            if isinstance(error, MemoryError) or re.search("(?i)out of memory|can't allocate memory", str(error)):
                told = (str(error) or type(error).__name__).partition("\n")[0]
                smaller = (
                    "train.batch_size (or more train.accumulate), the sizes of views, extract.batch_size, of "
                    "eval.retrieval memory_size, storage=float16 and engine=torch"
                )
                print_line(f"{who}: out of memory: {told}. What makes it less: {smaller}", sys.stderr)
                raise SystemExit(2) from None
            if not re.search("closed by peer|reset by peer|Broken pipe", str(error)):
                raise  # a fault of the program, not of the configuration
            print_line(f"{who}: another process has ended; its message says why", sys.stderr)
            raise SystemExit(1) from None
        message = str(error) if isinstance(error, NecoError) else explain.explain(error, arguments)
        print_line(f"{who}: {message}", sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    from neco.logger import guard

    sys.excepthook = print_exception
    with guard.exits():
        main()
