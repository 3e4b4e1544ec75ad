"""Digests of contents are never stale, and cost nothing where nothing changed."""

import os
import shutil
from pathlib import Path

import pytest

from neco.dataset import digests, file_state
from neco.dataset.digests import Contents, DigestStore, noting, store_in
from neco.dataset.files import read_bytes
from neco.utils.errors import NecoError


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    monkeypatch.setattr(file_state, "STEP", (0, 0))  # what was written just now is trusted
    digests._store.cache_clear()


@pytest.fixture
def read(monkeypatch):
    """Files that were read for their digest."""
    found: list[str] = []
    real = digests.read_digest
    monkeypatch.setattr(digests, "read_digest", lambda ref: (found.append(Path(str(ref)).name), real(ref))[1])
    return found


@pytest.fixture
def refs(tmp_path):
    (tmp_path / "data").mkdir()
    for name in "abc":
        (tmp_path / "data" / name).write_text(name * 9)
    return [str(tmp_path / "data" / name) for name in "abc"]


def in_another_process(refs, index):
    digests._store.cache_clear()
    return Contents(refs, index).digests()


def test_only_what_changed_is_read_again(refs, read, tmp_path):
    index = tmp_path / "index"
    first = in_another_process(refs, index)
    assert sorted(read) == ["a", "b", "c"] and len({*first}) == 3
    read.clear()
    assert in_another_process(refs, index) == first and read == []
    times = Path(refs[1]).stat()
    Path(refs[1]).write_text("B" * 9)
    os.utime(refs[1], ns=(times.st_atime_ns, times.st_mtime_ns))  # same size and time
    now = in_another_process(refs, index)
    assert read == ["b"] and [a == b for a, b in zip(now, first, strict=True)] == [True, False, True]
    read.clear()
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    copies = [ref.replace("data", "copy") for ref in refs]
    assert in_another_process(copies, index) == now and len(read) == 3, "identity is content"


def test_what_was_read_for_another_purpose_is_not_read_again(refs, read, tmp_path):
    if os.fork() == 0:  # as data workers do
        with noting(store_in(tmp_path / "index").remember):
            for ref in refs:
                read_bytes(ref)
        os._exit(0)
    os.wait()
    assert len(set(Contents(refs, tmp_path / "index").digests())) == 3 and read == []
    assert Contents(refs, None).digests() == Contents(refs, tmp_path / "index").digests() and len(read) == 3


@pytest.mark.parametrize("state", [(0, 5, 10**9 + 1, 10**9 + 2), (7, 5, 10**9, 10**9)])
def test_times_that_tell_nothing_are_not_trusted_by_another_process(refs, read, tmp_path, monkeypatch, state):
    monkeypatch.setattr(digests, "state_of", lambda status: state)
    old = in_another_process(refs[:1], tmp_path / "index")
    Path(refs[0]).write_text("A" * 9)
    assert in_another_process(refs[:1], tmp_path / "index") != old
    assert len(read) == 2 and not file_state.is_telling(state)
    assert file_state.is_telling((7, 5, 10**9, 2 * 10**9)) and file_state.is_telling((7, 5, 10**9 + 1, 10**9 + 1))


def test_a_file_that_is_younger_than_a_step_of_the_clock_is_not_remembered(refs, tmp_path, monkeypatch):
    monkeypatch.setattr(file_state, "STEP", (10**12, 10**12))
    frozen = digests.state_of(Path(refs[0]).stat())
    monkeypatch.setattr(digests, "state_of", lambda status: frozen)  # changes too fast for the clock
    old = Contents(refs[:1], tmp_path / "index").digests()
    Path(refs[0]).write_text("A" * 9)
    assert Contents(refs[:1], tmp_path / "index").digests() != old


@pytest.mark.parametrize("damage", [b"", b"x" * 17, os.urandom(20_000)])
def test_a_damaged_table_is_as_good_as_what_is_whole_in_it(refs, read, tmp_path, damage):
    index = tmp_path / "index"
    first = in_another_process(refs, index)
    table = index / "digests.bin"
    whole = table.read_bytes()
    assert len(whole) == 3 * digests.RECORD.size
    table.write_bytes(whole[:50] + damage + whole[50:])
    read.clear()
    assert in_another_process(refs, index) == first and len(read) == (len(damage) > 0) + (len(damage) > 5000)


def test_the_table_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "RECORDS", 10)
    store, state = DigestStore(tmp_path), (1, 2, 3, 4)
    for number in range(25):
        store.remember(f"/{number}", state, bytes([number]) * 16)
        assert store.digests([]) == []
        assert (tmp_path / "digests.bin").stat().st_size <= 11 * digests.RECORD.size
    later = DigestStore(tmp_path)
    later.digests([])
    assert later.recall("/24", state) == "18" * 16 and later.recall("/0", state) is None


def test_a_change_while_files_are_used_is_noticed_and_a_mere_touch_is_not(refs, tmp_path):
    contents = Contents(refs, tmp_path / "index")
    contents.digests()
    os.utime(refs[0])
    assert contents.changed() is None
    Path(refs[2]).write_text("C" * 9)
    assert contents.changed() == refs[2]


def test_a_file_that_is_not_there_is_named(refs, tmp_path):
    with pytest.raises(NecoError, match=r"cannot read .*/none: No such file"):
        Contents([*refs, f"{tmp_path}/none"], None)


def test_an_index_that_cannot_be_written_is_no_matter(refs, tmp_path):
    (tmp_path / "file").touch()
    assert len(Contents(refs, tmp_path / "file/index").digests()) == 3
