"""COCO 2017: images to train on without labels, and the supercategories of things and of stuff as classes.

Categories have numbers: things 1..90 with gaps, stuff 92..182, 183 = other, and 184..200 the merged stuff of panoptic
annotations. Masks hold them in one of four encodings, see `Encoding`.
"""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from neco.dataset.base import (
    IGNORE,
    Dataset,
    Sample,
    choose_layout,
    look_up,
    one_off,
    pair_samples,
    require_split,
    table,
)
from neco.dataset.files import Ref, Tree, read_bytes
from neco.dataset.masks import read_mask
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)

# id: the category, 0 = none (stuff pixel maps, semantic masks). id_minus_1: 255 = none (stuffthingmaps). panoptic:
# segment R + 256 G + 65536 B, 0 = none, its category in a JSON file. two_channel: R is the category, G the instance.
Encoding = Literal["id", "id_minus_1", "panoptic", "two_channel"]
LOOKS = 48  # masks looked at to tell the encoding


def _numbers(text: str) -> tuple[int, ...]:
    """ "1 3-5" -> 1, 3, 4, 5."""
    ends = ([int(end) for end in part.split("-")] for part in text.split())
    return tuple(number for first, *last in ends for number in range(first, (last or [first])[0] + 1))


THINGS = {
    "accessory": "27-28 31-33", "animal": "16-25", "appliance": "78-82", "electronic": "72-77", "food": "52-61",
    "furniture": "62-65 67 70", "indoor": "84-90", "kitchen": "44 46-51", "outdoor": "10-11 13-15", "person": "1",
    "sports": "34-43", "vehicle": "2-9",
}  # fmt: skip
STUFF = {
    "building": "95-96 128 151 158 166 197", "ceiling": "102-103 186", "floor": "101 114-118 190",
    "food-stuff": "121-122 153 170 196", "furniture-stuff": "98 107-108 110 112 123 130 133 156 161 165 188-189",
    "ground": "111 125-126 136 140 144-145 147 149 154 159 191 194",
    "plant": "94 97 119 124 129 134 142 163 169 184 193", "raw-material": "100 132 139 143 195", "sky": "106 157 187",
    "solid": "127 135 150 160 162 182 192 198", "structural": "99 113 138 146 164 185",
    "textile": "92-93 104-105 109 131 137 141 152 167-168 200", "wall": "171-177 199", "water": "120 148 155 178-179",
    "window": "180-181",
}  # fmt: skip
OTHER = 183
VALUES = {"id": {0, OTHER}.union(*map(_numbers, (*THINGS.values(), *STUFF.values())))}
VALUES["id_minus_1"] = {value - 1 for value in VALUES["id"] - {0} if value <= OTHER} | {IGNORE}


# Where images and masks are; the first that is there is taken. {} is the split.
BASES = ("images/", "", "coco/images/")
ANNOTATIONS = ("annotations/annotations/", "annotations/")  # doubled in the wild, and misspelt below
PIXELMAPS = ("stuff_annotations/stuff_{}2017_pixelmaps", "stuff_{}2017_pixelmaps")
FOLDERS = (
    "panoptic_annotations/semantic_segmenations_{}2017",
    "panoptic_annotations/semantic_segmentations_{}2017",
    "panoptic_annotations/panoptic_{}2017",
    "panoptic_{}2017",
    "{}2017",
)
STUFFTHINGMAPS = ("stuffthingmaps/{}2017", "stuffthingmaps_trainval2017/{}2017")


class Coco(Dataset):
    """train2017 (118,287 images) and val2017 (5,000), unlabelled, in `root/images`, `root` or `root/coco/images`.

    Args:
        root: folder that holds `images/train2017` or `train2017`.
    """

    counts = {"train": 118287, "val": 5000}

    def __init__(self, *, root: str, **common: Any) -> None:
        super().__init__(**common)
        self.tree = Tree(root, self.index)

    def find(self, split: str) -> list[Sample]:
        return pair_samples(self._images(split))

    def _images(self, split: str) -> dict[str, Ref]:
        require_split(split, tuple(self.counts), "COCO")
        advice = (
            f"Get it: download http://images.cocodataset.org/zips/{split}2017.zip "
            f"({'18' if split == 'train' else '1'} GB) and unpack it in {self.tree}/images."
        )
        what = f"COCO {split}2017 images"
        layouts = [(f"{base}{split}2017",) for base in BASES]
        (folder,) = choose_layout(self.tree, layouts, what, advice)
        if found := _files(self.tree, folder, ".jpg"):
            return found
        raise self.tree.missing(f"{what}: no .jpg", [folder], advice)


