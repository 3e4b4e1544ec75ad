"""Composition and validation: what is wrong ends in one message and exit code 2, before any work."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONF, ROOT

from neco.cli import explain
from neco.config import validate
from neco.config.types import Positive
from neco.utils import atomic_files
from neco.utils.errors import NecoError


class Target:
    def __init__(self, *, steepness: float = 1.0, k: int | list[int] | None = None, width: Positive = 1) -> None:
        self.values = (steepness, k, width)


NODE = {"_target_": f"{__name__}.Target"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working folder whose options name the classes of this file."""
    (tmp_path / "eval").mkdir()
    for name in ("Target", "Child"):
        (tmp_path / f"eval/{name}.yaml").write_text(f"_target_: {__name__}.{name}\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("k", [3, [3, 4], None])
def test_build_accepts_number_list_and_null(own, k):
    assert validate.build({**NODE, "k": k}, "eval.x").values == (1.0, k, 1)


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
def test_build_names_what_is_wrong(own, values, words):
    with pytest.raises(NecoError) as error:
        validate.build({**NODE, **values}, "eval.x")
    assert all(word in str(error.value) for word in words), str(error.value)


class Child(Target):
    def __init__(self, *, name: str, **common: Any) -> None:
        super().__init__(**common)


class Closed(Child):
    def __init__(self, *, depth: int = 1) -> None:
        super().__init__(name="closed")


def test_keywords_of_a_constructor_are_those_of_its_base_class(own):
    assert list(validate.parameters(Child)) == ["name", "steepness", "k", "width"]
    assert list(validate.parameters(Closed)) == ["depth"]
    assert validate.build({"_target_": f"{__name__}.Child", "name": "x", "width": 3}, "eval.x").values == (1.0, None, 3)
    for values, words in (({"widht": 3}, "did you mean 'width'"), ({"width": 0}, "greater than or equal to 1")):
        with pytest.raises(NecoError, match=words):
            validate.build({"_target_": f"{__name__}.Child", "name": "x", **values}, "eval.x")


def test_missing_required_key():
    def needs(*, name: str) -> None: ...

    with pytest.raises(NecoError, match=r"x\.name: needs a value"):
        validate.check(needs, {}, "x")


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
    (["eval.linear.k=3"], ["linear", "is not selected"]),
    (["augment.global_size=65"], ["augment", "65", "64 or 72"]),
    (["augment.global_size=[64,65]"], ["augment", "[64, 65]", "[64, 64 or 72]"]),
    (["augment.local_size=[16]"], ["augment.local_size=[16]"]),
    (["augment.multi_scale=[]"], ["augment.multi_scale=[]", "at least 1"]),
    (["augment.teacher=dirty"], ["augment.teacher='dirty'", "'augmented' or 'clean'"]),
    (["train.batch_size=10", "train.accumulate=3"], ["batch_size=10", "accumulate=3"]),
    (["dataset=coco"], ["coco", "train2017", "dataset.root"]),
    (["dataset=folder", "dataset.root=nowhere"], ["nowhere"]),
    (["dataset.max_bad=2"], ["dataset.max_bad=2", "less than or equal to 1", "command line"]),
    (["dataset=mix"], ["parts", "{coco:1,folder:0.5}"]),
    (["dataset=mix", "dataset.parts=coco:1"], ["dataset.parts='coco:1'", "quoted for the shell"]),
    (["dataset=mix", "dataset.parts={shaps:1}"], ["dataset.parts.shaps", "did you mean 'shapes'"]),
    (["dataset=mix", "dataset.parts={shapes:0}"], ["dataset.parts.shapes.weight=0", "greater than 0"]),
    (["dataset=mix", "dataset.parts={coco:1,b:{option:folder,rot:x}}"], ["dataset.parts.b.rot", "did you mean 'root'"]),
    (
        ["dataset=mix", "dataset.parts={coco:1}"],
        ["part coco", "train2017", "dataset.parts={coco:{weight:1,root:FOLDER},...}"],
    ),
    (
        ["dataset.train=2", "dataset.val=2", "dataset@val_dataset=mix", "val_dataset.parts={shapes:1}"],
        ["mix has no labels"],
    ),
    (["val_dataset=camvid"], ["val_dataset", "dataset@val_dataset=NAME"]),
    (["task=eval", "checkpoint=nothing.ckpt"], ["nothing.ckpt", "no such file"]),
    (["task=eval", "weights=teacher"], ["weights=teacher", "checkpoint="]),
    (["task=eval", "experiment=demo"], ["experiment=demo", "task=train", "command line (experiment=demo)"]),
    (["task=eval", "eval=[]"], ["eval=[]"]),
    (["train.blocks=5"], ["train.blocks=5", "more than there are, 4", "command line (train.blocks=5)"]),
    (["train.blocks=some"], ["train.blocks='some'", "'all'"]),
    (["train.lora_rank=97"], ["train.lora_rank=97", "96"]),
    (["train.lora_rank=4", "train.blocks=0"], ["train.lora_rank=4", "train.blocks=0 leaves no block"]),
    (["optim.layer_decay=0"], ["optim.layer_decay=0", "greater than 0"]),
    (["train.resume=nothing.ckpt"], ["nothing.ckpt"]),
    (["model.name=vit_smal_patch14_dinov2"], ["vit_smal_patch14_dinov2", "did you mean"]),
    (["device=cuda"], ["device=cuda"]),
    (["optim.betas=[0.9,1.0]"], ["optim.betas=[0.9, 1.0]", "less than 1"]),
    (["seed=99999999999999999999"], ["seed=99999999999999999999", "less than 9223372036854775808"]),
    (["+model.foo=1"], ["model.foo: no such key", "command line (+model.foo=1)"]),
    (["model.size=null"], ["model.size=None", "integer"]),
    (["model.arch=3"], ["model.arch=3", "dictionary"]),
    (["head.hidden=0"], ["head.hidden=0", "greater than or equal to 1", "command line (head.hidden=0)"]),
    (["experiment=demo", "augment.local_size=65"], ["augment: local_size=65", "command line (augment.local_size=65)"]),
    (["dataset=mix", "dataset.parts=[coco]"], ["dataset.parts=['coco']", "a mapping"]),
    (["dataset=mix", "dataset.parts=3"], ["dataset.parts=3", "a mapping"]),
    (["train=null"], ["train=None", "train.KEY=VALUE"]),
    (["~loss"], ["loss=None", "choose one with loss=NAME"]),
    (["~train"], ["train", "~train"]),
    (["model=null"], ["model=null", "an option of the group"]),
    (["dataset=folder"], ["dataset.root: needs a value"]),
    (["run_dir=/proc/x"], ["run_dir", "/proc/x"]),
    (["run_dir='~nobody-9/x'"], ["run_dir: ~nobody-9/x: there is no user 'nobody-9'"]),
    (["data_root='~nobody-9/x'"], ["data_root: ~nobody-9/x: there is no user 'nobody-9'"]),
    (["run_dir='a\\${b}'"], ["run_dir=a${b}", "choose another"]),
    (["run_dir=null"], ["run_dir", "name of a folder"]),
    (["run_dir="], ["run_dir=''", "is empty"]),
    (["train.betas=1"], ["train.betas", "did you mean 'optim.betas'"]),
    (["eval=overcluster", "eval.retrieval.k=3"], ["eval.retrieval.k", "retrieval is not selected"]),
    (["eval.retreival.k=3"], ["eval.retreival.k", "did you mean 'retrieval'"]),
    (["dataset=folder", "dataset.root=bilder/käse(1)"], ["\"dataset.root='bilder/käse(1)'\""]),
    (["train.epochs=1000000000000", "dataset.train=2", "dataset.val=2"], ["more than a million"]),
    (["train.nodes=2"], ["train.nodes=2", "torchrun"]),
    (["train.momentum=0.9995"], ["train.momentum=0.9995: ", "must be a list of 2 values, written [a,b]"]),
    (["train.momentum=[0.9995]"], ["train.momentum=[0.9995]: ", "must be a list of 2 values, written [a,b]"]),
    (["train.momentum=[0.9,1,1]"], ["train.momentum=[0.9, 1, 1]: ", "must be a list of 2 values, written [a,b]"]),
    (["dataset.range=4095"], ["dataset.range=4095: ", "must be a list of 2 values, written [a,b]"]),
    (
        ["dataset.train=2", "dataset@val_dataset=folder", "val_dataset.root=/x/dataset.d", "val_dataset.masks=m"],
        ["val_dataset: val_dataset.masks is set and val_dataset.classes is not"],
    ),
    (["run_dir=läufe"], ["run_dir=läufe: cannot be read as KEY=VALUE; values", "\"run_dir='läufe'\""]),
    (["dataset=folder", "dataset.root="], ["dataset.root='': is empty", "not set?"]),
    (["dataset.files="], ["dataset.files='': is empty"]),
    (["dataset =voc"], ["dataset =voc: no spaces around `=`; did you mean dataset=voc?"]),
]


