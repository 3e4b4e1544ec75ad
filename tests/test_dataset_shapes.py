import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neco.dataset import shapes
from neco.dataset.base import read_image, read_label
from neco.dataset.shapes import SIZE, Shapes, draw
from neco.eval.retrieval import Retrieval
from neco.utils.errors import NecoError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return Shapes(root=str(tmp_path_factory.mktemp("shapes")), train=120, val=30)


def test_files_hold_what_is_drawn_and_splits_differ(dataset):
    train, val = dataset.samples("train"), dataset.samples("val")
    assert [sample.key for sample in train] == [f"{i:05d}" for i in range(120)] and len(val) == 30
    for split, samples in (("train", train), ("val", val)):
        image, mask = draw(0, split, 7)
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        np.testing.assert_array_equal(read_label(dataset, samples[7]), mask)
        assert np.abs(read_image(samples[7].image).astype(int) - image).mean() < 3  # JPEG
    assert (read_label(dataset, train[7]) != read_label(dataset, val[7])).any()


def test_a_scene_is_a_function_of_seed_split_and_index():
    one, other = draw(3, "val", 5), draw(3, "val", 5)
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
    for seed, split, index in ((4, "val", 5), (3, "train", 5), (3, "val", 6)):
        assert (draw(seed, split, index)[1] != one[1]).any()


def test_every_class_is_there_in_similar_amounts(dataset):
    masks = np.stack([read_label(dataset, sample) for sample in dataset.samples("train")])
    share = np.bincount(masks.ravel(), minlength=8) / masks.size
    assert len(share) == len(dataset.classes) == 8
    assert 0.35 < share[0] < 0.6 and share[1:].min() > 0.03 and share[1:].max() < 0.12


def test_masks_are_exact(monkeypatch):
    """Painted with one flat colour a region, without light, the image is the mask up to the noise of the sensor."""
    order = iter(range(20))

    def flat(rng, image, inside, texture):
        image[inside] = 30 * next(order)

    monkeypatch.setattr(shapes, "_paint", flat)
    monkeypatch.setattr(shapes, "_light", lambda rng, x, y: np.float32(1))
    monkeypatch.setattr(shapes, "_noise", lambda *args: np.zeros((SIZE, SIZE), np.float32))
    image, mask = draw(0, "train", 1)
    region = (image.astype(int).mean(2) + 15) // 30
    values = [np.unique(region[mask == label]) for label in np.unique(mask)]
    assert len(values) > 4 and all(len(value) == 1 for value in values)
    assert len(np.unique(values)) == len(values)


def test_brightness_and_contrast_say_nothing_about_the_class():
    """Mean and deviation of a region's pixels: a class is less than one spread away from the average class."""
    stats = {label: [] for label in range(8)}
    for index in range(150):
        image, mask = draw(1, "train", index)
        for label in np.unique(mask):
            pixels = image[mask == label]
            stats[label].append((pixels.mean(), pixels.std(0).mean()))
    means = np.array([np.mean(values, 0) for values in stats.values()])
    spread = np.array([np.std(values, 0) for values in stats.values()])
    assert (np.abs(means - means.mean(0)) < spread.mean(0)).all(), (means, spread)


def test_written_once_and_again_when_anything_changes(dataset, monkeypatch):
    dataset.samples("val")
    monkeypatch.setattr(Shapes, "_write", lambda self, folder: pytest.fail("drawn twice"))
    dataset.samples("train")
    monkeypatch.undo()
    fewer = Shapes(root=str(dataset.root), train=2, val=1)
    assert len(fewer.samples("train")) == 2 and len(dataset.samples("train")) == 120
    assert sorted(os.listdir(dataset.root)) == sorted({p.split("/")[-4] for p in _images(dataset, fewer)})


def _images(*datasets):
    return [sample.image for dataset in datasets for sample in dataset.samples("val")]


def test_processes_may_come_at_the_same_time(tmp_path):
    use = f"Shapes(root={str(tmp_path)!r}, train=20, val=5)"
    code = f"from neco.dataset.shapes import Shapes; print(len({use}.samples('train')))"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [run.communicate()[0] for run in runs] == ["20\n"] * 3
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(NecoError, match=r"cannot write .*file.*dataset\.root"):
        Shapes(root=str(tmp_path / place)).samples("train")


def test_nothing_is_drawn_into_a_folder_of_something_else(tmp_path):
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc/1.jpg").touch()
    with pytest.raises(NecoError, match=r"dataset\.root=.*voc holds 1\.jpg: .*Leave dataset\.root out"):
        Shapes(root=str(tmp_path / "voc")).samples("train")
    assert os.listdir(tmp_path / "voc") == ["1.jpg"]
    for seed in (0, 1):  # what was drawn before is nothing else
        assert len(Shapes(root=str(tmp_path / "mine"), train=2, val=1, seed=seed).samples("train")) == 2


class Patches(torch.nn.Module):
    """Features without a network: raw normalised RGB patches, or noise of the same size."""

    patch, dim = 8, 192

    def __init__(self, noise):
        super().__init__()
        self.noise, self.generator = noise, torch.Generator().manual_seed(0)

    def forward(self, images):
        raw = F.pixel_unshuffle(images, self.patch).permute(0, 2, 3, 1)
        return torch.randn(raw.shape, generator=self.generator) if self.noise else raw


def test_raw_pixels_retrieve_hardly_better_than_chance(dataset):
    evaluate = Retrieval(augment="none", engine="torch")
    chance, raw = (evaluate(Patches(noise), dataset).metrics["miou_k30"] for noise in (True, False))
    assert 0.04 < chance < 0.1
    assert raw < chance + 0.05, (raw, chance)
