"""Weights in each layout that people have, from a network written down here independently of timm and of neco."""

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from weights_support import renamed, three

from neco.config import discovery, validate
from neco.model import sources, state_dict_formats
from neco.model.backbone import Backbone
from neco.model.weights import load, weights_hash
from neco.utils.errors import NecoError

D, HEADS, PATCH = 16, 2, 14
ARCH = {"embed_dim": D, "depth": 2, "num_heads": HEADS}
NAMES = {"plain": "vit_small_patch14_dinov2.lvd142m", "registers": "vit_small_patch14_reg4_dinov2.lvd142m"}
State = dict[str, Tensor]


class Hub(nn.Module):
    """DINOv2 as its hub has it: its names, its order of operations, its positions (offset and antialias as values)."""

    def __init__(self, registers: int = 0, side: int = 37, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, D),
            "pos_embed": (1, 1 + side**2, D),
            "mask_token": (1, D),
            "patch_embed.proj.weight": (D, 3, PATCH, PATCH),
            "patch_embed.proj.bias": (D,),
            "norm.weight": (D,),
            "norm.bias": (D,),
        }
        if registers:
            shapes["register_tokens"] = (1, registers, D)
        for i in range(2):
            linear = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
            for name, shape in {**linear, "norm1": (D,), "norm2": (D,)}.items():
                shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
            shapes |= {f"blocks.{i}.ls1.gamma": (D,), f"blocks.{i}.ls2.gamma": (D,)}
        self.w = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
        self.registers, self.side = registers, side

    def positions(self, h: int, w: int, offset: float, antialias: bool) -> Tensor:
        pos = self.w["pos_embed"]
        if h * w == self.side**2 and h == w:
            return pos
        grid = pos[:, 1:].reshape(1, self.side, self.side, D).permute(0, 3, 1, 2)
        where: dict[str, Any] = {"size": (h, w)}
        if offset:
            where = {"scale_factor": ((h + offset) / self.side, (w + offset) / self.side)}
        grid = F.interpolate(grid, mode="bicubic", antialias=antialias, **where)
        assert grid.shape[-2:] == (h, w)
        return torch.cat([pos[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, D)], 1)

    def forward(self, images: Tensor, offset: float, antialias: bool) -> tuple[Tensor, Tensor]:
        """Patch maps (B, h, w, D) and attention of CLS to all tokens in the last block (B, heads, T)."""
        w = self.w
        x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
        batch, _, rows, columns = x.shape
        x = torch.cat([w["cls_token"].expand(batch, -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + self.positions(rows, columns, offset, antialias)
        if self.registers:
            x = torch.cat([x[:, :1], w["register_tokens"].expand(batch, -1, -1), x[:, 1:]], 1)
        for i in range(2):
            b = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items()}

            def norm(y: Tensor, name: str, b: State = b) -> Tensor:
                y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
                return y * b[f"{name}.weight"] + b[f"{name}.bias"]

            qkv = F.linear(norm(x, "norm1"), b["attn.qkv.weight"], b["attn.qkv.bias"])
            q, k, v = qkv.reshape(batch, -1, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
            attention = (q @ k.transpose(-2, -1) / math.sqrt(D // HEADS)).softmax(-1)
            y = (attention @ v).transpose(1, 2).reshape(batch, -1, D)
            x = x + b["ls1.gamma"] * F.linear(y, b["attn.proj.weight"], b["attn.proj.bias"])
            y = F.gelu(F.linear(norm(x, "norm2"), b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
            x = x + b["ls2.gamma"] * F.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
        x = norm(x, "norm")  # w has the last block's keys and the unprefixed ones
        return x[:, 1 + self.registers :].reshape(batch, rows, columns, D), attention[:, :, 0]


def backbone(kind: str = "plain", **values: Any) -> Backbone:
    return Backbone(**{"name": NAMES[kind], "size": 518, "arch": ARCH, "weights": "none", **values}).eval()


def images(h: int, w: int) -> Tensor:
    return torch.randn(2, 3, h * PATCH, w * PATCH, generator=torch.Generator().manual_seed(1))


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def same(actual: Backbone, expected: Hub) -> bool:
    x = images(5, 5)
    with torch.no_grad():
        return torch.allclose(actual(x), expected(x, 0.1, False)[0], rtol=1e-4, atol=1e-4)


# -- features --------------------------------------------------------------------------------------------------------

RULES = {  # rule, network -> offset, antialias of the code that is followed
    ("hub", "plain"): (0.1, False),
    ("hub", "registers"): (0.0, True),
    ("neco", "plain"): (0.1, False),
    ("neco", "registers"): (0.1, False),
    ("timm", "plain"): (0.0, True),
    ("timm", "registers"): (0.0, True),
}


@pytest.mark.parametrize(("h", "w"), [(37, 37), (32, 32), (16, 16), (7, 7), (7, 12)])
@pytest.mark.parametrize(("rule", "kind"), RULES)
def test_features_and_attention_of_dinov2(saved: Any, rule: Any, kind: str, h: int, w: int) -> None:
    hub = Hub(registers=4 * (kind == "registers"))
    net = backbone(kind, pos_interp=rule)
    report = load(net, saved(hub.w))
    assert report.ignored == {"mask_token": "masked-image pretraining only"}
    assert report.matched == len(net.net.state_dict()) and report.outside == 0
    with torch.no_grad():
        expected, attention = hub(images(h, w), *RULES[rule, kind])
        actual = net.forward_attention(images(h, w))
    torch.testing.assert_close(actual[0], expected, rtol=1e-4, atol=1e-4)
    attention = attention[:, :, 1 + hub.registers :].reshape(2, HEADS, h, w)
    torch.testing.assert_close(actual[1], attention, rtol=1e-4, atol=1e-5)


def test_registers_thrown_away(saved: Any) -> None:
    hub = Hub(registers=4)
    net = backbone("registers", registers="drop")
    report = load(net, saved(hub.w))
    assert report.ignored["reg_token"] == "registers=drop"
    hub.registers = 0
    assert same(net, hub)
    other = backbone("plain")  # the same network, told by another name
    load(other, saved({key: value for key, value in hub.w.items() if key != "register_tokens"}))
    assert same(other, hub)


# -- layouts ---------------------------------------------------------------------------------------------------------


def lightning(state: State) -> dict[str, Any]:
    """What Lightning puts around a state_dict, optimiser state included."""
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}
    return {"state_dict": state, "epoch": 3, "optimizer_states": [{"state": moments}], "loops": {"fit_loop": {}}}


def own(student: State, teacher: State) -> dict[str, Any]:
    state = prefixed(student, "student.backbone.net.") | prefixed(teacher, "teacher.backbone.net.")
    heads = {f"{who}.head.layers.0.weight": torch.ones(3, D) for who in ("student", "teacher")}
    return lightning(state | heads | {"queue.vectors": torch.zeros(4, 3)})


def published(student: State, teacher: State) -> dict[str, Any]:
    heads = {f"{p}.0.weight": torch.ones(3, D) for p in ("projection_head", "teacher_projection_head")}
    return lightning(prefixed(student, "model.") | prefixed(teacher, "teacher.") | heads)


def dino(student: State, teacher: State) -> dict[str, Any]:
    head = {"head.mlp.0.weight": torch.ones(3, D)}
    return {
        "student": prefixed(student, "module.backbone.") | prefixed(head, "module."),
        "teacher": prefixed(teacher, "backbone.") | head,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}},
        "epoch": 100,
        "dino_loss": {"center": torch.zeros(1, 3)},
    }


DINOV2 = {  # names of the library transformers
    **{f"{name}_token": f"embeddings.{name}_token" for name in ("cls", "mask")},
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "blocks.{}.attn.proj.": "encoder.layer.{}.attention.output.dense.",
    "blocks.{}.attn.": "encoder.layer.{}.attention.attention.",
    **{f"blocks.{{}}.ls{i}.gamma": f"encoder.layer.{{}}.layer_scale{i}.lambda1" for i in (1, 2)},
    "blocks.{}.": "encoder.layer.{}.",
    "norm.": "layernorm.",
}
TWO = {"neco checkpoint": own, "published NeCo checkpoint": published, "DINO or CrOC": dino}
ONE = {
    "as it is": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 1},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "teacher": lambda s: {"teacher": prefixed(s, "backbone.")},
    "student": lambda s: {"student": prefixed(s, "module.backbone.")},
    "module": lambda s: prefixed(s, "module."),
    "backbone": lambda s: prefixed(s, "backbone.") | {"head.last_layer.weight": torch.ones(2, 2)},
    "state_dict, model": lambda s: {"state_dict": prefixed(s, "model.")},
    "state_dict, module.backbone": lambda s: {"state_dict": prefixed(s, "module.backbone.")},
    "state_dict, teacher": lambda s: lightning(prefixed(s, "teacher.")),
    "classifier": lambda s: s | {"head.weight": torch.ones(10, D), "head.bias": torch.ones(10)},
    "backbone, own": lambda s: prefixed(s, "net."),
    "chunks of blocks": lambda s: {re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", k): v for k, v in s.items()},
    "transformers": lambda s: renamed(three(s), DINOV2),
    "transformers, prefixed": lambda s: renamed(three(s), DINOV2, "dinov2.") | {"classifier.weight": torch.ones(3, D)},
}


@pytest.mark.parametrize("layout", TWO)
@pytest.mark.parametrize("which", ["auto", "student", "teacher"])
def test_student_and_teacher_are_told_apart(saved: Any, layout: str, which: Any) -> None:
    student, teacher, net = Hub(seed=1), Hub(seed=2), backbone()
    report = load(net, saved(TWO[layout](student.w, teacher.w), "last.ckpt"), which)
    assert same(net, student if which == "student" else teacher)
    assert (report.format, report.which) == (layout, "student" if which == "student" else "teacher")
    assert report.matched == len(net.state_dict()) and report.outside > len(student.w)
    assert report.hash == weights_hash(net) and report.hash in str(report) and layout in str(report)


@pytest.mark.parametrize("layout", ONE)
def test_one_network_in_any_wrapping(saved: Any, layout: str) -> None:
    hub, net = Hub(seed=3), backbone()
    report = load(net, saved(ONE[layout](hub.w)))
    assert same(net, hub)
    assert report.which == {"teacher": "teacher", "state_dict, teacher": "teacher", "student": "student"}.get(
        layout, "only"
    )
    assert set(report.ignored) == {"mask_token"} | ({"head.weight", "head.bias"} if layout == "classifier" else set())


def below_blocks(state: State, name: str) -> State:
    """Names as a module that wraps each block and each attention leaves them."""
    return {re.sub(r"^(blocks\.\d+|blocks\.\d+\.attn)\.", rf"\1.{name}.", key): value for key, value in state.items()}


WRAPPED = {
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled, Lightning": lambda s: lightning(prefixed(s, "model._orig_mod.")),
    "compiled blocks": lambda s: below_blocks(s, "_orig_mod"),
    "checkpointed blocks": lambda s: below_blocks(s, "_checkpoint_wrapped_module"),
    "FSDP": lambda s: prefixed(below_blocks(s, "_fsdp_wrapped_module"), "_fsdp_wrapped_module."),
    "FSDP, checkpointed, compiled": lambda s: prefixed(
        below_blocks(s, "_fsdp_wrapped_module._checkpoint_wrapped_module"), "_orig_mod.module."
    ),
    "fairscale": lambda s: prefixed(below_blocks(s, "_fpw_module"), "module."),
    "DeepSpeed in Lightning": lambda s: lightning(prefixed(s, "_forward_module.model.")),
    "DistributedDataParallel of blocks": lambda s: below_blocks(s, "module"),
    "patch embedding": lambda s: {k.replace("patch_embed.proj", "patch_embed._orig_mod.proj"): v for k, v in s.items()},
    "pretrained": lambda s: prefixed(s, "pretrained.") | {"depth_head.weight": torch.ones(1)},
    "encoder": lambda s: lightning(prefixed(s, "encoder.") | {"decoder.0.weight": torch.ones(1)}),
    "averaged": lambda s: prefixed(s, "module.") | {"n_averaged": torch.tensor(3)},
    "peft": lambda s: prefixed(s, "base_model.model."),
    "deep": lambda s: {"a": {"student_of_mine": prefixed(s, "image_encoder.module.trunk.")}},
    "transformers in a whole": lambda s: renamed(three(s), DINOV2, "net.image_tower.module."),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_one_network_under_any_name_and_wrapped_anywhere(saved: Any, how: str) -> None:
    hub, net = Hub(seed=6), backbone()
    report = load(net, saved(WRAPPED[how](hub.w)))
    assert same(net, hub) and report.which == "only" and set(report.ignored) <= {"mask_token", "n_averaged"}


def test_of_several_networks_the_one_is_named(saved: Any) -> None:
    one, other, net = Hub(seed=1), Hub(seed=2), backbone()
    held = {"left": prefixed(one.w, "encoder.module."), "right": prefixed(other.w, "encoder.")} | one.w
    held_twice = {"q.encoder": one.w, "k.encoder": other.w, "k.decoder": one.w}
    assert load(net, saved({"encoder_q": one.w, "encoder_k": other.w}), "encoder_k") and same(net, other)
    assert load(net, saved(held_twice), "decoder") and same(net, one)
    with pytest.raises(NecoError, match=r"q\.encoder and k\.encoder: choose with weights=q\.encoder"):
        load(net, saved(held_twice), "encoder")
    with pytest.raises(NecoError, match=r"no network of that name, but left\.encoder and right\.encoder and \. \(the"):
        load(net, saved({**held, "cls_token": one.w["cls_token"]}), "others")
    for which, hub in (("left.encoder", one), ("right.encoder.", other), (".", one)):
        report = load(net, saved(held), which)
        assert same(net, hub) and report.which == "only" and len(report.others) == 2
    assert same(net, one) and load(net, saved({"x": one.w, "y": other.w}), "y").others == ("x",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "safetensors by another name"])
def test_file_kinds(tmp_path: Path, kind: str) -> None:
    hub, net = Hub(seed=4), backbone()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind.startswith("safetensors"):
        safetensors.torch.save_file(hub.w, path)
    else:
        torch.save(hub.w, path, _use_new_zipfile_serialization=kind == "zip")
    load(net, str(path))
    assert same(net, hub)


def test_dino_and_timm_names(saved: Any) -> None:
    """No layer scale, no mask token, 224 pixels: what DINO and timm files of it hold."""
    values: dict[str, Any] = {"name": "vit_small_patch16_224.dino", "size": 224, "arch": ARCH}
    first, second = Backbone(**values), Backbone(**values)
    expected = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight"}
    assert expected <= set(first.net.state_dict()) and first.net.pos_embed.shape == (1, 197, D)
    load(second, saved(first.net.state_dict()))
    assert weights_hash(first) == weights_hash(second)


def test_half_precision_files_fill_a_float32_network(saved: Any) -> None:
    hub, net = Hub(), backbone()
    assert "stored as float16" in str(load(net, saved({key: value.half() for key, value in hub.w.items()})))
    assert all(torch.equal(p, hub.w[n].half().float()) for n, p in net.net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_other_than_floating_point_numbers_are_refused(saved: Any, dtype: torch.dtype) -> None:
    spoiled = {**Hub().w, "norm.bias": torch.ones(D, dtype=dtype)}
    with pytest.raises(NecoError, match=rf"no plain floating-point numbers for: norm\.bias \({str(dtype)[6:]}\)"):
        load(backbone(), saved(spoiled))


def test_networks_that_were_not_meant_are_named(saved: Any) -> None:
    held = {"state_dict": prefixed(Hub(seed=1).w, "module."), "state_dict_ema": Hub(seed=2).w}
    report = load(backbone(), saved(held))
    assert report.others == ("state_dict_ema",) and "other networks: state_dict_ema" in str(report)


QUERY, KEY, VALUE = (f"encoder.layer.0.attention.attention.{part}" for part in ("query", "key", "value"))
SPOILED = {  # what is done to a file of transformers, what is said
    "no query bias": (lambda s: s.pop(f"{QUERY}.bias"), r"missing: blocks\.0\.attn\.qkv\.bias"),
    "no value bias": (lambda s: s.pop(f"{VALUE}.bias"), r"missing: blocks\.0\.attn\.qkv\.bias"),
    "no key weight": (lambda s: s.pop(f"{KEY}.weight"), r"missing: blocks\.0\.attn\.qkv\.weight"),
    "rows of another part": (
        lambda s: s.update({f"{QUERY}.weight": torch.ones(D - 1, D), f"{KEY}.weight": torch.ones(D + 1, D)}),
        r"left over: blocks\.0\.attn\.q_proj\.weight",
    ),
    "other width": (lambda s: s.update({f"{KEY}.weight": torch.ones(D, 3)}), r"left over: blocks\.0\.attn\.k_proj"),
    "a number": (lambda s: s.update({f"{KEY}.weight": torch.tensor(1.0)}), r"left over: blocks\.0\.attn\.k_proj"),
    "positions in a map": (
        lambda s: s.update({"embeddings.position_embeddings": torch.ones(1, D, 37, 37)}), r"shape: pos_embed is",
    ),
    "no positions": (
        lambda s: s.update({"embeddings.position_embeddings": torch.ones(1, 0, D)}), r"shape: pos_embed is",
    ),
    "nowhere": (lambda s: s.update({"layernorm.bias": torch.ones(D, device="meta")}), r"no plain .*norm\.bias"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_parts_that_do_not_go_together_are_named(saved: Any, what: str) -> None:
    spoil, said = SPOILED[what]
    held = renamed(three(Hub().w), DINOV2)
    spoil(held)
    with pytest.raises(NecoError, match=said) as error:
        load(backbone(), saved(held))
    assert "model.size=0" not in str(error.value)


def test_fused_parts_that_do_not_go_together_are_named(saved: Any) -> None:
    for bias in (torch.ones(2), torch.tensor(1.0)):
        with pytest.raises(NecoError, match=r"shape: blocks\.0\.attn\.qkv\.bias is"):
            load(backbone(), saved({**Hub().w, "blocks.0.attn.qkv.bias": bias}))
    with pytest.raises(NecoError, match=r"left over: blocks\.0\.attn\.qkv\.bias_mask"):
        load(backbone(), saved({**Hub().w, "blocks.0.attn.qkv.bias_mask": torch.ones(2)}))


def test_a_tensor_that_is_there_twice_is_no_weight(saved: Any) -> None:
    with pytest.raises(NecoError, match=r"holds model\.norm\.bias twice"):
        load(backbone(), saved({"model": Hub().w, "model.norm.bias": torch.zeros(D)}))


def test_none_changes_nothing() -> None:
    net = backbone(weights="none")
    before = weights_hash(net)
    report = load(net)
    assert (report.hash, report.matched, weights_hash(net)) == (before, 0, before)


def test_packaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "weights.py"))
    hub, net = Hub(), backbone(weights="package:tiny.safetensors")
    with pytest.raises(NecoError, match=r"package:tiny\.safetensors: no such file"):
        load(net)
    safetensors.torch.save_file(hub.w, tmp_path / "tiny.safetensors")
    load(net)
    assert same(net, hub)


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_keys_that_do_not_match_are_listed(saved: Any) -> None:
    state = {name: value for name, value in Hub().w.items() if "mlp.fc1" not in name}
    state |= {"blocks.1.attn.lora": torch.ones(1), "blocks.0.norm1.weight": torch.ones(3)}
    net = backbone()
    before = weights_hash(net)
    with pytest.raises(NecoError) as caught:
        load(net, saved(state))
    message = str(caught.value)
    assert "6 keys" in message and "file.pth (DINOv2 hub)" in message
    assert "missing: blocks.1.mlp.fc1.bias" in message and "left over: blocks.1.attn.lora" in message
    assert "shape: blocks.0.norm1.weight is (3,) in the file, (16,) in the network" in message
    assert weights_hash(net) == before


def test_only_the_first_ten_keys_are_listed(saved: Any) -> None:
    state = Hub().w | {f"blocks.{i}.norm1.weight": torch.ones(D) for i in range(2, 30)}
    with pytest.raises(NecoError) as caught:
        load(backbone(), saved(state))
    assert "28 keys" in str(caught.value) and str(caught.value).count("left over") == 10


@pytest.mark.parametrize(
    ("kind", "hub", "hint"),
    [
        ("plain", Hub(registers=4), "left over: reg_token.*dinov2r_xr"),
        ("registers", Hub(), "missing: reg_token.*dinov2r_xr"),
        ("plain", Hub(side=16), r"pos_embed is \(1, 257, 16\).*positions are for model.size=224"),
        ("registers", Hub(registers=4, side=16), r"pos_embed is \(1, 256, 16\).*positions are for model.size=224"),
    ],
)
def test_the_likely_cure_is_named(saved: Any, kind: str, hub: Hub, hint: str) -> None:
    with pytest.raises(NecoError, match=f"(?s){hint}"):
        load(backbone(kind), saved(hub.w))


def test_what_is_left_over_is_shown_beside_what_is_missing(saved: Any) -> None:
    strange = {re.sub(r"blocks\.\d\.", r"\g<0>inner.", key): value for key, value in Hub().w.items()}
    with pytest.raises(NecoError) as caught:
        load(backbone(), saved(strange))
    lines = str(caught.value).splitlines()
    assert "56 keys" in lines[0] and lines[-1] == "  ... 46 more"
    assert sum("missing: blocks.0.norm1.weight" in line for line in lines) == 1
    assert sum("left over: blocks.0.inner." in line for line in lines) == 5


def test_the_model_that_a_file_fits_is_named(saved: Any) -> None:
    """ViT-S weights in a ViT-B, wide and deep as published; nothing else is built."""
    with torch.device("meta"):
        nets = {
            name: build_option(name) for name in ("dinov2_vits14", "dinov2_vitb14", "dino_vits16", "dinov2r_vits14")
        }
    file = {key: torch.zeros(value.shape) for key, value in nets["dinov2_vits14"].net.state_dict().items()}
    said = r"\nthe file is 384 wide, 12 blocks, patch 14, no registers: this is model=dinov2_vits14$"
    with pytest.raises(NecoError, match=rf"does not fit vit_base_patch14_dinov2: 174 keys(.|\n)*{said}"):
        load(nets["dinov2_vitb14"], saved(file))
    for other in ("dino_vits16", "dinov2r_vits14"):
        with pytest.raises(NecoError, match="this is model=dinov2_vits14"):
            load(nets[other], saved(file))
    file = {key: torch.zeros(value.shape) for key, value in nets["dinov2r_vits14"].net.state_dict().items()}
    with pytest.raises(NecoError, match="4 registers: this is model=dinov2r_vits14 or dinov2r_xr_vits14"):
        load(nets["dinov2_vits14"], saved(file))
    file = {key: torch.zeros(value.shape) for key, value in nets["dino_vits16"].net.state_dict().items()}
    with pytest.raises(NecoError, match="this is model=cribo_vits16 or croc_vits16 or dino_vits16 or ibot_vits16 or"):
        load(nets["dinov2_vits14"], saved(file))
    with pytest.raises(NecoError, match=r"the file is 16 wide, 2 blocks, .*: no option of conf/model is like it"):
        load(nets["dinov2_vits14"], saved(Hub().w))


def build_option(name: str) -> Backbone:
    return validate.build(yaml.safe_load(discovery.find("model", name).read_text()), "model")  # type: ignore[no-any-return]


@pytest.mark.parametrize("option", discovery.options("model"))
def test_what_is_told_from_the_name_of_a_network_is_so(option: str) -> None:
    with torch.device("meta"):
        net = build_option(option).net
    if net.reg_token is None and "_xr_" in option:
        return  # thrown away from a file that has them
    assert state_dict_formats._traits_of(option) == state_dict_formats._traits(net.state_dict())


def test_adapters_of_peft_are_named(saved: Any) -> None:
    lora = {f"blocks.0.attn.qkv.lora_{part}.default.weight": torch.ones(1) for part in "AB"}
    held = {key.replace("0.attn.qkv.", "0.attn.qkv.base_layer."): value for key, value in Hub().w.items()} | lora
    with pytest.raises(NecoError, match=r"left over: blocks\.0(.|\n)*merge them there first \(merge_and_unload\)"):
        load(backbone(), saved(prefixed(held, "base_model.model.")))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(saved: Any, value: float) -> None:
    state = Hub().w
    state["blocks.1.ls1.gamma"][3] = value
    with pytest.raises(NecoError, match=r"not finite in 1 tensors: blocks\.1\.ls1\.gamma"):
        load(backbone(), saved(state))


# -- hash ------------------------------------------------------------------------------------------------------------


def test_hash_is_of_names_types_shapes_and_bytes() -> None:
    module = nn.Linear(2, 1)
    module.weight.data, module.bias.data = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    expected = (
        b"bias torch.float32 (1,) \x00\x00\x40\x40" + b"weight torch.float32 (1, 2) \x00\x00\x80\x3f\x00\x00\x00\x40"
    )
    first = weights_hash(module)
    assert first == hashlib.sha256(expected).hexdigest()[:12]
    module.weight.data[0, 1] += 2e-7
    assert weights_hash(module) != first
    assert weights_hash(nn.Linear(2, 1).bfloat16()) != weights_hash(nn.Linear(2, 1))
