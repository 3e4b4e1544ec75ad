"""The installed package: complete, and at home where it cannot write."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import CONF, ROOT
from packaging.requirements import Requirement
from packaging.version import Version


def test_the_oldest_versions_that_are_tried_are_those_that_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *(line for extra in extras if extra != "dev" for line in extras[extra])]
    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")]
    tried = {(r := Requirement(line)).name: Version(next(iter(r.specifier)).version) for line in lines}
    for wanted in map(Requirement, named):
        lowest = [Version(part.version) for part in wanted.specifier if part.operator == ">="]
        if lowest and (
            wanted.marker is None or wanted.marker.evaluate({"sys_platform": "linux", "platform_machine": "x86_64"})
        ):
            assert [tried.get(wanted.name)] == lowest, wanted


@pytest.mark.slow
def test_wheel_runs_from_a_read_only_place(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    inside = {str(path.relative_to(site / "neco" / "conf")) for path in (site / "neco" / "conf").rglob("*.yaml")}
    assert inside == {str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml")}
    assert (site / "neco" / "model" / "tiny.safetensors").stat().st_size < 1_000_000
    for folder in (site, *(p for p in site.rglob("*") if p.is_dir())):
        folder.chmod(0o555)
    env = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    few = ["dataset.train=4", "dataset.val=2", "train.steps=1", "train.batch_size=2", "train.workers=0", "eval=[]"]
    command = [sys.executable, "-m", "neco", *few, f"cache_dir={tmp_path / 'cache'}", "head.hidden=16", "run_dir=out"]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
    for folder in (site, *(p for p in site.rglob("*") if p.is_dir())):
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert Path(work / "out" / "checkpoints" / "last.ckpt").is_file()
