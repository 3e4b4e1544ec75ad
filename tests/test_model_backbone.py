"""Backbones against timm's own forward pass, position rules against bicubic written out, every option of conf/model."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from pydantic import TypeAdapter
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from neco.config.types import MEAN, STD
from neco.model.backbone import Backbone, StochasticDepth, _cls_attention, interpolate_positions
from neco.utils.errors import NecoError

CONF = Path(__file__).parents[1] / "conf" / "model"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
OTHERS = {  # not in conf/: biases beside rotary positions, separate q and k, norm before the blocks
    "dinov3_bias": {"name": "vit_small_patch16_dinov3_qkvb.lvd1689m", "size": 64},
    "eva02": {"name": "eva02_tiny_patch14_224.mim_in22k", "size": 56},
}
SIZES = {"s": (384, 12, 22), "b": (768, 12, 86), "l": (1024, 24, 304)}  # width, depth, millions of parameters


def values(option: str) -> dict[str, Any]:
    return {k: v for k, v in yaml.safe_load((CONF / f"{option}.yaml").read_text()).items() if k != "_target_"}


def small(seed: int = 0, **values: Any) -> Backbone:
    """A narrow, shallow copy of an option, with weights large enough that nothing hides behind a tiny layer scale."""
    torch.manual_seed(seed)
    backbone = Backbone(**{**values, "weights": "none", "arch": {**values.get("arch", {}), **SMALL}}).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.3)
    return backbone


def images(*shape: int) -> Tensor:
    return torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(1))


def forward(backbone: Backbone, x: Tensor) -> Tensor:
    """timm's own patch tokens."""
    if backbone.inputs == "clip":
        x = x * backbone.change[0] + backbone.change[1]
    return backbone.net.forward_features(x)[:, backbone.net.num_prefix_tokens :]


@pytest.fixture(params=[*OPTIONS, *OTHERS])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return small(**(OTHERS[request.param] if request.param in OTHERS else values(request.param)))


# -- position embeddings ---------------------------------------------------------------------------------------------


def cubic(x: float, a: float) -> float:
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def by_scale(g: int, n: int, scale: float) -> Tensor:
    """n x g: Keys' kernel (a = -3/4) at (i + 1/2) / scale - 1/2, border repeated. No antialias."""
    out = torch.zeros(n, g, dtype=torch.float64)
    for i in range(n):
        x = (i + 0.5) / scale - 0.5
        for j in range(math.floor(x) - 1, math.floor(x) + 3):
            out[i, min(max(j, 0), g - 1)] += cubic(x - j, -0.75)
    return out


def by_size(g: int, n: int) -> Tensor:
    """n x g: kernel (a = -1/2) widened by g / n where that shrinks, cut at the border and normalised. Antialias."""
    out = torch.zeros(n, g, dtype=torch.float64)
    for i in range(n):
        for j in range(g):
            out[i, j] = cubic((j + 0.5 - (i + 0.5) * g / n) / max(g / n, 1), -0.5)
    return out / out.sum(1, keepdim=True)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("rule", ["hub", "timm", "neco"])