class CocoMasks(Coco):
    """COCO 2017 with masks of category numbers, several of which make up a class.

    Args:
        root: folder that holds the images, as for unlabelled COCO, and `annotations` or `stuffthingmaps`.
        encoding: how masks hold categories; `auto` finds it out from a few of each split, and the log says what it is.
    """

    colours = True
    groups: Mapping[str, str]  # class: category numbers
    folders: tuple[str, ...]  # of masks

    def __init__(self, *, root: str, encoding: Literal["auto"] | Encoding = "auto", **common: Any) -> None:
        super().__init__(root=root, **common)
        self.encoding = encoding
        self.classes = tuple(self.groups)
        labels = {number: label for label, text in enumerate(self.groups.values()) for number in _numbers(text)}
        every = {number: labels.get(number, IGNORE) for number in VALUES["id"]}
        minus_1 = {value: every.get(value + 1, IGNORE) for value in {*VALUES["id_minus_1"], 255}}
        self.tables = {"id": table(every), "id_minus_1": table(minus_1)}
        self.encodings: dict[str, tuple[Encoding, Ref | None]] = {}  # by folder of masks, with the panoptic JSON

    def find(self, split: str) -> list[Sample]:
        images, name = self._images(split), type(self).__name__
        folders = [folder.format(split) for folder in self.folders]
        there = [folder for folder in folders if self.tree.is_dir(folder)]
        advice = (
            "Get them: http://images.cocodataset.org/annotations/panoptic_annotations_trainval2017.zip or "
            "stuff_annotations_trainval2017.zip beside it, or the stuffthingmaps_trainval2017.zip of COCO-Stuff. "
            "To train without them: dataset=coco."
        )
        if not there:
            both = [(f"{base}{split}2017", folder) for base in BASES for folder in folders]
            if hint := one_off(self.tree, both):
                raise NecoError(hint)
            raise self.tree.missing(f"masks of {name} {split}2017", folders, advice)
        folder = there[0]
        found = pair_samples(images, _files(self.tree, folder, ".png"))
        listing = self.tree.ref(f"{folder}.json")
        places = np.unique(np.linspace(0, len(found) - 1, LOOKS).round().astype(int))
        looked = [found[place] for place in places]
        encoding = self._tell(folder, looked, listing) if self.encoding == "auto" else self.encoding
        if encoding == "panoptic" and listing is None:
            raise self.tree.missing(f"panoptic annotations of {folder}", [f"{folder}.json"], advice)
        self.encodings |= {_above(sample.mask): (encoding, listing) for sample in found}
        if all((self.label(_read(sample.mask), sample) == IGNORE).all() for sample in looked):
            raise NecoError(
                f"{self.tree}/{folder}: {len(looked)} masks hold none of the classes of {name} ({encoding})"
            )
        more = f"; there, but not used: {', '.join(there[1:])}" if there[1:] else ""
        log.info("%s %s: masks of %s, encoding %s%s", name, split, folder, encoding, more)
        return found

    def label_files(self) -> list[Ref]:
        return [listing for encoding, listing in self.encodings.values() if listing and encoding == "panoptic"]

    def _tell(self, folder: str, looked: Sequence[Sample], listing: Ref | None) -> Encoding:
        """The encoding of masks. Raises NecoError where they fit none, or two and the folder's name does not tell."""
        masks = [_read(sample.mask) for sample in looked if sample.mask]
        place, key = f"{self.tree}/{folder}", "set dataset.encoding=id, id_minus_1, panoptic or two_channel"
        if {mask.ndim for mask in masks} == {3}:
            if listing and all(
                np.isin(_segment(mask), _segments(listing).of(sample.mask)[0]).all()
                for mask, sample in zip(masks, looked, strict=True)
            ):
                return "panoptic"
            if all(not mask[..., 2].any() and VALUES["id"].issuperset(np.unique(mask[..., 0])) for mask in masks):
                return "two_channel"
            why = f"do not have the segments of {listing}" if listing else f"need {place}.json, which is not there"
            raise NecoError(f"{place}: colours, which for panoptic masks {why}; if they are something else, {key}")
        if any(mask.ndim != 2 for mask in masks):
            raise NecoError(f"{place}: some masks are grey, others in colour; keep one kind, or {key}")
        values = set(np.unique(np.concatenate([np.unique(mask) for mask in masks])).tolist())
        fitting: list[Encoding] = [name for name in ("id", "id_minus_1") if values <= VALUES[name]]
        if len(fitting) == 2:  # by the name, where it says something
            says = {"stuffthing": "id_minus_1", "pixelmaps": "id", "semantic": "id"}
            fitting = [name for name in fitting if name in (says[part] for part in says if part in folder)]
        if not fitting:
            odd = {name: sorted(values - allowed) for name, allowed in VALUES.items()}
            why = "; ".join(f"not {name}: {', '.join(map(str, found[:5]))}" for name, found in odd.items() if found)
            raise NecoError(f"{place}: the values of {len(masks)} masks fit {why or 'two encodings'}; {key}")
        return fitting[0]

    def label(self, raw: np.ndarray, sample: Sample) -> np.ndarray:
        encoding, listing = self.encodings[_above(sample.mask)]
        if encoding in self.tables:
            return look_up(self.tables[encoding], raw)
        if raw.ndim != 3:
            raise NecoError(f"{sample.mask} is grey, the encoding {encoding} wants colours")
        if encoding == "two_channel" or listing is None:
            return look_up(self.tables["id"], raw[..., 0])
        numbers, categories = _segments(listing).of(sample.mask)
        segment = _segment(raw)
        places = np.searchsorted(numbers, segment).clip(max=len(numbers) - 1)
        if (wrong := segment[numbers[places] != segment]).size:
            raise NecoError(f"{sample.mask} holds segment {wrong[0]}, which {listing} does not list for it")
        return self.tables["id"][categories][places]


