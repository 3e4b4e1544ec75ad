"""Pascal VOC 2012 semantic segmentation, 21 classes: 10,582 trainaug (or 1,464 train) and 1,449 val images."""

from typing import Any, Literal

from neco.dataset.base import Dataset, Sample, choose_layout, read_names, require_split, without_suffix
from neco.dataset.files import Ref, Tree
from neco.errors import NecoError

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


class VOC(Dataset):
    """`JPEGImages` with `ImageSets/Segmentation/*.txt`, or `images` with `sets/*.txt`, beside `SegmentationClass[Aug]`.

    They lie in `root`, `root/VOCdevkit/VOC2012`, `root/VOC2012` or `root/VOCSegmentation`. Lines of a list are names or
    paths of image and mask. Stored masks, in a palette or grey, hold the class, and 255 at boundaries.

    Args:
        root: such a folder.
        train_set: list that is the train split; the masks of `trainaug` are those in `SegmentationClassAug`.
    """

    classes = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    )  # fmt: skip

    def __init__(self, *, root: str, train_set: Literal["trainaug", "train"] = "trainaug", **common: Any) -> None:
        super().__init__(**common)
        self.tree, self.train_set = Tree(root, self.index), train_set
        self.counts = {"train": {"trainaug": 10582, "train": 1464}[train_set], "val": 1449}

    def find(self, split: str) -> list[Sample]:
        require_split(split, tuple(self.counts), "VOC")
        name = self.train_set if split == "train" else "val"
        images, lists = choose_layout(self.tree, LAYOUTS, "VOC 2012 images with lists", ADVICE)
        base = images.rpartition("/")[0]
        masks = "/".join(filter(None, (base, "SegmentationClassAug" if name == "trainaug" else "SegmentationClass")))
        advice = AUG if name == "trainaug" else ADVICE
        names = self._names(f"{lists}/{name}.txt")
        if names is None:
            raise self.tree.missing(f"list of the VOC {name} images", [f"{lists}/{name}.txt"], advice)
        if not self.tree.is_dir(masks):
            raise self.tree.missing(f"masks of VOC {name}", [masks], advice)
        other = f"{lists}/{'val' if split == 'train' else self.train_set}.txt"
        if both := names.keys() & (self._names(other) or {}).keys():
            raise NecoError(f"{self.tree}/{lists}/{name}.txt: {len(both)} images are in {other}, too, like {min(both)}")
        files = {path: _by_name(self.tree.images(path)) for path in (images, masks)}
        for path, there in files.items():
            if lost := sorted((line, name) for name, line in names.items() if name not in there):
                line, lacking = lost[0]
                raise NecoError(
                    f"{self.tree}/{lists}/{name}.txt, line {line}: {lacking} is not in {self.tree}/{path}, which holds "
                    f"{len(there)} files; {len(lost)} of {len(names)} names are not"
                )
        return [Sample(name, *(there[name] for there in files.values())) for name in sorted(names)]

    def _names(self, path: str) -> dict[str, int] | None:
        """The names that a list holds, with their lines; None where there is no list."""
        if (text := self.tree.text(path)) is None:
            return None
        lines = "\n".join(
            without_suffix(line.split()[0]).rpartition("/")[2] if line.strip() else "" for line in text.splitlines()
        )
        return read_names(lines, f"{self.tree}/{path}")


def _by_name(files: dict[str, Ref]) -> dict[str, Ref]:
    """Of the files directly in a folder. Raises NecoError for two of one name."""
    found: dict[str, Ref] = {}
    for key, ref in files.items():
        if "/" not in key and (first := found.setdefault(without_suffix(key), ref)) != ref:
            raise NecoError(f"{first} and {ref} have the same name: which one is meant is not clear")
    return found
