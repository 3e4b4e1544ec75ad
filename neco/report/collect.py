"""What runs say: their numbers before and after, beside published ones, and what differs between them.

Numbers are in percent.
"""

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from neco.logger import csv as metrics
from neco.report import gallery, published
from neco.report.gallery import Gallery
from neco.report.published import Published
from neco.runs import foreign
from neco.runs.results import Results, spread
from neco.runs.status import IDLE, STATUS, status
from neco.utils.errors import NecoError

Point = tuple[float, float, float, int]  # x, mean, standard deviation, how many


@dataclass(frozen=True)
class Number:
    """One metric of a network at the end of its run, and what it was at step 0 or of the network compared with."""

    network: str
    model: str
    dataset: str
    part: str  # of the train images: " x 1/8"
    split: str
    evaluation: str
    metric: str
    protocol: str
    value: float
    before: float | None
    published: list[Published]
    published_before: list[Published]
    iou: Mapping[str, float | None]  # of each class, as is the next
    iou_before: Mapping[str, float | None]
    weights: str  # their hash
    source: str  # of the weights: published, random, or a checkpoint
    std: float | None  # over the seeds of the evaluation, in percent

    @property
    def comparable(self) -> tuple[str, str]:
        """Equal for numbers of the same images by the same protocol; how many k there are beside this one is none."""
        of_k = re.search(r"_k\d+$", self.metric)
        return self.split, re.sub(r"/k=[\d,]+", "", self.protocol) if of_k else self.protocol

    @property
    def name(self) -> str:
        """What it is of which data set."""
        return f"{self.evaluation} {self.metric}, {self.dataset}{self.part}"

    def beside(self, row: Published, value: float | None) -> str:
        """A published number and the difference to it, with a mark where that has another protocol."""
        mark = "" if "/reference/" in self.protocol else "*"
        return f"{row.percent:.1f} {row.source}" + (f" ({value - row.percent:+.1f}{mark})" if value is not None else "")


@dataclass(frozen=True)
class Run:
    """A run folder, as far as it is there."""

    path: Path
    label: str
    records: list[dict[str, Any]]
    numbers: list[Number]
    curves: dict[str, list[tuple[float, float]]]  # column of metrics.csv -> (step, value)
    config: dict[str, Any] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)  # on the command line
    environment: dict[str, Any] = field(default_factory=dict)
    gallery: Gallery | None = None
    unfinished: str = ""  # why, if it is

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last that was evaluated."""
        steps = [record["step"] for record in self.records]
        return min(steps), max(steps)

    @property
    def result(self) -> list[Number]:
        """The numbers of the network that counts: the teacher, where there is one."""
        networks = dict.fromkeys(number.network for number in self.numbers)
        chosen = "teacher" if "teacher" in networks else next(iter(networks), "")
        return [number for number in self.numbers if number.network == chosen]

    @cached_property
    def overrides(self) -> dict[str, str]:
        """Value by key of what was told."""
        return {key: value for key, _, value in (line.lstrip("+").partition("=") for line in self.told)}

    def setting(self, key: str) -> str:
        """What the run was told of a key, or what that was; empty where it has no such key."""
        if key in self.overrides:
            return self.overrides[key]
        if chosen := (self.environment.get("choices") or {}).get(key):
            return str(chosen)
        node = foreign.lookup(self.config, key, "")
        return "default" if isinstance(node, dict) else str(node)


def find(patterns: Sequence[str]) -> list[Path]:
    """The folders of runs among those named, and in them, as of several jobs. Raises NecoError without any."""
    wanted = [str(Path(pattern).expanduser()) for pattern in patterns]
    fit = [[path] if Path(path).exists() else sorted(glob.glob(path), key=_natural) for path in wanted]  # [1]: a name
    named = [Path(path) for paths in fit for path in paths]
    found = [folder for path in named for folder in (path, *sorted(path.glob("*/"), key=_natural))]
    held = [folder for folder in found if any((folder / name).is_file() for name in ("results.json", STATUS))]
    runs = [*{folder.resolve(): folder for folder in held}.values()]
    if not runs:
        told = f"runs=[{','.join(patterns)}]: {len(named)} folders fit, none has a results.json"
        raise NecoError(f"{told}; name run folders: runs=[runs/train/*,runs/eval/*]")
    return runs


def _natural(path: str | Path) -> list[str | int]:
    """A key that puts k-8 before k-30."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def read(path: Path, label: str = "") -> Run:
    """A run folder. Raises NecoError for what is damaged, and where nothing was evaluated."""
    records, said = Results(path, writes=False).records, status(path)
    if not records and not said and not (path / "metrics.csv").is_file():
        raise NecoError(f"{path}: nothing was recorded there")
    config = foreign.read_config(path)
    environment = foreign.read_json(path, "environment.json", foreign.Environment) or {}
    begun = config.get("task") in ("train", "finetune") and not any(record["step"] for record in records)
    ended = "only its start was evaluated" if begun and records else "nothing was evaluated" if not records else ""
    if said.get("status", "done") != "done":
        ended = ": ".join(filter(None, [said["status"], said.get("message", "").partition("\n")[0]]))
    return Run(
        path,
        label or path.name,
        records,
        [] if begun else [*_numbers(records, config, str((environment.get("choices") or {}).get("model") or ""))],
        _curves(foreign.read_text(path, "metrics.csv")),
        config,
        foreign.read_text(path, "overrides.txt").splitlines(),
        environment,
        gallery.load(path),
        ended,
    )


