"""Encodings of COCO masks: told from a few masks, said, and refused where that is not safe."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from dataset_support import CATEGORIES, THING_CLASSES, coco, coco_classes, save_image, save_mask

from neco.dataset.base import read_image, read_label
from neco.dataset.coco import CocoStuff, CocoThings
from neco.utils.errors import NecoError

SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "coco_panoptic_sample"
SEMANTIC, UNNAMED = "annotations/panoptic_annotations/semantic_segmenations_{}2017", "annotations/{}2017"


def with_masks(root, folder, *masks):
    """val2017 with these masks."""
    for number, mask in enumerate(masks):
        save_image(root / f"images/val2017/{number:012d}.jpg", number)
        save_mask(root / folder.format("val") / f"{number:012d}.png", np.resize(mask, (24, 40)))
    return str(root)


@pytest.mark.parametrize("encoding", ["id", "id_minus_1", "panoptic", "two_channel"])
def test_the_encoding_is_told_and_said(tmp_path, caplog, encoding):
    coco(tmp_path, "coco_things", "images/", UNNAMED, encoding)
    with caplog.at_level(logging.INFO):
        CocoThings(root=str(tmp_path)).samples("val")
    assert f"CocoThings val: masks of annotations/val2017, encoding {encoding}" in caplog.text
    dataset = CocoThings(root=str(tmp_path), encoding=encoding)
    assert (read_label(dataset, dataset.samples("val")[0]) != 255).any()


def test_values_of_both_encodings_go_by_the_name_or_are_refused(tmp_path):
    both = [0, 1, 16, 17]  # bird and cat, or cat and dog
    for folder, wanted in ((SEMANTIC, "id"), ("stuffthingmaps/{}2017", "id_minus_1")):
        dataset = CocoThings(root=with_masks(tmp_path / wanted, folder, both))
        names = [THING_CLASSES[i] for i in np.unique(read_label(dataset, dataset.samples("val")[0])) if i != 255]
        assert names == ["animal", "person"] + ["vehicle"] * (wanted == "id_minus_1")
    root = with_masks(tmp_path / "unnamed", UNNAMED, both)
    with pytest.raises(NecoError, match=r"annotations/val2017: .* two encodings; set dataset\.encoding=id, id_minus_1"):
        CocoThings(root=root).samples("val")
    assert CocoThings(root=root, encoding="id").samples("val")


def test_mixed_encodings_and_odd_values_are_refused(tmp_path):
    root = with_masks(tmp_path / "a", SEMANTIC, [0, 1, 82, 200], [0, 66, 71, 255])
    with pytest.raises(NecoError, match="fit not id: 66, 71, 255; not id_minus_1: 82, 200"):
        CocoThings(root=root).samples("val")
    root = with_masks(tmp_path / "b", SEMANTIC, [0, 1, 2])
    save_mask(tmp_path / "b" / SEMANTIC.format("val") / "000000000001.png", np.zeros((24, 40, 3)))
    save_image(tmp_path / "b/images/val2017/000000000001.jpg", 1)
    with pytest.raises(NecoError, match="some masks are grey, others in colour"):
        CocoThings(root=root).samples("val")


def test_masks_without_the_classes_are_refused(tmp_path):
    root = with_masks(tmp_path, SEMANTIC, [0, 200, 184])
    with pytest.raises(NecoError, match="1 masks hold none of the classes of CocoThings"):
        CocoThings(root=root).samples("val")
    assert CocoStuff(root=root).samples("val")


def test_panoptic_masks_need_their_segments(tmp_path):
    coco(tmp_path, "coco_stuff", "images/", "annotations/panoptic_{}2017", "panoptic")
    listing = tmp_path / "annotations/panoptic_val2017.json"
    dataset = CocoStuff(root=str(tmp_path))
    sample = dataset.samples("val")[0]
    with pytest.raises(
        NecoError, match=r"000000000139.png holds segment 7, which .*panoptic_val2017.json does not list"
    ):
        dataset.label(np.full((2, 2, 3), (7, 0, 0), np.uint8), sample)
    content = json.loads(listing.read_text())
    content["annotations"] = content["annotations"][1:]
    listing.with_name("x.json").write_text(json.dumps(content))
    other = shutil.copytree(tmp_path, tmp_path / "other")
    (other / "annotations/x.json").rename(other / "annotations/panoptic_val2017.json")
    with pytest.raises(NecoError, match=r"do not have the segments of .*panoptic_val2017.json"):
        CocoStuff(root=str(other)).samples("val")
    broken = shutil.copytree(tmp_path, tmp_path / "broken")
    (broken / "annotations/panoptic_val2017.json").write_text("{")
    with pytest.raises(NecoError, match=r"panoptic_val2017.json is no panoptic annotation file"):
        CocoStuff(root=str(broken)).samples("val")
    listing.unlink()
    for encoding in ("auto", "panoptic"):
        with pytest.raises(NecoError, match=r"annotations/panoptic_val2017.json"):
            CocoStuff(root=str(tmp_path), encoding=encoding).samples("val")


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="runs beside the COCO sample of ../shared")
@pytest.mark.parametrize("masks", ["panoptic_examples", "panoptic_examples_2ch_format"])
def test_real_masks(tmp_path, masks):
    shutil.copytree(SAMPLE / "input_images", tmp_path / "val2017")
    shutil.copytree(SAMPLE / masks, tmp_path / "annotations/panoptic_val2017")
    shutil.copy(SAMPLE / "panoptic_examples.json", tmp_path / "annotations/panoptic_val2017.json")
    content = json.loads((SAMPLE / "panoptic_examples.json").read_text())
    assert {c["id"]: c["supercategory"] for c in content["categories"]}.items() <= CATEGORIES.items()
    for kind, option in ((CocoThings, "coco_things"), (CocoStuff, "coco_stuff")):
        dataset, label_of = kind(root=str(tmp_path)), coco_classes(option)
        for sample in dataset.samples("val"):
            label = read_label(dataset, sample)
            assert label.shape == read_image(sample.image).shape[:2]
            (found,) = [a for a in content["annotations"] if a["file_name"] == f"{sample.key}.png"]
            areas = dict.fromkeys(range(len(dataset.classes)), 0)
            for segment in found["segments_info"]:
                if (number := label_of(segment["category_id"])) != 255:
                    areas[number] += segment["area"]
            assert areas == {number: int((label == number).sum()) for number in areas}
