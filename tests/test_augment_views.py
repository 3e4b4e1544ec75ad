"""Which views are drawn: reproducible, distributed as published, overlapping, for every image there is."""

import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from neco.augment.views import ViewParams, Views, batch_scale, centred_crop, overlap, random_crop, view_rng
from neco.utils.errors import NecoError

SIDE = st.integers(1, 3000)
SIZE = st.integers(1, 60) | st.tuples(st.integers(1, 60), st.integers(1, 60))  # of a view


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


def test_views_stay_what_they_were() -> None:
    """The first draw of a sample of the main recipe, as in every run so far."""
    assert Views().sample(view_rng(400, 0, 7), 480, 640).crops.tolist() == [
        [50, 80, 454, 410], [16, 0, 406, 446],
        [318, 39, 544, 271], [68, 278, 247, 480], [389, 179, 627, 438], [3, 68, 259, 366],
    ]  # fmt: skip


def test_pixel_sizes_and_the_teachers_view_do_not_change_what_is_drawn() -> None:
    first = Views().sample(view_rng(1, 2, 3), 480, 640)
    for views in Views(teacher="clean"), Views(global_size=224, local_size=98), Views(multi_scale=(0.5, 2.0)):
        assert equal(first, views.sample(view_rng(1, 2, 3), 480, 640))
    wide = Views(global_size=(14, 42), local_size=(28, 14)).resolve(14, 518)
    first = wide.sample(view_rng(1, 2, 3), 480, 640)
    for factor in 0.4, 1.3:  # rounded to whole patches, sizes have another shape
        assert equal(first, wide.scaled(factor).sample(view_rng(1, 2, 3), 480, 640))


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
@given(SIDE, SIDE, st.integers(1, 3), st.integers(0, 4), SIZE, SIZE, st.floats(0, 1), st.integers(0, 2**63))
def test_every_view_overlaps_the_global_views(
    height: int, width: int, global_views: int, local_views: int, large: Any, small: Any, min_overlap: float, seed: int
) -> None:
    local_views = max(local_views, 2 - global_views)
    views = Views(
        global_views=global_views,
        local_views=local_views,
        global_size=large,
        local_size=small,
        min_overlap=min_overlap,
    )
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


@settings(max_examples=100, deadline=None)
@given(st.integers(100, 2000), st.integers(100, 2000), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**63))
@pytest.mark.filterwarnings("ignore:no crop of an image")
def test_no_view_is_squashed_beyond_the_ratio(height: int, width: int, high: int, wide: int, seed: int) -> None:
    views = Views(global_size=(14 * high, 14 * wide), local_size=(8 * wide, 8 * high))
    for (view_height, view_width), (x1, y1, x2, y2) in zip(
        views.sizes, views.sample(view_rng(seed, 0, 0), height, width).crops, strict=True
    ):
        least = (x2 - x1 - 0.5) / (y2 - y1 + 0.5) / (view_width / view_height)  # sides of a crop are rounded
        most = (x2 - x1 + 0.5) / (y2 - y1 - 0.5) / (view_width / view_height)
        assert least <= 4 / 3 + 1e-9 and most >= 3 / 4 - 1e-9


def test_a_rectangular_view_is_a_square_one_of_the_stretched_image() -> None:
    """Twice as wide as high: as if the image were twice as high and the view square."""
    views = Views(global_size=(28, 56), local_size=(14, 28), min_overlap=0.0)
    square = Views(min_overlap=0.0)
    for index in range(100):
        crops = views.sample(view_rng(0, 0, index), 400, 600).crops
        stretched = square.sample(view_rng(0, 0, index), 800, 600).crops
        assert np.abs(crops * [1, 2, 1, 2] - stretched).max() <= 3  # rounded to pixels, and those are two high


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
    assert tuple(params.crops[-1]) == centred_crop(*size, views.ratios[-1])
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
    assert views.resolve(patch, size).sizes == [(side, side) for side in (sizes[0], sizes[1], sizes[1])]
    assert views.global_size is None  # the configured views stay open


def test_an_open_local_size_fits_into_the_shorter_side() -> None:
    views = Views(global_views=1, local_views=1, global_size=(112, 518)).resolve(14, 518)
    assert views.sizes == [(112, 518), (56, 56)]


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 8, 14]), st.floats(0.1, 4))
def test_scaled_sizes_are_the_nearest_whole_patches(high: int, wide: int, patch: int, factor: float) -> None:
    views = Views(global_views=2, local_views=0, global_size=(patch * high, patch * wide)).resolve(patch, 518)
    assert views.scaled(1.0).sizes == views.sizes
    for wanted, side in zip((high, wide), views.scaled(factor).sizes[0], strict=True):
        patches = range(1, 200)
        assert side % patch == 0
        assert abs(side / patch - wanted * factor) == min(abs(n - wanted * factor) for n in patches)


def test_scale_of_a_batch_is_a_function_of_seed_and_number() -> None:
    scales = 0.75, 1.0, 1.25
    drawn = [batch_scale(7, batch, scales) for batch in range(3000)]
    assert drawn == [batch_scale(7, batch, scales) for batch in range(3000)]
    assert drawn != [batch_scale(8, batch, scales) for batch in range(3000)]
    assert all(abs(drawn.count(scale) - 1000) < 5 * math.sqrt(3000 * 2 / 9) for scale in scales)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_size": 500}, "global_size=500 .* 490 or 504"),
        ({"local_size": 96}, "local_size=96 .* 84 or 98"),
        ({"local_size": 10}, "local_size=10 .* take 14"),
        ({"global_size": (100, 224)}, r"global_size=\[100, 224\] .* take \[98 or 112, 224\]"),
        ({"local_size": (28, 13)}, r"local_size=\[28, 13\] .* take \[28, 14\]"),
    ],
)
def test_size_of_broken_patches_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NecoError, match=message):
        Views(**options).resolve(14, 518)


def test_published_local_size_does_not_fit_patch_16() -> None:
    with pytest.raises(NecoError, match=r"local_size=98 .* 16 pixels: take 96 or 112"):
        Views(local_size=98).resolve(16, 224)


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
