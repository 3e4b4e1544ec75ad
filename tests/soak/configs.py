"""Configurations that are wrong: every key of every option dropped, misspelt, mistyped, out of range; options in pairs.

Each goes the way of `python -m neco` on tiny data. It is refused before work starts, by one message that names the key,
or it is accepted; of what is accepted, some is run for a step, which finishes or ends in one message, too.
"""

import contextlib
import importlib
import io
import json
import os
import random
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import dataset_support
import torch
from conftest import FEW, SMALL

from neco.cli import main as program
from neco.config import discovery, schema, validate
from neco.utils.errors import NecoError
from soak import Outcome, forked, trial

ANY = (
    "abc", "''", "null", "true", "-1", "0", "0.5", "7", "1e30", "1000000000000", "nan", "inf", "-inf", "[]", "[1,2]",
    "[a,b]", "[[]]", "{a:1}", "{}", "[nan,nan]", "'../x'", "é", "${nothing}", "${seed}",
)  # fmt: skip
TINY = ("dataset.train=12", "dataset.val=4", "weights=none", "extract.workers=0")
LIGHT = {
    "retrieval": ("k=3",), "overcluster": ("k=4", "seeds=[0]", "restarts=1"), "linear": ("epochs=1", "drop_epoch=1"),
    "unsupervised": ("k=20", "k_community=10", "seeds=[0]", "restarts=1"), "attention": (),
}  # fmt: skip
# One layout of each data set; the option's root is where it is built.
LAYOUT = {
    "voc": "voc:/JPEGImages:trainaug", "ade20k": "ade20k:", "cityscapes": "cityscapes:labelIds",
    "camvid": "camvid:images", "coco": "coco:images/", "imagenet": "imagenet", "imagenet100": "imagenet100",
    "folder": "folder",
}  # fmt: skip
SLOW = re.compile(r"(workers|devices|nodes|batch_size|compile|logger|applier)\b|=(cuda|onnx)$")  # what is not run
SECONDS = 20.0  # that one command may take, a step and all imports with it
TOP = [key for key in typing.get_type_hints(schema.Run) if key not in ("task", "debug")]


@dataclass(frozen=True)
class Base:
    """A command that works, and the part of the configuration that is changed."""

    name: str
    command: tuple[str, ...]
    node: str

    def values(self) -> dict[str, Any]:
        """Keys below the node, dotted, with their values; the whole of a list is one."""
        composed = validate.load(*self.command).config

        def flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
            for key, value in node.items():
                if isinstance(value, dict) and value and all(isinstance(k, str) for k in value):
                    yield from flat(value, f"{prefix}{key}.")
                else:
                    yield f"{prefix}{key}", value

        if not self.node:
            return {key: composed[key] for key in TOP if key in composed}
        part = composed
        for name in self.node.split("."):
            part = part[name]
        return {key: value for key, value in flat(part, f"{self.node}.") if not key.endswith("._target_")}


def _eval(name: str) -> tuple[str, ...]:
    light = LIGHT[name.partition("_vit")[0]]
    return (f"eval=[{name}]", *(f"eval.{name}.{key}" for key in light))


def bases(folder: Path) -> list[Base]:
    """All options, each in a command on tiny data. Builds data sets below `folder`."""
    evaluate = ("task=eval", *TINY)
    found = [
        *(
            Base(f"task=train {node}", ("task=train", *SMALL, "train.steps=1"), node)
            for node in ("train", "optim", "head")
        ),
        *(Base(f"task=finetune {node}", (*FEW, "finetune.steps=1"), node) for node in ("finetune", "optim")),
        Base("task=embed", ("task=embed", *TINY, "embed.size=64"), "embed"),
        Base("task=eval", (*evaluate, *_eval("retrieval")), ""),
        Base("task=train", ("task=train", *SMALL, "train.steps=1"), ""),
        Base("task=export", ("task=export", "weights=none"), ""),
        Base("task=report", ("task=report", f"runs=[{_reported(folder / 'run')}]"), ""),
        Base("task=check", ("task=check", *TINY[:2]), ""),
        Base("extract", (*evaluate, *_eval("retrieval")), "extract"),
    ]
    found += [Base(f"loss={n}", ("task=train", *SMALL, "train.steps=1", f"loss={n}", "loss.grid=3"), "loss")
              for n in discovery.options("loss")]  # fmt: skip
    found += [Base(f"augment={n}", ("task=train", *SMALL, "train.steps=1", f"augment={n}"), "augment")
              for n in discovery.options("augment")]  # fmt: skip
    found += [Base(f"eval={n}", (*evaluate, *_eval(n)), f"eval.{n}") for n in discovery.options("eval")]
    found += [Base(f"logger={n}", (*evaluate, *_eval("retrieval"), f"logger=[{n}]"), f"logger.{n}")
              for n in discovery.options("logger")]  # fmt: skip
    found += [Base(f"model={n}", (*evaluate, *_eval("retrieval"), f"model={n}"), "model")
              for n in discovery.options("model")]  # fmt: skip
    train = tuple(key for key in SMALL if not key.startswith("dataset."))
    for name in discovery.options("dataset"):
        if name == "all":
            continue
        if name == "shapes":
            command = TINY[:2]
        elif name == "mix":
            command = ("dataset=mix", "dataset.parts={shapes:{weight:1,train:12,val:4}}")
        else:
            layout = LAYOUT.get(name) or next(key for key in dataset_support.LAYOUTS if key.startswith(f"{name}:"))
            built = dataset_support.LAYOUTS[layout](folder / name)
            command = (f"dataset={name}", f"dataset.root={built.root}")
        found.append(Base(f"dataset={name}", ("task=train", *train, "train.steps=1", *command), "dataset"))
    return found


