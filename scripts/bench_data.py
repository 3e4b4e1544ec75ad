"""What reading costs: images a second by reader and decoder, the share of steps spent waiting, the time until a start.

    python scripts/bench_data.py read                   # one worker: folder, tar, zip; PIL, OpenCV, torchvision
    python scripts/bench_data.py wait --workers 1 2 4   # `data_wait` of task=train with model=tiny
    python scripts/bench_data.py start --files 1300000 --members 1300000

Photographs are drawn: 640x480, about 100 kB, as in COCO. All files are in the system's cache: shown is what the
processor does, a disk adds the same to all. `read` takes medians over rounds in which all take turns, on one thread.
"""

import argparse
import csv
import functools
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torchvision.io import ImageReadMode, decode_jpeg

from neco.dataset import archive
from neco.dataset.base import read_image
from neco.dataset.files import Ref, Tree, read_bytes
from neco.utils.text_table import columns

HEIGHT, WIDTH = 480, 640


@functools.cache
def _jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    soft = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).astype(int)
    noise = ndimage.gaussian_filter(rng.normal(0, 24, soft.shape), (0.7, 0.7, 0))
    buffer = io.BytesIO()
    Image.fromarray((soft + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def jpeg(number: int) -> bytes:
    """Soft shapes and some sensor noise, about 100 kB; there are 200 different ones."""
    return _jpeg(number % 200)


def make_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as out:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def make_zip(path: Path, files: Iterable[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in files:
            out.writestr(name, data)


def make_folder(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    for name, data in files:
        file = path / name
        if not file.parent.is_dir():
            file.parent.mkdir(parents=True)
        file.write_bytes(data)


def by_opencv(ref: Ref) -> np.ndarray | None:
    return cv2.imdecode(np.frombuffer(read_bytes(ref), np.uint8), cv2.IMREAD_COLOR_RGB)


def by_torchvision(ref: Ref) -> np.ndarray:
    data = torch.frombuffer(bytearray(read_bytes(ref)), dtype=torch.uint8)
    return decode_jpeg(data, ImageReadMode.RGB).permute(1, 2, 0).contiguous().numpy()


def read(folder: Path, options: argparse.Namespace) -> None:
    """Images a second of one worker."""
    files = [(f"{i:06d}.jpg", jpeg(i)) for i in range(options.images)]
    makers: dict[str, tuple[str, Callable[[Path, Iterable[tuple[str, bytes]]], None]]] = {
        "folder": ("folder", make_folder),
        "tar": ("a.tar", make_tar),
        "zip, stored": ("b.zip", make_zip),
        "zip, deflated": ("c.zip", partial(make_zip, method=zipfile.ZIP_DEFLATED)),
    }
    kinds = {}
    for kind, (name, make) in makers.items():
        make(folder / name, files)
        kinds[kind] = list(Tree(folder / name).images().values())
    decoders: dict[str, Callable[[Ref], object]] = {
        "bytes alone": read_bytes, "read_image (PIL)": read_image, "OpenCV": by_opencv, "torchvision": by_torchvision,
    }  # fmt: skip
    rates: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind in kinds for name in decoders}
    for turn in range(options.rounds + 1):  # the first warms up
        for (kind, name), found in rates.items():
            start = time.perf_counter()
            for ref in kinds[kind]:
                decoders[name](ref)
            found += [len(files) / (time.perf_counter() - start)] if turn else []
    medians = {key: statistics.median(found) for key, found in rates.items()}
    size = statistics.mean(len(data) for _, data in files) / 1000
    print(f"{len(files)} JPEGs of {WIDTH}x{HEIGHT} and {size:.0f} kB; images/s of one worker (ratio to the folder's)\n")
    rows = [["reader", *decoders]]
    for kind in kinds:
        ratios = [
            f"{medians[kind, name]:.0f} ({medians[kind, name] / medians['folder', name]:.2f})" for name in decoders
        ]
        rows.append([kind, *ratios])
    print(columns(rows))


def wait(folder: Path, options: argparse.Namespace) -> None:
    """Share of a training step that waits for data, by the run's own measure."""
    make_zip(folder / "photos.zip", ((f"{i:06d}.jpg", jpeg(i)) for i in range(options.images)))
    rows = [["workers", "data_wait", "images/s"]]
    for workers in options.workers:
        run = folder / f"run{workers}"
        command = [
            sys.executable, "-m", "neco", "task=train", "model=tiny", "weights=none", "dataset=folder",
            f"dataset.root={folder / 'photos.zip'}", f"train.steps={options.steps}", "eval=[]",
            f"train.log_steps={max(1, options.steps // 8)}",  # a row waits for the device
            f"train.workers={workers}", f"train.batch_size={options.batch}", f"run_dir={run}",
        ]  # fmt: skip
        done = subprocess.run([*command, *options.override], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        with (run / "metrics.csv").open(newline="") as file:
            started = [row for row in csv.DictReader(file) if int(row["step"]) > options.steps // 4]
        share, speed = (
            statistics.mean(float(row[key]) for row in started) for key in ("data_wait", "images_per_second")
        )
        rows.append([str(workers), f"{share:.0%}", f"{speed:.1f}"])
    how = " ".join(options.override) or "the tiny backbone"
    print(f"{options.steps} steps of {options.batch} images from a zip, {how}\n\n{columns(rows)}")


def start(folder: Path, options: argparse.Namespace) -> None:
    """Seconds until the images of a class tree or an archive are known."""
    rows = [["what", "images", "first", "again", "index MB"]]

    def names(count: int) -> Iterable[tuple[str, bytes]]:
        return ((f"n{i * options.classes // count:08d}/n{i:08d}.JPEG", b"") for i in range(count))

    makers: dict[str, tuple[Callable[[Path, Iterable[tuple[str, bytes]]], None], int]] = {
        "train": (make_folder, options.files),
        "a.tar": (make_tar, options.members),
        "b.zip": (make_zip, options.members),
    }
    for name, (make, count) in makers.items():
        index = folder / f"index-{name}"
        make(folder / name, names(count))
        if name == "train":
            time.sleep(2.5)  # a listing of what has just changed is not kept
        seconds = []
        for _ in range(2):
            archive._content.cache_clear()  # as in a new process
            begin = time.perf_counter()
            found = len(Tree(folder / name, index).images())
            seconds.append(f"{time.perf_counter() - begin:.2f} s")
        size = sum(path.stat().st_size for path in index.glob("*")) / 1e6
        rows.append([name, str(found), *seconds, f"{size:.1f}"])
    print(columns(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("read", "wait", "start"))
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--override", nargs="*", default=[], help="more keys of the runs, e.g. augment.global_size=224")
    parser.add_argument("--files", type=int, default=1_300_000, help="empty files of the class tree")
    parser.add_argument("--members", type=int, default=100_000, help="of each archive")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--folder", help="where files are made and removed; default: the system's temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        {"read": read, "wait": wait, "start": start}[options.what](Path(folder), options)


if __name__ == "__main__":
    main()
