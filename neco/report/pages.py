"""HTML pages: one file each, nothing beside it, nothing from a network."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from neco.runs.results import write
from neco.utils.escape import for_html

HERE = Path(__file__).parent
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def boxed(image: np.ndarray, boxes: Iterable[Sequence[int]], palette: np.ndarray) -> np.ndarray:
    """An image with boxes (x1, y1, x2, y2) in pixels drawn on it."""
    drawn = Image.fromarray(image)
    pen, width = ImageDraw.Draw(drawn), max(2, max(image.shape) // 200)
    for box, colour in zip(boxes, palette.tolist(), strict=True):
        pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=tuple(colour), width=width)
    return np.asarray(drawn)


def address(data: bytes) -> str:
    """The `data:` address of a JPEG or PNG file."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def encoded(image: np.ndarray, side: int = 420, form: str = "JPEG") -> bytes:
    """A uint8 image (H, W, 3) as a file, at most `side` pixels large."""
    picture, data = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(data, form, quality=85)
    return data.getvalue()


def figure(source: str, alt: str, caption: str = "", size: Sequence[int] = (), kind: str = "") -> str:
    """A picture with HTML below it. `size`: height and width whose ratio it is to have, whatever the file's are."""
    shape = f' style="aspect-ratio:{size[1]}/{size[0]}"' if size else ""
    return (
        f'<figure><img class="{kind}" src="{source}" alt="{for_html(alt)}"{shape}>'
        f"<figcaption>{caption or for_html(alt)}</figcaption></figure>"
    )


def drawn(image: np.ndarray, alt: str, caption: str = "", side: int = 420) -> str:
    """A uint8 image (H, W, 3), at most `side` pixels large, with HTML below it."""
    return figure(address(encoded(image, side)), alt, caption)


def swatch(colour: np.ndarray, text: str) -> str:
    """A text behind a square of a colour."""
    return f'<span class="swatch"><i style="background:rgb{tuple(colour.tolist())}"></i>{for_html(text)}</span>'


def page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write an HTML file of `parts`."""
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{for_html(title)}</title><style>{(HERE / 'page.css').read_text()}</style></head><body>"
    )
    write(path, "\n".join([head, f"<h1>{for_html(title)}</h1>", *parts, "</body></html>"]) + "\n")
