"""What the living part of a page computes with: features of the images shown, small enough to travel in it.

Shapes: n images, h w patches, D channels, d of them after a reduction.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neco.eval.pictures import stretched
from neco.report.gallery import Features, Gallery

BYTES = 6_000_000  # of the features of a page; base64 makes a third more of it
IMAGES, NETWORKS, LEAST = 12, 6, 16
QUERIES = 64


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
    made, worst, dims = [], 0.0, {}
    for name, (_, _, _, maps) in networks:
        maps = maps[:count]
        dim = min(maps.shape[-1], max(1, BYTES // patches() - 1))
        small, (height, width) = quantise(maps, dim), maps.shape[1:3]
        worst = max(worst, error(maps, small))
        dims[maps.shape[-1]] = dim
        labels = np.stack([stretched(label, np.empty((height, width))) for label in gallery.labels[:count]])
        held = {"data": _text(small.numpy()), "labels": _text(labels)}
        made.append({"name": name, "grid": [height, width], "dim": dim, **held})
    shown = [{"key": key, "image": image} for key, image in zip(gallery.keys[:count], images[:count], strict=True)]
    reduced = ", ".join(f"{small} of {full}" for full, small in dims.items() if small < full)
    note = "Features are kept as 8-bit integers"
    note += f" and reduced to their strongest directions ({reduced})" if reduced else ""
    note += f": cosines here differ from the exact ones by at most {worst:.3f}, as measured on {QUERIES} patches."
    return {"images": shown, "classes": gallery.classes, "networks": made}, note


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
