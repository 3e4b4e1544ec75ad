import copy

import pytest
import torch
from torch import nn

from neco.model.linear import Linear, Patches, available, hasten

pytestmark = pytest.mark.skipif(not available(), reason="runs on CPUs with AVX-512; elsewhere torch's own is used")


def layers(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(160, 192, bias=bias)
    ours = hasten(nn.Sequential(copy.deepcopy(plain)))[0]
    assert type(ours) is Linear
    return plain, ours


def test_only_large_linear_layers_are_changed():
    net = hasten(nn.Sequential(nn.Linear(160, 160), nn.Linear(160, 64), nn.LayerNorm(160), nn.Conv2d(160, 160, 1)))
    assert [type(part) is Linear for part in net] == [True, False, False, False]
    assert [*net.state_dict()] == [f"{i}.{name}" for i in range(4) for name in ("weight", "bias")]


@pytest.mark.parametrize("shape", [(160,), (3, 160), (2, 5, 160), (2, 3, 5, 160), (0, 160)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_float64(shape, bias):
    plain, ours = layers(bias)
    plain = plain.double()
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x.double()).float(), rtol=1e-5, atol=1e-5)
    theirs, mine = x.double().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(*shape[:-1], 192)
    (plain(theirs) * weights.double()).sum().backward()
    (ours(mine) * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad.float(), rtol=1e-5, atol=1e-4)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-5, atol=1e-4)


def test_rows_that_lie_apart_are_multiplied_as_they_are():
    plain, ours = layers()
    x = torch.randn(160, 7).mT[::2]
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient_and_pass_it_on():
    _, ours = layers()
    ours.requires_grad_(False)
    x = torch.randn(4, 160, requires_grad=True)
    ours(x).sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is None and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_torchs_own(dtype):
    plain, ours = (layer.to(dtype) for layer in layers())
    x = torch.randn(4, 160, dtype=dtype)
    assert torch.equal(ours(x), plain(x))


def test_autocast_is_respected():
    plain, ours = layers()
    x = torch.randn(4, 160)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), plain(x))


def test_a_trace_holds_the_plain_layer():
    _, ours = layers()
    program = torch.export.export(nn.Sequential(ours), (torch.randn(4, 160),))
    assert {str(node.target) for node in program.graph.nodes if node.op == "call_function"} == {"aten.linear.default"}


@pytest.mark.parametrize("patch", [14, 16, (4, 6)], ids=str)
def test_patches_as_one_product_are_the_convolution(patch):
    layer = hasten(nn.Sequential(nn.Conv2d(3, 10, patch, patch)))[0]
    assert type(layer) is Patches
    images = torch.randn(2, 3, *(3 * side for side in layer.kernel_size))
    torch.testing.assert_close(layer.product(images), layer(images), rtol=1e-4, atol=1e-5)
