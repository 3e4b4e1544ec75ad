"""A data set of a few PNG files and stand-ins for backbones, for the tests of evaluations."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from neco.config.types import MEAN, STD
from neco.dataset.base import IGNORE, Dataset, Sample

torch.set_num_threads(1)  # small work on a shared machine: threads would only wait for each other
STEP = 40  # red value of class c is STEP * c + 20


class Files(Dataset):
    """Images (H, W, 3) and masks (H, W) given as arrays by split, stored as PNG below a folder."""

    def __init__(
        self,
        folder: Path,
        classes: int,
        size: int | None = None,
        **splits: list[tuple[np.ndarray, np.ndarray]],
    ) -> None:
        super().__init__()
        self.classes = tuple(f"class {i}" for i in range(classes))
        self.image_size = size
        self.rows: dict[str, list[Sample]] = {}
        for split, pairs in splits.items():
            self.rows[split] = []
            for number, (image, mask) in enumerate(pairs):
                paths = [str(folder / f"{split}{number}{kind}.png") for kind in ("", "_mask")]
                for path, array in zip(paths, (image, mask), strict=True):
                    Image.fromarray(array.astype(np.uint8)).save(path)
                self.rows[split].append(Sample(f"{split}/{number}", *paths))

    def find(self, split: str) -> list[Sample]:
        return self.rows[split]

    samples = find  # not remembered: tests change the rows


def reorder(dataset: Files, *splits: str) -> None:
    """Give the same images other keys: sorted by them, as every evaluation does, they come in the reverse order."""
    for split in splits:
        rows = dataset.rows[split]
        dataset.rows[split] = [Sample(f"{split}/{len(rows) - i}", s.image, s.mask) for i, s in enumerate(rows)]


def striped(rng: np.random.Generator, size: int, patch: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red says the class, in patch-wide columns, all classes present: (image, mask)."""
    columns = np.concatenate([np.arange(classes), rng.integers(classes, size=size // patch - classes)])
    mask = np.tile(np.repeat(rng.permutation(columns), patch), (size, 1))
    image = rng.integers(0, 256, (size, size, 3))
    image[..., 0] = STEP * mask + 20
    return image, mask


def noisy(rng: np.random.Generator, height: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of classes, some void, in a noisy image that hints at them: (image, mask)."""
    coarse = rng.integers(-1, classes, (height // 7 + 1, width // 5 + 1))
    mask = np.kron(coarse, np.ones((7, 5), int))[:height, :width]
    image = (rng.normal(60, 50, (height, width, 3)) + 25 * mask[..., None] * np.array([1, -1, 0.3])).clip(0, 255)
    return image, np.where(mask < 0, IGNORE, mask)


class Perfect:
    """Reads the class off the red channel of `striped` images: features are one-hot."""

    def __init__(self, patch: int, classes: int) -> None:
        self.patch, self.dim = patch, classes

    def __call__(self, images: Tensor) -> Tensor:
        red = torch.nn.functional.avg_pool2d(images[:, :1], self.patch)[:, 0] * STD[0] + MEAN[0]
        return torch.nn.functional.one_hot(
            ((red * 255 - 20) / STEP).round().long().clamp(0, self.dim - 1), self.dim
        ).float()


class Noise:
    """Features that know nothing: a hash of the pixels of each patch."""

    def __init__(self, patch: int, dim: int = 16) -> None:
        self.patch, self.dim = patch, dim

    def __call__(self, images: Tensor) -> Tensor:
        sums = torch.nn.functional.avg_pool2d(images.double(), self.patch).sum(1)
        return (sums[..., None] * torch.arange(1, self.dim + 1) * 9973.1).sin().float()


class Conv(nn.Module):
    """A backbone with weights: one convolution with the patch as stride, and dropout that must be off."""

    def __init__(self, patch: int, dim: int = 12, seed: int = 0) -> None:
        super().__init__()
        self.patch, self.dim = patch, dim
        self.dropout = nn.Dropout(0.5)
        self.project = nn.Conv2d(3, dim, patch, patch)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(self.project(images)).permute(0, 2, 3, 1)
