"""Standardisation, PCA and k-means: against textbook formulas, and one engine against the other."""

import logging

import numpy as np
import pytest
import torch

from neco.eval.common import clustering
from neco.eval.common.neighbors import Engine
from neco.utils.errors import NecoError

ENGINES: list[Engine] = ["faiss", "torch"]


def blobs(rows: int, dim: int, centres: int, seed: int = 0, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    means, label = rng.standard_normal((centres, dim)) * 3, rng.integers(centres, size=rows)
    return (means[label] + spread * rng.standard_normal((rows, dim))).astype(np.float32), label


@pytest.mark.parametrize("rows", [1, 7, 100, 200, 250])
def test_moments_for_any_number_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "CHUNK", 100)
    points = (np.random.default_rng(0).standard_normal((rows, 5)) * [1, 1e-3, 100, 1, 1] + 50).astype(np.float32)
    points[:, 3] = 0.1  # constant: rounding must not blow it up
    mean, scale = clustering.moments(points)
    np.testing.assert_allclose(mean, points.astype(np.float64).mean(0), rtol=1e-12)
    deviation = points.astype(np.float64).std(0)
    np.testing.assert_allclose(scale, np.where((np.arange(5) == 3) | (rows == 1), 1, deviation), rtol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_projection_is_pca_of_standardised_channels(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "CHUNK", 64)
    points, _ = blobs(300, 12, 4, spread=1)
    points *= np.arange(1, 13, dtype=np.float32)
    points.flags.writeable = False  # never in place
    found = clustering.project(points, 5, engine=engine)
    centred = (points - points.mean(0, dtype=np.float64)) / points.std(0, dtype=np.float64)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:5]
    wanted = centred @ axes.T
    np.testing.assert_allclose(found, wanted * np.sign((found * wanted).sum(0)), atol=2e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_projection_of_few_channels_or_rows_keeps_what_there_is(engine: Engine) -> None:
    points, _ = blobs(40, 6, 3)
    assert clustering.project(points, 50, engine=engine).shape == (40, 6)
    assert clustering.project(points[:4], 50, engine=engine).shape == (4, 4)
    before = np.linalg.norm(points[:, None] / points.std(0) - points / points.std(0), axis=2)
    after = clustering.project(points, 50, engine=engine)
    np.testing.assert_allclose(np.linalg.norm(after[:, None] - after, axis=2), before, atol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_pca_rows_are_bounded_and_drawn_at_random(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    points, _ = blobs(2000, 4, 3, spread=1)
    points = points[np.argsort(points[:, 0])]  # the first rows alone would be a poor sample
    with caplog.at_level(logging.INFO):
        some = clustering.project(points, 2, engine=engine, rows_per_dim=100)
    assert "400 of 2000 rows" in caplog.text
    whole = clustering.project(points, 2, engine=engine)
    assert not np.allclose(np.abs(some), np.abs(whole), atol=1e-4)
    assert np.abs((some * whole).sum(0)).min() > 0.98 * (whole**2).sum(0).min()


def test_faiss_draws_the_rows_for_pca_that_its_own_pca_would() -> None:
    faiss = pytest.importorskip("faiss", reason="runs where faiss is installed")
    points, _ = blobs(3000, 4, 3, spread=1)
    standardised = clustering.standardise(points, *clustering.moments(points))
    pca = faiss.PCAMatrix(4, 2)
    pca.max_points_per_d = 100
    pca.train(standardised)
    found = clustering.project(points, 2, engine="faiss", rows_per_dim=100)
    np.testing.assert_allclose(found, pca.apply(standardised), atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_finds_blobs(engine: Engine, spherical: bool) -> None:
    points, label = blobs(600, 8, 5)
    clusters = clustering.kmeans(points, 5, engine=engine, spherical=spherical, restarts=40)
    index = clustering.assign(points, clusters.centroids, engine=engine, spherical=spherical)
    assert len({*zip(index, label, strict=True)}) == 5  # the same partition
    if spherical:
        np.testing.assert_allclose(np.linalg.norm(clusters.centroids, axis=1), 1, atol=1e-5)
        assert clusters.objective == pytest.approx((points * clusters.centroids[index]).sum(), rel=1e-4)
    else:
        np.testing.assert_allclose(clusters.centroids[index[0]], points[label == label[0]].mean(0), atol=1e-4)
        assert clusters.objective == pytest.approx(((points - clusters.centroids[index]) ** 2).sum(), rel=1e-4)


def test_engines_reach_the_same_objective() -> None:
    points, _ = blobs(1500, 10, 60, spread=1.5)
    objectives = [clustering.kmeans(points, 20, engine=engine, restarts=8).objective for engine in ENGINES]
    assert objectives[0] == pytest.approx(objectives[1], rel=5e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_kmeans_trains_on_the_stated_sample_and_is_a_function_of_the_seed(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    points, _ = blobs(1000, 4, 20, spread=2)
    with caplog.at_level(logging.INFO):
        first, again, other = (clustering.kmeans(points, 10, seed=s, engine=engine, sample=20) for s in (0, 0, 1))
    assert first.rows == 200 and "200 of 1000 points" in caplog.text
    assert np.array_equal(first.centroids, again.centroids)
    assert not np.array_equal(first.centroids, other.centroids)
    assert clustering.kmeans(points, 10, engine=engine).rows == 1000


def test_an_empty_cluster_takes_half_of_another() -> None:
    points = torch.tensor([[0.0, 0], [0, 2], [8, 8]] + [[4.0, 4]] * 5)
    index = torch.tensor([0, 0, 1] + [3] * 5)
    means = clustering._means(points, index, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(means[[0, 1]], torch.tensor([[0.0, 1], [8, 8]]))
    torch.testing.assert_close((means[2] + means[3]) / 2, torch.tensor([4.0, 4]))
    assert 0 < (means[2] - means[3]).norm() < 0.02


@pytest.mark.parametrize("engine", ENGINES)
def test_starts_that_collide_are_pulled_apart(engine: Engine) -> None:
    points = np.repeat(blobs(40, 3, 40)[0], 10, axis=0)  # ten copies of each
    clusters = clustering.kmeans(points, 30, engine=engine)
    assert np.isfinite(clusters.centroids).all()
    assert (
        len(np.unique(clustering.assign(points, clusters.centroids, engine=engine))) >= 28
    )  # 22 are on different points at the start


@pytest.mark.parametrize("engine", ENGINES)
def test_as_many_clusters_as_points(engine: Engine) -> None:
    points, _ = blobs(8, 3, 8)
    clusters = clustering.kmeans(points, 8, engine=engine)
    assert sorted(clustering.assign(points, clusters.centroids, engine=engine)) == list(range(8))
    with pytest.raises(NecoError, match="k=9 clusters of 8 points"):
        clustering.kmeans(points, 9, engine=engine)
