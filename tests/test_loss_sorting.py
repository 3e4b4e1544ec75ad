"""Sorting against `diffsort` in float64, the fused loss against the plain one, then invariances and hard inputs."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffsort import DiffSortNet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neco.errors import NecoError
from neco.loss import sorting
from neco.loss.sorting import comparators, soft_sort, sort_cross_entropy

NETWORKS = ("bitonic", "odd_even")
SIZES = (2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64)
both = pytest.mark.parametrize("network", NETWORKS)


def values(rows: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows in -1..1; of the first three one is all ties, one has pairs of ties and one is in order."""
    x = torch.rand(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    for row, special in zip(x, (torch.full((n,), 0.3), x[0].round(decimals=1), x[0].sort()[0]), strict=False):
        row.copy_(special)
    return x.to(dtype)


def plain_loss(x: Tensor, y: Tensor, network: str, student: float, teacher: float) -> tuple[Tensor, Tensor]:
    p, q = soft_sort(x, network, student)[1], soft_sort(y, network, teacher)[1]
    return -(q * p.log()).sum(2).mean(1), -(q * q.log()).sum(2).mean(1)


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    return bool((a - b).norm() <= relative * b.norm())


@both
@pytest.mark.parametrize("n", SIZES)
def test_equal_to_diffsort(network: str, n: int) -> None:
    x, y = values(5, n).requires_grad_(), values(5, n, seed=1)
    oracle = DiffSortNet(network, n, steepness=100.0)
    (sorted_x, p), (_, q) = oracle(x), oracle(y)
    ours, permutations = soft_sort(x, network, 100.0)
    assert (p - permutations).abs().max() < 1e-12 and (sorted_x - ours).abs().max() < 1e-12
    weight = values(5, n * n, seed=2).view(5, n, n)
    (expected,) = torch.autograd.grad((p * weight).sum() + sorted_x.square().sum(), x, retain_graph=True)
    (gradient,) = torch.autograd.grad((permutations * weight).sum() + ours.square().sum(), x)
    assert close(gradient, expected, 1e-10)

    loss, per_row = -(q * p.log()).sum(2).mean(1), torch.arange(5.0)
    fused, entropy = sort_cross_entropy(x, y, network, 100.0, 100.0)
    assert (fused - loss).abs().max() < 1e-12
    assert (entropy + (q * q.log()).sum(2).mean(1)).abs().max() < 1e-12
    (expected,) = torch.autograd.grad((loss * per_row).sum(), x)
    (gradient,) = torch.autograd.grad((fused * per_row).sum(), x)
    assert close(gradient, expected, 1e-10)


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
@pytest.mark.parametrize("steepness", (1.0, 10.0, 100.0, 1000.0))
@pytest.mark.parametrize("spread", (1e-3, 0.2, 1.0))
def test_float32(network: str, steepness: float, spread: float) -> None:
    """The loss to 1e-4 relative of float64; it and its gradient finite, ties and exact zeros of P included."""
    exact = (values(64, 49) * spread, values(64, 49, seed=1) * spread)
    x, y = (v.float().requires_grad_() for v in exact)
    loss, entropy = sort_cross_entropy(x, y, network, steepness, steepness)
    loss.sum().backward()
    expected, floor = sort_cross_entropy(*exact, network, steepness, steepness)
    assert torch.allclose(loss.mean().double(), expected.mean(), rtol=1e-4)
    assert torch.allclose(entropy.mean().double(), floor.mean(), rtol=1e-4)
    assert loss.isfinite().all() and entropy.isfinite().all() and x.grad.isfinite().all() and x.grad.any()


@both
def test_a_million_steep_is_still_finite(network: str) -> None:
    x, y = values(64, 49).float().requires_grad_(), values(64, 49, seed=1).float()
    loss, entropy = sort_cross_entropy(x, y, network, 1e6, 1e6)
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
