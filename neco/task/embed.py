"""task=embed: the patch features of all images of a split, in files of bounded size, with an index.

Each shard `features-00000.safetensors` holds `features` (rows, D), one row a patch, image after image; its header says
which images. Shards appear whole, in order, so what there is says where to go on. `index.csv` is written last.
Shapes: H W pixels, h w patches, D channels.
"""

import csv
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from torch.utils import data
from typing_extensions import TypedDict

from neco.config.schema import Embed
from neco.config.validate import Settings, build, call
from neco.dataset.base import Dataset, Sample, read_image
from neco.dataset.decode import stored_size
from neco.dataset.digests import DigestStore, Ref, joined, noting, states_of
from neco.dataset.file_state import State, is_telling
from neco.dataset.inspect import places
from neco.distributed.devices import choose_device, device_name
from neco.distributed.workers import named_workers, start_worker
from neco.eval.evaluation import input_size
from neco.features.extractor import Extract
from neco.model import weights
from neco.runs import folder, foreign, results, used_data
from neco.runs.folder import locked
from neco.runs.provenance import model_of, network_name, outline, source_of_weights
from neco.training.unreadable import look, too_many
from neco.utils import atomic_files, signals
from neco.utils.errors import NecoError
from neco.utils.progress import track

log = logging.getLogger(__name__)
LOOKS = 200  # images whose size is looked up, to tell what the features of all will take


@dataclass
class Job:
    """What `prepare` found out."""

    dataset: Dataset
    samples: list[Sample]
    model: dict[str, Any]
    source: str | None
    which: weights.Which
    device: torch.device


def prepare(settings: Settings) -> Job:
    """List the images, try a few, see whether the disk holds their features. Raises NecoError where one fails."""
    options: Embed = settings.spine["embed"]
    device = choose_device(settings.run.device)
    source, which = source_of_weights(settings)
    model = model_of(settings, source)
    network = outline(model)
    dataset = settings.build("dataset")
    samples = call(dataset.samples, "dataset", split=options.split)
    if not samples:
        raise NecoError(f"dataset: the {options.split} split of {settings.choices['dataset']} is empty")
    call(side_rule, "embed", options=options, patch=network.patch, dataset=dataset)
    look(samples, dataset.bad_limits(samples))
    _fits(options, Path(settings.run.run_dir), network, dataset, samples)
    return Job(dataset, samples, model, source, which, device)


def side_rule(options: Embed, patch: int, dataset: Dataset) -> tuple[int, int] | None:
    """Height and width of the input, None for `native`. Raises NecoError for what is no multiple of the patch."""
    if options.size == "native":
        if options.limit < patch:
            raise NecoError(f"limit={options.limit} is smaller than the backbone's patch, {patch}")
        return None
    return input_size(options.size, 448, patch, dataset)


def native(width: int, height: int, patch: int, limit: int) -> tuple[int, int]:
    """Height and width of an image's own size in whole patches, shrunk so that neither is more than `limit`."""
    factor = min(1.0, limit / max(width, height))
    most = limit // patch
    tall, wide = (min(most, max(1, round(side * factor / patch))) * patch for side in (height, width))
    return tall, wide


