"""`fraction` and `files`: which train images are used, what is refused, what a run writes down."""

import numpy as np
import pytest
from dataset_support import ade20k, cityscapes, save_image

from neco.config import validate
from neco.dataset.base import Dataset, Sample
from neco.dataset.folder import Folder
from neco.dataset.mix import Mix
from neco.utils.errors import NecoError


class Listed(Dataset):
    def __init__(self, images: int, **common) -> None:
        super().__init__(**common)
        self.images = images

    def find(self, split: str) -> list[Sample]:
        return [Sample(f"{i:06d}", f"/x/{i:06d}.jpg") for i in range(self.images)]


def keys(dataset, split="train"):
    return [sample.key for sample in dataset.samples(split)]


def test_a_fraction_is_a_seeded_choice_from_train():
    assert len(keys(Listed(118287, fraction=0.1))) == 11828, "of COCO, as published"
    whole, tenth = keys(Listed(5000)), keys(dataset := Listed(5000, fraction=0.1))
    assert len(tenth) == 500 and tenth == sorted(set(tenth)) and set(tenth) <= set(whole)
    assert keys(dataset, "val") == whole
    other = Listed(5000, fraction=0.1, subset_seed=1)
    assert tenth == keys(Listed(5000, fraction=0.1)) != keys(other)
    hundredth = set(keys(Listed(5000, fraction=0.01)))
    assert hundredth < set(tenth) and not hundredth <= set(keys(other))
    assert np.histogram([int(key) for key in tenth], 10)[0].min() > 25, "from everywhere"


@pytest.mark.parametrize(
    ("given", "images"), [("1/8", 1322), ("1/64", 165), ("1/128", 82), ("1/100000", 1), (0.5, 5291), (1, 10582)]
)
def test_fractions_are_numbers_or_text(given, images):
    node = validate.option("dataset", "coco", {"data_root": "data", "cache_dir": "cache"})
    fraction = validate.build({**node, "fraction": given}, "dataset").fraction
    assert len(keys(Listed(10582, fraction=fraction))) == images


@pytest.mark.parametrize("given", ["0", "1/0", "9/8", "-1/8", "some", 0, 1.5, True])
def test_other_fractions_are_refused(given):
    node = validate.option("dataset", "coco", {"data_root": "data", "cache_dir": "cache"})
    with pytest.raises(NecoError, match=r"dataset\.fraction="):
        validate.build({**node, "fraction": given}, "dataset")


def test_fraction_and_files_exclude_each_other():
    with pytest.raises(NecoError, match=r"fraction=1/8 and files=a.txt both choose"):
        validate.load("dataset=coco", "dataset.fraction=1/8", "dataset.files=a.txt")


def photos(root, *names):
    for name in names:
        save_image(root / name, 0)
    return str(root)


def test_files_are_matched_with_and_without_folders_and_suffix(tmp_path):
    root = photos(tmp_path / "photos", "a/1.jpg", "a/2.png", "b/2.png", "b/v1.2.png", "c.jpg")
    listing = tmp_path / "mine.txt"
    listing.write_text("\ufeff# mine\n\n  b/2 \r\nv1.2\n1.JPG\nphotos/c.jpg\n", encoding="utf-8")
    assert keys(Folder(root=root, files=str(listing))) == ["a/1.jpg", "b/2.png", "b/v1.2.png", "c.jpg"]
    ade20k(tmp_path / "ade", "")
    listing.write_text("images/training/ADE_train_00000003.jpg\nADE_train_00000001\n")
    built = validate.load("dataset=ade20k", f"dataset.root={tmp_path}/ade", f"dataset.files={listing}").build("dataset")
    assert keys(built) == ["ADE_train_00000001", "ADE_train_00000003"] and len(keys(built, "val")) == 3
    cityscapes(tmp_path / "city", "", ("labelIds",))
    listing.write_text("aachen_000002_000019_leftImg8bit.png\naachen/aachen_000000_000019\n")
    city = validate.load("dataset=cityscapes", f"dataset.root={tmp_path}/city", f"dataset.files={listing}")
    assert keys(city.build("dataset")) == ["aachen/aachen_000000_000019", "aachen/aachen_000002_000019"]


