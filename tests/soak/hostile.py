"""Files that are hostile on purpose: bombs, names and links that climb out of archives or go round in loops.

As with `soak.inputs`: what is sound in them is read, or a NecoError names the file, within bounded time and memory, and
nothing is written outside.
"""

import contextlib
import io
import json
import os
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from neco.dataset import archive
from neco.dataset.base import read_image
from neco.dataset.decode import PIXELS
from neco.dataset.folder import Folder
from neco.model.weights import load
from neco.utils.errors import NecoError
from soak import Outcome, forked, trial
from soak.inputs import (
    INDEX,
    elsewhere,
    fresh,
    link,
    mend_tar,
    network,
    panoptic,
    photos,
    tar,
    use_panoptic,
    zipped,
)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def bomb(kind: bytes, ahead: bytes) -> bytes:
    """A small PNG with a compressed chunk of 300 MB."""
    return png(8, 8, (kind, ahead + zlib.compress(bytes(300_000_000), 9)))


def claiming(suffix: str, width: int, height: int) -> bytes:
    """A small image that claims to be a large one."""
    data = io.BytesIO()
    Image.new("RGB", (16, 16)).save(data, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    changed = bytearray(data.getvalue())
    if suffix == "bmp":
        struct.pack_into("<ii", changed, 18, width, height)
    elif suffix == "gif":
        struct.pack_into("<HH", changed, 6, width, height)
    elif suffix == "jpg":
        struct.pack_into(">HH", changed, changed.index(b"\xff\xc0") + 5, height, width)
    return bytes(changed)


def looked(folder: Path) -> str:
    """All images below, read."""
    dataset = Folder(root=str(folder), val_fraction=0, index=str(folder / INDEX))
    return " ".join(f"{s.key}:{len(read_image(s.image))}" for s in dataset.samples("train"))


def an_image(name: str, data: Callable[[], bytes]) -> Callable[[Path], str]:
    def act(folder: Path) -> str:
        (folder / name).write_bytes(data())
        return looked(folder)

    return act


def in_zip(folder: Path) -> str:
    """A member of 300 MB in 300 kB."""
    zipped(folder / "photos.zip", {"1.png": bytes(300_000_000)}, zipfile.ZIP_DEFLATED)
    return looked(folder)


def link_in_zip(folder: Path) -> str:
    """A link whose target is a name of 300 MB."""
    info = zipfile.ZipInfo("1.png")
    info.external_attr, info.compress_type = 0o120777 << 16, zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(folder / "photos.zip", "w") as out:
        out.writestr(info, bytes(300_000_000))
    return looked(folder)


def zip_in_zip(depth: int, method: int) -> Callable[[Path], str]:
    def act(folder: Path) -> str:
        path = zipped(folder / "photos.zip", photos(), method)
        for _ in range(depth):
            zipped(path, {"photos.zip": path.read_bytes()}, method)
        return looked(folder)

    return act


def archived(make: Callable[[Path], None]) -> Callable[[Path], str]:
    """Hostile names in an archive; a file of the same name lies outside and must not be read."""

    def act(folder: Path) -> str:
        (folder / "data").mkdir()
        (folder / "secret.png").write_bytes(photos()["3.png"])
        make(folder / "data")
        dataset = Folder(root=str(folder / "data"), val_fraction=0, index=str(folder / INDEX))
        found = []
        for sample in dataset.samples("train"):
            with contextlib.suppress(NecoError):
                found.append(f"{sample.key}:{len(read_image(sample.image))}")
        if len(found) != 1:
            raise forked.Wrong(f"one image was to be read, not {found}")
        return "same"

    return act


BIG = {"1.png": png(8, 8)}
HOSTILE_NAMES = (
    "../secret.png",
    "/../../secret.png",
    "a/../../../secret.png",
    "/etc/passwd.png",
    "C:\\x.png",
    "..\\x.png",
)


def climbing_tar(folder: Path) -> None:
    entries = [link(f"{i}.png", target, kind) for i, (target, kind) in enumerate(
        (target, kind) for target in ("../secret.png", str(folder.parent / "secret.png"), "/etc/passwd")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)
    )]  # fmt: skip
    entries += [link("d", ".."), link("loop.png", "loop.png"), link("x", "y"), link("y", "x")]
    for kind in (tarfile.CHRTYPE, tarfile.FIFOTYPE):
        entries.append(link("device.png", "", kind))
    tar(folder / "a.tar", {"good.png": photos()["3.png"], **dict.fromkeys(HOSTILE_NAMES, b"x")}, *entries)


def climbing_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w") as out:
        out.writestr("good.png", photos()["3.png"])
        for name in HOSTILE_NAMES:
            out.writestr(name, b"x")
        for i, target in enumerate(("../secret.png", str(folder.parent / "secret.png"), "l2.png", "d")):
            info = zipfile.ZipInfo(f"l{i}.png" if i < 3 else "d")
            info.external_attr = 0o120777 << 16
            out.writestr(info, target)


