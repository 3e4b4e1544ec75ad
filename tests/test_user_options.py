"""Option files in the working folder: settings are taken and told, nothing is run, what cannot be read is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from neco.config import validate
from neco.config.user_options import check_override, is_option_file, machine_files
from neco.sweep.backends import Slurm
from neco.utils.errors import NecoError

HEAD = "# @package _global_\n"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module that writes `canary` where it is imported, its class where it is called; it must not be."""
    place = tmp_path / "modules"
    place.mkdir()
    code = f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\n\n\nclass Harm:\n    pass\n"
    (place / "planted.py").write_text(code)
    monkeypatch.syspath_prepend(str(place))
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists() and "planted" not in sys.modules, "it ran"


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


HARM = "{_target_: planted.Harm}"
MACHINE = {
    "callback": (f"hydra: {{callbacks: {{x: {HARM}}}}}", "hydra: a machine file holds settings only"),
    "launcher": (f"hydra: {{launcher: {HARM}}}", "hydra: a machine file holds settings only"),
    "logging": ("hydra: {job_logging: {handlers: {x: {(): planted.Harm}}}}", "hydra: a machine file"),
    "mode": ("hydra: {mode: MULTIRUN}", "hydra: a machine file"),
    "component": ("loss: {_target_: planted.Harm}", "loss._target_='planted.Harm': a value holds data only"),
    "component of conf": ("loss: {_target_: neco.loss.neco.NeCo}", "loss._target_='neco.loss.neco.NeCo'"),
    "new key": (f"a: {{b: [1, {{c: {HARM}}}]}}", "a.b.c._target_='planted.Harm'"),
    "top": ("_target_: planted.Harm", "_target_='planted.Harm'"),
    "null": ("loss: {_target_: null}", "loss._target_=None"),
    "choice": ("defaults: [override /loss: cosine]", "defaults: a machine file"),
    "package": (f"defaults: [/loss@hydra.callbacks.x: neco]\nx: {HARM}", "adds to the node hydra"),
    "shell": ("launcher: {setup: [touch canary]}", "launcher.setup can run commands"),
    "sbatch": ("launcher: {extra: {export: BASH_ENV}}", "launcher.extra can run commands"),
    "shell by reference": ("launcher: \"${oc.create:'{setup: [touch canary]}'}\"", "launcher can run commands"),
    "trust": ("trust_pickle: true", "trust_pickle=True: say it on the command line"),
    "reference": (
        "loss: \"${oc.create:'{_target_: planted.Harm}'}\"",
        "loss._target_='planted.Harm': no option of loss",
    ),
    "not utf-8": (b"# k\xe4se\ndata_root: x\n", "is not UTF-8"),
    "not yaml": ("a: [", "is not valid YAML"),
    "list": ("- a", "must be a mapping"),
}


@pytest.mark.parametrize("name", MACHINE)
def test_a_machine_file_holds_settings_only(inside, planted, tmp_path, name):
    text, words = MACHINE[name]
    text = text if isinstance(text, bytes) else f"{HEAD}{text}\n"
    path = write(tmp_path / "machine/default.yaml", text)
    for command in (("task=train",), ("-m", "seed=1,2")) if "hydra" in str(text) else (("task=train",),):
        code, said = inside(*command, "dataset.train=4", "dataset.val=2")
        assert code == 2 and "Traceback" not in said, said
        assert said.startswith("error: ") and words in said and (str(path) in said or name == "reference"), said
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("*.*"))


@pytest.mark.parametrize("package", [None, "hydra", "hydra.callbacks.x", "_global_.hydra.callbacks.x", "loss"])
def test_the_package_of_a_machine_file_is_the_top(inside, planted, tmp_path, package):
    head = f"# @package {package}\n" if package else ""
    path = write(tmp_path / "machine/default.yaml", f"{head}_target_: planted.Harm\n")
    code, said = inside("--cfg", "job")
    assert code == 2 and str(path) in said, said


@pytest.mark.parametrize("kind", ["folder", "dangling link", "loop", "pipe"])
def test_what_is_no_file_is_named(inside, tmp_path, kind):
    path = tmp_path / "machine/default.yaml"
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nothing.yaml" if kind == "dangling link" else path.name)
    code, said = inside("--cfg", "job")
    assert code == 2 and f"{path}: is no file" in said, said


