"""task=train: post-train a backbone, evaluating it before, while and after."""

import dataclasses
import hashlib
import logging
import re
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from neco import devices, results
from neco.augment.views import Views, show
from neco.config import Settings, Train, call, nearest
from neco.dataset.base import Dataset, Sample
from neco.errors import NecoError
from neco.model import weights
from neco.model.backbone import Backbone
from neco.task.common import (
    check_devices,
    check_evaluations,
    choose_device,
    device_name,
    locked,
    measure,
    outline,
    source_of_weights,
)
from neco.training import data, memory, strategies, trainable
from neco.training.bad import BadImages, Limits, look
from neco.training.loop import Checkpoints, Loop, Plan
from neco.training.module import PostTraining
from neco.training.references import check_queue

log = logging.getLogger(__name__)

# What a resumed run may change and still be the same run.
FREE = {
    "run_dir",
    "debug",
    "device",
    "data_root",
    "cache_dir",
    "extract",
    "logger",
    "eval",
    "val_dataset",
    "dataset.root",
    "dataset.max_bad",
    "dataset.index",
    "dataset.files",  # the list of images itself is compared
}
FREE |= {f"train.{key}" for key in ("resume", "workers", "eval_epochs", "save_epochs", "save_minutes", "log_steps")}
FREE |= {f"train.{key}" for key in ("devices", "nodes", "strategy", "checkpoint_activations", "monitor", "patience")}
# What decides which parameters and buffers there are: the state of others is of no use.
FIXED = (
    "model.name", "model.size", "model.registers", "model.arch", "head", "augment.global_views", "loss.references",
    "loss.queue_size", "optim.layer_decay", "train.teacher", "train.blocks", "train.embeddings", "train.lora_rank",
    "train.lora_alpha",
)  # fmt: skip


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


def prepare(settings: Settings) -> Job:
    """Cross-check the configuration, list the files and look at a few; builds no network.

    Raises NecoError for whatever would fail later.
    """
    options: Train = settings.spine["train"]
    device = choose_device(settings.run.device)
    check_devices(options, device)
    network = outline(settings.config.get("model"))
    views = call(settings.build("augment").resolve, "augment", patch=network.patch, size=network.size)
    trainable.restrict(network, options)
    settings.build("head", dim=network.dim)
    loss = settings.build("loss")
    source_of_weights(settings)
    if options.resume not in ("auto", "never") and not Path(options.resume).expanduser().is_file():
        raise NecoError(f"train.resume={options.resume}: no such file; auto goes on with the run found in run_dir")
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
    return Job(dataset, samples, shares, limits, views, network, plan, val, val_name, chosen, device)


def _fit(settings: Settings, views: Views, device: torch.device) -> Train:
    """The options with the largest batch that fits in place of `auto`; the configuration then says so, too."""
    options: Train = settings.spine["train"]
    with torch.device("meta"):
        module = _module(settings, settings.build("model"), options, views, 1)
    fits = memory.largest_batch(module, _trained_sizes(views)[-1], _bf16(options, device), device)
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
        seed=settings.run.seed,
    )  # fmt: skip


def _bf16(options: Train, device: torch.device) -> bool:
    return options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")


def _trained_sizes(views: Views) -> list[list[tuple[int, int]]]:
    """Sizes of the views that the student sees, at each scale, the largest last."""
    scaled = [views.scaled(factor).sizes for factor in sorted(views.multi_scale)]
    return scaled if views.global_views > 1 else [sizes[1:] for sizes in scaled]  # see PostTraining.training_step


def main(settings: Settings, job: Job, output: Path) -> float | None:
    """Train, or go on with the run found in `output`; returns the last number of the first evaluation's teacher."""
    if not devices.leader():
        return _train(settings, job, output)
    with locked(output, "train"):
        return _train(settings, job, output)


