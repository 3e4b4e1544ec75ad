"""Shares against their formulas in high precision, slopes against automatic differentiation."""

import math

import pytest
import torch

from neco.loss.relaxation import RELAXATIONS, choose
from neco.utils.errors import NecoError

each = pytest.mark.parametrize("name", RELAXATIONS)
V = torch.cat([x := torch.logspace(-12, 1, 40, dtype=torch.float64), -x, torch.tensor([0, 0.25, -0.25], dtype=x.dtype)])
TAILS = {  # log of the share
    "cauchy": lambda v, d: (torch.atan(1 / v) / math.pi).log(),
    "logistic": lambda v, d: -torch.log1p(v.exp()),
    "logistic_phi": lambda v, d: -torch.log1p((v / (d + 1e-10) ** 0.25).exp()),
    "gaussian": lambda v, d: torch.special.log_ndtr(-v),
    "reciprocal": lambda v, d: -(v + 2).log(),
    "optimal": lambda v, d: -(16 * v).log(),
}


@each
def test_halves_at_a_tie_and_both_sides_sum_to_one(name: str) -> None:
    share = RELAXATIONS[name].share
    assert torch.equal(share(V[-3:-2], 7.0), torch.tensor([0.5], dtype=V.dtype))
    assert torch.allclose(share(V, 7.0) + share(-V, 7.0), torch.ones_like(V), rtol=1e-14)
    assert (share(V.sort()[0], 7.0).diff() <= 0).all()
    assert torch.equal(share(V, 7.0, out=torch.empty_like(V)), share(V, 7.0))


@each
def test_slope_is_the_derivative(name: str) -> None:
    v = V.clone().requires_grad_()
    (expected,) = torch.autograd.grad(RELAXATIONS[name].share(v, 7.0).sum(), v)
    assert torch.allclose(RELAXATIONS[name].slope(V, 7.0), expected, rtol=1e-8, atol=0) and expected.isfinite().all()


@each
def test_smallest_shares_keep_their_precision(name: str) -> None:
    v = torch.linspace(1, 12 if name == "gaussian" else 60, 50)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        share = RELAXATIONS[name].share(v.to(dtype), 40.0).double()
        assert torch.allclose(share, TAILS[name](v.double(), v.double() / 40).exp(), rtol=tolerance, atol=0)


def test_lambda_belongs_to_logistic_phi() -> None:
    assert torch.equal(choose("logistic_phi", 0.25).share(V, 7.0), choose("logistic_phi").share(V, 7.0))
    assert not torch.equal(choose("logistic_phi", 0.5).slope(V, 7.0), choose("logistic_phi").slope(V, 7.0))
    with pytest.raises(NecoError, match=r"art_lambda=0\.5 belongs to relaxation=logistic_phi; with cauchy it must be"):
        choose("cauchy", 0.5)
    with pytest.raises(NecoError, match="'normal' does not exist; choose one of cauchy, logistic, "):
        choose("normal")
