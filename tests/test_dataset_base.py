import io

import numpy as np
import pytest
from PIL import Image

from neco.dataset.base import Dataset, Sample, list_images, pair_samples, read_image, read_label
from neco.errors import NecoError


class Two(Dataset):
    classes = ("a", "b")

    def samples(self, split):
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
    "16 bit": (Image.fromarray(WIDE), np.stack([GREY] * 3, 2)),
    "1 bit": (Image.fromarray(GREY > 127), np.stack([(GREY > 127) * np.uint8(255)] * 3, 2)),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_every_png_becomes_rgb(tmp_path, kind):
    image, wanted = CONVERTED[kind]
    got = read_image(save(tmp_path / "x.png", image))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, wanted)


def test_palette_and_cmyk(tmp_path):
    palette = Image.fromarray(GREY % 2)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    got = read_image(save(tmp_path / "x.png", palette))
    np.testing.assert_array_equal(got, np.array([[10, 20, 30], [40, 50, 60]], np.uint8)[GREY % 2])
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    assert abs(read_image(save(tmp_path / "x.jpg", flat)).astype(int) - [255, 0, 0]).max() < 12


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
    assert list(list_images(tmp_path)) == ["a.PNG", "b/a/y.jpeg", "b/x.jpg"]
    assert [sample.key for sample in pair_samples(tmp_path)] == ["a.PNG", "b/a/y.jpeg", "b/x.jpg"]


def test_images_and_masks_are_paired_by_name_or_refused(tmp_path):
    for name in ("i/b/1.jpg", "i/2.png", "m/b/1.png", "m/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    samples = pair_samples(tmp_path / "i", tmp_path / "m")
    assert [(s.key, s.image[len(str(tmp_path)) :], s.mask[len(str(tmp_path)) :]) for s in samples] == [
        ("2", "/i/2.png", "/m/2.png"),
        ("b/1", "/i/b/1.jpg", "/m/b/1.png"),
    ]
    (tmp_path / "i/3.jpg").touch()
    with pytest.raises(NecoError, match=r"1 of 3 files have no partner in .*m, first .*3.jpg"):
        pair_samples(tmp_path / "i", tmp_path / "m")
    (tmp_path / "i/3.jpg").rename(tmp_path / "m/3.png")
    with pytest.raises(NecoError, match=r"no partner in .*i, first .*3.png"):
        pair_samples(tmp_path / "i", tmp_path / "m")
    (tmp_path / "i/2.jpg").touch()
    with pytest.raises(NecoError, match="same name"):
        pair_samples(tmp_path / "i", tmp_path / "m")
