"""pictures.html: what evaluations saw of a few images, networks and steps side by side."""

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from PIL import Image
from safetensors.torch import save as serialise
from torch import Tensor

from neco import pages
from neco.dataset.base import Dataset, Sample
from neco.eval import pictures
from neco.eval.pictures import Picture

FOLDER = "pictures"


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


def write(run: Path, records: Sequence[dict[str, Any]], dataset: Dataset, samples: Sequence[Sample]) -> Path:
    """The page of a run folder, from its records and what `save` and `save_features` left there."""
    swatches = zip(pages.colours(len(dataset.classes)), dataset.classes, strict=True)
    parts = [f"<p>{' '.join(pages.swatch(*swatch) for swatch in swatches)}</p>"]
    columns = {name: [*_columns(records, name)] for name in dict.fromkeys(r["evaluation"] for r in records)}
    order = [*dict.fromkeys(record["network"] for record in records)]
    features = _features(run, [sample.key for sample in samples], order)
    parts.append(_numbers(records))
    for number, sample in enumerate(samples):
        parts += [f"<h2>{html.escape(sample.key)}</h2>", pages.figure(image := pictures.thumbnail(sample), "image")]
        parts.append(pages.figure(pictures.truth(dataset, sample).pixels, "ground truth"))
        for title, maps in features:
            parts.append(pages.figure(pictures.stretched(maps[number], image), f"features, {title}"))
        for name, shown in columns.items():
            parts += [f"<h3>{name}</h3>", *_figures(run, shown, sample.key)]
    for name, shown in columns.items():
        if whole := [*_figures(run, shown, None)]:
            parts += [f"<h2>{name} of all images</h2>", *whole]
    path = run / "pictures.html"
    pages.page(path, f"{records[0]['dataset']}: {len(samples)} images", parts)
    return path


def _title(network: str, step: int, last: int) -> str:
    return network if not last else "before" if not step else f"{network}, step {step}"


def _columns(records: Sequence[dict[str, Any]], name: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Titles and pictures of an evaluation's first and last step; equal networks have one column."""
    records = [r for r in records if r["evaluation"] == name and r.get("pictures")]
    steps, seen = [r["step"] for r in records], set()
    for record in records:
        files = tuple(picture["file"] for picture in record["pictures"])
        if record["step"] in (min(steps), max(steps)) and files not in seen:
            seen.add(files)
            yield _title(record["network"], record["step"], max(steps)), record["pictures"]


def _figures(run: Path, columns: Sequence[tuple[str, list[dict[str, Any]]]], key: str | None) -> Iterator[str]:
    """The pictures of an image (None: of all), those of one kind next to each other."""
    found = [(title, p) for title, drawn in columns for p in drawn if p["key"] == key]
    for kind in dict.fromkeys(p["kind"] for _, p in found):
        yield "<div>"
        for title, picture in found:
            if picture["kind"] == kind:
                more = f". {picture['caption']}" if picture["caption"] else ""
                pixels = np.asarray(Image.open(run / picture["file"]).convert("RGB"))
                yield pages.figure(pixels, html.escape(f"{kind}, {title}{more}"), side=max(pixels.shape))
        yield "</div>"


def _numbers(records: Sequence[dict[str, Any]]) -> str:
    """What was measured, with weights and protocols, as a table: of the steps that are shown."""
    steps = [record["step"] for record in records]
    head, rows = ["evaluation", "network", "step", "weights", "", "protocol"], []
    for record in (r for r in records if r["step"] in (min(steps), max(steps))):
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
        rows.append([record["evaluation"], record["network"], record["step"], record["weights"], metrics])
        rows[-1].append(record["protocol"])
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    titles = "".join(f"<th>{title}</th>" for title in head)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _features(run: Path, keys: list[str], order: list[str]) -> list[tuple[str, np.ndarray]]:
    """Titles and features as colours, uint8 (n, h, w, 3), of all networks and steps that were kept for these images."""
    held: dict[str, tuple[str, int, Tensor]] = {}
    paths = (run / FOLDER).glob("features-*.safetensors")
    for path in sorted(paths, key=lambda path: order.index(path.stem.split("-")[1])):
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata()
            if json.loads(about["keys"]) == keys:
                step = int(path.stem.rpartition("-")[2])
                held.setdefault(about["weights"], (about["network"], step, file.get_tensor("features").float()))
    last = max((step for _, step, _ in held.values()), default=0)
    ordered = sorted(held.values(), key=lambda part: (part[1], order.index(part[0])))
    maps = pictures.as_colours([features for _, _, features in ordered]) if ordered else []
    return [(_title(network, step, last), part) for (network, step, _), part in zip(ordered, maps, strict=True)]