def labels(paths: Sequence[Path]) -> list[str]:
    """What to call the runs: the part of their paths that differs."""
    whole = [path.resolve() for path in paths]
    common = os.path.commonpath(whole) if len(whole) > 1 else whole[0].parent
    return [os.path.relpath(path, common) for path in whole]


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, those whose folder is the number of a job also called by what they were told that differs."""
    said = differing(runs, seeds=True)
    names = [", ".join(f"{key}={values[i]}" for key, values in said.items()) for i in range(len(runs))]
    named = zip(runs, names, strict=True)
    return [replace(r, label=f"{r.label}: {name}") if name and r.path.name.isdigit() else r for r, name in named]


def _curves(text: str) -> dict[str, list[tuple[float, float]]]:
    """Each column of a metrics.csv; lines that are no numbers are left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in filter(metrics.is_sound, metrics.parse(text)[1]):
        for name, value in row.items():
            if name != "step" and value:
                found.setdefault(name, []).append((float(row["step"]), float(value)))
    return found


def _numbers(records: list[dict[str, Any]], config: Mapping[str, Any], chosen: str) -> Iterator[Number]:
    """Of the last step; before is step 0, of what was not trained the network `compared`.

    `chosen` is the option of conf/model.
    """
    steps = [record["step"] for record in records]
    trained, seen = any(steps), set()
    for record in records:
        first = {"evaluation": record["evaluation"], "asked": record["asked"]}
        same = [r for r in records if first.items() <= r.items()]
        beside = {"step": 0, "network": record["network"]} if trained else {"network": "compared"}
        earlier = next((r for r in same if beside.items() <= r.items()), None)
        key = record["evaluation"], record["asked"], record["weights"]
        if record["step"] != max(steps) or earlier is record or key in seen:
            continue
        seen.add(key)  # untrained student and teacher are the same
        evaluation = re.sub("_vit[sb]$", "", record["evaluation"])  # presets
        fraction = record.get("fraction", 1.0)
        part = f" x {Fraction(fraction).limit_denominator(1000)}" if fraction < 1 else ""
        for metric, value in record["metrics"].items():
            before = (earlier or {"metrics": {}})["metrics"].get(metric)
            known = [
                published.find(
                    r.get("model") or "", r.get("state") or "", r["dataset"], f"{evaluation}/{metric}", fraction
                )
                for r in (record, earlier or {"dataset": ""})
            ]
            details = [((r or {}).get("details") or {}).get(metric) or {} for r in (record, earlier)]
            iou, std = [part.get("iou") or {} for part in details], details[0].get("std")
            yield Number(
                record["network"], record.get("model") or "", record["dataset"], part, record.get("split") or "val",
                evaluation, metric,
                record["protocol"], 100 * value, None if before is None else 100 * before,
                known[0], known[1], iou[0], iou[1],
                weights=record["weights"], source=_source(record, config, chosen),
                std=None if std is None else 100 * std,
            )  # fmt: skip


def _source(record: Mapping[str, Any], config: Mapping[str, Any], chosen: str) -> str:
    """Where the weights are from, for people: what the record says, or of the configured network its own weights."""
    own = foreign.lookup(config, "model.weights") if not chosen or record.get("model") in (None, chosen) else None
    held, state = record.get("checkpoint"), record.get("state")
    if record["step"]:
        start = config.get("checkpoint") or own
        start = "published weights" if start == "hub" else _weights(start)
        return "post-trained" if state == "after" else f"trained from {start}" if start else "trained"
    if held is None and state in ("before", "after") and not str(own).startswith("package:"):
        return {"before": "published", "after": "post-trained"}[state]
    if str(held or own).startswith("package:") and state == "after":
        return "post-trained"
    return _weights(held or own)


def _weights(source: Any) -> str:
    """What a `checkpoint` or the `weights` of a network mean."""
    if source is None:
        return ""
    if str(source).startswith("package:"):
        return "of the package"
    known = {"none": "random", "hub": "published, in a changed network"}
    return known.get(str(source)) or Path(urlsplit(str(source)).path).name or str(source)


@dataclass(frozen=True)
class Plot:
    """A metric over a key that differs: the points of each line. Names of `categories` stand at 0, 1, ..."""

    title: str
    key: str
    lines: dict[str, list[Point]]
    categories: list[str]
    connected: bool = True  # False: the key is one of how it was measured, so that no two points are comparable


