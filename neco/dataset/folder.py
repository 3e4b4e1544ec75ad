"""Any folder of images; with a parallel folder of masks and a list of classes it can be evaluated."""

import logging
import re
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from neco.config.types import Fraction
from neco.dataset.base import Sample, choose_named, match_names, pair_samples, require_split, without_suffix
from neco.dataset.files import SUFFIXES, Ref, Tree
from neco.dataset.own_masks import OwnMasks
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
LIKE_SPLITS = re.compile(r"(?i)(train(ing)?|val(id(ation)?)?|test(ing)?)\d*")
LIKE_MASKS = re.compile(r"(?i)/(\w*(labels?|masks?|annot|annotations?)|gtFine|SegmentationClass\w*)/")


class Folder(OwnMasks):
    """All image files below `root` (see `neco.dataset.files.SUFFIXES`), at any depth.

    Args:
        root: folder of images.
        masks: folder with a mask of class numbers for each image, under the same relative name.
        split: how images become train and val. `folders`: `train` and `val` below `root` (and `masks`). `list`: those
            that `train_list` and `val_list` name. `random`: a seeded choice of `val_fraction` is val. `block`: a
            seeded run of neighbours is val, in the order of names with numbers in them as numbers: slices of a volume
            and frames of a film look like their neighbours, so a random choice scores what was trained on. `auto`:
            `list` where there are lists, else `folders` where `root` has both, else `random`.
        train_list, val_list: text files, one name a line, as `files`; no image is in both.
        val_fraction: share of the images in the val split; with 0 there is none, an error when asked for. None = 0.1
            with masks and 0 without, where nothing could be evaluated on it.
        seed: of that choice.

    Raises:
        NecoError: masks without classes or the reverse, or lists that do not fit `split`.
    """

    def __init__(
        self,
        *,
        root: str,
        masks: str | None = None,
        classes: list[str] | None = None,
        split: Literal["auto", "folders", "list", "random", "block"] = "auto",
        train_list: str | None = None,
        val_list: str | None = None,
        val_fraction: Fraction | None = None,
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(classes=classes, **common)
        if bool(masks) != bool(classes):
            have, lack = ("masks", "classes") if masks else ("classes", "masks")
            raise NecoError(f"dataset.{have} is set and dataset.{lack} is not: a labelled folder needs both")
        lists = bool(train_list) + bool(val_list)
        if lists == 1 or (split == "list" and not lists):
            raise NecoError("dataset.train_list and dataset.val_list: two lists are needed, name both files")
        if lists and split not in ("auto", "list"):
            raise NecoError(f"dataset.split={split} takes no lists: leave out train_list and val_list, or split=list")
        self.tree = Tree(root, self.index)
        self.masks = Tree(masks, self.index) if masks else None
        self.split, self.lists = "list" if lists else split, {"train": train_list or "", "val": val_list or ""}
        self.val_fraction = (0.1 if masks else 0.0) if val_fraction is None else val_fraction
        self.seed = seed

    def find(self, split: str) -> list[Sample]:
        require_split(split, ("train", "val"), "a folder")
        rule = self.split
        if rule == "auto":
            rule = "folders" if all(self.tree.is_dir(part) for part in ("train", "val")) else "random"
        part = split if rule == "folders" else ""
        if not self.tree.is_dir():
            raise self.tree.missing(f"{split} images", [part], "Wanted: a folder of images.")
        if self.masks and not self.masks.is_dir():
            raise NecoError(f"dataset.masks={self.masks}: no such folder or archive")
        found = self._listed_samples(split) if rule == "list" else self._pair(part)
        if found and self.split == "auto" and rule == "random" and split == "train":
            folders = sorted({sample.key.partition("/")[0] for sample in found if "/" in sample.key})
            if len(like := [name for name in folders if LIKE_SPLITS.fullmatch(name)]) > 1:
                log.warning(
                    "%s: the folders %s are not taken as splits, only two called train and val are: all images are "
                    "divided by dataset.val_fraction=%g", self.tree, ", ".join(like), self.val_fraction,
                )  # fmt: skip
        if found and rule in ("random", "block"):
            count, found = len(found), self._divide(found, rule)[split]
            if not found:
                raise NecoError(f"no {split} images: val_fraction={self.val_fraction:g} of {count} images leaves none")
        if not found:
            kinds = " ".join(SUFFIXES)
            advice = f"Wanted: {kinds} files at any depth."
            raise self.tree.missing(f"{split} images", [part], advice)
        if not self.masks and (odd := [s for s in found if LIKE_MASKS.search(f"/{s.key}")]):
            log.warning(
                "%d of %d images lie in folders that are called like masks, the first is %s: if they are, set "
                "dataset.root to the folder of the images", len(odd), len(found), odd[0].image,
            )  # fmt: skip
        return found

    def _pair(self, part: str) -> list[Sample]:
        images = self.tree.images(part)
        if not self.masks:
            return pair_samples(images)
        masks = self.masks.images(part)
        try:
            return pair_samples(images, masks)
        except NecoError as error:
            if hint := self._one_too_high(images, masks):
                raise NecoError(f"{hint} ({error})") from error
            raise

    def _one_too_high(self, images: dict[str, Ref], masks: dict[str, Ref]) -> str:
        """What to say where a folder below `root` or `masks` would pair, else nothing."""
        for here, there, key, tree in ((images, masks, "root", self.tree), (masks, images, "masks", self.masks)):
            wanted = {without_suffix(name) for name in there}
            for top in sorted({name.split("/")[0] for name in here if "/" in name}):
                own = {name: ref for name, ref in here.items() if name.startswith(f"{top}/")}
                inside = {without_suffix(name.removeprefix(f"{top}/")) for name in own}
                if {*own.values()} & {*there.values()}:  # the same files
                    continue
                if len(match_names(inside, wanted)) == len(inside) == len(wanted):
                    return f"dataset.{key}={tree} is one level too high: use {tree}/{top}"
        return ""

    def _listed_samples(self, split: str) -> list[Sample]:
        """The images that the list names, with their masks. Raises NecoError for one that both lists name."""
        images = [Sample(key, image) for key, image in self.tree.images().items()]
        if not images:
            return []
        chosen = {name: choose_named(images, self.lists[name], f"{name}_list") for name in ("train", "val")}
        if both := {s.key for s in chosen["train"]} & {s.key for s in chosen["val"]}:
            raise NecoError(
                f"val_list={self.lists['val']}: {len(both)} images are in {self.lists['train']}, too, like {min(both)}"
            )
        found = chosen[split]
        if not self.masks:
            return found
        masks = {without_suffix(key): mask for key, mask in self.masks.images().items()}
        of = match_names([without_suffix(sample.key) for sample in found], masks)
        if lost := [sample for sample in found if without_suffix(sample.key) not in of]:
            raise NecoError(
                f"{len(lost)} of {len(found)} images of {self.lists[split]} have no mask in {self.masks}, the first is "
                f"{lost[0].image}"
            )
        names = ((sample, without_suffix(sample.key)) for sample in found)
        return [replace(sample, key=name, mask=masks[of[name]]) for sample, name in names]

    def _divide(self, found: list[Sample], rule: str) -> dict[str, list[Sample]]:
        """The parts of images that have no splits of their own."""
        random = np.random.Generator(np.random.Philox(self.seed))
        count = round(self.val_fraction * len(found))
        if rule == "random":
            chosen = {*random.permutation(len(found))[:count].tolist()}
        else:
            order = sorted(range(len(found)), key=lambda place: _natural(found[place].key))
            start = int(random.integers(len(found) - count + 1))
            chosen = {*order[start : start + count]}
        return {
            "train": [sample for place, sample in enumerate(found) if place not in chosen],
            "val": [sample for place, sample in enumerate(found) if place in chosen],
        }


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts slice_2 before slice_10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]
