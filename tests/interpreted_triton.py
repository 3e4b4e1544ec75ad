"""The Triton engine in Triton's interpreter against the torch engine in float64. Run by test_loss_sorting_triton.py."""

import re
import runpy
import sys

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from neco.loss.neco import NeCo
from neco.loss.relaxation import RELAXATIONS
from neco.loss.shuffled import Shuffled
from neco.loss.sorting import sort_cross_entropy

both = pytest.mark.parametrize("network", ("bitonic", "odd_even"))


def values(rows: int, n: int) -> tuple[Tensor, Tensor]:
    """A student and a teacher near it; the student's first row is all ties, its second in order."""
    x, noise = torch.rand(2, rows, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 2 - 1
    y = x + 0.1 * noise
    for row, special in zip(x, (torch.full((n,), 0.3), x[-1].sort()[0]), strict=False):
        row.copy_(special)
    return x.float(), y.float()


def compare(x: Tensor, y: Tensor, network: str, student: float, teacher: float, name: str = "cauchy") -> None:
    """Loss, entropy and gradient, each row weighted differently, against the torch engine."""
    found = []
    for engine, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        own = x.to(dtype).requires_grad_()
        loss, entropy = sort_cross_entropy(
            own, y.to(dtype), network, student, teacher, RELAXATIONS[name], engine=engine
        )
        (gradient,) = torch.autograd.grad(loss @ torch.arange(1, len(x) + 1).to(dtype), own)
        found.append((loss.detach(), entropy, gradient))
    for ours, exact in zip(*found, strict=True):
        assert ours.dtype == torch.float32 and (ours - exact).norm() <= 3e-5 * exact.norm()


@both
@pytest.mark.parametrize(
    ("n", "name"), [(2, "cauchy"), (5, "cauchy"), (8, "cauchy"), (5, "reciprocal"), (5, "optimal")]
)
def test_equal_to_torch(network: str, n: int, name: str) -> None:
    steepness = RELAXATIONS[name].steepness
    compare(*values(3, n), network, 0.9 * steepness, 0.5 * steepness, name)


@pytest.mark.parametrize(("network", "n"), [("bitonic", 16), ("bitonic", 17), ("odd_even", 11), ("bitonic", 49)])
def test_several_blocks_of_items(network: str, n: int) -> None:
    x, y = values(3, n)
    compare(x[2:], y[2:], network, 100.0, 60.0)


@both
@pytest.mark.parametrize(("spread", "steepness"), [(1e-30, 1.0), (1.0, 1e-3), (1.0, 100.0), (1e30, 10.0)])
def test_extremes(network: str, spread: float, steepness: float) -> None:
    """Values that differ by nothing and values that are out of reach; as torch's float32, all finite."""
    x, y = (v * spread for v in values(2, 8))
    results = []
    for engine in ("triton", "torch"):
        own = x.clone().requires_grad_()
        loss, entropy = sort_cross_entropy(own, y, network, steepness, steepness, engine=engine)
        results.append(torch.stack([loss, entropy, torch.autograd.grad(loss.sum(), own)[0].norm(dim=1)]).detach())
    assert results[0].isfinite().all() and torch.allclose(*results, rtol=1e-3, atol=1e-6)


def test_shares_that_vanish() -> None:
    """Below the smallest normal number: counted as that, without gradient."""
    x = torch.tensor([[0.0, 1e38], [1e38, 0.0]]).requires_grad_()
    loss, entropy = sort_cross_entropy(x * 2, x.detach().flip(1), "bitonic", 1.0, 1.0, engine="triton")
    loss.sum().backward()
    tiny = torch.tensor(torch.finfo(torch.float32).tiny)
    assert torch.allclose(loss, -tiny.log()) and not x.grad.any() and (entropy < 1e-30).all()


def test_a_network_that_diverges_shows() -> None:
    x = torch.tensor([[0.1, 0.2, float("nan")], [0.1, 0.2, 0.3]]).requires_grad_()
    loss, _ = sort_cross_entropy(x, x.detach().nan_to_num(), engine="triton")
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False] and x.grad.isnan().any(1).tolist() == [True, False]


def test_repeats_bit_by_bit_and_without_gradient() -> None:
    x, y = values(13, 2)  # more rows than programs
    first, again = (sort_cross_entropy(x.requires_grad_(), y, engine="triton")[0] for _ in range(2))
    with torch.no_grad():
        plain, _ = sort_cross_entropy(x, y, engine="triton")
    assert torch.equal(first, again) and torch.equal(first, plain) and not plain.requires_grad
    assert sort_cross_entropy(x[:0], y[:0], engine="triton")[0].shape == (0,)


@pytest.mark.parametrize("loss", (NeCo, Shuffled))
def test_through_the_loss(loss: type[NeCo]) -> None:
    """As training calls it, in autocast, with a mask and with references that carry gradient."""
    generator, results = torch.Generator().manual_seed(0), []
    student, teacher, references = (torch.randn(1, 2, 3, 6, generator=generator) for _ in range(3))
    mask = torch.tensor([[[True, False, True], [True, True, False]]])
    for engine in ("triton", "torch"):
        inputs = [x.clone().requires_grad_() for x in (student, teacher, references)]
        with torch.autocast("cpu", torch.bfloat16):
            total, parts = loss(engine=engine, reference_count=3)(*inputs, mask)
        total.backward()
        assert inputs[1].grad is None
        results.append([total.detach(), *parts.values(), inputs[0].grad, inputs[2].grad])
    for ours, torchs in zip(*results, strict=True):
        assert ours.dtype == torch.float32 and torch.allclose(ours, torchs, rtol=1e-4, atol=1e-6)


def test_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of the GPU: all three have the same loss."""
    small = {"batch": 1, "pairs": 2, "patches": 1, "n": 5, "network": "bitonic", "dim": 8, "repeat": 1}
    options = [f"--{key}={value}" for key, value in small.items()]
    monkeypatch.setattr(sys, "argv", ["bench_loss.py", "--engines", *options])
    runpy.run_path(str(ROOT / "scripts" / "bench_loss.py"), run_name="__main__")
    said = dict(re.findall(r"\| (\w+) +\|.*x \|.* ([\d.]+)$", capsys.readouterr().out, re.MULTILINE))
    losses = [float(said[who]) for who in ("triton", "torch", "diffsort")]
    assert losses == pytest.approx([losses[2]] * 3, rel=1e-5) and losses[0] > 0.1
