"""Every layout in the real formats: which images, masks and labels; and what is said when something is amiss."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import CONF, losses
from dataset_support import LAYOUTS, STUFF_CLASSES, THING_CLASSES, VOC, Built, save_image, save_mask

from neco.config import validate
from neco.dataset.base import read_image, read_label
from neco.dataset.voc import VOC as VocFiles
from neco.utils.errors import NecoError

ONE = {name.split(":")[0]: name for name in reversed(LAYOUTS)}  # the first layout of each option
ALL = {*(path.stem for path in (CONF / "dataset").glob("[!_]*.yaml"))}


def open_set(built, **keys):
    """The data set of a layout, through the YAML of its option."""
    node = validate.option("dataset", built.option, {"data_root": "data", "cache_dir": str(built.root)})
    given = {"root": built.root, **built.keys, **keys}
    given["root"] = str(given["root"])
    return validate.build({**node, **given}, "dataset")


def assert_loads(dataset, built):
    for split, labels in built.splits.items():
        samples = dataset.samples(split)
        assert [sample.key for sample in samples] == list(labels)
        for number, sample in enumerate(samples):
            assert abs(read_image(sample.image).mean() - (20 * number + 10)) < 2, "the image of that name"
            if labels[sample.key] is None:
                assert sample.mask is None and dataset.classes == ()
            else:
                np.testing.assert_array_equal(read_label(dataset, sample), labels[sample.key])


def test_every_option_has_a_layout():
    assert set(ONE) == ALL - {"shapes", "mix", "all"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(tmp_path, name):
    assert_loads(open_set(built := LAYOUTS[name](tmp_path)), built)


@pytest.mark.parametrize("kind", ("zip", "tar"))
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_in_archives(tmp_path, name, kind):
    """Each top folder as an archive of its own, then these archives as one."""
    built = LAYOUTS[name](tmp_path / "data")
    for path in [path for path in built.root.iterdir() if path.is_dir()]:
        shutil.make_archive(str(path), kind, path.parent, path.name)
        shutil.rmtree(path)
    assert_loads(open_set(built), built)
    shutil.make_archive(str(built.root), kind, built.root)
    shutil.rmtree(built.root)
    assert_loads(open_set(built, index=str(tmp_path / "index")), built)


@pytest.mark.parametrize("name", ONE.values())
def test_a_split_loads_without_the_other(tmp_path, name):
    built = LAYOUTS[name](tmp_path)
    train = ("train", "training", "trainannot", "train2017", "train.txt", "trainaug.txt")
    lost = [path for path in sorted(tmp_path.rglob("*train*")) if path.name in train or "_train2017" in path.name]
    for path in lost:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert lost and open_set(built, **({"val_fraction": 1} if name == "folder" else {})).samples("val")


def test_classes_are_the_published_ones():
    classes = {name: open_set(Built(name, Path("x"), {})).classes for name in ONE}
    assert classes["coco_things"] == tuple(THING_CLASSES) and len(THING_CLASSES) == 12
    assert classes["coco_stuff"] == tuple(STUFF_CLASSES) and len(STUFF_CLASSES) == 15
    assert classes["voc"] == tuple(VOC) and len(VOC) == 21
    assert len(classes["ade20k"]) == len(set(classes["ade20k"])) == 150
    assert [classes["ade20k"][i] for i in (0, 12, 49, 100, 149)] == ["wall", "person", "fireplace", "poster", "flag"]
    assert len(classes["cityscapes"]) == 19 and classes["cityscapes"][13:16] == ("car", "truck", "bus")


def test_a_worker_gets_the_data_set_without_its_listing(tmp_path):
    built = LAYOUTS[ONE["coco_things"]](tmp_path)
    dataset = open_set(built)
    samples = dataset.samples("val")
    assert dataset.samples("val") is samples, "listed once"
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.listed("val") is None and dataset.listed("val") is samples
    np.testing.assert_array_equal(read_label(copy, samples[0]), read_label(dataset, samples[0]))


def test_all_of_them_train_as_one_mixture(tmp_path, train):
    parts = []
    for option, name in ONE.items():
        built = LAYOUTS[name](tmp_path / option)
        keys = {"root": built.root, **built.keys, "weight": 1, "max_bad": 0}
        parts.append(f"{option}:{{{','.join(f'{key}:{value}' for key, value in keys.items())}}}")
    folder = train("dataset=mix", f"dataset.parts={{{','.join(parts)}}}", "train.steps=2", "train.batch_size=16")
    assert np.isfinite(losses(folder)).all() and not (folder / "bad_images.txt").exists()


LABELLED = [option for option, name in ONE.items() if option not in ("coco", "imagenet", "imagenet100", "folder")]


@pytest.mark.parametrize("option", LABELLED)
def test_labelled_data_set_is_evaluated(tmp_path, inside, option):
    built = LAYOUTS[ONE[option]](tmp_path / "data")
    chosen = ["retrieval", "linear", "overcluster"]
    light = [f"eval.{name}.size=32" for name in chosen] + ["eval.retrieval.augment=none", "eval.retrieval.k=3"]
    light += ["eval.linear.epochs=1", "eval.overcluster.k=5", "eval.overcluster.seeds=[0]"]
    if option == "voc":
        chosen += ["attention", "unsupervised"]
        light += ["eval.attention.size=32", "eval.unsupervised.size=32", "eval.unsupervised.k=5"]
        light += ["eval.unsupervised.k_community=4", "eval.unsupervised.seeds=[0]"]
    else:
        code, text = inside(
            "task=eval", "weights=none", f"dataset={option}", f"dataset.root={built.root}", "eval=attention"
        )
        assert code == 2 and "has no class called background" in text
    code, text = inside(
        "task=eval", "weights=none", f"dataset={option}", f"dataset.root={built.root}", "run_dir=run", "logger=[]",
        f"eval=[{','.join(chosen)}]", *light,
        "extract.workers=0", "extract.cache_dir=null",
    )  # fmt: skip
    assert code == 0, text
    records = json.loads((tmp_path / "run/results.json").read_text())
    assert [record["evaluation"] for record in records] == chosen
    assert all(record["dataset"] == option for record in records)
    assert all(0 <= value <= 1 for record in records for value in record["metrics"].values())


def said(built, split="train", **keys) -> str:
    with pytest.raises(NecoError) as error:
        open_set(built, **keys).samples(split)
    return str(error.value)


@pytest.mark.parametrize("name", [name for name in ONE.values() if name != "folder"])
def test_a_root_that_is_one_level_off_is_named(tmp_path, name):
    built = LAYOUTS[name](tmp_path / "above" / "it")
    root, bases = built.root, {"VOC2012", "ADEChallengeData2016", "cityscapes"}
    text = said(built, root=root.parent)
    assert text == f"dataset.root={root.parent} is one level too high: use {root}."
    if built.option == "coco":
        return  # the folder below is a root, too
    folder = next(path for path in sorted(root.iterdir()) if path.is_dir() and path.name not in bases)
    assert f"dataset.root={folder} is one level too deep: use {root}" in said(built, root=folder)


@pytest.mark.parametrize("name", ONE.values())
def test_nothing_there_says_where_it_looked_and_what_to_do(tmp_path, name):
    built = LAYOUTS[name](tmp_path / "data")
    (tmp_path / "empty").mkdir()
    for root, what in ((tmp_path / "absent", "does not exist"), (tmp_path / "empty", "holds nothing")):
        text = said(built, root=root)
        assert f"Looked in\n  {root}" in text and what in text and "dataset.root=" in text
        assert name == "folder" or "Get it: " in text


@pytest.mark.parametrize("name", ["voc:/JPEGImages:trainaug", "ade20k:", "camvid:annot", "coco:images/", "imagenet"])
def test_an_empty_folder_is_not_an_empty_data_set(tmp_path, name):
    built = LAYOUTS[name](tmp_path)
    for path in tmp_path.rglob("*.*"):
        if path.suffix in (".jpg", ".png", ".JPEG"):
            path.unlink()
    text = said(built)
    assert str(tmp_path) in text and ("empty" in text or "no " in text or "holds 0 files" in text)


@pytest.mark.parametrize("name", ["ade20k:", "cityscapes:labelIds"])
def test_swapped_train_and_val_are_told_by_their_names(tmp_path, name):
    built = LAYOUTS[name](tmp_path)
    for folder in {path.parent for path in tmp_path.rglob("*") if path.name in ("training", "train")}:
        one, other = (folder / n for n in (("training", "validation") if name == "ade20k:" else ("train", "val")))
        one.rename(folder / "x")
        other.rename(one)
        (folder / "x").rename(other)
    assert "an image of val" in said(built) and "are the two swapped?" in said(built)
    assert "an image of train" in said(built, "val")


def test_swapped_train_and_val_are_told_by_their_numbers(tmp_path):
    built = LAYOUTS["camvid:images"](tmp_path)
    for number in range(99):  # and 2
        save_image(tmp_path / f"train/images/v{number}.jpg", 0)
        save_mask(tmp_path / f"train/labels/v{number}.png", np.zeros((24, 40)))
    assert "train holds 101 images, which is the number of val (published: 367 in train); are the two swapped?" in said(
        built
    )


def test_another_number_of_images_than_published_is_a_warning(tmp_path, caplog):
    open_set(LAYOUTS["ade20k:"](tmp_path)).samples("val")
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage() == "ADE20K: val holds 3 images, published are 2000"


def test_the_second_of_two_layouts_is_named(tmp_path, caplog):
    built = LAYOUTS["voc:VOC2012/JPEGImages:trainaug"](tmp_path)
    LAYOUTS["voc:/images:trainaug"](tmp_path)
    open_set(built).samples("train")
    (record,) = [record for record in caplog.records if "there twice" in record.getMessage()]
    text = record.getMessage()
    assert "VOC2012/JPEGImages + VOC2012/ImageSets/Segmentation is taken" in text and "images + sets is not" in text


def test_voc_without_the_augmented_masks_says_what_can_be_done(tmp_path):
    built = LAYOUTS["voc:VOCdevkit/VOC2012/JPEGImages:train"](tmp_path)
    text = said(built, train_set="trainaug")
    assert "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt" in text and "dataset.train_set=train" in text
    lists = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    shutil.copy(lists / "train.txt", lists / "trainaug.txt")
    text = said(built, train_set="trainaug")
    assert "no masks of VOC trainaug" in text and "VOC2012/SegmentationClassAug" in text and "train_set=train" in text
    assert open_set(built, train_set="trainaug").samples("val")


def test_voc_lists_are_checked(tmp_path):
    built = LAYOUTS["voc:/images:train"](tmp_path)
    file = tmp_path / "sets/train.txt"
    names = file.read_text()
    file.write_text(f"# mine\n\n{names}2009_000001\n")
    assert f"{file}, line 5: 2009_000001 is not in {tmp_path}/images" in said(built)
    save_image(tmp_path / "images/2009_000001.jpg", 3)
    assert f"line 5: 2009_000001 is not in {tmp_path}/SegmentationClass" in said(built)
    file.write_text(names + "2007_000032")
    assert "2007_000032 is named twice, in lines 1 and 3" in said(built)
    file.write_text(names + "2007_000033")
    assert "1 images are in sets/val.txt, too, like 2007_000033" in said(built)
    file.write_text("\n")
    assert "names nothing" in said(built)
    file.unlink()
    assert "no list of the VOC train images" in said(built) and "sets/train.txt" in said(built)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_names_in_voc_lists_may_hold_spaces(tmp_path, encoding):
    names = {"train": ["IMG 000", "IMG 001", "mu\u0308de 1"], "val": ["IMG 002", "IMG"]}
    for split, some in names.items():
        for number, name in enumerate(some):
            save_image(tmp_path / f"JPEGImages/{name}.jpg", number)
            save_mask(tmp_path / f"SegmentationClass/{name}.png", np.zeros((24, 40)))
        listing = tmp_path / f"ImageSets/Segmentation/{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        lines = ["IMG 000 ", "/JPEGImages/IMG 001.jpg /SegmentationClass/IMG 001.png", "m\u00fcde 1"]
        text = "\r\n".join(lines if split == "train" else ["IMG 002", "IMG -1"])  # the others of VOC end with -1 or 1
        listing.write_text(text, encoding=encoding)
    dataset = VocFiles(root=str(tmp_path), train_set="train")
    assert [Path(sample.mask).stem for sample in dataset.samples("train")] == names["train"]
    assert [sample.key for sample in dataset.samples("val")] == ["IMG", "IMG 002"]


def test_the_layout_of_voc_takes_other_classes(tmp_path, caplog):
    for split, stored in (("train", [1, 2, 0]), ("val", [3, 0, 255])):
        save_image(tmp_path / f"JPEGImages/weld_{split}.jpg", 1)
        save_mask(tmp_path / f"SegmentationClass/weld_{split}.png", np.resize(stored, (24, 40)), palette=True)
        (tmp_path / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ImageSets/Segmentation/{split}.txt").write_text(f"weld_{split}\n")
    VocFiles(root=str(tmp_path), train_set="train").samples("val")
    assert "no name in val.txt is like those of VOC 2012, the first is weld_val" in caplog.text
    caplog.clear()
    for name, keys, wanted in (
        ("plain", {"classes": ["plate", "pore", "crack", "slag"]}, {3, 0, 255}),
        ("reduced", {"classes": ["pore", "crack", "slag"], "reduce_zero_label": True}, {2, 255}),
    ):
        dataset = validate.build(
            {
                **validate.option("dataset", "voc", {"data_root": "data", "cache_dir": str(tmp_path)}),
                "root": str(tmp_path),
                **keys,
            },
            "dataset",
        )
        assert [s.key for s in dataset.samples("train")] == ["weld_train"], name
        assert {*np.unique(read_label(dataset, dataset.samples("val")[0]))} == wanted, name
    assert not caplog.text, "no published numbers to compare with"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("voc:/images:train", 21),
        ("ade20k:", 151),
        ("cityscapes:labelIds", 34),
        ("cityscapes:labelTrainIds", 19),
        ("camvid:annot", 12),
        (ONE["coco_things"], 26),
    ],
)
def test_a_value_that_is_no_class_is_named(tmp_path, name, value):
    dataset = open_set(LAYOUTS[name](tmp_path))
    sample = dataset.samples("val")[0]
    save_mask(Path(sample.mask), np.full((24, 40), value))
    with pytest.raises(NecoError, match=rf"holds the value {value} \(960 pixels\)"):
        read_label(dataset, sample)


def test_an_image_without_mask_is_named(tmp_path):
    built = LAYOUTS["ade20k:"](tmp_path)
    (tmp_path / "annotations/training/ADE_train_00000002.png").unlink()
    assert "1 of 3 images have no mask" in said(built) and "ADE_train_00000002.jpg" in said(built)


def test_cityscapes_test_images_are_unlabelled(tmp_path):
    built = LAYOUTS["cityscapes:labelIds"](tmp_path)
    save_image(tmp_path / "leftImg8bit/test/bonn/bonn_000000_000019_leftImg8bit.png", 0)
    (sample,) = open_set(built).samples("test")
    assert sample.key == "bonn/bonn_000000_000019" and sample.mask is None


def test_imagenet100_lists_its_classes(tmp_path):
    built = LAYOUTS["imagenet100"](tmp_path)
    with (tmp_path / "imagenet100.txt").open("a") as file:
        file.write("n99999999\n")
    assert "no images of class n99999999 (imagenet100.txt, line 4)" in said(built)
    (tmp_path / "imagenet100.txt").unlink()
    text = said(built)
    assert f"{tmp_path}/imagenet100.txt" in text and "CMC" in text and "dataset=imagenet" in text


def test_reduced_masks_of_ade20k_are_refused(tmp_path):
    """0..149 and 255, as other programs write them, would all be one class off."""
    built = LAYOUTS[ONE["ade20k"]](tmp_path)
    sample = open_set(built).samples("val")[0]
    save_mask(Path(sample.mask), np.array([[0, 149], [255, 3]], np.uint8))
    with pytest.raises(NecoError, match="holds the value 255"):
        read_label(open_set(built), sample)


def test_two_masks_of_one_name_are_refused_and_deeper_ones_are_not_looked_at(tmp_path):
    built = LAYOUTS[ONE["voc"]](tmp_path)
    mask = Path(open_set(built).samples("val")[0].mask)
    (mask.parent / "old").mkdir()
    shutil.copy(mask, mask.parent / "old")
    assert open_set(built).samples("val")[0].mask == str(mask)
    shutil.copy(mask, mask.with_suffix(".bmp"))
    assert "have the same name" in said(built, "val")
