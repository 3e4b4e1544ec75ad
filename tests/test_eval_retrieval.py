"""Retrieval against the published worked example and against a slow, obvious second implementation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from eval_support import Conv, Files, Noise, Perfect, noisy, reorder, striped
from PIL import Image

from neco.config.types import MEAN, STD
from neco.dataset.base import Sample, read_label
from neco.eval import retrieval
from neco.eval.common.neighbors import Neighbours
from neco.eval.overcluster import Overcluster
from neco.eval.retrieval import Retrieval
from neco.features.extractor import Extract
from neco.utils.errors import NecoError

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT.parent / "shared" / "examples" / "retrieval_vote.npz"
EXACT = {"augment": "none", "engine": "torch"}
HERE = Extract(workers=0, batch_size=3)


@pytest.fixture
def dataset(tmp_path: Path) -> Files:
    """Odd sizes, void, and class 4 of 5 in train only."""
    rng = np.random.default_rng(0)
    splits = {split: [noisy(rng, 41 + i, 57 - 2 * i, n) for i in range(4)] for split, n in (("train", 5), ("val", 4))}
    splits["train"][0][1][:20] = 255  # patches that are void altogether
    return Files(tmp_path, 5, **splits)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="runs beside ../shared/examples")
def test_published_worked_example() -> None:
    example = {name: torch.from_numpy(value) for name, value in np.load(EXAMPLE).items()}
    labels = retrieval.soft_labels(example["mask"][:, 0], 2, 5, "reference")
    assert torch.equal(labels, example["soft_label"])
    assert torch.equal(retrieval.patch_scores(labels).float(), example["patch_scores"])  # before the random factor
    queries = torch.nn.functional.normalize(example["query"].flatten(0, 1), dim=1)
    for engine in ("faiss", "torch"):
        near, where = Neighbours(example["memory"], engine=engine)(queries, 30)
        assert torch.equal(where, example["nn_idx"])
        voted = retrieval.vote(near, example["memory_labels"][where], 0.02)
        torch.testing.assert_close(voted, example["label_hat"].flatten(0, 1), atol=1e-5, rtol=0)


def test_soft_labels_and_scores_by_hand() -> None:
    mask = torch.tensor([[[0, 0, 1, 255], [0, 2, 1, 1], [255, 255, 0, 0], [255, 255, 0, 255]]])
    labels = retrieval.soft_labels(mask, 2, 3)
    assert labels[0].tolist() == [[[0.75, 0, 0.25], [0, 0.75, 0]], [[0, 0, 0], [0.75, 0, 0]]]
    uniform = torch.tensor([[[0.5, 1.0], [0.1, 0.2]]])
    scores = retrieval.patch_scores(labels, uniform)[0].tolist()  # class 0 in 2 patches, 1 in 1, 2 in 1
    assert scores == [[pytest.approx(1.5), pytest.approx(1.0)], [math.inf, pytest.approx(0.4)]]
    reference = retrieval.soft_labels(mask, 2, 3, "reference")[0].tolist()
    assert reference == [[[0.75, 0, 0.25], [0.25, 0.75, 0]], [[1, 0, 0], [1, 0, 0]]]
    with pytest.raises(ValueError, match="masks hold 2, but there are 2 classes"):
        retrieval.soft_labels(mask, 2, 2)


def test_vote_is_a_softmax_mean() -> None:
    rng = np.random.default_rng(0)
    near, labels = rng.uniform(-1, 1, (3, 4)), rng.random((3, 4, 2))
    found = retrieval.vote(torch.tensor(near), torch.tensor(labels), 0.1)
    for q in range(3):
        weights = [math.exp(s / 0.1) for s in near[q]]
        for c in range(2):
            wanted = sum(w * labels[q, i, c] for i, w in enumerate(weights)) / sum(weights)
            assert found[q, c] == pytest.approx(wanted)
    assert retrieval.vote(torch.tensor([[1.0, -1.0]]), torch.tensor([[[1.0, 0], [0, 1]]]), 1e-6).tolist() == [[1, 0]]


def slow_miou(dataset: Files, backbone: Conv, size: int, k: int, reference: bool) -> float:
    """The whole protocol, a patch and a pixel at a time, from the words of the protocol."""
    classes, patch = len(dataset.classes), backbone.patch
    side = size // patch
    std = (0.229, 0.224, 0.255) if reference else STD

    def read(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        image = Image.open(sample.image).resize((size, size), Image.Resampling.BILINEAR)
        pixels = (np.asarray(image) / 255 - MEAN) / std
        with torch.no_grad():
            features = (
                backbone.project(torch.tensor(pixels).permute(2, 0, 1)[None].float())[0].permute(1, 2, 0).double()
            )
        mask = read_label(dataset, sample)
        offset = 0 if reference else 0.5
        rows, columns = ([int((i + offset) * n / size) for i in range(size)] for n in mask.shape)
        return features.numpy(), mask[rows][:, columns]

    memory, labels = [], []
    for sample in dataset.samples("train"):
        features, mask = read(sample)
        for i in range(side):
            for j in range(side):
                pixels = mask[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].flatten().tolist()
                if reference:
                    pixels = [0 if p == 255 else p for p in pixels]
                share = [pixels.count(c) / patch**2 for c in range(classes)]
                if sum(share):
                    memory.append(features[i, j] / np.linalg.norm(features[i, j]))
                    labels.append(share)
    pairs = []
    for sample in dataset.samples("val"):
        features, mask = read(sample)
        voted = np.zeros((side, side, classes))
        for i in range(side):
            for j in range(side):
                query = features[i, j] / np.linalg.norm(features[i, j])
                near = sorted(
                    ((float(query @ m), label) for m, label in zip(memory, labels, strict=True)), reverse=True
                )[:k]
                weights = [math.exp((s - near[0][0]) / 0.02) for s, _ in near]
                voted[i, j] = sum(w * np.array(label) for w, (_, label) in zip(weights, near, strict=True)) / sum(
                    weights
                )

        def along(value: float) -> tuple[int, int, float]:  # half-pixel centres, clamped at the border
            position = max((value + 0.5) / patch - 0.5, 0)
            low = int(position)
            return low, min(low + 1, side - 1), position - low

        for y in range(size):
            top, bottom, v = along(y)
            for x in range(size):
                left, right, u = along(x)
                upper = (1 - u) * voted[top, left] + u * voted[top, right]
                lower = (1 - u) * voted[bottom, left] + u * voted[bottom, right]
                pairs.append((int(((1 - v) * upper + v * lower).argmax()), int(mask[y, x])))
    pairs = [(p, t) for p, t in pairs if t != 255]

    def iou(value: int, label: int) -> float:
        both = sum(p == value and t == label for p, t in pairs)
        either = sum(p == value or t == label for p, t in pairs)
        return both / either if either else math.nan

    if reference:
        from itertools import permutations

        table = np.nan_to_num([[iou(v, c) for c in range(classes)] for v in range(classes)])
        return max(np.mean([table[v, c] for c, v in enumerate(p)]) for p in permutations(range(classes)))
    return float(np.nanmean([iou(c, c) for c in range(classes)]))


@pytest.mark.parametrize("engine", ["faiss", "torch"])
@pytest.mark.parametrize("compat", ["standard", "reference"])
def test_equals_the_slow_implementation(dataset: Files, compat: str, engine: str) -> None:
    backbone = Conv(8)
    evaluation = Retrieval(compat=compat, size=32, k=5, augment="none", engine=engine)
    found = evaluation(backbone, dataset, extract=HERE)
    wanted = slow_miou(dataset, backbone, 32, 5, compat == "reference")
    assert found.metrics["miou_k5"] == pytest.approx(wanted, abs=1e-9)
    assert 0.05 < wanted < 0.9


def stripes(folder: Path, images: int = 6) -> Files:
    rng = np.random.default_rng(1)
    return Files(
        folder, 5, 64, **{split: [striped(rng, 64, 8, 5) for _ in range(images)] for split in ("train", "val")}
    )


@pytest.mark.parametrize("compat", ["standard", "reference"])
def test_perfect_features_give_one_and_noise_gives_chance(tmp_path: Path, compat: str) -> None:
    dataset, evaluation = stripes(tmp_path), Retrieval(compat=compat, **EXACT)
    perfect = evaluation(Perfect(8, 5), dataset, extract=HERE)
    assert perfect.metrics == {"miou_k30": 1.0}
    assert set(perfect.details["miou_k30"]["iou"].values()) == {1.0}
    assert evaluation(Noise(8), dataset, extract=HERE).metrics["miou_k30"] < 0.2  # chance: 1/9


def test_augmented_memory_still_knows(tmp_path: Path) -> None:
    found = Retrieval(engine="torch")(Perfect(8, 5), stripes(tmp_path), extract=HERE)
    assert found.metrics["miou_k30"] > 0.8
    assert found.details["miou_k30"]["memory"] == 2 * 6 * 64


def test_batch_size_workers_order_and_engine_change_nothing(dataset: Files) -> None:
    values = {"size": 32, "k": [1, 7], "passes": 2, "memory_size": 60}
    first = Retrieval(**values)(Conv(8), dataset, extract=HERE, seed=3)
    for split in dataset.rows.values():
        split.reverse()
    for engine, extract in (("faiss", Extract(batch_size=1, workers=2)), ("torch", Extract(batch_size=4, workers=0))):
        other = Retrieval(engine=engine, **values)(Conv(8), dataset, extract=extract, seed=3)
        assert other.metrics == pytest.approx(first.metrics, abs=1e-9) and other.protocol == first.protocol
    assert Retrieval(**values)(Conv(8), dataset, extract=HERE, seed=4).metrics != first.metrics


def test_permuted_images_change_nothing(dataset: Files) -> None:
    first = Retrieval(size=32, k=7, **EXACT)(Conv(8), dataset, extract=HERE)
    reorder(dataset, "train", "val")
    other = Retrieval(size=32, k=7, **EXACT)(Conv(8), dataset, extract=HERE)
    assert other.metrics == pytest.approx(first.metrics, abs=1e-9)


def test_no_random_state_is_touched(dataset: Files) -> None:
    backbone = Conv(8)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Retrieval(size=32, engine="torch")(backbone, dataset, extract=HERE)
    Overcluster(size=32, engine="torch", restarts=1, seeds=(0,))(backbone, dataset, extract=HERE)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_several_k_from_one_search_equal_single_ones(dataset: Files) -> None:
    both = Retrieval(size=32, k=[9, 2], **EXACT)(Conv(8), dataset, extract=HERE)
    assert list(both.metrics) == ["miou_k2", "miou_k9"]
    for k in (2, 9):
        single = Retrieval(size=32, k=k, **EXACT)(Conv(8), dataset, extract=HERE)
        assert single.metrics[f"miou_k{k}"] == both.metrics[f"miou_k{k}"]


def test_classes_that_occur_nowhere(dataset: Files) -> None:
    dataset.classes += ("never",)
    found = {
        compat: Retrieval(compat=compat, size=32, **EXACT)(Conv(8), dataset, extract=HERE)
        for compat in ("standard", "reference")
    }
    for result in found.values():
        assert result.details["miou_k30"]["iou"]["never"] in (None, 0.0)
    iou = found["standard"].details["miou_k30"]["iou"]
    assert found["standard"].metrics["miou_k30"] == pytest.approx(np.mean([v for v in iou.values() if v is not None]))
    iou = found["reference"].details["miou_k30"]["iou"]
    assert found["reference"].metrics["miou_k30"] == pytest.approx(sum(v or 0 for v in iou.values()) / 6)


def test_void_has_no_place_in_the_standard_memory_and_is_background_in_the_other(dataset: Files) -> None:
    sizes = {
        compat: Retrieval(compat=compat, size=32, k=1, **EXACT)(Conv(8), dataset, extract=HERE).details["miou_k1"][
            "memory"
        ]
        for compat in ("standard", "reference")
    }
    assert sizes["reference"] == 4 * 16 and 4 * 16 - 16 <= sizes["standard"] < 4 * 16


def test_bounded_memory_keeps_its_share_of_each_image_and_rare_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), int)
    mask[8:16, 40:48] = 1  # one patch of 64
    dataset = Files(tmp_path, 2, 64, **{s: [(rng.integers(0, 256, (64, 64, 3)), mask)] * 4 for s in ("train", "val")})
    kept = 0
    for seed in range(10):
        evaluation = Retrieval(size=64, k=1, memory_size=17, **EXACT)
        _, share, samples, _ = evaluation.plan(8, dataset)
        memory, labels, _ = evaluation._remember(Conv(8), dataset, samples, 64, share, HERE, seed)
        assert share == 4 and memory.shape == (16, 12) and labels.shape == (16, 2)
        torch.testing.assert_close(memory.norm(dim=1), torch.ones(16))
        kept += int(labels[:, 1].sum())
    assert kept > 30  # of 40; 2.5 if drawn evenly


def test_more_memory_than_patches_is_all_of_them(dataset: Files) -> None:
    everything = Retrieval(size=32, k=3, memory_size=None, **EXACT)(Conv(8), dataset, extract=HERE)
    plenty = Retrieval(size=32, k=3, memory_size=10**6, **EXACT)(Conv(8), dataset, extract=HERE)
    assert plenty.metrics == everything.metrics and plenty.protocol != everything.protocol


def test_zero_features_are_no_nan(dataset: Files) -> None:
    backbone = Conv(8)
    for parameter in backbone.parameters():
        parameter.data.zero_()
    assert 0 <= Retrieval(size=32, **EXACT)(backbone, dataset, extract=HERE).metrics["miou_k30"] < 0.5


def test_reference_leaves_out_the_last_partial_batch(dataset: Files) -> None:
    found = Retrieval(compat="reference", size=32, drop_last=3, **EXACT)(Conv(8), dataset, extract=HERE)
    for split in dataset.rows:
        dataset.rows[split] = dataset.rows[split][:3]
    wanted = Retrieval(compat="reference", size=32, **EXACT)(Conv(8), dataset, extract=HERE)
    assert found.metrics == wanted.metrics and found.protocol == wanted.protocol + "/drop_last=3"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": 30}, "size=30 is no multiple"),
        ({"memory_size": 3}, "memory_size=3 is less than one entry for each of 4 images"),
        ({"k": 65, "size": 32}, "k=65 nearest of at most 64"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(dataset: Files, values: dict, says: str) -> None:
    def unused(images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("an image was read")

    unused.patch, unused.dim = 8, 4
    with pytest.raises(NecoError, match=says):
        Retrieval(augment="none", **values)(unused, dataset, extract=HERE)


@pytest.mark.parametrize(
    ("values", "says"), [({"k": []}, r"k=\[\]"), ({"drop_last": 64}, "compat=standard uses every image")]
)
def test_values_that_do_not_fit_together(values: dict, says: str) -> None:
    with pytest.raises(NecoError, match=says):
        Retrieval(**values)


OTHERS = {
    "compat": "reference",
    "size": 40,
    "k": [1, 4],
    "temperature": 1.0,
    "augment": "none",
    "passes": 3,
    "memory_size": 40,
    "engine": "torch",
    "drop_last": 3,
    "storage": "float16",
    "bank_dir": "bank",
    "cells": 3,
    "probes": 1,
}
FIRST = {  # what an option needs beside it to matter
    "drop_last": {"compat": "reference", "augment": "none", "k": 4},
    "cells": {"probes": 1},
    "probes": {"cells": 3},
}


@pytest.mark.parametrize("key", OTHERS)
def test_every_option_of_the_yaml_does_something(dataset: Files, key: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = yaml.safe_load((ROOT / "conf/eval/retrieval.yaml").read_text())
    assert options.pop("_target_") == "neco.eval.retrieval.Retrieval" and options.keys() == OTHERS.keys()
    dataset.image_size = 32
    base = options | FIRST.get(key, {})
    before = Retrieval(**base)(Conv(8), dataset, extract=HERE)
    after = Retrieval(**base | {key: OTHERS[key]})(Conv(8), dataset, extract=HERE)
    if key in ("engine", "bank_dir"):
        assert after.metrics == pytest.approx(before.metrics, abs=1e-9) and after.protocol == before.protocol
    elif key == "storage":
        assert after.metrics == pytest.approx(before.metrics, abs=0.02) and after.protocol != before.protocol
    else:
        assert after.metrics != before.metrics and after.protocol != before.protocol
