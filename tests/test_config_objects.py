"""Nothing that a file says is run: harmful components at every key of checkpoints, exports, run folders, mixtures."""

import contextlib
import copy
import importlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from conftest import FEW, SMALL

from neco import load_backbone
from neco.config import discovery, validate
from neco.eval.common.heads import ABOUT, Head, load_head
from neco.model import trained_model
from neco.report import collect
from neco.runs import provenance
from neco.task import export
from neco.training.run import find
from neco.utils.errors import NecoError

# Events of Python itself; `import` alone of the planted module
EVENTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.remove", "shutil.rmtree", "webbrowser.open",
          "pickle.find_class", "os.putenv")  # fmt: skip
watching: list[str] | None = None


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if watching is not None and (event in EVENTS or (event == "import" and arguments[0] == "planted")):
        watching.append(f"{event}: {arguments!r:.100}")


sys.addaudithook(note)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """A block in which nothing harmful may happen."""
    global watching
    watching = []
    try:
        yield
        assert not watching, watching
        assert not (folder / "canary").exists(), "it ran"
        assert (folder / "victim/file").read_text() == "safe"
    finally:
        watching = None


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder with a module that leaves `canary` where it is imported, weights that need pickle, and a victim."""
    folder = tmp_path_factory.mktemp("harm")
    (folder / "planted.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'canary')!r}).touch()\nclass Harm: pass\n"
    )
    (folder / "victim").mkdir()
    (folder / "victim/file").write_text("safe")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def harmful(folder: Path) -> list[dict[str, Any]]:
    """Nodes that do harm where they are built, or where their class is imported."""
    canary, victim = str(folder / "canary"), str(folder / "victim")
    touch = f"touch {canary}"
    planted = str(folder / "planted.py")
    return [
        {"_target_": "os.system", "command": touch},
        {"_target_": "posix.system", "command": touch},
        {"_target_": "subprocess.Popen", "args": ["touch", canary]},
        {"_target_": "subprocess.getoutput", "cmd": touch},
        {"_target_": "builtins.eval", "source": f"open({canary!r}, 'w')"},
        {"_target_": "builtins.exec", "source": f"open({canary!r}, 'w')"},
        {"_target_": "builtins.open", "file": canary, "mode": "w"},
        {"_target_": "runpy.run_path", "path_name": planted},
        {"_target_": "importlib.import_module", "name": "planted"},
        {"_target_": "planted.Harm"},
        {"_target_": "planted"},
        {"_target_": "torch.load", "f": canary, "weights_only": False},
        {"_target_": "torch.hub.load", "repo_or_dir": str(folder), "model": "x", "source": "local"},
        {"_target_": "pickle.loads", "data": "cposix\nsystem\n."},
        {"_target_": "shutil.rmtree", "path": victim},
        {"_target_": "os.remove", "path": f"{victim}/file"},
        {"_target_": "pathlib.Path.write_text", "self": canary, "data": "x"},
        {"_target_": "pathlib.Path.touch", "self": canary},
        {"_target_": "webbrowser.open", "url": "file:///"},
        {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.system", "command": touch}},
        {"_target_": "functools.partial", "func": {"_target_": "os.system", "command": touch}},
        {"_target_": "neco.utils.atomic_files.whole", "path": canary},
        {"_target_": "neco.runs.results.write", "path": canary, "text": "x"},
        {"_target_": "neco.config.validate.build", "node": {"_target_": "planted.Harm"}, "where": "model"},
        {"_target_": "neco.config.validate.locate", "target": "planted.Harm"},
        {"_target_": "neco.model.load_backbone", "source": canary, "trust_pickle": True},
        {"_target_": "neco.loss.neco.NeCo", "grid": 7},  # of conf/, but not declared there
    ]


def forms(node: dict[str, Any]) -> list[Any]:
    """A node where a value was, at several depths."""
    return [node, [node], {"a": node}, {"a": {"b": [1, {"c": node}]}}, {"a": [[node]], "_target_": "builtins.dict"}]


def paths(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of each value in nested mappings and lists."""
    if at:
        yield at
    for key, below in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from paths(below, (*at, key))


