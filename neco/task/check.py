"""task=check: what is there of a data set, can it be used, what does it look like."""

import html
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neco.augment.views import Views, view_rng
from neco.config import discovery, validate
from neco.config.validate import Settings, call
from neco.dataset.base import Dataset
from neco.dataset.inspect import Look, check_classes, inspect, places, read_pair
from neco.report import pages
from neco.report.pictures import colours, overlay
from neco.runs.provenance import outline
from neco.training.unreadable import CHANCE, chance
from neco.utils.errors import NecoError
from neco.utils.text_table import columns

log = logging.getLogger(__name__)
HEAD = ["data set", "split", "images", "published", "masks", "looked at", "unusable", "pixels"]


@dataclass
class Job:
    """What `prepare` found out."""

    datasets: dict[str, Dataset]
    views: Views


def prepare(settings: Settings) -> Job:
    """Build the data set, or all of them. Raises NecoError for what cannot be."""
    network = outline(settings.config.get("model"))
    views = call(settings.build("augment").resolve, "augment", patch=network.patch, size=network.size)
    if (name := settings.choices["dataset"]) != "all":
        return Job({name: settings.build("dataset")}, views)
    if settings.run.show:
        raise NecoError(f"show={settings.run.show}: one data set at a time is shown; choose it with dataset=NAME")
    datasets = {}
    for name in discovery.options("dataset"):
        node = validate.option("dataset", name, settings.config)
        if "parts" not in node and node.get("root", "???") != "???":
            datasets[name] = validate.build(node, f"dataset={name}")
    return Job(datasets, views)


def main(settings: Settings, job: Job, output: Path) -> None:
    """Print what was found. Raises NecoError where the data set, or one of all that are there, is of no use."""
    rows, useless = [HEAD], {}
    for name, dataset in job.datasets.items():
        found, lacking = splits(dataset)
        rows += [row(name, split, look, dataset) for split, look in found.items()]
        there = not hasattr(dataset, "tree") or dataset.tree.is_dir()
        for split in ("train", "val") if there else ():
            if split in lacking:
                rows.append([name, split, "missing", *[""] * (len(HEAD) - 3)])
        if not there:
            rows.append([name, "none", *[""] * (len(HEAD) - 2)])
        serves, problems = verdict(dataset, found)
        if len(job.datasets) == 1:
            log.info("\n%s", columns(rows))
            wrong = [*problems, *missing(lacking)]
            last = not serves and bool(wrong) and "\n" not in wrong[0]  # the error that ends the check says it whole
            for text in (*examples(dataset, found), *labels(dataset, found), *wrong[int(last) :]):
                log.info("\n%s", text)
            log.info("\nserves      %s", ", ".join(serves) or "nothing")
        if not serves and (len(job.datasets) == 1 or there):
            useless[name] = problems or missing(lacking)
    if len(job.datasets) > 1:
        log.info("\n%s", columns(rows))
        if settings.run.show:
            log.warning("show=%d: images are drawn of one data set: name it with dataset=NAME", settings.run.show)
    elif settings.run.show:
        path = output / "check.html"
        pages.page(path, f"{name}: {settings.run.show} images a split", pictures(dataset, job.views, settings))
        log.info("wrote       %s", path)
    if useless:
        raise NecoError(f"{', '.join(useless)} cannot be used: {first(next(iter(useless.values()))[0])}")


def splits(dataset: Dataset) -> tuple[dict[str, Look], dict[str, str]]:
    """What was seen of each split, and what is wrong with those that cannot be listed."""
    found, lacking = {}, {}
    for split in dict.fromkeys(["train", "val", *dataset.counts]):
        try:
            found[split] = inspect(dataset, split)
        except NecoError as error:
            lacking[split] = str(error) if split in ("train", "val") else first(str(error))
    return found, lacking


def missing(lacking: dict[str, str]) -> list[str]:
    """What is wrong with the splits that cannot be listed, each thing once."""
    splits: dict[str, list[str]] = {}
    for split, why in lacking.items():
        splits.setdefault(why, []).append(split)
    return [f"{', '.join(names)}: {why}" for why, names in splits.items()]


def first(text: str) -> str:
    """The first line of an error, without what introduces the second."""
    return text.splitlines()[0].removesuffix(". Looked in")


