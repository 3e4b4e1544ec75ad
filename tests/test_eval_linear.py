"""Linear segmentation against the published procedure written out plainly, its controls, and saved heads."""

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F
import yaml
from eval_support import Conv, Files, Noise, Perfect, noisy, reorder, striped
from PIL import Image
from torch import nn

from neco.config import validate
from neco.config.types import MEAN, STD
from neco.eval.common import heads
from neco.eval.evaluation import Trained
from neco.eval.linear import Linear
from neco.eval.runner import save
from neco.features.extractor import Draw, Extract
from neco.utils.errors import NecoError
from neco.utils.random import generator

ROOT = Path(__file__).parents[1]
HERE = Extract(workers=0, batch_size=3)
QUICK = {"size": 32, "epochs": 3, "drop_epoch": 2, "batch_size": 4, "lr": 0.003}


@pytest.fixture
def dataset(tmp_path: Path) -> Files:
    """Odd sizes, void, class 4 of 5 nowhere, and a last batch of one image."""
    rng = np.random.default_rng(0)
    pairs = [noisy(rng, 41 + 7 * i, 67 - 5 * i, 4) for i in range(8)]
    return Files(tmp_path, 5, train=pairs[:5], val=pairs[5:])


def bands(folder: Path) -> Files:
    """Wide stripes, so that few patches of a crop hold two classes; void at edges, where interpolation decides."""
    rng = np.random.default_rng(1)
    pairs = [striped(rng, 128, 32, 3) for _ in range(16)]
    for _, mask in pairs:
        mask[:, ::32] = mask[:, 31::32] = 255
    return Files(folder, 3, 128, train=pairs[:12], val=pairs[12:])


def tokens_of(backbone: Conv, image: Image.Image, size: int) -> torch.Tensor:
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    with torch.no_grad():
        return backbone.project(torch.tensor((pixels / 255 - MEAN) / STD).permute(2, 0, 1)[None].float())


def mask_of(mask: Image.Image, size: int, at: int) -> torch.Tensor:
    pick = [int(i * size / at) for i in range(at)]
    return torch.tensor(np.asarray(mask.resize((size, size), Image.Resampling.NEAREST))[pick][:, pick]).long()


def slow(dataset: Files, backbone: Conv, kind: str, reference: bool, seed: int) -> tuple[nn.Module, float]:
    """The published procedure: tokens upsampled, a convolution on them, torch.optim.SGD; the head and its mIoU."""
    classes, size, at = len(dataset.classes), 32, 100 if reference else 32
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "linear":
            head: nn.Module = nn.Conv2d(backbone.dim, classes, 1)
        else:
            blocks = [(nn.Conv2d(d, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512), nn.ReLU()) for d in (12, 512)]
            head = nn.Sequential(*blocks[0], *blocks[1], nn.Conv2d(512, classes, 1))

    def logits(tokens: torch.Tensor, at: int) -> torch.Tensor:
        if kind == "fcn":
            return F.interpolate(head(tokens), size=(at, at), mode="bilinear")
        return head(F.interpolate(tokens, size=(at, at), mode="bilinear"))

    def miou() -> float:
        seen = []
        for sample in dataset.samples("val"):
            predicted = logits(tokens_of(backbone, Image.open(sample.image), size), at).argmax(1)[0]
            seen.append((predicted, mask_of(Image.open(sample.mask), size, at)))
        predicted, target = (torch.stack(maps) for maps in zip(*seen, strict=True))
        predicted, target = predicted[target != 255], target[target != 255]
        either = [((predicted == c) | (target == c)).sum() for c in range(classes)]
        both = [((predicted == c) & (target == c)).sum() for c in range(classes)]
        iou = [float(b / e) for b, e in zip(both, either, strict=True) if e]
        return sum(iou) / (classes if reference else len(iou))

    optimiser = torch.optim.SGD(head.parameters(), lr=0.003, momentum=0.9, weight_decay=0.0001)
    best: tuple[float, nn.Module] = (-1.0, head)
    for epoch in range(3):
        optimiser.param_groups[0]["lr"] = 0.0003 if epoch >= 2 else 0.003
        order = generator(seed, epoch, "order").permutation(5)
        for batch in (order[:4], order[4:]):
            draw, tokens, masks = Draw((0.8, 1.0), seed, epoch, flips=True), [], []
            for sample in (dataset.samples("train")[i] for i in batch):
                image, mask = (draw.cut(sample.key, Image.open(ref)) for ref in (sample.image, sample.mask))
                tokens.append(tokens_of(backbone, image, size))
                masks.append(mask_of(mask, size, 100))
            loss = nn.CrossEntropyLoss(ignore_index=255)(logits(torch.cat(tokens), 100), torch.stack(masks))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        head.eval()
        score = miou()
        if score > best[0] or not reference:
            best = score, copy.deepcopy(head)
        head.train()
    return best[1], best[0]