def _reported(run: Path) -> Path:
    """A run folder to report on."""
    run.mkdir(parents=True)
    record = {
        "evaluation": "retrieval", "network": "only", "step": 0, "metrics": {"miou_k30": 0.5}, "model": "tiny",
        "dataset": "shapes", "protocol": "x", "weights": "w", "asked": "x", "state": "", "fraction": 1.0,
    }  # fmt: skip
    (run / "results.json").write_text(json.dumps([record]))
    return run


def changes(key: str, value: Any, rng: random.Random) -> Iterator[tuple[str, str]]:
    """(what is wrong, override) for one key; wrong values at random."""
    name = key.rpartition(".")[2]
    place = rng.randrange(len(name))
    yield "dropped", f"~{key}"
    misspelt = key[: len(key) - len(name)] + name[:place] + rng.choice("qxz") + name[place:]
    yield "misspelt", f"{rng.choice(('', '+'))}{misspelt}=1"
    numbers = [text for text in ANY if re.fullmatch(r"[-+.\de]+|nan|-?inf", text)]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    yield "of another type", f"{key}={rng.choice([text for text in ANY if not (number and text in numbers)])}"
    for text in rng.sample(numbers, 2):
        yield "another number", f"{key}={text}"


def command(arguments: Sequence[str], run: bool) -> str:
    """`python -m neco ARGUMENTS` in this process; without `run`, all but the work."""
    given = next(argument for argument in arguments if argument.startswith("task="))
    task = importlib.import_module(f"neco.task.{given.partition('=')[2]}")
    said, began = io.StringIO(), []
    main: Callable[..., Any] = task.main

    def work(*given: Any) -> Any:
        began.append(True)
        return main(*given) if run else None

    with (
        contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), mock.patch.object(task, "main", work),
        mock.patch.object(sys, "argv", ["neco", *arguments]),
    ):  # fmt: skip
        code = 0
        try:
            program.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    if code == 0:
        return "finished" if run else "accepted"
    message = said.getvalue().partition("error: ")[2].strip()
    if code != 2 or not message or "Traceback" in message:
        raise forked.Wrong(f"exit code {code}: {said.getvalue()[-300:]}")
    if not began and any(Path("runs").rglob("*.yaml")):
        raise forked.Wrong("a run folder was left behind")
    raise NecoError(("while it ran: " if began else "") + message)


def _named(key: str, message: str) -> bool:
    """Whether a message says which key, or at least which node, is meant."""
    name, _, value = key.lstrip("+~").partition("=")
    return name.rpartition(".")[2] in message or ("." not in name and value.strip("[]") in message)


def _prepared(folder: Path) -> None:
    """What all trials share: the drawn scenes in a cache, and an empty working folder."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["XDG_CONFIG_HOME"] = str(folder / "none")
    os.environ["WANDB_MODE"] = "offline"
    torch.set_num_threads(1)
    shapes = validate.load("task=train", *SMALL).build("dataset")
    for split in ("train", "val"):
        shapes.samples(split)


def _elsewhere(folder: Path) -> Iterator[Path]:
    """Empty working folders, one after the other."""
    number = 0
    while True:
        place = folder / "work" / f"{os.getpid()}-{number}"
        place.mkdir(parents=True)
        number += 1
        yield place


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    here, kept = Path.cwd(), dict(os.environ)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(kept)


@trial(small=16, full=5000)
def keys(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """Every key of every option, each wrong in five ways; of those accepted one in ten is run for a step."""
    with _environment():
        _prepared(folder)
        chosen = bases(folder / "data")
        some = chosen if count > 200 else rng.sample(chosen, min(len(chosen), 8))
        trials = [
            (base, what, override)
            for base in some
            for key, value in base.values().items()
            for what, override in changes(key, value, rng)
        ]
        if count < len(trials):
            trials = rng.sample(trials, count)
        places = _elsewhere(folder)

        def act(tried: tuple[Base, str, str]) -> str:
            base, what, override = tried
            os.chdir(next(places))
            try:
                kind = command((*base.command, override), False)
                if (
                    random.Random(override).random() < 0.1
                    and not SLOW.search(override)
                    and not base.name.startswith("model")
                ):
                    kind = command((*base.command, override), True)
                if what == "misspelt":
                    raise forked.Wrong("a misspelt key was accepted")
                return kind
            except NecoError as error:
                if not _named(override, str(error)):
                    raise forked.Wrong(f"the key is not named: {error}") from error
                raise

        verdicts = forked.run(trials, act, seconds=SECONDS)
    bad = [
        f"{base.name} {override}: {v.kind}: {v.said}"
        for (base, _, override), v in zip(trials, verdicts, strict=True)
        if v.bad
    ]
    assert not bad, f"{len(bad)} of {len(trials)} configurations:\n" + "\n".join(bad[:40])
    for (_, what, _), verdict in zip(trials, verdicts, strict=True):
        yield Outcome(f"key {what}", _result(verdict))


def plausible(hint: Any) -> list[str]:
    """Values that a type allows, as text for the command line; none for what cannot be guessed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return [str(value) for value in arguments]
    if origin is typing.Annotated:
        return plausible(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [text for argument in arguments for text in plausible(argument)]
    if origin in (tuple, list):
        if origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis):
            return [f"[{text}]" for text in plausible(arguments[0])[:3]]
        parts = [plausible(argument) for argument in arguments]
        return [f"[{','.join(texts)}]" for texts in zip(*parts, strict=False)]
    return {bool: ["true", "false"], int: ["0", "1", "2", "3", "8"], float: ["0.0", "0.1", "0.5", "1.0"],
            type(None): ["null"]}.get(hint, [])  # fmt: skip


