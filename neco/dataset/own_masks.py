"""Data sets whose classes and masks are the user's own: what the stored numbers of a mask mean."""

from typing import Any, Literal

import numpy as np

from neco.dataset.base import IGNORE, Dataset, MaskFrame, Sample
from neco.dataset.masks import Numbering, PaletteRule, advice_on_values
from neco.utils.errors import NecoError


class OwnMasks(Dataset):
    """Masks of numbers: which class each stands for.

    Args:
        classes: names in label order.
        ignore: the stored value that means "no class", or several, mapped to 255.
        values: the stored value of each class, in label order; None = 0, 1, 2, ... A value named here is that class,
            whatever `ignore` says.
        reduce_zero_label: 0 means "no class", and 1 is the first class, as in MMSegmentation.
        palette: what a palette mask says: see `neco.dataset.masks.Numbering`.
        mask_frame: where the masks of images lie that their EXIF orientation turns: on what is `displayed` or `stored`;
            `auto`: as the sizes say, and an error where they fit both ways.

    Raises:
        NecoError: two classes of one name, or values that do not fit the classes.
    """

    unclear_frame: Literal["stored"] | None = None

    def __init__(
        self,
        *,
        classes: list[str] | None = None,
        ignore: int | list[int] = IGNORE,
        values: list[int] | None = None,
        reduce_zero_label: bool = False,
        palette: PaletteRule = "auto",
        mask_frame: MaskFrame = "auto",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.classes = tuple(classes or ())
        self.ignore = [ignore] if isinstance(ignore, int) else ignore
        self.values, self.reduce_zero_label, self.mask_frame = values, reduce_zero_label, mask_frame
        self.numbering = Numbering(palette)
        if twice := sorted({name for name in self.classes if self.classes.count(name) > 1}):
            raise NecoError(f"classes: {twice[0]!r} is named twice; each class has a name of its own")
        if values is not None and reduce_zero_label:
            raise NecoError("values and reduce_zero_label both say which value is which class: leave one of them out")
        if values is not None and (len(values) != len(self.classes) or len({*values}) < len(values)):
            raise NecoError(f"values={values}: one value for each of {len(self.classes)} classes, each another one")

    def label(self, raw: np.ndarray, sample: Sample) -> np.ndarray:
        raw = raw.astype(np.int64)
        ignored = np.isin(raw, self.ignore)
        if self.values is not None:
            label = np.full(raw.shape, -1)
            for number, value in enumerate(self.values):
                label[raw == value] = number
            ignored &= label < 0
        elif self.reduce_zero_label:
            label, ignored = raw - 1, ignored | (raw == 0)
        else:
            label = raw
        return np.where(ignored, IGNORE, np.where(label < len(self.classes), label, -1))

    def advice(self, raw: np.ndarray) -> str:
        return advice_on_values(raw, len(self.classes))
