"""Boxes and aligned patches: the published values, torchvision as the oracle, and geometry itself."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align as oracle

from neco.training.align import align_pairs, pair_boxes, pair_order, roi_align

EXAMPLES = Path(__file__).parents[2] / "shared" / "examples"


def example(name: str) -> dict[str, Tensor]:
    path = EXAMPLES / name
    if not path.exists():
        pytest.skip(f"runs beside ../shared/examples, which holds {name}")
    return {key: torch.from_numpy(value) for key, value in np.load(path).items()}


def random_boxes(generator: torch.Generator, shape: Sequence[int], size: float) -> Tensor:
    corners = torch.rand(*shape, 2, 2, dtype=torch.float64, generator=generator) * size
    return torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)


def test_pairs_are_ordered_global_view_first() -> None:
    assert pair_order(1, 2) == [(0, 1)]
    assert pair_order(2, 2) == [(0, 1), (1, 0)]
    assert pair_order(2, 4) == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]
    assert len(pair_order(3, 5)) == 3 * 4


def test_boxes_equal_the_published_ones() -> None:
    data = example("boxes.npz")
    on_global, on_view = pair_boxes(data["crops"], data["sizes"].tolist(), 2)
    assert torch.equal(on_global, data["on_global"]) and torch.equal(on_view, data["on_view"])


def test_boxes_of_rectangular_views() -> None:
    crops = torch.tensor([[[0, 0, 100, 50], [40, 10, 120, 60]], [[0, 0, 10, 10], [5, 2, 10, 4]]])
    sizes = [(50, 200), (25, 40)]  # 2 and 1, then 0.5 and 0.5 pixels of the view to a pixel of the image
    on_global, on_view = pair_boxes(crops, sizes, 1)
    assert on_global[0, 0, 1].tolist() == [80, 10, 200, 50] and on_view[0, 1, 0].tolist() == [0, 0, 30, 20]
    assert on_global[1, 0, 1].tolist() == [100, 10, 200, 20] and on_view[1, 1, 0].tolist() == [0, 0, 40, 25]
    for a, b in zip(pair_boxes(crops, torch.tensor(sizes), 1), (on_global, on_view), strict=True):
        assert torch.equal(a, b)
    for square in [30, 20], [30, (20, 20)], torch.tensor([30, 20]):
        for a, b in zip(pair_boxes(crops, square, 1), pair_boxes(crops, [(30, 30), (20, 20)], 1), strict=True):
            assert torch.equal(a, b)


def test_aligned_teacher_patches_equal_the_published_ones() -> None:
    data = example("ten_pair_loss.npz")
    assert pair_order(2, 6) == [tuple(pair) for pair in data["pair_order"].tolist()]
    teacher, student_global = (data[name].view(2, 2, 16, 16, 16) for name in ("teacher", "student_gc"))
    student_local = data["student_lc"].view(4, 2, 7, 7, 16)
    boxes = data["box_gc"], data["box_all"]
    student, teacher = align_pairs(teacher, student_global, student_local, *boxes, patch=14, grid=7)
    for pair, (g, v) in enumerate(pair_order(2, 6)):
        references = teacher[pair].flatten(0, 1)[data["permutations"][pair]].view(2, 7, 7, 16).permute(0, 3, 1, 2)
        torch.testing.assert_close(references, data["ref_pairs"][pair], rtol=0, atol=1e-12)
        maps = (student_global[v] if v < 2 else student_local[v - 2]).permute(0, 3, 1, 2)
        expected = oracle(maps, list((data["box_all"][:, v, g, None] / 14).unbind()), 7, aligned=True)
        torch.testing.assert_close(student[pair], expected.flatten(2).mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "grid"), [((37, 37), 7), ((7, 7), 7), ((14, 14), 7), ((5, 9), 3), ((3, 2), 8), ((1, 1), 2)]
)
def test_roi_align_equals_torchvision(size: tuple[int, int], grid: int) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(6, *size, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    boxes = random_boxes(generator, (6, 5), 1.0) * torch.tensor([size[1], size[0]] * 2)
    boxes[0, 0] = torch.tensor([0.0, 0.0, size[1], size[0]])  # all of it
    boxes[1, 0] = boxes[0, 0] * (
        1 + 1e-12
    )  # and a rounding error more: one sample a cell is added where they fit exactly
    boxes[0, 1, 2:] = boxes[0, 1, :2]  # nothing
    boxes[0, 2, 2:] = boxes[0, 2, :2] + 1e-3  # next to nothing
    index = torch.arange(6.0, dtype=torch.float64).repeat_interleave(5)[:, None]
    rois = torch.cat([index, boxes.flatten(0, 1)], dim=1)
    expected = oracle(maps.permute(0, 3, 1, 2), rois, grid, aligned=True).flatten(2).mT.unflatten(0, (6, 5))
    ours = roi_align(maps, boxes, grid)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad((aligned * weight).sum(), maps)[0] for aligned in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    nested = roi_align(maps.unflatten(0, (2, 3)), boxes.unflatten(0, (2, 3)), grid)
    torch.testing.assert_close(nested, expected.unflatten(0, (2, 3)), rtol=0, atol=1e-12)


def test_alignment_is_single_precision_inside_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    maps, boxes = torch.randn(2, 9, 9, 8, generator=generator), random_boxes(generator, (2, 3), 9.0).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside, rounded = roi_align(maps, boxes, 4), roi_align(maps.bfloat16(), boxes, 4)
    assert inside.dtype == rounded.dtype == torch.float32
    assert torch.equal(inside, roi_align(maps, boxes, 4))
    assert torch.equal(rounded, roi_align(maps.bfloat16().float(), boxes, 4))


@pytest.mark.parametrize(("global_views", "local_views"), [(1, 1), (1, 6), (2, 0), (2, 4), (3, 0), (3, 4)])
def test_align_pairs_takes_the_right_map_and_box(global_views: int, local_views: int) -> None:
    generator = torch.Generator().manual_seed(global_views + 10 * local_views)
    G, L, V, B, patch, grid = global_views, local_views, global_views + local_views, 2, 8, 3
    teacher, large = torch.randn(2, G, B, 6, 8, 5, dtype=torch.float64, generator=generator)
    small = torch.randn(L, B, 5, 3, 5, dtype=torch.float64, generator=generator)
    on_global = random_boxes(generator, (B, G, V), 6.0 * patch)
    on_view = random_boxes(generator, (B, V, G), 3.0 * patch)
    for globals_, locals_ in [(large if G > 1 else None, small if L else None), (large, small)]:
        student, aligned = align_pairs(teacher, globals_, locals_, on_global, on_view, patch=patch, grid=grid)
        assert student.shape == aligned.shape == (G * (V - 1), B, grid * grid, 5)
        for pair, (g, v) in enumerate(pair_order(G, V)):
            for image in range(B):
                source = large[v] if v < G else small[v - G]
                for maps, box, ours in (
                    (teacher[g], on_global[image, g, v], aligned),
                    (source, on_view[image, v, g], student),
                ):
                    expected = oracle(
                        maps[image : image + 1].permute(0, 3, 1, 2), [box[None] / patch], grid, aligned=True
                    )
                    torch.testing.assert_close(ours[pair, image], expected[0].flatten(1).T, rtol=0, atol=1e-12)


@st.composite
def overlapping(draw: st.DrawFn) -> list[list[int]]:
    """Two crops of a 1000 x 1000 image that share at least a pixel."""
    crops = []
    for _axis in range(2):
        meet = draw(st.integers(0, 999))
        crops.append([(draw(st.integers(0, meet)), draw(st.integers(meet + 1, 1000))) for _ in range(2)])
    return [[crops[0][v][0], crops[1][v][0], crops[0][v][1], crops[1][v][1]] for v in range(2)]


def place(crop: Tensor, h: int, w: int) -> Tensor:
    """(h, w, 2): image coordinates x, y of the centres of a view's patches."""
    x, y = (
        crop[i] + (torch.arange(side, dtype=torch.float64) + 0.5) / side * (crop[i + 2] - crop[i])
        for i, side in enumerate((w, h))
    )
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