def _train(settings: Settings, job: Job, output: Path) -> float | None:
    options: Train = settings.spine["train"]
    plan, device = job.plan, job.device
    names = "\n".join(sample.key for sample in job.samples)
    listing = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:12]  # file names are any bytes
    saved = {"config": settings.config, "files": listing}
    checkpoints = Checkpoints(output / "checkpoints")
    resume = _find(options.resume, checkpoints.last, saved)
    done = weights.contents(resume)["global_step"] if resume else 0
    if done > plan.steps:
        raise NecoError(f"train.steps={plan.steps}: {resume} is at step {done} already; give more steps or another run")
    leads = devices.leader()
    if leads:
        results.describe(output, settings.config, settings.overrides, device_name(device))
        results.note_choice(output, train=job.dataset, val_dataset_train=None if job.val is job.dataset else job.val)
    store = results.Results(output, writes=leads)
    store.drop_after(done)

    torch.manual_seed(settings.run.seed)
    backbone = settings.build("model", drop_path=options.drop_path)
    if resume:
        start = f"step {done} of {resume}"
    else:
        trust = settings.run.trust_pickle
        start = str(weights.load(backbone, *source_of_weights(settings), trust_pickle=trust))
    module = _module(settings, backbone, options, job.views, plan.steps)
    module.saved = saved
    loggers = settings.build_all("logger", folder=output, step=done) if leads else {}
    for logger in loggers.values():
        logger.log_hyperparams(settings.config)

    def evaluate(trained: PostTraining, step: int) -> bool:
        if job.val:
            networks = {"student": trained.student.backbone}
            if trained.teacher and options.teacher == "ema":  # else its backbone never moves
                networks["teacher"] = trained.teacher.backbone
            whole = {k: strategies.plain(network, lambda: settings.build("model")) for k, network in networks.items()}
            epoch = round(plan.epoch(step), 4)
            measure(settings, store, whole, job.val, job.val_name, device, step, epoch, loggers.values())
        if not options.monitor:
            return False
        history = store.history(options.monitor)
        best, value = max(history, key=lambda pair: pair[1])
        now = history[-1][1]
        log.info("monitor     %s: %.4f at step %d, best %.4f at step %d", options.monitor, now, step, value, best)
        if best == step and leads:
            if len(history) == 1 and step:
                log.warning("evaluated by other values or images than before: the best is looked for anew")
                checkpoints.set_aside("best.ckpt", f"best_before_{step}.ckpt")
            checkpoints.keep(checkpoints.last, "best.ckpt")
        waited = sum(later > best for later, _ in history)
        return bool(options.patience) and waited >= (options.patience or 0)

    bf16 = _bf16(options, device)
    _announce(settings, job, module, start, output, bf16)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # broken metadata of images that can be read
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=options.devices,
        num_nodes=options.nodes,
        strategy=strategies.strategy(options, device),
        precision="bf16-mixed" if bf16 else "32-true",
        max_epochs=1,  # one stream over all epochs, see Positions
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip,
        callbacks=[
            BadImages(output, job.samples, job.limits),
            Loop(plan, checkpoints, evaluate),
        ],
        logger=list(loggers.values()),
        default_root_dir=output,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if done < plan.steps:
        views = data.MultiView(job.samples, job.views, settings.run.seed)
        micro = options.images // options.accumulate  # of all devices
        positions = data.Positions(
            plan.images, micro, plan.steps * options.accumulate, settings.run.seed, done * options.accumulate,
            job.shares,
        )  # fmt: skip
        loader = data.loader(views, positions, options.workers, pin=device.type == "cuda")
        trainer.fit(module, loader, ckpt_path=resume)
        done = trainer.global_step
        if done < plan.steps:
            log.info("stopped at step %d: %s evaluations without a better %s", done, options.patience, options.monitor)
    else:
        log.info("all %d steps are done", done)
        devices.join()
        module.load_state_dict(weights.contents(resume)["state_dict"])  # type: ignore[arg-type]
        done = plan.steps
    module.to(device)
    evaluate(module, done)
    for logger in loggers.values():
        logger.finalize("success")
    return _conclude(settings, job, store, output, done)


