"""The run folder: what was asked (config, overrides), where it ran (environment), and its lock."""

import contextlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from neco.dataset.base import Dataset
from neco.distributed import collectives
from neco.runs.results import GIT_PLACES, write
from neco.utils import atomic_files
from neco.utils.errors import NecoError
from neco.utils.masking import mask_nested, mask_secrets

PACKAGES = (
    "neco",
    "torch",
    "timm",
    "pytorch-lightning",
    "hydra-core",
    "numpy",
    "opencv-python-headless",
    "faiss-gpu",
    "faiss-cpu",
)


def git_state(here: Path = Path(__file__).parent) -> dict[str, str | None]:
    """`git`: the checkout's revision, with `+changes` where files differ from it, or None and the `git_problem`."""
    # Whose checkout it is does not matter: its code is being run. A hook that runs us names another repository.
    trusted = ["git", "-c", "safe.directory=*", "--no-optional-locks", "-C", str(here)]
    environment = {key: value for key, value in os.environ.items() if key not in GIT_PLACES}

    def git(*arguments: str) -> str:
        done = subprocess.run([*trusted, *arguments], capture_output=True, text=True, check=True, env=environment)
        return done.stdout.strip()

    try:
        if "neco/runs/results.py" not in git("ls-files", "--full-name", "results.py"):
            problem = "installed inside another checkout"
        else:
            return {"git": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")}
    except subprocess.CalledProcessError as error:
        problem = str(error.stderr).strip().partition("\n")[0] or str(error)
    except OSError as error:
        problem = f"git: {error.strerror}"
    return {"git": None, "git_problem": problem}


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe(
    output: Path, config: dict[str, Any], overrides: list[str], choices: Mapping[str, Any], device: str
) -> None:
    """Write config.yaml (resolved), overrides.txt and environment.json into the run folder."""
    write(output / "config.yaml", yaml.safe_dump(mask_nested(config), sort_keys=False, allow_unicode=True))
    write(output / "overrides.txt", "".join(f"{override}\n" for override in overrides))
    environment = {
        "command": shlex.join(map(mask_secrets, sys.argv)),
        **git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device,
        "choices": dict(choices),  # the option of each group
        "packages": versions(),
    }
    write(output / "environment.json", json.dumps(environment, indent=2) + "\n")


def note_choice(output: Path, **datasets: Dataset | None) -> None:
    """Write the keys of the train images of each data set to `<its name>_files.txt`, where they are a choice.

    `dataset.files` of another run takes such a file. A data set whose train split was not wanted is left out.
    """
    for name, dataset in datasets.items():
        if dataset and dataset.chooses and (samples := dataset.listed("train")):
            keys = (f"./{s.key}" if s.key[0] in "# " else s.key for s in samples)  # else a comment, or stripped
            write(output / f"{name}_files.txt", "".join(f"{key}\n" for key in keys), mask=False)


@contextlib.contextmanager
def locked(folder: Path, task: str) -> Iterator[None]:
    """Hold the run folder; another command that wants it, or another task than it holds, gets a NecoError.

    Of several processes of one command the first holds it for all.
    """
    if not collectives.leader():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    if config.is_file() and f"task: {task}\n" not in (text := config.read_text(errors="replace")):
        held = re.search(r"^task: (\w+)$", text, re.MULTILINE)
        if not held and (folder / "checkpoints").is_dir():
            raise NecoError(f"{config} is damaged: remove it, and the same command goes on with the run")
        what = f"a run of task={held.group(1)}" if held else "a config.yaml of something else"
        raise NecoError(f"run_dir={folder} holds {what}; give task={task} a folder of its own")
    with atomic_files.open_for_appending(folder / ".lock") as file:
        if not atomic_files.lock(file):
            raise NecoError(f"run_dir={folder}: another process is running there")
        yield
