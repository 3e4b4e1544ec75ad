"""Adapters: nothing at the start, then W + alpha / r B A for whoever reads the weight, plain weights when folded."""

import copy
import math

import pytest
import torch
from test_model_backbone import OTHERS, images, small, values
from torch import nn

from neco.model import lora
from neco.model.backbone import Backbone
from neco.model.weights import load, weights_hash
from neco.utils.errors import NecoError

SEPARATE = {"name": "eva02_base_patch14_224.mim_in22k", "size": 56}  # q, k and v are layers of their own
NAMES = ["tiny", "dinov2r_vits14", "dinov3_vits16", *OTHERS, "separate"]


def network(name: str) -> Backbone:
    others = {**OTHERS, "separate": SEPARATE}
    return small(**(others[name] if name in others else values(name)))


def adapt(backbone: Backbone, rank: int = 3, alpha: float = 6.0) -> Backbone:
    for block in backbone.net.blocks:
        lora.adapt(block, rank, alpha)
    return backbone


def move(backbone: Backbone) -> Backbone:
    """As training would: factors that are not zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "parametrizations.weight.0" in name:
                parameter.normal_(std=0.2, generator=generator)
    return backbone


@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_plain_network_and_ends_as_the_folded_one(name: str) -> None:
    backbone = network(name)
    plain, adapted, x = copy.deepcopy(backbone), adapt(backbone), images(2, 2 * backbone.patch, 3 * backbone.patch)
    with torch.no_grad():
        before = plain.forward_attention(x)
        for got, want in zip(adapted.forward_attention(x), before, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        after = move(adapted).forward_attention(x)
        assert not any(map(torch.allclose, after, before)), "features and attention are of the adapted weights"
        plain.load_state_dict(lora.fold(adapted.state_dict()))
        for got, want in zip(plain.forward_attention(x), after, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert weights_hash(plain) == weights_hash(adapted)


def test_adapted_weight_is_the_formula() -> None:
    backbone = network("tiny")
    before = backbone.net.blocks[1].attn.qkv.weight.detach().clone()
    layer = move(adapt(backbone, rank=3, alpha=6.0)).net.blocks[1].attn.qkv
    up, down = (layer.parametrizations.weight[0].get_parameter(name) for name in ("up", "down"))
    assert up.shape == (96, 3) and down.shape == (3, 32)
    up, down = up.detach(), down.detach()
    wanted = [[before[o, i] + 6 / 3 * sum(up[o, r] * down[r, i] for r in range(3)) for i in range(5)] for o in range(5)]
    torch.testing.assert_close(layer.weight[:5, :5], torch.tensor(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny", "separate"])
def test_only_adapters_train(name: str) -> None:
    backbone = move(adapt(network(name)))
    backbone.net.blocks[0].train()
    backbone(images(1, 2 * backbone.patch, 2 * backbone.patch)).square().sum().backward()
    trained = {n for n, p in backbone.net.blocks.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in backbone.net.blocks.named_parameters() if p.grad is not None and p.grad.any()}
    layers = 4 if name == "separate" else 2
    assert len(trained) == 2 * layers * 2 and all(n.endswith(("weight.0.up", "weight.0.down")) for n in trained)


def test_down_starts_as_a_linear_layer_does() -> None:
    down = lora.LoRA(torch.zeros(8, 400), 50, 1.0).down
    assert down.abs().max() <= 1 / math.sqrt(400) and abs(down.std() * math.sqrt(3 * 400) - 1) < 0.02


def test_copies_and_compiled_networks_have_their_adapters() -> None:
    student, x = move(adapt(network("tiny"))), images(1, 32, 32)
    teacher, before = copy.deepcopy(student), student(x).detach()
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), before, rtol=1e-5, atol=1e-5)
    compiled(x).sum().backward()
    assert student.net.blocks[0].attn.proj.parametrizations.weight[0].up.grad.any()
    nn.init.zeros_(student.net.blocks[0].attn.qkv.parametrizations.weight[0].up)
    assert torch.equal(teacher(x), before) and not torch.equal(student(x), before)
    torch.testing.assert_close(compiled(x), student(x), rtol=1e-5, atol=1e-5)


def test_state_without_adapters_is_left_alone() -> None:
    state = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)).state_dict()  # as in DINO's head
    assert lora.fold(state) == state and set(state) > {"parametrizations.weight.original0"}


def test_file_with_adapters_fills_a_plain_network(tmp_path) -> None:
    adapted, plain = move(adapt(network("tiny"))), network("tiny")
    torch.save(adapted.state_dict(), tmp_path / "adapted.pth")
    report = load(plain, tmp_path / "adapted.pth")
    assert (report.merged, report.matched, report.outside) == (4, len(plain.net.state_dict()), 0)
    assert report.hash == weights_hash(adapted) and "adapters merged into 4" in str(report)


def test_adapters_that_do_not_fit_are_named(tmp_path) -> None:
    state, layer = move(adapt(network("tiny"))).state_dict(), "net.blocks.0.attn.qkv."
    cases = {
        r"qkv\.weight do not fit: .*\(3, 2\)": {f"{layer}parametrizations.weight.0.down": torch.ones(3, 2)},
        r"qkv\.weight is there twice": {f"{layer}weight": torch.ones(2, 2)},
    }
    for said, change in cases.items():
        torch.save(state | change, tmp_path / "adapted.pth")
        with pytest.raises(NecoError, match=said):
            load(network("tiny"), tmp_path / "adapted.pth")


def test_a_block_without_attention_is_refused() -> None:
    with pytest.raises(NecoError, match="Linear has no attention"):
        lora.adapt(nn.Linear(2, 2), 1, 1.0)
