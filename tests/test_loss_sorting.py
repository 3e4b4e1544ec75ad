"""Sorting against `diffsort` in float64, the fused loss against the plain one, then invariances and hard inputs."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffsort import DiffSortNet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from neco.loss import sorting
from neco.loss.relaxation import CAUCHY, RELAXATIONS, Relaxation, choose
from neco.loss.sorting import comparators, soft_sort, sort_cross_entropy
from neco.utils.errors import NecoError

NETWORKS = ("bitonic", "odd_even")
SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64)
both = pytest.mark.parametrize("network", NETWORKS)
each = pytest.mark.parametrize("name", RELAXATIONS)
# At which `diffsort` is exact too: with exponential tails its 1 - alpha soon loses the small shares, and the gradient
# of its gaussian rounds 1 / steepness to float32.
TOGETHER = {
    "cauchy": 100.0,
    "logistic": 4.0,
    "logistic_phi": 4.0,
    "gaussian": 2.0,
    "reciprocal": 280.0,
    "optimal": 20.0,
}


def values(rows: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows in -1..1; of the first three one is all ties, one has pairs of ties and one is in order."""
    x = torch.rand(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    for row, special in zip(x, (torch.full((n,), 0.3), x[0].round(decimals=1), x[0].sort()[0]), strict=False):
        row.copy_(special)
    return x.to(dtype)


def plain_loss(
    x: Tensor, y: Tensor, network: str, student: float, teacher: float, relaxation: Relaxation = CAUCHY
) -> tuple[Tensor, Tensor]:
    p, q = (soft_sort(v, network, s, relaxation)[1] for v, s in ((x, student), (y, teacher)))
    return -(q * p.log()).sum(2).mean(1), -(q * q.log()).sum(2).mean(1)


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    return bool((a - b).norm() <= relative * b.norm())


def close_rows(a: Tensor, b: Tensor, relative: float) -> bool:
    return all(close(*pair, relative) for pair in zip(a, b, strict=True))


@both
@pytest.mark.parametrize(
    ("name", "n"),
    [("cauchy", n) for n in SIZES] + [(name, n) for name in [*RELAXATIONS][1:] for n in (4, 5, 16, 31, 49, 64)],
)
def test_equal_to_diffsort(network: str, name: str, n: int) -> None:
    x, y, relaxation, steepness = values(5, n).requires_grad_(), values(5, n, 1).flip(0), choose(name), TOGETHER[name]
    oracle = DiffSortNet(network, n, steepness=steepness, distribution=name)
    (sorted_x, p), (_, q) = oracle(x), oracle(y)
    ours, permutations = soft_sort(x, network, steepness, relaxation)
    assert (p - permutations).abs().max() < 1e-12 and (sorted_x - ours).abs().max() < 1e-12
    weight = values(5, n * n, seed=2).view(5, n, n)
    (expected,) = torch.autograd.grad((p * weight).sum() + sorted_x.square().sum(), x, retain_graph=True)
    (gradient,) = torch.autograd.grad((permutations * weight).sum() + ours.square().sum(), x)
    assert close_rows(gradient, expected, 1e-10)

    loss, per_row = -(q * p.log()).sum(2).mean(1), torch.arange(1.0, 6.0)
    fused, entropy = sort_cross_entropy(x, y, network, steepness, steepness, relaxation)
    assert (fused - loss).abs().max() < 1e-12
    assert (entropy + (q * q.log()).sum(2).mean(1)).abs().max() < 1e-12
    (expected,) = torch.autograd.grad((loss * per_row).sum(), x)
    (gradient,) = torch.autograd.grad((fused * per_row).sum(), x)
    assert close_rows(gradient, expected, 1e-10) and expected[1:].any(1).all()

    p = DiffSortNet(network, n, steepness=relaxation.steepness, distribution=name)(x)[1]
    assert (p - soft_sort(x, network, relaxation=relaxation)[1]).abs().max() < 1e-12


@both
@each
def test_student_and_teacher_have_their_own_steepness(network: str, name: str) -> None:
    x, y = values(40, 9)[1:].requires_grad_(), values(40, 9, seed=1)[1:]
    loss, entropy = sort_cross_entropy(x, y, network, 5.0, 3.0, RELAXATIONS[name])
    expected, floor = plain_loss(x, y, network, 5.0, 3.0, RELAXATIONS[name])
    assert torch.allclose(loss, expected, rtol=1e-12) and torch.allclose(entropy, floor, rtol=1e-12)
    assert close_rows(*(torch.autograd.grad(v.sum(), x)[0] for v in (loss, expected)), 1e-10)


@both
@pytest.mark.parametrize("art_lambda", (0.0, 0.1, 0.6))
def test_other_lambda(network: str, art_lambda: float) -> None:
    x, y, relaxation = values(5, 9).requires_grad_(), values(5, 9, 1).flip(0), choose("logistic_phi", art_lambda)
    oracle = DiffSortNet(network, 9, steepness=4.0, distribution="logistic_phi", art_lambda=art_lambda)
    expected = -(oracle(y)[1] * oracle(x)[1].log()).sum(2).mean(1)
    loss, _ = sort_cross_entropy(x, y, network, 4.0, 4.0, relaxation)
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert close_rows(*(torch.autograd.grad(v.sum(), x)[0] for v in (loss, expected)), 1e-10)
    exact = values(16, 49), values(16, 49, seed=1)
    loss32, _ = sort_cross_entropy(*(v.float() for v in exact), network, 25.0, 25.0, relaxation)
    assert torch.allclose(
        loss32.mean().double(), sort_cross_entropy(*exact, network, 25.0, 25.0, relaxation)[0].mean(), rtol=1e-4
    )
    if not art_lambda:
        assert torch.equal(loss, sort_cross_entropy(x, y, network, 4.0, 4.0, RELAXATIONS["logistic"])[0])


LOGARITHMS = {
    "logistic": lambda d, s: F.logsigmoid(-s * d),
    "logistic_phi": lambda d, s: F.logsigmoid(-s * d / (d.abs() + 1e-10) ** 0.25),
    "gaussian": lambda d, s: torch.special.log_ndtr(-s * d),
}


def log_permutations(x: Tensor, network: str, steepness: float, name: str) -> Tensor:
    """log P of rows x, one comparator after the other, in logarithms throughout."""
    n, log_share = x.shape[1], LOGARITHMS[name]
    wires = [*x.unbind(1)]
    log_p = [*torch.eye(n, dtype=x.dtype).log().clamp_min(-1e9)[:, :, None].expand(n, n, len(x))]
    for block in comparators(network, n):
        a, b = (side.flatten().tolist() for side in block.sides(torch.arange(n)[:, None, None]))
        for at, (i, j) in enumerate(zip(a, b, strict=True)):
            d = block.signs[at // (block.size // block.blocks)] * (wires[j] - wires[i])
            share, rest = log_share(d, steepness), log_share(-d, steepness)
            wires[i], wires[j] = (
                u * wires[i] + v * wires[j] for u, v in ((rest.exp(), share.exp()), (share.exp(), rest.exp()))
            )
            log_p[i], log_p[j] = (
                torch.logaddexp(rest + log_p[i], share + log_p[j]),
                torch.logaddexp(share + log_p[i], rest + log_p[j]),
            )
    return torch.stack(log_p, 2).permute(1, 0, 2)


@both
@pytest.mark.parametrize(("name", "steepness"), [("logistic", 200.0), ("logistic_phi", 200.0), ("gaussian", 20.0)])
def test_exponential_tails_lose_nothing(network: str, name: str, steepness: float) -> None:
    """Entries of P below 1e-100, and the little that shares near 1 leave."""
    x, y = values(8, 17)[3:].requires_grad_(), values(5, 17, seed=1)
    log_p, log_q = (log_permutations(v, network, steepness, name) for v in (x, y))
    expected = -(log_q.exp() * log_p).sum(2).mean(1)
    loss, _ = sort_cross_entropy(x, y, network, steepness, steepness, RELAXATIONS[name])
    assert log_p.exp().min() < 1e-100 and torch.allclose(loss, expected, rtol=1e-10)
    assert close_rows(*(torch.autograd.grad(v.sum(), x)[0] for v in (loss, expected)), 1e-11)


USABLE = {  # lowest and highest steepness, bitonic and odd_even: docs/relaxations.md
    "cauchy": ((40.0, 1e6), (40.0, 1e6)),
    "reciprocal": ((80.0, 1e6), (100.0, 1e6)),
    "optimal": ((10.0, 1e6), (8.0, 1e6)),
    "logistic": ((32.0, 1200.0), (25.0, 1200.0)),
    "logistic_phi": ((16.0, 1000.0), (16.0, 1000.0)),
    "gaussian": ((20.0, 120.0), (16.0, 120.0)),
}


def similarities(spread: float, rows: int = 16, n: int = 49) -> tuple[Tensor, Tensor]:
    """Like the cosines of a student and a teacher to their references: correlation 0.8."""
    common, own = torch.randn(2, rows, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * spread
    return (0.4 + 0.8 * common + 0.6 * own).float(), (0.4 + common).float()


@both
@each
@pytest.mark.parametrize("spread", (0.05, 0.3))
def test_usable(network: str, name: str, spread: float) -> None:
    """At the default and the ends of its range a relaxation says something of the order, and rows have a gradient."""
    x, y = similarities(spread)
    for steepness in (RELAXATIONS[name].steepness, *USABLE[name][NETWORKS.index(network)]):
        x = x.detach().requires_grad_()
        loss, entropy = sort_cross_entropy(x, y, network, steepness, steepness, RELAXATIONS[name])
        loss.sum().backward()
        assert loss.isfinite().all() and x.grad.isfinite().all()
        assert (x.grad.abs().amax(1) >= torch.finfo(torch.float32).tiny).float().mean() >= 0.5
        tied, _ = sort_cross_entropy(torch.zeros_like(y), y, network, steepness, steepness, RELAXATIONS[name])
        assert (tied - entropy).mean() > 0.01 * math.log(49) and entropy.mean() < math.log(49)
        p, q = soft_sort(torch.cat([x.detach(), y]).double(), network, steepness, RELAXATIONS[name])[1].chunk(2)
        assert q[p < torch.finfo(torch.float64).tiny].sum() < 0.01 * q.sum()


@each
def test_defaults_are_equally_sharp(name: str) -> None:
    _, y = similarities(0.1)
    entropies = [sort_cross_entropy(y, y, relaxation=relaxation)[1].mean() for relaxation in (choose(name), CAUCHY)]
    assert abs(entropies[0] - entropies[1]) < 0.1


@both
def test_two_values_by_hand(network: str) -> None:
    x = torch.tensor([[0.2, -0.1]], dtype=torch.float64)
    alpha = math.atan(10 * (-0.1 - 0.2)) / math.pi + 0.5
    ascending, p = soft_sort(x, network, 10.0)
    assert torch.allclose(p, torch.tensor([[[alpha, 1 - alpha], [1 - alpha, alpha]]], dtype=torch.float64))
    assert torch.allclose(ascending[0, 0], torch.tensor(alpha * 0.2 - (1 - alpha) * 0.1, dtype=torch.float64))


def test_counts_and_disjoint_wires() -> None:
    assert sum(block.size for block in comparators("bitonic", 49)) == 483
    assert sum(block.size for block in comparators("odd_even", 49)) == 1176
    for network in NETWORKS:
        for n in range(2, 70):
            for block in comparators(network, n):
                a, b = (side.flatten() for side in block.sides(torch.arange(n)[:, None, None]))
                assert len({*a.tolist(), *b.tolist()}) == 2 * block.size and len(block.signs) == block.blocks
                assert torch.equal(b - a, torch.full_like(a, block.reach))


@both
@pytest.mark.parametrize("n", (2, 7, 16, 49))
def test_steep_is_hard_sorting(network: str, n: int) -> None:
    x = values(8, n)[3:]
    ascending, p = soft_sort(x, network, 1e12)
    assert torch.allclose(ascending, x.sort()[0], atol=1e-6)
    assert torch.equal(p.argmax(1), x.argsort())


@both
@given(n=st.integers(2, 40), seed=st.integers(0, 1000), steepness=st.floats(0.1, 1000), shift=st.floats(-5, 5))
@settings(max_examples=30, deadline=None)
def test_invariances(network: str, n: int, seed: int, steepness: float, shift: float) -> None:
    x = values(4, n, seed)
    ascending, p = soft_sort(x, network, steepness)
    ones = torch.ones(4, n, dtype=x.dtype)
    assert torch.allclose(p.sum(1), ones) and torch.allclose(p.sum(2), ones) and (p > -1e-15).all()
    assert torch.allclose(ascending, (x[:, None] @ p)[:, 0])
    assert torch.allclose(soft_sort(x + shift, network, steepness)[1], p, atol=1e-9)
    assert torch.allclose(soft_sort(x * 4, network, steepness / 4)[1], p, atol=1e-9)
    assert torch.equal(soft_sort(x.view(2, 2, n), network, steepness)[1], p.view(2, 2, n, n))


@both
def test_gradients_by_differences(network: str) -> None:
    x, y = values(4, 6).requires_grad_(), values(4, 6, seed=1)
    assert torch.autograd.gradcheck(lambda x: soft_sort(x, network, 3.0), x)
    assert torch.autograd.gradcheck(lambda x: sort_cross_entropy(x, y, network, 3.0, 5.0)[0], x)


@both
@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (31, 2), (33, 1), (300, 2), (300, 1)])
def test_chunks_and_threads_change_nothing(
    network: str, rows: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "CPU_ROWS", 32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, y = values(rows + 3, 11)[3:].requires_grad_(), values(rows, 11, seed=1)
        weight = torch.arange(1.0, rows + 1)
        loss, entropy = sort_cross_entropy(x, y, network, 50.0, 70.0)
        (gradient,) = torch.autograd.grad(loss @ weight.double(), x)
        with ThreadPoolExecutor(1) as pool:  # a new thread asks the process, this one would remember
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    expected, floor = plain_loss(x, y, network, 50.0, 70.0)
    assert torch.allclose(loss, expected, rtol=1e-12) and torch.allclose(entropy, floor, rtol=1e-12)
    assert close(gradient, torch.autograd.grad(expected @ weight.double(), x)[0], 1e-11)
    with torch.inference_mode():
        assert torch.equal(sort_cross_entropy(x, y, network, 50.0, 70.0)[0], loss)


@both
@each
@pytest.mark.parametrize("steepness", (1.0, 10.0, 100.0, 1000.0, None))
@pytest.mark.parametrize("spread", (1e-3, 0.2, 1.0))
def test_float32(network: str, name: str, steepness: float | None, spread: float) -> None:
    """The loss to 1e-4 relative of float64; it and its gradient finite, ties and exact zeros of P included."""
    relaxation = RELAXATIONS[name]
    steepness = steepness or relaxation.float32.get(network, 1e4)  # None: the steepest that is computed in float32
    exact = (values(16, 49) * spread, values(16, 49, seed=1) * spread)
    x, y = (v.float().requires_grad_() for v in exact)
    loss, entropy = sort_cross_entropy(x, y, network, steepness, steepness, relaxation)
    loss.sum().backward()
    expected, floor = sort_cross_entropy(*exact, network, steepness, steepness, relaxation)
    assert torch.allclose(loss.mean().double(), expected.mean(), rtol=1e-4)
    assert torch.allclose(entropy.mean().double(), floor.mean(), rtol=1e-4)
    assert loss.isfinite().all() and entropy.isfinite().all() and x.grad.isfinite().all() and x.grad.any()


@both
@each
def test_a_million_steep_is_still_finite(network: str, name: str) -> None:
    x, y = values(16, 49).float().requires_grad_(), values(16, 49, seed=1).float()
    loss, entropy = sort_cross_entropy(x, y, network, 1e6, 1e6, RELAXATIONS[name])
    loss.sum().backward()
    assert loss.isfinite().all() and entropy.isfinite().all() and x.grad.isfinite().all()


def test_vanishing_shares_count_as_the_smallest_normal_number() -> None:
    x, y = values(16, 64).float().requires_grad_(), values(16, 64, seed=1).float()
    p, q = (soft_sort(v, "odd_even", 100.0)[1] for v in (x, y))
    tiny = torch.finfo(torch.float32).tiny
    assert (p == 0).any() and (q[p < tiny] > 0).any()
    expected = -(q.detach() * p.clamp_min(tiny).log()).sum(2).mean(1)
    loss, _ = sort_cross_entropy(x, y, "odd_even")
    assert torch.allclose(loss, expected, rtol=1e-4)
    gradients = [torch.autograd.grad(v.sum(), x)[0] for v in (loss, expected)]
    assert gradients[0].isfinite().all() and close(*gradients, 1e-3)


@both
def test_half_precision_is_computed_in_float32(network: str) -> None:
    x, y = (values(8, 49, seed, torch.bfloat16) for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = sort_cross_entropy(x.requires_grad_(), y, network)
        p = soft_sort(x, network)[1]
    assert loss.dtype == p.dtype == torch.float32
    assert torch.equal(loss, sort_cross_entropy(x.float(), y.float(), network)[0])
    assert torch.allclose(p.sum(2), torch.ones(8, 49), atol=1e-5)
    loss.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()


def test_only_the_loss_and_the_student_are_differentiated() -> None:
    x, y = values(4, 5).requires_grad_(), values(4, 5, seed=1).requires_grad_()
    loss, entropy = sort_cross_entropy(x, y)
    assert loss.requires_grad and not entropy.requires_grad
    loss.sum().backward()
    assert y.grad is None
    with torch.no_grad():
        assert not sort_cross_entropy(x, y)[0].requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_sort(torch.zeros(3, 1)), "at least 2 values, got n = 1"),
        (lambda: soft_sort(torch.zeros(3, 4), "merge"), "'merge' does not exist; choose one of bitonic, odd_even"),
        (lambda: sort_cross_entropy(torch.zeros(3, 4), torch.zeros(3, 5)), r"got \(3, 4\) and \(3, 5\)"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(NecoError, match=message):
        call()


def test_no_rows() -> None:
    loss, entropy = sort_cross_entropy(torch.zeros(0, 4), torch.zeros(0, 4))
    assert loss.shape == entropy.shape == (0,)
