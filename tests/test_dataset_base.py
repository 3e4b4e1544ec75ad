import io
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from neco.augment.views import Views, view_rng
from neco.dataset.base import Dataset, Sample, pair_samples, read_image, read_label
from neco.dataset.decode import read_pixels, stored_size
from neco.dataset.files import SUFFIXES, Tree
from neco.utils.errors import NecoError


class Two(Dataset):
    classes = ("a", "b")

    def find(self, split):
        return []


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return str(path)


RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
WIDE = (GREY.astype(np.uint16) << 8) + 255
CONVERTED = {
    "rgb": (Image.fromarray(RGB), RGB),
    "grey": (Image.fromarray(GREY), np.stack([GREY] * 3, 2)),
    "alpha": (Image.fromarray(np.dstack([RGB, np.zeros_like(GREY)])), RGB),
    "grey with alpha": (Image.fromarray(np.dstack([GREY, GREY]), "LA"), np.stack([GREY] * 3, 2)),
    "grey, transparent": (Image.fromarray(GREY), np.stack([GREY] * 3, 2), {"transparency": 7}),
    "16 bit": (Image.fromarray(WIDE), np.stack([GREY] * 3, 2)),
    "1 bit": (Image.fromarray(GREY > 127), np.stack([(GREY > 127) * np.uint8(255)] * 3, 2)),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_every_png_becomes_rgb(tmp_path, kind):
    image, wanted, *options = CONVERTED[kind]
    got = read_image(save(tmp_path / "x.png", image, **(options or [{}])[0]))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, wanted)


def test_palette_and_cmyk(tmp_path):
    palette = Image.fromarray(GREY % 2)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for options in ({}, {"transparency": 0}, {"transparency": b"\x00\x80"}):
        with warnings.catch_warnings(action="error"):
            got = read_image(save(tmp_path / "x.png", palette, **options))
        np.testing.assert_array_equal(got, np.array([[10, 20, 30], [40, 50, 60]], np.uint8)[GREY % 2])
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    path = save(tmp_path / "x.jpg", flat)
    assert b"Adobe" in Path(path).read_bytes(), "stored inverted, and says so"
    assert abs(read_image(path).astype(int) - [255, 0, 0]).max() < 12


LOSSLESS = {
    ".png": {}, ".webp": {"lossless": True}, ".bmp": {}, ".tif": {}, ".TIFF": {"compression": "tiff_lzw"}, ".ppm": {},
    ".jp2": {},
}  # fmt: skip


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_every_format_is_listed_and_read(tmp_path, suffix):
    save(tmp_path / f"x{suffix}", Image.fromarray(RGB), **LOSSLESS[suffix])
    ((key, path),) = Tree(tmp_path).images().items()
    assert key == f"x{suffix}"
    np.testing.assert_array_equal(read_image(path), RGB)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".avif"])
def test_lossy_formats_are_listed_and_read_under_all_their_names(tmp_path, suffix):
    if suffix == ".avif" and suffix not in SUFFIXES:
        pytest.skip("this version of PIL reads no AVIF")
    save(tmp_path / f"x{suffix}", Image.new("RGB", (16, 16), (200, 50, 50)))
    ((key, path),) = Tree(tmp_path).images().items()
    assert key == f"x{suffix}" and abs(read_image(path).astype(int) - [200, 50, 50]).max() < 12


