"""task=train: post-train a backbone, evaluating it before, while and after."""

import contextlib
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from neco.augment.views import Views, show
from neco.config.discovery import nearest
from neco.config.schema import Train
from neco.config.validate import Settings, call
from neco.dataset.base import Dataset, Sample
from neco.distributed import device_memory
from neco.distributed.devices import choose_device, device_name
from neco.eval.runner import check_evaluations
from neco.model import weights
from neco.model.backbone import Backbone
from neco.runs.folder import locked
from neco.runs.provenance import outline, source_of_weights
from neco.runs.results import Objective
from neco.training import compiled, data, memory, optim, strategies, trainable
from neco.training.callbacks import Plan
from neco.training.module import PostTraining
from neco.training.references import check_queue
from neco.training.run import Run, announce, bf16, check_resume, few, images, millions
from neco.training.strategies import check_devices
from neco.training.unreadable import BadImages, Limits, look
from neco.utils.commands import format_command, key_of, override, select
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)


@dataclass
class Job:
    """What `prepare` found out."""

    dataset: Dataset
    samples: list[Sample]
    shares: list[tuple[int, int]]
    limits: Limits
    views: Views
    network: Backbone  # on the meta device
    plan: Plan
    val: Dataset | None
    val_name: str
    chosen: str
    device: torch.device
    compiled: bool


