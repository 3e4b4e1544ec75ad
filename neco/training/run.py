"""A training in its run folder: what it goes on from, how it is carried out, which of its states is the best."""

import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Required

import pytorch_lightning as pl
import torch
from torch import nn
from typing_extensions import TypedDict  # what pydantic takes before Python 3.12

from neco import report
from neco.config.schema import Trainings
from neco.config.validate import Settings, walk_values
from neco.dataset.base import Dataset, Sample
from neco.distributed import collectives
from neco.distributed.devices import device_name
from neco.distributed.watchdog import Peers
from neco.distributed.workers import named_workers
from neco.eval.runner import measure, origin, show_images
from neco.logger.trackers import Trackers
from neco.model import sources, weights
from neco.runs import folder, foreign, results, used_data
from neco.runs.provenance import source_of_weights
from neco.training import data, strategies
from neco.training.base import Module
from neco.training.callbacks import Checkpoints, Loop, Plan
from neco.training.unreadable import BadImages
from neco.utils import startup
from neco.utils.commands import format_override
from neco.utils.errors import NecoError
from neco.utils.masking import mask_nested

log = logging.getLogger(__name__)

# What a resumed run may change and still be the same run.
FREE = {
    "run_dir",
    "debug",
    "show",
    "report",
    "trust_pickle",
    "device",
    "data_root",
    "cache_dir",
    "extract",
    "logger",
    "log_seconds",
    "sweep",
    "eval",
    "val_dataset",
    "dataset.root",  # what images and masks hold is compared
    "dataset.masks",
    "dataset.max_bad",
    "dataset.index",
    *("dataset.files", "dataset.train_list", "dataset.val_list"),  # the list of images itself is compared
    "finetune.stride",
    "augment.colour",
}
FREE |= {
    f"{node}.{key}"
    for node in ("train", "finetune")
    for key in (
        "resume", "workers", "eval_epochs", "save_epochs", "save_minutes", "log_steps", "devices", "nodes", "strategy",
        "wait_minutes", "checkpoint_activations", "compile", "deterministic", "monitor", "patience",
    )
}  # fmt: skip
# What decides which parameters and buffers there are: the state of others is of no use.
FIXED = (
    "task", "model.name", "model.size", "model.registers", "model.arch", "head", "augment.global_views",
    "loss._target_", "loss.references", "loss.queue_size", "loss.prototypes", "optim.layer_decay", "train.teacher",
    "train.blocks", "train.embeddings", "train.lora_rank", "train.lora_alpha", "finetune.decoder", "the classes",
)  # fmt: skip