@settings(max_examples=100, deadline=None)
@given(overlapping(), *[st.tuples(st.integers(2, 20), st.integers(2, 20))] * 2, st.integers(1, 8))
def test_a_place_seen_in_both_views_lands_in_the_same_cell(
    crops: list[list[int]], large: tuple[int, int], small: tuple[int, int], grid: int
) -> None:
    """Maps that hold where each patch is: aligned, both views give the centres of the shared region's cells.

    Bilinear interpolation is exact for coordinates, except that a map knows nothing beyond the centres of its outer
    patches: a cell that reaches into the outer half patch of a view is off by at most half a patch of that view.
    """
    patch = 14
    views = torch.tensor([crops])  # (1, 2, 4)
    boxes = pair_boxes(views, [(h * patch, w * patch) for h, w in (large, small)], 1)
    maps = [place(views[0, view], *size)[None, None] for view, size in enumerate((large, small))]
    student, teacher = (cells[0, 0] for cells in align_pairs(maps[0], maps[0], maps[1], *boxes, patch=patch, grid=grid))
    low, high = views[0, :, :2].amax(0).double(), views[0, :, 2:].amin(0).double()
    cell = (high - low) / grid
    steps = torch.arange(grid, dtype=torch.float64)
    start = torch.stack(torch.meshgrid(low[0] + steps * cell[0], low[1] + steps * cell[1], indexing="xy"), -1).flatten(
        0, 1
    )
    centre = start + cell / 2
    for view, (h, w), aligned in (0, large, teacher), (1, small, student):
        half_patch = (views[0, view, 2:] - views[0, view, :2]) / torch.tensor([w, h]) / 2
        error = (aligned - centre).abs()
        rounding = 2e-3  # boxes are float32, crops up to 1000 pixels
        assert (error <= half_patch + rounding).all()
        inside = (start >= views[0, view, :2] + half_patch) & (start + cell <= views[0, view, 2:] - half_patch)
        assert (error[inside] <= rounding).all()
