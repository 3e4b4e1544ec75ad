import io
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neco.dataset import file_state, files
from neco.dataset.files import Tree, listing
from neco.dataset.shapes import Shapes
from neco.report import gallery
from neco.report.pictures import Picture
from neco.runs import folder
from neco.utils.errors import NecoError

HOUR = 3600 * 10**9


@pytest.fixture
def clock(monkeypatch):
    """Hours that have passed, to be changed: nothing can set the time back at which a folder was changed."""
    hours, real = [1], time.time_ns
    monkeypatch.setattr(file_state.time, "time_ns", lambda: real() + hours[0] * HOUR)
    return hours


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "KEEP", 5)
    for name in ("a/1.jpg", "a/2.jpg", "b/c/3.jpg", "b/c/notes.txt", "b/4.png", "5.jpg", ".hidden/6.jpg", "d/7.tar.gz"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    return tmp_path / "photos"


@pytest.fixture
def read(monkeypatch):
    """Folders that were read, not taken from the kept listing."""
    found: list[str] = []
    real = files._names
    monkeypatch.setattr(files, "_names", lambda folder: (found.append(Path(folder).name), real(folder))[1])
    return found


def test_a_kept_listing_is_renewed_where_something_was_added_removed_or_renamed(photos, read, clock, tmp_path):
    changes = {
        "nothing": (lambda: None, []),
        "added": (lambda: (photos / "b/c/8.jpg").touch(), ["c"]),
        "removed": (lambda: (photos / "a/1.jpg").unlink(), ["a"]),
        "renamed": (lambda: (photos / "a/2.jpg").rename(photos / "a/9.jpg"), ["a"]),
        "moved": (lambda: (photos / "a/9.jpg").rename(photos / "b/9.jpg"), ["a", "b"]),
        "a folder renamed": (lambda: (photos / "b/c").rename(photos / "b/e"), ["b", "e"]),
        "a folder added": (lambda: (photos / "d/f").mkdir(), ["d", "f"]),
    }
    everything = ["photos", "a", "b", "c", "d"]

    def fresh():
        read.clear()
        return listing(str(photos), tmp_path / "index")

    assert set(fresh()) == {"", "a/", "b/", "b/c/", "d/"} and read == everything
    for what, (change, wanted) in changes.items():
        change()
        clock[0] = 0
        found = fresh()
        assert read == wanted, what
        assert found == listing(str(photos)), "as without the kept one"
        fresh()
        assert read == wanted, "what has just changed may change again unseen"
        clock[0] = 1
        fresh(), fresh()
        assert read == [], f"{what}: it was long ago"
    assert list(Tree(photos, tmp_path / "index").images()) == ["5.jpg", "b/4.png", "b/9.jpg", "b/e/3.jpg", "b/e/8.jpg"]


def test_a_folder_in_the_place_of_another_with_its_time_is_read(photos, clock, tmp_path):
    listing(str(photos), tmp_path / "index")
    before = (photos / "a").stat()
    (photos / "a").rename(tmp_path / "old")
    (photos / "a").mkdir()
    for name in ("3.jpg", "4.jpg"):
        (photos / "a" / name).touch()
    os.utime(photos / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert listing(str(photos), tmp_path / "index")["a/"] == ["3.jpg", "4.jpg"]


def test_short_listings_are_not_kept_and_broken_ones_are_made_anew(photos, read, clock, tmp_path, monkeypatch):
    index = tmp_path / "index"
    found = listing(str(photos), index)
    (kept,) = index.glob("listing-*.npz")
    kept.write_bytes(kept.read_bytes()[:-50])
    read.clear()
    assert listing(str(photos), index) == found and len(read) == 5
    kept.unlink()
    monkeypatch.setattr(files, "KEEP", 100)
    listing(str(photos), index)
    assert not kept.exists()


def test_folders_without_a_time_are_always_read(photos, read, clock, tmp_path):
    for path in (photos / "a", photos / "b"):
        os.utime(path, ns=(0, 0))
    listing(str(photos), tmp_path / "index")
    read.clear()
    assert listing(str(photos), tmp_path / "index") == listing(str(photos)) and read[:2] == ["a", "b"]


def test_folders_of_runs_and_caches_hold_no_images(photos, clock, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    Image.new("RGB", (8, 8)).save(photos / "own.png")
    before = set(Tree(photos, tmp_path / "index").images())
    for run in ("runs/eval/one", "runs/sweep/seed-0", "b/two"):
        (photos / run).mkdir(parents=True)
        folder.describe(photos / run, {"task": "eval"}, [], {}, "cpu")
        gallery.save([Picture("groups", np.zeros((4, 4, 3), np.uint8), "a", "")], photos / run, "retrieval")
    Shapes(root=str(photos / "cache/shapes"), train=2, val=1).samples("train")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w", zipfile.ZIP_DEFLATED) as outer:
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as file:
            file.writestr("x.jpg", b"1")
        outer.writestr("inner.zip", inner.getvalue())
    assert len(Tree(tmp_path / "outer.zip", photos / "cache/index").images()) == 1
    assert len(list((photos / "cache").rglob("*.zip"))) == 1 and len(list((photos / "cache").rglob("*.jpg"))) == 3
    for _ in ("listed", "from the kept listing"):
        assert set(Tree(photos, tmp_path / "index").images()) == before
    assert f"5 folders of runs and caches are left out below {photos}, like {photos}/" in caplog.text
    assert list(Tree(photos / "b/two").images()) == ["pictures/retrieval/000.jpg"], "the root may be anything"
    assert list(Tree(photos / "b/two/pictures").images()) == ["retrieval/000.jpg"]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        for path in sorted(photos.rglob("*")):
            file.write(path, path.relative_to(photos))
    assert not [key for key in Tree(tmp_path / "all.zip").images() if key.startswith(("runs", "b/two"))]


def test_a_folder_with_one_file_of_a_runs_name_is_none(photos):
    for name in ("config.yaml", "CACHEDIR.TAG"):
        (photos / "a" / name).write_text("something else")
    assert {"a/1.jpg", "a/2.jpg"} <= set(Tree(photos).images())


def test_links_are_followed_but_not_to_a_folder_above(tmp_path):
    (tmp_path / "x/a").mkdir(parents=True)
    (tmp_path / "x/a/1.jpg").touch()
    (tmp_path / "x/a/up").symlink_to(tmp_path / "x")
    (tmp_path / "x/b").symlink_to(tmp_path / "x/a")
    assert list(Tree(tmp_path / "x").images()) == ["a/1.jpg", "b/1.jpg"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, caplog, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "1.jpg").touch()
    names, refused = files._names, {f"{tmp_path}/lost+found/"}

    def scan(folder):
        if folder in refused:  # whoever runs the tests: root may read everything
            raise PermissionError(13, "Permission denied", folder)
        return names(folder)

    monkeypatch.setattr(files, "_names", scan)
    assert list(Tree(tmp_path).images()) == ["1.jpg"] and "lost+found/ is left out" in caplog.text
    refused.add(f"{tmp_path}/")
    with pytest.raises(NecoError, match="permission denied"):
        listing(str(tmp_path))


def test_missing_says_what_is_there(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK\5\6" + bytes(18))
    tree = Tree(tmp_path)
    said = str(tree.missing("maps", ["maps/train"], "Get them."))
    assert f"{tmp_path}/maps/train" in said and f"{tmp_path} holds photos.zip" in said and "Get them." in said
    assert "holds nothing" in str(Tree(tmp_path / "photos.zip").missing("maps", ["maps"], "Get them."))
    assert "does not exist" in str(Tree(tmp_path / "none").missing("maps", ["maps"], "Get them."))
    (tmp_path / "note.txt").touch()
    assert "is a file" in str(Tree(tmp_path / "note.txt").missing("maps", ["maps"], "Get them."))


def test_what_is_not_read_is_counted_in_one_line(tmp_path, caplog):
    for name in ("1.jpg", "a/2.heic", "a/3.HEIC", "4.nii.gz", "notes.txt", "b/5.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("6.jpg", "b/more photos"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    (tmp_path / "7.png").symlink_to(tmp_path / "7.png")  # to itself
    tree = Tree(tmp_path)
    for _ in range(2):
        assert list(tree.images()) == ["1.jpg"]
    (record,) = caplog.records
    said = record.getMessage()
    assert "7 files are left out, the first is 4.nii.gz: " in said
    for kind in ("links to nothing (3)", ".heic (2)", ".dcm (1)", ".nii.gz (1)"):
        assert kind in said
    assert "7 files are left out" in str(tree.missing("x", ["y"], "z")), "where nothing is found, too"


def test_a_link_whose_target_comes_back_is_seen(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(files, "KEEP", 1)
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).symlink_to(tmp_path / f"disk-{name}")
    (tmp_path / "disk-1.jpg").touch()
    for target, wanted in (("disk-1.jpg", ["1.jpg"]), ("disk-2.jpg", ["1.jpg", "2.jpg"])):
        (tmp_path / target).touch()
        assert list(Tree(tmp_path / "photos", tmp_path / "index").images()) == wanted


def test_a_listing_of_other_kinds_of_files_is_made_anew(photos, read, tmp_path, monkeypatch):
    listing(str(photos), tmp_path / "index")
    read.clear()
    monkeypatch.setattr(files, "KINDS", "what another version read")
    listing(str(photos), tmp_path / "index")
    assert len(read) == 5


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "BOM and utf-16-be"]
)
def test_lists_of_any_encoding_and_line_ending(tmp_path, encoding):
    content = "IMG 1.jpg\r\nm\u00fcde.png \rlast\x85one".encode(encoding.removeprefix("BOM and "))
    (tmp_path / "list.txt").write_bytes(b"\xfe\xff" * encoding.startswith("BOM") + content)
    wanted = ["IMG 1.jpg", "m\u00fcde.png ", "last\x85one"]
    assert files.read_text(str(tmp_path / "list.txt")) == Tree(tmp_path).text("list.txt") == wanted


def test_names_that_are_no_unicode_stay_and_what_is_no_text_is_named(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"m\xfcde.jpg\n")
    assert [os.fsencode(line) for line in files.read_text(str(tmp_path / "list.txt"))] == [b"m\xfcde.jpg", b""]
    (tmp_path / "list.txt").write_bytes(b"\x89PNG\0\0\0\0\0\0")
    with pytest.raises(NecoError, match=r"list.txt is no text"):
        files.read_text(str(tmp_path / "list.txt"))
