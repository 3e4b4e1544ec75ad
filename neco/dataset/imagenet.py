"""ImageNet, for training without labels: 1,281,167 images of 1000 classes, or 126,689 of 100."""

import re
from typing import Any

from neco.dataset.base import Dataset, Sample, choose_layout, read_names, require_split
from neco.dataset.files import Tree

ADVICE = "Get it: register at https://image-net.org and unpack ILSVRC2012_img_train.tar, a folder n* for each class."


class ImageNet(Dataset):
    """`root/train/n*/*.JPEG` and, where it is wanted, `root/val/n*/*.JPEG`, unlabelled.

    Args:
        root: folder that holds `train`, with a folder for each class.
    """

    counts = {"train": 1281167, "val": 50000}

    def __init__(self, *, root: str, **common: Any) -> None:
        super().__init__(**common)
        self.tree = Tree(root, self.index)

    def find(self, split: str) -> list[Sample]:
        name = type(self).__name__
        require_split(split, tuple(self.counts), name)
        (folder,) = choose_layout(self.tree, [(split,)], f"{name} {split} images", ADVICE)
        there = any(re.match(r"n\d{8}\b", entry) for entry in self.tree.names(folder))
        if there and (found := self._images(folder)):
            return found
        raise self.tree.missing(f"class folders n* with images of {name}", [folder], ADVICE)

    def _images(self, folder: str) -> list[Sample]:
        return [Sample(key, ref) for key, ref in self.tree.images(folder).items()]


class ImageNet100(ImageNet):
    """The classes that `root/imagenet100.txt` names, one folder name a line.

    Args:
        root: folder that holds `imagenet100.txt` and `train`, with a folder for each class.
    """

    counts = {"train": 126689, "val": 5000}

    def _images(self, folder: str) -> list[Sample]:
        listing = "imagenet100.txt"
        if (text := self.tree.text(listing)) is None:
            advice = (
                "Its 100 lines are names of class folders; the published ones: "
                "https://raw.githubusercontent.com/HobbitLong/CMC/master/imagenet100.txt. For all classes: "
                "dataset=imagenet."
            )
            raise self.tree.missing("list of the classes of ImageNet-100", [listing], advice)
        found = []
        for name, line in read_names(text, f"{self.tree}/{listing}").items():
            images = self.tree.images(f"{folder}/{name}") if self.tree.is_dir(f"{folder}/{name}") else {}
            if not images:
                raise self.tree.missing(
                    f"images of class {name} ({listing}, line {line})", [f"{folder}/{name}"], ADVICE
                )
            found += [Sample(f"{name}/{key}", ref) for key, ref in images.items()]
        return found
