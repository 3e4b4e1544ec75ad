"""Whole files: what is there before stays until the new one is complete, and the dead leave nothing behind."""

import errno
import fcntl
import mmap
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from neco.runs.folder import locked
from neco.utils import atomic_files
from neco.utils.download import alone
from neco.utils.errors import NecoError


def test_what_was_there_stays_until_the_block_ends_well(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_files.whole(path, "w") as file:
        file.write("first")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_files.whole(path) as file:
        file.write(b"second")
        raise KeyError
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "not for the owner only"
    with atomic_files.scratch(tmp_path) as folder:
        (folder / "b").write_text("b")
        (folder / "b").rename(tmp_path / "b")
    assert {found.name for found in tmp_path.iterdir()} == {"a.txt", "b", "plain"}


def test_only_what_the_dead_left_is_removed(tmp_path):
    code = f"""
import os
from pathlib import Path
from neco.utils.atomic_files import scratch, whole
with scratch(Path({str(tmp_path)!r})) as folder, whole(Path({str(tmp_path / "a")!r})) as file:
    (folder / "half").write_text("half")
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    left = {*tmp_path.glob(atomic_files.PATTERN)}
    assert len(left) == 2
    with atomic_files.whole(tmp_path / "b") as file, atomic_files.scratch(tmp_path) as folder:
        file.write(b"of the living")
        atomic_files.tidy(tmp_path)
        assert folder.is_dir() and len({*tmp_path.glob(atomic_files.PATTERN)} - left) == 2
        assert not left & {*tmp_path.iterdir()}
    assert [found.name for found in tmp_path.iterdir()] == ["b"]


def fail(number: int):
    """A system call that the file system does not have."""

    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


LACKING = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK)


@pytest.mark.parametrize("number", LACKING, ids=errno.errorcode.get)
def test_without_hard_links_a_second_name_is_a_copy(tmp_path, monkeypatch, number):
    last, best = tmp_path / "last", tmp_path / "best"
    last.write_bytes(b"one")
    best.write_bytes(b"before")
    monkeypatch.setattr(os, "link", fail(number))
    atomic_files.link_or_copy(last, best)
    assert best.read_bytes() == b"one" and atomic_files.has_same_content(last, best)
    last.write_bytes(b"two")
    assert best.read_bytes() == b"one" and not atomic_files.has_same_content(last, best)
    assert {*tmp_path.iterdir()} == {last, best}


def test_a_second_name_is_a_link_where_there_are_links(tmp_path):
    last, best = tmp_path / "last", tmp_path / "best"
    last.write_bytes(b"one")
    for _ in range(2):
        atomic_files.link_or_copy(last, best)
        assert last.samefile(best) and {*tmp_path.iterdir()} == {last, best}


@pytest.mark.parametrize("number", LACKING, ids=errno.errorcode.get)
def test_what_cannot_be_renamed_is_copied(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "replace", fail(number))
    with atomic_files.whole(tmp_path / "a") as file:
        file.write(b"first")
    with atomic_files.whole(tmp_path / "a") as file:
        file.write(b"second")
    with atomic_files.scratch(tmp_path) as folder:
        (folder / "shapes").mkdir()
        (folder / "shapes/b").touch()
        atomic_files.rename(folder / "shapes", tmp_path / "shapes")
    assert (tmp_path / "a").read_bytes() == b"second" and (tmp_path / "shapes/b").is_file()
    assert {found.name for found in tmp_path.iterdir()} == {"a", "shapes"}


@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EIO), ids=errno.errorcode.get)
def test_a_disk_that_is_full_or_broken_is_still_an_error(tmp_path, monkeypatch, number):
    (tmp_path / "a").write_bytes(b"first")
    for call in ("replace", "fsync"):
        with monkeypatch.context() as broken, pytest.raises(OSError), atomic_files.whole(tmp_path / "a") as file:
            broken.setattr(os, call, fail(number))
            file.write(b"second")
        assert [found.name for found in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"first"


@pytest.mark.parametrize(
    "number", (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL), ids=errno.errorcode.get
)
def test_without_locks_and_syncs_there_is_one_warning(tmp_path, monkeypatch, caplog, number):
    atomic_files._warn_once.cache_clear()
    for module, name in ((fcntl, "lockf"), (fcntl, "flock"), (os, "fsync"), (os, "utime")):
        if (name, number) != ("fsync", errno.ENOLCK):
            monkeypatch.setattr(module, name, fail(number))
    for _ in range(2):
        with (
            locked(tmp_path / "run", "train"),
            alone(tmp_path / "weights.pth"),
            atomic_files.whole(tmp_path / "a") as file,
        ):
            file.write(b"content")
            atomic_files.touch(tmp_path / "run")
    assert (tmp_path / "a").read_bytes() == b"content"
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and all("has no locks" in text for text in said), said
    assert str(tmp_path / "run") in said[0]


@pytest.mark.parametrize("number", (errno.EAGAIN, errno.EACCES), ids=errno.errorcode.get)
def test_a_lock_that_another_process_holds_counts(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "lockf", fail(number))
    with pytest.raises(NecoError, match="another process is running there"), locked(tmp_path / "run", "train"):
        pass


def test_without_memory_maps_files_are_read(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "empty").touch()
    assert atomic_files.can_be_mapped(tmp_path / "a") and atomic_files.can_be_mapped(tmp_path / "empty")
    monkeypatch.setattr(mmap, "mmap", fail(errno.ENODEV))
    assert not atomic_files.can_be_mapped(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        atomic_files.can_be_mapped(tmp_path / "none")


def test_the_system_calls_that_not_all_file_systems_have_are_in_one_module():
    pattern = re.compile(
        r"os\.(link|replace|rename|fsync|utime|symlink|chmod)\(|fcntl|\.(hardlink_to|symlink_to|chmod)\("
    )
    found = {path.name for path in (ROOT / "neco").rglob("*.py") if pattern.search(path.read_text())}
    assert found <= {"atomic_files.py", "archive.py"}, "archive.py sets a time within an OSError that is a warning"


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_what_is_appended_to_is_a_file_of_its_folder(tmp_path, kind):
    victim, path = tmp_path / "victim", tmp_path / "run/.lock"
    path.parent.mkdir()
    if kind != "dangling":
        victim.write_text("precious")
    if kind in ("link", "dangling"):
        path.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises((NecoError, IsADirectoryError), match=r"\.lock"):
        atomic_files.open_for_appending(path)
    if kind == "link":
        with pytest.raises(NecoError, match=r"\.lock is a link"), locked(path.parent, "eval"):
            pass
        (tmp_path / "run/.a.lock").symlink_to(victim)
        with pytest.raises(NecoError, match=r"\.a\.lock is a link"), alone(tmp_path / "run/a"):
            pass
    assert victim.exists() == (kind != "dangling") and (kind == "dangling" or victim.read_text() == "precious")
    path.rmdir() if kind == "folder" else path.unlink()
    for _ in range(2):
        with atomic_files.open_for_appending(path) as file:
            file.write("line\n")
    assert path.read_text() == "line\nline\n"
