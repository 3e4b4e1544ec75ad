import io
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import subprocess
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import losses
from PIL import Image
from torch.utils.data import DataLoader

from neco.dataset import archive, file_state
from neco.dataset.archive import Store
from neco.dataset.base import read_image
from neco.dataset.files import Member, Tree, read_bytes
from neco.utils.errors import NecoError


def tar(path, files, **options):
    with tarfile.open(path, "w", **options) as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def zipped(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return path


def inside(make, files, *rest):
    """The bytes of an archive."""
    path = Path("inner.tmp")
    make(path, files, *rest)
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """As in a new process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    archive._content.cache_clear()
    archive.opened.cache_clear()
    archive._warn.cache_clear()
    monkeypatch.setattr(file_state, "STEP", (0, 0))  # what was written just now is trusted


def content(tree, path=""):
    return {key: read_bytes(ref) for key, ref in tree.images(path).items()}


DEFLATED = zipfile.ZIP_DEFLATED
FORMS = {
    "tar": lambda files: tar("photos.tar", files),
    "gnu tar, ./names": lambda files: tar(
        "photos.tar", {f"./{name}": data for name, data in files.items()}, format=tarfile.GNU_FORMAT
    ),
    "zip": lambda files: zipped("photos.zip", files),
    "deflated zip": lambda files: zipped("photos.zip", files, DEFLATED),
    "with its top folder": lambda files: tar("photos.tar", {f"photos/{name}": data for name, data in files.items()}),
    "tar in tar": lambda files: tar("photos.tar", {"photos.tar": inside(tar, files)}),
    "tar in zip": lambda files: zipped("photos.zip", {"photos.tar": inside(tar, files)}),
    "tar in deflated zip": lambda files: zipped("photos.zip", {"photos.tar": inside(tar, files)}, DEFLATED),
    "deflated zip in deflated zip": lambda files: zipped(
        "photos.zip", {"photos.zip": inside(zipped, files, DEFLATED)}, DEFLATED
    ),
    "a tar for each folder": lambda files: tar(
        "photos.tar",
        {
            **{name: data for name, data in files.items() if "/" not in name},
            **{
                f"{top}.tar": inside(
                    tar, {name[len(top) + 1 :]: data for name, data in files.items() if name.startswith(f"{top}/")}
                )
                for top in {name.split("/")[0] for name in files if "/" in name} - {"__MACOSX"}
            },
        },
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_is_like_the_folder_that_it_was_made_of(tmp_path, form):
    draw = random.Random(form)
    names = {
        "/".join([*draw.choices(["a", "a-b", "a.b", "é", "x y", "long" * 40], k=draw.randint(0, 4)), f"{i}{suffix}"])
        for i in range(60)
        for suffix in draw.choices([".jpg", ".PNG", ".txt"], k=1)
    }
    files = {name: draw.randbytes(draw.choice([0, 1, 511, 512, 513, 3000])) for name in names}
    for name, data in files.items():
        (tmp_path / "real" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "real" / name).write_bytes(data)
    FORMS[form]({**files, "__MACOSX/a/1.jpg": b"", "a/._0.jpg": b"", ".hidden/1.jpg": b""})
    real = Tree(tmp_path / "real")
    assert len(content(real)) > 20
    places = [Tree(tmp_path, ".index"), "photos"], [Tree(tmp_path / "photos", ".index"), ""]
    for tree, path in [*places, places[0]]:
        assert list(content(tree, path)) == list(content(real)), "sorted"
        assert content(tree, path) == content(real)
        below = f"{path}/" if path else ""
        folders = {"", *(str(folder) for name in names for folder in Path(name).parents if str(folder) != ".")}
        for folder in folders:
            assert tree.is_dir(below + folder) and not tree.is_dir(below + folder + "/none")
            assert tree.names(f"{below}{folder}") == real.names(folder)
            assert content(tree, f"{below}{folder}") == content(real, folder)
        for name, data in files.items():
            assert read_bytes(tree.ref(below + name)) == data and not tree.is_dir(below + name)
        assert tree.ref(below + "none.jpg") is None and tree.ref(below + "a") is None
    everything = Tree(tmp_path, ".index").images()
    assert set(everything) == {f"{top}/{key}" for top in ("photos", "real") for key in real.images()}


def test_the_content_of_an_archive_is_found_as_if_it_was_unpacked_there(tmp_path):
    tar(
        "VOCtrainval_11-May-2012.tar",
        {"VOCdevkit/VOC2012/JPEGImages/1.jpg": b"voc", "VOCdevkit/list.txt": b"\xef\xbb\xbf1"},
    )
    zipped("annotations.zip", {"annotations/a.json": b"a"}, DEFLATED)
    maps = inside(zipped, {"panoptic_val2017/1.png": b"map"}, DEFLATED)
    zipped("panoptic.zip", {"annotations/panoptic_val2017.zip": maps, "annotations/b.json": b"b"}, DEFLATED)
    for part in "12":
        zipped(f"part{part}.zip", {f"train/{part}.jpg": part.encode()})
    tree = Tree(tmp_path, ".index")
    assert content(tree, "VOCdevkit/VOC2012/JPEGImages") == {"1.jpg": b"voc"}
    assert tree.text("VOCdevkit/list.txt") == ["1"] and tree.text("VOCdevkit/none.txt") is None
    assert (tree.text("annotations/a.json"), tree.text("annotations/b.json")) == (["a"], ["b"])
    assert content(tree, "annotations/panoptic_val2017") == {"1.png": b"map"}
    assert content(tree, "train") == {"1.jpg": b"1", "2.jpg": b"2"}, "one folder in two archives"
    (tmp_path / "train").mkdir()
    (tmp_path / "train/3.jpg").write_bytes(b"3")
    assert content(tree, "train") == {"3.jpg": b"3"}, "what is there is not mixed with what was packed"


def test_what_lies_unpacked_beside_its_archive_is_counted_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"1")
    (tmp_path / "loose.jpg").write_bytes(b"2")
    zipped("a.zip", {"1.jpg": b"1"})
    tar("other.tar", {"a/1.jpg": b"1"})
    tar("flat.tar", {"loose.jpg": b"2"})
    assert content(Tree(tmp_path)) == {"a/1.jpg": b"1", "loose.jpg": b"2"}
    tar("flat.tar", {"loose.jpg": b"2", "more.jpg": b"3"})
    assert set(content(Tree(tmp_path))) == {"a/1.jpg", "loose.jpg", "flat/loose.jpg", "flat/more.jpg"}


def test_a_member_is_small_and_readable(tmp_path):
    tar("a.tar", {"b/1.jpg": b"12345"})
    (ref,) = Tree("a.tar").images().values()
    assert isinstance(ref, Member) and f"{ref}" == "a.tar/b/1.jpg" and read_bytes(ref) == b"12345"
    assert pickle.loads(pickle.dumps(ref)) == ref and len(pickle.dumps([ref] * 99)) < 1000
    tree = Tree(tmp_path)
    tree.images()
    assert len(pickle.dumps(tree)) < 1000, "indices stay where they were made"


def test_links_lead_to_their_files_or_are_named(tmp_path):
    (tmp_path / "x/real").mkdir(parents=True)
    (tmp_path / "x/real/1.jpg").write_bytes(b"one")
    os.link("x/real/1.jpg", "x/real/2.jpg")
    Path("x/real/3.jpg").symlink_to("1.jpg")
    Path("x/folder").symlink_to("real")
    Path("x/real/loop").symlink_to("../x")
    Path("x/real/4.jpg").symlink_to("3.jpg")
    wanted = content(Tree("x"))
    assert len(wanted) == 8 and set(wanted.values()) == {b"one"}
    Path("x/bad.jpg").symlink_to("/none.jpg")
    with tarfile.open("links.tar", "w") as out:
        out.add("x", "x")
    subprocess.run(["zip", "-qry", "links.zip", "x"], check=True) if shutil.which("zip") else None
    for name in filter(Path.exists, map(Path, ("links.tar", "links.zip"))):
        found = Tree(name).images("x")
        with pytest.raises(NecoError, match=rf"{name}/x/bad.jpg: it is a link to what the archive does not hold"):
            read_bytes(found.pop("bad.jpg"))
        assert {key: read_bytes(ref) for key, ref in found.items()} == wanted


def test_links_that_make_far_more_than_there_is_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LINKED", (1000, 20))
    with tarfile.open(tmp_path / "bomb.tar", "w") as out:
        for number in range(100):
            out.addfile(tarfile.TarInfo(f"real/{number}.jpg"))
            link = tarfile.TarInfo(f"link{number}")
            link.type, link.linkname = tarfile.SYMTYPE, "real"
            out.addfile(link)
    with pytest.raises(NecoError, match=r"bomb\.tar: links to folders make more than 4,000 files of 200, as in no set"):
        archive.content(str(tmp_path / "bomb.tar"), tmp_path / "index")
    assert not [*(tmp_path / "index").glob("*.npz")]
    monkeypatch.setattr(archive, "LINKED", (20_000, 20))
    assert len(archive.content(str(tmp_path / "bomb.tar"), tmp_path / "index").names) == 100 * 101


def test_later_members_of_a_name_win_and_the_end_must_be_there(tmp_path):
    with tarfile.open("a.tar", "w") as out:
        for data in (b"old", b"new!"):
            info = tarfile.TarInfo("1.jpg")
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    assert content(Tree("a.tar")) == {"1.jpg": b"new!"}


@pytest.mark.parametrize("make", [tar, zipped])
def test_archives_that_are_cut_off_or_no_archives_are_named(tmp_path, make, caplog):
    path = tmp_path / f"a.{make.__name__[:3]}"
    make(path, {f"{i}.jpg": bytes([i]) * 2000 for i in range(5)})
    whole = path.read_bytes()
    for size in (0, 300, 512, 1000, 2560, len(whole) // 3, min(5 * 2560, len(whole) - 1)):  # 2560: header and member
        path.write_bytes(whole[:size])
        with pytest.raises(NecoError, match=rf"a.{path.suffix[1:]} is cut off, damaged or no {path.suffix[1:]} file"):
            Tree(path).images()
    assert not Tree(tmp_path).is_dir("other"), "a broken archive of another name is no obstacle"
    tree = Tree(tmp_path)
    assert "is cut off" in str(tree.missing("photos", ["other"], "Get them.")) and "is cut off" in caplog.text
    outer = zipped(tmp_path / "outer.zip", {path.name: whole[: len(whole) // 3]})
    with pytest.raises(NecoError, match=rf"outer.zip/{path.name} is cut off"):
        Tree(outer).images()


def test_damaged_members_are_named(tmp_path):
    for method in (zipfile.ZIP_STORED, DEFLATED):
        data = zipped(tmp_path / "a.zip", {"1.jpg": bytes(range(256)) * 9}, method).read_bytes()
        for place in (0, 40, 60):  # signature of the header, content
            (tmp_path / "a.zip").write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
            (ref,) = Tree("a.zip").images().values()
            with pytest.raises(NecoError, match=r"cannot read a.zip/1.jpg: .*(checksum|damaged|inflate)"):
                read_bytes(ref)


def test_what_is_encrypted_sparse_or_otherwise_packed_is_named(tmp_path):
    data = bytearray(zipped(tmp_path / "a.zip", {"1.jpg": b"secret"}).read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    zipped("b.zip", {"1.jpg": b"x" * 99}, zipfile.ZIP_LZMA)
    header = tarfile.TarInfo("1.jpg")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT)[:512])
    block[386:410] = b"00000000000\x0000000001000\x00"  # 512 bytes at 0
    block[483:495] = b"00000001000\x00"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "c.tar").write_bytes(block + bytes(512 + 1024))
    for name, why in (("a.zip", "encrypted"), ("b.zip", "zip method 14 is not supported"), ("c.tar", "sparse")):
        (ref,) = Tree(name).images().values()
        with pytest.raises(NecoError, match=rf"cannot read {name}/1.jpg: .*{why}"):
            read_bytes(ref)


def test_zip64_and_a_prefix_are_understood(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    files = {f"{i}.jpg": bytes([i]) * 200 for i in range(5)}
    data = zipped(tmp_path / "a.zip", files).read_bytes()
    assert struct.pack("<L", 0x06064B50) in data
    (tmp_path / "a.zip").write_bytes(b"#!/bin/sh\n" * 9 + data)
    assert content(Tree("a.zip")) == files


def test_the_index_is_made_once_and_anew_where_it_is_not_to_be_trusted(tmp_path, monkeypatch, caplog):
    scans = []
    real = archive._scan
    monkeypatch.setattr(archive, "_scan", lambda *where: (scans.append(where), real(*where))[1])

    def look(count, index=".index"):
        archive._content.cache_clear()  # another process
        scans.clear()
        found = content(Tree("a.zip", index))
        assert len(scans) == count
        return found

    zipped("a.zip", {"é\udce9/1.jpg".encode(errors="surrogateescape").decode(errors="replace"): b"1", "2.jpg": b"2"})
    first = look(1)
    assert look(0) == first and set(first.values()) == {b"1", b"2"}
    (kept,) = Path(".index").glob("*.npz")
    whole = kept.read_bytes()
    for broken in (b"", whole[:-9], whole.replace(b"2.jpg", b"3.jpg"), b"PK\3\4" + bytes(99)):
        kept.write_bytes(broken)
        assert look(1) == first and look(0) == first
    status = Path("a.zip").stat()
    zipped("a.zip", {"3.jpg": b"3"})
    assert look(1) == {"3.jpg": b"3"}
    os.utime("a.zip", ns=(1, status.st_mtime_ns + 10**9))
    assert look(1) == look(0)
    Path("b.zip").write_bytes(Path("a.zip").read_bytes())
    assert content(Tree("b.zip", ".index")) == {"3.jpg": b"3"} and len(list(Path(".index").glob("*.npz"))) == 2
    assert not list(Path(".index").glob("*.tmp"))
    Path("file").touch()
    assert look(1, "file/index") == {"3.jpg": b"3"} and "not kept" in caplog.text
    assert look(1, None) == {"3.jpg": b"3"}


def test_an_archive_that_changes_while_it_is_in_use_is_not_read(tmp_path):
    tar("a.tar", {"1.jpg": b"1"})
    (ref,) = Tree("a.tar").images().values()
    tar("a.tar", {"2.jpg": b"2"})
    os.utime("a.tar", ns=(1, 1))
    with pytest.raises(NecoError, match=r"cannot read a.tar/1.jpg: the archive was changed"):
        read_bytes(ref)


@pytest.mark.parametrize("make", [tar, zipped])
@pytest.mark.parametrize("telling", [True, False])
def test_an_archive_of_the_same_size_and_time_with_another_order_is_told_apart(make, telling, monkeypatch, tmp_path):
    path, names = Path(f"a.{make.__name__[:3]}"), ["1.jpg", "2.jpg", "3.jpg"]
    pixels = {name: name.encode() * 99 for name in names}
    make(path, pixels)
    old = content(Tree(path, ".index"))
    times = path.stat()
    monkeypatch.setattr(file_state, "is_telling", lambda state: telling)
    if not telling:  # what file systems say that have no time of their own
        monkeypatch.setattr(archive, "state_of", lambda status: (1, status.st_size, status.st_mtime_ns, 1))
        archive._content.cache_clear()
        assert content(Tree(path, ".index")) == old
    make(path, {name: pixels[name] for name in reversed(names)})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and path.stat().st_mtime_ns == times.st_mtime_ns
    archive._content.cache_clear()  # another process
    archive.opened.cache_clear()
    assert content(Tree(path, ".index")) == old == pixels


@pytest.mark.parametrize("make", [tar, zipped])
def test_members_that_are_not_where_they_were_are_not_read(make, tmp_path):
    path = Path(f"a.{make.__name__[:3]}")
    make(path, {"1.jpg": b"1", "2.jpg": b"2"})
    times, refs = path.stat(), list(Tree(path).images().values())
    make(path, {"2.jpg": b"2", "1.jpg": b"1"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for ref in refs:
        with pytest.raises(NecoError, match=r"the archive was changed while it was in use|its checksum is wrong"):
            read_bytes(ref)


def test_a_compressed_archive_in_an_archive_is_copied_once_or_refused(tmp_path, monkeypatch):
    zipped("a.zip", {"b.zip": inside(zipped, {"1.jpg": b"1"}, DEFLATED)}, DEFLATED)
    with pytest.raises(NecoError, match=r"a.zip/b.zip is compressed within a.zip: unpack a.zip"):
        Tree("a.zip").images()
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
        with pytest.raises(NecoError, match=r"a.zip/b.zip .* in .index\. .* not so much room.* unpack a.zip"):
            Tree("a.zip", ".index").images()
    found = Tree("a.zip", ".index").images()
    (copy,) = Path(".index").glob("copy-*.zip")
    inode = copy.stat().st_ino
    archive._content.cache_clear()
    assert Tree("a.zip", ".index").images() == found and copy.stat().st_ino == inode
    copy.write_bytes(b"")
    archive._content.cache_clear()
    assert content(Tree("a.zip", ".index")) == {"b/1.jpg": b"1"}
    zipped("a.zip", {"b.zip": inside(zipped, {"1.jpg": b"2"}, DEFLATED)}, DEFLATED)
    assert content(Tree("a.zip", ".index")) == {"b/1.jpg": b"2"}
    assert len(list(Path(".index").glob("copy-*.zip"))) == 1, "that of before is gone"
    deep = inside(zipped, {"c.zip": inside(zipped, {"1.jpg": b"1"})}, DEFLATED)
    zipped("a.zip", {"b.zip": deep}, DEFLATED)
    with pytest.raises(NecoError, match="itself compressed"):
        Tree("a.zip", ".index").images()


def left_in_index():
    return sorted(path.name for path in Path(".index").glob("*") if path.suffix != ".lock")


def test_archives_that_would_grow_beyond_measure_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "BOMB", (10**6, 100))
    monkeypatch.setattr(archive, "_inflate", lambda *_: pytest.fail("written"))
    zeros = bytes(3 * 10**6)
    zipped("one.zip", {"b.tar": zeros}, DEFLATED)
    zipped("many.zip", {f"{i}.tar": zeros[: 4 * 10**5] for i in range(9)}, DEFLATED)  # each of them is small
    for name in ("one", "many"):
        with pytest.raises(NecoError, match=rf"{name}.zip: the archives in it would grow from .* unpack {name}.zip"):
            Tree(f"{name}.zip", ".index").images()


def test_nothing_is_left_of_archives_that_are_none_or_lie_about_their_size(tmp_path):
    zipped("a.zip", {"b.tar": bytes(2 * 10**6)}, DEFLATED)
    with pytest.raises(NecoError, match="cut off, damaged or no tar file"):
        Tree("a.zip", ".index").images()
    data = Path("a.zip").read_bytes()
    size = struct.pack("<I", 2 * 10**6)
    assert data.count(size) == 2
    Path("b.zip").write_bytes(data.replace(size, struct.pack("<I", 20480)))
    with pytest.raises(NecoError, match="larger than the 20480 bytes that its directory says"):
        Tree("b.zip", ".index").images()
    assert [name for name in left_in_index() if not name.startswith("archive-")] == ["CACHEDIR.TAG"]


def test_members_that_share_their_bytes_are_refused(tmp_path):
    zipped("a.zip", {"1.jpg": b"1" * 99, "2.jpg": b"2" * 99})
    with zipfile.ZipFile("a.zip", "a") as out:
        out.filelist[1].header_offset = 0
        out._didModify = True
    with pytest.raises(NecoError, match=r"2\.jpg overlaps another member"):
        Tree("a.zip").images()


@pytest.mark.parametrize(
    ("suffix", "command"), [(".tar.gz", "gunzip"), (".tgz", "gunzip"), (".tar.xz", "unxz"), (".rar", "unrar x")]
)
def test_what_gives_no_random_access_says_what_helps(tmp_path, suffix, command, caplog):
    (tmp_path / "data").mkdir()
    packed = tmp_path / f"data/photos{suffix}"
    packed.touch()
    for act in (
        Tree(packed).images,
        Tree(tmp_path / "data/photos").is_dir,
        Tree(tmp_path / "data").images,
        lambda: (_ for _ in ()).throw(Tree(tmp_path).missing("photos", ["data/photos/train"], "Get them.")),
    ):
        with pytest.raises(NecoError, match=rf"compressed as a whole.*`{command} .*photos{suffix}`"):
            act()
    (tmp_path / "data/1.jpg").touch()
    assert list(Tree(tmp_path).images()) == ["data/1.jpg"] and "1 compressed archives are left out" in caplog.text


class Images:
    def __init__(self, refs):
        self.refs = refs

    def __len__(self):
        return len(self.refs)

    def __getitem__(self, index):
        return torch.from_numpy(read_image(self.refs[index]).copy())


def photos(count=24):
    found = {}
    for i in range(count):
        buffer = io.BytesIO()
        noise = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        found[f"{i % 3}/{i:02d}.png"] = buffer.getvalue()
    return found


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_all_kinds_and_threads_read_the_same(tmp_path, start):
    files = photos()
    refs = [
        *Tree(tar("a.tar", files)).images().values(),
        *Tree(zipped("b.zip", files)).images().values(),
        *Tree(zipped("c.zip", files, DEFLATED)).images().values(),
    ]
    wanted = torch.stack([torch.from_numpy(read_image(ref).copy()) for ref in refs])  # files are open before the fork
    loader = DataLoader(
        Images(refs),
        9,
        num_workers=2 if start == "fork" else 1,
        multiprocessing_context=multiprocessing.get_context(start),
    )
    for _ in range(2 if start == "fork" else 1):
        assert torch.equal(torch.cat(list(loader)), wanted)


def test_threads_and_few_open_files(tmp_path, monkeypatch):
    archives = [tar(f"{i}.tar", {"1.jpg": bytes([i]) * 5000}) for i in range(200)]
    refs = [ref for path in archives for ref in Tree(path).images().values()] * 5
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    with ThreadPoolExecutor(8) as pool:
        for i, data in enumerate(pool.map(read_bytes, refs)):
            assert data == bytes([i % 200]) * 5000
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + archive.opened.cache_info().maxsize


def test_bad_images_in_archives_are_listed_by_their_place(tmp_path):
    from neco.dataset.base import Sample
    from neco.training.unreadable import BadImages  # imports what a spawned worker above should not wait for

    (ref,) = Tree(tar("a.tar", {"1.jpg": b"1"})).images().values()
    BadImages(tmp_path, [Sample("1.jpg", ref)], {"": (1, 1)}).note([(0, "why")])
    assert (tmp_path / "bad_images.txt").read_text() == "1.jpg\ta.tar/1.jpg\twhy\n"


def test_a_store_is_whole_or_not_there(tmp_path):
    store = Store(tmp_path / ".index", "x", "about")
    names = ["", "a\nb", "caf\udce9"]
    store.save("1", names=names, rows=np.arange(3))
    kept = store.load("1")
    assert kept and kept["names"] == names and kept["rows"].tolist() == [0, 1, 2]
    assert store.load("2") is None and Store(tmp_path / ".index", "x", "else").load("1") is None


def test_training_on_an_archive_equals_training_on_its_folder(train, tmp_path):
    files = {f"photos/{key}": data for key, data in photos(12).items()}
    for key, data in files.items():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
    Path("packed").mkdir()
    zipped("packed/photos.zip", files, DEFLATED)
    options = "dataset=folder", "model=tiny", "train.steps=3"
    real = losses(train(*options, f"dataset.root={tmp_path}/photos", folder="real"))
    assert losses(train(*options, f"dataset.root={tmp_path}/packed/photos.zip", "train.workers=1")) == real


@pytest.mark.parametrize("more", (bytes(3 << 20), bytes(3072) + b"more", b"second"))
def test_a_tar_that_goes_on_behind_its_end_was_not_written_whole(more):
    """A hole in a preallocated file reads as zeros, and two files as one end after the first."""
    whole = Path(tar("photos.tar", {"a.png": b"a"})).read_bytes()
    tail = inside(tar, {"b.png": b"b"}) if more == b"second" else more
    Path("photos.tar").write_bytes(whole + tail)
    with pytest.raises(NecoError, match=r"photos\.tar is cut off.*goes on behind its end"):
        Tree("photos.tar").images()


def test_an_archive_that_is_partly_unpacked_beside_itself_is_refused():
    files = {f"photos/{n}.png": b"x" for n in range(8)}
    tar("photos.tar", files)
    Path("photos").mkdir()
    for n in range(5):
        Path(f"photos/{n}.png").write_bytes(b"x")
    with pytest.raises(NecoError, match=r"photos\.tar is only partly unpacked beside it, photos/5\.png"):
        Tree(".").images()
    for n in range(5, 8):
        Path(f"photos/{n}.png").write_bytes(b"x")
    assert len(Tree(".").images()) == 8