@trial(small=4, full=400)
def pairs(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """Two keys of a command at once, set to values that their types allow; run for a step."""
    with _environment():
        _prepared(folder)
        data, commands = [base.command for base in bases(folder / "data") if base.node == "dataset"], []
        while len(commands) < count:
            loss, evaluation = rng.choice(discovery.options("loss")), _eval(rng.choice(list(LIGHT)))
            training = ("task=train", *SMALL, "train.steps=1", f"loss={loss}", "loss.grid=3")
            evaluating = ("task=eval", *TINY, *evaluation)
            finetuning = (*FEW, "finetune.steps=1")
            start = rng.choice((training, (*training, *evaluation), evaluating, finetuning, rng.choice(data)))
            choices = [
                f"{name}.{key}={value}"
                for node, part in validate.load(*start).config.items()
                for name, hints in _nodes(node, part)
                for key, hint in hints.items()
                for value in plausible(hint)
            ]
            commands.append((*start, *rng.sample([choice for choice in choices if not SLOW.search(choice)], 2)))
        found = _tried(folder, commands, run=True)
    for verdict in found:
        yield Outcome("two keys of other values", _result(verdict))


@trial(small=3, full=1000)
def options(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    """Two options of different groups in one command; all but the work is done."""
    with _environment():
        _prepared(folder)
        groups = ("task", "model", "dataset", "eval", "loss", "augment", "experiment", "logger")
        commands = []
        for _ in range(count):
            two = [f"{group}={rng.choice(discovery.options(group))}" for group in rng.sample(groups, 2)]
            task = () if any(option.startswith("task=") for option in two) else ("task=train",)
            two = [re.sub(r"^(eval|logger)=(.*)", r"\1=[\2]", option) for option in two]
            commands.append((*task, f"data_root={folder}/nothing", *two))
        found = _tried(folder, commands, run=False)
    for verdict in found:
        yield Outcome("two options of different groups", _result(verdict))


def _tried(folder: Path, commands: Sequence[tuple[str, ...]], run: bool) -> list[forked.Verdict]:
    """What came of each; what is refused has to name one of its last two arguments."""
    places = _elsewhere(folder)

    def act(arguments: tuple[str, ...]) -> str:
        os.chdir(next(places))
        try:
            return command(arguments, run)
        except NecoError as error:
            absent = "experiment=" in " ".join(arguments) and str(error).startswith("dataset: ")  # which it chooses
            if not absent and not any(_named(argument, str(error)) for argument in arguments[-2:]):
                raise forked.Wrong(f"neither is named: {error}") from error
            raise

    found = forked.run(commands, act, seconds=SECONDS)
    bad = [f"{' '.join(c)}: {v.kind}: {v.said}" for c, v in zip(commands, found, strict=True) if v.bad]
    assert not bad, f"{len(bad)} of {len(commands)} commands:\n" + "\n".join(bad[:40])
    return found


def _result(verdict: forked.Verdict) -> str:
    if verdict.kind == "refused":
        when = "while it ran" if verdict.said.startswith("while it ran") else "before work starts"
        return f"an error that names it, {when}"
    return {"accepted": "accepted", "finished": "run for a step"}[verdict.kind]


def _nodes(node: str, part: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The nodes of a configuration with the types of what they take."""
    if node in validate.SPINE:
        yield node, typing.get_type_hints(validate.SPINE[node], include_extras=True)
    elif isinstance(part, dict) and "_target_" in part:
        known = validate.parameters(validate.locate(part["_target_"]))
        yield node, {key: hint for key, (_, hint) in known.items() if key in part}
    elif node == "eval":
        for name, below in part.items():
            yield from _nodes(f"eval.{name}", below)
