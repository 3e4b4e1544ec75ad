"""A few trials of what comes from outside, others each day; `make soak` does all of them."""

import ast
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import soak
from conftest import ROOT
from soak import life

TRIALS = [
    pytest.param(trial, id=f"{topic}-{trial.name}", marks=[pytest.mark.slow] * (topic in ("configs", "numbers")))
    for topic in ("inputs", "hostile", "configs", "weights", "numbers")
    for trial in soak.trials(topic)
]


def outcomes(topic: str, name: str, folder: Path) -> tuple[int, int]:
    """How many outcomes there are, and have to be."""
    trial = next(trial for trial in soak.trials(topic) if trial.name == name)
    return len([*trial(folder, trial.small)]), trial.small


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trial", TRIALS)
def test_trial(trial: soak.Trial, tmp_path: Path) -> None:
    asked = trial.topic, trial.name, tmp_path
    if trial.topic in ("configs", "numbers"):  # which train in forks: not of a process whose autograd has threads
        with ProcessPoolExecutor(1, mp_context=life.server()) as pool:
            found, wanted = pool.submit(outcomes, *asked).result()
    else:
        found, wanted = outcomes(*asked)
    assert found >= wanted


FORBIDDEN = {  # what makes code of text, or files of archives
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "tempfile.mktemp", "shutil.unpack_archive", "joblib.load",
    "*.extractall",
}  # fmt: skip
ALLOWED = {("torch.load", "neco/model/sources.py"), ("torch.jit.load", "neco/model/sources.py")}


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """What is called anywhere in the code, by its dotted name, and where."""
    for path in sorted([*(ROOT / "neco").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node, path.relative_to(ROOT).as_posix()


def test_no_text_becomes_code() -> None:
    found = [(name, path) for name, _, path in calls()]
    assert len(found) > 5000 and set(found) >= ALLOWED
    for name, path in found:
        assert name not in FORBIDDEN and f"*.{name.rpartition('.')[2]}" not in FORBIDDEN, f"{name} in {path}"
        assert not name.endswith(("torch.load", "jit.load")) or (name, path) in ALLOWED, f"{name} in {path}"
    for name, node, path in calls():
        for keyword in node.keywords:
            assert keyword.arg not in ("shell", "allow_pickle"), f"{name}({keyword.arg}=...) in {path}"
