"""task=check: what it finds in whole and in broken data sets, its exit code, and the page."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from neco.config import discovery
from neco.dataset.folder import Folder
from neco.dataset.inspect import inspect, places
from neco.report.pictures import colours, overlay


@pytest.fixture
def streets(tmp_path):
    """Labelled images of two classes, one pixel of each mask void: `streets(split=count, ...)` makes the options."""

    def make(**splits: int) -> list[str]:
        for split, count in splits.items():
            for kind in ("images", "masks"):
                (tmp_path / kind / split).mkdir(parents=True)
            for i in range(count):
                mask = np.zeros((24, 32), np.uint8)
                mask[: 6 * (i % 3)] = 1
                mask[-1, -1] = 255
                Image.fromarray(np.full((24, 32, 3), 40 * i % 256, np.uint8)).save(tmp_path / f"images/{split}/{i}.png")
                Image.fromarray(mask).save(tmp_path / f"masks/{split}/{i}.png")
        return ["dataset=folder", "dataset.root=images", "dataset.masks=masks", "dataset.classes=[road,sky,c,d,e,f,g]"]

    return make


def test_a_whole_data_set(inside, streets, tmp_path):
    code, said = inside("task=check", *streets(train=3, val=6), "show=2", "run_dir=run")
    assert code == 0 and "serves      training, evaluation" in said
    assert re.search(r"folder +val +6 +6 +6 +0 +32x24", said), said
    labelled = 24 * 32 - 1
    assert f"val, 6 masks: 2 of 7 classes: road {100 - 100 * 6 * 32 / labelled:.1f}%" in said
    assert "0.1% of all pixels are ignored" in said
    text = (tmp_path / "run" / "check.html").read_text()
    assert text.count("<h3>") == 4 and text.count("<figure>") == 2 * (1 + 1 + 6) + 2 * 2
    assert ">road</span>" in text and "view 5: " in text
    encoded = re.findall(r"base64,([^\"]+)", text)[-1]  # the overlay of the last image of val
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (32, 24)


@pytest.mark.parametrize(
    ("broken", "words", "serves"),
    [
        ("masks/val/2.png", "val: 1 of 4 images looked at cannot be used", "training"),
        ("images/train/1.png", "cannot decode images/train/1.png", "evaluation"),
    ],
)
def test_what_is_broken_is_named_and_what_is_left_is_served(inside, streets, tmp_path, broken, words, serves):
    options = streets(train=4, val=4)
    (tmp_path / broken).write_bytes(b"nothing")
    code, said = inside("task=check", *options)
    assert code == 0 and words in said and f"serves      {serves}\n" in said, said
    code, said = inside("task=eval", "model=tiny", "weights=none", "eval=overcluster", *options)
    assert code == 2 if serves == "training" else code == 0, said


def test_a_mask_of_another_size_and_a_value_beyond_the_classes(streets, tmp_path):
    streets(train=3)
    Image.new("L", (24, 32)).save(tmp_path / "masks/train/0.png")
    Image.new("L", (32, 24), 7).save(tmp_path / "masks/train/1.png")
    dataset = Folder(root=f"{tmp_path}/images", masks=f"{tmp_path}/masks", classes=["road", "sky"], val_fraction=0)
    found = inspect(dataset, "train")
    assert found.looked == 3 and set(found.bad) == {"train/0", "train/1"}
    assert "one of the two lies on its side" in found.bad["train/0"] and "value 7" in found.bad["train/1"]
    Image.new("L", (16, 12)).save(tmp_path / "masks/train/0.png")
    assert "resize one of the two, masks without smoothing" in inspect(dataset, "train").bad["train/0"]


def test_what_is_not_there_exits_with_2(inside):
    code, said = inside("task=check", "dataset=voc", "dataset.root=nowhere")
    assert code == 2 and "nowhere does not exist" in said and "serves      nothing" in said
    assert said.splitlines()[-1].startswith("error: voc cannot be used: ") and "Traceback" not in said


def test_all_data_sets_in_one_table(inside, streets, tmp_path):
    code, said = inside("task=check", "dataset=all")
    assert code == 0 and re.search(r"shapes +val +200 +200 +200", said)
    for name in set(discovery.options("dataset")) - {"all", "folder", "mix", "shapes"}:
        assert re.search(rf"^{name} +none *$", said, re.MULTILINE), name
    folder = tmp_path / "data/camvid/train"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_bytes(b"broken")
    code, said = inside("task=check", "dataset=all")
    assert code == 2 and "error: camvid cannot be used" in said
    code, said = inside("task=check", "dataset=all", "show=2")
    assert code == 2 and "show=2" in said
    code, said = inside("dataset=all")
    assert code == 2 and "dataset=all is for task=check" in said


def test_a_set_without_its_masks_is_there_and_of_no_use(inside, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data/camvid" / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"data/camvid/{split}/0.png")
    code, said = inside("task=check", "dataset=all")
    assert (
        code == 2 and re.search(r"camvid +train +missing", said) and "camvid cannot be used: train: no CamVid" in said
    )


def test_places_are_spread_and_each_once():
    assert sorted(places(5, 48)) == [0, 1, 2, 3, 4] and places(0, 48) == []
    found = places(1000, 48)
    assert len(set(found)) == 48 and max(found) == 999 and max(found[:12]) - min(found[:12]) > 500


def test_colours_and_overlay():
    palette = colours(30)
    assert len({tuple(colour) for colour in palette.tolist()}) == 30
    image = np.full((2, 2, 3), 200, np.uint8)
    painted = overlay(image, np.array([[0, 1], [29, 255]]), palette)
    assert painted[1, 1].tolist() == [80, 80, 80] and len(np.unique(painted.reshape(-1, 3), axis=0)) == 4


def test_masks_of_0_and_255_serve_no_evaluation_until_it_is_said_what_they_mean(inside, streets, tmp_path):
    streets(train=2)
    streets(val=2)
    for path in tmp_path.glob("masks/*/*.png"):
        mask = np.zeros((24, 32), np.uint8)
        mask[3:9] = 255
        Image.fromarray(mask).save(path)
    keys = [f"dataset.{key}={tmp_path}/{folder}" for key, folder in (("root", "images"), ("masks", "masks"))]
    given = "task=check", "dataset=folder", *keys, "dataset.classes=[background,object]"
    code, said = inside(*given)
    assert code == 2 or "evaluation" not in said.split("serves")[1]
    assert said.count("val: the 2 masks hold one class alone, background; 25.0% of the pixels are ignored") == 1
    code, said = inside(*given, "dataset.values=[0,255]")
    assert code == 0 and "training, evaluation" in said and "object 25.0%" in said


def test_a_root_one_level_too_high_is_said_once_and_first(inside, tmp_path):
    for folder in ("above/voc/JPEGImages", "above/voc/ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    code, said = inside("task=check", "dataset=voc", f"dataset.root={tmp_path}/above")
    hint = f"dataset.root={tmp_path}/above is one level too high: use {tmp_path}/above/voc."
    assert code == 2 and said.count(hint) == 1 and said.splitlines()[-1].endswith(hint)
