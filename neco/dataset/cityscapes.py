"""Cityscapes street scenes with fine masks: 19 classes, 2,975 train, 500 val and 1,525 (unlabelled) test images."""

import logging
from typing import Any

import numpy as np

from neco.dataset.base import IGNORE, Dataset, Sample, choose_layout, look_up, pair_samples, require_split, table
from neco.dataset.files import Ref, Tree

log = logging.getLogger(__name__)
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # the labelIds of the classes
TABLES = {
    "labelIds": table(dict.fromkeys((*range(34), 255), IGNORE) | {value: label for label, value in enumerate(IDS)}),
    "labelTrainIds": table({**{label: label for label in range(19)}, 255: IGNORE}),
}
ADVICE = (
    "Get it: register at https://www.cityscapes-dataset.com and download leftImg8bit_trainvaltest.zip (11 GB) and "
    "gtFine_trainvaltest.zip. To train on images without masks: dataset=folder."
)


class Cityscapes(Dataset):
    """`root[/cityscapes]/{leftImg8bit,gtFine}/<split>/<city>/*_{leftImg8bit,gtFine_labelIds,gtFine_labelTrainIds}.png`.

    Where there are both kinds of masks, labelIds are read. The masks of the test split are not published: what is in
    its place is not looked at. Keys are `<city>/<city>_<sequence>_<frame>`.

    Args:
        root: folder that holds `leftImg8bit` and `gtFine`, or `cityscapes`.
    """

    classes = (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    )  # fmt: skip
    counts = {"train": 2975, "val": 500, "test": 1525}
    marks = {
        "train": (
            "aachen/", "bochum/", "bremen/", "cologne/", "darmstadt/", "dusseldorf/", "erfurt/", "hamburg/", "hanover/",
            "jena/", "krefeld/", "monchengladbach/", "strasbourg/", "stuttgart/", "tubingen/", "ulm/", "weimar/",
            "zurich/",
        ),
        "val": ("frankfurt/", "lindau/", "munster/"),
        "test": ("berlin/", "bielefeld/", "bonn/", "leverkusen/", "mainz/", "munich/"),
    }  # fmt: skip

    def __init__(self, *, root: str, **common: Any) -> None:
        super().__init__(**common)
        self.tree = Tree(root, self.index)

    def find(self, split: str) -> list[Sample]:
        require_split(split, tuple(self.counts), "Cityscapes")
        kinds = ("leftImg8bit",) if split == "test" else ("leftImg8bit", "gtFine")
        layouts = [tuple(f"{base}{kind}/{split}" for kind in kinds) for base in ("", "cityscapes/")]
        what = f"Cityscapes {split} images{'' if split == 'test' else ' with masks'}"
        layout = choose_layout(self.tree, layouts, what, ADVICE)
        images = self._files(layout[0], "leftImg8bit")
        if not images:
            raise self.tree.missing(f"{what}: no *_leftImg8bit.png", layout[:1], ADVICE)
        if split == "test":
            return [Sample(key, image) for key, image in images.items()]
        masks = {kind: found for kind in TABLES if (found := self._files(layout[1], f"gtFine_{kind}"))}
        if not masks:
            raise self.tree.missing(f"{what}: no *_gtFine_labelIds.png", layout[1:], ADVICE)
        kind = next(iter(masks))
        log.info(
            "Cityscapes %s: masks of %s%s", split, kind, " (labelTrainIds are there, too)" if len(masks) > 1 else ""
        )
        return pair_samples(images, masks[kind])

    def label(self, raw: np.ndarray, sample: Sample) -> np.ndarray:
        kind = "labelTrainIds" if str(sample.mask).endswith("_labelTrainIds.png") else "labelIds"
        return look_up(TABLES[kind], raw)

    def _files(self, folder: str, kind: str) -> dict[str, Ref]:
        """The PNG files of a kind below a folder, by `<city>/<city>_<sequence>_<frame>`."""
        ending = f"_{kind}.png"
        return {key.removesuffix(ending): ref for key, ref in self.tree.images(folder).items() if key.endswith(ending)}
