"""What a data set is, and the only functions that read its files.

A data set lists samples (a name, where image and mask are); `read_image` and `read_label` turn them into arrays. Where
files lie is the business of `neco.dataset.files`.
"""

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from neco.dataset.files import Ref, read_bytes
from neco.errors import NecoError
from neco.values import Fraction, PositiveFloat

IGNORE = 255  # the label of a pixel that belongs to no class, in every data set
# The largest cameras make 200 megapixels. 2**28 take 2.7 GB while they are decoded; more are refused before.
PIXELS = 2**28
Image.MAX_IMAGE_PIXELS = PIXELS  # above it PIL warns, as it does by default for good photographs
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a split. `key` is unique within the split; `mask` is None where the set is unlabelled."""

    key: str
    image: Ref
    mask: Ref | None = None


class Dataset(ABC):
    """Images, with integer masks where `classes` is not empty. Constructors do no I/O.

    The constructor takes what all data sets have in common; theirs pass it on as `**common`. It is for training:
    evaluations use every image once, and one that cannot be read ends them.

    Attributes:
        classes: names in label order; empty for unlabelled images.
        image_size: all images are squares of this many pixels; None where they vary. Evaluations never go beyond.

    Args:
        weight: images that an epoch sees, as a multiple of all. 2: each twice, with other views; 0.5: one half, in the
            next epoch the other.
        max_bad: share of the images that may be unreadable; others take their place. More stop the run.
    """

    classes: tuple[str, ...] = ()
    image_size: int | None = None

    def __init__(self, *, weight: PositiveFloat = 1.0, max_bad: Fraction = 0.01) -> None:
        self.weight, self.max_bad = weight, max_bad

    def samples(self, split: str) -> list[Sample]:
        """The samples of `split` ("train", "val", for some sets "test"), sorted by key.

        Raises:
            NecoError: the images are not there; says where it looked, how to get them and which key to set.
        """
        return self.find(split)

    @abstractmethod
    def find(self, split: str) -> list[Sample]:
        """All that `samples` chooses from."""

    def label(self, raw: np.ndarray, sample: Sample) -> np.ndarray:
        """Mask as stored -> int64 (H, W) in 0..C-1, IGNORE elsewhere. By default the stored value is the label."""
        return raw.astype(np.int64)

    def shares(self, samples: Sequence[Sample]) -> list[tuple[int, int]]:
        """(images, how many of them an epoch sees) of consecutive runs of `samples`."""
        return [(len(samples), max(1, round(self.weight * len(samples))))]

    def bad_limits(self, samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
        """Beginning of a key -> (how many of its images may be unreadable, how many there are)."""
        return {"": (int(self.max_bad * len(samples) + 1e-9), len(samples))}


def read_image(ref: Ref) -> np.ndarray:
    """Image file -> uint8 (H, W, 3) RGB, turned as its EXIF orientation says; the first frame where there are more.

    Grey, palette and CMYK are converted, alpha is dropped, 16 bits become 8.

    Raises:
        NecoError: the file is missing, is no image, is truncated, too large or of unknown range; names it.
    """
    with _opened(ref) as image:
        image.load()
        turn = _turn(image)
        image.info.pop("transparency", None)  # alpha is dropped; PIL would warn
        if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips at 255
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no agreed range")
        image = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(image if turn is None else image.transpose(turn))  # read-only: one copy less


def read_label(dataset: Dataset, sample: Sample) -> np.ndarray:
    """The mask of `sample` -> int64 (H, W): the data set's classes and IGNORE, nothing else.

    Raises:
        NecoError: there is no mask, it cannot be read, or it holds a value that is no class; names file and value.
    """
    if sample.mask is None:
        raise NecoError(f"{sample.image} has no mask: {type(dataset).__name__} holds unlabelled images")
    with _opened(sample.mask) as image:
        raw = np.asarray(image)
    label = dataset.label(raw, sample)
    if label.ndim != 2:
        raise NecoError(f"{sample.mask} has shape {label.shape}: a mask has one channel of class numbers, not colours")
    bad = label[((label < 0) | (label >= len(dataset.classes))) & (label != IGNORE)]
    if bad.size:
        raise NecoError(
            f"{sample.mask} holds the value {bad[0]} ({bad.size} pixels), which is no class of "
            f"{type(dataset).__name__} (0..{len(dataset.classes) - 1}, {IGNORE} = ignore)"
        )
    return label


def stored_size(ref: Ref) -> tuple[int, int]:
    """Width and height from the header of an image or mask, as stored."""
    with _opened(ref) as image:
        return image.size


@contextlib.contextmanager
def _opened(ref: Ref) -> Iterator[Image.Image]:
    """An image of which the header was read. What goes wrong with it in the block is a NecoError that names it."""
    data = read_bytes(ref)
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {PIXELS / 1e6:.0f} million")
        yield image
    except UnidentifiedImageError:
        raise NecoError(f"cannot decode {ref} ({len(data)} bytes): no known image format") from None
    except Exception as error:  # on broken files decoders raise just anything
        raise NecoError(f"cannot decode {ref} ({len(data)} bytes): {error or type(error).__name__}") from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata of a good image: as stored
        return None


def pair_samples(images: Mapping[str, Ref], masks: Mapping[str, Ref] | None = None) -> list[Sample]:
    """Samples of image files by relative path and, where given, of the masks with the same names.

    Keys are relative paths, without suffix where there are masks. A file without its partner is a NecoError.
    """
    if masks is None:
        return [Sample(key, path) for key, path in images.items()]
    image, mask = _by_stem(images), _by_stem(masks)
    for have, want, what in ((image, mask, "images have no mask"), (mask, image, "masks have no image")):
        if lost := sorted(have.keys() - want.keys()):
            there = f"; of those that are there the first is {next(iter(want.values()))}" if want else ""
            raise NecoError(f"{len(lost)} of {len(have)} {what}, the first {have[lost[0]]}{there}")
    return [Sample(key, image[key], mask[key]) for key in sorted(image)]


def _by_stem(paths: Mapping[str, Ref]) -> dict[str, Ref]:
    found: dict[str, Ref] = {}
    for key, path in paths.items():
        stem = str(PurePosixPath(key).with_suffix(""))
        if stem in found:
            raise NecoError(f"{found[stem]} and {path} have the same name: which one a mask belongs to is not clear")
        found[stem] = path
    return found


def require_split(split: str, splits: Sequence[str], name: str) -> None:
    """Raises NecoError when a data set has no such split."""
    if split not in splits:
        raise NecoError(f"{name} has no split {split!r}: choose one of {', '.join(splits)}")
