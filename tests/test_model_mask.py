"""The foreground against a plain derivation."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms.functional import gaussian_blur

from neco.model.mask import blur, foreground, without_specks


def slow(attention: torch.Tensor, mass: float = 0.6) -> np.ndarray:
    """One image after another, patch by patch, components by labelling."""
    out = []
    for heads in attention:
        flat = gaussian_blur(heads.mean(0)[None, None], 7, [0.6, 0.6])[0, 0].double().numpy()
        kept, held = np.zeros(flat.shape, bool), 0.0
        for place in np.argsort(-flat, axis=None):
            if held >= mass * flat.sum():
                break
            kept.flat[place] = True
            held += flat.flat[place]
        labels, count = ndimage.label(kept, np.ones((3, 3)))
        for component in range(1, count + 1):
            if (labels == component).sum() <= 2:
                kept[labels == component] = False
        out.append(kept)
    return np.stack(out)


@pytest.mark.parametrize("shape", ((7, 7), (5, 12), (16, 16)))
def test_foreground_against_loops(shape):
    attention = torch.rand(6, 3, *shape, generator=torch.Generator().manual_seed(0)) ** 8
    found = foreground(attention)
    assert (found.numpy() == slow(attention)).all() and 0 < found.sum() < found.numel()


@pytest.mark.parametrize("density", (0.05, 0.2, 0.4))
def test_specks_against_labelling(density):
    mask = torch.rand(40, 9, 11, generator=torch.Generator().manual_seed(1)) < density
    expected = mask.clone()
    for image in expected.numpy():
        labels, count = ndimage.label(image, np.ones((3, 3)))
        for component in range(1, count + 1):
            if (labels == component).sum() <= 2:
                image[labels == component] = False
    assert torch.equal(without_specks(mask), expected) and not torch.equal(mask, expected)


def test_small_and_flat_maps():
    assert blur(torch.ones(1, 2, 3)).sub(1).abs().max() < 1e-6  # fewer patches than taps
    assert foreground(torch.ones(1, 1, 8, 8)).float().mean() == pytest.approx(0.6, abs=0.03)
    assert foreground(torch.zeros(1, 1, 8, 8)).sum() == 0, "no attention at all: an empty mask"
