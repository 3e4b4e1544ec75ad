"""Every published layout: weights from a network written down on its own (weights_support), features compared."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from weights_support import DEPTH, HEADS, PATCH, Clip, D, Dino, Dinov3, State, renamed, three

from neco.model.backbone import Backbone
from neco.model.weights import load, weights_hash
from neco.utils.errors import NecoError

CONF = Path(__file__).parents[1] / "conf" / "model"
ARCH = {"embed_dim": D, "depth": DEPTH, "num_heads": HEADS}
SIZE = 4 * PATCH


def backbone(option: str, **values: Any) -> Backbone:
    """An option of conf/model, tiny."""
    node = {k: v for k, v in yaml.safe_load((CONF / f"{option}.yaml").read_text()).items() if k != "_target_"}
    arch = {**ARCH, "patch_size": PATCH, **node.get("arch", {})}
    return Backbone(**{**node, "size": SIZE, "weights": "none", "arch": arch, **values}).double().eval()


def same(net: Backbone, published: Any) -> bool:
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = published.double()(x).reshape(2, 4, 4, D)
        return torch.allclose(net(x), expected, rtol=1e-5, atol=1e-5) and bool(expected.std() > 0.1)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def head(prefix: str) -> State:
    return {f"{prefix}{name}": torch.ones(3, D) for name in ("mlp.0.weight", "last_layer.weight_v")}


def dino(student: State, teacher: State) -> dict[str, Any]:
    return {
        "student": prefixed(student, "module.backbone.") | head("module.head."),
        "teacher": prefixed(teacher, "module.backbone.") | head("module.head."),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", out_dim=3),
        "dino_loss": {"center": torch.zeros(1, 3)},
    }


def ibot(student: State, teacher: State) -> dict[str, Any]:
    held = dino(student | {"masked_embed": torch.ones(1, D)}, teacher)
    held["teacher"] = prefixed(teacher, "backbone.") | head("head.")
    return {**{k: v for k, v in held.items() if k != "dino_loss"}, "ibot_loss": {"center2": torch.zeros(1, 1, 3)}}


def cribo(student: State, teacher: State) -> dict[str, Any]:
    queues = {"centroids_queue_cpu": torch.zeros(2, 3, D), "cls_queue_cpu": torch.zeros(2, 3, D)}
    return {**dino(student, teacher), **queues}


def mocov3(student: State, teacher: State) -> dict[str, Any]:
    heads = head("module.base_encoder.head.") | head("module.momentum_encoder.head.") | head("module.predictor.")
    networks = prefixed(student, "module.base_encoder.") | prefixed(teacher, "module.momentum_encoder.")
    return {"epoch": 300, "arch": "vit_small", "state_dict": networks | heads, "optimizer": {"state": {}}}


def leopart(student: State, teacher: State) -> dict[str, Any]:
    parts = {"projection_head.0.weight": torch.ones(3, D), "prototypes.weight": torch.ones(3, D)}
    return {"state_dict": prefixed(student | parts, "model.") | prefixed(teacher | parts, "teacher."), "epoch": 1}


def timet(student: State, teacher: State) -> dict[str, Any]:
    heads = {"feature_extractor.head.0.weight": torch.ones(3, D), "prototypes": torch.ones(3, D)}
    return prefixed(student, "feature_extractor.model.") | prefixed(teacher, "teacher.model.") | heads


TWO = {  # (layout, what holds it, an option that reads it, the network that its authors evaluate)
    "DINO or CrOC": (dino, "dino_vits16", "teacher"),
    "iBOT": (ibot, "ibot_vits16", "teacher"),
    "CrIBo": (cribo, "cribo_vits16", "teacher"),
    "MoCo v3": (mocov3, "mocov3_vits16", "student"),
    "Leopart": (leopart, "leopart_vits16", "student"),
    "TimeT": (timet, "timet_vits16", "student"),
}


@pytest.mark.parametrize("which", ["auto", "student", "teacher"])
@pytest.mark.parametrize("layout", TWO)
def test_student_and_teacher(tmp_path: Path, layout: str, which: Any) -> None:
    make, option, authors = TWO[layout]
    role = authors if which == "auto" else which
    kept: dict[str, Any] = {}
    if layout == "MoCo v3":  # 12 heads of its own where others have 6
        assert yaml.safe_load((CONF / f"{option}.yaml").read_text())["arch"] == {"num_heads": 12}
        kept = {"arch": {**ARCH, "patch_size": PATCH}}
    networks = {name: Dino(seed) for seed, name in enumerate(("student", "teacher"))}
    torch.save(make(*(net.state_dict() for net in networks.values())), tmp_path / "x.pth")
    net = backbone(option, **kept)
    report = load(net, tmp_path / "x.pth", which)
    assert same(net, networks[role])
    assert (report.format, report.which, report.matched) == (layout, role, len(net.net.state_dict()))
    inside = {"Leopart": {"projection_head.0.weight", "prototypes.weight"}}.get(layout, set())
    if layout == "MoCo v3":
        inside = {"head.mlp.0.weight", "head.last_layer.weight_v"}
    if (layout, role) == ("iBOT", "student"):
        inside = {"masked_embed"}
    assert set(report.ignored) == inside and report.outside > 26
    told = str(report)
    assert all(part in told for part in (layout, role, report.hash, f"{report.matched} matched", *inside))


def test_long_lists_of_what_is_left_over_are_cut(tmp_path: Path) -> None:
    torch.save(mae(Dino()), tmp_path / "x.pth")
    told = str(load(backbone("mae_vitb16"), tmp_path / "x.pth"))
    assert "decoder_blocks.0.attn.qkv.weight, decoder_embed.weight, decoder_norm.bias and 2 more ignored" in told
    assert "mask_token ignored (masked-image pretraining only)" in told and "decoder_pred" not in told


def test_flat_leopart_and_timet_without_a_teacher(tmp_path: Path) -> None:
    net, published = backbone("leopart_vits16"), Dino()
    for held in (leopart(published.state_dict(), {})["state_dict"], timet(published.state_dict(), {})):
        torch.save({k: v for k, v in held.items() if not k.startswith("teacher.")}, tmp_path / "x.ckpt")
        assert load(net, tmp_path / "x.ckpt").which == "student" and same(net, published)
        with pytest.raises(NecoError, match="the student only"):
            load(net, tmp_path / "x.ckpt", "teacher")


VIT = {  # transformers' ViT
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "blocks.{}.norm1.": "encoder.layer.{}.layernorm_before.", "blocks.{}.norm2.": "encoder.layer.{}.layernorm_after.",
    "blocks.{}.attn.proj.": "encoder.layer.{}.attention.output.dense.",
    "blocks.{}.attn.": "encoder.layer.{}.attention.attention.", "norm.": "layernorm.",
    "blocks.{}.mlp.fc1.": "encoder.layer.{}.intermediate.dense.",
    "blocks.{}.mlp.fc2.": "encoder.layer.{}.output.dense.",
}  # fmt: skip
DINOV3 = {
    "cls_token": "embeddings.cls_token", "storage_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token", "patch_embed.proj.": "embeddings.patch_embeddings.",
    "blocks.{}.attn.proj.": "layer.{}.attention.o_proj.", "blocks.{}.attn.": "layer.{}.attention.",
    "blocks.{}.mlp.fc1.": "layer.{}.mlp.up_proj.", "blocks.{}.mlp.fc2.": "layer.{}.mlp.down_proj.",
    "blocks.{}.mlp.w1.": "layer.{}.mlp.gate_proj.", "blocks.{}.mlp.w2.": "layer.{}.mlp.up_proj.",
    "blocks.{}.mlp.w3.": "layer.{}.mlp.down_proj.",
    "blocks.{}.ls1.gamma": "layer.{}.layer_scale1.lambda1", "blocks.{}.ls2.gamma": "layer.{}.layer_scale2.lambda1",
    "blocks.{}.": "layer.{}.", "norm.": "norm.",
}  # fmt: skip
CLIP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.", "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.", "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks.{}.ln_1.": "vision_model.encoder.layers.{}.layer_norm1.",
    "visual.transformer.resblocks.{}.ln_2.": "vision_model.encoder.layers.{}.layer_norm2.",
    "visual.transformer.resblocks.{}.attn.": "vision_model.encoder.layers.{}.self_attn.",
    "visual.transformer.resblocks.{}.mlp.c_fc.": "vision_model.encoder.layers.{}.mlp.fc1.",
    "visual.transformer.resblocks.{}.mlp.c_proj.": "vision_model.encoder.layers.{}.mlp.fc2.",
    "transformer.": "text_model.encoder.", "token_embedding.": "text_model.embeddings.token_embedding.",
    "": "text_model.",
}  # fmt: skip


def hf_dinov3(net: Any) -> State:
    state = {k: v for k, v in net.state_dict().items() if not k.endswith(("bias_mask", "periods"))}
    return renamed(three(state, names=("q_proj.", "k_proj.", "v_proj."), key_bias=False), DINOV3)


def hf_clip(net: Any) -> State:
    state = three(net.state_dict(), "in_proj_", ("q_proj.", "k_proj.", "v_proj."))
    return renamed(state, CLIP) | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}


def mae(net: Any) -> dict[str, Any]:
    extra = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 17, 8)}
    names = ("decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_norm.bias", "decoder_pred.weight")
    return {"model": net.state_dict() | extra | {name: torch.ones(8) for name in names}}


QKVB = {"name": "vit_small_patch16_dinov3_qkvb.lvd1689m"}
PLUS = {"name": "vit_small_plus_patch16_dinov3.lvd1689m"}  # as H+ and 7B with gated MLPs
ONE: dict[str, tuple[Any, Any, str, dict[str, Any], str]] = {
    # what holds it: network, how it is written, option, other values, layout
    "DINO": (Dino(), lambda net: net.state_dict(), "dino_vits16", {}, "plain backbone"),
    "iBOT's backbone": (Dino(), lambda net: {"state_dict": net.state_dict()}, "ibot_vits16", {}, "plain backbone"),
    "MAE with its decoder": (Dino(), mae, "mae_vitb16", {}, "MAE"),
    "transformers ViT": (Dino(), lambda net: renamed(three(net.state_dict()), VIT), "dino_vits16", {}, "transformers"),
    "transformers ViTMAE": (
        Dino(), lambda net: renamed(three(net.state_dict()), VIT, "vit."), "mae_vitb16", {}, "transformers",
    ),
    "DINOv3": (Dinov3(bias=False), lambda net: net.state_dict(), "dinov3_vits16", {}, "DINOv3 hub"),
    "DINOv3 with biases": (Dinov3(), lambda net: net.state_dict(), "dinov3_vits16", QKVB, "DINOv3 hub"),
    "transformers DINOv3": (Dinov3(bias=False), hf_dinov3, "dinov3_vits16", {}, "transformers"),
    "transformers DINOv3 with biases": (Dinov3(), hf_dinov3, "dinov3_vits16", QKVB, "transformers"),
    "gated DINOv3": (
        Dinov3(bias=False, gated=True), lambda net: net.state_dict(), "dinov3_vits16", PLUS, "DINOv3 hub",
    ),
    "transformers gated DINOv3": (Dinov3(bias=False, gated=True), hf_dinov3, "dinov3_vits16", PLUS, "transformers"),
    "transformers 5 gated DINOv3": (
        Dinov3(bias=False, gated=True), lambda net: prefixed(hf_dinov3(net), "model."), "dinov3_vits16", PLUS,
        "transformers",
    ),
    "CLIP": (Clip(), lambda net: net.state_dict(), "clip_vitb16", {}, "CLIP"),
    "open_clip": (
        Clip(), lambda net: {"state_dict": prefixed(net.state_dict(), "module.")}, "clip_vitb16", {}, "CLIP",
    ),
    "transformers CLIP": (Clip(), hf_clip, "clip_vitb16", {}, "CLIP"),
}  # fmt: skip


@pytest.mark.parametrize("layout", ONE)
def test_one_network(tmp_path: Path, layout: str) -> None:
    published, write, option, values, name = ONE[layout]
    torch.save(write(published), tmp_path / "x.pth")
    net = backbone(option, **values)
    report = load(net, tmp_path / "x.pth")
    assert same(net, published)
    assert (report.format, report.which) == (name, "only") and report.matched == len(net.net.state_dict())
    assert report.hash == weights_hash(net) and all(why for why in report.ignored.values())


def test_mae_fine_tuned_with_mean_pooling_is_told(tmp_path: Path) -> None:
    state = {
        key.replace("norm.", "fc_norm.") if key[:5] == "norm." else key: v for key, v in Dino().state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(NecoError, match=r"(?s)missing: norm\.weight.*take the pretrained one"):
        load(backbone("mae_vitb16"), tmp_path / "x.pth")


def test_what_clip_does_to_pixels_and_between_layers_counts(tmp_path: Path) -> None:
    published = Clip()
    torch.save(published.state_dict(), tmp_path / "x.pth")
    for other in ({"inputs": "imagenet"}, {"name": "vit_base_patch16_clip_224.openai"}):  # no QuickGELU
        net = backbone("clip_vitb16", **other)
        load(net, tmp_path / "x.pth")
        assert not same(net, published)


def test_other_rotary_periods_are_another_network(tmp_path: Path) -> None:
    held = Dinov3(bias=False).state_dict()
    torch.save({k: torch.full_like(v, 7) if k.endswith("periods") else v for k, v in held.items()}, tmp_path / "x.pth")
    with pytest.raises(NecoError, match="other periods of rotary positions"):
        load(backbone("dinov3_vits16"), tmp_path / "x.pth")


def test_biases_of_dinov3_are_not_lost(tmp_path: Path) -> None:
    torch.save(Dinov3().state_dict(), tmp_path / "x.pth")
    with pytest.raises(
        NecoError, match=r"(?s)left over: blocks\.0\.attn\.qkv\.bias.*model\.name=vit_small_.*_qkvb\.lvd"
    ):
        load(backbone("dinov3_vits16"), tmp_path / "x.pth")
