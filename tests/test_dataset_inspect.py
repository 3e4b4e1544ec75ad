"""What a look at a data set warns of, and what it refuses."""

import cv2
import numpy as np
import pytest
from PIL import Image

from neco.dataset import inspect as looks
from neco.dataset.base import Sample
from neco.dataset.folder import Folder
from neco.dataset.inspect import check_classes, inspect
from neco.training import unreadable
from neco.utils.errors import NecoError


def labelled(root, masks, classes=("background", "object"), **keys):
    for number, mask in enumerate(masks):
        for part in ("images", "masks"):
            (root / part).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (*np.shape(mask), 3), np.uint8)
        Image.fromarray(pixels).save(root / f"images/{number:04d}.png")
        Image.fromarray(np.uint8(mask)).save(root / f"masks/{number:04d}.png")
    return Folder(root=str(root / "images"), masks=str(root / "masks"), classes=list(classes), val_fraction=0, **keys)


def check(dataset, **how):
    check_classes(dataset, "train", inspect(dataset, "train", **how))


def test_255_in_the_place_of_the_only_other_class_is_refused(tmp_path, caplog):
    masks = [[[0, 255], [0, 0]], [[255, 255], [0, 0]]]
    dataset = labelled(tmp_path, masks)
    with pytest.raises(NecoError, match=r"hold one class alone, background; 37.5% .*ignored.*dataset.values=\[0,255\]"):
        check(dataset)
    check(labelled(tmp_path, masks, values=[0, 255]))
    assert not caplog.text
    with pytest.raises(NecoError, match=r"one class alone, a; 37.5% .*dataset.values to the value of each"):
        check(labelled(tmp_path, masks, classes=["a", "b", "c"]))
    with pytest.raises(NecoError, match=r"all pixels of 2 masks are ignored"):
        check(labelled(tmp_path, [[[255]], [[255]]]))


def test_a_class_that_comes_late_is_looked_for(tmp_path, caplog):
    masks = [[[0, 255]]] * 60
    masks[17] = [[0, 1]]
    check(labelled(tmp_path / "late", masks), looks=4)
    assert not caplog.text
    dataset = labelled(tmp_path / "none", [[[0, 255]]] * 60)
    with pytest.raises(NecoError, match="60 masks hold one class alone"):
        check(dataset, looks=4)


def test_a_palette_that_contradicts_the_others_is_found_among_many(tmp_path):
    dataset = labelled(tmp_path, [[[0, 1]]] * 40)
    for number in range(40):
        mask = Image.fromarray(np.uint8([[0, 1]]))
        mask.putpalette([0, 0, 0, *((0, 200, 0) if number == 13 else (200, 0, 0))])
        mask.save(tmp_path / f"masks/{number:04d}.png")
    (why,) = inspect(dataset, "train", looks=4).bad.values()
    assert "palettes of masks differ" in why and "0013.png" in why


def test_masks_of_one_class_and_classes_in_no_mask_are_warned_of(tmp_path, caplog):
    check(labelled(tmp_path / "one", [[[0, 0]], [[0, 0]]]))
    assert "train: the 2 masks hold one class alone, background" in caplog.text
    caplog.clear()
    check(labelled(tmp_path / "two", [[[0, 1]], [[0, 255]]], classes=["a", "b", "c"]))
    assert "train: no mask holds c; 25.0% of the pixels are ignored. If 255 is a class" in caplog.text


@pytest.mark.parametrize(
    ("name", "scale", "warns"), [("12 bits", 16, True), ("8 bits", 1, True), ("16 bits", 250, False)]
)
def test_16_bits_that_come_out_as_one_value_are_warned_of(tmp_path, caplog, name, scale, warns):
    samples = []
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 255, (8, 8)).astype(np.uint16) * scale
        cv2.imwrite(str(tmp_path / f"{number}.png"), values)
        samples.append(Sample(str(number), str(tmp_path / f"{number}.png")))
    unreadable.look(samples, {"": (0, 3)})
    assert ("3 of 3 images looked at are nearly one value" in caplog.text) == warns
    assert ("16 bits" in caplog.text and "dataset.range=[LOW,HIGH]" in caplog.text) == warns
    caplog.clear()
    unreadable.look([Sample(s.key, s.image, range=(0, 254 * scale)) for s in samples], {"": (0, 3)})
    assert not caplog.text


def test_dark_pictures_are_no_fault_unless_most_are(tmp_path, caplog):
    flat, plain = looks.FlatImages(), np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    Image.fromarray(plain // 64).save(tmp_path / "mask.png")
    sample = Sample("x", str(tmp_path / "mask.png"))
    for image in (plain, plain, plain // 64):
        flat.note(sample, image)
    flat.warn("train")
    assert not caplog.text
    flat.note(sample, plain // 64), flat.note(sample, plain // 64)
    flat.warn("train")
    assert "train: 3 of 5 images looked at are nearly one value" in caplog.text and "are they masks" in caplog.text
