"""COCO 2017 images, for training without labels."""

from pathlib import Path
from typing import Any

from neco.dataset.base import Dataset, Sample, missing, pair_samples, require_split


class Coco(Dataset):
    """train2017 (118,287 images) and val2017 (5,000), unlabelled, in `root/images`, `root` or `root/coco/images`.

    Args:
        root: folder that holds `images/train2017` or `train2017`.
    """

    def __init__(self, *, root: str, **common: Any) -> None:
        super().__init__(**common)
        self.root = Path(root).expanduser()

    def samples(self, split: str) -> list[Sample]:
        require_split(split, ("train", "val"), "COCO")
        folders = [self.root / above / f"{split}2017" for above in ("images", "", "coco/images")]
        for folder in folders:
            if folder.is_dir() and (found := pair_samples(folder)):
                return found
        advice = (
            f"Get it: download http://images.cocodataset.org/zips/{split}2017.zip "
            f"({'18' if split == 'train' else '1'} GB) and unpack it in {self.root / 'images'}."
        )
        raise missing(f"COCO {split}2017 images", self.root, folders, advice)
