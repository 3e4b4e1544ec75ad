"""Any folder of images; with a parallel folder of masks and a list of classes it can be evaluated."""

import logging
import re
from typing import Any

import numpy as np

from neco.dataset.base import IGNORE, Dataset, Sample, pair_samples, require_split
from neco.dataset.files import SUFFIXES, Tree
from neco.errors import NecoError
from neco.values import Fraction

log = logging.getLogger(__name__)
LIKE_MASKS = re.compile(r"(?i)/(\w*(labels?|masks?|annot|annotations?)|gtFine|SegmentationClass\w*)/")


class Folder(Dataset):
    """All image files below `root` (see `neco.dataset.files.SUFFIXES`), at any depth.

    Sub-folders `train` and `val` (of `root`, and of `masks`) are the splits where `root` has both. Otherwise a seeded
    choice of `val_fraction` of the sorted images is the val split, and the others are the train split.

    Args:
        root: folder of images.
        masks: folder with a PNG of class numbers for each image, under the same relative name.
        classes: names in label order; wanted exactly when there are masks.
        ignore: the stored value that means "no class", or several, mapped to 255.
        val_fraction: share of the images in the val split; with 0 there is none, an error when asked for. None = 0.1
            with masks and 0 without, where nothing could be evaluated on it.
        seed: of that choice.

    Raises:
        NecoError: masks without classes or the reverse.
    """

    hint = ": what means none goes into dataset.ignore, a number or a list"

    def __init__(
        self,
        *,
        root: str,
        masks: str | None = None,
        classes: list[str] | None = None,
        ignore: int | list[int] = IGNORE,
        val_fraction: Fraction | None = None,
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if bool(masks) != bool(classes):
            have, lack = ("masks", "classes") if masks else ("classes", "masks")
            raise NecoError(f"dataset.{have} is set and dataset.{lack} is not: a labelled folder needs both")
        self.tree = Tree(root, self.index)
        self.masks = Tree(masks, self.index) if masks else None
        self.classes = tuple(classes or ())
        self.ignore, self.seed = ([ignore] if isinstance(ignore, int) else ignore), seed
        self.val_fraction = (0.1 if masks else 0.0) if val_fraction is None else val_fraction

    def find(self, split: str) -> list[Sample]:
        require_split(split, ("train", "val"), "a folder")
        divided = all(self.tree.is_dir(part) for part in ("train", "val"))
        part = split if divided else ""
        found = pair_samples(self.tree.images(part), self.masks.images(part) if self.masks else None)
        if not divided:
            order = np.random.Generator(np.random.Philox(self.seed)).permutation(len(found))
            first = round(self.val_fraction * len(found))
            chosen = order[:first] if split == "val" else order[first:]
            found = [found[i] for i in sorted(chosen)]
        if not found:
            kinds = " ".join(SUFFIXES)
            advice = f"Wanted: {kinds} files at any depth; val_fraction={self.val_fraction} has to leave some."
            raise self.tree.missing(f"{split} images", [part], advice)
        if not self.masks and (odd := [s for s in found if LIKE_MASKS.search(f"/{s.key}")]):
            log.warning(
                "%d of %d images lie in folders that are called like masks, the first is %s: if they are, set "
                "dataset.root to the folder of the images", len(odd), len(found), odd[0].image,
            )  # fmt: skip
        return found

    def label(self, raw: np.ndarray, sample: Sample) -> np.ndarray:
        return np.where(np.isin(raw, self.ignore), IGNORE, raw).astype(np.int64)
