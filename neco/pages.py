"""Pages of pictures: one HTML file each, nothing beside it."""

import base64
import colorsys
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from neco.results import write

STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2em;max-width:1400px;color:#222;background:#fff}
figure{display:inline-block;margin:0 1em 1em 0;vertical-align:top}figcaption{font-size:12px;max-width:420px}
span{white-space:nowrap}img{display:block;max-width:100%;min-width:200px}i{display:inline-block;width:.9em;height:.9em;margin-right:.3em}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}"""


def colours(count: int) -> np.ndarray:
    """uint8 (count, 3): colours that neighbours in number do not share."""
    steps = ((i * 0.618034 % 1, (0.6, 1)[i % 2], (1, 0.75, 0.5)[i // 2 % 3]) for i in range(count))
    return (255 * np.array([colorsys.hsv_to_rgb(*step) for step in steps]).reshape(-1, 3)).astype(np.uint8)


def overlay(image: np.ndarray, label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The classes of (H, W) over a uint8 image (H, W, 3); what is no class stays dark."""
    classes = label < len(palette)
    painted = np.where(classes[..., None], palette[np.where(classes, label, 0)], 0)
    return (0.4 * image + 0.6 * painted).astype(np.uint8)


def boxed(image: np.ndarray, boxes: Iterable[Sequence[int]], palette: np.ndarray) -> np.ndarray:
    """An image with boxes (x1, y1, x2, y2) in pixels drawn on it."""
    drawn = Image.fromarray(image)
    pen, width = ImageDraw.Draw(drawn), max(2, max(image.shape) // 200)
    for box, colour in zip(boxes, palette.tolist(), strict=True):
        pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=tuple(colour), width=width)
    return np.asarray(drawn)


def figure(image: np.ndarray, caption: str = "", side: int = 420) -> str:
    """A uint8 image (H, W, 3), at most `side` pixels large, with HTML below it."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=88)
    source = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<figure><img src="{source}" alt=""><figcaption>{caption}</figcaption></figure>'


def swatch(colour: np.ndarray, text: str) -> str:
    """A text behind a square of a colour."""
    return f'<span><i style="background:rgb{tuple(colour.tolist())}"></i>{html.escape(text)}</span>'


def page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write an HTML file of `parts`."""
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    write(path, "\n".join([head, f"<h1>{html.escape(title)}</h1>", *parts]) + "\n")
