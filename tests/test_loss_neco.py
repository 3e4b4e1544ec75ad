"""The loss against loops over its formula, against the published worked example, then invariances."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from neco.loss.base import similarities
from neco.loss.neco import NeCo
from neco.loss.relaxation import RELAXATIONS
from neco.loss.sorting import soft_sort
from neco.training.references import deal

EXAMPLE = Path(__file__).parents[2] / "shared/examples/ten_pair_loss.npz"
P, B, N, R, D = 3, 2, 4, 5, 6


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, P, B, N, D, generator=generator, dtype=torch.float64)
    references = torch.randn(P, B, R, D, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (student, 0.3 * teacher + student, references)]


def slow(loss: NeCo, student: Tensor, teacher: Tensor, references: Tensor, mask: Tensor) -> Tensor:
    def order(patch: Tensor, image: Tensor, steepness: float) -> Tensor:
        if loss.similarity == "cosine":
            near = torch.stack([patch @ r / patch.norm() / r.norm() for r in image])
        else:
            near = -torch.stack([(patch - r).norm() for r in image])
        return soft_sort(near, loss.network, steepness, loss.relaxation)[1]

    pairs = []
    for pair in range(P):
        total, kept = torch.zeros((), dtype=torch.float64), 0
        for image in range(B):
            for patch in range(N):
                if mask[pair, image, patch]:
                    p = order(student[pair, image, patch], references[pair, image], loss.steepness[0])
                    q = order(teacher[pair, image, patch], references[pair, image], loss.steepness[1])
                    total += sum(-(q[i] * p[i].log()).sum() for i in range(R)) / R
                    kept += 1
        pairs.append(total / kept if kept else total)
    return sum(pairs) / P


@pytest.mark.parametrize("network", ("bitonic", "odd_even"))
@pytest.mark.parametrize("similarity", ("cosine", "euclidean"))
@pytest.mark.parametrize("masked", (False, True))
def test_against_loops(network: str, similarity: str, masked: bool) -> None:
    check_loops(NeCo(network=network, similarity=similarity, steepness=(20.0, 50.0)), masked)


@pytest.mark.parametrize(
    ("name", "art_lambda"),
    [("logistic", None), ("logistic_phi", None), ("logistic_phi", 0.5), ("gaussian", None), ("reciprocal", None),
     ("optimal", None)],
)  # fmt: skip
def test_relaxations_against_loops(name: str, art_lambda: float | None) -> None:
    check_loops(NeCo(relaxation=name, art_lambda=art_lambda, steepness=(3.0, 2.0)), masked=False)


@pytest.mark.parametrize("name", RELAXATIONS)
def test_null_is_the_steepness_of_the_relaxation(name: str) -> None:
    loss = NeCo(relaxation=name)
    assert loss.steepness == (RELAXATIONS[name].steepness,) * 2
    value = loss(*inputs())[0]
    assert torch.equal(NeCo(relaxation=name, steepness=loss.steepness)(*inputs())[0], value)
    assert not torch.equal(NeCo(relaxation=name, steepness=(1.0, loss.steepness[1]))(*inputs())[0], value)
    assert not torch.equal(NeCo(relaxation=name, steepness=(loss.steepness[0], 1.0))(*inputs())[0], value)


def check_loops(loss: NeCo, masked: bool) -> None:
    student, teacher, references = inputs()
    student.requires_grad_()
    mask = torch.ones(P, B, N, dtype=torch.bool)
    if masked:
        mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[1] = False  # a pair without a patch adds 0 and still counts
    value, _ = loss(student, teacher, references, mask if masked else None)
    expected = slow(loss, student, teacher, references, mask)
    assert torch.allclose(value, expected, rtol=1e-12)
    gradients = [torch.autograd.grad(x, student)[0] for x in (value, expected)]
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)
    assert torch.equal((gradients[0] != 0).any(-1), mask)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="runs beside ../shared/examples")
def test_published_ten_pairs() -> None:
    given = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(EXAMPLE).items()}
    images, views, globals_, patch = 2, 6, 2, 14
    teacher, student = (
        given[key].view(globals_, images, 16, 16, -1).permute(0, 1, 4, 2, 3) for key in ("teacher", "student_gc")
    )
    local = given["student_lc"].view(views - globals_, images, 7, 7, -1).permute(0, 1, 4, 2, 3)

    def align(maps: Tensor, boxes: Tensor) -> Tensor:
        return roi_align(maps.contiguous(), [box[None] / patch for box in boxes], 7, aligned=True).flatten(2).mT

    order = given["pair_order"].tolist()
    ours = torch.stack([align((*student, *local)[view], given["box_all"][:, view, anchor]) for anchor, view in order])
    theirs = torch.stack([align(teacher[anchor], given["box_gc"][:, anchor, view]) for anchor, view in order])
    references = deal(theirs, given["permutations"])
    assert torch.equal(references, given["ref_pairs"].flatten(3).mT)
    loss = NeCo(network="bitonic", similarity="cosine", steepness=100.0)
    assert torch.allclose(loss(ours, theirs, references)[0], given["loss"], rtol=0, atol=1e-12)
    pairs = [loss(*(x[pair : pair + 1] for x in (ours, theirs, references)))[0] for pair in range(len(order))]
    assert torch.allclose(torch.stack(pairs), given["pair_losses"], rtol=0, atol=1e-12)


def test_same_order_has_no_kl_and_agrees() -> None:
    student, _, references = inputs()
    value, metrics = NeCo()(student, student, references)
    assert metrics["kl"].abs() < 1e-12 and metrics["agreement"] == 1 and torch.allclose(value, metrics["entropy"])


def test_metrics_of_different_orders() -> None:
    student, teacher, references = inputs()
    value, metrics = NeCo()(student.requires_grad_(), teacher, references)
    nearest = [similarities(x, references, "cosine").argmax(-1) for x in (student, teacher)]
    assert 0 < metrics["agreement"] == (nearest[0] == nearest[1]).double().mean() < 1
    assert torch.allclose(value, metrics["kl"] + metrics["entropy"]) and metrics["kl"] > 0
    assert all(x.ndim == 0 and not x.requires_grad for x in metrics.values())


@pytest.mark.parametrize("kind", ("cosine", "euclidean"))
def test_last_rank_is_the_nearest(kind: str) -> None:
    patches, _, references = inputs()
    references[..., 2, :] = patches[..., 0, :] * 1.01
    p = soft_sort(similarities(patches, references, kind), "bitonic", 1e6)[1]
    assert (p[:, :, 0, 2, -1] > 0.9).all()


def test_images_and_references_in_any_order() -> None:
    tensors = inputs()
    loss = NeCo(network="odd_even")
    value = loss(*tensors)[0]
    assert torch.allclose(loss(*(x.flip(1) for x in tensors))[0], value, rtol=1e-12)
    assert torch.allclose(loss(*(x.flip(0) for x in tensors))[0], value, rtol=1e-12)
    assert torch.allclose(loss(*(x * 3 for x in tensors))[0], value, rtol=1e-12)


def test_who_gets_a_gradient() -> None:
    student, teacher, references = (x.requires_grad_() for x in inputs())
    NeCo()(student, teacher, references.detach())[0].backward()
    assert student.grad.any() and teacher.grad is None
    NeCo()(student, teacher, references)[0].backward()  # without a teacher network the references are the student's own
    assert references.grad.any() and teacher.grad is None
    step = 1e-6 * references.grad / references.grad.norm()
    with torch.no_grad():  # the teacher's order counts as a constant: compare with its similarities held fixed
        theirs = similarities(teacher, references, "cosine")

        def value(moved: Tensor) -> Tensor:
            p, q = (soft_sort(x, "bitonic", 100.0)[1] for x in (similarities(student, moved, "cosine"), theirs))
            return -(q * p.log()).sum(-1).mean()

        slope = (value(references + step) - value(references - step)) / 2e-6
    assert torch.allclose(slope, references.grad.norm(), rtol=1e-4)


@pytest.mark.parametrize("network", ("bitonic", "odd_even"))
def test_autocast_changes_nothing(network: str) -> None:
    results = []
    for enabled in (False, True):
        tensors = inputs(torch.float32)
        tensors[0].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value, metrics = NeCo(network=network, steepness=(1000.0, 100.0))(*tensors)
        value.backward()
        results.append((value, metrics["entropy"], tensors[0].grad))
    assert results[0][0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_fast_matrix_products_change_nothing() -> None:
    patches, references = torch.randn(2, 16, 49, 256, generator=torch.Generator().manual_seed(0))
    exact = similarities(patches.double(), references.double(), "cosine")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16 or its like on a processor, TF32 on a GPU
        assert (similarities(patches, references, "cosine") - exact).abs().max() < 1e-7
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("similarity", ("cosine", "euclidean"))
def test_degenerate_patches_are_finite(similarity: str) -> None:
    """Zero vectors, identical patches, references equal to the patch."""
    student = torch.zeros(1, 2, 4, D)
    student[0, 1] = 1.0
    references = student.clone()
    student.requires_grad_()
    value, metrics = NeCo(similarity=similarity)(student, references, references)
    value.backward()
    assert value.isfinite() and metrics["kl"].abs() < 1e-5 and student.grad.isfinite().all()
