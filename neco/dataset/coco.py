"""COCO 2017 images, for training without labels."""

from typing import Any

from neco.dataset.base import Dataset, Sample, pair_samples, require_split
from neco.dataset.files import Tree


class Coco(Dataset):
    """train2017 (118,287 images) and val2017 (5,000), unlabelled, in `root/images`, `root` or `root/coco/images`.

    Args:
        root: folder that holds `images/train2017` or `train2017`.
    """

    def __init__(self, *, root: str, **common: Any) -> None:
        super().__init__(**common)
        self.tree = Tree(root)

    def find(self, split: str) -> list[Sample]:
        require_split(split, ("train", "val"), "COCO")
        folders = [f"images/{split}2017", f"{split}2017", f"coco/images/{split}2017"]
        for folder in folders:
            if self.tree.is_dir(folder) and (found := pair_samples(self.tree.images(folder))):
                return found
        advice = (
            f"Get it: download http://images.cocodataset.org/zips/{split}2017.zip "
            f"({'18' if split == 'train' else '1'} GB) and unpack it in {self.tree}/images."
        )
        raise self.tree.missing(f"COCO {split}2017 images", folders, advice)