def test_an_unreadable_machine_file_is_named(inside, tmp_path, monkeypatch):
    path = write(tmp_path / "machine/default.yaml", HEAD)
    opened = Path.open

    def refuse(self, *how, **named):  # tests may run as root, who may read everything
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *how, **named)

    monkeypatch.setattr(Path, "open", refuse)
    code, said = inside("--cfg", "job")
    assert code == 2 and f"error: {path}: cannot be read: Permission denied" in said, said


def test_a_folder_that_cannot_be_searched_is_named(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(NecoError, match=r"default\.yaml: cannot be read: Permission denied"):
        is_option_file(tmp_path / "default.yaml")


def test_jobs_say_which_machine_file_was_read(inside, tmp_path, monkeypatch):
    own = write(tmp_path / "own/neco/machine/default.yaml", f"{HEAD}launcher: {{setup: [module load x]}}\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "own"))
    light = ("task=embed", "weights=none", "dataset.train=2", "dataset.val=2", "embed.size=32", "extract.workers=0")
    code, said = inside(*light, "run_dir=one")
    assert code == 0 and f"settings    read from {own}" in said, said
    here = write(tmp_path / "machine/default.yaml", f"{HEAD}seed: 7\n")
    code, said = inside(*light, "run_dir=two")
    assert code == 0 and f"read from {here}" in said and str(own) not in said, said
    assert f"settings    read from {here}" in (tmp_path / "two/log.txt").read_text()
    assert "seed: 7\n" in (tmp_path / "two/config.yaml").read_text()
    link = tmp_path / "machine/other.yaml"
    link.symlink_to(write(tmp_path / "elsewhere.yaml", f"{HEAD}loss: {{_target_: os.system}}\n"))
    code, said = inside(*light, "machine=other")
    assert code == 2 and str(link) in said and "_target_='os.system'" in said


def test_machine_files_are_those_that_hydra_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "own"))
    assert machine_files({"machine": "default", "task": "train"}) == []
    own = write(tmp_path / "own/neco/machine/gpu.yaml", "")
    assert machine_files({"machine": "gpu", "machine@x": None}) == [own]


PRESETS = {
    "callback": (
        f"hydra: {{callbacks: {{x: {HARM}}}}}",
        "hydra.callbacks: an option may set only mode, sweep, sweeper",
    ),
    "launcher": (f"hydra: {{launcher: {HARM}}}", "hydra.launcher: an option may set only"),
    "logging": ("hydra: {job_logging: {handlers: {x: {(): planted.Harm}}}}", "hydra.job_logging: an option"),
    "environment": ("hydra: {job: {env_set: {LD_PRELOAD: x.so}}}", "hydra.job: an option"),
    "search path": ("hydra: {searchpath: [/tmp]}", "hydra.searchpath: an option"),
    "sweeper": ("hydra: {sweeper: {_target_: planted.Harm}}", "hydra.sweeper._target_='planted.Harm'"),
    "params": (f"hydra: {{sweeper: {{params: {{x: {HARM}}}}}}}", "hydra.sweeper.params.x._target_='planted.Harm'"),
    "reference": (f"x: {HARM}\nhydra: {{sweeper: {{params: '${{x}}'}}}}", "Hydra's own keys take no references"),
    "no mapping": ("hydra: ${x}", "hydra='${x}'"),
    "params for hydra": (
        "hydra: {sweeper: {params: {+hydra.job_logging.handlers.x.(): planted.Harm}}}",
        "hydra.sweeper.params: hydra.job_logging",
    ),
    "params by a package": (
        "hydra: {sweeper: {params: {+loss@hydra.job_logging: 'other,other'}}}",
        "hydra.sweeper.params: loss@hydra.job_logging",
    ),
    "params for shell lines": (
        "hydra: {sweeper: {params: {launcher.setup: '[touch canary]'}}}",
        "hydra.sweeper.params: launcher.setup",
    ),
    "params that lead out": (
        "hydra: {mode: MULTIRUN, sweeper: {params: {loss: ../../proc/self/cwd/outside}}}",
        "../../proc/self/cwd/outside: the name of an option leads out of its group",
    ),
    "shell": ("launcher: {setup: [touch canary]}", "launcher.setup can run commands"),
    "shell by a package": ("defaults: [/loss@launcher: neco]", "launcher can run commands"),
    "outside": (f"defaults: [{'/..' * 20}/proc/self/cwd/outside]", "leads out of its group"),
    "outside by a reference": (
        f'defaults: ["${{oc.decode:\'\\"{"/.." * 20}/proc/self/cwd/outside\\"\'}}"]',
        "error: ",
    ),
    "outside by its whole path": ("defaults: [//proc/self/cwd/outside]", "leads out of its group"),
    "params for trust": ("hydra: {sweeper: {params: {trust_pickle: true}}}", "hydra.sweeper.params: trust_pickle"),
    "package": ("defaults: [/loss@hydra.callbacks.x: neco]", "adds to the node hydra"),
    "package in a list": ("defaults: [{/loss@_global_.hydra.callbacks.x: neco}]", "adds to the node hydra"),
    "component": ("loss: {_target_: planted.Harm}", "loss._target_='planted.Harm': no option of loss names this class"),
    "head": ("head: {_target_: planted.Harm}", "head._target_='planted.Harm': no option of head names this class"),
    "extract": ("extract: {_target_: planted.Harm}", "extract._target_='planted.Harm': no option of extract"),
    "extract, which is no group": (
        "extract: {_target_: planted.Other}",
        "extract._target_='planted.Other': no option of",
    ),
    "value": (f"loss: {{grid: {HARM}}}", "loss.grid._target_='planted.Harm': a value holds data only"),
    "spine": (f"train: {{steps: [{HARM}]}}", "train.steps._target_='planted.Harm': a value holds data only"),
    "machine by the back door": (
        "defaults: [/machine@_here_: other]",
        "machine/other.yaml: loss._target_='planted.Harm'",
    ),
    "trust": ("trust_pickle: true", "trust_pickle=True: say it on the command line"),
}