class Run:
    """A run folder, opened by the process that leads. `done` steps of the plan are in it; `resume` is where they are.

    A block: when it is left, trackers are told how the run ended; its report is written if it ended well.

    Args:
        samples: the images to train on, in order.
        classes: what the trained network tells apart, if it does.
        choices: data sets whose choice of images is noted, by the name of that file.

    Raises:
        NecoError: going on would be another run, or there is nothing to go on from.
    """

    def __init__(
        self,
        settings: Settings,
        output: Path,
        plan: Plan,
        device: torch.device,
        samples: Sequence[Sample],
        *,
        classes: Sequence[str] = (),
        choices: Mapping[str, Dataset | None] | None = None,
    ) -> None:
        self.settings, self.output, self.plan, self.device = settings, output, plan, device
        self.options = options = plan.options
        names = "\n".join(sample.key for sample in samples)
        listing = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:12]  # file names are any bytes
        self.source = source_of_weights(settings)
        begun = origin(settings, self.source[0], trained=True)
        said = begun["model"], begun["state"] if options.node == "train" else ""
        self.saved: dict[str, Any] = {
            "config": mask_nested(settings.config),
            "files": listing,
            "classes": list(classes),
        }
        self.saved["origin"] = said
        self.saved["images"] = used_data.sample_contents(
            samples, settings.config["dataset"].get("index"), bool(classes)
        )
        self.checkpoints = Checkpoints(output / "checkpoints")
        self.resume = find(options, self.checkpoints.last, self.saved)
        found = sources.contents(self.resume) if self.resume else {}
        self.done = found.get("global_step", 0)
        if self.done > plan.steps:
            raise NecoError(
                f"{options.node}.steps={plan.steps}: {self.resume} is at step {self.done} already; "
                "give more steps or another run"
            )
        self.leads = collectives.leader()
        if self.leads:
            folder.describe(output, settings.config, settings.overrides, settings.choices, device_name(device))
            folder.note_choice(output, **(choices or {}))
            if train := (choices or {}).get("train"):
                used_data.note(output, "dataset", train, "train", "some")
        self.store = results.Results(output, writes=self.leads)
        self.store.drop_after(self.done)
        own = self.resume and self.resume.resolve().parent == self.checkpoints.folder.resolve()
        rows = found["neco"].get("rows") if own else 0
        self.saved["rows"] = rows
        self.trackers = Trackers(settings, self.store, self.done, rows)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: Any) -> None:
        self.trackers.__exit__(*error)
        if error[0] is None and self.settings.run.report:
            report.of_run(self.output)

    def start(self, backbone: Any) -> str:
        """Load the weights to start from, or say from which checkpoint `fit` will go on."""
        if self.resume:
            return f"step {self.done} of {self.resume}"
        trust = self.settings.run.trust_pickle
        return str(weights.load(backbone, *self.source, trust_pickle=trust))

    def measure(
        self,
        networks: Mapping[str, nn.Module],
        dataset: Dataset,
        name: str,
        step: int,
        evaluations: Mapping[str, Any] | None = None,
    ) -> None:
        """Evaluate the networks as they are after `step`, and record it."""
        about = origin(self.settings, self.source[0])
        if step:
            about = {**about, "state": self.saved["origin"][1], "checkpoint": None}
        measure(
            self.settings, self.trackers, networks, dict.fromkeys(networks, about), dataset, name, self.device,
            step=step, epoch=round(self.plan.epoch(step), 4), evaluations=evaluations,
        )  # fmt: skip

    def show(self, networks: Mapping[str, nn.Module], dataset: Dataset, step: int) -> None:
        """Keep `show` of the images that are trained on, as the networks see them, where nothing is evaluated."""
        with torch.random.fork_rng():
            show_images(self.settings, self.store, networks, dataset, dataset.samples("train"), self.device, step)

    def note(self, row: Mapping[str, float], step: int) -> None:
        """Tell the trackers a step's numbers; checkpoints say how many rows there were."""
        self.trackers.tell("metrics", row, step)
        if self.saved["rows"] is not None:  # in those of before nothing was said
            self.saved["rows"] += 1

    def fit(
        self,
        module: Module,
        items: data.Drawn,
        shares: Sequence[tuple[int, int]],
        bad: BadImages,
        evaluate: Callable[[Any, int], None],
        at_start: bool = True,
    ) -> int:
        """Train to the end unless that is done, and `evaluate(module, step)` on the way and there; the last step."""
        plan, options, device = self.plan, self.options, self.device

        def evaluated(trained: Module, step: int) -> bool:
            evaluate(trained, step)
            return self.enough()

        module.saved = self.saved
        startup.mark("networks")
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # broken metadata of images that can be read
        logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
        peers = Peers(60 * options.wait_minutes)
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=options.devices,
            num_nodes=options.nodes,
            strategy=strategies.strategy(options, device),
            precision="bf16-mixed" if bf16(options, device) else "32-true",
            max_epochs=1,  # one stream over all epochs, see Positions
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=options.clip,
            deterministic=options.deterministic and device.type == "cuda",
            callbacks=[
                bad,
                Loop(plan, self.checkpoints, evaluated, self.note, at_start),
                peers,
            ],
            logger=False,
            plugins=[self.checkpoints, strategies.environment(options)],
            default_root_dir=self.output,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        done = self.done
        if done < plan.steps:
            micro = options.images // options.accumulate  # of all devices
            positions = data.Positions(
                plan.images, micro, plan.steps * options.accumulate, self.settings.run.seed, done * options.accumulate,
                shares,
            )  # fmt: skip
            readers = collectives.readers(options.workers, device, options.devices)
            loader = data.loader(items, positions, readers, device.type == "cuda", 60 * options.wait_minutes)
            with peers, named_workers():
                trainer.fit(module, loader, ckpt_path=self.resume)
            done = trainer.global_step
            if done < plan.steps:
                log.info(
                    "stopped at step %d: %s evaluations without a better %s", done, options.patience, options.monitor
                )
        else:
            log.info("all %d steps are done; another run_dir trains again", done)
            collectives.join()
            module.load_state_dict(sources.contents(self.resume)["state_dict"])  # type: ignore[arg-type]
        module.to(device)
        evaluated(module, done)
        return done

    def enough(self) -> bool:
        """Keep the checkpoint of the best evaluation so far; whether patience with the others is at an end."""
        options = self.options
        if not options.monitor:
            return False
        history = self.store.history(options.monitor)
        best, value = max(history, key=lambda pair: pair[1])
        step, now = history[-1]
        told = options.monitor, results.percent(now), step, results.percent(value), best
        log.info("monitor     %s: %s %% at step %d, best %s %% at step %d", *told)
        if best == step and self.leads:
            if len(history) == 1 and self.checkpoints.set_aside("best.ckpt", f"best_before_{step}.ckpt"):
                log.warning("evaluated by other values or images than before: the best is looked for anew")
            self.checkpoints.keep(self.checkpoints.last, "best.ckpt")
        waited = sum(later > best for later, _ in history)
        return bool(options.patience) and waited >= (options.patience or 0)

    def report(self) -> results.Objective | None:
        """Print the numbers before and after, what was written and which state is the best; that one's number."""
        if self.store.records:
            log.info("\n%s\n", results.table(self.store.records))
        written = sorted(path.name for path in self.output.iterdir() if not path.name.startswith("."))
        log.info("wrote       %s", ", ".join(written))
        log.info("checkpoint  %s", self.checkpoints.last)
        if not (monitor := self.options.monitor):
            return None
        best, value = max(self.store.history(monitor), key=lambda pair: pair[1])
        held = self.checkpoints.last.with_name("best.ckpt")
        kept = held if held.is_file() else "not kept"
        log.info("best        %s, step %d: %s = %s %%", kept, best, monitor, results.percent(value))
        return results.Objective(monitor, value)


