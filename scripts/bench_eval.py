"""Evaluations beside the published procedures, written out plainly: seconds, memory, and the same numbers.

retrieval     open-hummingbird: patch by patch scores of a bounded memory; neighbours' features gathered and compared
              once more; predictions and masks of all of val held; classes matched and scored pair by pair
clustering    Leopart, NeCo: features of val standardised at once, PCA and k-means by faiss, assignments and masks of
              all of val at 100 x 100, clusters matched and scored pair by pair
matching      of two label maps: each (cluster, class) by comparing all pixels, against one confusion matrix
cooccurrence  CBFE and CD: for each image, direction and distance one matrix of neighbours, then normalised and averaged
bank          a retrieval memory of `--entries` in float16, mapped from a file: size, resident memory, exact and inexact
              search; the exact one is compared with sorting all similarities of a few queries
all           all but bank

Both sides have the same synthetic features and masks, a function of `--seed`, and do the whole evaluation but for
reading images and the backbone; PCA and k-means are faiss's for both. Each has its own process, and they take turns, so
that whatever else the machine does meets both. Memory: growth of the process's peak in its first repetition (Linux).
"""

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from neco.distributed import device_memory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as neco.__main__ does, before torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from neco.dataset.base import IGNORE, Dataset, Sample
from neco.eval.common import graph, metrics
from neco.eval.common.neighbors import Neighbours, bank, load_faiss
from neco.eval.overcluster import GRID, Overcluster
from neco.eval.retrieval import Retrieval
from neco.features.extractor import Extract
from neco.utils.progress import track
from neco.utils.random import generator
from neco.utils.text_table import columns

BLOCK = 1 << 16
K = 30
MIOU = 1e-4  # of retrieval: cosines differ in the last bits, so labels with nearly equal votes may change places
EXACT = 1e-9
SEEDS = (0, 1)  # of k-means
CPU = torch.device("cpu")


# Data


