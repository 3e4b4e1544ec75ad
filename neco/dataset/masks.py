"""What the pixels of a mask file say: the one place where stored numbers are read, and doubtful files are refused.

Shapes: H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from neco.dataset import decode
from neco.dataset.decode import opened
from neco.dataset.files import Ref
from neco.utils.errors import NecoError

# What a palette mask says: the place in the palette, or the grey value there. auto: see `Numbering`
PaletteRule = Literal["auto", "index", "grey"]
SHOWN = 6  # values that a message lists


@dataclass(frozen=True)
class StoredMask:
    """A mask as its file has it.

    Attributes:
        values: integers (H, W), places in a palette among them, or colours (H, W, 3).
        palette: colours of these places, uint8 (256, 3); None without one.
        format: of the file, as PIL calls it.
        bits: of a pixel, where they are fewer than 8; else 8.
        orientation: EXIF orientation of the mask itself; None: it says nothing.
    """

    values: np.ndarray
    palette: np.ndarray | None
    format: str
    bits: int
    orientation: int | None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as stored."""
        return self.values.shape[1], self.values.shape[0]


def read_mask(ref: Ref, colours: bool = False) -> StoredMask:
    """A mask file. `colours`: masks of this set are colours with a meaning, so equal channels do not become one.

    Raises:
        NecoError: the file cannot be read, is saved with loss, or holds anything else than one picture of whole
            numbers; names the file and what it holds.
    """
    with opened(ref) as (image, data):
        if kind := decode.lossy_format(image, data):
            raise NecoError(
                f"{ref} is a {kind} file, and that format changes numbers: some pixels have another class than was "
                "drawn. Save masks as PNG, made from the originals: a converted copy of this file keeps the wrong ones"
            )
        if pages := _pages(image):
            raise NecoError(f"{ref} holds {pages} pictures of one size: a mask is one, of class numbers")
        rawmode, before = decode.raw_mode(image), decode.exif_orientation(image) if image.format == "TIFF" else None
        image.load()
        palette = _palette(image) if image.mode in ("P", "PA") else None
        bits = {"L;2": 2, "L;4": 4}.get(str(rawmode[0]), 1 if image.mode == "1" else 8)
        values = _values(image, data, rawmode, ref, colours)
        if before:  # PIL turns a TIFF by itself
            values = decode.turned(values, {6: 8, 8: 6}.get(before, before))
        return StoredMask(values, palette, image.format or "", bits, before or decode.exif_orientation(image))


def kind_of(ref: Ref) -> tuple[str, bytes]:
    """What numbers mean in a mask, from its header: how pixels are packed, and the palette."""
    with decode.opened_header(ref) as image:
        return str(decode.raw_mode(image)[0]), bytes(image.getpalette("RGB") or []) if image.mode == "P" else b""


def _values(image: Image.Image, data: bytes, rawmode: tuple, ref: Ref, colours: bool) -> np.ndarray:
    deep = decode.is_deep_colour(image, rawmode)
    if not deep and (image.mode in decode.GREY or image.mode.startswith("I;16")):
        return _whole(decode.stored_grey(image, rawmode), ref)
    if image.mode == "P":
        return np.asarray(image)
    if image.mode == "PA":
        _opaque(np.asarray(image.getchannel("A")), ref)
        return np.asarray(image.getchannel("P"))
    channels = decode.deep_colours(data) if deep else np.asarray(image)
    if colours:
        return channels
    if image.mode in ("LA", "RGBA", "La", "RGBa"):
        _opaque(channels[..., -1], ref)
        channels = channels[..., :-1]
    elif image.mode not in ("RGB", "RGBX"):
        raise NecoError(f"{ref} is a {image.mode} picture: a mask has one channel of class numbers, not colours")
    same = (channels == channels[..., :1]).all()
    return channels[..., 0] if same else channels[..., :3]


def _whole(values: np.ndarray, ref: Ref) -> np.ndarray:
    """Whole numbers as integers. Raises NecoError for others."""
    if values.dtype.kind != "f":
        return values
    whole = np.isfinite(values) & (values == np.round(values))
    if not whole.all():
        wrong, counts = np.unique(values[~whole], return_counts=True)
        raise NecoError(
            f"{ref} holds {', '.join(f'{value:g}' for value in wrong[:SHOWN])}{' ...' if len(wrong) > SHOWN else ''} "
            f"({counts.sum()} pixels): class numbers are whole. Save the mask as PNG of 0, 1, 2, ..."
        )
    return values.astype(np.int64)


def _opaque(alpha: np.ndarray, ref: Ref) -> None:
    if alpha.min() != alpha.max():
        raise NecoError(
            f"{ref} is transparent in some pixels: whether its classes are in the colours or in the transparency is "
            "not clear. Save it as PNG of one channel, without alpha"
        )


def _palette(image: Image.Image) -> np.ndarray:
    given = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)[:256]
    return np.concatenate([given, np.zeros((256 - len(given), 3), np.uint8)])


