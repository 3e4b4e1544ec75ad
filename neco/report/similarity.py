"""What the living part of a page computes with: features of the images shown, small enough to travel in it.

Shapes: n images, h w patches, D channels, d of them after a reduction.
"""

import base64
import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neco.dataset.base import IGNORE
from neco.report.gallery import Features, Gallery
from neco.report.pictures import stretched

BYTES = 6_000_000  # of the features of a page; base64 makes a third more of it
IMAGES, NETWORKS, LEAST = 12, 6, 16
QUERIES = 64
NEAREST = 30  # patches, as in page.js
WORK = 20_000_000_000  # products that the choice of a patch may take


def quantise(maps: Tensor, dim: int) -> Tensor:
    """Features (n, h, w, D) as int8 (n, h, w, d): unit vectors, their `dim` strongest directions, largest part 127.

    Cosines need no scale: each vector has its own. The directions are the principal axes, not centred, which keep most
    of all inner products.
    """
    unit = F.normalize(maps.float(), dim=-1)
    if dim < maps.shape[-1]:
        rows = unit.flatten(0, 2)
        rows = rows[:: max(1, len(rows) // 8192)]
        unit = unit @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -dim:]
    return (127 * unit / unit.abs().amax(-1, keepdim=True).clamp(min=1e-12)).round().to(torch.int8)


def error(maps: Tensor, packed: Tensor) -> float:
    """The largest difference of cosines that int8 vectors have, of a few patches with all."""
    exact, rough = (F.normalize(part.flatten(0, 2).float(), dim=1) for part in (maps, packed))
    some = torch.linspace(0, len(exact) - 1, min(QUERIES, len(exact))).long()
    return float((exact[some] @ exact.T - rough[some] @ rough.T).abs().max())


def representative(data: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, float, float, float, float]:
    """Choose the patch whose change is nearest to the mean change over all patches; of several the most usual before.

    What changes is how many of the NEAREST patches in other images have the class of the patch, as a share.

    Args:
        data: of the network to the left and the one to the right: vectors (n, h, w, d) and classes (n, h, w).

    Returns: its image, its place across and down (0..1), its change and the mean change (shares). Raises ValueError
        where no patch has a class and another image.
    """
    (left, classes), (right, others) = data
    images, height, width, _ = left.shape
    known = classes.flatten().ne(IGNORE).nonzero()[:, 0]
    if images < 2 or not len(known):
        raise ValueError("no patch with a class and another image")
    work = 1 + max(part.flatten(0, 2).numel() for part in (left, right))
    known = known[:: -(-len(known) * work // WORK)]
    image, row, column = (known // (height * width), known // width % height, known % width)
    down, across = (row + 0.5) / height, (column + 0.5) / width
    rows, columns = (down * right.shape[1]).long(), (across * right.shape[2]).long()
    there = (image * right.shape[1] + rows) * right.shape[2] + columns
    before, after = _same_class(left, classes, known), _same_class(right, others, there)
    change = after - before
    mean = change.mean()
    off = torch.stack([(change - mean).abs(), (before - before.mean()).abs()], 1).mul(1e6).round().long()
    best = min(range(len(known)), key=lambda i: (*off[i].tolist(), i))
    return int(image[best]), float(across[best]), float(down[best]), float(change[best]), float(mean)


def _same_class(maps: Tensor, classes: Tensor, queries: Tensor) -> Tensor:
    """The share of the NEAREST classified patches in other images that have the class of each query, float64."""
    vectors, kinds = F.normalize(maps.flatten(0, 2).float(), dim=1), classes.flatten()
    image = torch.arange(len(vectors)) // (len(vectors) // len(maps))
    found = []
    for some in queries.split(256):
        cosines = vectors[some] @ vectors.T
        cosines[(image[some, None] == image) | (kinds == IGNORE)] = -2
        values, places = cosines.topk(min(NEAREST, len(vectors)), dim=1)
        counted = values > -2
        same = (kinds[places] == kinds[some, None]) & counted
        found.append(same.sum(1).double() / counted.sum(1).clamp(min=1))
    return torch.cat(found)


def pack(
    gallery: Gallery, networks: Sequence[tuple[str, Features]], images: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """What page.js reads, of networks by title and of `images` by address, and a note of what was lost.

    More than IMAGES and NETWORKS are left out. Where BYTES would be exceeded dimensions are reduced, to LEAST at least;
    beyond that images are left out, then networks.
    """
    networks, count = networks[:NETWORKS], min(len(gallery.keys), IMAGES)

    def patches() -> int:
        return sum(count * part.maps.shape[1] * part.maps.shape[2] for _, part in networks)

    while patches() * (LEAST + 1) > BYTES and (count > 1 or networks[1:]):  # a byte more is the class
        if count > 2 or not networks[1:]:
            count -= 1
        else:
            networks = networks[:-1]
    made, worst, dims, shown_of = [], 0.0, {}, []
    for name, (_, _, _, maps) in networks:
        maps = maps[:count]
        dim = min(maps.shape[-1], max(1, BYTES // patches() - 1))
        small, (height, width) = quantise(maps, dim), maps.shape[1:3]
        worst = max(worst, error(maps, small))
        dims[maps.shape[-1]] = dim
        labels = np.stack([stretched(label, np.empty((height, width))) for label in gallery.labels[:count]])
        held = {"data": _text(small.numpy()), "labels": _text(labels)}
        made.append({"name": name, "grid": [height, width], "dim": dim, **held})
        shown_of.append((small, torch.from_numpy(labels.astype(np.int64))))
    shown = [{"key": key, "image": image} for key, image in zip(gallery.keys[:count], images[:count], strict=True)]
    reduced = ", ".join(f"{small} of {full}" for full, small in dims.items() if small < full)
    note = "Features are kept as 8-bit integers"
    note += f" and reduced to their strongest directions ({reduced})" if reduced else ""
    note += f": cosines here differ from the exact ones by at most {worst:.3f}, as measured on {QUERIES} patches."
    names = [name for name, _ in networks]
    right = next((i for i, name in enumerate(names) if "teacher" in name), len(names) - 1)
    start, said = {"image": 0, "x": 0.5, "y": 0.5}, ""
    with contextlib.suppress(ValueError):
        image, x, y, change, mean = representative([shown_of[0], shown_of[right]])
        start = {"image": image, "x": x, "y": y}
        if right:
            said = (
                f"The page opens on a patch that changed as the mean of all does: {100 * change:+.1f} points in the "
                f"share of its {NEAREST} nearest patches in other images that are of its class (mean "
                f"{100 * mean:+.1f}). "
            )
    chosen = {"start": start, "right": right}
    return {"images": shown, "classes": gallery.classes, "networks": made, **chosen}, said + note


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