def _fits(options: Embed, folder: Path, network: Any, dataset: Dataset, samples: Sequence[Sample]) -> None:
    size, patch = side_rule(options, network.patch, dataset), network.patch
    cells = [size[0] * size[1] // patch**2] if size else []
    for place in places(len(samples), LOOKS) if size is None else []:
        try:
            tall, wide = native(*stored_size(samples[place].image), patch, options.limit)
        except NecoError:
            continue
        cells.append(tall * wide // patch**2)
    rows = len(samples) * (1 if options.pool == "mean" else sum(cells) / max(1, len(cells)))
    there = sum(path.stat().st_size for path in folder.glob("features-*.safetensors"))
    needed = max(0.0, rows * network.dim * (2 if options.dtype == "float16" else 4) - there)
    while not folder.exists():
        folder = folder.absolute().parent
    free = shutil.disk_usage(folder).free
    log.info("features take about %.2f GB, %.0f GB are free", needed / 1e9, free / 1e9)
    if needed > free:
        raise NecoError(
            f"embed: the features of {len(samples)} images need {needed / 1e9:.1f} GB more, {folder} has "
            f"{free / 1e9:.1f} GB free: smaller embed.size, embed.pool=mean, or run_dir= on another disk"
        )


Read = tuple[State | None, str]  # of a file: its state, if that shows any later change, and the digest of what it held


class Images(data.Dataset):
    """At each index the image, uint8 (3, H, W), and what was read for it; or why it cannot be read."""

    def __init__(self, samples: Sequence[Sample], size: tuple[int, int] | None, patch: int, limit: int) -> None:
        self.samples, self.size, self.patch, self.limit = samples, size, patch, limit

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Read] | str:
        read: list[Read] = []
        try:
            with noting(lambda ref, state, digest: read.append((state, digest.hex()))):
                image = Image.fromarray(read_image(self.samples[index]))
        except NecoError as error:
            return str(error)
        tall, wide = self.size or native(*image.size, self.patch, self.limit)
        pixels = np.array(image.resize((wide, tall), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels).permute(2, 0, 1), read[0]


class Header(TypedDict):
    """What a shard says of itself, beside what `joined` keeps."""

    asked: dict[str, str]
    start: int
    end: int
    images: list[list[Any]]
    bad: list[list[str]]


class Shards:
    """The shards of a folder, and the one that is being filled.

    `done`: how many of the samples they cover. `asked`: what features depend on beside what the images hold, by name.
    Raises NecoError for a folder that holds those of something else, or damaged ones.
    """

    def __init__(self, folder: Path, asked: dict[str, str], options: Embed, samples: Sequence[Sample]) -> None:
        self.folder, self.asked, self.options = folder, asked, options
        refs = {sample.key: sample.image for sample in samples}
        self.done = self.count = 0
        self.bad: list[tuple[str, str]] = []
        for name, held in self.headers():
            differs = [name for name in asked if held["asked"].get(name) != asked[name]]
            if not differs and not _holds([refs[key] for key, *_ in held["images"]], held):
                differs = ["images"]
            if differs:
                what = ", ".join(differs)
                raise NecoError(f"run_dir={folder} holds features of other {what}; give task=embed one of its own")
            if name != self._next() or held["start"] != self.done:
                raise NecoError(f"{folder / self._next()} is gone: remove the later ones, {name} and on, then go on")
            self.done, self.count = held["end"], self.count + 1
            self.bad += held["bad"]
        self._start()

    def _start(self) -> None:
        self.start, self.rows = self.done, list[Tensor]()
        self.images: list[tuple[str, int, int]] = []
        self.read: list[Read] = []
        self.new: list[tuple[str, str]] = []
        self.bytes = 0

    def _next(self) -> str:
        return f"features-{self.count:05d}.safetensors"

    def headers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and header of each complete shard."""
        for path in sorted(self.folder.glob("features-*.safetensors")):
            try:
                with safetensors.safe_open(path, "pt") as file:
                    held = foreign.parse_json(file.metadata()["neco"])
                    yield path.name, foreign.check(held, Header)
            except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
                raise NecoError(f"{path} is damaged ({error}): remove it and those after it, then go on") from error

    def skip(self, sample: Sample, why: str) -> None:
        """Note why the next image cannot be read."""
        self.done += 1
        self.new.append((sample.key, why))
        self.bad.append((sample.key, why))

    def add(self, sample: Sample, found: Tensor, read: Read) -> None:
        """Append features (h, w, D) of the next image, and what was read for them."""
        self.done += 1
        self.read.append(read)
        rows = found.to(getattr(torch, self.options.dtype)).flatten(0, 1).contiguous()
        if not rows.isfinite().all():
            raise NecoError(f"features of {sample.key} are beyond float16: embed.dtype=float32")
        self.rows.append(rows)
        self.images.append((sample.key, *found.shape[:2]))
        self.bytes += rows.nbytes
        if self.bytes >= self.options.shard_mb * 1e6:
            self.close()

    def close(self) -> None:
        """Write what was added since the last shard, whole or not at all."""
        if not self.images and not self.new:
            return
        about = {"asked": self.asked, "start": self.start, "end": self.done, "images": self.images, "bad": self.new}
        states, contents = zip(*self.read, strict=True) if self.read else ((), ())
        about |= {"states": None if None in states else joined(states), "contents": joined(contents)}
        path = self.folder / self._next()
        rows = torch.cat(self.rows) if self.rows else torch.zeros(0, 1)
        with atomic_files.whole(path) as file:  # save_file's would be for the owner only
            file.write(safetensors.torch.save({"features": rows}, {"neco": json.dumps(about)}))
        self.count += 1
        self._start()

    def write_index(self) -> int:
        """Write index.csv: where the features of each image are. Returns how many images there are."""
        path, images = self.folder / "index.csv", 0
        with atomic_files.whole(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:  # any bytes
            lines = csv.writer(file)
            lines.writerow(["key", "file", "row", "h", "w"])
            for name, held in self.headers():
                row = 0
                for key, h, w in held["images"]:
                    lines.writerow([key, name, row, h, w])
                    row, images = row + h * w, images + 1
        return images


def main(settings: Settings, job: Job, output: Path) -> None:
    """Write the features that are not there yet, then the index. Raises NecoError for too many unreadable images."""
    options: Embed = settings.spine["embed"]
    with locked(output, "embed"), named_workers():
        torch.manual_seed(settings.run.seed)
        backbone = build(job.model, "model")
        report = weights.load(backbone, job.source, job.which, trust_pickle=settings.run.trust_pickle)
        log.info("%s: %s", network_name(settings, job.model), report)
        size = side_rule(options, backbone.patch, job.dataset)
        shards = Shards(output, _asked(options, size, backbone, report.hash, job.samples), options, job.samples)
        what = settings.config, settings.overrides, settings.choices
        folder.describe(output, *what, device_name(job.device))
        used_data.note(output, "dataset", job.dataset, options.split, "some")
        if shards.done:
            log.info("%d of %d images are there already", shards.done, len(job.samples))
        left = job.samples[shards.done :]
        extract: Extract = settings.build("extract", device=job.device)
        extract.place(backbone)
        items = Images(left, size, backbone.patch, options.limit)
        sizes = f"{size[0]}x{size[1]}" if size else "their own size"
        log.info("embedding   %s, %d images at %s, %s", settings.choices["dataset"], len(left), sizes, job.device)
        limits = job.dataset.bad_limits(job.samples)
        batches = data.DataLoader(
            items, extract.batch_size, num_workers=extract.readers, collate_fn=list, worker_init_fn=start_worker
        )
        with signals.held():
            loaded = iter(batches)
        rest = iter(left)
        for batch in track(loaded, f"batches of {extract.batch_size} images", total=len(batches)):
            readable = [item[0] for item in batch if not isinstance(item, str)]
            features = iter(_features(extract, backbone, readable, options.pool))
            for item in batch:
                if isinstance(item, str):
                    shards.skip(next(rest), item)
                else:
                    shards.add(next(rest), next(features), item[1])
            _check(output, shards.bad, limits)
        shards.close()
        images = shards.write_index()
        if shards.bad:
            log.warning("%d images cannot be read; they are named in %s", len(shards.bad), _name(output, shards.bad))
        log.info("wrote       %s: %d images in %d files", output / "index.csv", images, shards.count)


def _features(extract: Extract, backbone: Any, images: Sequence[Tensor], pool: str) -> list[Tensor]:
    """Features (h, w, D) of each image; those of one size share a pass."""
    found = list(images)
    for shape in {image.shape for image in images}:
        at = [i for i, image in enumerate(images) if image.shape == shape]
        features = extract.forward(backbone, torch.stack([images[i] for i in at]))
        if pool == "mean":
            features = features.mean((1, 2), keepdim=True)
        for i, maps in zip(at, features, strict=True):
            found[i] = maps
    return found


def _holds(refs: Sequence[Ref], held: dict[str, Any]) -> bool:
    """Whether the features of a shard are of what these images hold; reads them only if their states do not tell."""
    states = states_of(refs)
    if joined(states) == held.get("states") and all(map(is_telling, states)):
        return True
    return joined(DigestStore(None).digests(refs)) == held.get("contents")


def _asked(options: Embed, size: Any, backbone: Any, digest: str, samples: Sequence[Sample]) -> dict[str, str]:
    about = [(sample.key, sample.range) if sample.range else sample.key for sample in samples]
    names = hashlib.sha256(repr(about).encode(errors="surrogateescape"))
    values = options.split, size or options.limit, options.pool, options.dtype
    return {"weights": digest, "model": repr(backbone.spec), "values": repr(values), "images": names.hexdigest()[:12]}


def _check(folder: Path, bad: Sequence[tuple[str, str]], limits: dict[str, tuple[int, int]]) -> None:
    for prefix, (allowed, images) in limits.items():
        counted = sum(key.startswith(prefix) for key, _ in bad)
        if counted > allowed:
            more = f"They are named in {_name(folder, bad)}."
            raise too_many(f"{counted} images", prefix, allowed, images, more)


def _name(folder: Path, bad: Sequence[tuple[str, str]]) -> Path:
    path = folder / "bad_images.txt"
    results.write(path, "".join(f"{key}\t{why}\n" for key, why in bad), mask=False)
    return path
