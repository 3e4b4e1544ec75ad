"""Clustering and overclustering: k-means over all patches of val, clusters matched to classes with the ground truth.

The protocol of Leopart (Ziegler and Asano, Self-Supervised Learning of Object Parts for Semantic Segmentation, 2022),
which NeCo reports too.

Shapes: N images, h w patches, D channels, K clusters, C classes.
"""

from collections.abc import Mapping, Sequence
from math import prod
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

from neco.config.types import NonNegative, Positive, Size
from neco.dataset.base import Dataset, Sample
from neco.distributed import collectives
from neco.eval.common import clustering, metrics
from neco.eval.common.metrics import Compat
from neco.eval.common.neighbors import Engine, check_engine
from neco.eval.evaluation import Result, check_protocol, input_size, labelled, size_name
from neco.features.extractor import Extract, PatchFeatures, resize_nearest, token_grid
from neco.report.pictures import Picture, groups_over, predictions, shown
from neco.utils.errors import NecoError
from neco.utils.progress import track

SIZE = 448  # published
GRID = 100  # pixels per side at which clusters and masks are compared


class Overcluster:
    """mIoU of matched k-means clusters on val, mean over seeds.

    Features are standardised and reduced by PCA; clusters and masks are compared at 100 x 100 (nearest; masks by way of
    the input size). With as many clusters as classes the matching is one to one (Hungarian, on IoU); otherwise each
    cluster goes to the class of highest precision. `compat=reference` counts absent classes as 0.

    Args:
        size: of the input in pixels, or [height, width]; null = the multiple of the patch nearest to 448 (to the
            data's own size if drawn).
        k: number of clusters, or several; null, also among several = the number of classes.
        seeds: of k-means (published: 0 to 4).
        pca: channels kept, all of them where the features have fewer.
        pca_rows: PCA is fitted on at most so many patches for each input channel.
        sample: k-means is trained on at most so many patches a cluster.
        iterations, restarts: of k-means.
        spherical: k-means by inner product with centroids of length 1.
        engine: of PCA and k-means.
        drop_last: of `reference`: images are left out that do not fill a last batch of so many (published: 32);
            0 = none.

    Raises:
        NecoError: `drop_last` with `standard`, k or seeds empty, or no faiss where it is asked for.
    """

    def __init__(
        self,
        *,
        compat: Compat = "standard",
        size: Size | None = None,
        k: Positive | list[Positive | None] | None = None,
        seeds: tuple[NonNegative, ...] = (0, 1, 2, 3, 4),
        pca: Positive = 50,
        pca_rows: Positive = 1000,
        sample: Positive = 256,
        iterations: Positive = 100,
        restarts: Positive = 5,
        spherical: bool = False,
        engine: Engine = "faiss",
        drop_last: NonNegative = 0,
    ) -> None:
        check_engine(engine)
        check_protocol(compat, size, drop_last)
        if k == [] or not seeds:
            raise NecoError(f"k={k}, seeds={list(seeds)}: give at least one of each")
        self.compat = compat
        self.size = size
        self.k = k
        self.seeds = seeds
        self.pca, self.pca_rows = pca, pca_rows
        self.sample, self.iterations, self.restarts, self.spherical = sample, iterations, restarts, spherical
        self.engine = engine
        self.drop_last = drop_last

    def plan(self, patch: int, dataset: Dataset) -> tuple[tuple[int, int], list[int], list[Sample]]:
        """Size of the input, numbers of clusters, and the images.

        Raises NecoError for everything that can be seen to fail before the first image is read.
        """
        size, samples = input_size(self.size, SIZE, patch, dataset), labelled(dataset, "val", self.drop_last)
        ks = sorted(set(self._ks(dataset)))
        if ks[-1] > (patches := len(samples) * prod(token_grid(size, patch))):
            images = f"{len(samples)} images of {size_name(size)}"
            raise NecoError(f"k={ks[-1]} clusters of {patches} patches ({images}): use a smaller k")
        return size, ks, samples

    def names(self, dataset: Dataset) -> list[str]:
        """Of the metrics."""
        return [f"miou_k{k}" for k in self._ks(dataset)]

    def _ks(self, dataset: Dataset) -> list[int]:
        return [k or len(dataset.classes) for k in (self.k if isinstance(self.k, list) else [self.k])]

    def __call__(
        self, backbone: PatchFeatures, dataset: Dataset, *, extract: Extract | None = None, seed: int = 0, show: int = 0
    ) -> Result:
        """Evaluate `backbone`. `seed`, part of every evaluation, changes nothing: the protocol's own are `seeds`.

        `show`: so many images are drawn with clusters and predictions of the first seed.

        Returns: metrics `miou_k<k>`, the mean over seeds; details: standard deviation (of the sample), the number for
        each seed, the matching, and the mean IoU of each class.
        """
        extract, classes = extract or Extract(), len(dataset.classes)
        size, ks, samples = self.plan(backbone.patch, dataset)
        features = extract(backbone, dataset, collectives.share(samples), size, what="val")
        if collectives.world() > 1:
            features = collectives.gather_uneven(torch.from_numpy(np.array(features))).numpy()
        shape, device = features.shape[:3], extract.place(backbone)
        points = clustering.project(
            features.reshape(-1, features.shape[3]),
            self.pca,
            engine=self.engine,
            rows_per_dim=self.pca_rows,
            device=device,
        )
        del features
        runs = [(k, seed) for k in ks for seed in self.seeds]
        matrices = {(k, seed): torch.zeros(k, classes, dtype=torch.long) for k, seed in runs}
        pictures: list[Picture] = []
        maps = {}  # with several processes, each has its part of the k-means runs
        for k, seed in track(collectives.share(runs), "k-means"):
            index = self._cluster(points, k, seed, device)
            maps[k, seed] = torch.from_numpy(index.astype(np.int32).reshape(shape))
        for rows, masks in extract.masks(dataset, samples, size) if maps else ():
            target = resize_nearest(masks, GRID)
            for (k, seed), clusters in maps.items():
                matrices[k, seed] += metrics.confusion(resize_nearest(clusters[rows], GRID), target, k, classes)
        matrices = {run: collectives.total(matrix) for run, matrix in matrices.items()}
        found, details = {}, {}
        for k in ks:
            match = metrics.match_one_to_one if k == classes else metrics.match_many_to_one
            matched = [metrics.remap(matrices[k, seed], match(matrices[k, seed])) for seed in self.seeds]
            scores = [metrics.miou(matrix, self.compat) for matrix in matched]
            iou = torch.stack([metrics.class_iou(matrix) for matrix in matched]).nanmean(0)
            found[f"miou_k{k}"] = fmean(scores)
            if show:
                pictures += self._draw(dataset, samples, k, maps, match(matrices[k, self.seeds[0]]), matched[0], show)
            details[f"miou_k{k}"] = {
                "std": stdev(scores) if len(scores) > 1 else None,
                "seeds": dict(zip(self.seeds, scores, strict=True)),
                "matching": match.__name__.removeprefix("match_"),
                "iou": metrics.by_class(iou, dataset.classes),
                **metrics.absent(matched[0], dataset.classes),
            }
        pictures = [picture for part in collectives.merge(pictures) for picture in part]
        return Result(self._protocol(size, ks), found, details, pictures=pictures)

    def _draw(
        self,
        dataset: Dataset,
        samples: Sequence[Sample],
        k: int,
        maps: Mapping[tuple[int, int], Tensor],
        mapping: Tensor,
        matrix: Tensor,
        show: int,
    ) -> list[Picture]:
        """The clusters of the first seed over images and, by the class they were matched to, as a prediction."""
        if (clusters := maps.get((k, self.seeds[0]))) is None:  # another process has it
            return []
        rows, some = zip(*shown([*enumerate(samples)], show), strict=True)
        clusters = clusters[[*rows]].long()
        drawn = [groups_over(dataset, *pair, k, f"{k} clusters") for pair in zip(some, clusters, strict=True)]
        return drawn + predictions(dataset, some, mapping[clusters], matrix, f", k={k}")

    def _cluster(self, points: np.ndarray, k: int, seed: int, device: torch.device) -> np.ndarray:
        clusters = clustering.kmeans(
            points,
            k,
            seed=seed,
            engine=self.engine,
            iterations=self.iterations,
            restarts=self.restarts,
            sample=self.sample,
            spherical=self.spherical,
            device=device,
        )
        return clustering.assign(
            points, clusters.centroids, engine=self.engine, spherical=self.spherical, device=device
        )

    def _protocol(self, size: Size, ks: list[int]) -> str:
        parts = [
            f"overcluster/{self.compat}/{size_name(size)}",
            f"k={','.join(map(str, ks))}",
            f"pca={self.pca}x{self.pca_rows}",
            f"kmeans={self.iterations}x{self.restarts}",
            f"sample={self.sample}",
            f"seeds={','.join(map(str, self.seeds))}",
        ]
        parts += ["spherical"] * self.spherical + [f"drop_last={self.drop_last}"] * bool(self.drop_last)
        return "/".join(parts)