MEANT = [  # what is typed, and what the message advises
    ("task=training", "did you mean 'train'"),
    ("task=evaluation", "did you mean 'eval'?"),
    ("train", "did you mean task=train?"),
    ("task=eval voc", "did you mean dataset=voc?"),
    ("--dataset coco", "did you mean dataset=coco?"),
    ("--dataset=coco", "did you mean dataset=coco?"),
    ("--lr 1e-5", "did you mean optim.lr=1e-5?"),
    ("task=finetune --batch-size 8", "did you mean finetune.batch_size=8?"),
    ("--verbose-please", "KEY=VALUE, see --help"),
    ("--cfg dataset=voc", "--cfg: needs one of job, hydra, all: --cfg job"),
    ("-m --cfg", "--cfg job"),
    ("eval=retrieval,overcluster", "'eval=[retrieval,overcluster]'; -m starts one job for each"),
    ("task=report runs=a,b", "'runs=[a,b]'; -m"),
    ("dataset=coco,voc", "-m starts one job for each"),
    ("optim.lr=1e-4,1e-5", "-m starts one job for each"),
    ("train.epoch=3", "did you mean 'train.epochs'?"),
    ("task=finetune train.epochs=3", "a key of task=train, not of this command with task=finetune"),
    ("task=eval train.steps=3", "a key of task=train, not of this command with task=eval"),
    ("task=eval eval=overcluster eval.retrieval.k=3", "retrieval is not selected; add it: eval=[retrieval,...]"),
    ("lr=1e-5", "did you mean 'optim.lr'?"),
    ("batch_size=8", "did you mean 'train.batch_size'?"),
    ("task=finetune batch_size=8", "did you mean 'finetune.batch_size'?"),
    ("datasets=coco", "did you mean 'dataset'?"),
    ("models=tiny", "did you mean 'model'?"),
    ("evals=[linear]", "did you mean 'eval'?"),
    ("rundir=x", "did you mean 'run_dir'?"),
    ("dataset.parts={coco:1}", "a key of dataset=mix"),
    ("loss=cosine loss.steepness=4", "a key of loss="),
    ("dataset=my/images", "dataset=folder dataset.root=my/images"),
    ("dataset=/data/images", "dataset=folder dataset.root=/data/images"),
    ("dataset=~/images", "dataset=folder \"dataset.root='~/images'\""),
    ("dataset=dinov2_vits14", "did you mean model=dinov2_vits14?"),
    ("model=voc", "did you mean dataset=voc?"),
    ("model=file.pth", "checkpoint=file.pth"),
    ("model=runs/train/x", "checkpoint=runs/train/x"),
    ("task=eval checkpoint=dinov2_vits14", "did you mean model=dinov2_vits14?"),
    ("task=eval checkpoint=runs/my run", "\"checkpoint='runs/my run'\""),
    ("hydra/launcher=slrum", "did you mean 'slurm'?"),
    ("dataset = voc", "dataset: is no KEY=VALUE: no spaces around `=`; did you mean dataset=voc?"),
    ("dataset =voc", "did you mean dataset=voc?"),
    ("task=check “dataset=voc”", "did you mean dataset=voc?"),
    ("–-cfg job", "did you mean --cfg?"),
    ("task=check dataset=folder dataset.classes=a,b", "'dataset.classes=[a,b]'; -m starts one job for each"),
    ("task=check dataset=folder dataset.range=0,4095", "'dataset.range=[0,4095]'; -m"),
]


