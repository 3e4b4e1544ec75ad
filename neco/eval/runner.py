"""Evaluations of networks, recorded with all that their numbers depend on and where their weights are from."""

import hashlib
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from neco.config.discovery import options
from neco.config.types import share
from neco.config.validate import Settings, call, name_keys, option
from neco.dataset.base import Dataset, Sample
from neco.dataset.digests import Contents
from neco.dataset.inspect import check_classes, inspect, reason
from neco.distributed import device_memory
from neco.eval.evaluation import Result, Trained, input_size, size_name
from neco.features.extractor import Extract
from neco.logger.trackers import Trackers
from neco.model import sources
from neco.model.backbone import Attention, Backbone
from neco.model.weights import weights_hash
from neco.report import gallery
from neco.report.pictures import shown
from neco.runs import foreign, used_data
from neco.runs.results import Results, percent
from neco.utils import atomic_files
from neco.utils.errors import NecoError


def check_evaluations(settings: Settings, dataset: Dataset, network: Backbone) -> str:
    """The selected evaluations with their input sizes, for people; lists the files of the data set and tries a few.

    Raises NecoError for what would end one of them.
    """
    sizes, node = {}, "val_dataset" if settings.config.get("val_dataset") else "dataset"
    call(dataset.samples, node, split="val")  # what it lacks is not the evaluations' fault
    for name, evaluation in settings.build_all("eval").items():
        sizes[name] = call(evaluation.plan, f"eval.{name}", patch=network.patch, dataset=dataset)[0]
        if getattr(evaluation, "attends", False):
            call(Attention, f"eval.{name}", backbone=network)
    for split in ("train", "val"):
        if dataset.listed(split):
            look = inspect(dataset, split, looks=8, seconds=2)
            for why in look.bad.values():
                raise NecoError(f"{split} of the data set to evaluate on: {name_keys(why, node)}")
            if (doubt := look.flat.warn(split)) and doubt not in dataset.warnings:
                dataset.warnings.append(doubt)
            call(check_classes, node, dataset=dataset, split=split, look=look)
    return ", ".join(f"{name} ({size_name(size)} pixels)" for name, size in sizes.items())


log = logging.getLogger(__name__)
Origin = Mapping[str, Any]  # see `origin`
# Keys of a data set that change no number; names of images and what files hold are looked at themselves
KEPT = ("root", "masks", "train_list", "val_list", "index", "files", "weight", "max_bad")


def origin(
    settings: Settings, source: str | None, *, trained: bool = False, of: tuple[str, Mapping[str, Any]] | None = None
) -> Origin:
    """Where weights are from, for their records: `model`, `checkpoint`, `state`.

    `state` is `before` for the published weights of the option `model` as it is, `after` for those after
    post-training, and empty for all others: random, fine-tuned, of another file, of a changed network. Only the first
    two are comparable with published numbers.

    Args:
        source: as `neco.model.weights.load` takes it.
        trained: by this run, which started from them.
        of: the option of conf/model and its node, where those are not the configuration's.
    """
    name, node = of or (settings.choices["model"], settings.config["model"])
    about = {"checkpoint": source}
    if source and source.endswith(".ckpt"):
        held = sources.contents(Path(source), settings.run.trust_pickle).get("neco")
        said = held.get("origin") if isinstance(held, dict) else None
        model, state = said if isinstance(said, tuple | list) and [*map(type, said)] == [str, str] else ("", "")
        return {"model": model, "state": "" if trained else state, **about}
    own = source is None and name in options("model") and node == option("model", name, settings.config)
    if not own or node["weights"] == "none":
        return {"model": name, "state": "", **about}
    return {"model": name, "state": "after" if trained else "before", **about}


