"""What tasks share: the device, the run folder's lock, weights, and recording evaluations."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from neco import devices, files, processes
from neco.config import Settings, build, call, examine, name_keys, option, options
from neco.dataset.base import Dataset
from neco.dataset.inspect import check_classes, inspect
from neco.errors import NecoError
from neco.eval.base import size_name
from neco.model import last_checkpoint, trained_model, weights
from neco.model.backbone import Attention, Backbone
from neco.model.weights import Which, locate
from neco.schema import Trainings

log = logging.getLogger(__name__)
APART = ("_target_", "weights", "drop_path")  # keys of a model that make no other network


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises NecoError when a GPU is asked for and none is there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise NecoError("device=cuda: no GPU is available here; use device=auto or device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if (local := processes.number("LOCAL_RANK")) < torch.cuda.device_count():
        torch.cuda.set_device(local)  # else whatever is tried before the processes meet takes memory of the first GPU
    return torch.device("cuda")


def check_devices(options: Trainings, device: torch.device) -> None:
    """Raises NecoError for fewer GPUs than asked for, or other processes than the configuration wants."""
    node = options.node
    wanted = f"{node}.devices={options.devices} x {node}.nodes={options.nodes}"
    if not processes.are_started():
        if options.nodes > 1:
            raise NecoError(f"{node}.nodes={options.nodes}: start one process a device with torchrun or SLURM's srun")
    elif processes.number("WORLD_SIZE") != options.processes:
        one = (
            ""
            if processes.here.started_by != "srun"
            else f", or start one task (--ntasks=1), which starts {node}.devices"
        )
        raise NecoError(f"{processes.describe()}, {wanted} asks for {options.processes}: make them equal{one}")
    elif (local := processes.number("LOCAL_WORLD_SIZE", options.devices)) != options.devices:
        raise NecoError(
            f"{processes.describe()}, {local} of them on this node, {wanted} asks for {options.devices} on each"
        )
    if device.type == "cuda" and options.devices > (there := torch.cuda.device_count()):
        hidden = (
            "; --gpus-per-task and --gpu-bind hide GPUs, --gpus-per-node does not"
            if "SLURM_JOB_ID" in os.environ
            else ""
        )
        raise NecoError(f"{node}.devices={options.devices}: there are {there} GPUs here{hidden}")


def device_name(device: torch.device) -> str:
    """What to call the device in reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def locked(folder: Path, task: str) -> Iterator[None]:
    """Hold the run folder; another command that wants it, or another task than it holds, gets a NecoError.

    Of several processes of one command the first holds it for all.
    """
    if not devices.leader():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    if config.is_file() and f"task: {task}\n" not in (text := config.read_text(errors="replace")):
        held = re.search(r"^task: (\w+)$", text, re.MULTILINE)
        if not held and (folder / "checkpoints").is_dir():
            raise NecoError(f"{config} is damaged: remove it, and the same command goes on with the run")
        what = f"a run of task={held.group(1)}" if held else "a config.yaml of something else"
        raise NecoError(f"run_dir={folder} holds {what}; give task={task} a folder of its own")
    with files.open_for_appending(folder / ".lock") as file:
        if not files.lock(file):
            raise NecoError(f"run_dir={folder}: another process is running there")
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
        if source in options("model") and not Path(source).exists():
            raise NecoError(f"checkpoint={source}: no such file or run; did you mean model={source}?")
        locate(source, "")  # a file: it must be there
    if source is None and run.weights != "auto":
        raise NecoError(f"weights={run.weights}: name the checkpoint that holds it: checkpoint=RUN_FOLDER_OR_FILE")
    return source, run.weights


def model_of(settings: Settings, source: str | None) -> dict[str, Any]:
    """The `model` node: that with which `source` was made, `model.KEY=VALUE` changed in it; or the one that was chosen.

    Raises NecoError for a file that does not say it where nothing was chosen, and for one that does not fit: before
    memory is taken for a network that the file only claims to hold.
    """
    model = _model_of(settings, source)
    weights.check(outline(model), source, settings.run.weights, trust_pickle=settings.run.trust_pickle)
    return model


def _model_of(settings: Settings, source: str | None) -> dict[str, Any]:
    given, known = settings.config["model"], source not in (None, "none")
    named = any(re.match(r"[+~]*(model|experiment|sweep)[=@]", override) for override in settings.overrides)
    if named:
        examine(given, "model")
    chosen = given["_target_"] if named else None
    held = trained_model(source, settings.run.trust_pickle, chosen=chosen) if known else None
    if held and not named:
        for override in settings.overrides:
            if found := re.match(r"[+~]*model\.([\w.]+)", override):
                _copy(given, held, *found[1].split("."))
        call(examine, f"checkpoint={source}", node=held, where="model")
        return held
    if held and (differ := [key for key in {**given, **held} if key not in APART and given.get(key) != held.get(key)]):
        told = ", ".join(f"{key}={given.get(key)} (there {held.get(key)})" for key in differ)
        log.warning("checkpoint=%s was made with another network; used here: %s", source, told)
    if known and not named:
        raise NecoError(f"checkpoint={source} does not say which network it is: add model=NAME (--help lists them)")
    return given


def network_name(settings: Settings, model: Mapping[str, Any]) -> str:
    """What to call the network of a `model` node: the chosen option, or timm's architecture without its tag.

    The tag names weights of timm, which the network need not have: mocov3_vits16 is `vit_small_patch16_224.dino` there.
    """
    architecture, chosen = str(model.get("name", "")).partition(".")[0], settings.choices.get("model")
    if chosen in options("model") and option("model", chosen, settings.config).get("name") == model.get("name"):
        return f"{chosen} ({architecture})" if architecture else f"{chosen}"
    return architecture


def _copy(source: Mapping[str, Any], target: dict[str, Any], key: str, *more: str) -> None:
    """The value at a path of keys."""
    if more:
        target[key] = dict(below) if isinstance(below := target.get(key), Mapping) else {}
        _copy(source.get(key) or {}, target[key], *more)
    else:
        target[key] = source.get(key)


def outline(model: Mapping[str, Any] | None) -> Any:
    """The network of a `model` node on the meta device: all is known of it, nothing allocated."""
    with torch.device("meta"):
        return build(model, "model")


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
