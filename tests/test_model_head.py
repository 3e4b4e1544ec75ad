"""The projection head against the same multiplications by hand, and at its edges."""

import pytest
import torch

from neco.model.head import Head


def test_layers_and_length() -> None:
    torch.manual_seed(0)
    head = Head(24, hidden=40, out=16).double()
    tokens = torch.randn(2, 3, 3, 24, dtype=torch.float64)
    x = tokens
    for i, (weight, bias) in enumerate(zip(*[iter(head.parameters())] * 2, strict=True)):
        if i:
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        x = torch.einsum("...i,oi->...o", x, weight) + bias
    assert i == 2 and x.shape == (2, 3, 3, 16)
    torch.testing.assert_close(head(tokens), x / x.pow(2).sum(-1, keepdim=True).sqrt())


def test_published_widths() -> None:
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in Head(384).parameters() if p.ndim == 2]
    assert shapes == [(2048, 384), (2048, 2048), (256, 2048)]
    assert [tuple(p.shape) for p in Head(4, out=3, layers=1).parameters()] == [(3, 4), (3,)]


def test_zero_stays_zero_with_a_bounded_gradient() -> None:
    head = Head(4, hidden=8, out=3)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    tokens = torch.zeros(5, 4, requires_grad=True)
    out = head(tokens)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(5, 3))
    assert all(p.grad.isfinite().all() and p.grad.abs().max() < 1e8 for p in [tokens, *head.parameters()])


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_gives_unit_length_in_float32(autocast: bool) -> None:
    torch.manual_seed(0)
    head, tokens = Head(32, hidden=64, out=16), torch.randn(50, 32)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = head(tokens)
    else:
        out = head.bfloat16()(tokens.bfloat16())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(50), rtol=0, atol=1e-5)
