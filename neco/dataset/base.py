"""What a data set is, and the only functions that read its files.

A data set lists samples (a name, where image and mask are); `read_image` and `read_label` turn them into arrays. Where
files lie is the business of `neco.dataset.files`.
"""

import contextlib
import logging
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Le

from neco.config.types import Fraction, NonNegative, Share, share
from neco.dataset import decode
from neco.dataset.decode import ValueRange
from neco.dataset.files import SUFFIXES, Ref, Tree, read_text
from neco.dataset.masks import Numbering, StoredMask, read_mask
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)

IGNORE = 255  # the label of a pixel that belongs to no class, in every data set
# Of a mask beside an image that its EXIF orientation turns: drawn on what is displayed, or on what is stored
MaskFrame = Literal["auto", "displayed", "stored"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a split. `key` is unique within the split; `mask` is None where the set is unlabelled.

    `range`: stored values that become black and white, see `neco.dataset.decode.read_pixels`.
    """

    key: str
    image: Ref
    mask: Ref | None = None
    range: ValueRange | None = None


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
        colours: whether colours in masks have a meaning of their own.
        mask_frame: where masks of images lie that their EXIF orientation turns; `auto`: as the sizes say.
        unclear_frame: what `auto` is where sizes do not tell: masks of published sets are older than programs that turn
            images. None: an error.

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
        range: stored values that become black and white in all images, [low, high], or `auto` for the lowest and the
            highest of each image. None: 8 bits as they are, of 16 bits the upper half, others are refused.

    Raises:
        NecoError: both `fraction` and `files` are to choose.
    """

    classes: tuple[str, ...] = ()
    counts: Mapping[str, int] = {}
    marks: Mapping[str, tuple[str, ...]] = {}
    image_size: int | None = None
    colours = False
    mask_frame: MaskFrame = "auto"
    unclear_frame: Literal["stored"] | None = "stored"

    def __init__(
        self,
        *,
        fraction: Share = 1.0,
        subset_seed: NonNegative = 0,
        files: str | None = None,
        weight: Annotated[float, Gt(0), Le(1000)] = 1.0,
        max_bad: Fraction = 0.01,
        index: str | None = None,
        range: ValueRange | None = None,
    ) -> None:
        self.fraction, self.subset_seed, self.files = share(fraction), subset_seed, files
        self.weight, self.max_bad, self.index = weight, max_bad, index
        self.range = range
        self.numbering = Numbering()
        self.warnings: list[str] = []  # what was seen of the images that makes numbers doubtful
        self._listed: dict[str, list[Sample]] = {}
        if range is not None and range != "auto" and not range[0] < range[1]:
            raise NecoError(f"range={[*range]}: the first value becomes black and the second white: it must be larger")
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
            if self.range is not None:
                found = [sample if sample.range else replace(sample, range=self.range) for sample in found]
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
            try:
                return choose_named(found, self.files, "files")
            except NecoError as error:
                raise NecoError(f"{error} (dataset.files chooses among the images of train)") from error
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

    def advice(self, raw: np.ndarray) -> str:
        """What to do about a mask as stored that holds a value which is no class."""
        return ""

    def shares(self, samples: Sequence[Sample]) -> list[tuple[int, int]]:
        """(images, how many of them an epoch sees) of consecutive runs of `samples`."""
        return [(len(samples), max(1, round(self.weight * len(samples))))]

    def bad_limits(self, samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
        """Beginning of a key -> (how many of its images may be unreadable, how many there are)."""
        return {"": (int(self.max_bad * len(samples) + 1e-9), len(samples))}


def read_image(source: Ref | Sample) -> np.ndarray:
    """An image file, or the image of a sample -> uint8 (H, W, 3) RGB: see `neco.dataset.decode.read_pixels`."""
    if isinstance(source, Sample):
        return decode.read_pixels(source.image, source.range)
    return decode.read_pixels(source)


def read_label(dataset: Dataset, sample: Sample) -> np.ndarray:
    """The mask of `sample` -> int64 (H, W) in the frame of its image: the data set's classes and IGNORE, nothing else.

    Raises:
        NecoError: there is no mask, it cannot be read, or it holds a value that is no class; names file and value.
    """
    if sample.mask is None:
        raise NecoError(f"{sample.image} has no mask: {type(dataset).__name__} holds unlabelled images")
    mask = read_mask(sample.mask, dataset.colours)

    def wrong_in(label: np.ndarray) -> np.ndarray:
        return ((label < 0) | (label >= len(dataset.classes))) & (label != IGNORE)

    raw = dataset.numbering(mask, sample.mask, lambda numbers: not wrong_in(dataset.label(numbers, sample)).any())
    label = dataset.label(raw, sample)
    if label.ndim != 2:
        raise NecoError(f"{sample.mask} has shape {label.shape}: a mask has one channel of class numbers, not colours")
    if (wrong := wrong_in(label)).any():
        raise NecoError(
            f"{sample.mask} holds the value {raw[wrong][0]} ({wrong.sum()} pixels), which is no class of "
            f"{type(dataset).__name__} ({len(dataset.classes)} classes, from 0){dataset.advice(raw)}"
        )
    return decode.turned(label, _turn_of(dataset, sample, mask))


def mask_size(dataset: Dataset, sample: Sample) -> tuple[int, int]:
    """Width and height of the mask that `read_label` would give, from headers alone."""
    if sample.mask is None:
        raise NecoError(f"{sample.image} has no mask: {type(dataset).__name__} holds unlabelled images")
    size, own = decode.frame(sample.mask)
    turn = _turn_of(dataset, sample, StoredMask(np.empty(size[::-1], bool), None, "", 8, own))
    return size[::-1] if turn >= 5 else size


def _turn_of(dataset: Dataset, sample: Sample, mask: StoredMask) -> int:
    """The EXIF orientation by which a mask has to be turned to lie on its image; 1 = it does.

    A mask that has an orientation of its own is turned as it says. Raises NecoError where it cannot be told.
    """
    if (mask.orientation or 1) in decode.TURNS:
        return mask.orientation or 1
    try:
        size, orientation = decode.frame(sample.image)
    except NecoError:
        return 1  # whoever reads the image says what is wrong with it
    if (turn := orientation or 1) not in decode.TURNS:
        return 1
    displayed = size[::-1] if turn >= 5 else size
    rule = dataset.mask_frame
    if rule == "auto" and (mask.size == size) != (mask.size == displayed):
        rule = "stored" if mask.size == size else "displayed"
    elif rule == "auto" and mask.size == size:
        rule = "displayed" if mask.orientation == 1 else dataset.unclear_frame or rule
    elif rule == "auto":
        rule = "displayed"  # of another size: whoever compares them says so
    if rule == "auto":
        raise NecoError(
            f"{sample.image} is turned by its EXIF orientation ({turn}), and its mask {sample.mask} has a size that "
            "fits both ways: set dataset.mask_frame=displayed where masks were drawn on the turned image, else stored"
        )
    return turn if rule == "stored" else 1


def same_frame(sample: Sample, image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Raises NecoError when image and mask differ in (width, height)."""
    if image != mask:
        hint = "one of the two lies on its side" if image == mask[::-1] else (
            "a mask has a number for each pixel of its image: resize one of the two, masks without smoothing"
        )  # fmt: skip
        raise NecoError(f"{sample.image} is {image} pixels large, its mask {sample.mask} is {mask}; {hint}")


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


def pair_samples(images: Mapping[str, Ref], masks: Mapping[str, Ref] | None = None) -> list[Sample]:
    """Samples of image files by relative path and, where given, of the masks with the same names.

    Keys are relative paths, without suffix where there are masks. A file without its partner is a NecoError.
    """
    if masks is None:
        return [Sample(key, path) for key, path in images.items()]
    image, mask = _by_stem(images), _by_stem(masks)
    of = match_names(image, mask)
    lost_images, lost_masks = sorted(image.keys() - of.keys()), sorted(mask.keys() - {*of.values()})
    for lost, have, want, what in (
        (lost_images, image, mask, "images have no mask"), (lost_masks, mask, image, "masks have no image"),
    ):  # fmt: skip
        if lost:
            there = f"; of those that are there the first is {next(iter(want.values()))}" if want else ""
            raise NecoError(f"{len(lost)} of {len(have)} {what}, the first {have[lost[0]]}{there}")
    if own := next((key for key in sorted(image) if image[key] == mask[of[key]]), None):
        raise NecoError(f"{image[own]} would be its own mask: images and masks are in folders of their own")
    return [Sample(key, image[key], mask[of[key]]) for key in sorted(image)]


def match_names(names: Iterable[str], there: Collection[str]) -> dict[str, str]:
    """Which of the names `there` each name means, if any: itself, else the only one left that looks the same.

    Names look the same in another Unicode normal form: macOS writes accents as letters of their own.
    """
    names = list(names)
    found = {name: name for name in names if name in there}
    if len(found) < len(names):
        lost = _by_normal_form(name for name in names if name not in found)
        left = _by_normal_form(name for name in there if name not in found)
        pairs = ((lost[form], left.get(form, [])) for form in lost)
        found |= {one[0]: other[0] for one, other in pairs if len(one) == len(other) == 1}
    return found


def _by_normal_form(names: Iterable[str]) -> dict[str, list[str]]:
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return forms


def _by_stem(paths: Mapping[str, Ref]) -> dict[str, Ref]:
    found: dict[str, Ref] = {}
    for key, path in paths.items():
        stem = without_suffix(key)
        if stem in found:
            raise NecoError(f"{found[stem]} and {path} have the same name: which one a mask belongs to is not clear")
        found[stem] = path
    return found


def read_names(lines: Sequence[str], place: object, there: Collection[str] = ()) -> dict[str, int]:
    """The names of a list file, one a line -> their lines. Raises NecoError for one that comes twice, or none.

    `there`: names in Unicode normal form C that begin with `#`; other lines that do are comments.
    """
    names: dict[str, int] = {}
    for line, name in enumerate(lines, 1):
        name = name.strip()
        comment = name.startswith("#") and not {_form(without_suffix(reading)) for reading in readings(name)} & {*there}
        if name and not comment and names.setdefault(name, line) != line:
            raise NecoError(f"{place}: {name} is named twice, in lines {names[name]} and {line}")
    if not names:
        raise NecoError(f"{place} names nothing")
    return names


def readings(line: str) -> list[str]:
    """What a line of a list may name, the likeliest first: names may hold spaces, or be followed by something else."""
    whole = line.strip()
    words = [whole, *whole.split()[:1]]
    return list(dict.fromkeys([*words, *(word.replace("\\", "/") for word in words)]))  # of Windows


def without_suffix(path: str) -> str:
    """A path without the suffix of an image, if it has one: names may have dots."""
    stem, _, suffix = path.rpartition(".")
    return stem if f".{suffix.lower()}" in SUFFIXES else path


def choose_named(samples: Sequence[Sample], file: str, key: str) -> list[Sample]:
    """Those that the lines of a text file name, in the order of `samples`; `key`: of the configuration, that names it.

    Raises NecoError for a line that names none or several.
    """
    path = Path(file).expanduser()
    stems = (_form(without_suffix(sample.key)) for sample in samples)
    marked = {name for stem in stems for name in (stem, stem.rpartition("/")[2]) if name.startswith("#")}
    names = read_names(read_text(str(path)), path, marked)
    at: dict[str, set[tuple[int, str]]] = {}
    for name in names:
        for reading in readings(name):
            at[_form(without_suffix(reading).rpartition("/")[2])] = set()
    for place, sample in enumerate(samples):
        for whole in (sample.key, str(sample.image)):
            whole = f"/{without_suffix(whole)}"
            if (last := _form(whole.rpartition("/")[2])) in at:
                at[last].add((place, whole))
    chosen: dict[int, str] = {}
    for name, line in names.items():
        found: set[int] = set()
        for reading in readings(name):
            found = _meant(reading.removeprefix("./"), at, samples)
            if found:
                break
        if len(found) != 1:
            keys = sorted(samples[place].key for place in found)
            what = f"{', '.join(keys[:3])}: say which" if keys else f"none of {len(samples)} like {samples[0].key}"
            if not keys and name != (told := name.encode(errors="surrogateescape").decode(errors="replace")):
                name, what = told, f"{what}, and is not UTF-8: save the list in UTF-8"
            raise NecoError(f"{key}={file}, line {line}: {name} is {what}")
        if (place := found.pop()) in chosen:
            raise NecoError(f"{key}={file}, line {line}: {name} is {samples[place].key}, which {chosen[place]} is, too")
        chosen[place] = name
    return [samples[place] for place in sorted(chosen)]


def _meant(name: str, at: Mapping[str, set[tuple[int, str]]], samples: Sequence[Sample]) -> set[int]:
    """Places of the samples that a name may mean; `at`: by the last part of their paths, in one normal form."""
    stem = without_suffix(name)
    near = at.get(_form(stem.rpartition("/")[2]), set())
    found = {place for place, whole in near if whole.endswith(f"/{stem}")}
    found = found or {place for place, whole in near if _form(whole).endswith(f"/{_form(stem)}")}
    exact = {place for place in found if name in (samples[place].key, without_suffix(samples[place].key))}
    return exact if len(exact) == 1 else found


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


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
        if hint := one_off(tree, layouts):
            raise NecoError(hint)
        raise tree.missing(what, list(looked), advice)
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
                return f"dataset.root={tree} is one level too {how}: use {place}."
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
