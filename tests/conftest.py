"""Shared by all tests: a program runner, and no surprises from the machine's settings."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as neco.__main__ does, before torch is imported

import csv
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from neco.config import validate

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-user-config"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for the whole session: the drawn scenes are written once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def inside(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`inside("task=train", ...)` is `python -m neco ...` in an empty folder, in this process: (exit code, output)."""

    def run(*arguments: str) -> tuple[int, str]:
        from neco.cli.main import main

        handlers = logging.root.handlers[:]  # Hydra replaces them
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(sys, "argv", ["neco", *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            logging.root.handlers[:] = handlers
            logging.getLogger("neco").setLevel(logging.NOTSET)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def neco(tmp_path: Path, cache: Path):
    """`neco("task=train", ..., ok=True)` runs `python -m neco` in an empty folder as a user would."""

    def run(
        *arguments: str, ok: bool | None = None, cwd: Path = tmp_path, **env: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "neco", *arguments],
            cwd=cwd,
            env={**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            text=True,
            timeout=600,
        )
        if ok is not None:
            assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done

    return run


torch.set_num_threads(1)


SMALL = (  # a run of seconds: few small images, a small head, no evaluation
    "dataset.train=12", "dataset.val=4", "head.hidden=32", "head.out=16", "loss.grid=3", "train.batch_size=4",
    "train.workers=0", "train.log_steps=1", "augment.global_size=32", "augment.local_size=16", "augment.local_views=1",
    "weights=none", "optim.lr=1e-3", "eval=[]", "train.steps=4",
)  # fmt: skip


FEW = (  # the same of task=finetune
    "task=finetune", "dataset.train=12", "dataset.val=4", "finetune.crop=32", "finetune.side=48",
    "finetune.batch_size=4", "finetune.workers=0", "extract.workers=0", "finetune.log_steps=1",
    "weights=none", "optim.lr=1e-3", "optim.head_lr=1e-3", "finetune.steps=4",
)  # fmt: skip


def losses(folder: Path, column: str = "loss") -> list[float]:
    """A column of a run's metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


@pytest.fixture
def train(tmp_path: Path, cache: Path):
    """`train("key=value", ..., folder=...)` runs task=train in this process; returns the run folder."""

    def run(*overrides: str, folder: str = "run") -> Path:
        from neco.task import train as task

        drawn = not any(override.startswith("dataset=") and override != "dataset=shapes" for override in overrides)
        small = [override for override in SMALL if drawn or not override.startswith("dataset.")]
        return perform(task, tmp_path / folder, cache, *small, *overrides)

    return run


@pytest.fixture
def finetune(tmp_path: Path, cache: Path):
    """`finetune("key=value", ..., folder=...)` runs task=finetune in this process; returns the run folder."""

    def run(*overrides: str, folder: str = "run") -> Path:
        from neco.task import finetune as task

        return perform(task, tmp_path / folder, cache, *FEW, *overrides)

    return run


def perform(task: ModuleType, output: Path, cache: Path, *overrides: str) -> Path:
    """Run a task in this process; returns the run folder."""
    wanted = validate.load(*overrides, f"cache_dir={cache}", f"run_dir={output}")
    task.main(wanted, task.prepare(wanted), output)
    return output


@pytest.fixture
def saved(tmp_path: Path):
    """`saved(content)` writes a file of weights and returns its path."""

    def save(content: object, name: str = "file.pth") -> str:
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save