def prepare(settings: Settings) -> Job:
    """Cross-check the configuration, list the files and look at a few; builds no network.

    Raises NecoError for whatever would fail later.
    """
    options: Train = settings.spine["train"]
    device = choose_device(settings.run.device)
    check_devices(options, device)
    compiles = compiled.wanted(options, device)
    network = outline(settings.config.get("model"))
    source, which = source_of_weights(settings)
    weights.check(network, source, which, trust_pickle=settings.run.trust_pickle)
    views = call(settings.build("augment").resolve, "augment", patch=network.patch, size=network.size)
    trainable.restrict(network, options)
    with torch.device("meta"):
        settings.build("head", dim=network.dim)
    loss = settings.build("loss")
    call(loss.check, "loss", device=device)
    check_resume(options)
    dataset = settings.build("dataset")
    samples = call(dataset.samples, "dataset", split="train")
    if not samples:
        raise NecoError(f"dataset: the train split of {settings.choices['dataset']} is empty")
    shares, limits = dataset.shares(samples), dataset.bad_limits(samples)
    look(samples, limits)
    if options.batch_size == "auto":
        options = _fit(settings, views, device)
    plan = Plan(sum(seen for _, seen in shares), options)
    if loss.references == "queue":
        check_queue(loss.queue_size, options.images // options.accumulate, loss.reference_count)
    if loss.references == "batch_other" and options.micro_batch * options.processes == 1:
        raise NecoError("loss.references=batch_other: a batch of one image has no other; raise train.batch_size")
    chosen, val, val_name = "none", dataset, settings.choices["dataset"]
    if settings.config.get("val_dataset"):
        val, val_name = settings.build("val_dataset"), settings.choices["dataset@val_dataset"]
    if settings.config["eval"] and not val.classes:
        if settings.config.get("val_dataset"):
            raise NecoError(f"dataset@val_dataset={val_name} has no labels, so nothing can be evaluated on it")
        log.info("no evaluations: %s has no labels; name a labelled set with dataset@val_dataset=NAME", val_name)
        val = None
    elif settings.config["eval"]:
        chosen = check_evaluations(settings, val, network)
    else:
        val = None
    if options.monitor:
        evaluated = settings.build_all("eval") if val else {}
        networks = ["student", "teacher"] if options.teacher == "ema" else ["student"]
        found = [f"{e}/{n}/{m}" for e in evaluated for n in networks for m in evaluated[e].names(val)]
        if options.monitor not in found:
            near = nearest(options.monitor, found) or "; nothing is evaluated here"
            raise NecoError(f"train.monitor={options.monitor}: no such EVALUATION/NETWORK/METRIC{near}")
    return Job(dataset, samples, shares, limits, views, network, plan, val, val_name, chosen, device, compiles)


def _fit(settings: Settings, views: Views, device: torch.device) -> Train:
    """The options with the largest batch that fits in place of `auto`; the configuration then says so, too."""
    options: Train = settings.spine["train"]
    with torch.device("meta"):
        module = _module(settings, settings.build("model"), options, views, 1)
    fits = memory.largest_batch(module, _trained_sizes(views)[-1], bf16(options, device), device)
    if not fits:
        raise NecoError("train.batch_size=auto: not even one image fits; make views smaller, or checkpoint_activations")
    options = dataclasses.replace(options, batch_size=fits * options.accumulate * options.processes)
    log.info("train.batch_size=auto: %d images fit", options.images)
    settings.spine["train"] = options
    settings.config["train"] = {**settings.config["train"], "batch_size": options.images}
    return options


def _module(settings: Settings, backbone: Backbone, options: Train, views: Views, steps: int) -> PostTraining:
    return PostTraining(
        backbone, settings.build("head", dim=backbone.dim), settings.build("loss"),
        options=options, optim=settings.spine["optim"], global_views=views.global_views, steps=steps,
        seed=settings.run.seed, clean=views.teacher == "clean",
    )  # fmt: skip


def _sizes(views: Views) -> list[list[tuple[int, int]]]:
    """Sizes of the views at each scale, the largest last."""
    return [views.scaled(factor).sizes for factor in sorted(views.multi_scale)]


def _trained_sizes(views: Views) -> list[list[tuple[int, int]]]:
    """Sizes of the views that the student sees, at each scale, the largest last."""
    scaled = _sizes(views)
    return scaled if views.global_views > 1 else [sizes[1:] for sizes in scaled]  # see PostTraining.training_step


def main(settings: Settings, job: Job, output: Path) -> Objective | None:
    """Train, or go on with the run found in `output`; returns `train.monitor` at its best or else the last number of
    the first evaluation, of the network that `evaluation_command` evaluates."""
    val = None if job.val is job.dataset else job.val
    lists = {"train": job.dataset, "val_dataset_train": val}
    with locked(output, "train"), Run(settings, output, job.plan, job.device, job.samples, choices=lists) as run:
        return _train(settings, job, run)


def _train(settings: Settings, job: Job, run: Run) -> Objective | None:
    options: Train = settings.spine["train"]
    torch.manual_seed(settings.run.seed)
    backbone = settings.build("model", drop_path=options.drop_path)
    start = run.start(backbone)
    module = _module(settings, backbone, options, job.views, job.plan.steps)
    if job.compiled:
        compiled.compile_step(module, len({size for sizes in _sizes(job.views) for size in sizes}))

    def evaluate(trained: PostTraining, step: int) -> None:
        if job.val or settings.run.show:
            networks = {"student": trained.student.backbone}
            if trained.teacher and options.teacher == "ema":  # else its backbone never moves
                networks["teacher"] = trained.teacher.backbone
            whole = {k: strategies.plain(network, lambda: settings.build("model")) for k, network in networks.items()}
            # Images of evaluations have other sizes, each of which would be compiled
            with torch.compiler.set_stance("force_eager") if job.compiled else contextlib.nullcontext():
                if job.val:
                    run.measure(whole, job.val, job.val_name, step)
                else:
                    run.show(whole, job.dataset, step)

    _announce(settings, job, module, start, run.output)
    views = data.MultiView(job.samples, job.views, settings.run.seed, plain=job.views.batched(job.device))
    step = run.fit(module, views, job.shares, BadImages(run.output, job.samples, job.limits), evaluate)
    best = run.report()
    advice = "to evaluate it again" if job.val else "to evaluate on a labelled set"
    log.info("%s:  %s", advice, evaluation_command(settings, job.val_name if job.val else None, run.output))
    if best is not None or not job.val:
        return best
    result = "teacher" if options.teacher == "ema" else "student"
    final = [r for r in run.store.records if r["step"] == step and r["network"] == result]
    return Objective.of(final[0]) if final else None


def _announce(settings: Settings, job: Job, module: PostTraining, start: str, output: Path) -> None:
    """Say what is going to happen, before it does. `start`: where the weights come from."""
    options: Train = settings.spine["train"]
    plan, network, half = job.plan, job.network, bf16(options, job.device)
    backbone, head = module.student.backbone, module.student.head
    whole = all(p.requires_grad for p in backbone.parameters())
    frozen = "" if whole else f"; frozen: {millions(backbone, False)} of the backbone"
    marks = sorted({0, *plan.marks(options.eval_epochs), plan.steps})
    needed = memory.estimate(module, _trained_sizes(job.views)[-1], options.micro_batch, half, job.device)
    total = device_memory.total(job.device)
    colour = "; coloured on the device" if job.views.batched(job.device) else ""
    clean = "; the teacher sees them clean" if job.views.teacher == "clean" else ""
    announce({
        "data": images(settings.choices["dataset"], job.shares),
        "backbone": f"{settings.choices['model']}: patch {network.patch}, width {network.dim}, {network.depth} blocks",
        "start": start,
        "trained": f"{millions(backbone)} of the backbone ({trainable.describe(backbone)}) + "
        f"{millions(head)} of the head{frozen}",
        "teacher": _describe_teacher(module),
        "views": f"{' or '.join(dict.fromkeys(map(_views, _sizes(job.views))))} pixels{clean}{colour}",
        "steps": f"{plan.steps} of {options.images} images, {plan.epoch(plan.steps):.4g} epochs",
        "evaluation": f"{job.chosen} on {job.val_name} at steps {few(marks)}" if job.val else "none",
        "memory": f"about {needed / device_memory.GB:.2f} GB at the peak, of {total / device_memory.GB:.1f} GB",
        "device": f"{device_name(job.device)}, {'bf16' if half else 'fp32'}{', compiled' if job.compiled else ''}"
        f"{strategies.describe(options)}",
        "writes": str(output),
    })  # fmt: skip
    if needed > total:
        log.warning("likely to run out of memory: lower train.batch_size, raise train.accumulate or make views smaller")


def _describe_teacher(module: PostTraining) -> str:
    """How the teacher follows the student, and how much of it will still be its start after the last step."""
    kind, (first, last) = module.options.teacher, module.momentum
    if kind in ("none", "frozen"):
        return kind
    remains = optim.teacher_start_fraction(module.momentum, module.steps)
    text = f"{kind}, momentum {first:.4g} -> {last:.4g}; after {module.steps} steps {remains:.0%} of it is its start"
    if remains > 0.5:
        log.warning(
            "the teacher will hardly move: %.0f%% of it will be its start. Lower train.momentum (auto: %.4g here) or "
            "use the student: weights=student", 100 * remains, optim.ema_momentum(module.steps)[0],
        )  # fmt: skip
    return text


def _views(sizes: list[tuple[int, int]]) -> str:
    return " + ".join(f"{sizes.count(size)} x {show(size)}" for size in dict.fromkeys(sizes))


def evaluation_command(settings: Settings, val_name: str | None, output: Path) -> str:
    """The command that evaluates the result on the set that it was evaluated on, or on one to choose for None."""
    if val_name is None:
        return format_command(["task=eval", override("checkpoint", output), "dataset=NAME"])
    node = "val_dataset" if settings.config.get("val_dataset") else "dataset"
    same = [o.replace(node, "dataset", 1) for o in select(settings.overrides, node) if key_of(o) != node]
    same += select(settings.overrides, "data_root", "eval")
    result = "teacher" if settings.spine["train"].teacher == "ema" else "student"
    wanted = ["task=eval", f"weights={result}", override("checkpoint", output), f"dataset={val_name}", *same]
    return format_command(wanted)