def verdict(dataset: Dataset, found: dict[str, Look]) -> tuple[list[str], list[str]]:
    """What the data set serves, and what was seen to be wrong."""
    serves, problems, misread = [], [], set()
    for split, look in found.items():
        if look.bad:
            shown = "\n  ".join([*look.bad.values()][:5])
            problems.append(f"{split}: {len(look.bad)} of {look.looked} images looked at cannot be used: {shown}")
        look.flat.warn(split)
        try:
            check_classes(dataset, split, look)
        except NecoError as error:
            problems.append(str(error))
            misread.add(split)
    limit = dataset.bad_limits(dataset.samples("train"))[""] if "train" in found else (0, 0)
    if (train := found.get("train")) and train.images and chance(len(train.bad), train.looked, *limit) >= CHANCE:
        serves.append("training")
    if (val := found.get("val")) and dataset.classes and val.masks == val.images > 0 and not val.bad and not misread:
        serves.append("evaluation")
    return serves, problems


def row(name: str, split: str, look: Look, dataset: Dataset) -> list[str]:
    """A line of the table."""
    published = dataset.counts.get(split)
    ends = dict.fromkeys((min(look.sizes), max(look.sizes))) if look.sizes else ()
    sizes = " to ".join(f"{width}x{height}" for width, height in ends)
    numbers = [look.images, "" if published is None else published, look.masks, look.looked, len(look.bad)]
    return [name, split, *map(str, numbers), sizes]


def examples(dataset: Dataset, found: dict[str, Look]) -> Iterator[str]:
    """The first pair of each split, which shows the layout."""
    for split in found:
        if samples := dataset.samples(split):
            mask = f" with {samples[0].mask}" if samples[0].mask else ""
            yield f"{split} begins with {samples[0].image}{mask}"


def labels(dataset: Dataset, found: dict[str, Look]) -> Iterator[str]:
    """Share of each class among the labelled pixels that were seen."""
    for split, look in found.items():
        if look.pixels.sum():
            *pixels, ignored = look.pixels.tolist()
            seen = {name: count for name, count in zip(dataset.classes, pixels, strict=True) if count}
            most = sorted(seen, key=lambda name: -seen[name])
            shares = ", ".join(f"{name} {100 * seen[name] / max(1, sum(pixels)):.1f}%" for name in most)
            absent = [name for name in dataset.classes if name not in seen]
            unseen = f"; not among them: {', '.join(absent)}" if absent else ""
            yield (
                f"{split}, {len(look.sizes)} masks: {len(seen)} of {len(dataset.classes)} classes: {shares}{unseen}; "
                f"{100 * ignored / look.pixels.sum():.1f}% of all pixels are ignored"
            )


def pictures(dataset: Dataset, views: Views, settings: Settings) -> Iterator[str]:
    """HTML of images with their masks and class names; of train also the views, and where on the image they are."""
    palette = colours(len(dataset.classes) + len(views.sizes))
    palette, frames = palette[: len(dataset.classes)], palette[len(dataset.classes) :]
    for split in ("train", "val"):
        try:
            samples = dataset.samples(split)
        except NecoError as error:
            yield f"<h2>{split}</h2><pre>{html.escape(str(error))}</pre>"
            continue
        yield f"<h2>{split}</h2>"
        for place in places(len(samples), settings.run.show):
            sample, name = samples[place], html.escape(samples[place].key)
            try:
                image, label = read_pair(dataset, sample)
            except NecoError as error:
                yield f"<h3>{name}</h3><pre>{html.escape(str(error))}</pre>"
                continue
            yield f"<h3>{name}, {image.shape[1]}x{image.shape[0]}</h3>"
            drawn = views.sample(view_rng(settings.run.seed, 0, place), *image.shape[:2]) if split == "train" else None
            figures = [pages.drawn(image if drawn is None else pages.boxed(image, drawn.crops, frames), "image")]
            if label is not None:
                there = [i for i in np.bincount(label.ravel()).nonzero()[0] if i < len(dataset.classes)]
                names = " ".join(pages.swatch(palette[i], dataset.classes[i]) for i in there)
                figures.append(pages.drawn(overlay(image, label, palette), "its mask", names))
            if drawn is not None:
                pixels = [view for group in views.apply(image, drawn) for view in group.permute(0, 2, 3, 1).numpy()]
                for number, view in enumerate(pixels):
                    told = f"view {number}: {view.shape[1]}x{view.shape[0]}"
                    figures.append(pages.drawn(view, told, pages.swatch(frames[number], told), side=160))
            yield f'<div class="pictures">{"".join(figures)}</div>'