@pytest.mark.parametrize(("typed", "advice"), MEANT)
def test_a_message_says_what_was_meant(inside, typed, advice):
    code, said = inside(*typed.split())
    assert code == 2 and advice in said and said.startswith("error: ") and said.count("\n") == 1, said
    assert not any(word in said for word in ("+train", "+optim", "usage:", "struct", "Traceback")), said


@pytest.mark.parametrize(
    "typed",
    (
        "task=train --cfg job dataset=voc", "--cfg job task=train dataset=voc", "task=train dataset=voc --cfg=job",
        "task=train -c job -p dataset dataset=voc",
    ),
)  # fmt: skip
def test_options_may_stand_anywhere(inside, typed):
    code, said = inside(*typed.split())
    assert code == 0 and "neco.dataset.voc" in said, said


def test_an_unreadable_option_of_ones_own_spoils_no_advice(inside, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_bytes(b"\xff\xfe not UTF-8")
    assert "did you mean 'dataset'?" in inside("datasets=coco")[1]


def test_options_are_put_before_the_rest():
    assert explain.arrange(["seed=1,2", "-m", "task=eval", "-m"]) == ["-m", "-m", "seed=1,2", "task=eval"]
    assert explain.arrange(["seed=1", "--info", "task=eval"]) == ["--info", "seed=1", "task=eval"]
    assert explain.arrange(["--info", "all", "-p", "hydra", "seed=1"]) == ["--info", "all", "-p", "hydra", "seed=1"]


def test_a_single_value_is_a_list_of_one():
    assert validate.load("task=report", "runs=x", "formats=html").run.runs == ["x"]
    assert validate.check(Target, {"k": "3"}, "eval.x") == {"k": 3}, "what is a number stays one"


@pytest.mark.parametrize(
    ("arguments", "words"), WRONG, ids=lambda value: " ".join(value) if isinstance(value[0], str) else ""
)
def test_wrong_input_is_one_message(inside, tmp_path, arguments, words):
    if arguments == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("runs on a machine without a GPU")
    code, said = inside(*arguments)
    assert code == 2, said
    assert "Traceback" not in said and said.startswith("error: "), said
    message = said.partition("error: ")[2]
    assert all(word in message for word in words), said
    assert not list(tmp_path.glob("runs/*/*")), "nothing is left behind"


def test_every_path_may_begin_with_the_home_folder(inside, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    typed = (
        "dataset.root='~/images'", "data_root='~/data'", "cache_dir='~/cache'", "checkpoint='~/runs/x'",
        "compare='~'", "eval=unsupervised", "eval.unsupervised.masks='~/masks'", "model.weights='~/x.pth'",
        "run_dir='~/run'",
    )  # fmt: skip
    loaded = validate.load("task=eval", "dataset=folder", *typed)
    values = str(loaded.run) + str(loaded.config["dataset"]["root"]) + str(loaded.config["eval"])
    values += str(loaded.config["model"]["weights"])
    assert "~" not in values and values.count(f"{tmp_path}/home") == 8
    assert loaded.config["extract"]["cache_dir"] == f"{tmp_path}/home/cache/features"
    assert validate.load("task=report", "runs=['~/a/*',b]").run.runs == [f"{tmp_path}/home/a/*", "b"]
    same = ("task=check", "dataset.train=2", "dataset.val=2", "show=1")
    assert inside(*same, "run_dir='~/one'")[0] == 0 and inside("-m", *same, "run_dir='~/two'")[0] == 0
    assert (tmp_path / "home/one/check.html").is_file() and (tmp_path / "home/two/check.html").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME", "HOME"))
def test_an_empty_variable_is_one_that_is_not_set(monkeypatch, name):
    for each in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv(name, "")
    assert validate.load().run.cache_dir != "/neco" and validate.load().run.cache_dir.endswith("/.cache/neco")
    atomic_files.normalize_environment()
    assert os.environ.get(name, "set") != "" and Path(torch.hub.get_dir()).is_absolute()
    monkeypatch.setenv("XDG_CACHE_HOME", "~/somewhere")
    atomic_files.normalize_environment()
    assert validate.load().run.cache_dir == str(Path("~/somewhere/neco").expanduser())


def test_a_working_folder_that_is_gone_is_named(inside, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()

    def gone(_: object) -> None:
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()

    monkeypatch.setattr(monkeypatch, "chdir", gone)
    before = Path.cwd()
    try:
        code, said = inside("task=check")
    finally:
        os.chdir(before)
    assert code == 2 and said.startswith("error: the working folder cannot be used") and said.count("\n") == 1


def test_debug_shows_the_traceback(inside):
    assert "Traceback" in inside("optim.lr=fast", "debug=true")[1]


def test_help_is_quick_and_names_every_option(neco):
    start = time.monotonic()
    done = neco("--help", ok=True)
    assert time.monotonic() - start < 10  # under 2 s on an idle machine; this only catches an import of torch
    for path in CONF.glob("*/[!_]*.yaml"):
        assert path.stem in done.stdout, path
    assert done.stdout.count("python -m neco ") >= 3


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['neco', '--help']; import neco.cli.main as program; program.main();"
        "print(sorted({'torch', 'hydra', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("[]"), done.stderr


def test_every_option_says_what_it_is():
    for path in CONF.rglob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# ") and len(lines[0]) > 12, path


OBJECTS = sorted(path for path in CONF.glob("*/[!_]*.yaml") if "\n_target_:" in f"\n{path.read_text()}")


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_option_fits_its_constructor(path):
    node = yaml.safe_load(path.read_text())
    target = validate.locate(node["_target_"])
    values = {
        key: value
        for key, value in node.items()
        if key not in ("_target_", "defaults") and "${" not in str(value) and value != "???"
    }
    runtime = [key for key in ("folder", "step", "device", "root") if key not in values]
    assert validate.check(target, values, path.stem, runtime).keys() == values.keys()


def test_machine_file_in_the_working_folder(inside, tmp_path):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "default.yaml").write_text("# @package _global_\ndata_root: /somewhere\n")
    assert "data_root: /somewhere" in inside("--cfg", "job")[1]


def test_machine_file_with_a_wrong_key_is_named(inside, tmp_path):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "default.yaml").write_text("# @package _global_\ntrain:\n  batch_sise: 3\n")
    _, error = inside("task=train")
    assert "train.batch_sise" in error and "batch_size" in error and "machine/default.yaml" in error


def test_machine_file_without_its_first_line_is_named(inside, tmp_path):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "default.yaml").write_text("data_root: /somewhere\n")
    assert "# @package _global_" in inside("task=train")[1]
