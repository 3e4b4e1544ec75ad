"""Pascal VOC 2012 semantic segmentation, 21 classes: 10,582 trainaug (or 1,464 train) and 1,449 val images."""

import logging
import re
from collections.abc import Collection
from typing import Any, Literal

from neco.dataset.base import Sample, choose_layout, match_names, read_names, readings, require_split, without_suffix
from neco.dataset.files import Ref, Tree
from neco.dataset.masks import PaletteRule
from neco.dataset.own_masks import OwnMasks
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)

BASES = ("", "VOCdevkit/VOC2012/", "VOC2012/", "VOCSegmentation/")
LAYOUTS = [
    (f"{base}{images}", f"{base}{lists}")
    for images, lists in (("JPEGImages", "ImageSets/Segmentation"), ("images", "sets"))
    for base in BASES
]
ADVICE = "Get it: download http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar (2 GB)."
AUG = (
    "The devkit has no augmented masks: add the folder SegmentationClassAug (10,582 masks made from the SBD data set) "
    "and the list trainaug.txt, or use the 1,464 official ones: dataset.train_set=train."
)


CLASSES = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
NAMES = re.compile(r"20\d\d_\d{6}$")  # of VOC's images


class VOC(OwnMasks):
    """`JPEGImages` with `ImageSets/Segmentation/*.txt`, or `images` with `sets/*.txt`, beside `SegmentationClass[Aug]`.

    They lie in `root`, `root/VOCdevkit/VOC2012`, `root/VOC2012` or `root/VOCSegmentation`. Lines of a list are names,
    which may hold spaces, or paths of image and mask. Stored masks, in a palette or grey, hold the class, and 255 at
    boundaries.

    Args:
        root: such a folder.
        train_set: list that is the train split; the masks of `trainaug` are those in `SegmentationClassAug`. None:
            trainaug for VOC's classes, train for others.
        classes: names in label order; None = VOC's own.
    """

    unclear_frame = "stored"

    def __init__(
        self,
        *,
        root: str,
        train_set: Literal["trainaug", "train"] | None = None,
        classes: list[str] | None = None,
        palette: PaletteRule = "index",
        **common: Any,
    ) -> None:
        super().__init__(classes=classes or CLASSES, palette=palette, **common)
        self.own_classes = classes is not None and classes != CLASSES
        self.tree, self.train_set = Tree(root, self.index), train_set or ("train" if self.own_classes else "trainaug")
        if not self.own_classes:
            self.counts = {"train": {"trainaug": 10582, "train": 1464}[self.train_set], "val": 1449}

    def find(self, split: str) -> list[Sample]:
        require_split(split, ("train", "val"), "VOC")
        name = self.train_set if split == "train" else "val"
        images, lists = choose_layout(self.tree, LAYOUTS, "VOC 2012 images with lists", ADVICE)
        base = images.rpartition("/")[0]
        masks = "/".join(filter(None, (base, "SegmentationClassAug" if name == "trainaug" else "SegmentationClass")))
        advice = AUG if name == "trainaug" else ADVICE
        if self.tree.ref(f"{lists}/{name}.txt") is None:
            raise self.tree.missing(f"list of the VOC {name} images", [f"{lists}/{name}.txt"], advice)
        if not self.tree.is_dir(masks):
            raise self.tree.missing(f"masks of VOC {name}", [masks], advice)
        files = {path: _by_name(self.tree.images(path)) for path in (images, masks)}
        names = self._names(f"{lists}/{name}.txt", files[images]) or {}
        other = f"{lists}/{'val' if split == 'train' else self.train_set}.txt"
        if both := names.keys() & (self._names(other, files[images]) or {}).keys():
            raise NecoError(f"{self.tree}/{lists}/{name}.txt: {len(both)} images are in {other}, too, like {min(both)}")
        found = {path: match_names(names, there) for path, there in files.items()}
        for path, there in found.items():
            if lost := sorted((line, name) for name, line in names.items() if name not in there):
                line, lacking = lost[0]
                raise NecoError(
                    f"{self.tree}/{lists}/{name}.txt, line {line}: {lacking} is not in {self.tree}/{path}, which holds "
                    f"{len(files[path])} files; {len(lost)} of {len(names)} names are not"
                )
        if not self.own_classes and not any(NAMES.search(image) for image in names):
            log.warning(
                "VOC: no name in %s.txt is like those of VOC 2012, the first is %s: if the classes are others, name "
                "them in the order of the masks' values: dataset.classes=[background,...]", name, min(names),
            )  # fmt: skip
        image, mask = ({name: there[found[path][name]] for name in names} for path, there in files.items())
        return [Sample(name, image[name], mask[name]) for name in sorted(names)]

    def _names(self, path: str, there: Collection[str]) -> dict[str, int] | None:
        """The names that a list holds, with their lines; None where there is no list. `there`: names of the images."""
        if (lines := self.tree.text(path)) is None:
            return None
        return read_names([_name(line, there) for line in lines], f"{self.tree}/{path}", there)


def _name(line: str, there: Collection[str]) -> str:
    """The name in a line: all of it where an image is called so, else the first word."""
    found = [without_suffix(reading).rpartition("/")[2] for reading in readings(line)]
    if not any(found) or (line.lstrip().startswith("#") and not match_names(found, there)):
        return ""
    fallback = without_suffix(line.split()[0].replace("\\", "/")).rpartition("/")[2]
    return next((name for name in found if name in there), next(iter(match_names(found, there)), fallback))


def _by_name(files: dict[str, Ref]) -> dict[str, Ref]:
    """Of the files directly in a folder. Raises NecoError for two of one name."""
    found: dict[str, Ref] = {}
    for key, ref in files.items():
        if "/" not in key and (first := found.setdefault(without_suffix(key), ref)) != ref:
            raise NecoError(f"{first} and {ref} have the same name: which one is meant is not clear")
    return found