@pytest.mark.parametrize("group", ["experiment", "sweep"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_of_the_working_folder_runs_nothing(inside, planted, tmp_path, name, group):
    text, words = PRESETS[name]
    write(tmp_path / "machine/other.yaml", f"{HEAD}loss: {HARM}\n")
    write(tmp_path / "extract/other.yaml", "_target_: planted.Other\n")
    write(tmp_path / "outside.yaml", "# @package hydra.job_logging\nformatters: {x: {(): planted.Harm}}\n")
    write(tmp_path / f"{group}/mine.yaml", f"{HEAD}{text}\n")
    for mode in ((), ("-m",)):
        code, said = inside("task=train", "dataset.train=4", "dataset.val=2", f"{group}=mine", *mode)
        assert code == 2 and "Traceback" not in said and words in said, said


def test_a_sweep_of_the_users_own_is_taken(inside, tmp_path):
    text = f"{HEAD}hydra:\n  mode: MULTIRUN\n  sweep: {{subdir: ''}}\n  sweeper:\n    params: {{seed: '1,2'}}\n"
    write(tmp_path / "sweep/mine.yaml", text)
    light = ("task=embed", "weights=none", "dataset.train=2", "dataset.val=2", "embed.size=32", "extract.workers=0")
    code, said = inside(*light, "sweep=mine", "run_dir=all")
    assert code == 0 and {p.name for p in (tmp_path / "all").glob("seed*")} == {"seed-1", "seed-2"}, said


def test_modules_of_the_working_folder_replace_none_and_are_no_plugins(tmp_path):
    code = f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\n"
    for name in ("torch", "yaml", "random", "hydra", "hydra_plugins/theirs"):
        write(tmp_path / f"{name}.py", code)
    write(tmp_path / "own.py", "from neco.loss.neco import NeCo\n\n\nclass Own(NeCo):\n    pass\n")
    write(tmp_path / "loss/mine.yaml", "defaults: [neco]\n_target_: own.Own\n")
    command = [sys.executable, "-m", "neco", "loss=mine", "loss.steepness=x", "dataset.train=4", "dataset.val=2"]
    place = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=tmp_path, env=place, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.startswith("error: loss.steepness='x': "), found.stderr
    assert not (tmp_path / "canary").exists(), "a module of the working folder ran"


def test_options_of_hydra_are_not_taken_from_the_working_folder(inside, planted, tmp_path):
    write(tmp_path / "hydra/callbacks/x.yaml", f"x: {HARM}\n")
    write(tmp_path / "hydra/job_logging/neco.yaml", "handlers: {x: {(): planted.Harm}}\n")
    write(tmp_path / "config.yaml", f"hydra: {{callbacks: {{x: {HARM}}}}}\n")
    assert inside("--cfg", "job")[0] == 0
    code, said = inside("+hydra/callbacks=x")
    assert code == 2 and "hydra/callbacks: no such key" in said, said


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x._target_=os.system", "hydra.launcher._target_=os.system",
        "+hydra.callbacks.x={_target_: os.system}",
        "+hydra.job_logging.handlers.console.()=os.system", "hydra.job_logging.handlers.console.class=os.system",
        "++hydra={callbacks: {x: {_target_: os.system}}}",
    ],
)  # fmt: skip
def test_the_command_line_replaces_no_component_of_hydra(inside, override):
    code, said = inside(override)
    assert code == 2 and said.startswith(f"error: {override}: the components of hydra"), said


