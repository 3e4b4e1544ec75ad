"""Files that are not what they were: valid ones of every format, mutated.

Each goes through what training and evaluation call. It may give the same as before, something else that is valid, or a
NecoError that names the file. Nothing else, not for long, within bounded memory, and nothing is written outside.
"""

import contextlib
import io
import json
import os
import random
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import dataset_support
import numpy as np
import safetensors.torch
import torch
from PIL import Image

from neco.augment.joint import JointCrop
from neco.augment.views import Views, view_rng
from neco.dataset import archive, coco, file_state
from neco.dataset.base import Dataset, Sample, read_image, read_label
from neco.dataset.decode import stored_size
from neco.dataset.folder import Folder
from neco.dataset.imagenet import ImageNet100
from neco.dataset.voc import VOC
from neco.model import trained_model
from neco.model.backbone import Backbone
from neco.model.weights import load, weights_hash
from neco.training.data import MultiView, Scenes
from neco.utils.errors import NecoError
from soak import Outcome, forked, trial

CLASSES = ["a", "b", "c", "d"]
INDEX = ".index"  # beside the files of a trial


# -- mutations -------------------------------------------------------------------------------------------------------

EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
WORDS = (
    b"null", b"-1", b"1e999", b"NaN", b'""', b"[]", b"{}", b"[[[[", b"9" * 5000, b"1.5", b"true", b"\xff\xfe", b"\0",
    b"../../../../etc/passwd", b"/etc/passwd", b"\n", b"#", b"\\u0000", b"\\ud800",
)  # fmt: skip


def flip(data: bytearray, draw: random.Random, other: bytes) -> None:
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def cut(data: bytearray, draw: random.Random, other: bytes) -> None:
    del data[draw.randrange(len(data)) :]


def drop(data: bytearray, draw: random.Random, other: bytes) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 2, 4, 16, 512))]


def splice(data: bytearray, draw: random.Random, other: bytes) -> None:
    data[draw.randrange(len(data)) :] = other[draw.randrange(len(other)) :]


def number(data: bytearray, draw: random.Random, other: bytes) -> None:
    """A field that may be a length, a count or an offset."""
    size, order = draw.choice((1, 2, 4, 8)), draw.choice(("little", "big"))
    start = draw.randrange(min(len(data), draw.choice((32, 512, 1 << 20))))
    value = draw.choice(EXTREMES) % (1 << 8 * size)
    data[start : start + size] = value.to_bytes(size, order)  # type: ignore[arg-type]


def repeat(data: bytearray, draw: random.Random, other: bytes) -> None:
    start = draw.randrange(len(data))
    chunk = data[start : start + draw.choice((1, 8, 64, 512, 4096))]
    data[start:start] = chunk * draw.choice((1, 2, 50))


def zeros(data: bytearray, draw: random.Random, other: bytes) -> None:
    start, count = draw.randrange(len(data)), draw.choice((1, 4, 512, 4096))
    data[start : start + draw.choice((0, count))] = bytes(count)


def magic(data: bytearray, draw: random.Random, other: bytes) -> None:
    data[: draw.choice((2, 4, 8))] = draw.choice((other[:8], draw.randbytes(4), b"PK\3\4", b"\x89PNG\r\n\x1a\n", b""))


def word(data: bytearray, draw: random.Random, other: bytes) -> None:
    """A number or text in a text file, or what looks like one, becomes another."""
    digits = [i for i in range(len(data)) if chr(data[i]).isalnum()] or [0]
    start = draw.choice(digits)
    end = start + 1
    while end < len(data) and chr(data[end]).isalnum() and end < start + 30:
        end += 1
    data[start:end] = draw.choice(WORDS)


MUTATIONS = (flip, flip, cut, drop, splice, number, number, repeat, zeros, magic, word)


def mutated(data: bytes, other: bytes, draw: random.Random, mend: Callable[[bytearray], None] | None) -> bytes:
    """One to three mutations; half of them with the checksums of the format made good again, to get past these."""
    changed, kinds = bytearray(data), (word,) if data.isascii() and draw.random() < 0.5 else MUTATIONS
    for _ in range(draw.choice((1, 1, 2, 3))):
        if changed:
            draw.choice(kinds)(changed, draw, other)
    if mend and draw.random() < 0.5:
        with contextlib.suppress(Exception):  # the lengths that it goes by are mutated, too
            mend(changed)
    return bytes(changed)


def mend_png(data: bytearray) -> None:
    at = 8
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        struct.pack_into(">I", data, at + 8 + size, zlib.crc32(data[at + 4 : at + 8 + size]))
        at += 12 + size


