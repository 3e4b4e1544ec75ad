"""Every layout of every data set in miniature, in the real formats, with the labels that have to come out.

Facts are written down here a second time, in another form than in the code: by the name of what a value means.
Image i of a split is grey of brightness 20 i + 10; its mask holds every stored value, turned by i.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def words(text: str) -> list[str]:
    return text.split()


VOC = words("""background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
    person pottedplant sheep sofa train tvmonitor""")
LABEL_IDS = (
    words("""unlabeled ego_vehicle rectification_border out_of_roi static dynamic ground ROAD SIDEWALK parking
    rail_track BUILDING WALL FENCE guard_rail bridge tunnel POLE polegroup TRAFFIC_LIGHT TRAFFIC_SIGN VEGETATION TERRAIN
    SKY PERSON RIDER CAR TRUCK BUS caravan trailer TRAIN MOTORCYCLE BICYCLE""")
)  # labelIds of Cityscapes; classes are in capitals
# Supercategory of COCO's categories from 1; - for numbers that were given up
SUPER = words("""
    person vehicle vehicle vehicle vehicle vehicle vehicle vehicle vehicle outdoor outdoor - outdoor outdoor outdoor
    animal animal animal animal animal animal animal animal animal animal - accessory accessory - - accessory accessory
    accessory sports sports sports sports sports sports sports sports sports sports kitchen - kitchen kitchen kitchen
    kitchen kitchen kitchen food food food food food food food food food food furniture furniture furniture furniture -
    furniture - - furniture - electronic electronic electronic electronic electronic electronic appliance appliance
    appliance appliance appliance - indoor indoor indoor indoor indoor indoor indoor -
    textile textile plant building building plant furniture-stuff structural raw-material floor ceiling ceiling textile
    textile sky furniture-stuff furniture-stuff textile furniture-stuff ground furniture-stuff structural floor floor
    floor floor floor plant water food-stuff food-stuff furniture-stuff plant ground ground solid building plant
    furniture-stuff textile raw-material furniture-stuff plant solid ground textile structural raw-material ground
    textile plant raw-material ground ground structural ground water ground solid building textile food-stuff ground
    water furniture-stuff sky building ground solid furniture-stuff solid plant structural furniture-stuff building
    textile textile plant food-stuff wall wall wall wall wall wall wall water water window window solid other
    plant structural ceiling sky furniture-stuff furniture-stuff floor ground solid plant ground raw-material food-stuff
    building solid wall textile""")
assert len(SUPER) == 200
STUFF_FROM, OTHER, MERGED_FROM = 92, 183, 184
CATEGORIES = {number: name for number, name in enumerate(SUPER, 1) if name != "-"}
THING_CLASSES = sorted({name for number, name in CATEGORIES.items() if number < STUFF_FROM})
STUFF_CLASSES = sorted({name for number, name in CATEGORIES.items() if number >= STUFF_FROM} - {"other"})

Stored = dict[int, int]  # stored value -> the label that has to come out
Labels = dict[str, np.ndarray]  # by key


@dataclass
class Built:
    """A layout on disk: the option it belongs to, keys for it, and the labels of each split (None = unlabelled)."""

    option: str
    root: Path
    splits: dict[str, Labels]
    keys: dict[str, Any] = field(default_factory=dict)


def save_image(path: Path, number: int, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((24, 40, 3), 20 * number + 10, np.uint8)).save(path, **options)


def save_mask(path: Path, mask: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask.astype(np.uint8))
    if palette:
        image.putpalette([255 - value for value in range(256) for _ in range(3)])
    image.save(path)


def values(stored: Stored, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """A mask (24, 40) that holds every stored value, and its labels."""
    cells = np.resize(np.roll(list(stored), turn), 24 * 40).reshape(24, 40)
    return cells, np.vectorize(stored.get)(cells)


def plain(root: Path, image: str, mask: str, key: str, stored: Stored, names: list[str], **options: Any) -> Labels:
    """Images and masks at paths with {} for the name; the labels by key."""
    labels = {}
    for number, name in enumerate(names):
        raw, label = values(stored, number)
        save_image(root / image.format(name), number)
        save_mask(root / mask.format(name), raw, **options)
        labels[key.format(name)] = label
    return labels


def voc(root: Path, base: str, images: str, lists: str, train: str = "trainaug") -> Built:
    stored = {**{number: number for number in range(21)}, 255: 255}
    top, root, splits = root, root / base, {}
    for split, name, names in (("train", train, ["2007_000032", "2008_000001"]), ("val", "val", ["2007_000033"])):
        masks = "SegmentationClassAug" if name == "trainaug" else "SegmentationClass"
        splits[split] = plain(
            root, f"{images}/{{}}.jpg", f"{masks}/{{}}.png", "{}", stored, names, palette=name != "trainaug"
        )
        (root / lists).mkdir(parents=True, exist_ok=True)
        paths = name == "trainaug" and lists == "sets"  # the other form in which lists are about
        lines = [f"/{images}/{n}.jpg /{masks}/{n}.png" if paths else n for n in names]
        (root / lists / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    save_image(root / images / "2012_004331.jpg", 7)  # of another task of VOC: in no list
    return Built("voc", top, splits, {} if train == "trainaug" else {"train_set": train})


def ade20k(root: Path, base: str) -> Built:
    stored = {value: value - 1 if value else 255 for value in range(151)}
    splits = {}
    for split, folder in (("train", "training"), ("val", "validation")):
        names = [f"ADE_{split}_{number:08d}" for number in range(1, 4)]
        image, mask = (f"{base}{kind}/{folder}/{{}}" for kind in ("images", "annotations"))
        splits[split] = plain(root, f"{image}.jpg", f"{mask}.png", "{}", stored, names)
    return Built("ade20k", root, splits)


def cityscapes(root: Path, base: str, kinds: tuple[str, ...]) -> Built:
    classes = [name for name in LABEL_IDS if name.isupper()]
    stored = {
        "labelIds": {v: classes.index(name) if name.isupper() else 255 for v, name in enumerate(LABEL_IDS)},
        "labelTrainIds": {**{label: label for label in range(19)}, 255: 255},
    }
    splits = {}
    for split, city in (("train", "aachen"), ("val", "lindau")):
        names = [f"{city}/{city}_{number:06d}_000019" for number in range(3)]
        image, mask = f"{base}leftImg8bit/{split}/{{}}_leftImg8bit.png", f"{base}gtFine/{split}/{{}}_gtFine_"
        for kind in reversed(kinds):
            splits[split] = plain(root, image, f"{mask}{kind}.png", "{}", stored[kind], names)
        for name in names:
            save_image(root / f"{mask.format(name)}color.png", 1)
    return Built("cityscapes", root, splits)


def camvid(root: Path, image: str, mask: str) -> Built:
    stored = {value: 255 if value == 11 else value for value in range(12)}
    splits = {}
    for split, names in (("train", ["a", "b"]), ("val", ["c"]), ("test", ["d"])):
        splits[split] = plain(root, image.replace("SPLIT", split), mask.replace("SPLIT", split), "{}", stored, names)
    return Built("camvid", root, splits)


def coco_classes(option: str) -> Callable[[int], int]:
    classes = THING_CLASSES if option == "coco_things" else STUFF_CLASSES
    return lambda category: classes.index(CATEGORIES[category]) if CATEGORIES.get(category) in classes else 255


def coco(root: Path, option: str, images: str, masks: str, encoding: str) -> Built:
    """`encoding` is one of the code's, or `pixelmaps`: stuff and 0 alone."""
    label, splits = coco_classes(option), {}
    numbers = [0, *(n for n in CATEGORIES if n != OTHER or encoding == "pixelmaps")]
    if encoding == "pixelmaps":
        numbers = [n for n in numbers if n == 0 or STUFF_FROM <= n < MERGED_FROM]
    if encoding == "id_minus_1":
        stored = {n - 1 if n else 255: label(n) for n in numbers if n < OTHER}
    else:
        stored = {n: label(n) for n in numbers}
    for split, first in (("train", 9), ("val", 139)):
        names = [f"{first + number:012d}" for number in range(2)]
        image, mask = f"{images}{split}2017/{{}}.jpg", f"{masks.format(split)}/{{}}.png"
        splits[split] = plain(root, image, mask, "{}", stored, names)
        if encoding in ("panoptic", "two_channel"):
            segments = {n: 3 * n + 1000 * n + 70_000 * n for n in CATEGORIES}  # segments are named by colours
            annotations = []
            for number, name in enumerate(names):
                raw = values(stored, number)[0]
                colours = np.stack([raw, np.arange(40) % 5 * (raw > 0), 0 * raw], 2)  # category, instance
                if encoding == "panoptic":
                    named = np.vectorize({0: 0, **segments}.get)(raw)
                    colours = np.stack([named % 256, named // 256 % 256, named // 65536], 2)
                    info = [
                        {"id": segments[n], "category_id": n, "area": 1, "iscrowd": 0, "bbox": [0, 0, 1, 1]}
                        for n in segments
                    ]
                    annotations.append({"segments_info": info, "file_name": f"{name}.png", "image_id": int(name)})
                save_mask(root / mask.format(name), colours)
            if annotations:
                categories = [
                    {"id": n, "name": f"x{n}", "supercategory": CATEGORIES[n], "isthing": 1} for n in CATEGORIES
                ]
                listing = {
                    "images": [{"id": 9, "file_name": "9.jpg"}],
                    "annotations": annotations,
                    "categories": categories,
                }
                (root / f"{masks.format(split)}.json").write_text(json.dumps(listing))
    return Built(option, root, splits)


def imagenet(root: Path, hundred: bool) -> Built:
    """With what occurs in ImageNet: a CMYK JPEG, and a PNG under the name of a JPEG."""
    names = ["n01440764/n01440764_10026", "n02012849/n02012849_1", "n02105855/n02105855_2933"]
    for split in ("train", "val"):
        for number, name in enumerate(names):
            path = root / split / f"{name}.JPEG"
            save_image(path, number)
            if number:
                picture, data = Image.open(path).convert("CMYK" if number == 1 else "RGB"), io.BytesIO()
                picture.save(data, "JPEG" if number == 1 else "PNG")
                path.write_bytes(data.getvalue())
    if hundred:
        save_image(root / "train/n00000001/n00000001_1.JPEG", 9)
        (root / "imagenet100.txt").write_text("".join(f"{name.split('/')[0]}\n" for name in names))
    unlabelled: dict[str, Any] = {f"{name}.JPEG": None for name in names}
    return Built("imagenet100" if hundred else "imagenet", root, {"train": unlabelled, "val": unlabelled})


def folder(root: Path) -> Built:
    """A tree of class folders, as many image sets come."""
    names = {split: [f"cat/{split}1", f"dog/{split}2"] for split in ("train", "val")}
    for split, own in names.items():
        for number, name in enumerate(own):
            save_image(root / split / f"{name}.png", number)
    return Built("folder", root, {split: {f"{name}.png": None for name in own} for split, own in names.items()})  # type: ignore[misc]


def unlabelled_coco(root: Path, base: str) -> Built:
    for split in ("train", "val"):
        for number in range(2):
            save_image(root / f"{base}{split}2017/{number:012d}.jpg", number)
    keys: dict[str, Any] = {f"{number:012d}.jpg": None for number in range(2)}
    return Built("coco", root, {"train": keys, "val": keys})


ANNOTATIONS = ("annotations/annotations/", "annotations/")  # doubled in the wild
SEMANTIC = [
    (f"{a}panoptic_annotations/semantic_segm{n}tions_{{}}2017", "id") for a in ANNOTATIONS for n in ("ena", "enta")
]
COMMON = [
    *SEMANTIC,
    *((f"{a}panoptic_annotations/panoptic_{{}}2017", "panoptic") for a in ANNOTATIONS),
    ("annotations/panoptic_{}2017", "panoptic"),
    ("annotations/panoptic_{}2017", "two_channel"),
    ("annotations/{}2017", "id"),
    ("annotations/annotations/{}2017", "id"),
    ("annotations/{}2017", "id_minus_1"),
    ("stuffthingmaps/{}2017", "id_minus_1"),
    ("stuffthingmaps_trainval2017/{}2017", "id_minus_1"),
]
PIXELMAPS = [(f"{a}{f}stuff_{{}}2017_pixelmaps", "pixelmaps") for a in ANNOTATIONS for f in ("stuff_annotations/", "")]
IMAGES = ("images/", "coco/images/", "")


def layouts() -> dict[str, Callable[[Path], Built]]:
    """Every layout by name, as a function of an empty folder."""
    found: dict[str, Callable[[Path], Built]] = {}
    for images, lists in (("JPEGImages", "ImageSets/Segmentation"), ("images", "sets")):
        for base in ("", "VOCdevkit/VOC2012", "VOC2012", "VOCSegmentation"):
            for train in ("trainaug", "train"):
                name = f"voc:{base}/{images}:{train}"
                found[name] = lambda r, a=(base, images, lists, train): voc(r, *a)
    for base in ("", "ADEChallengeData2016/"):
        found[f"ade20k:{base}"] = lambda r, b=base: ade20k(r, b)
    for base in ("", "cityscapes/"):
        for kinds in (("labelIds",), ("labelTrainIds",), ("labelIds", "labelTrainIds")):
            found[f"cityscapes:{base}{'+'.join(kinds)}"] = lambda r, a=(base, kinds): cityscapes(r, *a)
    found["camvid:images"] = lambda r: camvid(r, "SPLIT/images/{}.jpg", "SPLIT/labels/{}.png")
    found["camvid:annot"] = lambda r: camvid(r, "SPLIT/{}.png", "SPLITannot/{}.png")
    for option, own in (("coco_things", []), ("coco_stuff", PIXELMAPS)):
        for number, (masks, encoding) in enumerate([*COMMON, *own]):
            images = IMAGES[number % 3]
            found[f"{option}:{images}:{masks}:{encoding}"] = lambda r, a=(option, images, masks, encoding): coco(r, *a)
    for base in IMAGES:
        found[f"coco:{base}"] = lambda r, b=base: unlabelled_coco(r, b)
    found["imagenet"] = lambda r: imagenet(r, False)
    found["imagenet100"] = lambda r: imagenet(r, True)
    found["folder"] = folder
    return found


LAYOUTS = layouts()
