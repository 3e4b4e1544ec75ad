"""Which views are drawn: reproducible, distributed as published, overlapping, for every image there is."""

import inspect
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from neco.augment.views import ViewParams, Views, centred_crop, overlap, random_crop, view_rng
from neco.errors import NecoError

SIDE = st.integers(1, 3000)


def equal(a: ViewParams, b: ViewParams) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def draw(views: Views, images: int, height: int = 480, width: int = 640) -> ViewParams:
    """Parameters of many images, stacked."""
    samples = [views.sample(view_rng(0, 0, index), height, width) for index in range(images)]
    return ViewParams(*(np.stack(field) for field in zip(*samples, strict=True)))


def test_yaml_shows_the_defaults() -> None:
    path = Path(__file__).parents[1] / "conf" / "augment" / "neco.yaml"
    options = yaml.safe_load(path.read_text())
    assert path.read_text().startswith("# ")
    assert options.pop("_target_") == "neco.augment.views.Views"
    defaults = {name: parameter.default for name, parameter in inspect.signature(Views).parameters.items()}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()} == defaults


def test_views_are_a_function_of_seed_epoch_and_index() -> None:
    views, other = Views(), Views()
    first = views.sample(view_rng(1, 2, 3), 480, 640)
    views.sample(view_rng(9, 9, 9), 100, 30)  # whatever was drawn in between
    assert equal(first, views.sample(view_rng(1, 2, 3), 480, 640))
    assert equal(first, other.sample(view_rng(1, 2, 3), 480, 640))
    for key in (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (3, 2, 1):
        assert not equal(first, views.sample(view_rng(*key), 480, 640))


@pytest.mark.parametrize("size", [(480, 640), (300, 100)])
def test_crops_are_distributed_as_torchvision_draws_them(size: tuple[int, int]) -> None:
    height, width = size
    torch.manual_seed(0)
    rng, image = view_rng(0, 0, 0), torch.empty(3, height, width)
    for scale in (0.05, 0.25), (0.25, 1.0):
        ours = np.array([random_crop(rng, height, width, scale, (3 / 4, 4 / 3)) for _ in range(3000)])
        draws = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)]
        theirs = np.array([(x, y, x + w, y + h) for y, x, h, w in draws])
        for side in range(4):
            assert ks_2samp(ours[:, side], theirs[:, side]).pvalue > 1e-3


@pytest.mark.parametrize("size", [(480, 640), (1, 1000), (1000, 1), (100, 1000), (1, 1), (7, 5)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (2.0, 3.0), (0.1, 0.3)])
def test_crop_that_cannot_fit_is_torchvisions_centred_one(size: tuple[int, int], ratio: tuple[float, float]) -> None:
    height, width = size
    # No crop of four times the image's area fits: torchvision takes its centred crop
    y, x, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), [4.0, 4.0], list(ratio))
    if h and w:  # torchvision rounds some to nothing
        assert centred_crop(height, width, ratio) == (x, y, x + w, y + h)
        assert random_crop(view_rng(0, 0, 0), height, width, (4.0, 4.0), ratio) == (x, y, x + w, y + h)


def test_colour_is_distributed_as_published() -> None:
    params = draw(Views(), 2000)
    drawn = params.jitter.size
    for share, wanted in (params.jitter, 0.8), (params.grey, 0.2), (params.sigma > 0, 0.5):
        assert abs(share.mean() - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / drawn)
    factors = params.factors.reshape(-1, 4)
    for values, low, high in zip(factors.T, (0.2, 0.2, 0.2, -0.2), (1.8, 1.8, 1.8, 0.2), strict=True):
        assert ks_2samp(values, np.linspace(low, high, 10001)).pvalue > 1e-3
    assert ks_2samp(params.sigma[params.sigma > 0], np.linspace(0.1, 2, 10001)).pvalue > 1e-3
    orders, counts = np.unique(params.order.reshape(-1, 4), axis=0, return_counts=True)
    assert len(orders) == 24 and np.all(np.sort(orders, axis=1) == np.arange(4))
    assert np.abs(counts - drawn / 24).max() < 5 * math.sqrt(drawn / 24)