def mend_tar(data: bytearray) -> None:
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


# -- formats ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """`build` writes files into a folder and names the one to mutate; `use` reads all as a run does, into text.

    `header` succeeds where the file begins like one of its format. `mend` makes checksums good.
    """

    build: Callable[[Path], Path]
    use: Callable[[Path, Path], str]
    header: Callable[[Path], object]
    mend: Callable[[bytearray], None] | None = None
    strict: bool = False  # no other result is valid: what is broken is found out again


def pixels(seed: int = 0, shape: tuple[int, ...] = (48, 56, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8) // 32 * 32


def digest(*values: np.ndarray) -> str:
    return sha256(b"".join(f"{value.shape}".encode() + value.tobytes() for value in values)).hexdigest()


def picture(suffix: str, mode: str = "RGB", **options: Any) -> Format:
    def build(folder: Path) -> Path:
        path = folder / f"photo.{suffix}"
        if mode == "I;16":
            image = Image.fromarray(pixels(shape=(48, 56)).astype(np.uint16) * 257)
        else:
            image = Image.fromarray(pixels()).convert(mode)
        image.save(path, **options)
        return path

    def use(folder: Path, path: Path) -> str:
        sample = Sample(path.name, str(path))
        views = MultiView([sample], Views(global_size=16, local_size=8, local_views=1), 0)
        image, item = read_image(sample.image), views.draw(sample, view_rng(0, 0, 0), 0)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise forked.Wrong(f"an image of {image.dtype} {image.shape}")
        if item["global_views"].shape != (2, 3, 16, 16):
            raise forked.Wrong(f"views of {item['global_views'].shape}")
        return digest(image)

    return Format(build, use, lambda path: stored_size(str(path)), mend_png if suffix == "png" else None)


def mask(mode: str) -> Format:
    def build(folder: Path) -> Path:
        (folder / "images").mkdir()
        (folder / "masks").mkdir()
        Image.fromarray(pixels()).save(folder / "images/1.png")
        stored = Image.fromarray(pixels(1, (48, 56)) // 64)
        if mode == "P":
            stored.putpalette([7 * value % 256 for value in range(768)])
        stored.save(folder / "masks/1.png")
        return folder / "masks/1.png"

    def use(folder: Path, path: Path) -> str:
        dataset = Folder(root=str(folder / "images"), masks=str(folder / "masks"), classes=CLASSES, val_fraction=0)
        (sample,) = dataset.samples("train")
        label = read_label(dataset, sample)
        if not ((label < len(CLASSES)) | (label == 255)).all():
            raise forked.Wrong(f"labels up to {label.max()}")
        crops = JointCrop(16, side=16, scale=(0.5, 2.0), flip=0.5, jitter=(0.1,) * 4, ignore=255)
        Scenes(dataset, [sample], crops, 0).draw(sample, view_rng(0, 0, 0), 0)
        return digest(label)

    return Format(build, use, lambda path: stored_size(str(path)), mend_png)


def keys(dataset: Dataset, split: str = "train") -> str:
    return " ".join(sample.key for sample in dataset.samples(split))


def listed(folder: Path) -> Path:
    for name in ("a", "b", "c"):
        dataset_support.save_image(folder / "photos" / f"{name}.png", 1)
    (folder / "list.txt").write_text("# some\na.png\nphotos/c\n")
    return folder / "list.txt"


def hundred(folder: Path) -> Path:
    dataset_support.imagenet(folder, True)
    return folder / "imagenet100.txt"


def voc(folder: Path) -> Path:
    dataset_support.voc(folder, "", "JPEGImages", "ImageSets/Segmentation")
    return folder / "ImageSets/Segmentation/trainaug.txt"


def panoptic(folder: Path) -> Path:
    dataset_support.coco(folder, "coco_things", "images/", "annotations/panoptic_{}2017", "panoptic")
    path = folder / "annotations/panoptic_val2017.json"
    listing = json.loads(path.read_text())
    for annotation in listing["annotations"]:  # a quarter of the text: mutations hit what matters
        annotation["segments_info"] = [
            {"id": info["id"], "category_id": info["category_id"]} for info in annotation["segments_info"]
        ]
    path.write_text(json.dumps({"annotations": listing["annotations"]}))
    return path


def use_panoptic(folder: Path, path: Path) -> str:
    dataset = coco.CocoThings(root=str(folder))
    return digest(*(read_label(dataset, sample) for sample in dataset.samples("val")))


def photos() -> dict[str, bytes]:
    data = io.BytesIO()
    Image.fromarray(pixels(2, (12, 12, 3))).save(data, "PNG")
    return {"a/1.png": data.getvalue(), "a/b/2.png": data.getvalue(), "3.png": data.getvalue(), "notes.txt": b"x" * 700}


def tar(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = {"comment": "é"} if name == "3.png" else {}
            out.addfile(info, io.BytesIO(data))
        for info in more:
            out.addfile(info)
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return path


def packed(name: str, make: Callable[[Path], Path], mend: Callable[[bytearray], None] | None = None) -> Format:
    return Format(lambda folder: make(folder / name), use_archive, lambda path: archive.content(str(path), None), mend)


def use_archive(folder: Path, path: Path) -> str:
    dataset = Folder(root=str(path), index=str(folder / INDEX), val_fraction=0)
    found, first = [], None
    for sample in dataset.samples("train"):
        try:
            found.append(f"{sample.key} {digest(read_image(sample.image))}")
        except NecoError as error:  # a training would take another
            first = first or error
            _named(str(error), path)
    if not found and first:
        raise first
    return "\n".join(found)


def nested(path: Path) -> Path:
    inner = zipped(path.with_suffix(".tmp"), photos(), zipfile.ZIP_DEFLATED)
    data = inner.read_bytes()
    inner.unlink()
    return zipped(path, {"a.zip": data, **photos()}, zipfile.ZIP_DEFLATED)


def indexed(folder: Path) -> Path:
    """The kept index of an archive: broken, it is made anew."""
    tar(folder / "photos.tar", photos())
    os.utime(folder / "photos.tar", (1, 1))
    use_archive(folder, folder / "photos.tar")
    return next((folder / INDEX).glob("*.npz"))


def network() -> Backbone:
    arch: Any = {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 16}
    return Backbone(name="vit_tiny_patch16_224", size=32, arch=arch, weights="none")


def weights_file(name: str, **options: Any) -> Format:
    def build(folder: Path) -> Path:
        torch.manual_seed(0)
        state, path = network().net.state_dict(), folder / name
        if name.endswith(".safetensors"):
            safetensors.torch.save_file(
                state, path, {"neco": json.dumps({"model": {"_target_": "neco.model.backbone.Backbone"}})}
            )
        else:
            torch.save({"model": state, "epoch": 3}, path, **options)
        return path

    def use(folder: Path, path: Path) -> str:
        trained_model(str(path))
        net = network()
        load(net, path)
        if not all(value.isfinite().all() for value in net.state_dict().values()):
            raise forked.Wrong("weights that are not finite")
        return weights_hash(net)

    def header(path: Path) -> object:
        if name.endswith(".safetensors"):
            return safetensors.safe_open(path, "pt")
        return zipfile.ZipFile(path) if not options else path.read_bytes().index(b"\x80\x02")

    return Format(build, use, header)


FORMATS: dict[str, Format] = {
    "jpeg": picture("jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    "jpeg progressive": picture("jpg", progressive=True),
    "jpeg CMYK": picture("jpg", "CMYK"),
    "png": picture("png"),
    "png 16 bit": picture("png", "I;16"),
    "png palette": picture("png", "P"),
    "png grey": picture("png", "L"),
    "png alpha": picture("png", "RGBA"),
    "bmp": picture("bmp"),
    "gif": picture("gif"),
    "webp": picture("webp"),
    "tiff": picture("tif"),
    "tiff deflated": picture("tif", compression="tiff_adobe_deflate"),
    "mask grey": mask("L"),
    "mask palette": mask("P"),
    "list of files": Format(
        listed,
        lambda folder, path: keys(Folder(root=str(folder / "photos"), files=str(path), val_fraction=0)),
        lambda path: path.read_text(),
    ),
    "list of classes": Format(hundred, lambda folder, path: keys(ImageNet100(root=str(folder))), Path.read_text),
    "list of VOC": Format(voc, lambda folder, path: keys(VOC(root=str(folder))), Path.read_text),
    "panoptic json": Format(panoptic, use_panoptic, lambda path: json.loads(path.read_bytes())),
    "tar": packed("photos.tar", lambda path: tar(path, photos(), link("l.png", "3.png")), mend_tar),
    "zip": packed("photos.zip", lambda path: zipped(path, photos())),
    "zip deflated": packed("photos.zip", lambda path: zipped(path, photos(), zipfile.ZIP_DEFLATED)),
    "zip in zip": packed("photos.zip", nested),
    "index of an archive": Format(
        indexed, lambda folder, path: use_archive(folder, folder / "photos.tar"), zipfile.ZipFile, strict=True
    ),
    "safetensors": weights_file("w.safetensors"),
    "pth": weights_file("w.pth"),
    "pth legacy": weights_file("w.pt", _use_new_zipfile_serialization=False),
}


KINDS = {
    "jpeg": "jpeg", "png": "png", "mask": "mask (png)", "list": "list of names", "panoptic": "panoptic json",
    "tar": "tar", "zip": "zip", "index": "kept index of an archive", "safetensors": "safetensors", "pth": "pth",
}  # fmt: skip
RESULTS = {"same": "the same result", "other": "another valid result", "refused": "an error that names the file"}


@trial(small=330, full=10_000)
def mutations(rng: random.Random, base: Path, count: int) -> Iterator[Outcome]:
    """Mutations of valid files of every format, as many of each."""
    names = list(FORMATS)
    found = mutate(base, rng.randrange(1 << 32), {name: -(-count // len(names)) for name in names})
    bad = [f"{name}: {verdict.kind}: {verdict.said}" for name, verdict in found if verdict.bad]
    assert not bad, f"{len(bad)} of {len(found)} mutations: " + "\n".join(bad[:20])
    for name, verdict in found:
        kind, _, past = verdict.kind.partition(" ")
        where = "past the header check" if past else "without a sound header"
        yield Outcome("all mutations", where)
        yield Outcome(f"mutated {KINDS.get(name.split()[0], 'bmp, gif, webp, tiff')}", f"{RESULTS[kind]}, {where}")
    yield Outcome("all mutations", f"longest {max(v.seconds for _, v in found):.2f} s of CPU")
    yield Outcome("all mutations", f"most memory {max(v.memory for _, v in found) >> 20} MB")


def _state(status: os.stat_result) -> file_state.State:
    """Of a file that keeps its state when it is written again, so that a kept index is taken."""
    return 1, status.st_size, status.st_mtime_ns, status.st_mtime_ns + 10**9


@mock.patch.object(archive, "state_of", _state)
def mutate(base: Path, seed: int, counts: dict[str, int]) -> list[tuple[str, forked.Verdict]]:
    """`counts` mutations by format, in the folder `base`; kinds end in `past` where the header is still one."""
    files: dict[str, tuple[dict[str, bytes], str]] = {}
    for name, form in FORMATS.items():
        folder = fresh(base)
        main = _relative(form.build(folder), folder)
        files[name] = {_relative(p, folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}, main
    mains = {name: held[main] for name, (held, main) in files.items()}
    right = {name: FORMATS[name].use(_written(base, *files[name]), base / "t" / files[name][1]) for name in counts}
    (base / "outside").mkdir()
    (base / "outside/secret.png").write_bytes(mains["png"])
    outside = elsewhere(base)

    def act(what: tuple[str, int]) -> str:
        name, place = what
        draw, (held, main), form = random.Random(f"{seed} {name} {place}"), files[name], FORMATS[name]
        other = mains[draw.choice((name, name, draw.choice(list(mains))))]
        folder = _written(base, {**held, main: mutated(held[main], other, draw, form.mend)}, main)
        past = ""
        with contextlib.suppress(Exception):
            form.header(folder / main)
            past = " past"
        try:
            used = form.use(folder, folder / main)
            if used != right[name] and form.strict:
                raise forked.Wrong("another result")
            return ("same" if used == right[name] else "other") + past
        except NecoError as error:
            _named(str(error), folder / main)
            return f"refused{past}"
        finally:
            if elsewhere(base) != outside:
                raise forked.Wrong("something was written outside")

    trials = [(name, place) for name, count in counts.items() for place in range(count)]
    return [(name, verdict) for (name, _), verdict in zip(trials, forked.run(trials, act), strict=True)]


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def fresh(base: Path) -> Path:
    """The empty folder of a trial, and a process that remembers nothing of the last."""
    shutil.rmtree(base / "t", ignore_errors=True)
    (base / "t").mkdir(parents=True)
    archive._content.cache_clear()
    archive.opened.cache_clear()
    coco._segments.cache_clear()
    return base / "t"


def _written(base: Path, held: dict[str, bytes], main: str) -> Path:
    folder = fresh(base)
    for name, data in held.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        os.utime(folder / name, (1, 1))
    return folder


def _named(message: str, path: Path) -> None:
    if path.stem.partition("-")[0] not in message:
        raise forked.Wrong(f"{path.name} is not named: {message}")


def elsewhere(base: Path) -> list[tuple[str, int, int]]:
    return sorted(
        (_relative(p, base), p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in base.rglob("*")
        if "t" not in p.relative_to(base).parts[:1]
    )
