"""Image and mask files as arrays: the one place that knows what decoders do to stored values.

Shapes: H W pixels.
"""

import contextlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from neco.dataset.files import Ref, read_bytes
from neco.utils.errors import NecoError

# Stored values that become black and white; `auto`: the lowest and the highest of each image
ValueRange = tuple[float, float] | Literal["auto"]
# The largest cameras make 200 megapixels. 2**28 take 2.7 GB while they are decoded; more are refused before.
PIXELS = 2**28
Image.MAX_IMAGE_PIXELS = PIXELS  # above it PIL warns, as it does by default for good photographs
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip
GREY = ("1", "L", "I", "F")  # modes of one channel, and any that begins with "I;16"
LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF")
TEXT = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks of a PNG that may hold an orientation


@contextlib.contextmanager
def opened(ref: Ref) -> Iterator[tuple[Image.Image, bytes]]:
    """An image of which the header was read, and its bytes. What goes wrong with it is a NecoError that names it."""
    data = read_bytes(ref)
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {PIXELS / 1e6:.0f} million")
        yield image, data
    except NecoError:
        raise
    except UnidentifiedImageError:
        why = "no known image format"
        if data[:4] in (b"II*\0", b"MM\0*"):
            why = "a TIFF of a kind that is not supported, like 64-bit numbers or more than 4 bands"
        raise NecoError(f"cannot decode {ref} ({len(data)} bytes): {why}") from None
    except Exception as error:  # on broken files decoders raise just anything
        raise NecoError(f"cannot decode {ref} ({len(data)} bytes): {error or type(error).__name__}") from error


def read_pixels(ref: Ref, value_range: ValueRange | None = None) -> np.ndarray:
    """Image file -> uint8 (H, W, 3) RGB, turned as its EXIF orientation says; the first frame where there are more.

    Grey, palette and CMYK are converted, alpha is dropped. Without a range 16 bits become 8 by their upper half. With
    one, stored values become 0..255 linearly, those beyond it are cut, and NaN is black.

    Raises:
        NecoError: the file is missing, is no image, is truncated, too large or of unknown range; names it.
    """
    with opened(ref) as (image, data):
        rawmode = raw_mode(image)
        image.load()
        turn = TURNS.get(exif_orientation(image) or 1)
        image.info.pop("transparency", None)  # alpha is dropped; PIL would warn
        if value_range is not None:
            pixels = _eight_bits(_stored_samples(image, data, rawmode), value_range)
            image = Image.fromarray(pixels)
        elif image.mode == "F" or (image.mode == "I" and not _is_16_bit(image, rawmode)):
            signed = "signed 16-bit" if str(rawmode[0]).startswith("I;16") else "32-bit"
            what = "floating-point" if image.mode == "F" else signed
            raise ValueError(
                f"{what} pixels have no agreed range: say with dataset.range=[LOW,HIGH] or auto which stored values "
                "become black and white"
            )
        elif image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips at 255
            bits = 12 if rawmode[0] == "I;12" else 16
            image = Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
        image = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(image if turn is None else image.transpose(turn))  # read-only: one copy less


def describe_values(ref: Ref) -> tuple[int, str]:
    """Bits of a stored number, and text that says which numbers an image stores, like "16 bits: 0 to 2317"."""
    with opened(ref) as (image, data):
        rawmode = raw_mode(image)
        image.load()
        values = _stored_samples(image, data, rawmode)
        bits = 8 * values.dtype.itemsize
        return bits, f"{bits} bits: {np.nanmin(values):g} to {np.nanmax(values):g}"


def stored_size(ref: Ref) -> tuple[int, int]:
    """Width and height from the header of an image or mask, as stored."""
    return frame(ref)[0]


@contextlib.contextmanager
def opened_header(ref: Ref) -> Iterator[Image.Image]:
    """An image of which the header alone was read, as far as that can be: of a file on disk."""
    with contextlib.ExitStack() as stack:
        image: Image.Image | None = None
        if isinstance(ref, str):
            with contextlib.suppress(Exception):  # `opened` says what is wrong
                image = Image.open(stack.enter_context(Path(ref).open("rb")))
        if image is None or image.width * image.height > PIXELS:
            image, _ = stack.enter_context(opened(ref))
        yield image