def bf16(options: Trainings, device: torch.device) -> bool:
    """Whether products are taken in bfloat16."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return options.precision == "bf16" or (options.precision == "auto" and able)


def announce(lines: Mapping[str, str]) -> None:
    """Say what is going to happen, before it does."""
    for name, text in lines.items():
        log.info("%-11s %s", name, text)


def images(name: str, shares: Sequence[tuple[int, int]]) -> str:
    """The images of a data set and, where they are others, those of an epoch, for people."""
    parts = [f"{count}" + (f" ({seen} an epoch)" if seen != count else "") for count, seen in shares]
    return f"{name}: {' + '.join(parts)} images"


def millions(part: nn.Module, trained: bool = True) -> str:
    """Parameters that train, or that do not, for people."""
    return f"{sum(p.numel() for p in part.parameters() if p.requires_grad == trained) / 1e6:.2f} M"


def few(numbers: Sequence[int]) -> str:
    """The first and last of them, for people."""
    return ", ".join(map(str, numbers if len(numbers) <= 6 else [*numbers[:3], "...", *numbers[-2:]]))


def check_resume(options: Trainings) -> None:
    """Raises NecoError for a checkpoint that is not there."""
    if options.resume not in ("auto", "never") and not Path(options.resume).expanduser().is_file():
        raise NecoError(
            f"{options.node}.resume={options.resume}: no such file; auto goes on with the run found in run_dir"
        )


def find(options: Trainings, last: Path, saved: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, or None. Raises NecoError where going on would be another run."""
    resume, key = options.resume, f"{options.node}.resume"
    others = sorted({*last.parent.glob("epoch_*.ckpt"), *last.parent.glob("best*.ckpt")})
    if resume == "never":
        if found := [last] * last.is_file() or others:
            raise NecoError(f"{key}=never, but {found[0]} exists: choose another run_dir, or {key}=auto")
        return None
    path = last if resume == "auto" else Path(resume).expanduser()
    if not path.exists():
        if not others:
            return None
        path = max(others, key=lambda other: sources.contents(other).get("global_step", 0))
        log.warning("%s is gone: going on from what else is kept, %s", last, path)
    if last.exists() and path.resolve().parent != last.resolve().parent:
        raise NecoError(f"{key}={resume}: {last} is another run's, which would be lost; choose another run_dir")
    try:
        held = sources.contents(path)
        before = held.get("neco")
        if before is not None:
            check_checkpoint(path, held)
    except NecoError as error:
        kept = ", ".join(str(other) for other in others if other != path) or "none"
        raise NecoError(f"{error}. To go on from another: {key}=FILE; kept are: {kept}") from error
    if before is None:
        raise NecoError(
            f"{key}={path} is no checkpoint of a run; to start from its weights: {format_override('checkpoint', path)}"
        )
    changed = differences(mask_nested(before["config"]), saved["config"])
    if before.get("files") != saved["files"]:
        changed.append("the list of training images")
    if before.get("classes", []) != saved["classes"]:
        changed.append("the classes of the data set")
    if other := used_data.other_file(before.get("images", {}), saved["images"]):  # of older versions nothing is known
        changed.append(f"what training images hold ({other})")
    if fixed := [change for change in changed if change.startswith(FIXED) and ": None ->" not in change]:  # None: older
        raise NecoError(
            f"{key}={resume}: {path} holds other parameters: {'; '.join(fixed)}. To start from its weights: "
            f"{format_override('checkpoint', path)} and another run_dir"
        )
    if changed and resume == "auto":
        raise NecoError(
            f"run_dir={last.parent.parent} holds a run with another configuration: {'; '.join(changed)}. "
            f"Choose another run_dir, or go on all the same with {format_override(key, path)}"
        )
    if changed:
        log.info("going on from %s with changes: %s", path, "; ".join(changed))
    elif place := used_data.moved(before.get("images", {}), saved["images"]):
        log.info("%s", place)
    return path


class _Saved(TypedDict, total=False):
    """The run's own part of a checkpoint: `config` in all, the rest not in those of older versions."""

    config: Required[dict[str, Any]]
    rows: int | None
    files: str
    classes: list[str]
    images: used_data.Sampled


class _Checkpoint(TypedDict):
    neco: _Saved
    state_dict: dict[str, Any]
    global_step: int


def check_checkpoint(path: Path, held: Mapping[str, Any]) -> None:
    """Raise NecoError for a checkpoint of a run that does not hold what it must, or weights that are not finite."""
    before, state = held["neco"], held.get("state_dict")
    try:
        foreign.check(held, _Checkpoint)
    except ValueError as error:
        raise NecoError(f"{path} is damaged: {error}") from error
    for _ in walk_values(before, str(path)):
        pass
    tensors = {name: value for name, value in (state or {}).items() if isinstance(value, torch.Tensor)}
    if broken := [name for name, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise NecoError(f"{path} holds weights that are not finite ({', '.join(broken[:3])})")


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
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
