import numpy as np
import pytest
from PIL import Image

from neco.dataset.base import read_label
from neco.dataset.coco import Coco
from neco.dataset.folder import Folder
from neco.utils.errors import NecoError


def put(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(path)


def test_unlabelled_images_are_divided_by_a_seeded_fraction(tmp_path):
    for i in range(20):
        put(tmp_path / f"deep/{i % 3}/{i:02d}.jpg")
    keys = {
        split: [s.key for s in Folder(root=str(tmp_path), val_fraction=0.1).samples(split)]
        for split in ("train", "val")
    }
    assert len(keys["val"]) == 2 and sorted(keys["train"] + keys["val"]) == sorted(
        f"deep/{i % 3}/{i:02d}.jpg" for i in range(20)
    )
    assert all(part == sorted(part) for part in keys.values())
    assert keys["val"] == [s.key for s in Folder(root=str(tmp_path), val_fraction=0.1).samples("val")]
    draws = {
        tuple(s.key for s in Folder(root=str(tmp_path), val_fraction=0.1, seed=seed).samples("val"))
        for seed in range(9)
    }
    assert len(draws) > 3
    assert len(Folder(root=str(tmp_path)).samples("train")) == 20, "without masks nothing is held out"
    with pytest.raises(NecoError, match="val_fraction=0"):
        Folder(root=str(tmp_path), val_fraction=0).samples("val")


def test_labelled_folder_with_splits_and_an_ignored_value(tmp_path):
    for split, value in (("train", 1), ("val", 0)):
        put(tmp_path / "photos" / split / "x.jpg")
        put(tmp_path / "labels" / split / "x.png", value)
    put(tmp_path / "labels/val/x.png", 9)
    dataset = Folder(root=str(tmp_path / "photos"), masks=str(tmp_path / "labels"), classes=["a", "b"], ignore=9)
    assert dataset.classes == ("a", "b")
    assert (read_label(dataset, dataset.samples("train")[0]) == 1).all()
    assert (read_label(dataset, dataset.samples("val")[0]) == 255).all()


def test_several_values_mean_nothing_and_others_are_named(tmp_path):
    put(tmp_path / "i/x.jpg")
    put(tmp_path / "m/x.png", 11)
    keys = {"root": str(tmp_path / "i"), "masks": str(tmp_path / "m"), "classes": ["a"], "val_fraction": 0}
    dataset = Folder(**keys, ignore=[11, 255])
    assert (read_label(dataset, dataset.samples("train")[0]) == 255).all()
    dataset = Folder(**keys)
    with pytest.raises(NecoError, match=r"holds the value 11 .*dataset\.ignore"):
        read_label(dataset, dataset.samples("train")[0])


def test_masks_among_the_images_are_warned_of(tmp_path, caplog):
    put(tmp_path / "train_x/images/a.png")
    Folder(root=str(tmp_path)).samples("train")
    assert not caplog.text
    put(tmp_path / "train_x/labels/a.png")
    Folder(root=str(tmp_path)).samples("train")
    assert "1 of 2 images lie in folders that are called like masks" in caplog.text


def test_folders_called_like_splits_that_are_none_are_warned_of(tmp_path, caplog):
    for name in ("Train", "valid"):
        put(tmp_path / f"{name}/a.png")
    Folder(root=str(tmp_path)).samples("train")
    assert "the folders Train, valid are not taken as splits, only two called train and val are" in caplog.text
    caplog.clear()
    Folder(root=str(tmp_path), split="random").samples("train")
    Folder(root=str(tmp_path / "Train")).samples("train")
    assert not caplog.text


def test_masks_and_classes_come_together():
    with pytest.raises(NecoError, match=r"masks is set and dataset.classes is not"):
        Folder(root="x", masks="y")
    with pytest.raises(NecoError, match=r"classes is set and dataset.masks is not"):
        Folder(root="x", classes=["a"])


@pytest.mark.parametrize("place", ["images/train2017", "train2017", "coco/images/train2017"])
def test_coco_places(tmp_path, place):
    put(tmp_path / place / "000000000009.jpg")
    samples = Coco(root=str(tmp_path)).samples("train")
    assert [sample.key for sample in samples] == ["000000000009.jpg"] and samples[0].mask is None


def test_absent_coco_says_where_it_looked_and_how_to_get_it(tmp_path):
    with pytest.raises(NecoError) as error:
        Coco(root=str(tmp_path)).samples("train")
    for part in (f"{tmp_path}/images/train2017", f"{tmp_path}/train2017", "train2017.zip", "dataset.root=", "nothing"):
        assert part in str(error.value)


def named(tmp_path, count, part="i"):
    for number in range(count):
        put(tmp_path / part / f"slice_{number}.png", number % 2)


def keys(dataset):
    return {split: [sample.key for sample in dataset.samples(split)] for split in ("train", "val")}


def test_two_lists_are_the_splits(tmp_path):
    named(tmp_path, 6), named(tmp_path, 5, "m")  # one without a mask, in no list
    (tmp_path / "train.txt").write_text("slice_0\nslice_2.png\n", encoding="utf-16")
    (tmp_path / "val.txt").write_text("i\\slice_3.png\r\n")
    lists = {"train_list": str(tmp_path / "train.txt"), "val_list": str(tmp_path / "val.txt")}
    for how in ({}, {"split": "list"}):
        own = Folder(root=str(tmp_path / "i"), masks=str(tmp_path / "m"), classes=["a", "b"], **lists, **how)
        assert keys(own) == {"train": ["slice_0", "slice_2"], "val": ["slice_3"]}
        assert own.samples("val")[0].mask == str(tmp_path / "m/slice_3.png")
    assert keys(Folder(root=str(tmp_path / "i"), **lists)) == {
        "train": ["slice_0.png", "slice_2.png"], "val": ["slice_3.png"]
    }  # fmt: skip
    (tmp_path / "val.txt").write_text("slice_2\n")
    with pytest.raises(NecoError, match=r"val_list=.*1 images are in .*train.txt, too, like slice_2.png"):
        Folder(root=str(tmp_path / "i"), **lists).samples("train")
    (tmp_path / "val.txt").write_text("slice_5\n")
    own = Folder(root=str(tmp_path / "i"), masks=str(tmp_path / "m"), classes=["a", "b"], **lists)
    with pytest.raises(NecoError, match=r"1 of 1 images of .*val.txt have no mask.*slice_5.png"):
        own.samples("val")
    (tmp_path / "val.txt").write_text("slice_9\n")
    with pytest.raises(NecoError, match=r"val_list=.*line 1: slice_9 is none of 6"):
        own.samples("val") if own._listed else Folder(root=str(tmp_path / "i"), **lists).samples("val")
    with pytest.raises(NecoError, match="two lists are needed"):
        Folder(root="x", train_list="y")
    with pytest.raises(NecoError, match="two lists are needed"):
        Folder(root="x", split="list")
    with pytest.raises(NecoError, match="split=random takes no lists"):
        Folder(root="x", split="random", **lists)


def test_a_block_is_a_run_of_neighbours_in_the_order_of_their_numbers(tmp_path):
    named(tmp_path, 30)
    starts = set()
    for seed in range(8):
        found = keys(Folder(root=str(tmp_path / "i"), split="block", val_fraction=0.2, seed=seed))
        val = sorted(int(name[6:-4]) for name in found["val"])
        assert len(val) == 6 and val == list(range(val[0], val[0] + 6))
        assert sorted(found["train"] + found["val"]) == sorted(f"slice_{number}.png" for number in range(30))
        starts.add(val[0])
    assert len(starts) > 2


def test_a_rule_that_is_said_is_taken_although_folders_are_there(tmp_path):
    for split in ("train", "val"):
        for number in range(5):
            put(tmp_path / split / f"{number}.png")
    assert len(Folder(root=str(tmp_path)).samples("train")) == 5
    assert len(Folder(root=str(tmp_path), split="random", val_fraction=0.2).samples("train")) == 8
    (tmp_path / "val").rename(tmp_path / "test")
    with pytest.raises(NecoError, match="no val images"):
        Folder(root=str(tmp_path), split="folders").samples("val")


def test_a_root_one_level_too_high_is_said_first(tmp_path):
    named(tmp_path, 2, "data/images"), named(tmp_path, 2, "data/masks")
    data, inner = str(tmp_path / "data"), str(tmp_path / "data/images")
    with pytest.raises(NecoError, match=rf"^dataset.root={data} is one level too high: use {inner}"):
        Folder(root=data, masks=f"{data}/masks", classes=["a", "b"]).samples("train")
    with pytest.raises(NecoError, match=rf"^dataset.masks={data} is one level too high: use {data}/masks"):
        Folder(root=inner, masks=data, classes=["a", "b"]).samples("train")


def test_a_folder_is_not_its_own_masks(tmp_path):
    put(tmp_path / "x.png", 1)
    with pytest.raises(NecoError, match=r"x\.png would be its own mask"):
        Folder(root=str(tmp_path), masks=str(tmp_path), classes=["a", "b"], val_fraction=0).samples("train")


def test_lists_name_images_that_begin_with_a_hash(tmp_path):
    names = ["#recycle/a", "b/#1", "c"]
    for name in names:
        put(tmp_path / f"i/{name}.png")
    (tmp_path / "train.txt").write_text("# a comment\n#not there\n#recycle/a.png\n#1\n")
    (tmp_path / "val.txt").write_text("c\n#recycle\n")
    dataset = Folder(
        root=str(tmp_path / "i"), train_list=str(tmp_path / "train.txt"), val_list=str(tmp_path / "val.txt")
    )
    assert [s.key for s in dataset.samples("train")] == ["#recycle/a.png", "b/#1.png"]
    assert [s.key for s in dataset.samples("val")] == ["c.png"]


def test_a_list_that_is_not_utf8_says_so(tmp_path):
    put(tmp_path / "i/größe.png")
    (tmp_path / "list.txt").write_bytes("größe\n".encode("cp1252"))
    with pytest.raises(NecoError, match=r"line 1: gr\ufffd+e is none of 1 .*not UTF-8.* among the images of train"):
        Folder(root=str(tmp_path / "i"), files=str(tmp_path / "list.txt")).samples("train")


def test_val_of_unlabelled_images_names_the_fraction_alone(tmp_path):
    put(tmp_path / "x.png")
    with pytest.raises(NecoError) as error:
        Folder(root=str(tmp_path)).samples("val")
    assert str(error.value) == "no val images: val_fraction=0 of 1 images leaves none"


def test_folders_that_are_not_there_are_named(tmp_path):
    put(tmp_path / "i/x.png")
    put(tmp_path / "m/x.png")
    for images, masks, words in (
        ("i", "mm", r"dataset\.masks=.*/mm: no such folder"),
        ("ii", "m", "ii does not exist"),
    ):
        dataset = Folder(root=str(tmp_path / images), masks=str(tmp_path / masks), classes=["a"], val_fraction=0)
        with pytest.raises(NecoError, match=words):
            dataset.samples("train")
