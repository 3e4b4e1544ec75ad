"""Relaxations of a comparator: the share of each other's value that two wires exchange, by how far apart they are.

A comparator of steepness s on values x_a, x_b exchanges the share 1 - alpha(v), v = s (x_b - x_a), where alpha is a
cumulative distribution. Each share keeps its relative precision however small it is: the loss takes the logarithm.

- cauchy, reciprocal, optimal: Petersen et al., "Monotonic differentiable sorting networks" (ICLR 2022)
- logistic, logistic_phi: Petersen et al., "Differentiable sorting networks for scalable sorting and ranking
  supervision" (ICML 2021)
- gaussian: the normal distribution, the other sigmoid that PyPI `diffsort` has

The defaults make orders as sharp as cauchy's 100, the published steepness. Usable (docs/relaxations.md), for n = 49 and
a standard deviation of the values of 0.05 to 0.3, bitonic | odd_even:

    cauchy      40 .. 1e6 | 40 .. 1e6       logistic      32 .. 1200 | 25 .. 1200
    reciprocal  80 .. 1e6 | 100 .. 1e6      logistic_phi  16 .. 1000 | 16 .. 1000
    optimal     10 .. 1e6 | 8 .. 1e6        gaussian      20 .. 120  | 16 .. 120
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from neco.utils.errors import NecoError

RelaxationName = Literal["cauchy", "logistic", "logistic_phi", "gaussian", "reciprocal", "optimal"]
ART_LAMBDA = 0.25
EPS = 1e-10  # of `diffsort`: it alone bounds logistic_phi's slope at ties; in optimal it is for equality only


class Relaxation(NamedTuple):
    """`share(v, s, out=None)` and its derivative by v, `slope(v, s)`; s, the steepness, broadcasts with v."""

    share: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    steepness: float  # the default
    float32: dict[str, float]  # by network, the steepness up to which float32 holds P (n = 49, values in -1..1)
    light: bool = False  # exponential tails: 1 - share is 0 long before share(-v) is


def cauchy(v: Tensor, s: Tensor | float, out: Tensor | None = None) -> Tensor:
    """1/2 - atan(v) / pi."""
    return torch.atan2(v.new_ones(()), v, out=out).mul_(1 / math.pi)


def cauchy_slope(v: Tensor, s: Tensor | float) -> Tensor:
    return (v * v + 1).reciprocal_().mul_(-1 / math.pi)


def logistic(v: Tensor, s: Tensor | float, out: Tensor | None = None) -> Tensor:
    """1 / (1 + exp(v))."""
    return torch.sigmoid(-v, out=out)


def logistic_slope(v: Tensor, s: Tensor | float) -> Tensor:
    return torch.sigmoid(v).mul_(torch.sigmoid(-v)).neg_()


def logistic_phi(v: Tensor, s: Tensor | float, out: Tensor | None = None, *, art_lambda: float = ART_LAMBDA) -> Tensor:
    """1 / (1 + exp(v / |d|^lambda)) with d = v / s, the difference itself."""
    return torch.sigmoid(-v / ((v / s).abs() + EPS).pow(art_lambda), out=out)


def logistic_phi_slope(v: Tensor, s: Tensor | float, *, art_lambda: float = ART_LAMBDA) -> Tensor:
    d = (v / s).abs_()
    root = (d + EPS).pow_(art_lambda)
    return logistic_slope(v / root, s).mul_(1 - art_lambda * d / (d + EPS)).div_(root)


def gaussian(v: Tensor, s: Tensor | float, out: Tensor | None = None) -> Tensor:
    """1 - Phi(v)."""
    return torch.erfc(v * math.sqrt(0.5), out=out).mul_(0.5)


def gaussian_slope(v: Tensor, s: Tensor | float) -> Tensor:
    return (v * v).mul_(-0.5).exp_().mul_(-1 / math.sqrt(2 * math.pi))


def reciprocal(v: Tensor, s: Tensor | float, out: Tensor | None = None) -> Tensor:
    """1/2 - v / (4 + 2 |v|)."""
    size = v.abs()
    return torch.div((size - v).mul_(0.5).add_(1), size + 2, out=out)


def reciprocal_slope(v: Tensor, s: Tensor | float) -> Tensor:
    return v.abs().add_(2).square_().reciprocal_().neg_()


def optimal(v: Tensor, s: Tensor | float, out: Tensor | None = None) -> Tensor:
    """1/2 - v where |v| <= 1/4, beyond 1 / (16 v), or 1 + 1 / (16 v) where v is negative."""
    tail = (v.abs() + EPS).mul_(16).reciprocal_()
    return torch.where(v.abs() <= 0.25, 0.5 - v, torch.where(v > 0, tail, 1 - tail), out=out)


def optimal_slope(v: Tensor, s: Tensor | float) -> Tensor:
    size = v.abs()
    return torch.where(size <= 0.25, -1, size.add(EPS).square_().mul_(-16).reciprocal_())


RELAXATIONS: dict[RelaxationName, Relaxation] = {
    "cauchy": Relaxation(cauchy, cauchy_slope, 100.0, {"odd_even": 100.0}),
    "logistic": Relaxation(logistic, logistic_slope, 35.0, {"bitonic": 40.0, "odd_even": 40.0}, light=True),
    "logistic_phi": Relaxation(logistic_phi, logistic_phi_slope, 20.0, {"bitonic": 40.0, "odd_even": 25.0}, light=True),
    "gaussian": Relaxation(gaussian, gaussian_slope, 20.0, {"bitonic": 6.0, "odd_even": 6.0}, light=True),
    "reciprocal": Relaxation(reciprocal, reciprocal_slope, 280.0, {"odd_even": 300.0}),
    "optimal": Relaxation(optimal, optimal_slope, 20.0, {"odd_even": 20.0}),
}
CAUCHY = RELAXATIONS["cauchy"]


def choose(name: RelaxationName, art_lambda: float | None = None) -> Relaxation:
    """The relaxation of that name, of logistic_phi the one with that lambda."""
    if name not in RELAXATIONS:
        raise NecoError(f"relaxation {name!r} does not exist; choose one of {', '.join(RELAXATIONS)}")
    if art_lambda is None:
        return RELAXATIONS[name]
    if name != "logistic_phi":
        raise NecoError(f"art_lambda={art_lambda} belongs to relaxation=logistic_phi; with {name} it must be null")
    share, slope = (partial(part, art_lambda=art_lambda) for part in (logistic_phi, logistic_phi_slope))
    # The larger lambda, the smaller is the product of many small steps' shares, and of P's entries.
    float32 = RELAXATIONS[name].float32 if art_lambda <= ART_LAMBDA else {"bitonic": 0.0, "odd_even": 0.0}
    return RELAXATIONS[name]._replace(share=share, slope=slope, float32=float32)
