"""Start the program: Hydra with our options, exit codes, errors in one line."""

import contextlib
import functools
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from neco.cli.help import HYDRA, usage
from neco.config import discovery, validate
from neco.config.user_options import check_option_file, check_option_name, check_override, is_option_file
from neco.job import run
from neco.utils import atomic_files, processes, signals
from neco.utils.errors import NecoError
from neco.utils.masking import print_exception, print_line
from neco.utils.yaml_file import load_yaml

MODES = {"-m", "--multirun", "-c", "--cfg", "--info"}


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Signals end the program with a message, from its first second on and between jobs."""
    try:
        with signals.handled():
            yield
    except (KeyboardInterrupt, signals.Interrupted) as stop:
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

    from neco.sweep import launcher, optuna

    groups = discovery.groups() - {"hydra"}  # whose options Hydra builds itself

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
            for path in discovery.user_folders():
                search_path.append("neco-user", f"options://{path}")

    with validate.without_working_folder():
        Plugins.instance()  # imports all of hydra_plugins that it finds
    for source in (Names, Options):
        SourcesRegistry.instance().register(source)
    for plugin in (UserFolders, launcher.Launcher, optuna.Optuna):
        Plugins.instance().register(plugin)
    elsewhere: Any = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))  # Hydra takes none from here
    elsewhere.neco = SimpleNamespace(Launcher=launcher.Launcher, Optuna=optuna.Optuna)


@stoppable()
def main() -> None:
    """Entry: exit code 0, 1 for a fault of the program (with traceback), 2 for what the user can put right."""
    arguments = sys.argv[1:]
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started it
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115
    atomic_files.normalize_environment()
    try:
        discovery.user_folders()
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

    from neco.cli import explain
    from neco.sweep import launcher, summary

    started, failure = False, None

    @functools.wraps(run)  # what other processes of a sweep run
    def job(cfg: Any) -> Any:
        """`run` for Hydra, which would announce an error of a single run in words of its own."""
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        nonlocal started, failure
        started = True
        try:
            return run(cfg)
        except NecoError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            failure = error

    extend_hydra()
    launcher.failed.clear()
    summary.unwritten.clear()
    debug = "debug=true" in arguments or bool(os.environ.get("NECO_DEBUG"))
    try:
        for argument in arguments:
            check_override(argument)
        sys.argv[1:] = explain.arrange(arguments)
        if any(a.startswith(tuple(f"{group}=" for group in HYDRA)) for a in arguments) and not MODES & set(arguments):
            sys.argv.append("-m")  # else Hydra would leave them out
        processes.adopt()
        if processes.here.started_by == "neco" and processes.here.rank:
            signals.with_parent()
        version = {} if hydra.__version__ >= "1.4" else {"version_base": "1.3"}
        hydra.main(config_path=str(discovery.folder()), config_name="config", **version)(job)()
        if failed := launcher.failed:
            told = "\n".join(f"  {folder}: {message}" for _, folder, message in failed)
            raise NecoError(
                f"jobs that did not end well: {len(failed)}. {launcher.resume_command(arguments, failed[0][0])}\n{told}"
            )
        for error in (*summary.unwritten, *([failure] if failure else [])):
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


def start() -> None:
    """`python -m neco`: `main`, and an end that no library's work at exit can put off."""
    from neco.logger import background

    sys.excepthook = print_exception
    with background.exits():
        main()
