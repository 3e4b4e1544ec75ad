"""Overclustering against the published procedure written out plainly, and its invariances."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from eval_support import Conv, Files, Noise, Perfect, noisy, reorder, striped
from PIL import Image

from neco.config.types import MEAN, STD
from neco.eval.overcluster import Overcluster
from neco.features.extractor import Extract
from neco.utils.errors import NecoError

ROOT = Path(__file__).parents[1]
HERE = Extract(workers=0, batch_size=3)
QUICK = {"size": 32, "seeds": (0, 1), "iterations": 20, "restarts": 2, "pca": 6}


@pytest.fixture
def dataset(tmp_path: Path) -> Files:
    """Odd sizes, void, and class 4 of 5 nowhere."""
    rng = np.random.default_rng(0)
    return Files(tmp_path, 5, val=[noisy(rng, 141 + 7 * i, 157 - 5 * i, 4) for i in range(6)])


def slow_mious(dataset: Files, backbone: Conv, size: int, k: int, seeds: int, reference: bool) -> list[float]:
    """The published procedure from its description, in numpy, with faiss for PCA and k-means alone."""
    faiss = pytest.importorskip("faiss", reason="runs where faiss is installed")
    features, masks = [], []
    for sample in dataset.samples("val"):
        image = np.asarray(Image.open(sample.image).resize((size, size), Image.Resampling.BILINEAR))
        pixels = torch.tensor((image / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            features.append(backbone.project(pixels)[0].permute(1, 2, 0).numpy())
        mask = np.asarray(Image.open(sample.mask).resize((size, size), Image.Resampling.NEAREST))
        pick = [int(i * size / 100) for i in range(100)]
        masks.append(mask[pick][:, pick])
    side = size // backbone.patch
    rows = np.stack(features).reshape(-1, backbone.dim)
    rows = ((rows - rows.mean(0, dtype=np.float64)) / rows.std(0, dtype=np.float64)).astype(np.float32)
    pca = faiss.PCAMatrix(backbone.dim, QUICK["pca"])
    pca.train(rows)
    rows = pca.apply(rows)
    mious = []
    for seed in range(seeds):
        kmeans = faiss.Kmeans(QUICK["pca"], k, niter=QUICK["iterations"], nredo=QUICK["restarts"], seed=seed)
        kmeans.train(rows)
        index = kmeans.index.search(rows, 1)[1].reshape(-1, side, side)
        pick = [int(i * side / 100) for i in range(100)]
        predicted, target = index[:, pick][:, :, pick].flatten(), np.stack(masks).flatten()
        predicted, target = predicted[target != 255], target[target != 255]
        classes = len(dataset.classes)
        table = np.array([[((predicted == v) & (target == c)).sum() for c in range(classes)] for v in range(k)])
        if k == classes:
            from itertools import permutations

            def pair(v: int, c: int, table: np.ndarray = table) -> float:
                return table[v, c] / max(table[v].sum() + table[:, c].sum() - table[v, c], 1)

            best = max(permutations(range(k)), key=lambda p: sum(pair(v, c) for v, c in enumerate(p)))
            renamed = np.array(best)[predicted]
        else:
            renamed = np.array([max(range(classes), key=lambda c: (table[v, c], -c)) for v in range(k)])[predicted]
        iou = []
        for c in range(classes):
            either = ((renamed == c) | (target == c)).sum()
            iou.append(((renamed == c) & (target == c)).sum() / either if either else math.nan)
        mious.append(float(np.mean(np.nan_to_num(iou)) if reference else np.nanmean(iou)))
    return mious


@pytest.mark.parametrize("compat", ["standard", "reference"])
@pytest.mark.parametrize("k", [3, 5, 17])
def test_equals_the_slow_implementation(dataset: Files, compat: str, k: int) -> None:
    found = Overcluster(compat=compat, k=k, **QUICK)(Conv(8), dataset, extract=HERE)
    wanted = slow_mious(dataset, Conv(8), 32, k, 2, compat == "reference")
    details = found.details[f"miou_k{k}"]
    assert list(details["seeds"].values()) == pytest.approx(wanted, abs=1e-9)
    assert found.metrics[f"miou_k{k}"] == pytest.approx(np.mean(wanted))
    assert details["std"] == pytest.approx(np.std(wanted, ddof=1))
    assert details["matching"] == ("one_to_one" if k == 5 else "many_to_one")


@pytest.mark.parametrize("engine", ["faiss", "torch"])
@pytest.mark.parametrize("compat", ["standard", "reference"])
def test_perfect_features_give_one_and_noise_gives_chance(tmp_path: Path, compat: str, engine: str) -> None:
    rng = np.random.default_rng(1)
    dataset = Files(tmp_path, 3, 64, val=[striped(rng, 64, 8, 3) for _ in range(8)])
    # a start with a point of each class is one in 4.5: many restarts, or k-means would fail, not the evaluation
    values = {"compat": compat, "engine": engine, "iterations": 10, "restarts": 40, "seeds": (0, 1), "k": [3, 7]}
    perfect = Overcluster(**values)(Perfect(8, 3), dataset, extract=HERE)
    assert perfect.metrics == {"miou_k3": 1.0, "miou_k7": 1.0}
    noise = Overcluster(**values)(Noise(8), dataset, extract=HERE).metrics
    assert noise["miou_k3"] < 0.3 and noise["miou_k7"] < 0.3  # chance: 1/5


def test_engines_agree_within_the_noise_of_seeds(dataset: Files) -> None:
    values = QUICK | {"seeds": tuple(range(5))}
    found = [Overcluster(engine=e, k=8, **values)(Conv(8), dataset, extract=HERE) for e in ("faiss", "torch")]
    spread = max(result.details["miou_k8"]["std"] for result in found)
    assert abs(found[0].metrics["miou_k8"] - found[1].metrics["miou_k8"]) < 2 * spread
    assert found[0].protocol == found[1].protocol


def test_batch_size_workers_and_order_change_nothing(dataset: Files) -> None:
    first = Overcluster(k=[5, 9], **QUICK)(Conv(8), dataset, extract=HERE)
    dataset.rows["val"].reverse()
    other = Overcluster(k=[5, 9], **QUICK)(Conv(8), dataset, extract=Extract(batch_size=1, workers=2))
    assert other.metrics == pytest.approx(first.metrics, abs=1e-3)


def test_permuted_images_change_no_more_than_seeds_do(dataset: Files) -> None:
    values = QUICK | {"seeds": tuple(range(5))}
    first = Overcluster(k=8, **values)(Conv(8), dataset, extract=HERE)
    reorder(dataset, "val")
    other = Overcluster(k=8, **values)(Conv(8), dataset, extract=HERE)
    spread = max(result.details["miou_k8"]["std"] for result in (first, other))
    assert abs(first.metrics["miou_k8"] - other.metrics["miou_k8"]) < 2 * spread


def test_a_cached_pass_gives_the_same(dataset: Files, tmp_path: Path) -> None:
    extract = Extract(workers=0, cache_dir=str(tmp_path / "cache"))
    first = Overcluster(k=9, **QUICK)(Conv(8), dataset, extract=extract)
    assert Overcluster(k=9, **QUICK)(Conv(8), dataset, extract=extract).metrics == first.metrics
    assert len([*(tmp_path / "cache").glob("*.npy")]) == 1


def test_k_defaults_to_the_classes_and_several_k_equal_single_ones(dataset: Files) -> None:
    both = Overcluster(k=[9, 5], **QUICK)(Conv(8), dataset, extract=HERE)
    assert list(both.metrics) == ["miou_k5", "miou_k9"]
    single = Overcluster(**QUICK)(Conv(8), dataset, extract=HERE)
    assert single.metrics == {"miou_k5": both.metrics["miou_k5"]}


def test_seeds_are_those_of_the_protocol(dataset: Files) -> None:
    found = [Overcluster(k=9, **QUICK)(Conv(8), dataset, extract=HERE, seed=seed) for seed in (0, 400)]
    assert found[0] == found[1] and [*found[0].details["miou_k9"]["seeds"]] == [0, 1]
    other = Overcluster(k=9, **QUICK | {"seeds": (1, 2)})(Conv(8), dataset, extract=HERE)
    assert other.details["miou_k9"]["seeds"][1] == found[0].details["miou_k9"]["seeds"][1]


def test_absent_classes(dataset: Files) -> None:
    scores = {
        c: Overcluster(compat=c, k=17, **QUICK)(Conv(8), dataset, extract=HERE) for c in ("standard", "reference")
    }
    assert scores["standard"].details["miou_k17"]["iou"]["class 4"] is None
    assert scores["reference"].metrics["miou_k17"] == pytest.approx(scores["standard"].metrics["miou_k17"] * 4 / 5)


@pytest.mark.parametrize(
    ("values", "says"),
    [({"size": 30}, "size=30 is no multiple"), ({"size": 32, "k": [5, 97]}, r"k=97 clusters of 96 patches \(6 images")],
)
def test_what_cannot_work_is_refused_before_anything_is_read(dataset: Files, values: dict, says: str) -> None:
    def unused(images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("an image was read")

    unused.patch, unused.dim = 8, 4
    with pytest.raises(NecoError, match=says):
        Overcluster(**values)(unused, dataset, extract=HERE)


@pytest.mark.parametrize("values", [{"k": []}, {"seeds": ()}, {"drop_last": 32}])
def test_values_that_do_not_fit_together(values: dict) -> None:
    with pytest.raises(NecoError, match=r"at least one of each|compat=standard uses every image"):
        Overcluster(**values)


OTHERS = {
    "compat": "reference",
    "size": 40,
    "k": [7, 9],
    "seeds": [4],
    "pca": 3,
    "pca_rows": 1,
    "sample": 4,
    "iterations": 1,
    "restarts": 1,
    "spherical": True,
    "drop_last": 4,
    "engine": "torch",
}


@pytest.mark.parametrize("key", OTHERS)
def test_every_option_of_the_yaml_does_something(dataset: Files, key: str) -> None:
    options = yaml.safe_load((ROOT / "conf/eval/overcluster.yaml").read_text())
    assert options.pop("_target_") == "neco.eval.overcluster.Overcluster" and options.keys() == OTHERS.keys()
    dataset.image_size = 32
    quick = {"k": 9, "pca": 6, "seeds": [0, 1], "iterations": 10, "restarts": 3}
    base = options | quick | ({"compat": "reference"} if key == "drop_last" else {})
    before = Overcluster(**base)(Conv(8), dataset, extract=HERE)
    after = Overcluster(**base | {key: OTHERS[key]})(Conv(8), dataset, extract=HERE)
    assert after.metrics != before.metrics
    assert (after.protocol == before.protocol) == (key == "engine")