def _pages(image: Image.Image) -> int:
    """Frames of an animation or pages of a TIFF, 0 where there is one; smaller ones are previews."""
    count, size, same = getattr(image, "n_frames", 1), image.size, 1
    for number in range(1, count):
        image.seek(number)
        same += image.size == size
    if count > 1:
        image.seek(0)
    return same if same > 1 else 0


class Numbering:
    """What palettes and few bits say in the masks of one set; remembers what it saw, to find files that contradict.

    `auto`: where all colours that a mask uses are grey, the number is the grey value in a GIF file, whose writers
    number palettes as they like. In other files it is that of grey value and place which gives classes; both, where
    they differ, are an error. Colours: the place in the palette, which has to have one colour in all masks; not in GIF.

    Copies in other processes remember what was seen before they started, and what they see themselves.
    """

    def __init__(self, rule: PaletteRule = "auto") -> None:
        self.rule = rule
        self.colours: dict[int, tuple[tuple[int, ...], str]] = {}  # place in the palette -> colour, and in which file
        self.few: str | None = None  # a mask of fewer than 8 bits whose highest number occurs
        self.eight: str | None = None  # a grey one of 8

    def __call__(self, mask: StoredMask, ref: Ref, legal: Callable[[np.ndarray], bool]) -> np.ndarray:
        """The numbers of a mask; `legal` says whether numbers are all classes, or to ignore.

        Raises NecoError where they cannot be told.
        """
        if mask.palette is None:
            if mask.values.ndim == 2:
                self._compare_bits(mask, ref)
            return mask.values
        used = np.unique(mask.values)
        colours = mask.palette[used]
        all_grey = bool((colours == colours[:, :1]).all())
        as_grey = mask.palette[:, 0][mask.values]
        if self.rule == "grey":
            if not all_grey:
                raise NecoError(f"{ref}: its palette has colours, dataset.palette=grey takes grey ones alone")
            return as_grey
        if self.rule == "index" or (all_grey and (colours[:, 0] == used).all()):
            return mask.values
        if all_grey:
            return as_grey if mask.format == "GIF" else self._grey_or_index(mask.values, as_grey, ref, legal)
        if mask.format == "GIF":
            raise NecoError(
                f"{ref} is a GIF file with colours, whose numbers were chosen by the program that wrote it: save masks "
                "as PNG of class numbers, or set dataset.palette=index if the places in its palette are the classes"
            )
        self._compare_colours(used, colours, ref)
        return mask.values

    def _grey_or_index(
        self, places: np.ndarray, greys: np.ndarray, ref: Ref, legal: Callable[[np.ndarray], bool]
    ) -> np.ndarray:
        fitting = [numbers for numbers in (places, greys) if legal(numbers)]
        if len(fitting) == 1:
            return fitting[0]
        listed = ", ".join(f"{place} ({grey})" for place, grey in _pairs(places, greys)[:SHOWN])
        raise NecoError(
            f"{ref} has a grey palette, and {'both' if fitting else 'neither'} its places and its grey values (in "
            f"brackets) are classes: {listed}. Set dataset.palette=index or grey"
        )

    def _compare_colours(self, used: np.ndarray, colours: np.ndarray, ref: Ref) -> None:
        for place, colour in zip(used.tolist(), map(tuple, colours.tolist()), strict=True):
            other, file = self.colours.setdefault(place, (colour, str(ref)))
            if other != colour:
                raise NecoError(
                    f"the palettes of masks differ: {place} is the colour {other} in {file} and {colour} in {ref}. "
                    "Save masks as PNG of class numbers, or set dataset.palette=index if the numbers are right"
                )

    def _compare_bits(self, mask: StoredMask, ref: Ref) -> None:
        """White of few bits is white of 8 bits that was packed, or the number 1 (3, 15)."""
        if mask.bits < 8 and (mask.values == 2**mask.bits - 1).any():
            self.few = self.few or str(ref)
        elif mask.bits == 8:
            self.eight = self.eight or str(ref)
        if self.few and self.eight:
            raise NecoError(
                f"{self.few} has fewer than 8 bits a pixel, {self.eight} has 8: whether the highest number of the "
                "first means 255 cannot be told. Save all masks as PNG of 8 bits"
            )


def _pairs(places: np.ndarray, greys: np.ndarray) -> list[tuple[int, int]]:
    used, first = np.unique(places, return_index=True)
    return list(zip(used.tolist(), greys.ravel()[first].tolist(), strict=True))


def advice_on_values(values: np.ndarray, classes: int) -> str:
    """What may be wrong with a mask of these numbers, of which some are no class, and what to do."""
    there = np.unique(values).tolist()
    if len(there) > classes + 8:
        return (
            f". It holds {len(there)} different values: so look masks that were resized smoothly or saved with loss. "
            "Make them again from the originals"
        )
    listed = ",".join(map(str, there))
    advice = f". The values of this mask are {listed}"
    if there[0] >= 0 and classes in there and all(value <= classes or value == 255 for value in there):
        return advice + ". If 0 means no class and 1 is the first: dataset.reduce_zero_label=true"
    return advice + (
        f". Name the value of each class, in order: dataset.values=[{listed if len(there) == classes else '0,...'}]; "
        "a value that marks pixels without a class goes into dataset.ignore"
    )