@pytest.mark.parametrize(("h", "w"), [(7, 7), (16, 16), (32, 32), (7, 40), (37, 36), (38, 38), (50, 61)])
def test_positions_follow_their_formula(rule: Any, registers: bool, h: int, w: int) -> None:
    g = 37
    pos = torch.randn(1, g * g, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = {("hub", False): False, ("hub", True): True, ("timm", False): True, ("timm", True): True}
    if exact.get((rule, registers), False):
        rows, columns = by_size(g, h), by_size(g, w)
    else:
        rows, columns = by_scale(g, h, (h + 0.1) / g), by_scale(g, w, (w + 0.1) / g)
    expected = torch.einsum("hi,wj,ijd->hwd", rows, columns, pos.view(g, g, 5)).reshape(1, h * w, 5)
    actual = interpolate_positions(pos, h, w, rule, registers)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", ["hub", "timm", "neco"])
def test_positions_at_the_pretraining_size_are_untouched(rule: Any) -> None:
    pos = torch.randn(1, 37 * 37, 3)
    assert all(interpolate_positions(pos, 37, 37, rule, registers) is pos for registers in (False, True))


@pytest.mark.parametrize("rule", ["hub", "timm", "neco"])
def test_positions_in_bfloat16_are_resampled_in_float32(rule: Any) -> None:
    pos = torch.randn(1, 36, 8).bfloat16()
    exact = interpolate_positions(pos.float(), 4, 9, rule, False)
    assert torch.equal(interpolate_positions(pos, 4, 9, rule, False), exact.bfloat16())


# -- every network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_what_its_name_says(option: str) -> None:
    text, given = (CONF / f"{option}.yaml").read_text(), values(option)
    assert text.startswith("# ") and "_target_: neco.model.backbone.Backbone\n" in text
    for key, annotation in Backbone.__init__.__annotations__.items():
        if key in given:
            TypeAdapter(annotation).validate_python(given[key])
    with torch.device("meta"):
        outline = Backbone(**given)
    parameters = sum(p.numel() for p in outline.parameters())
    if option == "tiny":
        assert (outline.patch, outline.depth, outline.size) == (8, 4, 64)
        assert outline.dim in (96, 128) and parameters < 1e6
    else:
        kind, _, vit = option.rpartition("_")
        width, depth, millions = SIZES[vit[3]]
        assert (outline.patch, outline.dim, outline.depth) == (int(vit[4:]), width, depth)
        assert abs(parameters / 1e6 - millions) < 1
        assert outline.size == (256 if kind == "dinov3" else 518 if kind.startswith("dinov2") else 224)
        assert outline.heads == (12 if option == "mocov3_vits16" else width // 64)  # MoCo v3 made its ViT-S another way
    p, d = outline.patch, outline.dim
    with torch.device("meta"):
        assert outline(torch.empty(2, 3, 4 * p, 4 * p)).shape == (2, 4, 4, d)
        assert outline(torch.empty(1, 3, 3 * p, 7 * p)).shape == (1, 3, 7, d)
    assert outline.prefix == (5 if "dinov2r_vit" in option or "dinov3" in option else 1)


def test_real_size() -> None:
    backbone = Backbone(**values("dinov2r_vits14")).eval()
    with torch.no_grad():
        maps, attention = backbone.forward_attention(images(1, 98, 112))
    assert maps.shape == (1, 7, 8, 384) and attention.shape == (1, 6, 7, 8)
    assert maps.isfinite().all() and attention.sum((2, 3)).lt(1).all()


def test_same_as_timm_at_the_pretraining_size(backbone: Backbone) -> None:
    x = images(1, backbone.size, backbone.size)
    with torch.no_grad():
        expected = forward(backbone, x)
        actual = backbone(x)
    side = backbone.size // backbone.patch
    torch.testing.assert_close(actual, expected.reshape(1, side, side, -1), rtol=1e-4, atol=1e-5)


def test_same_as_timm_elsewhere_under_its_rule(backbone: Backbone) -> None:
    backbone.pos_interp = "timm"
    x = images(2, 3 * backbone.patch, 5 * backbone.patch)
    with torch.no_grad():
        expected = forward(backbone, x).reshape(2, 3, 5, -1)
        torch.testing.assert_close(backbone(x), expected, rtol=1e-4, atol=1e-5)
        if backbone.net.pos_embed is not None:
            backbone.pos_interp = "neco"
            assert (backbone(x) - expected).abs().max() > 1e-4


def test_attention_is_that_of_the_unfused_block(backbone: Backbone) -> None:
    x, seen = images(2, 3 * backbone.patch, 5 * backbone.patch), []
    attn = backbone.net.blocks[-1].attn
    with torch.no_grad():
        maps, attention = backbone.forward_attention(x)
        torch.testing.assert_close(maps, backbone(x))
        attn.fused_attn = False
        attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        backbone(x)
    expected = seen[0][:, :, 0, backbone.prefix :].reshape(2, attn.num_heads, 3, 5)
    torch.testing.assert_close(attention, expected, rtol=1e-4, atol=1e-6)
    assert attention.std() > 0.002  # peaked enough that a wrong row or scale would show


def test_attention_normalises_queries_and_keys_where_the_block_does() -> None:
    torch.manual_seed(0)
    block, tokens = Block(32, 4, qk_norm=True), torch.randn(2, 9, 32)
    norm_q, norm_k = block.attn.q_norm, block.attn.k_norm
    nn.init.normal_(norm_q.weight), nn.init.normal_(norm_k.weight)
    q, k, _ = block.attn.qkv(block.norm1(tokens)).view(2, 9, 3, 4, 8).unbind(2)
    expected = torch.einsum("bhc,bthc->bht", norm_q(q)[:, 0], norm_k(k)).div(8**0.5).softmax(-1)
    torch.testing.assert_close(_cls_attention(block, tokens, None), expected)


def test_attention_stays_sharp_under_bfloat16() -> None:
    backbone, x = small(**values("dinov2r_vits14")), images(1, 70, 70)
    with torch.no_grad():
        exact = backbone.attention(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = backbone.attention(x)
    assert actual.dtype == torch.float32
    assert (actual - exact).abs().max() < 0.05


def test_every_parameter_receives_a_gradient(backbone: Backbone) -> None:
    maps = backbone.train()(images(2, 3 * backbone.patch, 5 * backbone.patch))
    (maps * torch.randn(maps.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_attention_of_the_blocks_is_fused(backbone: Backbone) -> None:
    assert all(block.attn.fused_attn for block in backbone.net.blocks)


def test_registers_thrown_away_are_gone_and_the_rule_is_that_of_a_network_without() -> None:
    kept, dropped = small(**values("dinov2r_vits14")), small(**values("dinov2r_xr_vits14"))
    missing, left = dropped.load_state_dict(kept.state_dict(), strict=False)
    assert (missing, left) == ([], ["net.reg_token"])
    x = images(1, 98, 98)
    with torch.no_grad():
        hub = dropped(x)
        dropped.pos_interp = "neco"
        assert torch.equal(dropped(x), hub) and not torch.allclose(kept(x), hub, atol=1e-2)


@pytest.mark.parametrize(("option", "count"), [("dinov2r_vits14", "reg_tokens"), ("dinov3_vits16", "num_reg_tokens")])
def test_registers_thrown_away_leave_timms_network_without(option: str, count: str) -> None:
    dropped = small(**values(option), registers="drop")
    settings = dict(num_classes=0, global_pool="", img_size=dropped.size, dynamic_img_size=True)
    net = timm.create_model(dropped.spec["name"], **settings, **SMALL, **{count: 0}).eval()
    net.load_state_dict(dropped.net.state_dict())
    x = images(1, dropped.size, dropped.size)
    with torch.no_grad():
        torch.testing.assert_close(dropped(x).flatten(1, 2), net.forward_features(x)[:, 1:], rtol=1e-4, atol=1e-5)


def test_copy_is_equal_and_independent() -> None:
    student = small(**values("tiny"))
    teacher, x = copy.deepcopy(student), images(1, 32, 48)
    before = student(x).detach()
    nn.init.zeros_(student.net.blocks[0].mlp.fc1.weight)
    assert torch.equal(teacher(x), before) and not torch.equal(student(x), before)


@pytest.mark.parametrize("option", ["tiny", "dinov3_vits16"])
def test_stochastic_depth_is_linear_and_for_training_only(option: str) -> None:
    backbone = Backbone(**{**values(option), "arch": {**SMALL, "depth": 5}}, drop_path=0.4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.net.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        x = images(8, 32, 32)
        torch.manual_seed(0)
        assert not torch.equal(backbone.train()(x), backbone(x))
        assert torch.equal(backbone.eval()(x), backbone(x))


@pytest.mark.parametrize("rate", [0.3, 0.9, 1.0])
def test_stochastic_depth_drops_images_and_scales_the_rest(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.rand(4000, 2, 3, dtype=torch.bfloat16).requires_grad_()
    out = StochasticDepth(rate)(x)
    out.sum().backward()
    kept = (out != 0).flatten(1).any(1)
    torch.testing.assert_close(out[kept], x[kept] / (1 - rate), rtol=0.02, atol=0)
    assert out.dtype == x.dtype and abs(float(kept.float().mean()) - (1 - rate)) < 0.03
    assert x.grad is not None and torch.equal(x.grad.flatten(1).any(1), kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vit_smal_patch14_dinov2.lvd142m"}, "did you mean vit_small_patch14_dinov2.lvd142m"),
        ({"name": "vit_small_patch14_dinov2.nowhere"}, "nowhere"),
        ({"name": "hf-hub:timm/vit_small_patch14_dinov2.lvd142m"}, "no such network"),
        ({"name": "resnet18.a1_in1k"}, "resnet18"),
        ({"name": "vit_relpos_small_patch16_224.sw_in1k", "size": 224}, "vit_relpos_small"),
        ({"size": 520}, r"520 is no multiple of the patch of vit_small_patch14_dinov2.lvd142m, 14"),
        ({"registers": "drop"}, "no registers"),
        ({"arch": {"embed_dim": 30, "num_heads": 4}}, "num_heads"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(NecoError, match=message), torch.device("meta"):
        Backbone(**{**values("dinov2_vits14"), **change})


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(NecoError, match=r"64x60 pixels: .* 8"):
        small(**values("tiny"))(images(1, 64, 60))
    with pytest.raises(NecoError, match="no CLS"):
        small(name="vit_base_patch16_siglip_gap_224.webli", size=32).attention(images(1, 32, 32))


def test_timm_knows_the_published_weights_of_every_option() -> None:
    names = {values(option)["name"] for option in OPTIONS if values(option)["weights"] == "hub"}
    published = {name: timm.get_pretrained_cfg(name).hf_hub_id for name in names}  # timm keeps CLIP's under one name
    assert names and all(place == f"timm/{name.replace('_quickgelu', '')}" for name, place in published.items())


@pytest.mark.parametrize("option", OPTIONS)
def test_pixels_are_those_that_the_network_was_trained_on(option: str) -> None:
    """Images come with ImageNet's mean and standard deviation."""
    pixels, given = torch.rand(1, 3, 32, 32), values(option)
    mean, std = torch.tensor((MEAN, STD))[:, :, None, None]
    seen: list[Tensor] = []
    backbone = small(**given)
    backbone.net.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    p = backbone.patch
    backbone((pixels[:, :, :p, :p] - mean) / std)
    config = timm.get_pretrained_cfg(given["name"])
    if option != "tiny":
        mean, std = torch.tensor((config.mean, config.std))[:, :, None, None]
    torch.testing.assert_close(seen[0] * std + mean, pixels[:, :, :p, :p])
