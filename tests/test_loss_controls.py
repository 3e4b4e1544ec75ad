"""The control losses against loops over their equations in float64, then what must not change them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from neco.loss.base import Loss
from neco.loss.cosine import Cosine
from neco.loss.gram import Gram
from neco.loss.infonce import InfoNCE
from neco.loss.leopart import Leopart, sinkhorn
from neco.loss.paka import PaKA
from neco.loss.soft_ce import SoftCE
from neco.utils.errors import NecoError

P, B, N, R, D, K = 3, 2, 4, 5, 6, 7
LOSSES: dict[str, Callable[..., Loss]] = {
    "soft_ce": lambda: SoftCE(student_temperature=0.2, teacher_temperature=0.1),
    "infonce": lambda: InfoNCE(temperature=0.3),
    "cosine": Cosine,
    "gram": Gram,
    "paka": PaKA,
    "leopart": lambda: Leopart(prototypes=K, temperature=0.3, epsilon=0.2, iterations=2),
}


def build(name: str) -> Loss:
    loss = LOSSES[name]()
    torch.manual_seed(2)
    loss.attach(D)
    for weight in loss.parameters():
        weight.data = torch.randn_like(weight).double()
    return loss


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, P, B, N, D, generator=generator, dtype=torch.float64)
    references = torch.randn(P, B, R, D, generator=generator, dtype=torch.float64)
    return [student, 0.3 * teacher + student, references]


def some() -> Tensor:
    """A mask: a pair without a patch, an image without one and one with a single patch among the others."""
    mask = torch.rand(P, B, N, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[1], mask[0, 0], mask[2, 0] = False, False, torch.arange(N) == 1
    return mask


def cos(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt()


def cross_entropy(target: list[Tensor], scores: list[Tensor]) -> Tensor:
    total = sum(score.exp() for score in scores)
    return -sum(q * (score.exp() / total).log() for q, score in zip(target, scores, strict=True))


class Patch(NamedTuple):
    """A patch of student and teacher, with all that its image has: patches, indices of those that count, references."""

    s: Tensor
    t: Tensor
    ours: Tensor
    theirs: Tensor
    kept: list[int]
    references: Tensor


def soft_ce(loss: SoftCE, x: Patch) -> Tensor:
    sharp = [(cos(x.t, r) / loss.teacher_temperature).exp() for r in x.references]
    return cross_entropy(
        [q / sum(sharp) for q in sharp], [cos(x.s, r) / loss.student_temperature for r in x.references]
    )


def infonce(loss: InfoNCE, x: Patch) -> Tensor:
    return cross_entropy([1.0] + [0.0] * R, [cos(x.s, r) / loss.temperature for r in (x.t, *x.references)])


def cosine(loss: Cosine, x: Patch) -> Tensor:
    return (x.s / x.s.norm() - x.t / x.t.norm()).square().sum() / 2  # BYOL's form


def gram(loss: Gram, x: Patch) -> Tensor:
    return sum((cos(x.s, x.ours[j]) - cos(x.t, x.theirs[j])) ** 2 for j in x.kept) / len(x.kept)


def paka(loss: PaKA, x: Patch) -> Tensor | None:
    """By features instead of kernels: 1 - ||X^T Y||^2 / (||X^T X|| ||Y^T Y||) of centred X and Y."""
    if len(x.kept) < 2:
        return None
    a, b = (side[x.kept] - side[x.kept].mean(0) for side in (x.ours, x.theirs))
    return 1 - (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())


def leopart(loss: Leopart, x: Patch, target: Tensor) -> Tensor:
    return cross_entropy(list(target), [cos(x.s, k) / loss.temperature for k in loss.student.weight.detach()])


def transport(loss: Leopart, rows: list[Tensor]) -> list[Tensor]:
    """SwAV's form: the plan has mass 1, each prototype gets 1 / K of it and each patch 1 / M, in turn."""
    plan = torch.stack([torch.stack([cos(t, k) / loss.epsilon for k in loss.teacher.weight.detach()]) for t in rows])
    plan = plan.exp() / plan.exp().sum()
    for _ in range(loss.iterations):
        plan = torch.stack([column / column.sum() / K for column in plan.T]).T
        plan = torch.stack([row / row.sum() / len(rows) for row in plan])
    return list(plan * len(rows))