def changed(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    node = tree
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = value
    return tree


def cases(tree: Any, folder: Path, each: bool) -> Iterator[tuple[str, Any]]:
    """`tree` with one value made harmful: at each place every harm in every form (`each`), or one of each in turn."""
    turn = itertools.cycle(itertools.product(range(5), harmful(folder)))
    for at in paths(tree):
        name = ".".join(map(str, at))
        if at[-1] == "_target_":
            for node in harmful(folder):
                yield f"{name}={node['_target_']}", changed(tree, at, node["_target_"])
                yield f"{name[:-9]}: {node['_target_']}", changed(tree, at[:-1], node) if at[1:] else node
        elif each:
            for node in harmful(folder):
                for number, value in enumerate(forms(node)):
                    yield f"{name}, form {number} of {node['_target_']}", changed(tree, at, value)
        else:
            for form, node in itertools.islice(turn, 2):
                yield f"{name}, form {form} of {node['_target_']}", changed(tree, at, forms(node)[form])


TINY = yaml.safe_load(Path(discovery.find("model", "tiny")).read_text()) | {"weights": "none"}


@pytest.fixture(scope="module")
def network() -> Any:
    return validate.build(TINY, "model")


def written(network: Any, path: Path, about: Any) -> str:
    """A checkpoint with this under `neco`, or an export with this in its header."""
    if path.suffix == ".ckpt":
        torch.save({"state_dict": network.net.state_dict(), "neco": about, "global_step": 3}, path)
    else:
        safetensors.torch.save_file(network.net.state_dict(), path, {"neco": json.dumps(about)})
    return str(path)


def refused(act: Any, name: str) -> None:
    try:
        act()
    except NecoError as error:
        assert "\n" not in str(error)[:200] and len(str(error)) < 3000, f"{name}: {error}"
    else:
        raise AssertionError(f"{name} was taken")


def test_no_model_node_of_a_file_is_built_with_anything_harmful(place, network):
    """All harms, all forms, all keys; the nodes alone, for they are many."""
    count = 0
    with watched(place):
        for name, node in cases(TINY, place, each=True):
            refused(lambda node=node: provenance.outline(node), name)
            count += 1
    assert count > 1000


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_load_backbone_runs_nothing_of_a_file(place, network, tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    for trusted in (False, True):
        for name, node in cases(TINY, place, each=False):
            written(network, path, {"config": {"model": node}} if suffix == ".ckpt" else {"model": node})
            if suffix == ".ckpt" and trusted:
                continue  # torch itself imports by pickle then
            with watched(place):
                refused(lambda trusted=trusted: load_backbone(path, trust_pickle=trusted), name)


def test_names_that_are_no_targets_are_one_message(network, tmp_path):
    for target in (
        5,
        None,
        [],
        ["os.system"],
        {},
        {"_target_": "os.system"},
        "",
        "loss",
        True,
        1.5,
        "..",
        "os.",
        "a" * 10**5,
    ):
        path = written(network, tmp_path / "w.safetensors", {"model": {**TINY, "_target_": target}})
        with pytest.raises(NecoError, match=r"w\.safetensors says that its network is made by") as error:
            load_backbone(path)
        assert len(str(error.value)) < 500
    for node in ([], "os.system", 5, True):
        with pytest.raises(NecoError, match="instead of its network it holds a"):
            load_backbone(written(network, tmp_path / "w.safetensors", {"model": node}))


def test_values_without_end_are_refused(network, tmp_path):
    loop: dict[str, Any] = {}
    loop["a"] = loop
    wide: Any = 1
    for _ in range(9):
        wide = [wide] * 9
    for value in (loop, wide, json.loads("[" * 400 + "]" * 400), dict.fromkeys(range(200_000))):
        for key in ("arch", "size"):
            path = written(network, tmp_path / "w.ckpt", {"config": {"model": {**TINY, key: value}}})
            with pytest.raises(NecoError, match=r"nested too deep, or holds too much"):
                load_backbone(path)


def test_a_network_of_the_users_own_needs_to_be_chosen_or_trusted(place, network, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("_target_: planted.Harm\n")
    monkeypatch.chdir(tmp_path)
    path = written(network, tmp_path / "w.safetensors", {"model": {"_target_": "planted.Harm"}})
    with watched(place):
        refused(lambda: trained_model(path), "planted.Harm")
        assert trained_model(path, chosen="planted.Harm") == trained_model(path, trust_pickle=True)
        refused(lambda: trained_model(path, chosen="planted.Other"), "planted.Harm")


TASKS = {
    "eval": ("dataset.train=12", "dataset.val=4"),
    "export": (),
    "embed": ("dataset.train=12", "dataset.val=4"),
    "finetune": FEW[1:],
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_run_nothing_of_a_checkpoint(place, network, cache, tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    settings = validate.load(
        f"task={task}", *TASKS[task], f"cache_dir={cache}", f"run_dir={tmp_path / 'run'}", "weights=auto"
    )
    module, dataset = importlib.import_module(f"neco.task.{task}"), settings.config.get("dataset")
    if dataset:
        settings.build("dataset").samples("train")  # draws them
    whole = {"config": {"model": TINY, "dataset": dataset, "loss": {"_target_": "neco.loss.neco.NeCo"}}, "files": "x"}
    nodes = [
        *(
            ({"model": node}, ".safetensors", name)
            for name, node in itertools.islice(cases(TINY, place, False), 0, None, 3)
        ),
        *((node, ".ckpt", name) for name, node in itertools.islice(cases(whole, place, False), 0, None, 5)),
    ]
    for about, suffix, name in nodes:
        path = written(network, tmp_path / f"w{suffix}", about)
        ours = replace(settings, run=replace(settings.run, checkpoint=path), config=copy.deepcopy(settings.config))
        with watched(place):
            try:
                module.prepare(ours)
            except NecoError as error:
                assert path in str(error), f"{name}: {error}"
            else:
                held = about.get("config") or about
                assert held.get("model") == TINY, f"{name} was taken"


def test_a_run_is_not_gone_on_with_harm(place, network, tmp_path):
    """`find` compares what a checkpoint says; it neither builds nor breaks."""
    settings = validate.load("task=train", *SMALL)
    saved = {"config": settings.config, "files": "x", "classes": ["a"], "rows": 3, "origin": ("", ""), "images": {}}
    last = tmp_path / "checkpoints/last.ckpt"
    last.parent.mkdir()
    assert find(settings.spine["train"], Path(written(network, last, saved)), saved) == last
    for name, about in itertools.islice(cases(saved, place, False), 0, None, 7):
        written(network, last, about)
        with watched(place), contextlib.suppress(NecoError):
            assert find(settings.spine["train"], last, saved) == last, name
    images = [{**saved, "images": wrong} for wrong in (5, [], {"0": 5}, {"0": [5]}, {"0": [("x",)]})]
    for about in ([], 5, {}, {"config": 5}, {"config": {"a": []}}, {**saved, "rows": "x"}, *images):
        with pytest.raises(NecoError, match=r"last\.ckpt"):
            find(settings.spine["train"], Path(written(network, last, about)), saved)


def test_heads_are_data(place, tmp_path):
    about = {
        "trained": "x",
        "kind": "linear",
        "dim": "8",
        "classes": '["a", "b"]',
        "size": "[8, 8]",
        "patch": "8",
        "weights": "w",
    }
    assert about.keys() == set(ABOUT)
    state = Head("linear", 8, 2).state_dict()
    for name, node in cases(about, place, each=False):
        node = {key: value if isinstance(value, str) else json.dumps(value) for key, value in node.items()}
        safetensors.torch.save_file(state, tmp_path / "h.safetensors", node)
        with watched(place), contextlib.suppress(NecoError):
            assert isinstance(load_head(tmp_path / "h.safetensors")[0], Head), name


def test_run_folders_are_data(place, tmp_path):
    composed = validate.load(
        "task=train", *SMALL[2:], "dataset=mix", "dataset.parts={shapes:{weight:1,train:12,val:4}}"
    ).config
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n")
    for name, node in itertools.islice(cases(composed, place, each=False), 0, None, 25):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(node))
        with watched(place), contextlib.suppress(NecoError):
            assert collect.read(tmp_path), name
        with watched(place), contextlib.suppress(NecoError):
            export.trained(tmp_path)


@pytest.mark.parametrize(
    "base",
    [
        ("dataset=mix", "dataset.parts={shapes:1,cats:{option:folder,root:x}}"),
        ("dataset@val_dataset=mix", "val_dataset.parts={shapes:1}"),
    ],
)
def test_nothing_harmful_in_a_configuration_is_built(place, base):
    settings = validate.load("task=train", *SMALL[2:], *base)
    parts = {key: settings.config[key] for key in ("dataset", "val_dataset") if "parts" in settings.config.get(key, {})}
    other = {key: node for key, node in settings.config.items() if key not in (*parts, "launcher")}
    found = [
        *itertools.islice(cases(parts, place, True), 0, None, 31),
        *itertools.islice(cases(other, place, False), 0, None, 7),
    ]
    for name, changes in found:
        composed = copy.deepcopy({**settings.config, **changes})
        with watched(place):
            try:
                ours = validate.validate(composed, settings.choices)
                for leaf in ("model", "head"):
                    validate.examine(ours.config[leaf], leaf, runtime=("dim",))
            except NecoError:
                continue
        dropped = re.match(r"(eval|logger)\b", name)  # those that were not chosen
        rightly = re.fullmatch(r"loss(\._target_=|: |, form 0 of )neco\.loss\.neco\.NeCo", name)
        assert dropped or rightly, f"{name} was taken"


def test_a_part_is_built_when_all_else_is_right(monkeypatch):
    """Types come first: nothing is built beside a wrong value."""
    built: list[str] = []
    real = validate.build
    monkeypatch.setattr(
        validate, "build", lambda node, where, *more, **given: built.append(where) or real(node, where, *more, **given)
    )
    node = validate.load("dataset=mix", "dataset.parts={shapes:1}").config["dataset"]
    built.clear()
    with pytest.raises(NecoError, match=r"dataset\.max_bad='x'"):
        validate.build({**node, "max_bad": "x"}, "dataset")
    assert built == ["dataset"]
    validate.build(node, "dataset")
    assert built == ["dataset", "dataset", "dataset.parts.shapes"]
    with pytest.raises(NecoError, match=r"dataset\.parts\.a\._target_='neco\.loss\.neco\.NeCo': no option of dataset"):
        validate.build({**node, "parts": {"a": {"_target_": "neco.loss.neco.NeCo"}}}, "dataset")
    with pytest.raises(NecoError, match=r"dataset\.parts\.a=3: an option of the group"):
        validate.build({**node, "parts": {"a": 3}}, "dataset")
