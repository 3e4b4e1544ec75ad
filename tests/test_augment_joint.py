"""Crops of an image and its mask: both show the same places, the rest is ignored."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neco.augment.joint import FILL, JointCrop
from neco.augment.views import view_rng

PLAIN = dict(scale=(0.5, 2.0), flip=0.5, jitter=(0.0, 0.0, 0.0, 0.0), ignore=255)


def coordinates(height, width, cell=10):
    """An image whose red and green are x and y, a mask that numbers cells of 10 x 10 pixels."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([x, y, 0 * x], 2), (y // cell * (-(-width // cell)) + x // cell).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 120), st.integers(20, 120), st.sampled_from([None, 40, 64]), st.integers(0, 10**6))
def test_image_and_mask_show_the_same_places(height, width, side, index):
    image, mask = coordinates(height, width)
    pixels, label = JointCrop(48, side=side, **PLAIN)(image, mask, view_rng(0, 0, index))
    assert pixels.shape == (48, 48, 3) and label.shape == (48, 48)
    inside = label != 255
    rows, columns = inside.any(1).sum(), inside.any(0).sum()
    assert inside[:rows, :columns].all() and not inside[rows:].any() and not inside[:, columns:].any()
    assert (pixels[~inside] == FILL).all()
    cells = -(-width // 10)
    for channel, cell in ((0, label % cells), (1, label // cells)):
        off = pixels[..., channel][inside] - (10 * cell[inside].astype(float) + 4.5)
        assert np.abs(off).max() <= 6, "within its cell, but for the rounding of a value and of a border"


def test_scale_place_and_mirror_vary_over_their_range():
    image, mask = coordinates(100, 150)
    crops = JointCrop(50, side=100, **PLAIN)
    drawn = [crops.place(view_rng(0, 0, index), 100, 150) for index in range(400)]
    boxes = np.array([box for box, _, _ in drawn])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 150).all() and (boxes[:, 3] <= 100).all()
    width = boxes[:, 2] - boxes[:, 0]
    assert width.min() < 27 and width.max() > 90, "from 50 / 2 pixels to all that 50 / 0.5 can be"
    assert boxes[:, 0].min() < 2 and boxes[:, 2].max() > 148
    assert 0.4 < np.mean([mirrored for _, _, mirrored in drawn]) < 0.6
    half = JointCrop(80, side=50, **{**PLAIN, "scale": (0.5, 0.5), "flip": 0.0})
    _, label = half(image, mask, view_rng(0, 0, 0))
    assert (label != 255).sum() == 25 * 38, "an image of 50 x 75 at half its size"
    whole, label = JointCrop(100, side=None, **{**PLAIN, "scale": (1, 1), "flip": 0.0})(image, mask, view_rng(0, 0, 1))
    first = int(whole[0, 0, 0])
    assert np.array_equal(whole, image[:, first : first + 100]) and np.array_equal(label, mask[:, first : first + 100])
    turned, label = JointCrop(100, side=None, **{**PLAIN, "scale": (1, 1), "flip": 1.0})(image, mask, view_rng(0, 0, 1))
    assert np.array_equal(turned, image[:, first : first + 100][:, ::-1])
    assert np.array_equal(label, mask[:, first : first + 100][:, ::-1])


@pytest.mark.parametrize("kind", range(4))
def test_each_colour_changes_half_of_the_images_and_never_the_mask(kind):
    image, mask = coordinates(40, 40)
    image[..., 2] = 90
    jitter = [0.0] * 4
    jitter[kind] = 0.4
    one, other = (
        JointCrop(40, side=None, scale=(1, 1), flip=0.0, jitter=tuple(values), ignore=255)
        for values in (jitter, [0.0] * 4)
    )
    changed = 0
    for index in range(60):
        (pixels, label), (plain, plain_label) = (crop(image, mask, view_rng(0, 0, index)) for crop in (one, other))
        assert np.array_equal(label, plain_label)
        changed += not np.array_equal(pixels, plain)
    assert 18 < changed < 42
