"""Twice the images, the same memory: what evaluations hold at the peak, with few channels and large images."""

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_support import Conv, Files, noisy
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neco.eval import unsupervised
from neco.eval.attention import Attention
from neco.eval.linear import Linear
from neco.eval.overcluster import Overcluster
from neco.eval.retrieval import Retrieval
from neco.eval.unsupervised import Unsupervised
from neco.features.extractor import Extract

SIZE, PATCH, DIM = 112, 28, 8
FEW, MANY = 24, 48  # so many that their masks would be more than what one image takes on its way
FEATURES = 4 * (SIZE // PATCH) ** 2 * DIM  # bytes of an image's
OBJECTS = 8000  # bytes of Python objects for an image of train and one of val, waiting garbage too; a mask has 12544
HERE = Extract(workers=0, batch_size=1)
KMEANS = {"engine": "torch", "iterations": 2, "restarts": 1, "seeds": (0, 1)}
EVERY: dict[type, tuple[dict[str, Any], int]] = {  # options, and bytes an image that are kept, beyond objects
    Retrieval: ({"k": 3, "engine": "torch"}, 4 * FEATURES),  # entries of two passes, up to `memory_size`; labels
    Overcluster: ({"k": 5, **KMEANS}, 6 * FEATURES),  # k-means has all patches: as they are, standardised, reduced
    Linear: ({"epochs": 1, "batch_size": 1}, 0),
    Attention: ({}, 0),
    Unsupervised: (  # reduced features, and masks at 100 x 100
        {"k": 8, "k_community": 6, "sample": 4, **KMEANS},
        2 * FEATURES + unsupervised.GRID**2,
    ),
}


class Seeing(Conv):
    heads = 1

    def forward_attention(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self(images)
        return maps, maps[..., :1].sigmoid().permute(0, 3, 1, 2)


class Live(TorchDispatchMode):
    """The largest number of bytes in tensors that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return found


def held(work: Callable[[], object]) -> int:
    """Bytes at the peak, of tensors and of numpy arrays and other objects."""
    gc.collect()
    tracemalloc.start()
    with Live() as live:
        work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return live.peak + peak


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Files]:
    """So many images in both splits."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("scenes")
    pairs = [noisy(rng, SIZE, SIZE, 4) for _ in range(MANY)]

    def make(images: int) -> Files:
        dataset = Files(folder, 4, train=pairs[:images], val=pairs[:images])
        dataset.classes = ("background", *dataset.classes[1:])
        return dataset

    return make


def growth(scenes: Callable[[int], Files], work: Callable[[Files], object]) -> float:
    """Bytes an image."""
    _, few, many = (held(lambda n=n: work(scenes(n))) for n in (4, FEW, MANY))  # the first one imports
    return (many - few) / (MANY - FEW)


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_of_image_size_accumulates(kind: type, scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsupervised, "BATCH", 1)
    options, kept = EVERY[kind]
    evaluation, backbone = kind(size=SIZE, **options), Seeing(PATCH, DIM)
    assert growth(scenes, lambda dataset: evaluation(backbone, dataset, extract=HERE)) < kept + OBJECTS


def test_what_is_kept_shows(scenes) -> None:
    def keep(dataset: Files) -> list[torch.Tensor]:
        for _ in HERE.stream(Seeing(PATCH, DIM), dataset, dataset.samples("val"), SIZE):
            pass
        return [masks for _, masks in HERE.masks(dataset, dataset.samples("val"), SIZE)]

    assert growth(scenes, keep) > OBJECTS


def test_features_that_are_kept_on_disk_are_not_held(scenes, tmp_path: Path) -> None:
    features, backbone = 32 * FEATURES, Seeing(PATCH, 32 * DIM)
    kept = Extract(workers=0, batch_size=1, cache_dir=str(tmp_path))
    grown = [
        growth(scenes, lambda dataset, e=extract: e(backbone, dataset, dataset.samples("val"), SIZE))
        for extract in (HERE, kept)
    ]
    assert grown[0] > features > 2 * grown[1]
    small = Extract(workers=0, cache_dir=str(tmp_path / "small"), cache_gb=features / 1e9)
    dataset = scenes(FEW)
    assert np.array_equal(*(e(backbone, dataset, dataset.samples("val"), SIZE) for e in (small, kept)))
    assert not [*tmp_path.glob("small/*")]