def _find(resume: str, last: Path, saved: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, or None. Raises NecoError where going on would be another run."""
    if resume == "never":
        if last.is_file():
            raise NecoError(f"train.resume=never, but {last} exists: choose another run_dir, or train.resume=auto")
        return None
    path = last if resume == "auto" else Path(resume).expanduser()
    if not path.exists():
        return None
    if last.exists() and path.resolve().parent != last.resolve().parent:
        raise NecoError(f"train.resume={resume}: {last} is another run's, which would be lost; choose another run_dir")
    try:
        before = weights.contents(path).get("neco")
    except NecoError as error:
        others = sorted({*path.parent.glob("epoch_*.ckpt"), *path.parent.glob("best*.ckpt")})
        kept = ", ".join(map(str, others)) or "none"
        raise NecoError(f"{error}. To go on from another: train.resume=FILE; kept are: {kept}") from error
    if before is None:
        raise NecoError(f"train.resume={path} is no checkpoint of a run; to start from its weights: checkpoint={path}")
    changed = _differences(before["config"], saved["config"])
    if before["files"] != saved["files"]:
        changed.append("the list of training images")
    if fixed := [change for change in changed if change.startswith(FIXED) and ": None ->" not in change]:  # None: older
        raise NecoError(
            f"train.resume={resume}: {path} holds other parameters: {'; '.join(fixed)}. To start from its weights: "
            f"checkpoint={path} and another run_dir"
        )
    if changed and resume == "auto":
        raise NecoError(
            f"run_dir={last.parent.parent} holds a run with another configuration: {'; '.join(changed)}. "
            f"Choose another run_dir, or go on all the same with train.resume={path}"
        )
    if changed:
        log.info("going on from %s with changes: %s", path, "; ".join(changed))
    return path


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key: old -> new` for what makes it another run."""

    def free(key: str) -> bool:
        return re.sub(r"(?<=^dataset)(\.parts\.[^.]+)+", "", key) in FREE

    def flat(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        pairs = ((key if not prefix else f"{prefix}.{key}", value) for key, value in node.items())
        return {k: v for key, value in pairs if not free(key) for k, v in flat(value, key).items()}

    old, new = flat(before), flat(now)
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]


def _announce(settings: Settings, job: Job, module: PostTraining, start: str, output: Path, bf16: bool) -> None:
    """Say what is going to happen, before it does. `start`: where the weights come from."""
    plan, network, options = job.plan, job.network, job.plan.options
    sizes = [job.views.scaled(factor).sizes for factor in sorted(job.views.multi_scale)]

    def millions(part: torch.nn.Module, trained: bool) -> str:
        return f"{sum(p.numel() for p in part.parameters() if p.requires_grad == trained) / 1e6:.2f} M"

    backbone, head = module.student.backbone, module.student.head
    whole = all(p.requires_grad for p in backbone.parameters())
    frozen = "" if whole else f"; frozen: {millions(backbone, False)} of the backbone"
    marks = sorted({0, *plan.marks(options.eval_epochs), plan.steps})
    needed = memory.estimate(module, _trained_sizes(job.views)[-1], options.micro_batch, bf16, job.device)
    total = memory.total(job.device)
    clean = "; the teacher sees them clean" if job.views.teacher == "clean" else ""
    parts = [f"{images}" + (f" ({seen} an epoch)" if seen != images else "") for images, seen in job.shares]
    lines = {
        "data": f"{settings.choices['dataset']}: {' + '.join(parts)} images",
        "backbone": f"{settings.choices['model']}: patch {network.patch}, width {network.dim}, {network.depth} blocks",
        "start": start,
        "trained": f"{millions(backbone, True)} of the backbone ({trainable.describe(backbone)}) + "
        f"{millions(head, True)} of the head{frozen}; teacher: {options.teacher}",
        "views": f"{' or '.join(dict.fromkeys(map(_views, sizes)))} pixels{clean}",
        "steps": f"{plan.steps} of {options.images} images, {plan.epoch(plan.steps):.4g} epochs",
        "evaluation": f"{job.chosen} on {job.val_name} at steps {_few(marks)}" if job.val else "none",
        "memory": f"about {needed / memory.GB:.2f} GB at the peak, of {total / memory.GB:.1f} GB",
        "device": f"{device_name(job.device)}, {'bf16' if bf16 else 'fp32'}{strategies.describe(options)}",
        "writes": str(output),
    }
    for name, text in lines.items():
        log.info("%-11s %s", name, text)
    if needed > total:
        log.warning("likely to run out of memory: lower train.batch_size, raise train.accumulate or make views smaller")


def _views(sizes: list[tuple[int, int]]) -> str:
    return " + ".join(f"{sizes.count(size)} x {show(size)}" for size in dict.fromkeys(sizes))


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers if len(numbers) <= 6 else [*numbers[:3], "...", *numbers[-2:]]))


def _conclude(settings: Settings, job: Job, store: results.Results, output: Path, step: int) -> float | None:
    """Print the before/after table, what was written and what to do next; return the objective of a sweep."""
    last = output / "checkpoints" / "last.ckpt"
    if job.val:
        log.info("\n%s\n", results.table(store.records))
    log.info("wrote       %s", ", ".join(sorted(p.name for p in output.iterdir() if not p.name.startswith("."))))
    log.info("checkpoint  %s", last)
    if not job.val:
        log.info("to evaluate on a labelled set:  python -m neco task=eval checkpoint=%s dataset=NAME", output)
        return None
    node = "val_dataset." if settings.config.get("val_dataset") else "dataset."
    same = ["dataset." + o.removeprefix(node) for o in settings.overrides if o.startswith(node)]
    same += [o for o in settings.overrides if o.startswith(("eval=", "eval."))]
    result = "teacher" if job.plan.options.teacher == "ema" else "student"
    wanted = ["task=eval", f"weights={result}", f"checkpoint={output}", f"dataset={job.val_name}", *same]
    log.info("to evaluate by the full protocol:  python -m neco %s", shlex.join(wanted))
    if monitor := job.plan.options.monitor:
        best, value = max(store.history(monitor), key=lambda pair: pair[1])
        held = last.with_name("best.ckpt")
        log.info("best        %s, step %d: %s = %.4f", held if held.is_file() else "not kept", best, monitor, value)
        return value
    final = [r for r in store.records if r["step"] == step and r["network"] == result]
    return next(iter(final[0]["metrics"].values())) if final else None
