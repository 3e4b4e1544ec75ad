"""Standardisation, PCA and k-means over many rows, with faiss or plain torch.

Shapes: R rows, D channels, d reduced channels, K clusters. Rows are float32 numpy arrays, memory-mapped ones included:
they are read in chunks and never written to.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neco.distributed import collectives
from neco.distributed.devices import full_precision
from neco.eval.common.neighbors import Engine, load_faiss
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
CHUNK = 16_384  # rows; three float64 copies of them at a time
SAMPLE_SEED = 1234  # of the rows that PCA is fitted on; faiss has it fixed


def chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK]


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of each channel, (R, D) -> two float64 (D,); 1 for a constant channel.

    In float64, the chunks joined by Chan's update, so that any number of rows will do.
    """
    count, mean, squares = 0, np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    for chunk in chunks(rows):
        part = chunk.astype(np.float64)
        centre, total = part.mean(0), count + len(part)
        shift = centre - mean
        squares += ((part - centre) ** 2).sum(0) + shift**2 * count * len(part) / total
        mean += shift * len(part) / total
        count = total
    variance, eps = squares / count, np.finfo(np.float64).eps
    constant = variance <= count * eps * variance + (count * mean * eps) ** 2  # what rounding alone can produce
    return mean, np.where(constant, 1, np.sqrt(variance))