@pytest.mark.parametrize("kind, compat", [("linear", "standard"), ("linear", "reference"), ("fcn", "standard")])
def test_equals_the_slow_implementation(dataset: Files, kind: str, compat: str) -> None:
    backbone, state = Conv(8), torch.get_rng_state()
    found = Linear(head_kind=kind, compat=compat, **QUICK)(backbone, dataset, extract=HERE, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    head, score = slow(dataset, backbone, kind, compat == "reference", 7)
    mine = [value for key, value in found.heads["miou"].tensors.items() if "num_batches" not in key]
    theirs = [value for key, value in head.state_dict().items() if "num_batches" not in key]
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert found.metrics["miou"] == pytest.approx(score, abs=1e-6)
    assert found.protocol.startswith(
        f"linear/{compat}/32/at={100 if compat == 'reference' else 32}/head={kind}/lr=0.003"
    )


BANDS = {"epochs": 12, "lr": 1.0, "batch_size": 4}


@pytest.mark.parametrize("compat", ["standard", "reference"])
def test_perfect_features_give_one_and_noise_gives_chance(tmp_path: Path, compat: str) -> None:
    dataset = bands(tmp_path)
    assert Linear(compat=compat, **BANDS)(Perfect(8, 3), dataset, extract=HERE).metrics["miou"] > 0.99
    assert Linear(compat=compat, **BANDS)(Noise(8), dataset, extract=HERE).metrics["miou"] < 0.3


@pytest.mark.parametrize("draws", [None, 2])
def test_shuffled_labels_stay_at_chance(tmp_path: Path, draws: int | None) -> None:
    found = Linear(shuffled=True, draws=draws, **BANDS)(Perfect(8, 3), bands(tmp_path), extract=HERE)
    assert found.metrics["miou"] < 0.35 and found.protocol.endswith("/shuffled")


def test_batch_size_workers_and_order_of_files_change_nothing(dataset: Files) -> None:
    first = Linear(**QUICK)(Conv(8), dataset, extract=HERE)
    for rows in dataset.rows.values():
        rows.reverse()
    other = Linear(**QUICK)(Conv(8), dataset, extract=Extract(batch_size=1, workers=2))
    for key, value in first.heads["miou"].tensors.items():
        torch.testing.assert_close(value, other.heads["miou"].tensors[key], atol=1e-5, rtol=1e-5)
    assert other.metrics == pytest.approx(first.metrics, abs=1e-3)
    reorder(dataset, "val")
    assert Linear(**QUICK)(Conv(8), dataset, extract=HERE).metrics == pytest.approx(first.metrics, abs=1e-9)
    seeded = Linear(**QUICK)(Conv(8), dataset, extract=HERE, seed=1)
    weights = [found.heads["miou"].tensors["0.weight"] for found in (seeded, first)]
    assert not torch.allclose(*weights, atol=1e-3)


def test_heads_of_several_rates_are_those_of_single_ones(dataset: Files) -> None:
    rates = [0.001, 0.01, 0.003]
    several = Linear(**QUICK | {"lr": rates})(Conv(8), dataset, extract=HERE)
    assert [*several.metrics] == ["miou", "miou_lr0.001", "miou_lr0.003", "miou_lr0.01"]
    for lr in rates:
        single = Linear(**QUICK | {"lr": lr})(Conv(8), dataset, extract=HERE)
        assert several.metrics[f"miou_lr{lr:g}"] == single.metrics["miou"]
        assert several.details[f"miou_lr{lr:g}"] == single.details["miou"]
        mine, alone = several.heads[f"miou_lr{lr:g}"], single.heads["miou"]
        torch.testing.assert_close(mine.tensors, alone.tensors)
        assert mine.about == alone.about
    assert "/miou=lr0.01" in several.protocol and several.heads.keys() == {f"miou_lr{lr:g}" for lr in rates}
    assert several.metrics["miou"] == several.metrics["miou_lr0.01"]  # the published one, not the best


def test_a_held_out_part_of_train_chooses(tmp_path: Path) -> None:
    dataset = bands(tmp_path)
    wanted = Linear(**BANDS | {"lr": [1e-4, 1e-3, 1.0], "choose": "train_holdout"})
    _, train, held, *_ = wanted.plan(8, dataset)
    assert len(held) == 1 and sorted(s.key for s in train + held) == sorted(s.key for s in dataset.samples("train"))
    found = wanted(Perfect(8, 3), dataset, extract=HERE)
    by = {entry["lr"]: entry["held_out"] for entry in found.details.values()}
    assert found.details["miou"]["lr"] == max(by, key=by.get) == 1.0 and by[1.0] > 0.9 > by[1e-4]
    assert found.metrics["miou"] == found.metrics["miou_lr1"] and "/choose=train_holdout" in found.protocol


def test_fixed_draws_come_from_the_cache(dataset: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = Extract(workers=0, batch_size=2, cache_dir=str(tmp_path / "cache"))
    fresh = Linear(**QUICK)(Conv(8), dataset, extract=cached)
    assert len([*(tmp_path / "cache").glob("*.npy")]) == 1  # val: new crops are not kept
    every = Linear(**QUICK, draws=3)(Conv(8), dataset, extract=HERE)
    torch.testing.assert_close(every.heads["miou"].tensors, fresh.heads["miou"].tensors)
    two = Linear(**QUICK, draws=2)(Conv(8), dataset, extract=cached)
    assert len([*(tmp_path / "cache").glob("*.npy")]) == 3
    assert not torch.equal(two.heads["miou"].tensors["0.weight"], fresh.heads["miou"].tensors["0.weight"])
    assert two.protocol.startswith("linear_cached/") and "/draws=2" in two.protocol
    monkeypatch.setattr(Conv, "forward", None)  # everything is there
    again = Linear(**QUICK, draws=2)(Conv(8), dataset, extract=cached)
    torch.testing.assert_close(again.heads["miou"].tensors, two.heads["miou"].tensors)


def test_every_image_gets_the_mask_of_another() -> None:
    for count in (2, 3, 50):
        found = heads.mates(count, 0)
        assert sorted(found) == [*range(count)] and (found != np.arange(count)).all()


def test_rows_are_regrouped_in_order() -> None:
    rows = torch.arange(11.0)[:, None]
    sizes = [0, 4, 4, 0, 3]
    parts = list(zip(rows.split(3), rows.split(3), strict=True))
    groups = [*heads.regroup(parts, sizes, (rows[:0], rows[:0]))]
    assert [len(tokens) for tokens, _ in groups] == sizes
    assert all(torch.equal(tokens, masks) for tokens, masks in groups)
    assert torch.equal(torch.cat([tokens for tokens, _ in groups]), rows)


def test_batches_without_a_label_do_not_harm(dataset: Files) -> None:
    logits, masks = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((2, 4, 4), 255)
    assert heads.cross_entropy(logits, masks) == 0
    masks[0, 0] = 3
    torch.testing.assert_close(heads.cross_entropy(logits, masks), F.cross_entropy(logits, masks, ignore_index=255))
    void = Image.fromarray(np.full_like(np.array(Image.open(dataset.rows["train"][0].mask)), 255))
    void.save(dataset.rows["train"][0].mask)
    found = Linear(**QUICK | {"batch_size": 1})(Conv(8), dataset, extract=HERE)
    assert found.heads["miou"].tensors["0.weight"].isfinite().all()


def test_a_rate_at_which_the_loss_diverges_is_named(dataset: Files) -> None:
    with pytest.raises(NecoError, match=r"lr=1e\+38: the loss is (nan|inf) in epoch 1; use a smaller"):
        Linear(**QUICK | {"lr": [0.01, 1e38]})(Conv(8), dataset, extract=HERE)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lr": []}, "at least one"),
        ({"lr": [0.1, 0.2]}, r"lr=\[0.1, 0.2\]: which is the headline"),
        ({"choose": "train_holdout"}, "several lr"),
        ({"choose": "train_holdout", "lr": [0.01, 0.1], "compat": "reference"}, "compat=standard"),
        ({"drop_last": 128}, "compat=standard uses every image"),
    ],
)
def test_values_that_do_not_fit_together(values: dict, says: str) -> None:
    with pytest.raises(NecoError, match=says):
        Linear(**values)


