"""Inputs that are no squares, in every evaluation: nothing mixes up height and width."""

from pathlib import Path

import numpy as np
import pytest
import torch
from eval_support import Conv, Files, Noise, noisy
from torch import Tensor

from neco.config.types import MEAN, STD
from neco.eval.attention import Attention
from neco.eval.evaluation import input_size
from neco.eval.linear import Linear
from neco.eval.overcluster import Overcluster
from neco.eval.retrieval import Retrieval
from neco.eval.unsupervised import Unsupervised
from neco.features.extractor import Draw, Extract
from neco.utils.errors import NecoError

HERE = Extract(workers=0, batch_size=2)
SIZE = [32, 64]
STEP = 40


class Perfect:
    """One-hot classes and CLS attention to all that is not class 0, read off the red of each patch."""

    patch, dim, heads = 8, 4, 1

    def __call__(self, images: Tensor) -> Tensor:
        red = torch.nn.functional.avg_pool2d(images[:, :1], self.patch)[:, 0] * STD[0] + MEAN[0]
        return torch.nn.functional.one_hot(((red * 255 - 20) / STEP).round().long().clamp(0, 3), 4).float()

    def forward_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self(images)
        front = 1 - features[None, ..., 0].transpose(0, 1)
        return features, front / front.sum((2, 3), keepdim=True)


class Blind(Noise):
    heads = 1

    def forward_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self(images)
        return features, features[None, ..., 0].transpose(0, 1).exp()


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Four classes in halves of 32 x 64 pixels, patch by patch."""
    mask = np.kron(np.roll([[0, 1, 2, 3], [0, 1, 3, 2]], number, axis=0), np.ones((16, 16), int))
    other = np.random.default_rng(number).integers(0, 256, (32, 64, 2))
    return np.concatenate([(STEP * mask + 20)[..., None], other], 2), mask


@pytest.fixture
def wide(tmp_path: Path) -> Files:
    dataset = Files(tmp_path, 4, train=[scene(i) for i in range(4)], val=[scene(i) for i in range(2)])
    dataset.classes = ("background", *dataset.classes[1:])
    return dataset


ALL = [
    (Linear(size=SIZE, epochs=60, drop_epoch=50, lr=1.0, batch_size=2, choose=None), "miou", 0.9),
    (Overcluster(size=SIZE, seeds=(0,), engine="torch"), "miou_k4", 1.0),
    (Retrieval(size=SIZE, augment="none", k=5, engine="torch"), "miou_k5", 0.99),
    (Unsupervised(size=SIZE, mass=0.9, k=12, k_community=6, seeds=(0,), engine="torch"), "foreground_iou", 1.0),
    (Attention(size=SIZE, mass=1.0, clean=False), "jaccard", 1.0),
]


@pytest.mark.parametrize(("evaluation", "metric", "least"), ALL, ids=lambda x: type(x).__name__)
def test_perfect_features_give_one_and_noise_does_not(evaluation, metric: str, least: float, wide: Files) -> None:
    found = evaluation(Perfect(), wide, extract=HERE)
    assert found.metrics[metric] >= least - 1e-9 and "/32x64" in found.protocol
    assert evaluation.plan(8, wide)[0] == (32, 64)
    assert evaluation(Blind(8), wide, extract=HERE).metrics[metric] < 0.8


@pytest.mark.parametrize(
    "evaluation",
    [Retrieval(size=[32, 56], augment="none", k=3, engine="torch"), Linear(size=[32, 56], head=None, epochs=1)],
)
def test_what_is_turned_scores_the_same(evaluation, tmp_path: Path) -> None:
    """Images, masks, convolution and input size transposed: the same numbers, as long as nothing is drawn."""
    rng = np.random.default_rng(0)
    pairs = [noisy(rng, 50 + i, 70 - i, 4) for i in range(4)]
    backbone, turned = Conv(8), Conv(8)
    turned.project.weight.data = backbone.project.weight.data.transpose(2, 3).contiguous()
    (tmp_path / "turned").mkdir()
    plain = Files(tmp_path, 4, train=pairs[:2], val=pairs[2:])
    other = [(np.swapaxes(image, 0, 1), mask.T) for image, mask in pairs]
    other = Files(tmp_path / "turned", 4, train=other[:2], val=other[2:])
    found = evaluation(backbone, plain, extract=HERE)
    evaluation.size = evaluation.size[::-1]
    assert evaluation(turned, other, extract=HERE).metrics == pytest.approx(found.metrics, abs=0.01)


def test_crops_have_the_aspect_of_the_input() -> None:
    boxes = np.array([Draw((0.5, 1.0), 0, 0, aspect=2.0).box(str(i), 2000, 1000) for i in range(300)])
    ratios = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    assert 1.49 < ratios.min() < 1.6 and 2.5 < ratios.max() < 2.68
    assert Draw((5.0, 6.0), 0, 0, aspect=2.0).box("a", 2000, 1000) == (0, 0, 2000, 1000)  # nothing fits: all of it
    assert Draw((5.0, 6.0), 0, 0, aspect=2.0).box("a", 2000, 500) == (333, 0, 1666, 500)  # as far as 8/3 allows


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(NecoError, match=r"size=\[32, 60\]: 60 is no multiple of the backbone's patch 8: use 56 or 64"):
        input_size([32, 60], 448, 8, None)
    for evaluation in (Linear, Overcluster, Retrieval, Unsupervised):
        with pytest.raises(NecoError, match=r"size=\[32, 64\]: the published code knows squares only"):
            evaluation(compat="reference", size=SIZE)
        evaluation(compat="reference", size=[32, 32])