class Scenes(Dataset):
    """Train and val without files: features (N, h, w, D) and masks (N, S, S) of rectangles, some void."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.classes = tuple(map(str, range(options.classes)))
        self.counts = {"train": options.train, "val": options.val}
        self.patch, self.dim, self.size = options.patch, options.dim, options.size // options.patch * options.patch
        self.kept = {split: self._draw(split, options.seed) for split in self.counts}

    def find(self, split: str) -> list[Sample]:
        return [Sample(f"{split}/{row:06}", "", "") for row in range(self.counts[split])]

    samples = find

    def _draw(self, split: str, seed: int) -> tuple[Tensor, Tensor]:
        rng, cells = generator(seed, split), 8
        coarse = rng.integers(-1, len(self.classes), (self.counts[split], cells, cells))
        coarse[coarse < 0] = IGNORE
        masks = F.interpolate(torch.from_numpy(coarse)[:, None].float(), size=self.size)[:, 0].to(torch.uint8)
        centres = torch.from_numpy(generator(seed, "centres").standard_normal((IGNORE + 1, self.dim), np.float32))
        shown = masks[:, self.patch // 2 :: self.patch, self.patch // 2 :: self.patch].long()
        noise = torch.from_numpy(rng.standard_normal((*shown.shape, self.dim), np.float32))
        return centres[shown] + 5 * noise, masks

    def __call__(self, images: Tensor) -> Tensor:
        raise AssertionError("features are given")


class Given(Extract):
    """What `Extract` yields, from `Scenes`."""

    def stream(self, backbone: Any, dataset: Any, samples: Sequence[Sample], *_: Any, **how: Any) -> Iterator[Any]:
        if not samples:
            return
        features, masks = dataset.kept[samples[0].key.partition("/")[0]]
        for start in range(0, len(samples), self.batch_size):
            rows = slice(start, min(len(samples), start + self.batch_size))
            yield rows, features[rows], masks[rows]

    def __call__(self, backbone: Any, dataset: Any, samples: Sequence[Sample], *_: Any, **how: Any) -> np.ndarray:
        return dataset.kept[samples[0].key.partition("/")[0]][0].numpy()

    def masks(self, dataset: Any, samples: Sequence[Sample], *_: Any, **how: Any) -> Iterator[Any]:
        for rows, _, masks in self.stream(None, dataset, samples):
            yield rows, masks


# Published procedures


def pair_scores(prediction: np.ndarray, target: np.ndarray, clusters: int, classes: int, precise: bool) -> np.ndarray:
    """Precision or IoU of each (cluster, class), (K, C), from all pixels each time."""
    scores = np.zeros((clusters, classes))
    for cluster in range(clusters):
        for label in range(classes):
            here, wanted = prediction == cluster, target == label
            tp, fp, fn = (here & wanted).sum(), (here & ~wanted).sum(), (~here & wanted).sum()
            scores[cluster, label] = tp / max(tp + fp if precise else tp + fp + fn, 1)
    return scores


def plain_miou(prediction: np.ndarray, target: np.ndarray, clusters: int, classes: int, one_to_one: bool) -> float:
    """Clusters matched to classes, pixels renamed, IoU class by class; an absent class counts as 0."""
    scores = pair_scores(prediction, target, clusters, classes, precise=not one_to_one)
    names = scores.argmax(1)
    if one_to_one:
        labels, matched = linear_sum_assignment(1 - scores.T)
        names = np.zeros(clusters, int)
        names[matched] = labels
    renamed = np.zeros_like(prediction)
    for cluster in range(clusters):
        renamed[prediction == cluster] = names[cluster]
    iou = []
    for label in range(classes):
        both, either = (renamed == label) & (target == label), (renamed == label) | (target == label)
        iou.append(both.sum() / max(either.sum(), 1))
    return float(np.mean(iou))


def chosen(labels: Tensor, share: int, uniform: np.ndarray) -> Tensor:
    """Places in a bounded memory: pixels (h, w, p) -> `share` patches, those of the smallest score."""
    frequency: dict[int, int] = {}
    for row in labels:
        for patch in row:
            for label in patch.unique().tolist():
                frequency[label] = frequency.get(label, 0) + 1
    scores = torch.tensor([[sum(frequency[c] for c in patch.unique().tolist()) for patch in row] for row in labels])
    return (scores * torch.from_numpy(uniform)).flatten().topk(share, largest=False).indices


def plain_retrieval(scenes: Scenes, share: int | None, seed: int, batch: int) -> float:
    faiss, patch, classes = load_faiss(), scenes.patch, len(scenes.classes)
    keys, values = [], []
    for row, (features, mask) in enumerate(zip(*scenes.kept["train"], strict=True)):
        h, w = features.shape[:2]
        mask = mask.long()
        mask[mask == IGNORE] = 0
        pixels = mask.reshape(h, patch, w, patch).permute(0, 2, 1, 3).reshape(h, w, -1)
        shares = F.one_hot(pixels, classes).float().mean(2).flatten(0, 1)
        features = features.flatten(0, 1)
        if share:
            uniform = generator(seed, 0, f"train/{row:06}", "patches").random((h, w))
            kept = chosen(pixels, share, uniform)
            features, shares = features[kept], shares[kept]
        keys.append(features / features.norm(dim=1, keepdim=True))
        values.append(shares)
    remembered, labels = torch.cat(keys), torch.cat(values)
    index = faiss.IndexFlatIP(scenes.dim)
    index.add(remembered.numpy())
    predictions, targets = [], []
    for features, masks in zip(*(part.split(batch) for part in scenes.kept["val"]), strict=True):
        query = F.normalize(features, dim=3)
        near = torch.from_numpy(index.search(query.flatten(0, 2).numpy(), K)[1])
        gathered = F.normalize(remembered[near], dim=2)
        weights = (torch.einsum("qd,qkd->qk", query.flatten(0, 2), gathered) / 0.02).softmax(1)
        voted = torch.einsum("qk,qkc->qc", weights, labels[near]).reshape(*query.shape[:3], classes)
        predictions.append(F.interpolate(voted.permute(0, 3, 1, 2), size=masks.shape[1:], mode="bilinear").argmax(1))
        targets.append(masks.long())
    predicted, target = torch.cat(predictions), torch.cat(targets)
    valid = target != IGNORE
    return plain_miou(predicted[valid].numpy(), target[valid].numpy(), classes, classes, one_to_one=True)


def plain_clustering(scenes: Scenes, k: int, iterations: int, restarts: int) -> list[float]:
    faiss, (features, masks) = load_faiss(), scenes.kept["val"]
    rows = features.flatten(0, 2).numpy()
    mean, scale = rows.mean(0, dtype=np.float64), rows.std(0, dtype=np.float64)
    rows = (rows - mean.astype(np.float32)) / scale.astype(np.float32)
    pca = faiss.PCAMatrix(scenes.dim, min(50, scenes.dim))
    pca.train(rows)
    points = pca.apply(rows)
    target = F.interpolate(masks[:, None].float(), size=(GRID, GRID), mode="nearest")[:, 0].long()
    valid, found = target != IGNORE, []
    for seed in SEEDS:
        kmeans = faiss.Kmeans(points.shape[1], k, niter=iterations, nredo=restarts, seed=seed)
        kmeans.train(points)
        clusters = torch.from_numpy(kmeans.index.search(points, 1)[1]).reshape(features.shape[:3])
        shown = F.interpolate(clusters[:, None].double(), size=(GRID, GRID), mode="nearest")[:, 0].long()
        classes = len(scenes.classes)
        found.append(plain_miou(shown[valid].numpy(), target[valid].numpy(), k, classes, one_to_one=k == classes))
    return found


def plain_cooccurrence(maps: np.ndarray, nodes: int) -> np.ndarray:
    angles = [0, math.pi / 4, math.pi / 2, 3 * math.pi / 4, math.pi, 4 * math.pi / 3, 3 * math.pi / 2, 7 * math.pi / 4]
    shares, images = np.zeros((nodes, nodes)), np.zeros(nodes)
    for image in maps:
        height, width = image.shape
        counts = np.zeros((nodes, nodes, 2, 8), np.uint32)
        for far, distance in enumerate((1, 2)):
            for way, angle in enumerate(angles):
                down, right = round(distance * math.sin(angle)), round(distance * math.cos(angle))
                top, left = max(-down, 0), max(-right, 0)
                here = image[top : height - max(down, 0), left : width - max(right, 0)]
                there = image[top + down :, left + right :][: here.shape[0], : here.shape[1]]
                np.add.at(counts[..., far, way], (here, there), 1)
        pairs = counts.sum((2, 3))
        np.fill_diagonal(pairs, 0)
        total = pairs.sum(1)
        shares += np.divide(pairs, total[:, None], out=np.zeros(pairs.shape), where=total[:, None] > 0)
        images += total > 0
    mean = shares / images.clip(1)[:, None]
    return np.minimum(mean, mean.T)


# Cases: what each side is given, and its work


def labels(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Clusters and classes of pixels that have to do with each other."""
    rng, (clusters, classes) = generator(options.seed, "labels"), (options.clusters, options.classes)
    target = rng.integers(classes, size=options.pixels)
    guess = (target * clusters // classes + rng.integers(40, size=options.pixels)) % clusters
    return np.where(rng.random(options.pixels) < 0.7, guess, rng.integers(clusters, size=options.pixels)), target


def node_maps(options: argparse.Namespace) -> np.ndarray:
    """Nodes (N, 100, 100) in blobs of a few pixels, a part of all in each image."""
    rng, side = generator(options.seed, "maps"), GRID // 4
    coarse = rng.integers(12, size=(options.val, side, side)) + rng.integers(
        options.nodes - 11, size=(options.val, 1, 1)
    )
    return coarse.repeat(4, 1).repeat(4, 2)


class Case(NamedTuple):
    """One comparison: what makes the inputs, both sides, and how far their results may differ."""

    inputs: Callable[[], Any]
    plain: Callable[[Any], Any]
    ours: Callable[[Any], Any]
    tolerance: float


def retrieval(options: argparse.Namespace, share: int | None) -> Case:
    def ours(scenes: Scenes) -> float:
        size = share * options.train if share else None
        evaluation = Retrieval(compat="reference", size=scenes.size, augment="none", memory_size=size, k=K)
        given = Given(batch_size=options.batch)
        return evaluation(scenes, scenes, extract=given, seed=options.seed).metrics[f"miou_k{K}"]

    def plain(scenes: Scenes) -> float:
        return plain_retrieval(scenes, share, options.seed, options.batch)

    return Case(lambda: Scenes(options), plain, ours, MIOU)


def clustering(options: argparse.Namespace, k: int) -> Case:
    def ours(scenes: Scenes) -> list[float]:
        evaluation = Overcluster(
            compat="reference",
            size=scenes.size,
            k=k,
            seeds=SEEDS,
            iterations=options.iterations,
            restarts=options.restarts,
        )
        found = evaluation(scenes, scenes, extract=Given(batch_size=options.batch))
        return [*found.details[f"miou_k{k}"]["seeds"].values()]

    def plain(scenes: Scenes) -> list[float]:
        return plain_clustering(scenes, k, options.iterations, options.restarts)

    return Case(lambda: Scenes(options), plain, ours, EXACT)


def matching(options: argparse.Namespace, one_to_one: bool) -> Case:
    size, match = (options.clusters, options.classes), metrics.match_many_to_one
    if one_to_one:
        match = metrics.match_one_to_one

    def ours(pixels: tuple[np.ndarray, np.ndarray]) -> float:
        matrix = metrics.confusion(torch.from_numpy(pixels[0]), torch.from_numpy(pixels[1]), *size)
        return metrics.miou(metrics.remap(matrix, match(matrix)), "reference")

    def plain(pixels: tuple[np.ndarray, np.ndarray]) -> float:
        return plain_miou(pixels[0], pixels[1], *size, one_to_one=one_to_one)

    return Case(lambda: labels(options), plain, ours, EXACT)


def cooccurrence(options: argparse.Namespace) -> Case:
    def ours(maps: np.ndarray) -> np.ndarray:
        around = graph.offsets("reference")
        parts = [graph.neighbour_shares(part, options.nodes, around) for part in torch.from_numpy(maps).split(64)]
        shares, images = (sum(part) for part in zip(*parts, strict=True))
        return graph.edge_weights(shares, images).numpy()

    return Case(lambda: node_maps(options), lambda maps: plain_cooccurrence(maps, options.nodes), ours, EXACT)


def cases(options: argparse.Namespace) -> dict[str, Case]:
    share = (options.size // options.patch) ** 2 // 4
    return {
        "retrieval, all patches": retrieval(options, None),
        "retrieval, a quarter of them": retrieval(options, share),
        f"clustering k={options.classes}": clustering(options, options.classes),
        f"clustering k={options.k}": clustering(options, options.k),
        "matching one to one": matching(options, True),
        "matching many to one": matching(options, False),
        "cooccurrence": cooccurrence(options),
    }


held: dict[str, Any] = {}  # inputs, in the process of one side


def repeat(name: str, side: str, options: argparse.Namespace) -> tuple[float, int, Any]:
    """Seconds, bytes that the process has grown at the peak, and the result of one repetition."""
    torch.set_num_threads(options.threads)
    load_faiss().omp_set_num_threads(options.threads)
    case = cases(options)[name]
    if name not in held:
        held[name] = case.inputs()
    device_memory.reset_peak(CPU)
    before, start = device_memory.current(CPU), time.perf_counter()
    result = getattr(case, side)(held[name])
    return time.perf_counter() - start, device_memory.peak(CPU) - before, result


def compare(what: str, options: argparse.Namespace) -> None:
    """Print both sides of each case, run in turn. Raises SystemExit where their results differ."""
    rows = [["", "published s", "ours s", "ratio", "published MB", "ours MB", "mIoU, or sum of the matrix", "equal to"]]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faiss", Retrieval.__module__, Overcluster.__module__])
    for name, case in track([*cases(options).items()], "cases"):
        if what not in ("all", name.partition(",")[0].partition(" ")[0]):
            continue
        sides = [ProcessPoolExecutor(1, context) for _ in range(2)]
        turns = []
        for _ in range(options.repeat):
            turns += [
                pool.submit(repeat, name, side, options).result()
                for pool, side in zip(sides, ("plain", "ours"), strict=True)
            ]
        for pool in sides:
            pool.shutdown()
        plain, ours = turns[::2], turns[1::2]
        times = [statistics.median(turn[0] for turn in side) for side in (plain, ours)]
        values = [np.asarray(side[0][2]) for side in (plain, ours)]
        size = max(1, values[0].size if values[0].ndim == 1 else 1)  # of several seeds the mean
        rows.append(
            [name]
            + [f"{seconds:.3f}" for seconds in times]
            + [f"{times[0] / times[1]:.1f}"]
            + [f"{side[0][1] / 1e6:.0f}" for side in (plain, ours)]
            + [" ".join(f"{value.sum() / size:.6f}" for value in values), f"{case.tolerance:g}"]
        )
        if not np.allclose(values[0], values[1], rtol=0, atol=case.tolerance):
            print(columns(rows))
            raise SystemExit(f"{name}: the results differ by {np.abs(values[0] - values[1]).max():g}")
    print(
        f"{options.train} train and {options.val} val images of {options.size}, patch {options.patch}, {options.dim} "
        f"channels, {options.classes} classes; {options.pixels} pixels, {options.clusters} clusters to match; "
        f"{options.nodes} nodes; {options.threads} threads, median of {options.repeat}\n"
    )
    print(columns(rows))


def features(start: int, stop: int, dim: int) -> torch.Tensor:
    """Rows of a synthetic memory, a function of their place: 4096 directions with noise, so that some are near."""
    generator = torch.Generator().manual_seed(start)
    centres = F.normalize(torch.randn(4096, dim, generator=torch.Generator().manual_seed(7)), dim=1)
    chosen = torch.randint(4096, (stop - start,), generator=generator)
    noise = torch.randn(stop - start, dim, generator=generator) / dim**0.5
    return F.normalize(centres[chosen] + noise, dim=1)


def bench_bank(entries: int, dim: int, queries: int, cells: int, probes: int, folder: Path) -> None:
    """Fill, search, compare."""
    stored = bank(entries, dim, torch.float16, folder)
    for place in track(range(0, entries, BLOCK), "filling"):
        stored[place : place + BLOCK] = features(place, min(entries, place + BLOCK), dim)
    asked = features(1, queries + 1, dim)
    rows = [["search", "seconds to build", "seconds", "found", "resident GB at the peak"]]
    start = time.perf_counter()
    values, places = Neighbours(stored)(asked, K)
    seconds = time.perf_counter() - start
    peak = device_memory.peak(CPU) / device_memory.GB
    few, best = asked[:8], torch.empty(8, 0)
    for begin in range(0, entries, BLOCK):
        best = (
            torch.cat([best, few @ stored[begin : begin + BLOCK].float().T], 1)
            .sort(dim=1, descending=True)
            .values[:, :K]
        )
    assert torch.allclose(best, values[:8], atol=1e-5), "an exact search is exact"
    rows.append(["exact", "", f"{seconds:.1f}", "100.0%", f"{peak:.1f}"])
    if cells:
        start = time.perf_counter()
        index = Neighbours(stored, cells=cells, probes=probes)
        built, start = time.perf_counter() - start, time.perf_counter()
        near = index(asked, K)[1]
        seconds = time.perf_counter() - start
        found = 100 * (near[:, :, None] == places[:, None]).any(2).float().mean()
        peak = device_memory.peak(CPU) / device_memory.GB
        rows.append(
            [f"{cells} cells, {probes} probed", f"{built:.1f}", f"{seconds:.1f}", f"{found:.1f}%", f"{peak:.1f}"]
        )
    size = entries * dim * 2 / device_memory.GB
    print(f"{entries} entries of {dim} dimensions, float16: {size:.1f} GB; {queries} queries, k={K}\n")
    print(columns(rows))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", "retrieval", "clustering", "matching", "cooccurrence", "bank"])
    both = {
        "seed": 0, "repeat": 3, "threads": 2, "train": 48, "val": 16, "size": 448, "patch": 14, "dim": 384,
        "classes": 21, "batch": 16, "k": 300, "iterations": 20, "restarts": 1, "pixels": 200_000, "clusters": 500,
        "nodes": 190,
    }  # fmt: skip
    alone = {"entries": 10_000_000, "queries": 1024, "cells": 4096, "probes": 64}
    for name, value in (both | alone).items():
        where = "bank; cells 0: exact search alone" if name in alone else "all others"
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of {where} (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="of bank (%(default)s)")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.what == "bank":
        bench_bank(options.entries, options.dim, options.queries, options.cells, options.probes, options.folder)
    else:
        compare(options.what, options)


if __name__ == "__main__":
    main()
