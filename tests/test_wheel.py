"""The installed package: complete, and at home where it cannot write."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import CONF, ROOT


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