def test_other_keys_of_hydra_are_free():
    for override in ("hydra.sweeper.n_trials=3", "hydra.job_logging.loggers.neco.level=DEBUG", "hydra.verbose=true"):
        check_override(override)


@pytest.mark.parametrize("key", ["partition", "account", "constraint", "qos", "extra", "extra key"])
def test_settings_of_slurm_are_no_shell_lines(key):
    keys = {"partition", "account", "constraint", "qos", "extra", "mem_gb"}
    numbers = dict.fromkeys(("parallel", "time", "signal_seconds", "requeues", "gpus", "cpus"), 1)
    good = {**dict.fromkeys(keys), **numbers, "detach": False, "setup": ["module load x"]}
    validate.check(
        Slurm, {**good, "partition": "gpu,long", "extra": {"exclude": "node7", "exclusive": True}}, "launcher"
    )
    line = "gpu\ntouch canary #"
    bad = {"extra": {"exclude": line}, "extra key": {line: "x"}}.get(key, line)
    with pytest.raises(NecoError, match=rf"launcher\.{key.split()[0]}=.*one_line"):
        validate.check(Slurm, {**good, key.split()[0]: bad}, "launcher")


WRONG = ("5", "null", "[a]", "{a: 1}", "''", "loss", "true", "os.system", "neco.loss", "neco.loss.neco.NeCo.forward")


@pytest.mark.parametrize("target", WRONG)
def test_a_target_that_is_none_is_one_message(inside, tmp_path, target):
    said = inside(f"loss._target_={target}", "dataset.train=4", "dataset.val=2")[1]
    assert said.startswith("error: loss._target_=") and "no option of loss names this class" in said, said
    assert "neco.loss." in said and f"command line (loss._target_={target})" in said


@pytest.mark.parametrize("target", ["5", "null", "[a]", "''", "loss", "nothing.there", "os.sep"])
def test_a_bad_target_in_an_option_of_the_users_own_is_one_message(inside, tmp_path, target):
    write(tmp_path / "loss/mine.yaml", f"defaults: [neco]\n_target_: {target}\n")
    code, said = inside("loss=mine", "dataset.train=4", "dataset.val=2")
    assert code == 2 and said.startswith("error: ") and "_target_" in said and "Traceback" not in said, said


def test_files_that_are_no_options_do_no_harm(inside, tmp_path):
    bad = write(tmp_path / "model/mine.yaml", b"# k\xe4se\n_target_: x\n")
    write(tmp_path / "model/other.yaml", "- 1\n")
    write(tmp_path / "loss/theirs.yaml", "a: [")
    (tmp_path / "model/folder.yaml").mkdir()
    code, said = inside("--help")
    assert code == 0 and "Traceback" not in said
    assert any(
        line.split()[:1] == ["mine"] and f"cannot be used: {bad}: is not UTF-8" in line for line in said.splitlines()
    )
    assert inside("--cfg", "job")[0] == 0
    code, said = inside("model=mine")
    assert code == 2 and said.startswith(f"error: {bad}: is not UTF-8"), said
    code, said = inside("loss._target_=os.system", "dataset.train=4", "dataset.val=2")
    assert code == 2 and "loss._target_='os.system': no option" in said, said
    with pytest.raises(NecoError, match=r"mine\.yaml: is not UTF-8"):
        validate.option("model", "mine", {})