def test_16_bit_colour_and_grey(tmp_path):
    wide = (RGB.astype(np.uint16) << 8) + 255
    assert cv2.imwrite(str(tmp_path / "x.png"), wide[..., ::-1])
    np.testing.assert_array_equal(read_image(str(tmp_path / "x.png")), RGB)
    np.testing.assert_array_equal(read_image(save(tmp_path / "x.tif", Image.fromarray(WIDE)))[..., 1], GREY)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (9, 5), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if suffix == ".webp" else {}
    path = save(tmp_path / f"x{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(read_image(path), np.asarray(frames[0]))


def test_the_content_says_the_format_not_the_name(tmp_path):
    path = save(tmp_path / "x.png", Image.fromarray(RGB))
    np.testing.assert_array_equal(read_image(str(Path(path).rename(tmp_path / "x.jpg"))), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_images_are_turned_as_their_exif_says(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = save(tmp_path / f"x{suffix}", Image.fromarray(RGB), exif=exif)
    with Image.open(path) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert wanted.shape == ((5, 7, 3) if orientation < 5 else (7, 5, 3))
    np.testing.assert_array_equal(read_image(path), wanted)


def test_broken_exif_does_not_spoil_an_image(tmp_path):
    plain = read_image(save(tmp_path / "x.jpg", Image.fromarray(RGB)))
    for exif in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x09zzzz",
    ):
        with warnings.catch_warnings(action="ignore"):
            got = read_image(save(tmp_path / "x.jpg", Image.fromarray(RGB), exif=exif))
        np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize("shape", [(1, 300, 3), (300, 1, 3), (1, 1, 3)])
def test_thin_images_give_views(tmp_path, shape):
    image = read_image(save(tmp_path / "x.png", Image.fromarray(np.full(shape, 7, np.uint8))))
    assert image.shape == shape
    views = Views(global_size=16, local_size=8, jitter_strength=0, grey_probability=0, blur_probability=0)
    with warnings.catch_warnings(action="ignore"):
        params = views.sample(view_rng(0, 0, 0), *image.shape[:2])
    for applied in views.apply(image, params):
        assert applied.shape[1] == 3 and (applied == 7).all()


def png_of(width, height):
    """A PNG that says it is so large, with pixels for next to nothing of it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header_and_the_largest_photographs_are_not(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png_of(16320, 12240))  # 200 megapixels, from a phone
    with warnings.catch_warnings(action="error"):
        assert stored_size(str(path)) == (16320, 12240)
    path.write_bytes(png_of(16385, 16384))
    tracemalloc.start()
    with (
        pytest.raises(NecoError, match=r"x.png .* 16385 x 16384 pixels are more than 268 million"),
        warnings.catch_warnings(action="ignore"),
    ):
        read_image(str(path))
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_pixels_without_a_range_are_refused(tmp_path):
    path = save(tmp_path / "x.tif", Image.fromarray(GREY.astype(np.float32)))
    with pytest.raises(NecoError, match=r"x.tif.*floating-point.*dataset.range"):
        read_image(path)
    path = save(tmp_path / "y.tif", Image.fromarray(GREY.astype(np.int32) * 300))
    with pytest.raises(NecoError, match=r"y.tif.*32-bit.*dataset.range"):
        read_image(path)
    cv2.imwrite(str(tmp_path / "z.tif"), GREY.astype(np.int16) * 10 - 1000)
    with pytest.raises(NecoError, match=r"z.tif.*: signed 16-bit.*dataset.range"):
        read_image(str(tmp_path / "z.tif"))


STORED = np.array([[-1000, 0, 1000], [2000, 3000, 4095]])
SCALED = np.array([[0, 0, 0], [85, 170, 255]], np.uint8)  # of 1000 to 4000


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.int32, np.float32, "colours", "pgm", "8 bits"])
def test_a_range_makes_black_and_white_of_stored_values(tmp_path, kind):
    values, path = STORED.clip(0 if kind not in (np.int16, np.int32, np.float32) else None), tmp_path / "x.tif"
    low, high, wanted = 1000, 4000, SCALED
    if kind == "colours":
        path = path.with_suffix(".png")
        cv2.imwrite(str(path), np.dstack([values.astype(np.uint16)] * 3))
    elif kind == "pgm":
        path = path.with_suffix(".pgm")
        path.write_bytes(b"P5 3 2 4095\n" + values.astype(">u2").tobytes())
    elif kind == "8 bits":
        low, high, wanted = 0, 51, np.array([[0, 0, 5], [10, 255, 255]], np.uint8)
        save(path, Image.fromarray(np.array([[0, 0, 1], [2, 51, 90]], np.uint8)))
    else:
        cv2.imwrite(str(path), values.astype(kind))
    for found in (read_pixels(str(path), (low, high)), read_image(Sample("x", str(path), range=(low, high)))):
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.stack([wanted] * 3, 2))
    auto = read_pixels(str(path), "auto")[..., 0]
    assert auto.min() == 0 and auto.max() == 255
    assert read_pixels(save(tmp_path / "flat.png", Image.fromarray(WIDE * 0 + 7)), "auto").max() == 0


def test_what_is_no_number_is_black(tmp_path):
    path = save(tmp_path / "x.tif", Image.fromarray(np.float32([[np.nan, -np.inf, 0, 1, np.inf]])))
    for between in ((0, 1), "auto"):
        np.testing.assert_array_equal(read_pixels(path, between)[0, :, 0], [0, 0, 0, 255, 255])


def test_12_bits_packed_are_12_bits(tmp_path):
    rows = np.array([[0x12, 0x3F, 0xF0]], np.uint8)  # 0x123, 0xff0
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 12)
    (tmp_path / "x.tif").write_bytes(head + rows.tobytes() + b"\0" + struct.pack("<H", len(tags)) + entries + bytes(4))
    np.testing.assert_array_equal(read_image(str(tmp_path / "x.tif"))[0, :, 0], [0x12, 0xFF])


def test_a_range_that_is_none_is_refused():
    with pytest.raises(NecoError, match=r"range=\[5, 5\]"):
        Two(range=(5, 5))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]), st.data())
def test_damaged_files_are_images_or_one_error(tmp_path, kind, data):
    whole = io.BytesIO()
    Image.fromarray(np.tile(RGB, (4, 4, 1))).save(whole, kind)
    content = bytearray(whole.getvalue())
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=9)
    ):
        content[place] = value
    (tmp_path / "x.jpg").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        image = read_image(str(tmp_path / "x.jpg"))
    except NecoError as error:
        assert "x.jpg" in str(error) and "0x" not in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(NecoError, match=r"absent.png"):
        read_image(str(tmp_path / "absent.png"))
    whole = io.BytesIO()
    Image.fromarray(np.tile(RGB, (40, 40, 1))).save(whole, "JPEG")
    for content in (b"no image", b"", whole.getvalue()[:2000]):
        (tmp_path / "bad.jpg").write_bytes(content)
        with pytest.raises(NecoError, match=r"bad.jpg"):
            read_image(str(tmp_path / "bad.jpg"))


def test_masks_are_indices_whatever_their_colours(tmp_path):
    wanted = np.array([[0, 1], [255, 1]])
    for mode in ("L", "P"):
        image = Image.fromarray(wanted.astype(np.uint8), "L")
        if mode == "P":
            image.putpalette(list(range(100, 200)) * 7 + [0] * 68)
        label = read_label(Two(), Sample("x", "x.jpg", save(tmp_path / f"{mode}.png", image)))
        assert label.dtype == np.int64
        np.testing.assert_array_equal(label, wanted)


def test_wrong_masks_are_named_with_their_value(tmp_path):
    two = save(tmp_path / "two.png", Image.fromarray(np.array([[0, 2], [2, 1]], np.uint8)))
    with pytest.raises(NecoError, match=r"two.png holds the value 2 \(2 pixels\)"):
        read_label(Two(), Sample("x", "x.jpg", two))
    with pytest.raises(NecoError, match=r"colour.png has shape"):
        read_label(Two(), Sample("x", "x.jpg", save(tmp_path / "colour.png", Image.fromarray(RGB))))
    with pytest.raises(NecoError, match="unlabelled"):
        read_label(Two(), Sample("x", "x.jpg"))


def test_listing_is_nested_sorted_and_skips_what_is_hidden(tmp_path):
    for name in ("b/x.jpg", "a.PNG", "b/a/y.jpeg", ".hidden/z.jpg", "b/._x.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(Tree(tmp_path).images()) == ["a.PNG", "b/a/y.jpeg", "b/x.jpg"]
    assert [sample.key for sample in pair_samples(Tree(tmp_path).images())] == ["a.PNG", "b/a/y.jpeg", "b/x.jpg"]


def test_images_and_masks_are_paired_by_name_or_refused(tmp_path):
    for name in ("i/b/1.jpg", "i/2.png", "m/b/1.png", "m/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    samples = pair_samples(*(Tree(tmp_path / part).images() for part in ("i", "m")))
    assert [(s.key, s.image[len(str(tmp_path)) :], s.mask[len(str(tmp_path)) :]) for s in samples] == [
        ("2", "/i/2.png", "/m/2.png"),
        ("b/1", "/i/b/1.jpg", "/m/b/1.png"),
    ]
    for name in ("i/mu\u0308de.jpg", "m/m\u00fcde.png"):  # macOS writes accents as letters of their own
        (tmp_path / name).touch()
    samples = pair_samples(*(Tree(tmp_path / part).images() for part in ("i", "m")))
    assert (samples[2].key, Path(samples[2].mask).name) == ("mu\u0308de", "m\u00fcde.png")
    (tmp_path / "i/m\u00fcde.jpg").touch()
    with pytest.raises(NecoError, match=r"1 of 4 images have no mask, the first .*mu\u0308de.jpg"):
        pair_samples(*(Tree(tmp_path / part).images() for part in ("i", "m")))
    (tmp_path / "m/mu\u0308de.png").touch()
    samples = pair_samples(*(Tree(tmp_path / part).images() for part in ("i", "m")))
    assert all(Path(sample.image).stem == Path(sample.mask).stem for sample in samples), "each has its own"
    for name in ("i/mu\u0308de.jpg", "m/m\u00fcde.png", "i/m\u00fcde.jpg", "m/mu\u0308de.png"):
        (tmp_path / name).unlink()
    (tmp_path / "i/3.jpg").touch()
    with pytest.raises(NecoError, match=r"1 of 3 images have no mask, the first .*3.jpg; .*m/2.png"):
        pair_samples(*(Tree(tmp_path / part).images() for part in ("i", "m")))
    (tmp_path / "i/3.jpg").rename(tmp_path / "m/3.png")
    with pytest.raises(NecoError, match=r"1 of 3 masks have no image, the first .*3.png"):
        pair_samples(*(Tree(tmp_path / part).images() for part in ("i", "m")))
    (tmp_path / "i/2.jpg").touch()
    with pytest.raises(NecoError, match="same name"):
        pair_samples(*(Tree(tmp_path / part).images() for part in ("i", "m")))
