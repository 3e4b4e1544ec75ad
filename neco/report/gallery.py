"""What a run keeps to be looked at, `pictures/` in its folder: written while it evaluates, read by its report.

Shapes: n images, H W pixels of one, h w patches, D channels.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
from PIL import Image
from safetensors.torch import save as serialise
from torch import Tensor

from neco.dataset.base import IGNORE, Dataset, Sample, read_label
from neco.report.pictures import Picture, stretched, thumbnail
from neco.runs import foreign
from neco.utils.errors import NecoError

FOLDER = "pictures"
KINDS = ("image", "jpg"), ("label", "png")
MOST = 2**29  # values of the features of a network


class Features(NamedTuple):
    """Of the images shown, float32 (n, h, w, D), by a network at a step; `weights` is its hash."""

    network: str
    step: int
    weights: str
    maps: Tensor


@dataclass(frozen=True)
class Gallery:
    """The images shown: keys, uint8 (H, W, 3), classes (H, W) (255: none) with their names, and features."""

    keys: list[str]
    images: list[np.ndarray]
    labels: list[np.ndarray]
    classes: list[str]
    features: list[Features]


def save(drawn: Sequence[Picture], run: Path, name: str) -> list[dict[str, str | None]]:
    """Write the pictures of one evaluation; for its record: kind, key of the image, caption and file of each."""
    folder, saved = run / FOLDER / name, []
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(drawn):
        path = _free_path(run, f"{name}/{number:03d}.{'jpg' if picture.key else 'png'}")
        Image.fromarray(picture.pixels).save(path, quality=90)
        about = {"kind": picture.kind, "key": picture.key, "caption": picture.caption}
        saved.append({**about, "file": path.relative_to(run).as_posix()})
    return saved


def _free_path(run: Path, name: str) -> Path:
    """Where to write a file of `pictures/`. Raises NecoError for a place that a link takes out of the run folder."""
    foreign.locate_file(run, f"{FOLDER}/{name}")
    return run / FOLDER / name


def save_images(dataset: Dataset, samples: Sequence[Sample], run: Path) -> None:
    """Keep the images that are shown, and their masks; where there are none, masks of IGNORE."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        image = thumbnail(sample)
        known = dataset.classes and sample.mask is not None
        label = (read_label(dataset, sample) if known else np.full(image.shape[:2], IGNORE)).astype(np.uint8)
        Image.fromarray(image).save(_free_path(run, f"image-{number:03d}.jpg"), quality=88)
        Image.fromarray(stretched(label, image)).save(_free_path(run, f"label-{number:03d}.png"))
    shown = {"keys": [sample.key for sample in samples], "classes": dataset.classes}
    _free_path(run, "shown.json").write_text(json.dumps(shown))


def save_features(features: Tensor, samples: Sequence[Sample], run: Path, name: str, weights: str) -> None:
    """Keep the features (n, h, w, D) of what is shown; `name` is NETWORK-STEP, of whose steps only 0 and the last stay.

    `weights`: the hash of the network.
    """
    folder, network = run / FOLDER, name.rpartition("-")[0]
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"features-{network}-*.safetensors"):
        if not path.stem.endswith("-0"):
            path.unlink()
    about = {"keys": json.dumps([sample.key for sample in samples]), "network": network, "weights": weights}
    data = serialise({"features": features.half().contiguous()}, about)
    _free_path(run, f"features-{name}.safetensors").write_bytes(data)  # save_file's would be for the owner only


def load(run: Path) -> Gallery | None:
    """What `save_images` and `save_features` left, equal networks once, in order of steps; None where nothing is."""
    shown = foreign.read_json(run, f"{FOLDER}/shown.json", foreign.Shown)
    if not shown or not shown["keys"]:
        return None
    keys, classes = shown["keys"], shown["classes"]
    if len(keys) > foreign.MAX_SHOWN or len(classes) > IGNORE:
        raise NecoError(f"{run / FOLDER / 'shown.json'}: {len(keys)} images and {len(classes)} classes are too many")
    found = [[_picture(run, f"{kind}-{i:03d}.{end}") for i in range(len(keys))] for kind, end in KINDS]
    images = [image if image.ndim == 3 else np.stack([image] * 3, -1) for image in found[0]]
    labels = [np.where(label < len(classes), label, IGNORE).astype(np.uint8) for label in found[1]]
    if wrong := [key for key, image, label in zip(keys, images, labels, strict=True) if image.shape[:2] != label.shape]:
        raise NecoError(f"{run / FOLDER}: the mask of {wrong[0]} is not of the size of its image")
    features: dict[str, Features] = {}
    for part in sorted(_features(run, keys), key=lambda part: (part.step, part.network)):
        features.setdefault(part.weights, part)
    return Gallery(keys, images, labels, classes, list(features.values()))


def _picture(run: Path, name: str) -> np.ndarray:
    if (found := foreign.read_picture(run, f"{FOLDER}/{name}")) is None:
        raise NecoError(f"{run / FOLDER / name} is missing")
    return found


def _features(run: Path, keys: Sequence[str]) -> Iterator[Features]:
    """The features of these images, of each network and step."""
    for path in (run / FOLDER).glob("features-*.safetensors"):
        name = re.fullmatch(r"features-(.+)-(\d{1,15})", path.stem)
        real = foreign.locate_file(run, f"{FOLDER}/{path.name}")
        try:
            with safetensors.safe_open(real, "pt") as file:
                about = foreign.check(file.metadata(), dict[str, str])
                if name is None or foreign.parse_json(about["keys"]) != keys:
                    continue
                shape = file.get_slice("features").get_shape()
                if len(shape) != 4 or shape[0] != len(keys) or not 0 < math.prod(shape) <= MOST:
                    raise ValueError(f"features of the shape {shape} for {len(keys)} images")
                maps = file.get_tensor("features").float()
                if not maps.isfinite().all():
                    raise ValueError("features that are not finite")
                yield Features(about["network"], int(name[2]), about["weights"], maps)
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise NecoError(f"{path} is damaged ({type(error).__name__}: {error})") from error
