"""The pixels of views: the byte applier against PIL, the PIL applier against its own functions called by hand."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from neco.augment import colour
from neco.augment.crop import resized_crop
from neco.augment.views import Views, view_rng
from neco.config.types import MEAN, STD
from neco.training.align import align_pairs, pair_boxes


def noise(side: int = 200) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def photo(height: int = 240, width: int = 320) -> np.ndarray:
    """Soft shapes with some grain, and a hard edge along each border."""
    rng = np.random.default_rng(1)
    image = cv2.resize(
        rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    image = (image + rng.integers(-12, 13, image.shape)).clip(0, 255).astype(np.uint8)
    image[:2], image[:, :2], image[-1:] = 255, 0, 255
    return image


def distance(ours: np.ndarray, pil: Image.Image) -> tuple[int, float]:
    """Largest and mean difference in levels."""
    assert ours.dtype == np.uint8
    difference = np.abs(ours.astype(int) - np.asarray(pil))
    return int(difference.max()), float(difference.mean())


@pytest.mark.parametrize("image", [noise(), photo()], ids=["noise", "photo"])
@pytest.mark.parametrize("size", [(16, 16), (98, 98), (224, 224), (518, 518), (56, 140), (300, 20)])
def test_crop_is_within_a_level_of_pil(image: np.ndarray, size: tuple[int, int]) -> None:
    rng, (height, width) = np.random.default_rng(2), image.shape[:2]
    for _ in range(10):
        (x1, x2), (y1, y2) = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in (width, height))
        pil = F.resized_crop(Image.fromarray(image), y1, x1, y2 - y1, x2 - x1, list(size))
        assert distance(resized_crop(image, np.array([x1, y1, x2, y2]), size), pil)[0] <= 1


@pytest.mark.parametrize("image", [noise(), photo()], ids=["noise", "photo"])
@pytest.mark.parametrize("factor", [0.0, 0.2, 0.61, 1.0, 1.37, 1.8])
def test_linear_jitter_against_pil(image: np.ndarray, factor: float) -> None:
    pil = Image.fromarray(image)
    assert distance(colour.brightness(image, factor), F.adjust_brightness(pil, factor)) == (0, 0)
    assert distance(colour.contrast(image, factor), F.adjust_contrast(pil, factor)) == (0, 0)
    assert distance(colour.saturation(image, factor), F.adjust_saturation(pil, factor))[0] <= 1


@pytest.mark.parametrize("image", [noise(), photo()], ids=["noise", "photo"])
def test_hue_and_grey_against_pil(image: np.ndarray) -> None:
    for shift in np.linspace(-0.5, 0.5, 21).tolist():
        most, mean = distance(colour.hue(image, shift), F.adjust_hue(Image.fromarray(image), shift))
        assert most <= 7 and mean <= 0.5
    grey = colour.grey(image)
    assert grey.shape == image.shape[:2]
    assert distance(grey, Image.fromarray(image).convert("L"))[0] <= 1


@pytest.mark.parametrize("image", [noise(), photo(), colour.grey(photo())], ids=["noise", "photo", "grey"])
def test_blur_against_pil(image: np.ndarray) -> None:
    for sigma in [0.1, 0.25, *np.linspace(0.4, 2.0, 17).tolist(), 5.0]:
        most, mean = distance(colour.blur(image, sigma), Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
        assert most <= 3 and mean <= 0.9


def test_jitter_follows_the_drawn_order() -> None:
    image, factors = photo(), np.array([0.5, 1.6, 0.3, 0.1])
    by_hand = colour.hue(colour.contrast(colour.saturation(colour.brightness(image, 0.5), 0.3), 1.6), 0.1)
    assert np.array_equal(colour.jitter(image, np.array([0, 2, 1, 3]), factors), by_hand)
    assert not np.array_equal(colour.jitter(image, np.array([3, 1, 2, 0]), factors), by_hand)


@pytest.mark.parametrize("sizes", [(56, 28), ((42, 84), (28, 14))])
def test_pil_applier_is_the_published_functions(sizes: tuple[Any, Any]) -> None:
    image, views = photo(), Views(global_size=sizes[0], local_size=sizes[1], applier="pil")
    seen = set()
    for index in range(12):
        params = views.sample(view_rng(0, 0, index), *image.shape[:2])
        made = [view for group in views.apply(image, params) for view in group.permute(0, 2, 3, 1).numpy()]
        for view, (height, width) in enumerate(views.sizes):
            x1, y1, x2, y2 = params.crops[view]
            pil = Image.fromarray(image).crop((x1, y1, x2, y2)).resize((width, height), Image.Resampling.BILINEAR)
            if params.jitter[view]:
                for step in params.order[view]:
                    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[step]
                    pil = adjust(pil, params.factors[view, step])
            if params.grey[view]:
                pil = F.to_grayscale(pil, num_output_channels=3)
            if params.sigma[view]:
                pil = pil.filter(ImageFilter.GaussianBlur(radius=float(params.sigma[view])))
            assert np.array_equal(made[view], np.asarray(pil))
            seen.add((bool(params.jitter[view]), bool(params.grey[view]), params.sigma[view] > 0))
    assert len(seen) == 8  # every combination came up


@pytest.mark.parametrize("sizes", [(112, 42), ((84, 140), (56, 28))])
def test_appliers_agree(sizes: tuple[Any, Any]) -> None:
    image = photo()
    fast, published = (
        Views(global_size=sizes[0], local_size=sizes[1], applier=applier) for applier in ("uint8", "pil")
    )
    for index in range(20):
        params = fast.sample(view_rng(3, 0, index), *image.shape[:2])
        for ours, theirs in zip(fast.apply(image, params), published.apply(image, params), strict=True):
            difference = (ours.int() - theirs.int()).abs().float()
            assert difference.max() <= 30 and difference.mean((1, 2, 3)).max() <= 1.5  # errors add up, then contrast
        assert (fast.clean(image, params).int() - published.clean(image, params).int()).abs().max() <= 1


@pytest.mark.parametrize("applier", ["uint8", "pil"])
@pytest.mark.parametrize("size", [56, (28, 70)])
def test_clean_views_are_the_crops_of_the_global_ones_resized(applier: str, size: Any) -> None:
    image = photo()
    views = Views(global_size=size, local_size=28, applier=applier, teacher="clean")
    for index in range(5):
        params = views.sample(view_rng(0, 0, index), *image.shape[:2])
        clean = views.clean(image, params)
        assert clean.dtype == torch.uint8 and clean.shape == (2, 3, *views.sizes[0])
        for view, crop in zip(clean.permute(0, 2, 3, 1).numpy(), params.crops, strict=False):
            pil = Image.fromarray(image).crop(tuple(crop)).resize(views.sizes[0][::-1], Image.Resampling.BILINEAR)
            assert distance(view, pil)[0] <= (0 if applier == "pil" else 1)
        untouched = params._replace(jitter=params.jitter & False, grey=params.grey & False, sigma=0 * params.sigma)
        assert torch.equal(clean, views.apply(image, untouched)[0])
        assert not torch.equal(clean, views.apply(image, params)[0])


@pytest.mark.parametrize("applier", ["uint8", "pil"])
@pytest.mark.parametrize("counts", [(1, 1), (2, 0), (2, 4), (3, 2)])
def test_shapes_and_an_untouched_image(applier: str, counts: tuple[int, int]) -> None:
    image = photo()
    image.flags.writeable = False  # as decoders return it
    before = image.copy()
    views = Views(global_views=counts[0], local_views=counts[1], applier=applier).resolve(8, 64)
    params = views.sample(view_rng(0, 0, 0), *image.shape[:2])
    first, again = views.apply(image, params), views.apply(image, params)
    assert [tuple(group.shape) for group in first] == [(counts[0], 3, 64, 64), (counts[1], 3, 32, 32)]
    for group, repeated in zip(first, again, strict=True):
        assert group.dtype == torch.uint8 and group.is_contiguous() and torch.equal(group, repeated)
    assert np.array_equal(image, before)


def test_grey_views_have_three_equal_channels() -> None:
    views = Views(global_size=32, local_size=16, grey_probability=1.0)
    for group in views.apply(photo(), views.sample(view_rng(0, 0, 0), 240, 320)):
        assert torch.equal(group, group[:, :1].expand_as(group)) and group.float().std() > 1


@pytest.mark.parametrize("scale", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("sizes", [(128, 64), ((96, 160), (64, 112)), ((160, 96), (64, 64))])
def test_views_show_the_place_that_the_boxes_name(sizes: tuple[Any, Any], scale: float) -> None:
    """Pixels that hold their own coordinates, cropped, patched and aligned: student and teacher cells agree."""
    side, patch = 256, 8
    image = np.stack([*np.meshgrid(np.arange(side), np.arange(side)), np.zeros((side, side))], axis=-1).astype(np.uint8)
    colourless = {"jitter_probability": 0, "grey_probability": 0, "blur_probability": 0}
    views = Views(global_size=sizes[0], local_size=sizes[1], **colourless).resolve(patch, 128).scaled(scale)
    for index in range(10):
        params = views.sample(view_rng(0, 0, index), side, side)
        large, small = (
            torch.nn.functional.avg_pool2d(group.double(), patch).permute(0, 2, 3, 1)[:, None]
            for group in views.apply(image, params)
        )
        crops = torch.from_numpy(params.crops)[None]
        boxes = pair_boxes(crops, views.sizes, 2)
        student, teacher = align_pairs(large, large, small, *boxes, patch=patch, grid=5)
        error = (student - teacher).abs()
        # Rounding to levels; where a cell reaches a view's border, half a patch of that view can be missing
        half_patch = max(
            side / 2 / (pixels // patch)
            for size, (x1, y1, x2, y2) in zip(views.sizes, params.crops, strict=True)
            for side, pixels in zip((y2 - y1, x2 - x1), size, strict=True)
        )
        assert error.mean() < half_patch / 8 and error.max() <= half_patch + 1


def test_normalise_is_to_tensor_and_normalize() -> None:
    images = torch.from_numpy(noise(12)).permute(2, 0, 1)
    pil = F.normalize(F.to_tensor(Image.fromarray(noise(12))), MEAN, STD)
    ours = colour.normalise(images.expand(2, 4, 3, 12, 12))
    assert ours.shape == (2, 4, 3, 12, 12) and ours.dtype == torch.float32
    torch.testing.assert_close(ours[1, 3], pil, rtol=1e-6, atol=1e-6)