def backwards(folder: Path) -> str:
    """A tar whose member has a negative size: a reader that believes it goes back and never ends."""
    data = bytearray(tar(folder / "a.tar", {"1.png": b"x", "2.png": b"x"}).read_bytes())
    data[1024 + 124 : 1024 + 136] = (-1536).to_bytes(12, "big", signed=True)
    mend_tar(data)
    (folder / "a.tar").write_bytes(data)
    return " ".join(archive.content(str(folder / "a.tar"), None).names)


def loops(folder: Path) -> str:
    """Links to themselves, to each other, upwards, and folders that all lead to all others."""
    (folder / "good.png").write_bytes(photos()["3.png"])
    (folder / "up").symlink_to("..")
    (folder / "here").symlink_to(".")
    looked(folder)
    for i in range(9):
        (folder / f"d{i}").mkdir()
        for j in range(9):
            (folder / f"d{i}/to{j}").symlink_to(f"../d{j}")
    return looked(folder)


def endless_link(folder: Path) -> str:
    (folder / "good.png").write_bytes(photos()["3.png"])
    (folder / "self.png").symlink_to("self.png")
    (folder / "lost.png").symlink_to("nothing.png")
    os.mkfifo(folder / "pipe.png")
    return looked(folder)


def sparse(folder: Path) -> str:
    """A file of 1 TB without content."""
    with (folder / "1.png").open("wb") as file:
        file.write(png(8, 8))
        file.truncate(1 << 40)
    return looked(folder)


def deep_json(text: Callable[[], str]) -> Callable[[Path], str]:
    def act(folder: Path) -> str:
        panoptic(folder).write_text(text())
        return use_panoptic(folder, folder)

    return act


def deep_weights(folder: Path) -> str:
    tree: Any = {}
    for _ in range(100):
        tree = {"a": tree}
    torch.save(tree, folder / "w.pth")
    load(network(), folder / "w.pth")
    return "other"


def weights_of_zeros(folder: Path) -> str:
    """A safetensors header that claims 1 TB."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    (folder / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    load(network(), folder / "w.safetensors")
    return "other"


HOSTILE: dict[str, Callable[[Path], str]] = {
    "png of 50000 x 50000": an_image("1.png", lambda: png(50_000, 50_000)),
    "png of 4 x 10^9": an_image("1.png", lambda: png(1, 2**31 - 1)),
    "png one beyond the bound": an_image("1.png", lambda: png(PIXELS + 1, 1)),
    "png of no pixels": an_image("1.png", lambda: png(0, 0)),
    "png, text of 300 MB": an_image("1.png", lambda: bomb(b"zTXt", b"a\0\0")),
    "png, profile of 300 MB": an_image("1.png", lambda: bomb(b"iCCP", b"a\0\0")),
    "bmp of 50000 x 50000": an_image("1.bmp", lambda: claiming("bmp", 50_000, 50_000)),
    "gif of 65535 x 65535": an_image("1.gif", lambda: claiming("gif", 65_535, 65_535)),
    "jpeg of 65535 x 65535": an_image("1.jpg", lambda: claiming("jpg", 65_535, 65_535)),
    "zip, image of 300 MB": in_zip,
    "zip, link of 300 MB": link_in_zip,
    "zip in zip, 200 times": zip_in_zip(200, zipfile.ZIP_STORED),
    "zip in zip, compressed": zip_in_zip(3, zipfile.ZIP_DEFLATED),
    "tar, names and links that climb": archived(climbing_tar),
    "zip, names and links that climb": archived(climbing_zip),
    "tar, negative size": backwards,
    "folders, links in loops": loops,
    "folder, endless links and a pipe": endless_link,
    "image of 1 TB without content": sparse,
    "json, 100,000 deep": deep_json(lambda: "[" * 100_000 + "]" * 100_000),
    "json, numbers of 10^6 digits": deep_json(lambda: '{"annotations": [' + "9" * 10**6 + "]}"),
    "json, categories out of range": deep_json(
        lambda: json.dumps({"annotations": [{"file_name": "1", "segments_info": [{"id": 10**12, "category_id": -1}]}]})
    ),
    "weights, 100 deep": deep_weights,
    "safetensors of 1 TB": weights_of_zeros,
}  # fmt: skip


MEMORY = 700 << 20  # that a hostile file may take, the 300 MB of those who write it among them


@trial(small=1, full=1)
def hostile(rng: random.Random, base: Path, count: int) -> Iterator[Outcome]:
    """Bombs, names and links that climb out of archives, links in loops."""
    outside = elsewhere(base)

    def act(name: str) -> str:
        try:
            return HOSTILE[name](fresh(base)) and "read"
        except NecoError as error:
            if str(base) not in str(error):
                raise forked.Wrong(f"no file is named: {error}") from error
            raise
        finally:
            if elsewhere(base) != outside:
                raise forked.Wrong("something was written outside")

    found = dict(zip(HOSTILE, forked.run(list(HOSTILE), act, MEMORY), strict=True))
    bad = [f"{name}: {verdict.kind}: {verdict.said}" for name, verdict in found.items() if verdict.bad]
    assert not bad, "\n".join(bad)
    for name, verdict in found.items():
        yield Outcome(name, "refused, named" if verdict.kind == "refused" else "what is sound in it is read")
