"""Numbers that break others: NaN and infinity wherever they can come up, images and masks without any content.

A training stops with one message that says at which step what was not finite, and the last checkpoint is good: it is
finite, and the run goes on from it. Everything else comes to finite numbers or is refused with a message.
"""

import contextlib
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from conftest import FEW, SMALL, losses, perform
from PIL import Image
from torch import Tensor

from neco.config import discovery, validate
from neco.dataset.base import read_image
from neco.model import sources
from neco.model.backbone import Backbone
from neco.task import eval as evaluating
from neco.task import finetune, train
from neco.training import finetune as segmenting
from neco.training.base import Module
from neco.training.module import PostTraining
from neco.utils.errors import NecoError
from soak import Outcome, trial
from soak.configs import _eval

STEPS = 6
TASKS: dict[str, tuple[Any, tuple[str, ...], type[Module]]] = {
    "train": (train, (*SMALL, f"train.steps={STEPS}"), PostTraining),
    "finetune": (finetune, (*FEW, f"finetune.steps={STEPS}"), segmenting.FineTuning),
}


@contextlib.contextmanager
def breaking(kind: type[Module], where: str, step: int, value: float, name: str) -> Iterator[None]:
    """In a run, something is not finite at `step`: the loss, the gradient of a parameter, or a weight after it."""
    account, update = kind.account, kind.optimizer_step

    def accounted(self: Any, loss: Tensor, *rest: Any) -> Tensor:
        here = self.global_step + 1 == step
        if here and where == "gradient":
            parameter = dict(self.named_parameters())[name]
            handle = parameter.register_hook(lambda grad: (handle.remove(), grad * value)[1])
        return account(self, loss * value if here and where == "loss" else loss, *rest)

    def updated(self: Any, *arguments: Any, **keywords: Any) -> None:
        here = self.global_step + 1 == step
        update(self, *arguments, **keywords)
        if here and where == "weight":
            with torch.no_grad():
                dict(self.named_parameters())[name].view(-1)[0] = value

    with mock.patch.object(kind, "account", accounted), mock.patch.object(kind, "optimizer_step", updated):
        yield


