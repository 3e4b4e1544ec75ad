"""Which views are compared, where they overlap, and the patches of that region on a common grid (METHOD 1 and 2).

Legend: B images, V views (G global first, then L local), P = G (V - 1) ordered pairs, R regions of a map,
S cells along a side, N = S * S cells in row-major order, D channels. Boxes are (x1, y1, x2, y2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from neco.config.types import sides

WHOLE = 1 - 1e-4  # a cell counts when it lies in the mask entirely: 1, but for the rounding of interpolation weights


def pair_order(global_views: int, views: int) -> list[tuple[int, int]]:
    """Each global view with each other view, global view first: (0, 1), (0, 2), ..., (1, 0), (1, 2), ..."""
    return [(g, v) for g in range(global_views) for v in range(views) if v != g]


def pair_boxes(
    crops: Tensor, sizes: Sequence[int | tuple[int, int]] | Tensor, global_views: int
) -> tuple[Tensor, Tensor]:
    """What each global view shares with each view, in the pixels of either.

    Args:
        crops: (B, V, 4) integer rectangles in image pixels; every view overlaps every global one.
        sizes: (V,) side of each view in pixels, or its (height, width).

    Returns:
        on_global (B, G, V, 4), the intersection of g and v in the frame of g, and on_view (B, V, G, 4), in that of v.
        float32, a share of the crop times the view's side along that axis, as published.
    """
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    pixels = [n for size in sizes for n in reversed(sides(size))]  # width, height of view 0, 1, ...
    side = torch.stack([crops.new_full((), n) for n in pixels]).view(-1, 1, 2)  # made on the device: nothing waits
    view = torch.stack([crops[..., :2], crops[..., 2:]], dim=-2)  # (B, V, 2 corners, xy)
    origin, extent = view[..., :1, :], view[..., 1:, :] - view[..., :1, :]
    low = torch.maximum(view[:, :global_views, None, 0], view[:, None, :, 0])
    high = torch.minimum(view[:, :global_views, None, 1], view[:, None, :, 1])
    shared = torch.stack([low, high], dim=-2)  # (B, G, V, 2, xy)
    g = slice(global_views)
    on_global = (shared - origin[:, g, None]) / extent[:, g, None] * side[g, None]
    on_view = (shared - origin[:, None]) / extent[:, None] * side
    return on_global.flatten(-2), on_view.flatten(-2).transpose(1, 2)


def roi_align(maps: Tensor, boxes: Tensor, grid: int) -> Tensor:
    """Mean of the bilinearly interpolated map over each cell of `boxes`, as torchvision's
    `roi_align(aligned=True, sampling_ratio=-1)`: ceil(cell size) samples a cell along either axis.

    The samples form a grid, so the whole is two small matrix products, one an axis: deterministic on every device,
    one reading of a map for all its regions, no sum over atomics in the backward.

    Args:
        maps: (..., h, w, D) float; computed in float32 at least, inside autocast too.
        boxes: (..., R, 4) in map pixels, the first patch covering 0..1; not larger than the map.

    Returns:
        (..., R, N, D)
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        x1, y1, x2, y2 = boxes.to(maps.dtype).unbind(-1)
        h, w = maps.shape[-3:-1]
        down, across = _weights(y1, y2, h, grid), _weights(x1, x2, w, grid)  # (..., R, S, h), (..., R, S, w)
        rows = down.flatten(-3, -2) @ maps.flatten(-2)  # (..., R S, w D)
        rows = rows.unflatten(-2, (-1, grid)).unflatten(-1, (w, -1))  # (..., R, S, w, D)
        return (across.unsqueeze(-3) @ rows).flatten(-3, -2)


def _weights(low: Tensor, high: Tensor, size: int, grid: int) -> Tensor:
    """(..., S, size): share of each of `size` map pixels in each cell of the intervals from `low` to `high` (...)."""
    cell = ((high - low) / grid)[..., None, None]
    samples = torch.ceil(cell)
    cells = torch.arange(grid, device=low.device, dtype=low.dtype)[:, None]
    # A box is at most `size` wide, so a cell has at most this many samples, rounding up included; those beyond weigh 0
    sample = torch.arange(-(-size // grid) + 1, device=low.device, dtype=low.dtype)
    at = low[..., None, None] - 0.5 + cells * cell + (sample + 0.5) * cell / samples.clamp(min=1)  # (..., S, samples)
    inside = (sample < samples) & (at >= -1) & (at <= size)
    pixels = torch.arange(size, device=low.device, dtype=low.dtype)
    hat = (1 - (at.clamp(0, size - 1)[..., None] - pixels).abs()).clamp(min=0)
    return (hat * inside[..., None]).sum(-2) / samples.clamp(min=1)


def align_pairs(
    teacher: Tensor,
    student_global: Tensor | None,
    student_local: Tensor | None,
    on_global: Tensor,
    on_view: Tensor,
    *,
    patch: int,
    grid: int,
) -> tuple[Tensor, Tensor]:
    """The shared region of every pair: as the student sees it in v, as the teacher sees it in g.

    Args:
        teacher, student_global: (G, B, h, w, D) patch maps of the global views; a single one needs no student's.
        student_local: (L, B, h', w', D), None or empty without local views.
        on_global, on_view: boxes in view pixels, from `pair_boxes`.

    Returns:
        student and teacher, (P, B, N, D) each, pairs in the order of `pair_order`.
    """
    views = on_global.shape[2]
    order = pair_order(len(teacher), views)
    by_view = sorted(order, key=lambda pair: pair[1])  # (g, v) with v a global view first, as the student's maps come
    split = len(order) - (views - len(teacher)) * len(teacher)

    on_view = on_view.transpose(1, 2)
    groups = (student_global, by_view[:split]), (student_local, by_view[split:])
    student = [
        row
        for maps, pairs in groups
        if pairs and maps is not None
        for row in align(maps, on_view, pairs, patch=patch, grid=grid)
    ]
    teacher = align(teacher, on_global, order, patch=patch, grid=grid)
    return torch.stack([student[by_view.index(pair)] for pair in order]), teacher


def align(maps: Tensor, boxes: Tensor, pairs: list[tuple[int, int]], *, patch: int, grid: int) -> Tensor:
    """Maps (K, B, h, w, D) with as many of the pairs each, boxes (B, G, V, 4) in pixels -> (pairs, B, N, D)."""
    regions = torch.stack([boxes[:, g, v] for g, v in pairs], dim=1).unflatten(1, (len(maps), -1)) / patch
    return roi_align(maps, regions.transpose(0, 1), grid).transpose(1, 2).flatten(0, 1)