def slow(name: str, loss: Loss, student: Tensor, teacher: Tensor, references: Tensor, mask: Tensor) -> Tensor:
    places = mask.nonzero().tolist()
    more: list[tuple] = [()] * len(places)
    if isinstance(loss, Leopart):
        more = [(row,) for row in transport(loss, [teacher[p, b, n] for p, b, n in places])]
    pairs: list[list[Tensor]] = [[] for _ in range(P)]
    for (p, b, n), target in zip(places, more, strict=True):
        image = student[p, b], teacher[p, b], mask[p, b].nonzero()[:, 0].tolist(), references[p, b]
        found = globals()[name](loss, Patch(student[p, b, n], teacher[p, b, n], *image), *target)
        pairs[p] += [] if found is None else [found]
    return sum(sum(found) / len(found) for found in pairs if found) / P


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("name", LOSSES)
def test_against_loops(name: str, masked: bool) -> None:
    student, teacher, references = inputs()
    student.requires_grad_()
    mask = some() if masked else torch.ones(P, B, N, dtype=torch.bool)
    loss = build(name)
    value, logged = loss(student, teacher, references, mask if masked else None)
    expected = slow(name, loss, student, teacher, references, mask)
    assert torch.allclose(value, expected, rtol=1e-10)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (value, expected))
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10) and ours.any()
    assert not ours[~mask].any(), "masked patches do not count"
    assert all(x.ndim == 0 and not x.requires_grad for x in logged.values())
    if "kl" in logged:
        assert logged["kl"] > 0 and torch.allclose(value, logged["kl"] + logged["entropy"])


def value(loss: Loss, *tensors: Tensor | None) -> Tensor:
    return loss(*tensors)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_masked_patches_do_not_matter(name: str) -> None:
    student, teacher, references = inputs()
    mask, loss = some(), build(name)
    before = value(loss, student, teacher, references, mask)
    student[~mask], teacher[~mask] = math.nan, 100.0
    assert torch.equal(value(loss, student, teacher, references, mask), before)


@pytest.mark.parametrize("name", LOSSES)
def test_images_pairs_references_and_patches_in_any_order(name: str) -> None:
    tensors, loss = inputs(), build(name)
    before = value(loss, *tensors)
    student, teacher, references = tensors
    for moved in (
        [x.flip(0) for x in tensors],
        [x.flip(1) for x in tensors],
        [student.flip(2), teacher.flip(2), references],
        [student, teacher, references.flip(2)],
    ):
        assert torch.allclose(value(loss, *moved), before, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_scale(name: str) -> None:
    """Vectors count by their direction alone; kernels of paka by the scale that all patches of a side share, too."""
    student, teacher, references = inputs()
    loss, generator = build(name), torch.Generator().manual_seed(5)
    before = value(loss, student, teacher, references)
    assert torch.allclose(value(loss, 3 * student, 0.2 * teacher, 7 * references), before, rtol=1e-12)
    scales = 0.5 + torch.rand(P, B, N, 1, generator=generator, dtype=torch.float64)
    after = value(loss, scales * student, scales.flip(1) * teacher, references)
    assert torch.allclose(after, before, rtol=1e-12) != (name == "paka")


@pytest.mark.parametrize("name", LOSSES)
def test_a_common_rotation_of_the_teacher(name: str) -> None:
    """What compares patches within a side does not see it, all else does; nobody sees one that all share."""
    student, teacher, references = inputs()
    loss = build(name)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]
    before = value(loss, student, teacher, references)
    turned = value(loss, student, teacher @ turn, references)
    assert torch.allclose(turned, before, rtol=1e-12) == (name in ("gram", "paka"))
    for weight in loss.parameters():
        weight.data = weight.data @ turn
    assert torch.allclose(value(loss, student @ turn, teacher @ turn, references @ turn), before, rtol=1e-12)


