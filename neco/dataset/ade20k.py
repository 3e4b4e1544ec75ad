"""ADE20K scene parsing (SceneParse150): 150 classes, 20,210 train and 2,000 val images."""

from typing import Any

import numpy as np

from neco.dataset.base import IGNORE, Dataset, Sample, find_pairs, look_up, require_split, table
from neco.dataset.files import Tree

FOLDERS = {"train": "training", "val": "validation"}
TABLE = table({0: IGNORE, **{value: value - 1 for value in range(1, 151)}})
ADVICE = (
    "Get it: download http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip (1 GB). "
    "To train on images without masks: dataset=folder."
)


class ADE20K(Dataset):
    """`root[/ADEChallengeData2016]/{images,annotations}/{training,validation}`.

    Stored masks hold 1..150 and 0 = other, which becomes IGNORE.

    Args:
        root: folder that holds `images` and `annotations`, or `ADEChallengeData2016`.
    """

    classes = (
        "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet",
        "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water",
        "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk",
        "rock", "wardrobe", "lamp", "bathtub", "railing", "cushion", "base", "box", "column", "signboard",
        "chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path",
        "stairs", "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge", "bookcase",
        "blind", "coffee table", "toilet", "flower", "book", "hill", "bench", "countertop", "stove", "palm",
        "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel", "bus", "towel", "light",
        "truck", "tower", "chandelier", "awning", "streetlight", "booth", "television receiver", "airplane",
        "dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster",
        "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool",
        "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank",
        "trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture",
        "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor",
        "bulletin board", "shower", "radiator", "glass", "clock", "flag",
    )  # fmt: skip
    counts = {"train": 20210, "val": 2000}
    marks = {"train": ("ADE_train_",), "val": ("ADE_val_",)}

    def __init__(self, *, root: str, **common: Any) -> None:
        super().__init__(**common)
        self.tree = Tree(root, self.index)

    def find(self, split: str) -> list[Sample]:
        require_split(split, tuple(FOLDERS), "ADE20K")
        layouts = [
            (f"{base}images/{FOLDERS[split]}", f"{base}annotations/{FOLDERS[split]}")
            for base in ("", "ADEChallengeData2016/")
        ]
        return find_pairs(self.tree, layouts, f"ADE20K {split} images with masks", ADVICE)

    def label(self, raw: np.ndarray, sample: Sample) -> np.ndarray:
        return look_up(TABLE, raw)