def test_strengths_scale_the_ranges() -> None:
    params = draw(Views(jitter_strength=2, jitter=(0.8, 0.1, 0.0, 0.25), blur_strength=3, blur_probability=1.0), 300)
    factors = params.factors.reshape(-1, 4)
    for values, low, high in zip(factors.T, (0.0, 0.8, 1.0, -0.5), (2.6, 1.2, 1.0, 0.5), strict=True):
        assert low <= values.min() <= low + 0.05 * (high - low) and high - 0.05 * (high - low) <= values.max() <= high
    assert 0.3 <= params.sigma.min() < 0.4 and 5.8 < params.sigma.max() <= 6


@settings(max_examples=200, deadline=None)
@given(SIDE, SIDE, st.integers(1, 3), st.integers(0, 4), st.floats(0, 1), st.integers(0, 2**63))
def test_every_view_overlaps_the_global_views(
    height: int, width: int, global_views: int, local_views: int, min_overlap: float, seed: int
) -> None:
    local_views = max(local_views, 2 - global_views)
    views = Views(global_views=global_views, local_views=local_views, min_overlap=min_overlap)
    with warnings.catch_warnings(record=True) as fallen_back:
        warnings.simplefilter("always")
        crops = views.sample(view_rng(seed, 0, 0), height, width).crops
    assert crops.shape == (global_views + local_views, 4)
    assert (crops[:, :2] >= 0).all() and (crops[:, 2:] <= [width, height]).all()
    assert (crops[:, 2:] > crops[:, :2]).all()
    for view, crop in enumerate(crops):
        for anchor in range(min(view, global_views)):
            shared = int((np.minimum(crop[2:], crops[anchor, 2:]) - np.maximum(crop[:2], crops[anchor, :2])).min())
            assert shared > 0  # no pair without a box, fallback or not
            wanted = min_overlap * height * width * (2 if view == 1 and global_views > 1 else 1)
            assert fallen_back or overlap(tuple(crop), tuple(crops[anchor])) > wanted


def test_overlap_counts_shared_pixels() -> None:
    canvas = np.zeros((2, 9, 9), int)
    rng = view_rng(0, 0, 0)
    for _ in range(200):
        crops = [random_crop(rng, 9, 9, (0.05, 1.0), (0.5, 2.0)) for _ in range(2)]
        canvas[:] = 0
        for layer, (x1, y1, x2, y2) in zip(canvas, crops, strict=True):
            layer[y1:y2, x1:x2] = 1
        assert overlap(*crops) == canvas.prod(axis=0).sum()


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (480, 640)])
def test_a_wish_that_cannot_be_met_ends_and_is_said_once(size: tuple[int, int]) -> None:
    views = Views(min_overlap=1.0)
    with pytest.warns(UserWarning, match=f"{size[1]} x {size[0]} pixels"):
        params = views.sample(view_rng(0, 0, 0), *size)
    assert tuple(params.crops[-1]) == centred_crop(*size, views.ratio)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        views.sample(view_rng(0, 0, 1), *size)


@pytest.mark.parametrize(
    ("patch", "size", "sizes"),
    [
        (14, 518, (518, 98)),
        (16, 224, (224, 96)),
        (8, 64, (64, 32)),
        (16, 256, (256, 96)),
        (14, 224, (224, 98)),
        (16, 16, (16, 16)),
    ],
)
def test_open_sizes_follow_the_backbone(patch: int, size: int, sizes: tuple[int, int]) -> None:
    views = Views(global_views=1, local_views=2)
    with pytest.raises(NecoError, match="resolve"):
        _ = views.sizes
    assert views.resolve(patch, size).sizes == [sizes[0], sizes[1], sizes[1]]
    assert views.global_size is None  # the configured views stay open


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_size": 500}, "global_size=500 .* 490 or 504"),
        ({"local_size": 96}, "local_size=96 .* 84 or 98"),
        ({"local_size": 10}, "local_size=10 .* take 14"),
    ],
)
def test_size_of_broken_patches_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(NecoError, match=message):
        Views(**options).resolve(14, 518)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_views": 1, "local_views": 0}, "two views"),
        ({"local_scale": (0.5, 0.1)}, "local_scale"),
        ({"jitter_strength": 3}, "hue"),
    ],
)
def test_impossible_views_are_refused(options: dict, message: str) -> None:
    with pytest.raises(NecoError, match=message):
        Views(**options)
