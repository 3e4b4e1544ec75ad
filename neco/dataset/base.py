"""What a data set is, and the only functions that read its files.

A data set lists samples (a name, where image and mask are); `read_image` and `read_label` turn them into arrays. Where
files lie is the business of `neco.dataset.files`.
"""

import contextlib
import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Le
from PIL import ExifTags, Image, UnidentifiedImageError

from neco.dataset.files import SUFFIXES, Ref, Tree, read_bytes
from neco.errors import NecoError
from neco.values import Fraction, NonNegative, Share, share

log = logging.getLogger(__name__)

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

    The constructor takes what all data sets have in common; theirs pass it on as `**common`. `weight` and `max_bad` are
    for training: evaluations use every image once, and one that cannot be read ends them. `fraction` and `files` choose
    from "train" alone, whatever it is for: training, a memory bank, a linear head.

    Attributes:
        classes: names in label order; empty for unlabelled images.
        counts: published numbers of images by split; what differs is warned about.
        marks: beginnings of keys that only this split has. In another split they are an error.
        image_size: all images are squares of this many pixels; None where they vary. Evaluations never go beyond.

    Args:
        fraction: share of the train split to use, like 0.1 or "1/8": floor(share x images), at least one, a seeded
            choice from the sorted keys. With one seed a smaller choice is part of a larger one.
        subset_seed: of that choice.
        files: text file with the train images to use, one name a line, with or without folders and suffix; empty lines
            and lines that begin with # do not count.
        weight: images that an epoch sees, as a multiple of all. 2: each twice, with other views; 0.5: one half, in the
            next epoch the other.
        max_bad: share of the images that may be unreadable; others take their place. More stop the run.
        index: folder for what takes long to find out about archives and folders; None = nowhere.

    Raises:
        NecoError: both `fraction` and `files` are to choose.
    """

    classes: tuple[str, ...] = ()
    counts: Mapping[str, int] = {}
    marks: Mapping[str, tuple[str, ...]] = {}
    image_size: int | None = None
    hint = ""  # what to do about a value in a mask that is no class

    def __init__(
        self,
        *,
        fraction: Share = 1.0,
        subset_seed: NonNegative = 0,
        files: str | None = None,
        weight: Annotated[float, Gt(0), Le(1000)] = 1.0,
        max_bad: Fraction = 0.01,
        index: str | None = None,
    ) -> None:
        self.fraction, self.subset_seed, self.files = share(fraction), subset_seed, files
        self.weight, self.max_bad, self.index = weight, max_bad, index
        self._listed: dict[str, list[Sample]] = {}
        if files and self.fraction < 1:
            raise NecoError(f"fraction={fraction} and files={files} both choose from train: leave one of them out")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listed": {}}  # workers get the samples they need; a million of them is 300 MB

    @property
    def background(self) -> int | None:
        """The class of what is no object, the one called "background"; None where there is none."""
        return self.classes.index("background") if "background" in self.classes else None

    @property
    def chooses(self) -> bool:
        """Whether the train split is a choice from what there is."""
        return self.fraction < 1 or self.files is not None

    def samples(self, split: str) -> list[Sample]:
        """The samples of `split` ("train", "val", for some sets "test"), sorted by key; listed once, do not change it.

        Raises:
            NecoError: the images are not there; says where it looked, how to get them and which key to set. Or they are
                those of another split, or `files` names what is not there.
        """
        if split not in self._listed:
            found = sorted(self.find(split), key=lambda sample: sample.key)
            self._compare(split, found)
            self._listed[split] = self._choose(found) if split == "train" else found
        return self._listed[split]

    def listed(self, split: str) -> list[Sample] | None:
        """What `samples` gave; None where nobody asked yet."""
        return self._listed.get(split)

    def _compare(self, split: str, found: Sequence[Sample]) -> None:
        """Warn of a count that is not the published one. Raises NecoError for images of another split."""
        name, wanted = type(self).__name__, self.counts.get(split, len(found))
        for other in (self.counts.keys() | self.marks.keys()) - {split}:
            why = ""
            if len(found) != wanted and len(found) == self.counts.get(other):
                why = f"{len(found)} images, which is the number of {other}"
            elif wrong := next((s for s in found if s.key.startswith(self.marks.get(other, ()))), None):
                why = f"{wrong.image}, an image of {other}"
            if why:
                raise NecoError(f"{name}: {split} holds {why} (published: {wanted} in {split}); are the two swapped?")
        if len(found) != wanted:
            log.warning("%s: %s holds %d images, published are %d", name, split, len(found), wanted)

    def _choose(self, found: list[Sample]) -> list[Sample]:
        if not self.chooses or not found:
            return found
        if self.files:
            return _named(found, Path(self.files).expanduser())
        order = np.random.Generator(np.random.Philox(self.subset_seed)).permutation(len(found))
        count = max(1, int(self.fraction * len(found) + 1e-9))  # 1e-9: 0.29 * 100 is 28.999...
        return [found[i] for i in sorted(order[:count])]

    @abstractmethod
    def find(self, split: str) -> list[Sample]:
        """All that `samples` chooses from."""

    def label(self, raw: np.ndarray, sample: Sample) -> np.ndarray:
        """Mask as stored -> int64 (H, W) in 0..C-1, IGNORE elsewhere. By default the stored value is the label.

        What is no class, like a value outside of `table`, may come as -1: `read_label` refuses it.
        """
        return raw.astype(np.int64)

    def label_files(self) -> list[Ref]:
        """Files beside the masks that the labels of what was listed depend on."""
        return []

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
    raw = read_stored(sample.mask)
    label = dataset.label(raw, sample)
    if label.ndim != 2:
        raise NecoError(f"{sample.mask} has shape {label.shape}: a mask has one channel of class numbers, not colours")
    wrong = ((label < 0) | (label >= len(dataset.classes))) & (label != IGNORE)
    if wrong.any():
        raise NecoError(
            f"{sample.mask} holds the value {raw[wrong][0]} ({wrong.sum()} pixels), which is no class of "
            f"{type(dataset).__name__} ({len(dataset.classes)} classes, from 0){dataset.hint}"
        )
    return label


def same_frame(sample: Sample, image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Raises NecoError when image and mask differ in (width, height)."""
    if image != mask:
        hint = "; only the image was turned, by its EXIF orientation" if image == mask[::-1] else ""
        raise NecoError(f"{sample.image} is {image} pixels large, its mask {sample.mask} is {mask}{hint}")


