"""task=eval on tiny data: checkpoints and plain backbones, lists and sweeps, what is recorded."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import losses
from PIL import Image

from neco import load_backbone
from neco.config import validate
from neco.eval.overcluster import Overcluster
from neco.model.weights import weights_hash
from neco.runs.provenance import network_name
from neco.utils.errors import NecoError

FEW = ("task=eval", "dataset.train=12", "dataset.val=6", "extract.workers=0")
LIGHT = {
    "retrieval": ("eval.retrieval.augment=none", "eval.retrieval.k=5"),
    "overcluster": ("eval.overcluster.seeds=[0]", "eval.overcluster.restarts=1"),
}


@pytest.fixture
def evaluate(tmp_path, cache):
    """`evaluate("key=value", ..., folder=...)` runs task=eval in this process; returns the records."""

    def run(*overrides: str, folder: str = "eval", evals=("retrieval", "overcluster")) -> list[dict]:
        from neco.task import eval as task

        light = [f"eval=[{','.join(evals)}]", *(option for name in evals for option in LIGHT[name])]
        wanted = validate.load(*FEW, *light, f"cache_dir={cache}", f"run_dir={tmp_path / folder}", *overrides)
        task.main(wanted, task.prepare(wanted), tmp_path / folder)
        return json.loads((tmp_path / folder / "results.json").read_text())

    return run


def test_student_and_teacher_of_a_run(train, evaluate):
    folder = train("model.arch.depth=2")
    hashes = {}
    for network in ("student", "teacher"):
        (record,) = evaluate(f"checkpoint={folder}", f"weights={network}", folder=network, evals=["retrieval"])
        assert record["network"] == network
        hashes[network] = record["weights"]
        backbone = load_backbone(str(folder), weights=network)
        assert len(backbone.net.blocks) == 2, "the network is the run's, not the default"
        assert weights_hash(backbone) == record["weights"]
        assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.training
        assert backbone(torch.zeros(2, 3, 32, 48)).shape == (2, 4, 6, backbone.dim)
    assert hashes["student"] != hashes["teacher"]


def test_a_key_changes_the_network_of_the_checkpoint_and_an_option_replaces_it(train, evaluate, caplog):
    folder = train("model.arch.depth=2")
    how = {"evals": ["retrieval"]}
    (plain,) = evaluate(f"checkpoint={folder}", folder="plain", **how)
    (heads,) = evaluate(f"checkpoint={folder}", "model.arch.num_heads=2", folder="heads", **how)
    assert (plain["spec"]["arch"]["depth"], plain["spec"]["arch"]["num_heads"]) == (2, 4)
    assert (heads["spec"]["arch"]["depth"], heads["spec"]["arch"]["num_heads"]) == (2, 2)
    assert heads["weights"] == plain["weights"] and heads["metrics"] != plain["metrics"]
    assert "another network" not in caplog.text
    evaluate(f"checkpoint={folder}", "model=tiny", "model.arch.depth=2", "model.pos_interp=neco", folder="other", **how)
    assert "was made with another network; used here: pos_interp=neco (there hub)" in caplog.text


def test_a_misspelt_option_is_told_from_a_file():
    with pytest.raises(NecoError, match=r"ibot_vits17: no such file .*did you mean 'ibot_vits16'\?"):
        load_backbone("ibot_vits17")


def test_a_file_that_needs_pickle_is_read_when_trusted(train, evaluate, tmp_path):
    backbone, path = load_backbone("tiny", weights="none"), tmp_path / "old.ckpt"
    torch.save({"model": backbone.net.state_dict(), "callbacks": {NecoError: 1}}, path)
    trusting = f"checkpoint={path}", "model=tiny", "weights=auto", "trust_pickle=true"
    for run in (train, evaluate):
        with pytest.raises(NecoError, match=r"needs pickle.*neco\.utils\.errors\.NecoError.*trust_pickle=true"):
            run(*trusting[:3], folder="refused")
    (record,) = evaluate(*trusting, evals=["retrieval"])
    assert record["weights"] == weights_hash(backbone)
    assert weights_hash(load_backbone(str(path), model="tiny", trust_pickle=True)) == record["weights"]
    assert len(losses(train(*trusting))) == 4


@pytest.mark.parametrize("trains", [[], ["train.lora_rank=2"]])
def test_what_a_run_recorded_is_what_eval_finds(train, evaluate, trains):
    options = ["eval.retrieval.k=5", "eval.retrieval.memory_size=200"]
    folder = train("eval=retrieval", *options, *trains, "dataset.val=6")
    at_end = json.loads((folder / "results.json").read_text())[-1]
    assert at_end["network"] == "teacher" and at_end["step"] == 4
    (record,) = evaluate(*options, f"checkpoint={folder}", evals=["retrieval"])
    for key in ("metrics", "protocol", "weights", "dataset"):
        assert record[key] == at_end[key], key


def test_list_of_k_in_one_run(evaluate):
    (record,) = evaluate("weights=none", "eval.overcluster.k=[8,20]", evals=["overcluster"])
    assert {"8", "20"} <= {part for name in record["metrics"] for part in name.replace("k", "_").split("_")}


def test_other_values_in_the_same_folder_are_other_numbers(evaluate):
    evaluate("weights=none", "eval.overcluster.k=8", evals=["overcluster"])
    found = evaluate("weights=none", "eval.overcluster.k=20", evals=["overcluster"])
    assert [next(iter(r["metrics"])) for r in found] == ["miou_k8", "miou_k20"]
    assert len(evaluate("weights=none", "eval.overcluster.k=20", "dataset.val=5", evals=["overcluster"])) == 3


def test_numbers_belong_to_what_files_hold_not_to_their_size_time_and_place(tmp_path, monkeypatch):
    from PIL import Image

    from neco.task import eval as task

    for kind in ("i", "m"):
        (tmp_path / "a" / kind).mkdir(parents=True)
        for n in range(6):
            grey = n % 2 if kind == "m" else 40 * n
            Image.new("L", (16, 16), grey).save(tmp_path / "a" / kind / f"{n}.png", "BMP")

    def records(root="a") -> list[dict]:
        place = [f"dataset.root={tmp_path}/{root}/i", f"dataset.masks={tmp_path}/{root}/m", "dataset.val_fraction=1"]
        wanted = validate.load(
            "task=eval", "extract.workers=0", "eval=overcluster", *LIGHT["overcluster"], "weights=none",
            "eval.overcluster.k=2", "dataset=folder", "dataset.classes=[a,b]", f"cache_dir={tmp_path}/cache", *place,
        )  # fmt: skip
        task.main(wanted, task.prepare(wanted), tmp_path / "run")
        return json.loads((tmp_path / "run/results.json").read_text())

    def replace(path, grey) -> None:
        before = path.stat()
        Image.new("L", (16, 16), grey).save(path, "BMP")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns

    assert len(records()) == len(records()) == 1
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)  # another disk, new times
    assert len(records("b")) == 1
    replace(tmp_path / "b/m/0.png", 1)
    found = records("b")
    assert len(found) == 2 and found[0]["metrics"] != found[1]["metrics"]
    replace(tmp_path / "b/i/0.png", 250)
    assert len(records("b")) == 3
    assert len(records("a")) == 3, "that number is still known"

    def edited(*values, **keys):
        replace(tmp_path / "a/m/1.png", 0)
        return real(*values, **keys)

    real = Overcluster.__call__
    replace(tmp_path / "a/m/3.png", 0)
    monkeypatch.setattr(Overcluster, "__call__", edited)
    assert records("a")[-1]["asked"].startswith("changed"), "measured while a file was edited"
    monkeypatch.undo()
    assert len(records("a")) == len(records("a")) == 5


def test_a_folder_holds_runs_of_one_task(train, evaluate):
    folder = train()
    before = (folder / "config.yaml").read_text()
    with pytest.raises(NecoError, match=r"run_dir=.*run holds a run of task=train; give task=eval a folder"):
        evaluate("weights=none", folder="run")
    assert (folder / "config.yaml").read_text() == before


def test_same_seed_same_numbers_from_the_cache_too(evaluate):
    first = evaluate("weights=none", folder="one")
    second = evaluate("weights=none", folder="two")
    plain = evaluate("weights=none", "extract.cache_dir=null", folder="three")
    assert [r["metrics"] for r in first] == [r["metrics"] for r in second] == [r["metrics"] for r in plain]
    assert {r["evaluation"] for r in first} == {"retrieval", "overcluster"}


def test_unlabelled_data_cannot_be_evaluated(tmp_path, cache):
    from neco.task import eval as task

    wanted = validate.load("task=eval", "weights=none", "dataset=coco", f"cache_dir={cache}")
    with pytest.raises(NecoError, match="no labels"):
        task.prepare(wanted)


@pytest.mark.slow
def test_multirun_sweeps_models_and_k(neco, tmp_path):
    sweep = ["model=tiny,dino_vits16", "eval.overcluster.k=9,12"]
    neco("-m", *FEW, *LIGHT["overcluster"], "weights=none", "eval=overcluster", "run_dir=out", *sweep, ok=True)
    found = {}
    for job in (f"model-{model}+k-{k}" for model in ("tiny", "dino_vits16") for k in (9, 12)):
        (record,) = json.loads((tmp_path / "out" / job / "results.json").read_text())
        overrides = (tmp_path / "out" / job / "overrides.txt").read_text().split()
        found[tuple(o for o in overrides if o.startswith(("model=", "eval.overcluster.k=")))] = record["weights"]
    assert len(found) == 4 and len(set(found.values())) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["eval.overcluster.k=99999999"], "k=99999999"),
        (["eval.retrieval.memory_size=2"], "memory_size=2"),
        (["eval.retrieval.size=100"], "96 or 104"),
    ],
)
def test_what_would_fail_later_fails_at_once(cache, options, words):
    from neco.task import train as task

    wanted = validate.load("dataset.train=12", "dataset.val=6", f"cache_dir={cache}", *options)
    with pytest.raises(NecoError, match=words):
        task.prepare(wanted)


def test_weights_that_do_not_fit_are_named_before_a_network_is_built(cache, tmp_path, monkeypatch):
    """What a file says of itself is compared with its tensors first, and so is what was chosen for it."""
    from neco.task import eval as task

    wide = {"_target_": "neco.model.backbone.Backbone", "name": "vit_tiny_patch16_224", "size": 64}
    state = {"student.backbone.net.patch_embed.proj.weight": torch.zeros(1)}
    held = {
        "state_dict": state,
        "neco": {"config": {"model": {**wide, "arch": {"embed_dim": 65536, "depth": 9, "num_heads": 1}}}},
    }
    torch.save(held, tmp_path / "x.ckpt")
    monkeypatch.setattr(task, "build", None)
    chosen = ("eval=retrieval", *LIGHT["retrieval"], f"cache_dir={cache}")
    for options, words in (
        ([f"checkpoint={tmp_path / 'x.ckpt'}"], r"x\.ckpt .* does not fit vit_tiny_patch16_224: \d+ keys"),
        ([f"checkpoint={tmp_path / 'x.ckpt'}", "model=tiny"], "does not fit vit_tiny_patch16_224"),
        ([f"compare={tmp_path / 'x.ckpt'}"], "^compare: .* does not fit vit_tiny_patch16_224"),
    ):
        with pytest.raises(NecoError, match=words):
            task.prepare(validate.load(*FEW, *chosen, *options))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["model=mocov3_vits16"], "mocov3_vits16 (vit_small_patch16_224)"),
        (["model=dino_vits16"], "dino_vits16 (vit_small_patch16_224)"),
        (["model=tiny", "model.name=vit_small_patch16_224.dino"], "vit_small_patch16_224"),
    ],
)
def test_a_network_is_not_called_by_other_weights_of_timm(options, name):
    wanted = validate.load(*FEW, *options)
    assert network_name(wanted, wanted.config["model"]) == name


def test_run_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(NecoError, match="a run without a checkpoint"):
        load_backbone(str(tmp_path))


def test_classes_in_no_mask_of_val_are_warned_of_and_the_record_keeps_it(inside, tmp_path):
    for split in ("train", "val"):
        for number in range(10):  # more than the look before the run takes
            mask = np.zeros((32, 32), np.uint8)
            mask[:8] = 255
            if split == "train" or number == 5:
                mask[20:] = 1
            image = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            for kind, array in (("images", image), ("masks", mask)):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / kind / split / f"{number}.png")
    given = ["task=eval", "model=tiny", "eval=[retrieval,overcluster]", "eval.retrieval.size=32", "dataset=folder"]
    given += ["dataset.root=images", "dataset.masks=masks", "dataset.classes=[a,b,c]", "report=false", "run_dir=run"]
    code, said = inside(*given)
    assert code == 0, said
    text = "1 of 3 classes occur in no mask of val: c"
    records = json.loads((tmp_path / "run/results.json").read_text())
    assert [record["warnings"] for record in records] == [[text], [text]]
    assert f"retrieval: {text}" in said and f"warning   {text}" in said


def test_a_record_keeps_that_its_images_were_nearly_black(inside, tmp_path):
    for number in range(4):
        deep = np.random.default_rng(number).integers(0, 4096, (32, 32), np.uint16)  # 12 of 16 bits
        for kind, array in (("images", deep), ("masks", (deep > 2000).astype(np.uint8))):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / kind / f"{number}.png")
    given = ["task=eval", "model=tiny", "eval=overcluster", "eval.overcluster.size=32", "dataset=folder"]
    given += ["dataset.root=images", "dataset.masks=masks", "dataset.classes=[a,b]", "dataset.val_fraction=0.5"]
    code, said = inside(*given, "report=false", "run_dir='läufe'")
    assert code == 0, said
    (record,) = json.loads((tmp_path / "läufe/results.json").read_text())
    assert any("val: 2 of 2 images looked at are nearly one value" in text for text in record["warnings"])
    assert "run_dir: läufe\n" in (tmp_path / "läufe/config.yaml").read_text("utf-8"), "as it was typed, not escaped"
    code, said = inside(*given, "dataset.range=[0,4095]", "report=false", "run_dir=right")
    assert code == 0 and "warnings" not in json.loads((tmp_path / "right/results.json").read_text())[0], said
