"""Whole files: what is there before stays until the new one is complete, and the dead leave nothing behind."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from neco import files


def test_what_was_there_stays_until_the_block_ends_well(tmp_path):
    path = tmp_path / "a.txt"
    with files.whole(path, "w") as file:
        file.write("first")
        assert not path.exists()
    with pytest.raises(KeyError), files.whole(path) as file:
        file.write(b"second")
        raise KeyError
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "not for the owner only"
    with files.scratch(tmp_path) as folder:
        (folder / "b").write_text("b")
        (folder / "b").rename(tmp_path / "b")
    assert {found.name for found in tmp_path.iterdir()} == {"a.txt", "b", "plain"}


def test_only_what_the_dead_left_is_removed(tmp_path):
    code = f"""
import os
from pathlib import Path
from neco import files
with files.scratch(Path({str(tmp_path)!r})) as folder, files.whole(Path({str(tmp_path / "a")!r})) as file:
    (folder / "half").write_text("half")
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    left = {*tmp_path.glob(files.PATTERN)}
    assert len(left) == 2
    with files.whole(tmp_path / "b") as file, files.scratch(tmp_path) as folder:
        file.write(b"of the living")
        files.tidy(tmp_path)
        assert folder.is_dir() and len({*tmp_path.glob(files.PATTERN)} - left) == 2
        assert not left & {*tmp_path.iterdir()}
    assert [found.name for found in tmp_path.iterdir()] == ["b"]