def read_stored(ref: Ref) -> np.ndarray:
    """A mask file as it is: (H, W) values, palette indices among them, or (H, W, 3) colours."""
    with _opened(ref) as image:
        return np.asarray(image)


def table(labels: Mapping[int, int]) -> np.ndarray:
    """Stored value -> label, as 256 entries: -1 for values that are not mentioned."""
    entries = np.full(256, -1, np.int64)
    entries[list(labels)] = list(labels.values())
    return entries


def look_up(entries: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Each stored value through a `table`; -1 for one that is beyond it."""
    if raw.dtype == np.uint8:
        return entries[raw]
    raw = raw.astype(np.int64)
    return np.where((raw >= 0) & (raw < len(entries)), entries[raw.clip(0, len(entries) - 1)], -1)


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
        stem = without_suffix(key)
        if stem in found:
            raise NecoError(f"{found[stem]} and {path} have the same name: which one a mask belongs to is not clear")
        found[stem] = path
    return found


def read_names(text: str, place: object) -> dict[str, int]:
    """The names of a list file, one a line -> their lines. Raises NecoError for one that comes twice, or none."""
    names: dict[str, int] = {}
    for line, name in enumerate(text.splitlines(), 1):
        name = name.strip()
        if name and not name.startswith("#") and names.setdefault(name, line) != line:
            raise NecoError(f"{place}: {name} is named twice, in lines {names[name]} and {line}")
    if not names:
        raise NecoError(f"{place} names nothing")
    return names


def without_suffix(path: str) -> str:
    """A path without the suffix of an image, if it has one: names may have dots."""
    stem, _, suffix = path.rpartition(".")
    return stem if f".{suffix.lower()}" in SUFFIXES else path


def _named(samples: Sequence[Sample], file: Path) -> list[Sample]:
    """Those that the lines of `file` name, in the order of `samples`."""
    names = read_names(read_bytes(str(file)).decode("utf-8-sig", "surrogateescape"), file)  # file names are any bytes
    at: dict[str, set[tuple[int, str]]] = {without_suffix(name).rpartition("/")[2]: set() for name in names}
    for place, sample in enumerate(samples):
        for path in (sample.key, str(sample.image)):
            whole = f"/{without_suffix(path)}"
            if (last := whole.rpartition("/")[2]) in at:
                at[last].add((place, whole))
    chosen: dict[int, str] = {}
    for name, line in names.items():
        name = name.removeprefix("./")
        stem = without_suffix(name)
        found = {place for place, whole in at[stem.rpartition("/")[2]] if whole.endswith(f"/{stem}")}
        exact = {place for place in found if name in (samples[place].key, without_suffix(samples[place].key))}
        found = exact if len(exact) == 1 else found
        if len(found) != 1:
            keys = sorted(samples[place].key for place in found)
            what = f"{', '.join(keys[:3])}: say which" if keys else f"none of {len(samples)} like {samples[0].key}"
            raise NecoError(f"files={file}, line {line}: {name} is {what}")
        if (place := found.pop()) in chosen:
            raise NecoError(f"files={file}, line {line}: {name} is {samples[place].key}, which {chosen[place]} is, too")
        chosen[place] = name
    return [samples[place] for place in sorted(chosen)]


# Folders below a root that make up one arrangement of a data set.
Layout = tuple[str, ...]


def choose_layout(tree: Tree, layouts: Sequence[Layout], what: str, advice: str) -> Layout:
    """The first layout whose folders are all there; the log says so where it is not the only one.

    Raises:
        NecoError: there is none; says so where the root is one level too high or too deep.
    """
    complete = [layout for layout in layouts if all(tree.is_dir(path) for path in layout)]
    if not complete:
        looked = dict.fromkeys(path for layout in layouts for path in layout)
        raise tree.missing(what, list(looked), advice + one_off(tree, layouts))
    if len(complete) > 1:
        taken, *others = (" + ".join(path or "." for path in layout) for layout in complete)
        log.warning("%s: %s is there twice: %s is taken, %s is not", tree, what, taken, "; ".join(others))
    return complete[0]


def one_off(tree: Tree, layouts: Sequence[Layout]) -> str:
    """What to say where a layout lies in the folder above the root, or in one below it; else nothing."""
    root = Path(str(tree)).absolute()
    with contextlib.suppress(OSError):  # a folder that may not be read
        below = sorted(root.iterdir()) if root.is_dir() else []
        for place, how in ((root.parent, "deep"), *((folder, "high") for folder in below)):
            if any(all((place / path).is_dir() for path in layout) for layout in layouts):
                return f"\ndataset.root={tree} is one level too {how}: use {place}."
    return ""


def find_pairs(tree: Tree, layouts: Sequence[Layout], what: str, advice: str) -> list[Sample]:
    """The images and masks of the first layout (images, masks) that is there.

    Raises:
        NecoError: no layout, no images in it, or one without its partner.
    """
    images, masks = choose_layout(tree, layouts, what, advice)
    if found := pair_samples(tree.images(images), tree.images(masks)):
        return found
    raise tree.missing(f"{what}: the folders are empty", [images, masks], advice)


def require_split(split: str, splits: Sequence[str], name: str) -> None:
    """Raises NecoError when a data set has no such split."""
    if split not in splits:
        raise NecoError(f"{name} has no split {split!r}: choose one of {', '.join(splits)}")
