"""task=finetune: train a backbone and a decoder for segmentation, end to end, and evaluate them by sliding windows."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neco.augment.joint import JointCrop
from neco.config.schema import Finetune
from neco.config.validate import Settings, call
from neco.dataset.base import IGNORE, Dataset, Sample
from neco.dataset.inspect import check_classes, inspect
from neco.distributed.devices import choose_device, device_name
from neco.eval.common.sliding import SlidingWindows
from neco.eval.evaluation import labelled, part_of_train
from neco.model.backbone import Backbone
from neco.runs.folder import locked
from neco.runs.provenance import model_of, network_name, outline, source_of_weights
from neco.runs.results import Objective
from neco.training import data, strategies
from neco.training.callbacks import Plan
from neco.training.finetune import FineTuning
from neco.training.run import Run, announce, bf16, check_resume, few, images, millions
from neco.training.strategies import check_devices
from neco.training.unreadable import BadImages, Limits, look
from neco.utils.commands import format_command, key_of, override, select
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
CROP = 512  # published, for patches of 16


@dataclass
class Job:
    """What `prepare` found out."""

    dataset: Dataset
    samples: list[Sample]
    shares: list[tuple[int, int]]
    limits: Limits
    crops: JointCrop
    windows: SlidingWindows
    network: Backbone  # on the meta device
    plan: Plan
    device: torch.device


def prepare(settings: Settings) -> Job:
    """Cross-check the configuration, list the files and look at a few; builds no network.

    Raises NecoError for whatever would fail later.
    """
    options: Finetune = settings.spine["finetune"]
    device = choose_device(settings.run.device)
    check_devices(options, device)
    check_resume(options)
    source, _ = source_of_weights(settings)
    settings.config["model"] = model_of(settings, source)
    network = outline(settings.config["model"])
    if settings.config["eval"]:
        chosen = f"eval=[{','.join(settings.config['eval'])}]"
        raise NecoError(f"{chosen}: task=finetune scores its own segmenter; then: task=eval checkpoint=RUN {chosen}")
    if options.decoder == "linear" and (
        useless := [k for k in ("decoder_layers", "decoder_dropout") if settings.chosen(f"finetune.{k}")]
    ):
        raise NecoError(f"finetune.{useless[0]}: decoder=linear has none; leave it out, or decoder=mask_transformer")
    dataset, name = settings.build("dataset"), settings.choices["dataset"]
    samples = call(dataset.samples, "dataset", split="train")
    if len(dataset.classes) < 2:
        found = f"one class, {dataset.classes[0]}" if dataset.classes else "no labels"
        raise NecoError(
            f"dataset={name} has {found}: choose a labelled set, like shapes, camvid, voc or ade20k; of your own: "
            "dataset=folder with dataset.masks and dataset.classes"
        )
    for split in ("train", "val"):
        call(labelled, "dataset", dataset=dataset, split=split)
    crop = _crop(options, network.patch, dataset)
    side = None if options.side == "image" else options.side or crop
    if side is not None and side < crop:
        raise NecoError(
            f"finetune.side={side}: windows of {crop} pixels do not fit; lower finetune.crop, or side={crop}"
        )
    stride = options.stride or crop
    if stride > crop:
        raise NecoError(f"finetune.stride={stride}: windows of {crop} pixels would leave gaps; take at most {crop}")
    shares, limits = dataset.shares(samples), dataset.bad_limits(samples)
    look(samples, limits, dataset)
    for split in ("train", "val"):
        seen = inspect(dataset, split, looks=8, seconds=2)
        if split == "val":
            for why in seen.bad.values():
                raise NecoError(f"dataset: val: {why}")
        call(check_classes, "dataset", dataset=dataset, split=split, look=seen)
    crops = JointCrop(crop, side=side, scale=options.scale, flip=options.flip, jitter=options.jitter, ignore=IGNORE)
    plan = Plan(sum(seen for _, seen in shares), options)
    how = [options.decoder, f"steps={plan.steps}", f"batch={options.images}", f"lr={settings.spine['optim'].lr:g}"]
    windows = SlidingWindows(crop, side=side, stride=stride, trained="/".join([*how, *part_of_train(dataset)]))
    return Job(dataset, samples, shares, limits, crops, windows, network, plan, device)


def _crop(options: Finetune, patch: int, dataset: Dataset) -> int:
    """Side of crops and windows, in whole patches. Raises NecoError for another number of pixels."""
    if options.crop is None:
        return max(1, min(CROP + patch // 2, dataset.image_size or CROP + patch // 2) // patch) * patch
    if options.crop % patch:
        low = max(1, options.crop // patch) * patch
        near = f"{low} or {low + patch}" if low < options.crop else f"{low}"
        raise NecoError(f"finetune.crop={options.crop} is no multiple of the backbone's patch, {patch}: take {near}")
    return options.crop


def main(settings: Settings, job: Job, output: Path) -> Objective | None:
    """Fine-tune, or go on with the run found in `output`; returns the best mIoU on val."""
    named: dict[str, Any] = {"classes": job.dataset.classes, "choices": {"train": job.dataset}}
    with locked(output, "finetune"), Run(settings, output, job.plan, job.device, job.samples, **named) as run:
        return _finetune(settings, job, run)


def _finetune(settings: Settings, job: Job, run: Run) -> Objective | None:
    options: Finetune = settings.spine["finetune"]
    classes, name, seed, output = job.dataset.classes, settings.choices["dataset"], settings.run.seed, run.output
    torch.manual_seed(seed)
    backbone = settings.build("model", drop_path=options.drop_path)
    start = run.start(backbone)
    module = FineTuning(
        backbone, len(classes), options=options, optim=settings.spine["optim"], steps=job.plan.steps, seed=seed
    )

    def evaluate(trained: FineTuning, step: int) -> None:
        run.measure({"segmenter": trained.segmenter}, job.dataset, name, step, {"segmentation": job.windows})

    plan, network, decoder = job.plan, job.network, module.segmenter.decoder
    called = network_name(settings, settings.config["model"])
    marks = sorted({*plan.marks(options.eval_epochs), plan.steps})
    low, high = options.scale
    side = f"a short side of {job.windows.side} pixels" if job.windows.side else "their own size"
    announce({
        "data": f"{images(name, job.shares)}, {len(classes)} classes",
        "backbone": f"{called}: patch {network.patch}, width {network.dim}, {network.depth} blocks",
        "start": start,
        "trained": f"{millions(backbone)} of the backbone + {millions(decoder)} of the decoder ({options.decoder})",
        "crops": f"{job.crops.crop} pixels of images at {low:g} to {high:g} times {side}",
        "steps": f"{plan.steps} of {options.images} images, {plan.epoch(plan.steps):.4g} epochs",
        "evaluation": f"{job.windows.protocol} on {len(job.dataset.samples('val'))} images at steps {few(marks)}",
        "device": f"{device_name(job.device)}, {'bf16' if bf16(options, job.device) else 'fp32'}"
        f"{strategies.describe(options)}",
        "writes": str(output),
    })  # fmt: skip
    scenes = data.Scenes(job.dataset, job.samples, job.crops, seed)
    bad = BadImages(output, job.samples, job.limits, job.dataset)
    run.fit(module, scenes, job.shares, bad, evaluate, at_start=False)
    best = run.report()
    log.info("to evaluate its backbone alone:  %s", evaluation_command(settings, output))
    return best


def evaluation_command(settings: Settings, output: Path) -> str:
    """The command that evaluates the backbone of the result on the same data set."""
    same = [o for o in select(settings.overrides, "data_root", "dataset") if key_of(o) != "dataset"]
    dataset = override("dataset", settings.choices["dataset"])
    return format_command(["task=eval", override("checkpoint", output), dataset, *same])
