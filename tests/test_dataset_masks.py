"""Mask files as people have them: read rightly, or named in one line."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from neco.dataset.base import Dataset, Sample, mask_size, read_image, read_label
from neco.dataset.folder import Folder
from neco.dataset.inspect import read_pair
from neco.dataset.masks import read_mask
from neco.dataset.voc import VOC
from neco.utils.errors import NecoError

CLASSES = ["a", "b", "c"]
LABELS = np.array([[0, 1, 2, 2], [2, 1, 0, 0], [1, 1, 1, 0]], np.uint8)


def own(classes=CLASSES, **keys) -> Dataset:
    return Folder(root="images", masks="masks", classes=list(classes), **keys)


def read(path, dataset=None):
    return read_label(dataset or own(), Sample("x", "no such image.jpg", str(path)))


def save(path, array, mode=None, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image = image.convert(mode) if mode else image
    image.save(path, **options)
    return path


def with_palette(indices, colours):
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def packed_png(path, bits, array):
    """A grey PNG of 1, 2 or 4 bits a pixel, as MATLAB and packers write it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b""
    for row in array:
        text = "".join(format(int(value), f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


READ = {
    "png": lambda p: save(p / "m.png", LABELS),
    "png of 2 bits": lambda p: packed_png(p / "m.png", 2, LABELS),
    "png of 4 bits": lambda p: packed_png(p / "m.png", 4, LABELS),
    "png of 16 bits": lambda p: save(p / "m.png", LABELS.astype(np.uint16)),
    "tiff of 32 bits": lambda p: save(p / "m.tif", LABELS.astype(np.int32)),
    "tiff of floats": lambda p: save(p / "m.tif", LABELS.astype(np.float32)),
    "three equal channels": lambda p: save(p / "m.png", np.dstack([LABELS] * 3)),
    "opaque": lambda p: save(p / "m.png", np.dstack([*[LABELS] * 3, np.full_like(LABELS, 255)])),
    "three channels of 16 bits": lambda p: (
        cv2.imwrite(str(p / "m.png"), np.dstack([LABELS.astype(np.uint16)] * 3)),
        p / "m.png",
    )[1],
    "grey gif": lambda p: save(p / "m.gif", LABELS),
    "bmp": lambda p: save(p / "m.bmp", LABELS),
    "lossless webp": lambda p: save(p / "m.webp", np.dstack([LABELS] * 3), lossless=True),
    "a small maximum": lambda p: ((p / "m.pgm").write_bytes(b"P5 4 3 20\n" + LABELS.tobytes()), p / "m.pgm")[1],
    "coloured palette": lambda p: save(p / "m.png", with_palette(LABELS, [(0, 0, 0), (128, 0, 0), (0, 128, 0)])),
    "grey palette of no classes": lambda p: save(
        p / "m.png", with_palette(LABELS, [(9, 9, 9), (99, 99, 99), (7,) * 3])
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_stored_numbers_are_the_classes(tmp_path, kind):
    np.testing.assert_array_equal(read(READ[kind](tmp_path)), LABELS)


def test_grey_gif_masks_hold_grey_values_not_places_in_their_palette(tmp_path):
    two = np.where(LABELS == 1, 0, LABELS).astype(np.uint8)
    path = save(tmp_path / "m.gif", two)
    with Image.open(path) as image:
        assert image.mode == "P" and np.asarray(image).max() == 1, "places 0 and 1"
    np.testing.assert_array_equal(read(path), two)


def test_one_bit_is_the_first_and_the_second_class(tmp_path):
    for name, options in (("m.png", {}), ("m.tif", {}), ("n.tif", {"compression": "group4"}), ("m.pbm", {})):
        np.testing.assert_array_equal(read(save(tmp_path / name, LABELS > 0, **options)), LABELS > 0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("m.jpg", {}, "JPEG"),
        ("m.webp", {}, "lossy WebP"),
        ("m.jp2", {}, "JPEG2000"),
        ("m.avif", {}, "AVIF"),
        ("m.tif", {"compression": "jpeg"}, "TIFF with JPEG compression"),
    ],
)
def test_lossy_formats_are_refused_whatever_their_values(tmp_path, name, options, said):
    if name == "m.avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("this version of PIL reads no AVIF")
    save(tmp_path / name, Image.fromarray(np.zeros((32, 32), np.uint8)), None if name == "m.tif" else "RGB", **options)
    (tmp_path / name).rename(tmp_path / "m.png")  # the content says what it is
    with pytest.raises(
        NecoError, match=rf"m.png is a {said} file.*Save masks as PNG, made from the originals"
    ) as error:
        read(tmp_path / "m.png")
    assert "ignore" not in str(error.value) and "\n" not in str(error.value)


REFUSED = {
    "fractions": (lambda p: save(p / "m.tif", LABELS / np.float32(2)), r"m.tif holds 0.5 \(5 pixels\)"),
    "no numbers": (lambda p: save(p / "m.tif", np.float32([[0, np.nan]])), r"holds nan \(1 pixels\)"),
    "shape in alpha": (
        lambda p: save(p / "m.png", np.dstack([LABELS * 0, LABELS * 0, LABELS * 0, LABELS * 100])),
        "transparent in some pixels",
    ),
    "grey and alpha": (
        lambda p: save(p / "m.png", Image.fromarray(np.dstack([LABELS, LABELS]))),
        "transparent in some",
    ),
    "colours": (lambda p: save(p / "m.png", np.dstack([LABELS, LABELS * 0, LABELS])), "not colours"),
    "pages": (
        lambda p: save(p / "m.tif", LABELS, save_all=True, append_images=[Image.fromarray(LABELS)]),
        "holds 2 pictures of one size",
    ),
    "coloured gif": (
        lambda p: save(p / "m.gif", with_palette(LABELS, [(0, 0, 0), (0, 255, 0), (255, 0, 0)])),
        "GIF file with colours",
    ),
    "smooth": (
        lambda p: save(p / "m.png", np.arange(64, dtype=np.uint8).reshape(8, 8)),
        "64 different values.*resized",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_told_is_refused_in_one_line(tmp_path, kind):
    make, said = REFUSED[kind]
    with pytest.raises(NecoError, match=said) as error:
        read(make(tmp_path))
    assert "\n" not in str(error.value) and "cannot decode" not in str(error.value)
    assert "dataset.ignore" not in str(error.value), "would hide what was misread"


def test_palettes_that_differ_from_mask_to_mask_are_refused(tmp_path):
    red, green, black = (255, 0, 0), (0, 255, 0), (0, 0, 0)
    first = save(tmp_path / "1.png", with_palette(LABELS, [black, red, green]))
    shorter = save(tmp_path / "2.png", with_palette(LABELS.clip(0, 1), [black, red]))
    other = save(tmp_path / "3.png", with_palette(LABELS.clip(0, 1), [black, green]))
    dataset = own()
    for path in (first, shorter):
        read(path, dataset)
    with pytest.raises(NecoError, match=r"1 is the colour \(255, 0, 0\) in .*1.png and \(0, 255, 0\) in .*3.png"):
        read(other, dataset)
    np.testing.assert_array_equal(read(other, own(palette="index")), LABELS.clip(0, 1))


def test_a_grey_palette_that_is_classes_both_ways_has_to_be_said(tmp_path):
    path = save(tmp_path / "m.png", with_palette(LABELS, [(0,) * 3, (2,) * 3, (1,) * 3]))
    with pytest.raises(NecoError, match=r"both its places and its grey values .*: 0 \(0\), 1 \(2\), 2 \(1\).*palette="):
        read(path)
    np.testing.assert_array_equal(read(path, own(palette="index")), LABELS)
    np.testing.assert_array_equal(read(path, own(palette="grey")), np.array([0, 2, 1])[LABELS])
    np.testing.assert_array_equal(read(path, VOC(root="voc")), LABELS)


def test_white_of_one_bit_beside_masks_of_eight_cannot_be_told(tmp_path):
    eight = save(tmp_path / "8.png", LABELS)
    black, white = (save(tmp_path / f"{n}.png", np.full((3, 4), n) > 0) for n in (0, 1))
    dataset = own()
    read(eight, dataset), read(black, dataset)
    with pytest.raises(NecoError, match=r"1.png has fewer than 8 bits a pixel, .*8.png has 8"):
        read(white, dataset)


def test_zero_is_void_and_one_the_first_class(tmp_path):
    stored = np.array([[0, 1, 3, 255]], np.uint8)
    path = save(tmp_path / "m.png", stored)
    wanted = stored.copy()  # as MMSegmentation writes it down
    wanted[wanted == 0] = 255
    wanted = wanted - 1
    wanted[wanted == 254] = 255
    for dataset in (own(reduce_zero_label=True), own(values=[1, 2, 3], ignore=[0, 255])):
        np.testing.assert_array_equal(read(path, dataset), wanted)
    with pytest.raises(NecoError, match=r"the value 3 .*The values of this mask are 0,1,3,255.*reduce_zero_label=true"):
        read(path)
    with pytest.raises(NecoError, match="the value 256 "):  # 255 once it is reduced: no way to become "ignored"
        read(save(tmp_path / "n.png", np.uint16([[1, 256]])), own(reduce_zero_label=True))


def test_values_of_classes_are_named_in_order(tmp_path):
    path = save(tmp_path / "m.png", np.array([[0, 255, 128]], np.uint8))
    found = read(path, own(["background", "object"], values=[0, 255], ignore=[255, 128]))
    np.testing.assert_array_equal(found, [[0, 1, 255]])
    with pytest.raises(NecoError, match=r"the value 128 .*dataset.values=\[0,128,255\]"):
        read(path, own())
    with pytest.raises(NecoError, match=r"values=.*one value for each of 3 classes"):
        own(values=[0, 255])
    with pytest.raises(NecoError, match="leave one of them out"):
        own(values=[0, 1, 2], reduce_zero_label=True)


def test_255_is_no_class_where_another_value_is_ignored(tmp_path):
    path = save(tmp_path / "m.png", np.array([[0, 255, 9]], np.uint8))
    with pytest.raises(NecoError, match="the value 255 "):
        read(path, own(ignore=9))


def test_two_classes_of_one_name_are_refused():
    for make in (own, lambda classes: VOC(root="voc", classes=classes)):
        with pytest.raises(NecoError, match="'a' is named twice"):
            make(["a", "a", "b"])


WIDE = np.arange(35, dtype=np.uint8).reshape(5, 7) % 3


def pair(tmp_path, orientation, mask, suffix=".jpg", mask_orientation=None, size=(7, 5)):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    save(tmp_path / f"i{suffix}", pixels, exif=exif)
    own_exif = Image.Exif()
    if mask_orientation:
        own_exif[ExifTags.Base.Orientation] = mask_orientation
    save(tmp_path / "m.png", mask, exif=own_exif)
    return Sample("x", str(tmp_path / f"i{suffix}"), str(tmp_path / "m.png"))


def turn(mask, orientation):
    image = Image.fromarray(mask)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_turned_with_their_images(tmp_path, orientation, suffix):
    wanted = turn(WIDE, orientation)
    stored, published = own(mask_frame="stored"), VOC(root="voc", classes=CLASSES)
    sample = pair(tmp_path, orientation, WIDE, suffix)
    for dataset in [stored, published, *[own()] * (orientation >= 5 or orientation == 1)]:  # else both would fit
        image, label = read_pair(dataset, sample)
        np.testing.assert_array_equal(label, wanted)
        assert mask_size(dataset, sample) == label.shape[::-1] == image.shape[1::-1]
    sample = pair(tmp_path, orientation, wanted, suffix)  # drawn on what is displayed
    for dataset in [own(mask_frame="displayed"), *[own(), published] * (orientation >= 5 or orientation == 1)]:
        np.testing.assert_array_equal(read_pair(dataset, sample)[1], wanted)


@pytest.mark.parametrize(("orientation", "size"), [(3, (7, 5)), (6, (5, 5))])
def test_a_mask_that_fits_both_ways_is_refused_unless_it_says_how_it_lies(tmp_path, orientation, size):
    mask = WIDE[: size[1], : size[0]]
    sample = pair(tmp_path, orientation, mask, size=size)
    with pytest.raises(NecoError, match=rf"i.jpg is turned by its EXIF orientation \({orientation}\).*mask_frame="):
        read_pair(own(), sample)
    sample = pair(tmp_path, orientation, mask, size=size, mask_orientation=orientation)
    np.testing.assert_array_equal(read_pair(own(), sample)[1], turn(mask, orientation))
    sample = pair(tmp_path, orientation, mask, size=size, mask_orientation=1)
    np.testing.assert_array_equal(read_pair(own(), sample)[1], mask)


def test_an_orientation_at_the_end_of_a_png_turns_the_mask_too(tmp_path):
    sample = pair(tmp_path, 6, WIDE, ".png")
    content = (tmp_path / "i.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    (tmp_path / "i.png").write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    assert read_image(sample).shape == (7, 5, 3)
    np.testing.assert_array_equal(read_pair(own(), sample)[1], turn(WIDE, 6))


def test_published_colours_are_left_as_they_are(tmp_path):
    path = save(tmp_path / "m.png", np.dstack([LABELS] * 3))
    assert read_mask(str(path), colours=True).values.shape == (3, 4, 3)
    assert read_mask(str(path)).values.shape == (3, 4)
