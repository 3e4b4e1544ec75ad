"""Sliding windows against loops over pixels; scores of networks whose answer is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval_support import STEP, Files, noisy, striped
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neco.config.types import MEAN, STD
from neco.eval.common.sliding import SlidingWindows, slide, starts
from neco.features.extractor import Extract
from neco.utils.errors import NecoError

EXTRACT = Extract(batch_size=3, workers=0)


class Odd(nn.Module):
    """Scores that depend on the place within the window, so that overlaps disagree."""

    patch = 4

    def forward(self, images):
        y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in images.shape[-2:]), indexing="ij")
        return torch.stack([images.sum(1) * (y + 1), images[:, 0] + x, images[:, 1] * x * y], 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 30), st.integers(8, 30), st.integers(1, 8), st.integers(1, 5))
def test_windows_cover_the_image_and_scores_are_means(height, width, stride, batch):
    image = torch.randn(3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total, count = torch.zeros(3, height, width, dtype=torch.float64), torch.zeros(height, width)
    ys, xs = ({min(start, length - 8) for start in range(0, length, stride)} for length in (height, width))
    for y in ys:
        for x in xs:
            total[:, y : y + 8, x : x + 8] += Odd()(image[None, :, y : y + 8, x : x + 8])[0]
            count[y : y + 8, x : x + 8] += 1
    assert count.min() >= 1
    torch.testing.assert_close(slide(Odd(), image, 8, stride, batch), total / count)


def test_windows_start_every_stride_and_end_at_the_border():
    assert starts(10, 10, 3) == [0] and starts(11, 10, 3) == [0, 1]
    assert starts(16, 10, 3) == [0, 3, 6] and starts(20, 10, 10) == [0, 10]


@pytest.mark.parametrize(
    ("side", "image", "seen"),
    [(64, (48, 96), (64, 128)), (64, (200, 100), (128, 64)), (None, (48, 96), (48, 96)), (None, (16, 40), (32, 80))],
)
def test_what_the_network_sees(side, image, seen):
    assert SlidingWindows(32, side=side, stride=16).size(*image) == seen


class Red(nn.Module):
    """Reads the class off the red channel, see `eval_support.striped`."""

    patch = 8

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        red = images[:, :1] * STD[0] + MEAN[0]
        levels = (STEP * torch.arange(self.classes) + 20).reshape(1, -1, 1, 1) / 255
        return -(red - levels).abs()


class Constant(nn.Module):
    patch = 8

    def forward(self, images):
        return torch.tensor([0.0, 1.0, 0.0]).reshape(1, 3, 1, 1).expand(len(images), 3, *images.shape[-2:])


def test_perfect_and_constant_predictions(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [striped(rng, 64, 16, 3) for _ in range(3)]
    pairs[1] = tuple(np.concatenate([part, part[:, :32]], 1) for part in pairs[1])  # 64 x 96
    pairs[2][1][:8] = 255
    data = Files(tmp_path, 3, val=pairs)
    windows = SlidingWindows(64, side=64, stride=24)
    result = windows(Red(3), data, extract=EXTRACT)
    assert result.metrics == {"miou": 1.0, "accuracy": 1.0}
    assert result.protocol == "segmentation/segmenter/side=64/window=64/stride=24/full_size"
    share = np.concatenate([mask[mask != 255].ravel() for _, mask in pairs])
    constant = windows(Constant(), data, extract=EXTRACT).metrics
    assert constant["accuracy"] == pytest.approx(np.mean(share == 1))
    assert constant["miou"] == pytest.approx(np.mean(share == 1) / 3)


def test_the_score_is_taken_at_the_size_of_the_mask(tmp_path):
    """Rectangles of odd sizes, seen at another size: the same numbers as step by step."""
    rng = np.random.default_rng(1)
    pairs = [noisy(rng, *size, 3) for size in ((37, 61), (70, 33))]
    data, windows = Files(tmp_path, 3, val=pairs), SlidingWindows(32, side=40, stride=20)
    network = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 3, 3, padding=1))
    network.patch = 8
    result = windows(network.train(), data, extract=Extract(workers=2), seed=3)
    assert network.training and network[0].training, "as it was"
    network.eval()
    tp, fp, fn = torch.zeros(3, 3)
    for index, (_, mask) in enumerate(pairs):
        pixels = windows_input(data, windows, index)
        mask = torch.as_tensor(mask)
        scores = F.interpolate(slide(network, pixels, 32, 20)[None], size=mask.shape, mode="bilinear")
        guess = scores[0].argmax(0)
        for c in range(3):
            tp[c] += ((guess == c) & (mask == c)).sum()
            fp[c] += ((guess == c) & (mask != c) & (mask != 255)).sum()
            fn[c] += ((guess != c) & (mask == c)).sum()
    assert result.metrics["miou"] == pytest.approx(float((tp / (tp + fp + fn)).mean()))


def windows_input(data, windows, index):
    from PIL import Image

    image = Image.open(data.samples("val")[index].image)
    height, width = windows.size(image.height, image.width)
    assert min(height, width) == 40
    seen = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return (seen / 255 - mean) / std


def test_a_broken_image_ends_it_with_its_name(tmp_path):
    data = Files(tmp_path, 3, val=[striped(np.random.default_rng(0), 64, 16, 3)])
    (tmp_path / "val0.png").write_bytes(b"")
    with pytest.raises(NecoError, match=r"val0\.png"):
        SlidingWindows(64, side=64, stride=64)(Red(3), data, extract=EXTRACT)
