"""Unsupervised segmentation: each step against loops over pixels, the whole on data where the answer is known."""

import math
import os
from dataclasses import asdict
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import yaml
from eval_support import Conv, Files, Noise, noisy
from PIL import Image
from scipy.optimize import linear_sum_assignment
from test_devices import free_port
from test_model_mask import slow as slow_mask

from neco.config.types import MEAN, STD
from neco.dataset.base import Sample
from neco.distributed import collectives
from neco.eval import unsupervised
from neco.eval.attention import Attention
from neco.eval.common import clustering, graph
from neco.eval.evaluation import Result
from neco.eval.unsupervised import Unsupervised
from neco.features.extractor import Extract
from neco.model.mask import foreground
from neco.utils.errors import NecoError

ROOT = Path(__file__).parents[1]
HERE = Extract(workers=0, batch_size=3)
QUICK = {"k": 60, "k_community": 40, "seeds": (0, 1), "iterations": 10, "restarts": 2, "engine": "torch"}
PICK8, PICK64 = ([int(i * side / 100) for i in range(100)] for side in (8, 64))  # nearest, at 100 x 100
STEP = 28  # grey level of part v is STEP * v + 14


class Parts:
    """Reads parts off the grey level, one-hot; attention is even over all that is not part 0."""

    patch, dim, heads = 8, 9, 1

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        level = torch.nn.functional.avg_pool2d(images[:, :1], self.patch)[:, 0] * 0.229 + 0.485
        return torch.nn.functional.one_hot(((level * 255 - 14) / STEP).round().long().clamp(0, 8), 9).float()

    def forward_attention(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self(images)
        front = (features[..., :1] == 0).float().permute(0, 3, 1, 2)
        return features, front / front.sum((1, 2, 3), keepdim=True)


class Hash(Noise):
    heads = 2

    def forward_attention(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, self(images)[..., :2].permute(0, 3, 1, 2).exp()


class Seeing(Conv):
    """A convolution with weights whose attention is its first channels."""

    heads = 2

    def forward_attention(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self(images)
        return maps, (maps[..., :2] / 20).exp().permute(0, 3, 1, 2)


def iou(one: np.ndarray, other: np.ndarray) -> float | None:
    """Of two sets of pixels; None where both are empty."""
    return float((one & other).sum() / (one | other).sum()) if (one | other).any() else None


def named(dataset: Files) -> Files:
    dataset.classes = ("background", *dataset.classes[1:])
    return dataset


def objects(rng: np.random.Generator, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """One object of class 1 + kind, of two parts of its own, side by side."""
    y, x = rng.integers(5, size=2) * 8
    parts, mask = np.zeros((64, 64), int), np.zeros((64, 64), int)
    parts[y : y + 32, x : x + 16], parts[y : y + 32, x + 16 : x + 32] = 1 + 2 * kind, 2 + 2 * kind
    mask[y : y + 32, x : x + 32] = 1 + kind
    image = np.repeat((STEP * parts + 14)[..., None], 3, 2)
    image[::8, ::8] += rng.integers(-4, 5, (8, 8, 3))  # no two patches are quite equal
    return image, mask


@pytest.fixture
def perfect(tmp_path: Path) -> Files:
    rng = np.random.default_rng(2)
    splits = {s: [objects(rng, i % 4) for i in range(n)] for s, n in (("train", 24), ("val", 12))}
    return named(Files(tmp_path, 5, 64, **splits))


@pytest.fixture
def real(tmp_path: Path) -> Files:
    """Odd sizes, void, and class 4 of 5 nowhere."""
    rng = np.random.default_rng(0)
    splits = {s: [noisy(rng, 61 + 7 * i, 97 - 5 * i, 4) for i in range(n)] for s, n in (("train", 6), ("val", 4))}
    return named(Files(tmp_path, 5, 64, **splits))


def test_projection_of_a_stream_is_that_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(500, 7)) @ rng.normal(size=(7, 7)) + 30).astype(np.float32)
    rows[:, 3] = 0.1  # constant
    found = clustering.fit_projection(torch.from_numpy(rows).split(64), 7, 4)(torch.from_numpy(rows)).numpy()
    wanted = clustering.project(rows, 4, engine="torch")
    signs = np.sign((found * wanted).sum(0))
    assert found.shape == (500, 4) and np.abs(found * signs - wanted).max() < 1e-4


def test_neighbours_are_those_of_the_angles() -> None:
    straight = {(0, 1), (1, 0), (0, -1), (-1, 0), (0, 2), (2, 0), (0, -2), (-2, 0)}
    diagonal = [(1, 1), (1, -1), (-1, -1), (-1, 1)]
    assert sorted(graph.offsets()) == sorted([*straight, *diagonal * 2])
    slip = [*straight, *diagonal, *diagonal[:2], diagonal[3], (-2, -1)]
    assert sorted(graph.offsets("reference")) == sorted(slip)


@pytest.mark.parametrize("compat", ["standard", "reference"])
def test_edge_weights_against_a_loop_over_pixels(compat: str) -> None:
    maps = torch.randint(5, (6, 7, 9), generator=torch.Generator().manual_seed(0))
    maps[0] = 3  # alone in its image: no neighbours there
    maps[1:][maps[1:] == 4] = 2
    fifth = 4 * math.pi / 3 if compat == "reference" else 5 * math.pi / 4
    angles = [0, math.pi / 4, math.pi / 2, 3 * math.pi / 4, math.pi, fifth, 3 * math.pi / 2, 7 * math.pi / 4]
    rows: list[list[list[float]]] = [[] for _ in range(6)]
    for image in maps.tolist():
        counts = [[0] * 6 for _ in range(6)]
        for y in range(7):
            for x in range(9):
                for distance in (1, 2):
                    for angle in angles:
                        v, u = y + round(distance * math.sin(angle)), x + round(distance * math.cos(angle))
                        if 0 <= v < 7 and 0 <= u < 9 and image[v][u] != image[y][x]:
                            counts[image[y][x]][image[v][u]] += 1
        for node, row in enumerate(counts):
            if sum(row):
                rows[node].append([count / sum(row) for count in row])
    mean = [[sum(row[b] for row in rows[a]) / max(len(rows[a]), 1) for b in range(6)] for a in range(6)]
    wanted = [[min(mean[a][b], mean[b][a]) for b in range(6)] for a in range(6)]
    parts = [graph.neighbour_shares(part, 6, graph.offsets(compat)) for part in maps.split(4)]
    shares, images = (sum(part) for part in zip(*parts, strict=True))
    found = graph.edge_weights(shares, images)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    assert found.sum() > 1 and images.tolist() == [len(row) for row in rows]


def two_rings() -> torch.Tensor:
    """Two rings of four nodes, weakly joined; node 8 is alone."""
    weights = torch.zeros(9, 9, dtype=torch.float64)
    for ring in (0, 4):
        for node in range(4):
            weights[ring + node, ring + (node + 1) % 4] = 0.5
    weights[3, 4] = 0.1
    weights[2, 8] = 0.05
    return weights + weights.T


@pytest.mark.parametrize("method", ["louvain", "infomap"])
def test_communities_of_two_rings(method: str) -> None:
    if method == "infomap":
        pytest.importorskip("infomap", reason="runs where neco[infomap] is installed (make installs it)")
    found = graph.communities(two_rings(), 0.07, method=method, markov_time=1.2, modules=2)
    assert found.module.tolist() == [0] * 4 + [1] * 4 + [2] and found.count == 2
    edges, bridge = 8 * 0.5, 0.1
    assert found.modularity == pytest.approx(edges / (edges + bridge) - 2 * 0.5**2)
    none = graph.communities(two_rings(), 0.6, method=method)
    assert none.module.tolist() == [*range(9)] and (none.count, none.modularity) == (0, 0)


def test_louvain_comes_nearest_to_the_preferred_number() -> None:
    ring = torch.zeros(24, 24)
    for node in range(24):
        ring[node, (node + 1) % 24] = ring[(node + 1) % 24, node] = 1 if node % 2 else 0.9
    counts = [graph.communities(ring, 0.5, modules=m).count for m in (2, 6, 12)]
    assert counts == sorted(counts) and counts[2] == 12 and counts[0] <= 4
    long = graph.communities(ring, 0.5, markov_time=5).count
    assert long < graph.communities(ring, 0.5, markov_time=0.3).count


def test_cluster_precision_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    clusters, front = rng.integers(5, size=(4, 3, 6)), rng.random((4, 3, 6)) < 0.4
    clusters[1][clusters[1] == 2] = 0
    total, images = unsupervised.cluster_precision(clusters, front, 6)
    for k in range(6):
        there = [n for n in range(4) if (clusters[n] == k).any()]
        assert images[k] == len(there)
        assert total[k] == pytest.approx(sum(front[n][clusters[n] == k].mean() for n in there))


def test_patches_count_as_often_as_they_are_seen() -> None:
    seen = [int(i * 7 / 100) for i in range(100)]
    wanted = np.outer([seen.count(i) for i in range(7)], [seen.count(i) for i in range(7)])
    assert (unsupervised.multiplicity(7, 7) == wanted).all()


def test_matching_against_all_permutations() -> None:
    """Four communities of six nodes, three classes: one is left over and becomes the background."""
    matrix = torch.randint(50, (6, 3), generator=torch.Generator().manual_seed(0))
    module = [0, 1, 1, 2, 3, 3]
    joined = np.zeros((4, 3))
    for node, row in enumerate(matrix.tolist()):
        joined[module[node]] += row

    def iou(v: int, c: int) -> float:
        return joined[v, c] / (joined[v].sum() + joined[:, c].sum() - joined[v, c])

    best = max(permutations(range(4), 3), key=lambda chosen: sum(iou(v, c) for c, v in enumerate(chosen)))
    wanted = np.zeros((3, 3))
    for v in range(4):
        wanted[best.index(v) if v in best else 2] += joined[v]
    found = unsupervised._matched(matrix, graph.Partition(np.array(module), 4, 0.0), 2)
    assert (found.numpy() == wanted).all()


def test_foreground_iou_against_pixels() -> None:
    rng = np.random.default_rng(0)
    clusters, labels, kept = rng.integers(4, size=500), rng.integers(3, size=500), np.array([True, False, True, False])
    matrix = torch.zeros(4, 3, dtype=torch.long)
    for k, c in zip(clusters, labels, strict=True):
        matrix[k, c] += 1
    both, either = (kept[clusters] & (labels != 1)).sum(), (kept[clusters] | (labels != 1)).sum()
    assert unsupervised._foreground_iou(matrix, torch.from_numpy(kept), 1) == pytest.approx(both / either)


@pytest.mark.parametrize("compat", ["standard", "reference"])
def test_perfect_features_give_one_and_noise_gives_chance(perfect: Files, compat: str) -> None:
    values = {**QUICK, "compat": compat, "k": 200, "threshold": 0.2, "restarts": 5}
    found = Unsupervised(**values)(Parts(), perfect, extract=HERE)
    assert found.metrics["miou"] == found.metrics["foreground_iou"] == 1
    assert found.metrics["miou_k4"] < 1, "two parts of a class are no cluster: it takes communities"
    assert found.details["miou"]["communities"] == [4, 4] and found.details["miou"]["std"] == 0
    noise = Unsupervised(**values)(Hash(8), perfect, extract=HERE).metrics
    assert noise["miou"] < 0.25 and noise["foreground_iou"] < 0.4  # a quarter of the pixels is foreground


def slow_miou(dataset: Files, backbone: Seeing, precision: float, reference: bool) -> tuple[float, float]:
    """mIoU and foreground IoU from the words of the protocol; k-means and Louvain, tested by themselves, are ours."""
    train, val = dataset.samples("train"), dataset.samples("val")
    features, front, masks = [], [], []
    for sample in [*train, *val]:
        image = np.asarray(Image.open(sample.image).resize((64, 64), Image.Resampling.BILINEAR))
        pixels = torch.tensor((image / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            maps, attention = backbone.eval().forward_attention(pixels)
        features.append(maps[0].numpy())
        front.append(slow_mask(attention[0][None], 0.65)[0])
        mask = np.asarray(Image.open(sample.mask).resize((64, 64), Image.Resampling.NEAREST))
        masks.append(mask[PICK64][:, PICK64])
    rows = np.stack(features).reshape(-1, backbone.dim).astype(np.float64)
    rows = (rows - rows.mean(0)) / rows.std(0)
    points = (rows @ np.linalg.svd(rows, full_matrices=False)[2].T).astype(np.float32)

    def cluster(points: np.ndarray, k: int, spherical: bool = False) -> np.ndarray:
        how = {"seed": 3, "iterations": 10, "restarts": 2, "sample": 2000, "engine": "torch"}
        return clustering.kmeans(points, k, spherical=spherical, **how).centroids

    first = (points @ cluster(points, 60, spherical=True).T).argmax(1).reshape(-1, 8, 8)
    kept = np.zeros(first.shape, bool)
    for k in range(60):
        shares = [at[image == k].mean() for image, at in zip(first, front, strict=True) if (image == k).any()]
        kept[first == k] = bool(shares) and np.mean(shares) >= precision
    seen = [[PICK8.count(i) * PICK8.count(j) for j in range(8)] for i in range(8)]
    times = (kept * np.array(seen)).flatten()
    centroids = cluster(np.repeat(points, times, axis=0), 40)
    nearest = ((points[:, None] - centroids) ** 2).sum(2).argmin(1)
    shown = np.where(kept, nearest.reshape(kept.shape) + 1, 0)[:, PICK8][:, :, PICK8]

    around = graph.offsets("reference" if reference else "standard")
    shares, images = np.zeros((41, 41)), np.zeros(41)
    for image in shown:
        pairs = np.zeros((41, 41))
        for down, right in around:
            for y in range(max(0, -down), min(100, 100 - down)):
                here, there = image[y], image[y + down]
                for x in range(max(0, -right), min(100, 100 - right)):
                    pairs[here[x], there[x + right]] += here[x] != there[x + right]
        total = pairs.sum(1)
        shares[total > 0] += pairs[total > 0] / total[total > 0, None]
        images += total > 0
    mean = shares / images.clip(1)[:, None]
    weights = torch.from_numpy(np.minimum(mean, mean.T))
    target, scores = np.stack(masks[len(train) :]), []
    valid = target != 255
    for seed in (0, 1):
        found = graph.communities(weights, 0.07, markov_time=1.2, modules=4, seed=seed).module[shown[len(train) :]]
        table = np.array([[iou((found == v)[valid], (target == c)[valid]) or 0 for v in range(41)] for c in range(5)])
        classes, matched = linear_sum_assignment(1 - table)
        renamed = np.zeros_like(found)
        for c, v in zip(classes, matched, strict=True):
            renamed[found == v] = c
        each = [iou((renamed == c)[valid], (target == c)[valid]) for c in range(5)]
        scores.append(sum(v or 0 for v in each) / (5 if reference else sum(v is not None for v in each)))
    return float(np.mean(scores)), iou((shown[len(train) :] > 0)[valid], (target != 0)[valid])


@pytest.mark.parametrize("compat", ["standard", "reference"])
def test_equals_the_slow_implementation(real: Files, compat: str) -> None:
    """Class 4 occurs nowhere: it counts as 0, or not at all."""
    backbone = Seeing(8)
    found = Unsupervised(**QUICK, compat=compat, precision=0.6, sample=2000)(
        backbone, real, extract=HERE, seed=3
    ).metrics
    miou, foreground_iou = slow_miou(real, backbone, 0.6, compat == "reference")
    assert found["miou"] == pytest.approx(miou, abs=1e-6)
    assert found["foreground_iou"] == pytest.approx(foreground_iou, abs=1e-9)
    assert 0.05 < miou < 0.9 and 0.05 < foreground_iou < 0.95


def test_engines_agree_where_the_answer_is_known(perfect: Files) -> None:
    values = {**QUICK, "k": 200, "threshold": 0.2, "restarts": 5, "engine": "faiss"}
    assert Unsupervised(**values)(Parts(), perfect, extract=HERE).metrics["miou"] == 1


def test_batch_size_workers_order_cache_and_runs_change_nothing(real: Files, tmp_path: Path) -> None:
    evaluation = Unsupervised(**QUICK, precision=0.6)
    first = evaluation(Seeing(8), real, extract=HERE, seed=3)
    assert evaluation(Seeing(8), real, extract=HERE, seed=3) == first
    for rows in real.rows.values():
        rows.reverse()
    other = evaluation(Seeing(8), real, extract=Extract(batch_size=1, workers=1), seed=3)
    assert other.metrics == pytest.approx(first.metrics, abs=1e-6)
    kept = Extract(workers=0, cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        assert evaluation(Seeing(8), real, extract=kept, seed=3).metrics == pytest.approx(first.metrics, abs=1e-6)
    assert evaluation(Seeing(8), real, extract=HERE, seed=4).metrics != first.metrics
    assert 0 < first.details["foreground_iou"]["clusters"] < QUICK["k"]


def test_reference_chooses_the_best_precision_on_train(real: Files) -> None:
    chosen = Unsupervised(**QUICK, compat="reference")(Seeing(8), real, extract=HERE)
    real.rows["val"] = real.rows["train"]
    least = chosen.details["foreground_iou"]["precision"]
    assert least in unsupervised.PRECISIONS
    values = {**QUICK, "compat": "reference", "k": 60}
    tried = {p: Unsupervised(**values, precision=p)(Seeing(8), real, extract=HERE) for p in (0.2, least, 0.7)}
    # val is train here: its foreground counts twice in the clusters, but the choice stays the best of its own
    again = Unsupervised(**values)(Seeing(8), real, extract=HERE)
    assert again.metrics["foreground_iou"] >= max(found.metrics["foreground_iou"] for found in tried.values())


def test_search(real: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**QUICK, "k_community": 20, "precision": 0.6}
    plain = Unsupervised(**values)(Seeing(8), real, extract=HERE)
    found = Unsupervised(**values, search=4)(Seeing(8), real, extract=HERE)
    assert found == Unsupervised(**values, search=4)(Seeing(8), real, extract=HERE)

    def off(details: dict) -> float:
        return sum(abs(count - 4) for count in details["miou"]["communities"])

    assert off(found.details) <= off(plain.details) and "search=4 by modules" in found.protocol
    real.rows["val"] = real.rows["train"]  # what it looks at, then, is what it reports
    scores = [
        Unsupervised(**values, compat="reference", search=n)(Seeing(8), real, extract=HERE).metrics["miou"]
        for n in (0, 4)
    ]
    assert scores[1] > scores[0]


def test_labels_of_train_are_for_reference_alone(real: Files) -> None:
    wanted = Unsupervised(**QUICK)(Seeing(8), real, extract=HERE)
    real.rows["train"] = [Sample(s.key, s.image) for s in real.rows["train"]]
    assert Unsupervised(**QUICK)(Seeing(8), real, extract=HERE) == wanted
    with pytest.raises(NecoError, match="no labels on train"):
        Unsupervised(**QUICK, compat="reference")(Seeing(8), real, extract=HERE)


def test_given_masks_replace_the_attention(real: Files, tmp_path: Path) -> None:
    backbone, folder = Seeing(8), tmp_path / "masks"
    wanted = Unsupervised(**QUICK, precision=0.6)(backbone, real, extract=HERE)
    folder.mkdir()
    for sample in [s for rows in real.rows.values() for s in rows]:
        sample = Sample(sample.key, sample.image)
        ((_, maps, _),) = HERE.stream(backbone, real, [sample], 64, nearest=None)
        front = foreground((maps[..., :2] / 20).exp().permute(0, 3, 1, 2), 0.65)[0].numpy()
        name = sample.key.replace("train/", "train").replace("val/", "val")
        Image.fromarray(np.kron(front, np.ones((5, 5))).astype(np.uint8)).save(folder / f"{name}.png")
    for split, rows in real.rows.items():
        real.rows[split] = [Sample(s.key.replace("/", "/" + split), s.image, s.mask) for s in rows]
    given = Unsupervised(**QUICK, precision=0.6, masks=str(folder))
    found = given(Conv(8), real, extract=HERE)  # gives no attention
    assert found.metrics == wanted.metrics and "given masks" in found.protocol
    assert {sample.image for sample in given.plan(8, real)[-1]} == set(map(str, folder.iterdir())), (
        "part of the question"
    )
    (folder / "val0.png").unlink()
    with pytest.raises(NecoError, match=r"val0\.png is not there; every image of train and val"):
        given.plan(8, real)


def test_no_foreground_at_all_is_a_result(real: Files, tmp_path: Path) -> None:
    for sample in [s for rows in real.rows.values() for s in rows]:
        (tmp_path / "masks" / sample.key).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "masks" / f"{sample.key}.png")
    found = Unsupervised(**QUICK, masks=str(tmp_path / "masks"))(Conv(8), real, extract=HERE)
    assert found.metrics["foreground_iou"] == 0 and found.metrics["miou"] == found.metrics["miou_k4"] > 0
    scores = sorted(found.details["miou"]["iou"][name] for name in real.classes[:4])
    assert scores[:3] == [0, 0, 0] and found.metrics["miou"] == pytest.approx(scores[3] / 4)


def test_masks_of_one_name_for_several_images_are_refused(real: Files, tmp_path: Path) -> None:
    for sample in [s for rows in real.rows.values() for s in rows]:
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / f"{sample.key.rpartition('/')[2]}.png")
    with pytest.raises(NecoError, match=r"0\.png would be that of several images"):
        Unsupervised(**QUICK, masks=str(tmp_path)).plan(8, real)


def test_what_cannot_work_is_refused_before_anything_is_read(real: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NecoError, match="Conv gives no attention"):
        Unsupervised(**QUICK)(Conv(8), real, extract=HERE)
    for values, says in (
        ({"k": 641}, "k=641 clusters of 640"),
        ({"k_community": 641}, "k_community=641 clusters of 640"),
    ):
        with pytest.raises(NecoError, match=says):
            Unsupervised(**values).plan(8, real)
    with pytest.raises(NecoError, match="at least one"):
        Unsupervised(seeds=())
    monkeypatch.setattr(graph, "find_spec", lambda name: None)
    with pytest.raises(NecoError, match=r"under the GPL.*pip install 'neco\[infomap\]'.*method=louvain"):
        Unsupervised(method="infomap")
    real.classes = tuple("abcde")
    with pytest.raises(NecoError, match="no class called background"):
        Unsupervised().plan(8, real)


def test_infomap(real: Files) -> None:
    pytest.importorskip("infomap", reason="runs where neco[infomap] is installed (make installs it)")
    found = Unsupervised(**QUICK, method="infomap")(Seeing(8), real, extract=HERE)
    assert found == Unsupervised(**QUICK, method="infomap")(Seeing(8), real, extract=HERE)


def evaluate(dataset: Files) -> list[Result]:
    return [
        Unsupervised(**QUICK, compat="reference", search=1)(Seeing(8), dataset, extract=HERE),
        Attention(size=64)(Seeing(8), dataset, extract=HERE),
    ]


def work(rank: int, port: str, dataset: Files, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
    collectives.join()
    torch.save([asdict(result) for result in evaluate(dataset)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(real: Files, tmp_path: Path) -> None:
    mp.spawn(work, (free_port(), real, str(tmp_path)), 2)
    for rank in range(2):
        for alone, found in zip(evaluate(real), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert found["metrics"] == pytest.approx(alone.metrics, abs=1e-9) and found["protocol"] == alone.protocol


OTHERS = {
    "compat": "reference",
    "size": 40,
    "pca": 3,
    "k": 30,
    "mass": 0.4,
    "precision": 0.7,
    "k_community": 25,
    "markov_time": 0.01,
    "threshold": 0.2,
    "modules": 15,
    "search": 3,
    "seeds": [5],
    "sample": 2,
    "iterations": 1,
    "restarts": 1,
    "engine": "faiss",
}
ELSEWHERE = {"masks", "method"}  # tested above


@pytest.mark.parametrize("key", OTHERS)
def test_every_option_of_the_yaml_does_something(real: Files, key: str) -> None:
    options = yaml.safe_load((ROOT / "conf/eval/unsupervised.yaml").read_text())
    assert options.pop("_target_") == "neco.eval.unsupervised.Unsupervised"
    assert options.keys() == OTHERS.keys() | ELSEWHERE
    options |= {**QUICK, "precision": 0.5}
    before = Unsupervised(**options)(Seeing(8), real, extract=HERE)
    after = Unsupervised(**options | {key: OTHERS[key]})(Seeing(8), real, extract=HERE)
    assert after.metrics != before.metrics or [*after.details["miou"]["seeds"]] == [5]
    assert (after.protocol == before.protocol) == (key == "engine")


def test_details_hold_what_the_mean_is_of(real: Files) -> None:
    found = Unsupervised(**QUICK | {"seeds": tuple(range(4))})(Seeing(8), real, extract=HERE)
    scores = [*found.details["miou"]["seeds"].values()]
    assert found.metrics["miou"] == pytest.approx(np.mean(scores))
    assert found.details["miou"]["std"] == pytest.approx(np.std(scores, ddof=1))