def frame(ref: Ref) -> tuple[tuple[int, int], int | None]:
    """Width and height as stored, and the EXIF orientation (None: it says nothing), without decoding pixels."""
    with opened_header(ref) as image:
        tags = getattr(image, "tag_v2", None)  # PIL turns a TIFF by itself, and its header says the size after it
        if tags:
            return (int(tags[256]), int(tags[257])), exif_orientation(image)
        if image.format == "PNG" and "exif" not in image.info and not _has_text(getattr(image, "fp", None)):
            return image.size, None  # PIL would decode all pixels to look behind them
        return image.size, exif_orientation(image)


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """An array (H, W) turned as an EXIF orientation says, like `read_pixels` turns the image."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return array[::rows, ::columns]


def lossy_format(image: Image.Image, data: bytes) -> str | None:
    """The name of the format where it changes values, else None."""
    kind = image.format or ""
    if kind == "WEBP" and _webp_is_lossy(data):
        return "lossy WebP"
    if kind == "TIFF" and image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):
        return "TIFF with JPEG compression"
    return kind if kind in LOSSY else None


def stored_grey(image: Image.Image, rawmode: tuple[Any, ...]) -> np.ndarray:
    """The stored numbers (H, W) of an image of one channel: PIL stretches those of 2 and 4 bits, and of PGM files."""
    values = np.asarray(image)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if rawmode[0] in ("L;2", "L;4"):
        return values // {"L;2": 85, "L;4": 17}[rawmode[0]]
    if image.format == "PPM" and len(rawmode) > 1:  # PIL makes 255 or 65535 of the largest
        white, largest = (65535 if image.mode == "I" else 255), int(rawmode[1])
        return np.round(values.astype(np.float64) * largest / white).astype(np.uint16)
    return values


def deep_colours(data: bytes) -> np.ndarray:
    """An image of 16 bits a channel as (H, W, 3 or 4) RGB or RGBA: PIL cuts it to 8."""
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.ndim != 3:
        raise ValueError("16 bits a channel of a kind that cannot be read")
    return found[..., [2, 1, 0, *range(3, found.shape[2])]]


def is_deep_colour(image: Image.Image, rawmode: tuple[Any, ...]) -> bool:
    """Whether an image has several channels of 16 bits."""
    return image.mode in ("RGB", "RGBA", "RGBX", "LA") and ";16" in str(rawmode[0])


def raw_mode(image: Image.Image) -> tuple[Any, ...]:
    """How PIL unpacks the image, to be asked before it is loaded: ("L;4",), ("L", 20) of a PGM file, ..."""
    tiles = getattr(image, "tile", None)
    given = tiles[0][3] if tiles else ""
    return given if isinstance(given, tuple) and given else (given or "",)


def _is_16_bit(image: Image.Image, rawmode: tuple[Any, ...]) -> bool:
    """Whether the numbers of mode "I" are 16 bits without a sign, as older versions of PIL give them for PNG."""
    return image.format in ("PNG", "PPM") or str(rawmode[0]) in ("I;16", "I;16B", "I;16L", "I;16N")


def _stored_samples(image: Image.Image, data: bytes, rawmode: tuple[Any, ...]) -> np.ndarray:
    """What an image stores, before anything makes 8 bits of it: (H, W) or (H, W, 3)."""
    if is_deep_colour(image, rawmode):
        return deep_colours(data)[..., :3]
    if image.mode == "LA":
        return np.asarray(image.getchannel(0))
    if image.mode in GREY or image.mode.startswith("I;16"):
        return stored_grey(image, rawmode)
    return np.asarray(image.convert("RGB"))


def _eight_bits(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Stored values -> uint8, linearly from the range."""
    numbers = values.astype(np.float64)
    finite = np.isfinite(numbers)
    if value_range == "auto":
        low, high = (numbers[finite].min(), numbers[finite].max()) if finite.any() else (0.0, 0.0)
    else:
        low, high = value_range
    scaled = (numbers - low) * (255 / (high - low) if high > low else 0)
    return np.nan_to_num(scaled, nan=0, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)


def exif_orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken metadata of a good image: as stored
        return None


def _has_text(file: Any) -> bool:
    """Whether a PNG has metadata anywhere."""
    file.seek(8)
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind in TEXT:
            return True
        file.seek(length + 4, 1)
    return False


def _webp_is_lossy(data: bytes) -> bool:
    place = 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        if kind in (b"VP8 ", b"VP8L", b"ANMF"):  # frames of an animation: not looked into
            return kind != b"VP8L"
        place += 8 + length + length % 2
    return True
