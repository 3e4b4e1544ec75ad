"""Composition and validation: what is wrong ends in one message and exit code 2, before any work."""

import ast
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import CONF, ROOT

from neco import config
from neco.errors import NecoError
from neco.values import Positive


class Target:
    def __init__(self, *, steepness: float = 1.0, k: int | list[int] | None = None, width: Positive = 1) -> None:
        self.values = (steepness, k, width)


NODE = {"_target_": f"{__name__}.Target"}


@pytest.mark.parametrize("k", [3, [3, 4], None])
def test_build_accepts_number_list_and_null(k):
    assert config.build({**NODE, "k": k}, "eval.x").values == (1.0, k, 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepness": 1.0}, ["eval.x.stepness", "did you mean 'steepness'"]),
        ({"zzz": 1.0}, ["eval.x.zzz", "steepness, k, width"]),
        ({"steepness": "steep"}, ["eval.x.steepness='steep'", "number"]),
        ({"width": 0}, ["eval.x.width=0", "greater than or equal to 1"]),
        ({"width": True}, ["eval.x.width=True"]),
        ({"k": "many"}, ["eval.x.k='many'"]),
    ],
)
def test_build_names_what_is_wrong(values, words):
    with pytest.raises(NecoError) as error:
        config.build({**NODE, **values}, "eval.x")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_missing_required_key():
    def needs(*, name: str) -> None: ...

    with pytest.raises(NecoError, match=r"x\.name: needs a value"):
        config.check(needs, {}, "x")


WRONG = [
    (["task=trian"], ["task=trian", "did you mean 'train'"]),
    (["dataset=cocoo"], ["dataset=cocoo", "did you mean 'coco'"]),
    (["optim.lrr=1"], ["optim.lrr", "did you mean", "lr", "command line"]),
    (["optim.lr=fast"], ["optim.lr='fast'", "number", "command line (optim.lr=fast)"]),
    (["optim.lr=-1"], ["optim.lr=-1", "greater than or equal to 0"]),
    (["loss.network=bubble"], ["loss.network='bubble'", "bitonic", "odd_even"]),
    (["+loss.stepness=3"], ["loss.stepness", "steepness"]),
    (["seeed=3"], ["seeed", "did you mean 'seed'"]),
    (["loss=[neco"], ["loss=[neco"]),
    (["task=eval", "optim.lr=1"], ["optim"]),
    (["eval.linear.k=3"], ["linear", "not selected"]),
    (["augment.global_size=65"], ["augment", "65", "64 or 72"]),
    (["train.batch_size=10", "train.accumulate=3"], ["batch_size=10", "accumulate=3"]),
    (["dataset=coco"], ["coco", "train2017", "dataset.root"]),
    (["dataset=folder", "dataset.root=nowhere"], ["nowhere"]),
    (["val_dataset=camvid"], ["val_dataset", "dataset@val_dataset=NAME"]),
    (["task=eval", "checkpoint=nothing.ckpt"], ["nothing.ckpt", "no such file"]),
    (["task=eval", "weights=teacher"], ["weights=teacher", "checkpoint="]),
    (["task=eval", "eval=[]"], ["eval=[]"]),
    (["train.resume=nothing.ckpt"], ["nothing.ckpt"]),
    (["model.name=vit_smal_patch14_dinov2"], ["vit_smal_patch14_dinov2", "did you mean"]),
    (["device=cuda"], ["device=cuda"]),
]


@pytest.mark.parametrize(
    ("arguments", "words"), WRONG, ids=lambda value: " ".join(value) if isinstance(value[0], str) else ""
)
def test_wrong_input_is_one_message(inside, tmp_path, arguments, words):
    if arguments == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    code, said = inside(*arguments)
    assert code == 2, said
    assert "Traceback" not in said and said.startswith("error: "), said
    message = said.partition("error: ")[2]
    assert all(word in message for word in words), said
    assert not list(tmp_path.glob("runs/*/*")), "nothing is left behind"


def test_debug_shows_the_traceback(inside):
    assert "Traceback" in inside("optim.lr=fast", "debug=true")[1]


def test_help_is_quick_and_names_every_option(neco):
    start = time.monotonic()
    done = neco("--help", ok=True)
    assert time.monotonic() - start < 10  # under 2 s on an idle machine; this only catches an import of torch
    for path in CONF.glob("*/*.yaml"):
        assert path.stem in done.stdout, path
    assert done.stdout.count("python -m neco ") >= 3


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['neco', '--help']; import neco.__main__ as program; program.main();"
        "print(sorted({'torch', 'hydra', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("[]"), done.stderr


def test_every_option_says_what_it_is():
    for path in CONF.rglob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# ") and len(lines[0]) > 12, path


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_option_fits_its_constructor(path):
    node = yaml.safe_load(path.read_text()) or {}
    if "_target_" not in node:
        pytest.skip("holds no single object")
    target = config.locate(node["_target_"])
    values = {key: value for key, value in node.items() if key != "_target_" and "${" not in str(value)}
    runtime = [key for key in ("folder", "step", "device", "root") if key not in values]
    assert config.check(target, values, path.stem, runtime).keys() == values.keys()


def test_machine_file_in_the_working_folder(inside, tmp_path):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "default.yaml").write_text("# @package _global_\ndata_root: /somewhere\n")
    assert "data_root: /somewhere" in inside("--cfg", "job")[1]


def test_machine_file_with_a_wrong_key_is_named(inside, tmp_path):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "default.yaml").write_text("# @package _global_\ntrain:\n  batch_sise: 3\n")
    _, error = inside()
    assert "train.batch_sise" in error and "batch_size" in error and "machine/default.yaml" in error


ORDER = {  # package -> siblings it may import
    "model": set(),
    "loss": set(),
    "dataset": set(),
    "augment": set(),
    "logger": set(),
    "eval": {"model", "dataset"},
    "training": {"augment", "model", "loss", "dataset"},
    "task": {"augment", "model", "loss", "dataset", "training", "eval", "logger"},
}


@pytest.mark.parametrize("package", sorted(ORDER))
def test_imports_point_one_way(package):
    for path in (ROOT / "neco" / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            if isinstance(node, ast.ImportFrom) and node.module == "neco":
                names = [f"neco.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "neco" and len(parts) > 1 and parts[1] in ORDER and parts[1] != package:
                    assert parts[1] in ORDER[package], f"{path}: {name}"