def test_lines_hold_spaces_accents_of_both_kinds_and_the_separators_of_windows(tmp_path):
    nfc, nfd = "m\u00fcde", "mu\u0308de"
    root = photos(tmp_path / "photos", "a/IMG 1.jpg", "a/IMG 10.jpg", f"{nfd}.jpg", "b/2.jpg", "b/3.jpg", "c.jpg")
    listing = tmp_path / "mine.txt"
    listing.write_text(f"a\\IMG 1.jpg\r\n{nfc}\r\nb/2.jpg masks/2.png\r\nc 1\r\n", encoding="utf-16")
    dataset = Folder(root=root, files=str(listing))
    assert keys(dataset) == ["a/IMG 1.jpg", "b/2.jpg", "c.jpg", f"{nfd}.jpg"]
    photos(tmp_path / "photos", f"{nfc}.jpg", "c 1.jpg")
    for form in (nfc, nfd):  # where both are there, each is itself
        listing.write_text(f"c 1\n{form}.jpg\n", encoding="utf-8")
        assert keys(Folder(root=root, files=str(listing))) == ["c 1.jpg", f"{form}.jpg"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("a/1\n2\n", r"line 2: 2 is a/2.png, b/2.png: say which"),
        ("# x\n\nb/1\n", r"line 3: b/1 is none of 3 like a/1.jpg"),
        ("a/1\n\n1.jpg\n", r"line 3: 1.jpg is a/1.jpg, which a/1 is, too"),
        ("a/1\na/1\n", r"a/1 is named twice, in lines 1 and 2"),
        ("# x\n", "names nothing"),
        (None, r"cannot read .*mine.txt"),
    ],
)
def test_wrong_lines_are_named(tmp_path, lines, words):
    root = photos(tmp_path / "photos", "a/1.jpg", "a/2.png", "b/2.png")
    if lines:
        (tmp_path / "mine.txt").write_text(lines)
    with pytest.raises(NecoError, match=words):
        Folder(root=root, files=str(tmp_path / "mine.txt")).samples("train")


def test_mixtures_choose_in_each_part_and_in_all():
    parts = {"a": Listed(100, fraction="1/4"), "b": Listed(20)}
    assert len(keys(mix := Mix(parts=parts))) == 45 and mix.chooses
    assert len(keys(half := Mix(parts=parts, fraction=0.5))) == 22
    assert sum(images for images, _ in half.shares(half.samples("train"))) == 22


def test_a_run_writes_its_choice_down_and_another_repeats_it(train, tmp_path):
    photos(tmp_path / "photos", *(f"{number % 3}/{number}.png" for number in range(20)))
    options = ["dataset=folder", f"dataset.root={tmp_path}/photos", "train.steps=1"]
    written = (train(*options, "dataset.fraction=1/2", folder="one") / "train_files.txt").read_text()
    assert len(written.split()) == 10 and set(written.split()) < {f"{n % 3}/{n}.png" for n in range(20)}
    again = train(*options, f"dataset.files={tmp_path}/one/train_files.txt", folder="two")
    assert (again / "train_files.txt").read_text() == written
    assert not (train(*options, folder="three") / "train_files.txt").exists()


def test_an_evaluation_writes_its_choice_down(train, tmp_path):
    ade20k(tmp_path / "ade", "")
    photos(tmp_path / "photos", *(f"{number}.png" for number in range(4)))
    folder = train(
        "dataset=folder", f"dataset.root={tmp_path}/photos", "dataset@val_dataset=ade20k", "train.steps=1",
        f"val_dataset.root={tmp_path}/ade", "val_dataset.fraction=0.7", "eval=[retrieval]", "eval.retrieval.size=32",
        "eval.retrieval.augment=none", "eval.retrieval.k=3", "extract.workers=0",
    )  # fmt: skip
    assert len((folder / "val_dataset_train_files.txt").read_text().split()) == 2
    assert not (folder / "train_files.txt").exists()
