"""What a run keeps to be looked at, `pictures/` in its folder: written while it evaluates, read by its report.

Shapes: n images, H W pixels of one, h w patches, D channels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
from PIL import Image
from safetensors.torch import save as serialise
from torch import Tensor

from neco.dataset.base import Dataset, Sample, read_label
from neco.eval.pictures import Picture, stretched, thumbnail

FOLDER = "pictures"


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
        path = folder / f"{number:03d}.{'jpg' if picture.key else 'png'}"
        Image.fromarray(picture.pixels).save(path, quality=90)
        about = {"kind": picture.kind, "key": picture.key, "caption": picture.caption}
        saved.append({**about, "file": path.relative_to(run).as_posix()})
    return saved


def save_images(dataset: Dataset, samples: Sequence[Sample], run: Path) -> None:
    """Keep the images that are shown, and their masks."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        image, label = thumbnail(sample), read_label(dataset, sample).astype(np.uint8)
        Image.fromarray(image).save(folder / f"image-{number:03d}.jpg", quality=88)
        Image.fromarray(stretched(label, image)).save(folder / f"label-{number:03d}.png")
    shown = {"keys": [sample.key for sample in samples], "classes": dataset.classes}
    (folder / "shown.json").write_text(json.dumps(shown))


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
    (folder / f"features-{name}.safetensors").write_bytes(data)  # save_file's would be for the owner only


def load(run: Path) -> Gallery | None:
    """What `save_images` and `save_features` left, equal networks once, in order of steps; None where nothing is."""
    folder = run / FOLDER
    if not (folder / "shown.json").is_file():
        return None
    shown = json.loads((folder / "shown.json").read_text())
    names = [f"{number:03d}" for number in range(len(shown["keys"]))]
    images = [np.asarray(Image.open(folder / f"image-{name}.jpg")) for name in names]
    labels = [np.asarray(Image.open(folder / f"label-{name}.png")) for name in names]
    found: dict[str, Features] = {}
    steps = {path: int(path.stem.rpartition("-")[2]) for path in folder.glob("features-*.safetensors")}
    for path in sorted(steps, key=lambda path: (steps[path], path.name)):
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata()
            if json.loads(about["keys"]) == shown["keys"]:
                held = Features(about["network"], steps[path], about["weights"], file.get_tensor("features").float())
                found.setdefault(held.weights, held)
    return Gallery(shown["keys"], images, labels, shown["classes"], list(found.values()))
