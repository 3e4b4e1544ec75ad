"""Fully unsupervised segmentation: foreground from clusters (CBFE), then communities of clusters (CD).

The protocol of Leopart (Ziegler and Asano, Self-Supervised Learning of Object Parts for Semantic Segmentation, 2022),
which NeCo reports too. Labels match what was found to classes, as in every clustering measure; `reference` also makes
its choices by those of train.

Shapes: N images, h w patches, D channels, d reduced channels, K clusters or nodes, C classes.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neco.config.types import NonNegative, Positive, PositiveFloat, PositiveFraction, Size
from neco.dataset.base import IGNORE, Dataset, Sample
from neco.dataset.masks import read_mask
from neco.distributed import collectives
from neco.eval.common import clustering, metrics
from neco.eval.common.graph import Method, Partition, check_method, communities, edge_weights, neighbour_shares, offsets
from neco.eval.common.metrics import Compat
from neco.eval.common.neighbors import Engine, check_engine
from neco.eval.evaluation import Result, background_of, check_protocol, input_size, labelled, part_of_train, size_name
from neco.features.extractor import Extract, PatchFeatures, resize_nearest, token_grid
from neco.model.backbone import Attention
from neco.model.mask import foreground
from neco.report.pictures import Picture, groups_over, predictions, shown
from neco.utils.errors import NecoError
from neco.utils.progress import track
from neco.utils.random import generator

log = logging.getLogger(__name__)
SIZE = 448  # published
GRID = 100  # pixels per side at which clusters touch, and are compared with masks
PRECISION = 0.4  # `standard`: a cluster from here on is foreground
PRECISIONS = tuple(i / 20 for i in range(4, 15))  # `reference`: 0.2 to 0.7, of which train labels choose
BATCH = 64  # images


@dataclass(frozen=True)
class Parameters:
    """What `search` looks for: clusters of the foreground, and see `neco.eval.common.graph.communities`."""

    k: int
    markov_time: float
    threshold: float


@dataclass(frozen=True)
class Found:
    """The nodes (0 = background) of own patches, int32 (N, h, w), how many there are, and a partition for each seed."""

    given: Parameters
    maps: np.ndarray
    nodes: int
    partitions: list[Partition]


def cluster_precision(clusters: np.ndarray, front: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """Of a cluster's patches in an image the share that is in the foreground, summed over the images that hold it.

    Args:
        clusters: integers (N, h, w) in 0..k-1.
        front: bool (N, h, w), a noisy foreground.

    Returns: float64 (K,), int64 (K,): the sum, and the number of images.
    """
    images = len(clusters)
    place = (clusters.reshape(images, -1) + k * np.arange(images)[:, None]).ravel()
    held, hit = (np.bincount(place, weight, images * k).reshape(images, k) for weight in (None, front.ravel()))
    return torch.from_numpy((hit / held.clip(1)).sum(0)), torch.from_numpy((held > 0).sum(0))


def multiplicity(h: int, w: int, grid: int = GRID) -> np.ndarray:
    """How many pixels of a grid x grid map each patch becomes (nearest): int64 (h, w)."""
    shown = resize_nearest(torch.arange(h * w).view(1, h, w), grid)
    return torch.bincount(shown.flatten(), minlength=h * w).view(h, w).numpy()


class Unsupervised:
    """mIoU on val of a segmentation that was found without labels in train and val, mean over seeds of the communities.

    1. Features of all images are standardised and reduced by PCA. Spherical k-means; a cluster's precision is the mean,
       over the images that hold it, of the share of its patches in the foreground of the attention of CLS (`mass` of
       it, blurred, components of one or two patches dropped). Clusters of at least `precision` are the foreground.
    2. The foreground at 100 x 100 pixels is clustered again, by k-means.
    3. These clusters and the background are the nodes of a graph; edges say how often two are neighbours.
    4. Communities of the graph. 5. Hungarian matching of communities to classes, on val.

    `compat=reference` chooses `precision`, and what `search` finds, by the labels of train; has a slip in the list of
    neighbours (see `neco.eval.common.graph.offsets`); absent classes count as 0. `standard` takes `precision` as it is
    and searches for the preferred number of communities and, of equals, the highest modularity.

    Holds the reduced features (d numbers a patch); those of the backbone are computed twice where nothing is cached.

    Args:
        size: of the input in pixels, or [height, width]; null = the multiple of the patch nearest to 448 (to the
            data's own size if drawn).
        pca: channels kept, all of them where the features have fewer.
        k: clusters of all patches.
        mass: share of the attention that the noisy foreground holds.
        masks: folder of PNGs that are the noisy foreground instead, `<key or name of the image>.png`, 0 = background; a
            patch is foreground where at least half of it is.
        precision: from which a cluster is foreground; null = 0.4 (`standard`), or which of 0.2, 0.25, ... 0.7 has the
            highest IoU of the foreground on train (`reference`).
        k_community: clusters of the foreground, fewer where it has fewer patches.
        markov_time: of the communities: the longer, the larger they are.
        threshold: edges of less weight are dropped.
        method: of the communities.
        modules: preferred number of communities; null = the number of classes without the background.
        search: tries of other k_community (0.7 to 1.4 times the given), markov_time (0.5 to 2) and threshold (0.5 to
            2), after the given ones; the published search has 300.
        seeds: of the communities.
        sample: k-means is trained on at most so many patches a cluster.
        iterations, restarts: of k-means.
        engine: of k-means.

    Raises:
        NecoError: no seeds, or no faiss or Infomap where it is asked for.
    """

    def __init__(
        self,
        *,
        compat: Compat = "standard",
        size: Size | None = None,
        pca: Positive = 50,
        k: Positive = 200,
        mass: PositiveFraction = 0.65,
        masks: str | None = None,
        precision: PositiveFraction | None = None,
        k_community: Positive = 189,
        markov_time: PositiveFloat = 1.2,
        threshold: PositiveFraction = 0.07,
        method: Method = "louvain",
        modules: Positive | None = None,
        search: NonNegative = 0,
        seeds: tuple[NonNegative, ...] = tuple(range(10)),
        sample: Positive = 256,
        iterations: Positive = 100,
        restarts: Positive = 5,
        engine: Engine = "faiss",
    ) -> None:
        check_engine(engine)
        check_protocol(compat, size)
        check_method(method)
        if not seeds:
            raise NecoError("seeds=[]: give at least one")
        self.compat, self.size, self.pca, self.k = compat, size, pca, k
        self.mass, self.masks = mass, Path(masks).expanduser() if masks else None
        self.precisions = (precision,) if precision else PRECISIONS if compat == "reference" else (PRECISION,)
        self.attends = self.masks is None  # needs the attention of a CLS token
        self.given = Parameters(k_community, markov_time, threshold)
        self.method, self.modules = method, modules
        self.search, self.seeds = search, seeds
        self.sample, self.iterations, self.restarts, self.engine = sample, iterations, restarts, engine

    def plan(
        self, patch: int, dataset: Dataset
    ) -> tuple[tuple[int, int], int, list[Sample], list[Sample], list[Sample]]:
        """Size of the input, the background class, the images of train and val, and the given masks of both, if any.

        Raises NecoError for everything that can be seen to fail before the first image is read.
        """
        size, background = input_size(self.size, SIZE, patch, dataset), background_of(dataset)
        val = labelled(dataset, "val")
        if self.compat == "reference":
            train = labelled(dataset, "train")
        else:  # labels of train are not wanted
            train = sorted(dataset.samples("train"), key=lambda sample: sample.key)
        patches = (len(train) + len(val)) * math.prod(token_grid(size, patch))
        for name, k in (("k", self.k), ("k_community", self.given.k)):
            if k > patches:
                raise NecoError(f"{name}={k} clusters of {patches} patches: use a smaller {name}")
        masks = [Sample(sample.key, self._mask(sample)) for sample in (*train, *val) if self.masks]
        if twice := [path for path, count in Counter(sample.image for sample in masks).items() if count > 1]:
            raise NecoError(
                f"masks={self.masks}: {twice[0]} would be that of several images; name it by their whole keys"
            )
        return size, background, train, val, masks

    def names(self, dataset: Dataset) -> list[str]:
        """Of the metrics."""
        return ["miou", "foreground_iou", f"miou_k{len(dataset.classes) - 1}"]

    def __call__(
        self, backbone: PatchFeatures, dataset: Dataset, *, extract: Extract | None = None, seed: int = 0, show: int = 0
    ) -> Result:
        """Evaluate `backbone`; `seed` is that of k-means and of the search. `show`: so many images of val are
        drawn with the foreground, the communities of the first seed, and what these say.

        Returns: metrics `miou`, the mean over `seeds`; `foreground_iou` of step 1 alone; `miou_k<C - 1>`, of k-means
        of the foreground into that many clusters instead of steps 2 to 4. Details: standard deviation (of the sample)
        and what was chosen.

        Raises:
            NecoError: there are no `masks` and the backbone gives no attention.
        """
        extract, classes = extract or Extract(), len(dataset.classes)
        size, background, train, val, _ = self.plan(backbone.patch, dataset)
        numbered = collectives.share([*enumerate([*train, *val])])
        own, in_val = [sample for _, sample in numbered], np.array([i >= len(train) for i, _ in numbered], bool)
        front = self._noisy_foreground(backbone, dataset, own, size, extract)
        points = self._points(backbone, dataset, own, size, extract)
        targets = {"val": self._targets(dataset, own, in_val, size, extract)}
        if self.compat == "reference":
            targets["train"] = self._targets(dataset, own, ~in_val, size, extract)

        def score(maps: np.ndarray, nodes: int, split: str) -> Tensor:
            """Confusion matrix (nodes, C) of a split."""
            return _count(maps[in_val if split == "val" else ~in_val], targets[split], nodes, classes)

        device = extract.place(backbone)
        clusters = self._cluster(points, np.ones(points.shape[:3], np.int64), self.k, seed, device, spherical=True)
        total, images = (collectives.total(part) for part in cluster_precision(clusters, front, self.k))
        precision = total / images.clamp(min=1)
        matrices = {split: score(clusters, self.k, split) for split in targets}
        least = self.precisions[0]
        if "train" in matrices:
            least = max(self.precisions, key=lambda p: _foreground_iou(matrices["train"], precision >= p, background))
        kept = (precision >= least).numpy()[clusters]

        def worth(found: Found) -> tuple[float, float]:
            if "train" in targets:
                nodes = score(found.maps, found.nodes, "train")
                matched = (_matched(nodes, partition, background) for partition in found.partitions)
                return fmean(metrics.miou(matrix, self.compat) for matrix in matched), 0.0
            off = fmean(abs(partition.count - self._preferred(classes)) for partition in found.partitions)
            return -off, fmean(partition.modularity for partition in found.partitions)

        tries = track([*self._tries(seed)], "communities")
        best = max((self._communities(points, kept, given, classes, seed, device) for given in tries), key=worth)
        nodes = score(best.maps, best.nodes, "val")
        final = [_matched(nodes, partition, background) for partition in best.partitions]
        none = not any(partition.count for partition in best.partitions)
        if none:
            why = "no two clusters are connected, so there are no communities"
            log.warning("%s: lower threshold=%g", why, self.given.threshold)
        mious = [metrics.miou(matrix, self.compat) for matrix in final]

        few = min(classes - 1, self._patches(kept))
        plain = score(self._nodes(points, kept, few, seed, device), few + 1, "val")
        plain = metrics.remap(plain, metrics.match_one_to_one(plain, background))
        iou = torch.stack([metrics.class_iou(matrix) for matrix in final]).nanmean(0)
        return Result(
            "/".join([self._protocol(size, classes), *part_of_train(dataset), *["no communities found"] * none]),
            {
                "miou": fmean(mious),
                "foreground_iou": _foreground_iou(matrices["val"], precision >= least, background),
                f"miou_k{classes - 1}": metrics.miou(plain, self.compat),
            },
            {
                "miou": {
                    "std": stdev(mious) if len(mious) > 1 else None,
                    "seeds": dict(zip(self.seeds, mious, strict=True)),
                    "communities": [partition.count for partition in best.partitions],
                    "k_community": best.nodes - 1,
                    "markov_time": best.given.markov_time,
                    "threshold": best.given.threshold,
                    "iou": metrics.by_class(iou, dataset.classes),
                    **metrics.absent(plain, dataset.classes),
                },
                "foreground_iou": {"precision": least, "clusters": int((precision >= least).sum())},
                f"miou_k{classes - 1}": {"iou": metrics.by_class(metrics.class_iou(plain), dataset.classes)},
            },
            pictures=self._draw(dataset, val, own, in_val, kept, best, nodes, background, show),
        )

    def _draw(
        self,
        dataset: Dataset,
        val: Sequence[Sample],
        own: Sequence[Sample],
        in_val: np.ndarray,
        kept: np.ndarray,
        found: Found,
        matrix: Tensor,
        background: int,
        show: int,
    ) -> list[Picture]:
        wanted, module = {sample.key for sample in shown(val, show)}, torch.from_numpy(found.partitions[0].module)
        rows = [row for row, sample in enumerate(own) if in_val[row] and sample.key in wanted]
        some, joined = [own[row] for row in rows], _joined(matrix, module)
        parts = module[torch.from_numpy(found.maps[rows]).long()]
        labels = metrics.match_one_to_one(joined, background)[parts]
        drawn = []
        for sample, front, part in zip(some, kept[rows], parts, strict=True):
            drawn.append(groups_over(dataset, sample, np.where(front, 0, IGNORE), 1, "foreground"))
            drawn.append(groups_over(dataset, sample, part, len(joined), "communities"))
        drawn += predictions(dataset, some, labels, _matched(matrix, found.partitions[0], background))
        everything = [picture for part in collectives.merge(drawn) for picture in part]
        return [*{(picture.kind, picture.key): picture for picture in everything}.values()]

    # Steps

    def _noisy_foreground(
        self, backbone: PatchFeatures, dataset: Dataset, own: Sequence[Sample], size: Size, extract: Extract
    ) -> np.ndarray:
        """bool (N, h, w) of this process's images."""
        h, w = token_grid(size, backbone.patch)
        front = np.empty((len(own), h, w), bool)
        if self.masks:
            for row, sample in enumerate(own):
                stored = read_mask(self._mask(sample)).values
                pixels = (stored.reshape(*stored.shape[:2], -1) > 0).any(2)
                shares = Image.fromarray(pixels.astype(np.uint8) * 255).resize((w, h), Image.Resampling.BOX)
                front[row] = np.asarray(shares) >= 128
            return front
        for rows, attention, _ in extract.stream(
            Attention(backbone), dataset, own, size, nearest=None, what="train and val, attention"
        ):
            front[rows] = foreground(attention.permute(0, 3, 1, 2), self.mass).numpy()
        return front

    def _points(
        self, backbone: PatchFeatures, dataset: Dataset, own: Sequence[Sample], size: Size, extract: Extract
    ) -> np.ndarray:
        """Reduced features float32 (N, h, w, d) of this process's images."""

        def stream() -> Iterator[tuple[slice, Tensor]]:
            for rows, features, _ in extract.stream(backbone, dataset, own, size, nearest=None, what="train and val"):
                yield rows, features.flatten(0, 2)

        project = clustering.fit_projection(
            (part for _, part in stream()), backbone.dim, self.pca, extract.place(backbone)
        )
        points = np.empty((len(own), *token_grid(size, backbone.patch), project.axes.shape[1]), np.float32)
        for rows, part in stream():
            points[rows] = project(part).view(-1, *points.shape[1:])
        return points

    def _targets(
        self, dataset: Dataset, own: Sequence[Sample], chosen: np.ndarray, size: Size, extract: Extract
    ) -> Tensor:
        """Masks at 100 x 100 of the chosen ones of this process's images, uint8: small beside their features."""
        samples = [sample for sample, wanted in zip(own, chosen, strict=True) if wanted]
        targets = torch.empty(len(samples), GRID, GRID, dtype=torch.uint8)
        for rows, masks in extract.masks(dataset, samples, size):
            targets[rows] = resize_nearest(masks, GRID)
        return targets

    def _cluster(
        self,
        points: np.ndarray,
        weights: np.ndarray,
        k: int,
        seed: int,
        device: torch.device,
        spherical: bool = False,
    ) -> np.ndarray:
        """k-means of all processes' patches, each as often as `weights`, int64 (N, h, w): int64 (N, h, w)."""
        ends, rows = np.cumsum(weights), points.reshape(-1, points.shape[3])
        totals = collectives.merge(int(ends[-1]) if len(ends) else 0)
        first = sum(totals[: collectives.rank()])
        count = min(sum(totals), self.sample * k)
        drawn = np.sort(generator(seed, k, "k-means").choice(sum(totals), count, replace=False, shuffle=False)) - first
        drawn = drawn[(drawn >= 0) & (drawn < totals[collectives.rank()])]
        local = torch.from_numpy(rows[np.searchsorted(ends, drawn, side="right")])
        trained = clustering.kmeans(
            collectives.gather_uneven(local).numpy(),
            k,
            seed=seed,
            engine=self.engine,
            iterations=self.iterations,
            restarts=self.restarts,
            sample=self.sample,
            spherical=spherical,
            device=device,
        )
        centroids = collectives.merge(trained.centroids)[0]  # of one process, whatever rounding does in the others
        index = clustering.assign(rows, centroids, engine=self.engine, spherical=spherical, device=device)
        return index.reshape(points.shape[:3])

    def _nodes(self, points: np.ndarray, kept: np.ndarray, k: int, seed: int, device: torch.device) -> np.ndarray:
        """The foreground in k clusters: int32 (N, h, w), 0 = background."""
        if not k:
            return np.zeros(kept.shape, np.int32)
        index = self._cluster(points, kept * multiplicity(*kept.shape[1:]), k, seed, device)
        return np.where(kept, index + 1, 0).astype(np.int32)

    def _patches(self, kept: np.ndarray) -> int:
        """Patches of the foreground in all processes that are seen at 100 x 100."""
        return sum(collectives.merge(int((kept & (multiplicity(*kept.shape[1:]) > 0)).sum())))

    def _communities(
        self, points: np.ndarray, kept: np.ndarray, given: Parameters, classes: int, seed: int, device: torch.device
    ) -> Found:
        k = min(given.k, self._patches(kept))
        if k < given.k:
            log.warning("k_community=%d: the foreground has %d patches", given.k, k)
        maps, nodes = self._nodes(points, kept, k, seed, device), k + 1
        shares, images = torch.zeros(nodes, nodes, dtype=torch.float64), torch.zeros(nodes, dtype=torch.long)
        around = offsets(self.compat)
        for start in range(0, len(maps), BATCH):
            shown = resize_nearest(torch.from_numpy(maps[start : start + BATCH]), GRID)
            part = neighbour_shares(shown, nodes, around)
            shares += part[0]
            images += part[1]
        weights = edge_weights(collectives.total(shares), collectives.total(images))
        partitions = [
            communities(
                weights,
                given.threshold,
                method=self.method,
                markov_time=given.markov_time,
                modules=self._preferred(classes),
                seed=number,
            )
            for number in self.seeds
        ]
        return Found(given, maps, nodes, partitions)

    def _tries(self, seed: int) -> Iterator[Parameters]:
        yield self.given
        for number in range(self.search):
            rng = generator(seed, number, "search")
            k, time, threshold = (math.exp(rng.uniform(*np.log(limits))) for limits in ((0.7, 1.4), (0.5, 2), (0.5, 2)))
            given = self.given
            yield Parameters(max(1, round(k * given.k)), time * given.markov_time, min(1, threshold * given.threshold))

    # Names

    def _preferred(self, classes: int) -> int:
        return self.modules or classes - 1

    def _mask(self, sample: Sample) -> str:
        """The file of a given mask. Raises NecoError where there is none."""
        assert self.masks
        for name in (sample.key, sample.key.rpartition("/")[2]):
            if (path := self.masks / f"{name}.png").is_file():
                return str(path)
        raise NecoError(f"masks={self.masks}: {path} is not there; every image of train and val needs one")

    def _protocol(self, size: Size, classes: int) -> str:
        chosen = {"standard": "modules and modularity", "reference": "train mIoU"}[self.compat]
        precisions = self.precisions
        parts = [
            f"unsupervised/{self.compat}/{size_name(size)}",
            f"pca={self.pca}",
            f"k={self.k}",
            "given masks" if self.masks else f"mass={self.mass:g}",
            f"precision={precisions[0]:g}" if len(precisions) == 1 else "precision by train IoU",
            f"k_community={self.given.k}",
            f"threshold={self.given.threshold:g}",
            f"{self.method}={self.given.markov_time:g}",
            f"modules={self._preferred(classes)}",
            f"search={self.search} by {chosen}" if self.search else "no search",
            f"kmeans={self.iterations}x{self.restarts}",
            f"sample={self.sample}",
            f"seeds={','.join(map(str, self.seeds))}",
        ]
        return "/".join(parts)


def _count(maps: np.ndarray, targets: Tensor, nodes: int, classes: int) -> Tensor:
    """Confusion matrix (nodes, C) of maps (N, h, w) and masks (N, 100, 100) of all processes."""
    matrix = torch.zeros(nodes, classes, dtype=torch.long)
    for start in range(0, len(maps), BATCH):
        shown = resize_nearest(torch.from_numpy(maps[start : start + BATCH]), GRID)
        matrix += metrics.confusion(shown, targets[start : start + BATCH], nodes, classes)
    return collectives.total(matrix)


def _foreground_iou(matrix: Tensor, kept: Tensor, background: int) -> float:
    """IoU of the foreground when it is the `kept` (K,) of clusters with confusion matrix (K, C)."""
    objects = matrix.sum(1) - matrix[:, background]
    inside, outside = objects[kept].sum(), matrix[kept, background].sum()
    return int(inside) / max(1, int(objects.sum() + outside))


def _matched(matrix: Tensor, partition: Partition, background: int) -> Tensor:
    """Confusion matrix (C, C) after the nodes (K, C) became communities and these the classes that fit them best."""
    joined = _joined(matrix, torch.from_numpy(partition.module))
    return metrics.remap(joined, metrics.match_one_to_one(joined, background))


def _joined(matrix: Tensor, module: Tensor) -> Tensor:
    """Rows of (K, C) added up by community."""
    return matrix.new_zeros(int(module.max()) + 1, matrix.shape[1]).index_add_(0, module, matrix)