def test_paka_does_not_see_a_shift_and_gram_does() -> None:
    student, teacher, references = inputs()
    shift = torch.arange(D, dtype=torch.float64)
    for name, seen in (("paka", False), ("gram", True)):
        before, after = (value(build(name), student, x, references) for x in (teacher, teacher + shift))
        assert torch.allclose(before, after, rtol=1e-9) != seen


def test_prototypes_in_any_order() -> None:
    loss, tensors = build("leopart"), inputs()
    before = value(loss, *tensors)
    for layer in (loss.student, loss.teacher):
        layer.weight.data = layer.weight.data.flip(0)
    assert torch.allclose(value(loss, *tensors), before, rtol=1e-12)


def test_prototypes_train_and_their_copy_does_not() -> None:
    loss = build("leopart")
    value(loss, *inputs()).backward()
    assert loss.student.weight.grad.any() and loss.teacher.weight.grad is None
    loss = Leopart(prototypes=K)
    loss.attach(D)
    assert torch.equal(loss.student.weight, loss.teacher.weight), "the copy starts equal"


@pytest.mark.parametrize("epsilon", (0.005, 0.05, 10.0))
def test_assignments_are_balanced_and_finite(epsilon: float) -> None:
    scores = torch.rand(50, K, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plan = sinkhorn(scores, epsilon, 200)
    assert torch.allclose(plan.sum(1), torch.ones(50, dtype=torch.float64))
    assert torch.allclose(plan.sum(0), torch.full((K,), 50 / K, dtype=torch.float64), rtol=0.02)
    away = sinkhorn(torch.tensor([[1.0, -1.0]] * 4), epsilon, 3)  # nobody wants the second
    assert away.isfinite().all() and torch.allclose(away.sum(1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("name", ("soft_ce", "cosine", "gram", "paka"))  # the others have targets of their own
def test_equal_sides_are_the_minimum(name: str) -> None:
    student, _, references = inputs()
    student.requires_grad_()
    loss, same = build(name), student.detach()
    if isinstance(loss, SoftCE):
        loss.teacher_temperature = loss.student_temperature
    found, logged = loss(student, same, references)
    assert torch.allclose(logged.get("kl", found), torch.zeros((), dtype=torch.float64), atol=1e-12)
    assert torch.autograd.grad(found, student)[0].abs().max() < 1e-10


@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_patches_are_finite_and_autocast_changes_nothing(name: str) -> None:
    """One image; patches that are all the same, zero, or noise."""
    loss = build(name).float()
    noise = torch.randn(2, 1, N, D, generator=torch.Generator().manual_seed(3))
    for patches in (noise, torch.ones(2, 1, N, D), torch.zeros(2, 1, N, D)):
        found = []
        for enabled in (False, True):
            student = patches.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                result = value(loss, student, patches.flip(2), patches.flip(2))
            result.backward()
            found.append((result.detach(), student.grad))
        assert all(x.isfinite().all() for x in found[0]) and found[0][0].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    half = [x.bfloat16() for x in (noise, noise, noise)]
    assert torch.equal(value(loss, *half), value(loss, *(x.float() for x in half)))


@pytest.mark.parametrize("name", LOSSES)
def test_who_gets_a_gradient(name: str) -> None:
    student, teacher, references = (x.requires_grad_() for x in inputs())
    value(build(name), student, teacher, references).backward()
    assert student.grad.any() and teacher.grad is None
    assert (references.grad is not None) == (name in ("soft_ce", "infonce"))


def test_accuracy_counts_who_is_nearest_to_its_own() -> None:
    student, _, references = inputs()
    teacher = student.clone()
    teacher[0] = -teacher[0]
    assert InfoNCE()(student, teacher, references)[1]["accuracy"] == torch.tensor(2 / 3, dtype=torch.float64)


def test_a_single_patch_has_no_order() -> None:
    for name in ("soft_ce", "infonce"):
        with pytest.raises(NecoError, match="grid=1"):
            type(build(name))(grid=1)
