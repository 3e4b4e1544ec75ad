"""What tasks share: the device, the run folder's lock, weights, and recording evaluations."""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import nn

from neco import devices, gallery
from neco.config import Settings, build, call
from neco.dataset.base import Dataset, Sample
from neco.dataset.files import stamp
from neco.dataset.inspect import inspect
from neco.errors import NecoError
from neco.eval.base import Result, input_size, size_name
from neco.eval.pictures import shown
from neco.model import last_checkpoint, trained_model
from neco.model.backbone import Attention, Backbone
from neco.model.weights import Which, locate, weights_hash
from neco.results import Results
from neco.schema import Trainings
from neco.training import memory
from neco.values import share

log = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises NecoError when a GPU is asked for and none is there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise NecoError("device=cuda: no GPU is available here; use device=auto or device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_devices(options: Trainings, device: torch.device) -> None:
    """Raises NecoError when there are fewer GPUs than asked for, or torchrun started another number of processes."""
    if device.type == "cuda" and options.devices > (there := torch.cuda.device_count()):
        raise NecoError(f"{options.node}.devices={options.devices}: this machine has {there} GPUs")
    if options.nodes > 1 and not {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"} & os.environ.keys():
        raise NecoError(
            f"{options.node}.nodes={options.nodes}: start one process a device with torchrun or SLURM's srun"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ and devices.launched() != options.processes:
        raise NecoError(
            f"torchrun started {devices.launched()} processes, {options.node}.devices={options.devices} x "
            f"{options.node}.nodes={options.nodes} asks for {options.processes}: make them equal"
        )


def device_name(device: torch.device) -> str:
    """What to call the device in reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def locked(folder: Path, task: str) -> Iterator[None]:
    """Hold the run folder; a second process that wants it, or another task than it holds, gets a NecoError."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    if config.is_file() and f"task: {task}\n" not in (text := config.read_text(errors="replace")):
        held = re.search(r"^task: (\w+)$", text, re.MULTILINE)
        what = f"a run of task={held.group(1)}" if held else "a config.yaml of something else"
        raise NecoError(f"run_dir={folder} holds {what}; give task={task} a folder of its own")
    with (folder / ".lock").open("w") as file:
        try:
            # Not flock: data workers inherit that, and hold it for seconds after their process was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise NecoError(f"run_dir={folder}: another process is running there") from None
        yield


def source_of_weights(settings: Settings) -> tuple[str | None, Which]:
    """`checkpoint` and `weights` of the configuration as what `neco.model.weights.load` takes: (source, which)."""
    run = settings.run
    if run.weights == "none":
        if run.checkpoint:
            raise NecoError(f"weights=none: random weights, yet checkpoint={run.checkpoint}; give one of the two")
        return "none", "auto"
    source = run.checkpoint and last_checkpoint(run.checkpoint)
    if source and not source.startswith(("http://", "https://", "package:")) and not timm.is_model(source):
        locate(source, "")  # a file: it must be there
    if source is None and run.weights != "auto":
        raise NecoError(f"weights={run.weights}: name the checkpoint that holds it: checkpoint=RUN_FOLDER_OR_FILE")
    return source, run.weights


def model_of(settings: Settings, source: str | None) -> dict[str, Any]:
    """The `model` node: that which `source` was made with, where it says so and the command line chooses none."""
    held = None if settings.chosen("model") else trained_model(source, settings.run.trust_pickle)
    return held or settings.config["model"]


def outline(model: Mapping[str, Any] | None) -> Any:
    """The network of a `model` node on the meta device: all is known of it, nothing allocated."""
    with torch.device("meta"):
        return build(model, "model")


def check_evaluations(settings: Settings, dataset: Dataset, network: Backbone) -> str:
    """The selected evaluations with their input sizes, for people; lists the files of the data set and tries a few.

    Raises NecoError for what would end one of them.
    """
    sizes = {}
    for name, evaluation in settings.build_all("eval").items():
        sizes[name] = call(evaluation.plan, f"eval.{name}", patch=network.patch, dataset=dataset)[0]
        if getattr(evaluation, "attends", False):
            call(Attention, f"eval.{name}", backbone=network)
    for split in ("train", "val"):
        if dataset.listed(split):
            for why in inspect(dataset, split, looks=8, seconds=2).bad.values():
                raise NecoError(f"{split} of the data set to evaluate on: {why}")
    return ", ".join(f"{name} ({size_name(size)} pixels)" for name, size in sizes.items())


def measure(
    settings: Settings,
    store: Results,
    networks: Mapping[str, nn.Module],
    dataset: Any,
    dataset_name: str,
    device: torch.device,
    step: int = 0,
    epoch: float = 0.0,
    loggers: Iterable[Any] = (),
    evaluations: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run evaluations (None: the selected ones) on each network, record them with all that the numbers depend on.

    Networks with equal weights are measured once. What is recorded already, at this step, with these weights, images
    and values of all keys, is kept. What an evaluation trains is written to `heads/`, named by the record as `saved`.
    Leaves modes and random state as they were. Returns the records.
    """
    evaluations = settings.build_all("eval") if evaluations is None else evaluations
    node = settings.config["val_dataset" if settings.config.get("val_dataset") else "dataset"]
    node = {key: value for key, value in node.items() if key not in ("root", "masks", "index", "weight", "max_bad")}
    first: Any = next(iter(networks.values()))  # the others differ in their weights alone
    asked = {}
    for name, evaluation in evaluations.items():
        plan = evaluation.plan(patch=first.patch, dataset=dataset)
        plan = [[*map(_state, part)] if isinstance(part, list) else part for part in plan]
        depends = settings.config["eval"].get(name), node, plan, settings.run.seed, getattr(first, "spec", None)
        asked[name] = hashlib.sha256(repr(depends).encode()).hexdigest()[:12]
    show, run = settings.run.show, store.path.parent
    some = shown(sorted(dataset.samples("val"), key=lambda sample: sample.key), show)
    found = []
    done: dict[tuple[str, str], dict[str, Any]] = {}
    with torch.random.fork_rng():
        for network, backbone in networks.items():
            digest = weights_hash(backbone)
            for name, evaluation in evaluations.items():
                key = {"evaluation": name, "weights": digest, "asked": asked[name]}
                record: Any = done.get((digest, name)) or store.find(step=step, network=network, **key)
                if record is None or (show and record.get("show") != show) or _lost(record, run, show):
                    log.info("evaluating: %s of the %s on %s", name, network, dataset_name)
                    result, cost = _run(evaluation, backbone, dataset, settings, device)
                    folder = f"{name}-{network}-{step}-{asked[name]}-{digest}"
                    record = {"protocol": result.protocol, "metrics": result.metrics, "details": result.details, **cost}
                    if result.tensors:
                        record["saved"] = f"heads/{folder}.safetensors"
                        if store.writes:
                            save(result, store.path.with_name("heads") / Path(record["saved"]).name)
                    if show:
                        record["show"] = show
                        record["pictures"] = gallery.save(result.pictures, run, folder) if store.writes else []
                    place = {"dataset": dataset_name, "split": "val", "step": step, "epoch": epoch}
                    record = {**key, **place, **_origin(settings, node), **record}
                    numbers = ", ".join(f"{metric} {value:.4f}" for metric, value in record["metrics"].items())
                    log.info("%s of the %s: %s", name, network, numbers)
                done[digest, name] = record
                found.append({**record, "network": network})
                store.add(found[-1])
                for logger in loggers:
                    metrics = {f"eval/{name}/{network}/{key}": value for key, value in record["metrics"].items()}
                    logger.log_metrics(metrics, step)
            if show:
                extract, size = settings.build("extract", device=device), input_size(None, 448, first.patch, dataset)
                own: Any = getattr(backbone, "backbone", backbone)  # of a segmenter
                features = torch.from_numpy(np.array(extract(own, dataset, some, size, what="what is shown")))
                if store.writes:
                    gallery.save_features(features, some, run, f"{network}-{step}", digest)
    if show and store.writes:
        log.info("pictures    %s", gallery.write(run, store.records, dataset, some))
    return found


def _lost(record: Mapping[str, Any], run: Path, show: int) -> bool:
    """Whether files that a record speaks of are gone."""
    files = [record.get("saved"), *(picture["file"] for picture in record.get("pictures", []) if show)]
    return any(file and not (run / file).is_file() for file in files)


def _origin(settings: Settings, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of where its numbers are from, beside what they depend on."""
    model, checkpoint = settings.choices.get("model"), settings.run.checkpoint
    fraction = share(dataset.get("fraction") or 1.0)
    return {"seed": settings.run.seed, "model": model, "checkpoint": checkpoint, "fraction": fraction}


def _state(item: Any) -> Any:
    """Of a sample: its key, and of its files what changes when they do, wherever they lie. Anything else is itself."""
    if not isinstance(item, Sample):
        return item
    return item.key, *(stamp(ref)[1:] for ref in (item.image, item.mask) if ref is not None)


def _run(
    evaluation: Any, backbone: nn.Module, dataset: Any, settings: Settings, device: torch.device
) -> tuple[Result, dict[str, float]]:
    memory.reset_peak(device)
    start = time.monotonic()
    how = {"extract": settings.build("extract", device=device), "seed": settings.run.seed, "show": settings.run.show}
    result = evaluation(backbone, dataset, **how)
    seconds, peak = time.monotonic() - start, memory.peak(device) / memory.GB
    return result, {"seconds": round(seconds, 2), "peak_memory_gb": round(peak, 3)}


def save(result: Result, path: Path) -> None:
    """Write what an evaluation trained, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    safetensors.torch.save_file(dict(result.tensors), temporary, dict(result.about))
    temporary.replace(path)
    log.info("trained head  %s", path)