class CocoThings(CocoMasks):
    """The 12 supercategories of things; stuff and what is unlabelled is IGNORE."""

    groups = THINGS
    folders = (*(f"{base}{folder}" for folder in FOLDERS for base in ANNOTATIONS), *STUFFTHINGMAPS)


class CocoStuff(CocoMasks):
    """The 15 supercategories of stuff without `other`; things, `other` and what is unlabelled is IGNORE."""

    groups = STUFF
    folders = (*(f"{base}{folder}" for folder in PIXELMAPS for base in ANNOTATIONS), *CocoThings.folders)


class Segments:
    """The categories of all segments of a panoptic JSON file, as arrays: two million Python objects would be 1 GB."""

    def __init__(self, annotations: Sequence[Mapping[str, Any]]) -> None:
        rows = [[(0, 0)], *(sorted([(0, 0), *annotation["segments_info"]]) for annotation in annotations)]
        self.numbers = np.array([number for row in rows for number, _ in row], np.int32)
        self.categories = np.array([category for row in rows for _, category in row], np.uint8)
        ends = np.cumsum([len(row) for row in rows]).tolist()
        names = ["", *(_stem(annotation["file_name"]) for annotation in annotations)]
        self.spans = {name: (end - len(row), end) for name, row, end in zip(names, rows, ends, strict=True)}

    def of(self, mask: Ref | None) -> tuple[np.ndarray, np.ndarray]:
        """Segment numbers of a mask, sorted, 0 among them, and their categories; 0 alone where it is not listed."""
        first, end = self.spans.get(_stem(str(mask)), self.spans[""])
        return self.numbers[first:end], self.categories[first:end]


@functools.lru_cache(maxsize=4)
def _segments(listing: Ref) -> Segments:
    """Read once a process; workers that are forked have what was read before."""

    def compact(node: dict[str, Any]) -> Any:
        return (node["id"], node["category_id"]) if "category_id" in node and "id" in node else node

    try:
        return Segments(json.loads(read_bytes(listing), object_hook=compact)["annotations"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise NecoError(f"{listing} is no panoptic annotation file ({error!r}): get it again") from error


def _read(mask: Ref | None) -> np.ndarray:
    """The stored numbers (H, W), or colours (H, W, 3)."""
    assert mask is not None
    return read_mask(mask, colours=True).values


def _segment(colours: np.ndarray) -> np.ndarray:
    """Segment number of each pixel."""
    red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
    return red + (green << 8) + (blue << 16)


def _files(tree: Tree, folder: str, suffix: str) -> dict[str, Ref]:
    """The files of one kind below a folder by name: names are numbers, unique in COCO."""
    return {PurePosixPath(key).name: ref for key, ref in tree.images(folder).items() if key.lower().endswith(suffix)}


def _stem(path: str) -> str:
    return PurePosixPath(path).stem


def _above(mask: Ref | None) -> str:
    return str(mask).rpartition("/")[0]