def test_what_cannot_work_is_refused_before_anything_is_read(dataset: Files) -> None:
    with pytest.raises(NecoError, match="size=30 is no multiple"):
        Linear(size=30).plan(8, dataset)
    dataset.rows["train"] = dataset.rows["train"][:1]
    with pytest.raises(NecoError, match=r"1 train images left: too few for choose=None, shuffled=True"):
        Linear(shuffled=True).plan(8, dataset)
    with pytest.raises(NecoError, match="0 train images left"):
        Linear(lr=[0.01, 0.1], choose="train_holdout").plan(8, dataset)


@pytest.mark.parametrize("kind", ["linear", "fcn"])
def test_a_saved_head_scores_the_same_alone(
    dataset: Files, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    path = tmp_path / "heads/a.safetensors"
    for compat, name in (("reference", "miou_100"), ("standard", "miou_32")):
        trained = Linear(head_kind=kind, compat=compat, **QUICK)(Conv(8), dataset, extract=HERE)
        save(trained.heads["miou"], path)
        alone = Linear(head=str(path), compat=compat)(Conv(8), dataset, extract=HERE)
        assert alone.metrics["miou"] == alone.metrics[name] == trained.metrics["miou"]
        assert [*alone.metrics] == ["miou", "miou_100", "miou_32"]
        assert alone.details["head"]["trained"] in alone.protocol and "other" not in alone.protocol
    assert "was trained on" not in caplog.text
    other = Linear(head=str(path))(Conv(8, seed=1), dataset, extract=HERE)
    assert other.protocol == f"{alone.protocol}/other_weights" and "trained on weights" in caplog.text
    assert Linear(head=str(path)).plan(8, dataset)[4] != Linear().plan(8, dataset)[4]


def test_a_head_that_does_not_fit_is_refused(dataset: Files, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    head = Linear(head=str(path))
    with pytest.raises(NecoError, match="No such file or directory; a run's are in its folder heads/"):
        head.plan(8, dataset)
    save(Trained({"x": torch.zeros(1)}, {}), path)
    with pytest.raises(NecoError, match="holds no head that eval=linear wrote"):
        head.plan(8, dataset)
    path.write_bytes(b"something else")
    with pytest.raises(NecoError, match="holds no head"):
        head.plan(8, dataset)
    save(Linear(**QUICK)(Conv(8), dataset, extract=HERE).heads["miou"], path)
    with pytest.raises(NecoError, match="takes 12 channels, the backbone gives 16"):
        head(Conv(8, dim=16), dataset, extract=HERE)
    dataset.classes = (*dataset.classes[:4], "other")
    with pytest.raises(NecoError, match="knows other classes than the data set: class 0"):
        head.plan(8, dataset)


def test_a_run_keeps_the_head_and_evaluates_it(tmp_path: Path, cache: Path) -> None:
    from neco.task import eval as task

    def evaluate(*options: str) -> list[dict]:
        few = ("task=eval", "eval=linear", "dataset.train=12", "dataset.val=4", "extract.workers=0", "weights=none")
        wanted = validate.load(*few, "eval.linear.epochs=1", f"cache_dir={cache}", f"run_dir={tmp_path}", *options)
        task.main(wanted, task.prepare(wanted), tmp_path)
        return json.loads((tmp_path / "results.json").read_text())

    (record,) = evaluate()
    path = tmp_path / record["saved"]["miou"]
    assert path.match(f"heads/linear-backbone-0-{record['asked']}-{record['weights']}-miou.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["weights"] == record["weights"] and about["trained"] == "lr=0.01/epochs=1/drop=20/batch=128"
    assert (about["size"], about["patch"], len(json.loads(about["classes"]))) == ("128", "8", 8)
    path.unlink()
    assert len(evaluate()) == 1 and path.is_file(), "a record without its head is measured again"
    alone = evaluate(f"eval.linear.head={path}")[-1]
    assert alone["metrics"]["miou"] == record["metrics"]["miou"] and "saved" not in alone
    assert len(evaluate("eval.linear.lr=0.1")) == 3 and len([*path.parent.iterdir()]) == 2


OTHERS = {
    "compat": "reference",
    "size": 40,
    "head_kind": "fcn",
    "lr": 0.1,
    "choose": "train_holdout",
    "epochs": 2,
    "drop_epoch": 1,
    "batch_size": 2,
    "draws": 1,
    "shuffled": True,
    "drop_last": 2,
    "head": "a.safetensors",
}


@pytest.mark.parametrize("key", OTHERS)
def test_every_option_of_the_yaml_does_something(
    dataset: Files, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = yaml.safe_load((ROOT / "conf/eval/linear.yaml").read_text())
    assert options.pop("_target_") == "neco.eval.linear.Linear" and options.keys() == OTHERS.keys()
    monkeypatch.chdir(tmp_path)
    dataset.image_size = 32
    more = {"drop_last": {"compat": "reference"}, "choose": {"lr": [0.01, 0.1]}}.get(key, {})
    base = options | {"epochs": 3} | more
    before = Linear(**base)(Conv(8), dataset, extract=HERE)
    if key == "head":
        save(Linear(**base | {"lr": 0.1})(Conv(8), dataset, extract=HERE).heads["miou"], Path(OTHERS[key]))
    after = Linear(**base | {key: OTHERS[key]})(Conv(8), dataset, extract=HERE)
    assert after.metrics != before.metrics and after.protocol != before.protocol