def differing(runs: Sequence[Run], seeds: bool = False) -> dict[str, list[str]]:
    """The keys that runs were told different values of, and the value of each run; with or without `seed`."""
    told = dict.fromkeys(key for run in runs for key in run.overrides)
    keys = [key for key in told if not IDLE.fullmatch(key) and (seeds or key != "seed")]
    said = {key: [run.setting(key) for run in runs] for key in keys}
    return {key: values for key, values in said.items() if len({*values}) > 1}


def sweeps(runs: Sequence[Run]) -> list[Plot]:
    """Each metric over k, where there are several, and over each key of numbers that differs, else over all at once.

    Means and deviations are over runs that differ in nothing that counts: the seeds.
    """
    found: dict[tuple[bool, str], list[tuple[int, Number, str]]] = {}
    for i, run in enumerate(runs):
        for n in run.result:
            name, of_k, k = n.metric.rpartition("_k")
            found.setdefault((False, n.name), []).append((i, n, ""))
            if of_k:
                found.setdefault((True, f"{n.evaluation} {name}, {n.dataset}{n.part}"), []).append((i, n, k))
    made: list[Plot] = []
    for (over_k, title), measured in sorted(found.items(), key=lambda item: item[0][0]):
        made += _plots(runs, over_k, title, measured)
    return [plot for plot in made if len({point[0] for points in plot.lines.values() for point in points}) > 1]


def _plots(
    runs: Sequence[Run], over_k: bool, title: str, measured: Sequence[tuple[int, Number, str]]
) -> Iterator[Plot]:
    """The plots of a metric, given as (number of the run, number, k): one for all that is comparable.

    Where the key is one of the evaluation itself, each point has another protocol: they share a plot, unconnected.
    """
    own = [*dict.fromkeys(i for i, _, _ in measured)]  # what differs among other runs says nothing here
    differs = differing([runs[i] for i in own]).items()
    said = {key: dict(zip(own, values, strict=True)) for key, values in differs if not key.endswith(".k")}
    numeric = [(key,) for key, values in said.items() if all(_number(v) is not None for v in values.values())]
    axes: list[tuple[str, ...]] = [("k",)] if over_k else [*numeric] or ([(*said,)] if said else [])
    protocols = dict.fromkeys(n.comparable for _, n, _ in measured)
    for axis in axes:
        if len(protocols) > 1 and all(key.startswith("eval.") for key in axis):
            several = f"{title}, each point by another protocol"
            yield _plot(several, axis, said, measured, connected=False)
            continue
        for protocol in protocols:
            some = [one for one in measured if one[1].comparable == protocol]
            yield _plot(title + _distinction(protocol, [*protocols]), axis, said, some)


def _distinction(protocol: tuple[str, str], others: Sequence[tuple[str, str]]) -> str:
    """The parts of a protocol that not all have, for a title."""
    parts = [other[1].split("/") for other in others]
    own = [part for part in protocol[1].split("/") if not all(part in other for other in parts)]
    own += [protocol[0]] if len({split for split, _ in others}) > 1 else []
    return f" ({', '.join(own)})" if own else ""


def _plot(
    title: str,
    axis: tuple[str, ...],
    said: Mapping[str, Mapping[int, str]],
    measured: Sequence[tuple[int, Number, str]],
    connected: bool = True,
) -> Plot:
    lines: dict[str, dict[str, list[float]]] = {}
    networks = {n.network for _, n, _ in measured}
    for i, n, k in measured:
        told = {key: values[i] for key, values in said.items()}
        x = k if axis == ("k",) else told[axis[0]] if len(axis) == 1 else _label(told)
        others = {key: value for key, value in told.items() if key not in (*axis, "dataset")}
        others |= {"network": n.network} if len(networks) > 1 else {}
        before = {key: value for key, value in others.items() if key in ("model", "experiment", "network")}
        if n.before is not None:
            lines.setdefault(_label(before, "before"), {}).setdefault(x, []).append(n.before)
        label = _label(others) or ("measured" if n.before is None else "after")
        lines.setdefault(label, {}).setdefault(x, []).append(n.value)
    names = list(dict.fromkeys(x for line in lines.values() for x in line))
    numbers = [_number(name) for name in names]
    at = {name: float(i) if None in numbers else float(numbers[i] or 0) for i, name in enumerate(names)}
    points = {label: sorted((at[x], *spread(v), len(v)) for x, v in line.items()) for label, line in lines.items()}
    return Plot(title, ", ".join(axis), points, names if None in numbers else [], connected)


def _label(told: Mapping[str, str], *more: str) -> str:
    """Where a key does not apply it is left out."""
    return ", ".join([*(f"{key}={value}" for key, value in told.items() if value), *more])


def _number(text: str) -> float | None:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