def standardise(rows: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(rows - mean) / scale as a new float32 array, in float32 as scikit-learn's StandardScaler does."""
    return (rows - mean.astype(np.float32)) / scale.astype(np.float32)


def project(
    rows: np.ndarray,
    dims: int,
    *,
    engine: Engine = "faiss",
    rows_per_dim: int = 1000,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Standardise every channel, then PCA: (R, D) -> float32 (R, d), channels by falling variance, signs arbitrary.

    Args:
        dims: d; clamped to D and to R, beyond which there is nothing to keep.
        engine: `faiss` (PCAMatrix, float32 covariance) or `torch` (float64).
        rows_per_dim: the axes come from at most this many rows for each input channel, drawn at random.
        device: where the torch engine works.
    """
    mean, scale = moments(rows)
    dims = min(dims, *rows.shape)
    keep = rows_per_dim * rows.shape[1]
    if len(rows) > keep:
        log.info("PCA is fitted on %d of %d rows (%d a channel)", keep, len(rows), rows_per_dim)
    wanted = _draw(len(rows), keep, engine)
    sample = standardise(rows if wanted is None else rows[wanted], mean, scale)
    out = np.empty((len(rows), dims), np.float32)
    if engine == "faiss":
        pca = load_faiss().PCAMatrix(rows.shape[1], dims)
        pca.max_points_per_d = rows_per_dim
        pca.train(sample)
        for start, chunk in zip(range(0, len(rows), CHUNK), chunks(rows), strict=True):
            out[start : start + CHUNK] = pca.apply(standardise(chunk, mean, scale))
        return out
    parts = [torch.from_numpy(chunk) for chunk in chunks(sample)]
    centre = sum(part.to(device).double().sum(0) for part in parts) / len(sample)
    centred = (part.to(device).double() - centre for part in parts)
    axes = torch.linalg.eigh(sum(part.T @ part for part in centred))[1].flip(1)[:, :dims]
    for start, chunk in zip(range(0, len(rows), CHUNK), chunks(rows), strict=True):
        part = torch.from_numpy(standardise(chunk, mean, scale)).to(device).double()
        out[start : start + CHUNK] = ((part - centre) @ axes).float().cpu().numpy()
    return out


def _draw(rows: int, keep: int, engine: Engine) -> np.ndarray | None:
    """Indices of `keep` random rows, None for all of them; with faiss those that its own PCA would draw."""
    if rows <= keep:
        return None
    if engine == "faiss":
        faiss, order = load_faiss(), np.empty(rows, np.int32)
        faiss.rand_perm(faiss.swig_ptr(order), rows, SAMPLE_SEED)
        return order[:keep]
    return torch.randperm(rows, generator=torch.Generator().manual_seed(SAMPLE_SEED))[:keep].numpy()


@dataclass(frozen=True)
class Projection:
    """Standardisation and PCA that were fitted: mean (D,) and axes (D, d), float64; rows (R, D) -> float32 (R, d)."""

    mean: Tensor
    axes: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return ((rows.to(self.axes) - self.mean) @ self.axes).float().cpu()


def fit_projection(parts: Iterable[Tensor], channels: int, dims: int, device: str | torch.device = "cpu") -> Projection:
    """`project` for rows that are too many to hold: fitted on all of them, in all processes, from second moments.

    Args:
        parts: float32 (R, D) each, D = channels; none of them is kept.
        dims: d; clamped to D.
        device: where the moments are summed, in float64.
    """
    count, first = torch.zeros(1, dtype=torch.long), torch.zeros(channels, dtype=torch.float64, device=device)
    second = torch.zeros(channels, channels, dtype=torch.float64, device=device)
    for part in parts:
        rows = part.to(device).double()
        count += len(rows)
        first += rows.sum(0)
        second += rows.T @ rows
    rows_seen = int(collectives.total(count))
    mean, square = collectives.total(first) / rows_seen, collectives.total(second) / rows_seen
    covariance = square - mean[:, None] * mean
    variance = covariance.diagonal()
    scale = torch.where(variance <= 1e-12 * mean.square(), 1, variance.clamp(min=0).sqrt())  # constant: rounding alone
    axes = torch.linalg.eigh(covariance / scale[:, None] / scale)[1].flip(1)[:, :dims]
    return Projection(mean, axes / scale[:, None])


@dataclass(frozen=True)
class Clusters:
    """Centroids float32 (K, d) and the final objective over the `rows` that they were trained on.

    The objective is the sum of squared distances (to be small) or, `spherical`, of inner products (to be large).
    """

    centroids: np.ndarray
    objective: float
    rows: int


def kmeans(
    points: np.ndarray,
    k: int,
    *,
    seed: int = 0,
    engine: Engine = "faiss",
    iterations: int = 100,
    restarts: int = 5,
    sample: int = 256,
    spherical: bool = False,
    device: str | torch.device = "cpu",
) -> Clusters:
    """K-means from random points, the best of several restarts: points float32 (R, d) -> K = k centroids.

    Args:
        seed: of the sample and of all restarts.
        engine: `faiss` (on the CPU) or `torch`; the same procedure from other random numbers.
        iterations: of Lloyd's algorithm. A cluster that runs empty takes half of a large one.
        restarts: from other random points, each with all iterations.
        sample: training sees at most this many points a cluster, drawn at random (faiss's own default is 256).
        spherical: centroids have length 1 and compare by inner product.
        device: where the torch engine works.

    Raises:
        NecoError: there are fewer points than clusters.
    """
    if len(points) < k:
        raise NecoError(f"k={k} clusters of {len(points)} points: use a smaller k or more images")
    rows = min(len(points), sample * k)
    log.info("k-means, k=%d, seed %d: trained on %d of %d points (%d a cluster)", k, seed, rows, len(points), sample)
    if engine == "torch":
        with full_precision():
            return _kmeans(torch.from_numpy(points).to(device), k, seed, iterations, restarts, rows, spherical)
    faiss = load_faiss()
    options = {  # every one, so that no version's default decides
        "niter": iterations,
        "nredo": restarts,
        "seed": seed,
        "spherical": spherical,
        "max_points_per_centroid": sample,
        "min_points_per_centroid": 1,  # only warns
        "int_centroids": False,
        "update_index": False,
        "frozen_centroids": False,
        "decode_block_size": 32768,
        "check_input_data_for_NaNs": True,
        "use_faster_subsampling": False,
        "init_method": 0,  # random points
        "afkmc2_chain_length": 50,
        "early_stop_threshold": 0.0,
        "use_super_kmeans": False,
        "verbose": False,
    }
    known = faiss.ClusteringParameters()
    machine = faiss.Kmeans(points.shape[1], k, gpu=False, **{o: v for o, v in options.items() if hasattr(known, o)})
    objective = machine.train(points)
    return Clusters(machine.centroids, float(objective), rows)


def _kmeans(points: Tensor, k: int, seed: int, iterations: int, restarts: int, rows: int, spherical: bool) -> Clusters:
    generator = torch.Generator().manual_seed(seed)
    if rows < len(points):
        points = points[torch.randperm(len(points), generator=generator)[:rows].to(points.device)]
    best: tuple[float, Tensor] = (-torch.inf, points[:k])
    for _ in range(restarts):
        centroids = points[torch.randperm(rows, generator=generator)[:k].to(points.device)]
        previous = None
        for _ in range(iterations):
            centroids = F.normalize(centroids, dim=1) if spherical else centroids
            scores, index = _closest(points, centroids, spherical)
            objective = float(scores.double().sum())
            if previous is not None and torch.equal(index, previous) and len(index.unique()) == k:
                break  # a fixed point: further iterations change nothing
            previous = index
            centroids = _means(points, index, k, generator)
        centroids = F.normalize(centroids, dim=1) if spherical else centroids
        best = max(best, (objective, centroids), key=lambda pair: pair[0])
    return Clusters(best[1].cpu().numpy(), best[0] if spherical else -best[0], rows)


def _means(points: Tensor, index: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Mean of each cluster; an empty one takes half of another, a large one likely, and both are moved a little."""
    counts = torch.bincount(index, minlength=k).double().cpu()
    sums = points.new_zeros(k, points.shape[1], dtype=torch.float64).index_add_(0, index, points.double())
    means = (sums / counts.clamp(min=1)[:, None].to(sums.device)).to(points.dtype)
    nudge = (torch.arange(points.shape[1], device=points.device) % 2 * 2 - 1) / 1024
    for empty in (counts == 0).nonzero().flatten().tolist():
        donor = int(torch.multinomial((counts - 1).clamp(min=1e-9), 1, generator=generator))
        means[empty], means[donor] = means[donor] * (1 + nudge), means[donor] * (1 - nudge)
        counts[empty] = counts[donor] = counts[donor] / 2
    return means


def _closest(points: Tensor, centroids: Tensor, spherical: bool) -> tuple[Tensor, Tensor]:
    """Score (inner product, or minus the squared distance) and index of the best centroid of each point."""
    product, lengths = (1, torch.zeros(1)) if spherical else (2, centroids.square().sum(1))
    rows = CHUNK if points.device.type == "cpu" else max(CHUNK, 2**27 // len(centroids))  # half a GB of scores
    found = [torch.addmm(-lengths.to(points), part, centroids.T, alpha=product).max(1) for part in points.split(rows)]
    score = torch.cat([f.values for f in found])
    return score if spherical else score - points.square().sum(1), torch.cat([f.indices for f in found])


def assign(
    points: np.ndarray,
    centroids: np.ndarray,
    *,
    engine: Engine = "faiss",
    spherical: bool = False,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Index of the nearest centroid (`spherical`: of the largest inner product) of each point, (R, d) -> int64 (R,)."""
    if engine == "faiss":
        faiss = load_faiss()
        index = (faiss.IndexFlatIP if spherical else faiss.IndexFlatL2)(points.shape[1])
        index.add(centroids)
        return index.search(points, 1)[1][:, 0]
    with full_precision():
        there = torch.from_numpy(points).to(device), torch.from_numpy(centroids).to(device)
        return _closest(*there, spherical)[1].cpu().numpy()