@trial(small=3, full=120)
def trainings(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """NaN or infinity in loss, gradient or a weight at a random step of a run that logs and saves at random steps."""
    for number in range(count):
        node = rng.choice(list(TASKS))
        task, command, kind = TASKS[node]
        where, value = rng.choice(("loss", "gradient", "weight")), rng.choice((math.nan, math.inf, -math.inf))
        step = rng.randint(1, STEPS)
        often = rng.choice(("1e-9", "15"))
        options = (*command, f"{node}.log_steps={rng.randint(1, 4)}", f"{node}.save_minutes={often}",
                   f"{node}.clip={rng.choice(('null', '1'))}", "eval=[]" if node == "train" else "seed=1")  # fmt: skip
        part = {"train": "student.backbone", "finetune": "segmenter.backbone"}[node]
        name = f"{part}.net.{rng.choice(('norm.weight', 'blocks.0.attn.qkv.weight', 'patch_embed.proj.bias'))}"
        output, last = folder / f"run{number}", folder / f"run{number}/checkpoints/last.ckpt"
        with breaking(kind, where, step, value, name):
            try:
                perform(task, output, folder / "cache", *options)
                raise AssertionError(f"{value} in {where} at step {step} of {options} went unnoticed")
            except NecoError as error:
                said = str(error)
        seen = step + 1 if where == "weight" and f"step {step}" not in said else step
        assert f"step {seen};" in said and (where in said or seen == step + 1), f"{where} at step {step}: {said}"
        if last.is_file():
            held = sources.contents(last)
            assert held["global_step"] < step, "saved after the fault"
            assert all(v.isfinite().all() for v in held["state_dict"].values()), "a checkpoint that is not finite"
            assert str(last) in said, said
        perform(task, output, folder / "cache", *options)
        assert sources.contents(last)["global_step"] == STEPS and np.isfinite(losses(output)).all()
        yield Outcome(
            f"task={node}: {where} not finite", "stops and names step and quantity; the last checkpoint is good"
        )


def photo(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def plain(value: int, side: int = 40) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def noise(rng: random.Random, side: int = 40) -> np.ndarray:
    return np.random.default_rng(rng.randrange(1 << 32)).integers(0, 256, (side, side, 3), dtype=np.uint8)


IMAGES: dict[str, Callable[[random.Random, int], np.ndarray]] = {
    "black images": lambda rng, number: plain(0),
    "white images": lambda rng, number: plain(255),
    "images of one grey each": lambda rng, number: plain(40 * number % 256),
    "the same image": lambda rng, number: noise(random.Random(0)),
    "images of one pixel": lambda rng, number: plain(9, 1),
    "images of 3 x 400 pixels": lambda rng, number: np.tile(noise(rng, 3), (1, 134, 1)),
}


@trial(small=4, full=150)
def poor_images(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """Post-training on images without content, of one image, of fewer images than a batch."""
    names = discovery.options("loss")
    for number in range(count):
        what = rng.choice(list(IMAGES))
        images, batch = rng.choice((1, 2, 3, 6)), rng.choice((1, 2, 4))
        root = folder / f"images{number}"
        for place in range(images):
            photo(root / f"{place}.png", IMAGES[what](rng, place))
        loss, reference = rng.choice(names), rng.choice(("batch", "batch_any", "batch_other", "queue"))
        options = [key for key in SMALL if not key.startswith("dataset.")]
        options += [
            "dataset=folder",
            f"dataset.root={root}",
            f"train.batch_size={batch}",
            f"loss={loss}",
            "loss.grid=3",
        ]
        if "references" in validate.load(f"loss={loss}").config["loss"]:
            options += [f"loss.references={reference}", "loss.queue_size=64"]
            options += [f"loss.mask={rng.choice(('all', 'fg', 'bg'))}"] if loss == "neco" else []
        try:
            output = perform(train, folder / f"run{number}", folder / "cache", *options, "train.steps=3")
        except NecoError as error:
            assert any(word in str(error) for word in ("batch", "queue", "loss.")), f"{options}: {error}"
            yield Outcome(what, "refused with a reason")
            continue
        held = sources.contents(output / "checkpoints/last.ckpt")["state_dict"]
        assert np.isfinite(losses(output)).all() and all(v.isfinite().all() for v in held.values()), options
        yield Outcome(what, "finite loss and weights")


MASKS: dict[str, Callable[[random.Random, int, int], int | np.ndarray]] = {
    "all to ignore": lambda rng, number, side: 255,
    "one class only": lambda rng, number, side: 1,
    "only background": lambda rng, number, side: 0,
    "a class that train lacks": lambda rng, number, side: 2 * (number >= 4),
    "one labelled pixel": lambda rng, number, side: np.pad([[1]], (0, side - 1), constant_values=255),
    "some to ignore as a whole": lambda rng, number, side: 255 * (number % 2),
    "sound": lambda rng, number, side: noise(rng, side)[..., 0] % 3,
}
EVALUATIONS = ("retrieval", "overcluster", "linear", "unsupervised", "attention")
BACKBONES = ("random", "zero", "NaN")
SIZES = ("eval.{}.k=1", "eval.{}.k=100000", "")


@trial(small=4, full=300)
def poor_masks(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """Evaluations and fine-tuning on masks that say nothing, by networks that say nothing; k beyond the patches."""
    torch.manual_seed(0)
    net: Backbone = validate.load("task=eval").build("model")
    state = net.net.state_dict()
    for name, value in (("zero", 0.0), ("NaN", math.nan)):
        torch.save({key: torch.full_like(v, value) for key, v in state.items()}, folder / f"{name}.pth")
    for number in range(count):
        what, pictures = rng.choice(list(MASKS)), rng.choice(("images of one grey each", "noise"))
        root, side = folder / f"data{number}", 40
        for place in range(8):
            part = f"{'train' if place < 4 else 'val'}/{place}.png"
            photo(root / "images" / part, noise(rng) if pictures == "noise" else IMAGES[pictures](rng, place))
            photo(root / "masks" / part, np.broadcast_to(MASKS[what](rng, place, side), (side, side)).astype(np.uint8))
        dataset = ("dataset=folder", f"dataset.root={root}/images", f"dataset.masks={root}/masks",
                   "dataset.classes=[background,a,b]", "extract.workers=0")  # fmt: skip
        output, network = folder / f"run{number}", rng.choice(BACKBONES)
        if rng.random() < 0.25:
            options = [key for key in FEW if not key.startswith("dataset.")]
            try:
                perform(finetune, output, folder / "cache", *options, *dataset, "finetune.steps=3")
                assert np.isfinite(losses(output)).all(), what
                result = "finite loss and numbers"
            except NecoError as error:
                result = "refused with a reason"
                assert "label" in str(error) or "class" in str(error) or "mask" in str(error), str(error)
            yield Outcome(f"fine-tuning, masks: {what}", result)
            continue
        evaluation = rng.choice(EVALUATIONS)
        k = rng.choice(SIZES).format(evaluation) if evaluation not in ("linear", "attention") else ""
        source = "weights=none" if network == "random" else f"checkpoint={folder}/{network}.pth"
        options = ["task=eval", *dataset, *_eval(evaluation), *([k] if k else []), "model=tiny", source]
        try:
            perform(evaluating, output, folder / "cache", *options)
        except NecoError as error:
            assert (len(str(error)) > 20 and network != "random") or what != "sound" or k or pictures != "noise", str(
                error
            )
            result = "refused with a reason"
        else:
            assert network != "NaN", "NaN weights were evaluated"
            metrics = [
                v for record in json.loads((output / "results.json").read_text()) for v in record["metrics"].values()
            ]
            assert metrics and all(0 <= value <= 1 for value in metrics), f"{options}: {metrics}"
            result = "numbers from 0 to 1"
        yield Outcome(f"evaluation by {network} weights, masks: {what}", result)


@trial(small=12, full=300)
def float_images(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """Images of floating-point numbers, NaN and infinity among them, have no agreed range."""
    for number in range(count):
        values = np.random.default_rng(number).random((9, 9), np.float32)
        values[rng.randrange(9), rng.randrange(9)] = rng.choice((math.nan, math.inf, -math.inf, 0.5))
        Image.fromarray(values).save(folder / "1.tif")
        try:
            read_image(str(folder / "1.tif"))
            raise AssertionError("it was read")
        except NecoError as error:
            assert "1.tif" in str(error) and "floating-point" in str(error)
        yield Outcome("image of floating-point numbers", "refused, named")