def measure(
    settings: Settings,
    trackers: Trackers,
    networks: Mapping[str, nn.Module],
    origins: Mapping[str, Origin],
    dataset: Dataset,
    dataset_name: str,
    device: torch.device,
    *,
    step: int = 0,
    epoch: float = 0.0,
    evaluations: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run evaluations (None: the selected ones) on each network, record and track them. Returns the records.

    Networks with equal weights are measured once. What is recorded already, at this step, with these weights, images
    and values of all keys, is kept. What an evaluation trains is written to `heads/`, named by the record as `saved`.
    Leaves modes and random state as they were.
    """
    evaluations = settings.build_all("eval") if evaluations is None else evaluations
    store, show = trackers.store, settings.run.show
    run = store.path.parent
    found: list[dict[str, Any]] = []
    used: set[str] = set()
    with torch.random.fork_rng():
        for network, backbone in networks.items():
            digest = weights_hash(backbone)
            for name, evaluation in evaluations.items():
                asked = Asked(settings, name, evaluation, backbone, dataset)
                key = {"evaluation": name, "weights": digest}
                same, record = [], None
                if any(key.items() <= record.items() for record in (*found, *store.records)):  # else nothing to compare
                    key["asked"] = asked.digest()
                    same = [record for record in found if key.items() <= record.items()]  # of another network
                    record = same[0] if same else store.find(step=step, network=network, **key)
                used |= asked.splits
                if record is None or _incomplete(record, run, show):
                    log.info("evaluating: %s of the %s on %s", name, network, dataset_name)
                    place = {"dataset": dataset_name, "split": "val", "step": step, "epoch": epoch}
                    start = f"{name}-{network}-{step}"
                    measured = _run(settings, evaluation, backbone, dataset, device, store, start, asked, digest)
                    record = {**key, **place, "seed": settings.run.seed, **measured}
                    numbers = ", ".join(f"{metric} {percent(value)} %" for metric, value in record["metrics"].items())
                    log.info("%s of the %s: %s", name, network, numbers)
                elif same:
                    log.info("%s of the %s: the same weights as the %s", name, network, record["network"])
                for warning in record.get("warnings", []):
                    log.warning("%s: %s", name, warning)
                about = {**origins[network], "fraction": share(_node(settings).get("fraction") or 1.0)}
                if dataset.counts.get("val", 0) != len(dataset.samples("val")):
                    about["state"] = ""  # a part of the images
                spec = getattr(getattr(backbone, "backbone", backbone), "spec", None)  # heads and such, not in the hash
                found.append({**record, **about, "network": network, "spec": spec})
                store.add(found[-1])
                trackers.tell("evaluation", found[-1])
        for split in sorted(used) if store.writes else ():
            used_data.note(run, _node_name(settings), dataset, split, "all")
        if show:
            show_images(settings, store, networks, dataset, dataset.samples("val"), device, step)
    return found


def _node(settings: Settings) -> dict[str, Any]:
    """The data set that is evaluated on, in the configuration."""
    return settings.config[_node_name(settings)]


def _node_name(settings: Settings) -> str:
    return "val_dataset" if settings.config.get("val_dataset") else "dataset"


class Asked:
    """All that an evaluation's numbers depend on but the weights: its values, the names of images and what files hold.

    Nothing is read until `digest`: the first evaluation of some images reads them once, and their digests with them.
    """

    def __init__(self, settings: Settings, name: str, evaluation: Any, backbone: Any, dataset: Dataset) -> None:
        node = {key: value for key, value in _node(settings).items() if key not in KEPT}
        plan = evaluation.plan(patch=backbone.patch, dataset=dataset)
        samples = [sample for part in plan if isinstance(part, list) for sample in part if isinstance(sample, Sample)]
        listed = {split: dataset.listed(split) for split in ("train", "val", "test")}
        self.splits = {split for split, own in listed.items() if own and own[0] in samples}
        plan = [[*map(_name, part)] if isinstance(part, list) else part for part in plan]
        values = settings.config["eval"].get(name), node, plan, settings.run.seed, getattr(backbone, "spec", None)
        self.values = repr(values)
        refs = [ref for sample in samples for ref in (sample.image, sample.mask) if ref is not None]
        self.contents = Contents([*refs, *dataset.label_files()], dataset.index)

    def digest(self) -> str:
        """In 12 hexadecimal digits. Raises NecoError for a file that cannot be read."""
        return hashlib.sha256(f"{self.values} {self.contents.digest()}".encode(errors="surrogateescape")).hexdigest()[
            :12
        ]

    def answered(self) -> str:
        """The digest, when the evaluation is through. If a file was changed meanwhile, one that is never asked for."""
        digest = self.digest()
        if changed := self.contents.changed():
            log.warning("%s was changed while it was evaluated: the next run measures again", changed)
            return f"changed-{uuid.uuid4().hex[:8]}"
        return digest


def _name(item: Any) -> Any:
    """Of a sample, its key; anything else is itself."""
    return item.key if isinstance(item, Sample) else item


def _incomplete(record: Mapping[str, Any], run: Path, show: int) -> bool:
    """Whether pictures are wanted that were not drawn, or files that the record speaks of are gone."""
    files = [
        *(record.get("saved") or {}).values(),
        *(picture["file"] for picture in record.get("pictures", []) if show),
    ]
    return bool(show and record.get("show") != show) or any(
        not foreign.locate_file(run, file).is_file() for file in files
    )


def _run(
    settings: Settings,
    evaluation: Any,
    backbone: nn.Module,
    dataset: Dataset,
    device: torch.device,
    store: Results,
    start: str,
    asked: Asked,
    weights: str,
) -> dict[str, Any]:
    """What a record says of the evaluation itself; `start` is what the names of its files begin with."""
    device_memory.reset_peak(device)
    begun, show = time.monotonic(), settings.run.show
    extract: Extract = settings.build("extract", device=device)
    result: Result = evaluation(backbone, dataset, extract=extract, seed=settings.run.seed, show=show)
    seconds, peak = time.monotonic() - begun, device_memory.peak(device) / device_memory.GB
    cost = {"seconds": round(seconds, 2), "peak_memory_gb": round(peak, 3)}
    answered = asked.answered()
    name = f"{start}-{answered}-{weights}"
    record = {
        "asked": answered,
        "protocol": result.protocol,
        "metrics": result.metrics,
        "details": result.details,
        **cost,
    }
    absent = absent_classes(result, dataset.classes)
    if warnings := [*dataset.warnings, *([absent] if absent else [])]:
        record["warnings"] = warnings
    if result.heads:
        files = {head: f"heads/{name}-{head}.safetensors" for head in result.heads}
        record["saved"] = files
        for head, file in files.items() if store.writes else ():
            save(result.heads[head], store.path.parent / file)
    if show:
        record |= {"show": show, "pictures": []}
        if store.writes:
            record["pictures"] = gallery.save(result.pictures, store.path.parent, name)
    return record


def absent_classes(result: Result, classes: Sequence[str]) -> str | None:
    """What to warn of where the ground truth does not hold all classes."""
    details = (detail for detail in result.details.values() if isinstance(detail, Mapping))
    names: list[str] = next((detail["absent"] for detail in details if detail.get("absent")), [])
    left = [name for name in classes if name not in names]
    if len(left) == 1:
        return f"every labelled pixel of val is {left[0]}: the number says nothing of {', '.join(names)}"
    return f"{len(names)} of {len(classes)} classes occur in no mask of val: {', '.join(names)}" if names else None


def show_images(
    settings: Settings,
    store: Results,
    networks: Mapping[str, nn.Module],
    dataset: Dataset,
    samples: Sequence[Sample],
    device: torch.device,
    step: int,
) -> None:
    """Keep `show` of these images and their features for the report, which needs no labels for that."""
    some = [s for s in shown(sorted(samples, key=lambda s: s.key), settings.run.show) if not reason(s)]
    if not some:
        log.warning("show=%d: none of the images chosen to be shown can be read, so none is", settings.run.show)
        return
    extract = settings.build("extract", device=device)
    for name, network in networks.items():
        backbone: Any = getattr(network, "backbone", network)  # of a segmenter
        size = input_size(None, 448, backbone.patch, dataset)
        features = torch.from_numpy(np.array(extract(backbone, dataset, some, size, what="what is shown")))
        if store.writes:
            gallery.save_features(features, some, store.path.parent, f"{name}-{step}", weights_hash(network))
    if store.writes:
        gallery.save_images(dataset, some, store.path.parent)


def save(head: Trained, path: Path) -> None:
    """Write what an evaluation trained, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    with atomic_files.whole(path) as file:
        file.write(safetensors.torch.save(dict(head.tensors), dict(head.about)))
    log.info("trained head  %s", path)
