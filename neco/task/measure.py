"""Evaluations of networks, recorded with all that their numbers depend on and where their weights are from."""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from neco import files
from neco.config import Settings, option, options
from neco.dataset.base import Dataset, Sample
from neco.dataset.files import stamp
from neco.eval.base import Result, Trained, input_size
from neco.eval.extract import Extract
from neco.eval.pictures import shown
from neco.logger.base import Trackers
from neco.model import sources
from neco.model.weights import weights_hash
from neco.report import gallery
from neco.results import Results
from neco.training import memory
from neco.values import share

log = logging.getLogger(__name__)
Origin = Mapping[str, Any]  # see `origin`
KEPT = ("root", "masks", "index", "weight", "max_bad")  # keys of a data set that change no number


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
        held = sources.contents(Path(source), settings.run.trust_pickle).get("neco") or {}
        model, state = held.get("origin", ("", ""))
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
    with torch.random.fork_rng():
        for network, backbone in networks.items():
            digest = weights_hash(backbone)
            for name, evaluation in evaluations.items():
                asked = _asked(settings, name, evaluation, backbone, dataset)
                key = {"evaluation": name, "weights": digest, "asked": asked}
                same = [record for record in found if key.items() <= record.items()]  # of another network
                record = same[0] if same else store.find(step=step, network=network, **key)
                if record is None or _incomplete(record, run, show):
                    log.info("evaluating: %s of the %s on %s", name, network, dataset_name)
                    place = {"dataset": dataset_name, "split": "val", "step": step, "epoch": epoch}
                    files = f"{name}-{network}-{step}-{asked}-{digest}"
                    measured = _run(settings, evaluation, backbone, dataset, device, store, files)
                    record = {**key, **place, "seed": settings.run.seed, **measured}
                    numbers = ", ".join(f"{metric} {value:.4f}" for metric, value in record["metrics"].items())
                    log.info("%s of the %s: %s", name, network, numbers)
                elif same:
                    log.info("%s of the %s: the same weights as the %s", name, network, record["network"])
                about = {**origins[network], "fraction": share(_node(settings).get("fraction") or 1.0)}
                if dataset.counts.get("val", 0) != len(dataset.samples("val")):
                    about["state"] = ""  # a part of the images
                spec = getattr(getattr(backbone, "backbone", backbone), "spec", None)  # heads and such, not in the hash
                found.append({**record, **about, "network": network, "spec": spec})
                store.add(found[-1])
                trackers.tell("evaluation", found[-1])
        if show:
            _show(settings, store, networks, dataset, device, step)
    return found


def _node(settings: Settings) -> dict[str, Any]:
    """The data set that is evaluated on, in the configuration."""
    return settings.config["val_dataset" if settings.config.get("val_dataset") else "dataset"]


def _asked(settings: Settings, name: str, evaluation: Any, backbone: Any, dataset: Dataset) -> str:
    """Hash of all that an evaluation's numbers depend on but the weights."""
    node = {key: value for key, value in _node(settings).items() if key not in KEPT}
    plan = evaluation.plan(patch=backbone.patch, dataset=dataset)
    plan = [[*map(_state, part)] if isinstance(part, list) else part for part in plan]
    depends = settings.config["eval"].get(name), node, plan, settings.run.seed, getattr(backbone, "spec", None)
    return hashlib.sha256(repr(depends).encode()).hexdigest()[:12]


def _state(item: Any) -> Any:
    """Of a sample: its key, and of its files what changes when they do, wherever they lie. Anything else is itself."""
    if not isinstance(item, Sample):
        return item
    return item.key, *(stamp(ref)[1:] for ref in (item.image, item.mask) if ref is not None)


def _incomplete(record: Mapping[str, Any], run: Path, show: int) -> bool:
    """Whether pictures are wanted that were not drawn, or files that the record speaks of are gone."""
    files = [
        *(record.get("saved") or {}).values(),
        *(picture["file"] for picture in record.get("pictures", []) if show),
    ]
    return bool(show and record.get("show") != show) or any(not (run / file).is_file() for file in files)


def _run(
    settings: Settings,
    evaluation: Any,
    backbone: nn.Module,
    dataset: Dataset,
    device: torch.device,
    store: Results,
    name: str,
) -> dict[str, Any]:
    """What a record says of the evaluation itself; `name` is that of its files."""
    memory.reset_peak(device)
    start, show = time.monotonic(), settings.run.show
    extract: Extract = settings.build("extract", device=device)
    result: Result = evaluation(backbone, dataset, extract=extract, seed=settings.run.seed, show=show)
    seconds, peak = time.monotonic() - start, memory.peak(device) / memory.GB
    cost = {"seconds": round(seconds, 2), "peak_memory_gb": round(peak, 3)}
    record = {"protocol": result.protocol, "metrics": result.metrics, "details": result.details, **cost}
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


def _show(
    settings: Settings,
    store: Results,
    networks: Mapping[str, nn.Module],
    dataset: Dataset,
    device: torch.device,
    step: int,
) -> None:
    """Keep the images that are shown and their features, for the report."""
    samples: Sequence[Sample] = sorted(dataset.samples("val"), key=lambda sample: sample.key)
    some, extract = shown(samples, settings.run.show), settings.build("extract", device=device)
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
    with files.whole(path) as file:
        file.write(safetensors.torch.save(dict(head.tensors), dict(head.about)))
    log.info("trained head  %s", path)
