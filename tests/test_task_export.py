"""task=export: every format loads elsewhere, strictly, with the same features; the card's code runs."""

import json
import re
import shutil
import subprocess
import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import SMALL, perform
from safetensors.torch import load_file
from torch import nn

import neco
from neco import load_backbone
from neco.config import discovery, validate
from neco.config.types import MEAN, STD
from neco.model import export, weights
from neco.model.backbone import Backbone, _resampled, interpolate_positions
from neco.model.weights import weights_hash
from neco.report import model_card
from neco.runs.results import Results
from neco.task import train
from neco.utils.errors import NecoError

ARCH = {"embed_dim": 24, "depth": 2, "num_heads": 2}
NODES = {
    "dino": {"name": "vit_small_patch16_224.dino", "size": 48},
    "dinov2": {"name": "vit_small_patch14_dinov2.lvd142m", "size": 42},
    "registers": {"name": "vit_small_patch14_reg4_dinov2.lvd142m", "size": 42},
    "dropped": {"name": "vit_small_patch14_reg4_dinov2.lvd142m", "size": 42, "registers": "drop"},
    "neco": {"name": "vit_small_patch14_reg4_dinov2.lvd142m", "size": 42, "pos_interp": "neco"},
    "gated": {"name": "vit_giant_patch14_reg4_dinov2.lvd142m", "size": 42},
    "dinov3": {"name": "vit_small_patch16_dinov3.lvd1689m", "size": 48},
    "clip": {"name": "vit_base_patch16_clip_224.openai", "size": 48, "inputs": "clip"},
}
HUB = ("dino", "dinov2", "registers", "dropped", "neco", "gated")


def node(kind: str, **values) -> dict:
    return {"_target_": "neco.model.backbone.Backbone", "arch": ARCH, "weights": "none", **NODES[kind], **values}


def backbone(kind: str, **values) -> Backbone:
    """Random, and every parameter big enough in value that none is hidden by another."""
    torch.manual_seed(0)
    network = validate.build(node(kind, **values), "model").eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(std=0.3)
    return network


class Swiglu(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp: nn.Module, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), mlp
        self.ls1, self.ls2 = (Scale(dim) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoVisionTransformer(nn.Module):
    """DINOv2's network from its paper and repository: its parameters' names, its arguments, its order of operations."""

    def __init__(
        self, *, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, ffn_layer, init_values, block_chunks,
        num_register_tokens, interpolate_antialias, interpolate_offset,
    ) -> None:  # fmt: skip
        super().__init__()
        assert block_chunks == 0
        self.side, self.antialias, self.offset = img_size // patch_size, interpolate_antialias, interpolate_offset
        self.registers = num_register_tokens
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2 + 1, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        hidden = int(embed_dim * mlp_ratio)
        if ffn_layer == "swiglufused":
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8

        def mlp() -> nn.Module:
            return (Swiglu if ffn_layer == "swiglufused" else Mlp)(embed_dim, hidden)

        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp(), bool(init_values)) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def positions(self, h, w):
        if h == w == self.side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        where = {"size": (h, w)}
        if self.offset:
            where = {"scale_factor": ((h + self.offset) / self.side, (w + self.offset) / self.side)}
        grid = F.interpolate(grid, mode="bicubic", antialias=self.antialias, **where)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], 1)

    def forward_features(self, images):
        x = self.patch_embed.proj(images)
        h, w = x.shape[-2:]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1) + self.positions(h, w)
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return {"x_norm_patchtokens": self.norm(x)[:, 1 + self.registers :]}


@pytest.mark.parametrize("kind", HUB)
def test_names_of_the_dinov2_hub(kind):
    ours = backbone(kind)
    hub = DinoVisionTransformer(**export.hub_arguments(ours)).eval()
    hub.load_state_dict(export.hub_state(ours), strict=True)
    for sides in ((ours.size, ours.size), (2 * ours.patch, 5 * ours.patch)):
        images = torch.randn(2, 3, *sides)
        found = hub.forward_features(images)["x_norm_patchtokens"]
        torch.testing.assert_close(found, ours(images).flatten(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "words"), [("dinov3", "it has no pos_embed"), ("clip", "it has norm_pre.weight.*its inputs are clip's")]
)
def test_networks_that_the_hub_does_not_have(kind, words):
    with pytest.raises(NecoError, match=rf"format=dinov2: {NODES[kind]['name']} is no network of DINOv2's.*{words}"):
        export.check(backbone(kind), "dinov2")


@pytest.mark.parametrize("kind", NODES)
def test_timm_loads_the_file_and_the_folder(kind, tmp_path):
    ours = backbone(kind)
    path = tmp_path / "model.safetensors"
    assert "are equal" in export.write(ours, node(kind), "timm", path)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it"
    (tmp_path / "config.json").write_text(json.dumps(export.timm_config(ours)))
    one = timm.create_model(NODES[kind]["name"], **export.timm_arguments(ours)).eval()
    one.load_state_dict(load_file(path), strict=True)
    two = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, ours.size, ours.size)
    wanted = ours(images).flatten(1, 2)
    shown = timm.data.resolve_model_data_config(two)
    if kind == "clip":  # pixels as they are, normalised as timm is told
        our_mean, our_std, mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD, shown["mean"], shown["std"]))
        images = (images * our_std + our_mean - mean) / std
    for other in (one, two):
        found = other.forward_features(images)[:, other.num_prefix_tokens :]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    again = load_backbone(str(tmp_path))
    assert weights_hash(again) == weights_hash(ours) and again.spec == ours.spec


@pytest.mark.parametrize("rule", ["timm", "neco"])
@pytest.mark.parametrize("sides", [(7, 7), (3, 4), (7, 8), (20, 9), (1, 13)])
def test_positions_of_an_export_for_all_sizes(rule, sides):
    pos = torch.randn(1, 49, 8)
    torch.testing.assert_close(
        _resampled(pos, *sides, rule == "timm"), interpolate_positions(pos, *sides, rule, False), rtol=1e-4, atol=1e-5
    )


def run_card(folder, monkeypatch):
    """The card's front matter and text, the images that it makes and the features of each piece of its code."""
    text = (folder / "README.md").read_text()
    hub = types.ModuleType("dinov2.models.vision_transformer")
    hub.DinoVisionTransformer = DinoVisionTransformer  # type: ignore[attr-defined]
    for name, module in {"dinov2": hub, "dinov2.models": hub, hub.__name__: hub}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(folder)
    space: dict = {}
    maps = []
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, space)
        maps += [torch.as_tensor(space.pop("maps"))] if "maps" in space else []
    return yaml.safe_load(text.split("---")[1]), text, space["images"], maps


def same(maps, wanted):
    for found in maps:
        torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    """A run folder: adapters, two networks, numbers."""
    few = ("eval=retrieval", "eval.retrieval.k=5", "dataset.val=6", "train.steps=1", "train.lora_rank=2")
    return perform(train, tmp_path_factory.mktemp("trained") / "run", cache, *SMALL, *few, "model.arch.depth=2")


PIECES = {"timm": 3, "safetensors": 2, "dinov2": 1, "onnx": 1}  # of code in the card that give features


@pytest.mark.parametrize("form", PIECES)
def test_a_run_with_its_card(form, trained, tmp_path, inside, monkeypatch):
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="runs where neco[onnx] is installed (make installs it)")
    status, said = inside("task=export", f"checkpoint={trained}", "weights=teacher", f"format={form}", "run_dir=out")
    assert status == 0, said
    ours = load_backbone(str(trained), weights="teacher")
    assert f"weights {weights_hash(ours)}, read again" in said
    head, text, images, maps = run_card(tmp_path / "out", monkeypatch)
    assert len(maps) == PIECES[form]
    same(maps, ours(images))
    assert form in head["tags"] and "license" not in head and str(trained.parent) not in text
    record = Results(trained).find(step=1, network="teacher", evaluation="retrieval")
    assert f"{100 * record['metrics']['miou_k5']:.2f} | `{record['protocol']}`" in text
    assert "| `train.lora_rank` | `2` | `0` |" in text and "here `hub`" in text
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession("model.onnx")
        for shape in ((1, 3, 64, 64), (3, 3, 8, 120)):
            images = torch.randn(shape)
            same([torch.from_numpy(session.run(None, {"images": images.numpy()})[0])], ours(images))
        assert weights_hash(ours) in session.get_modelmeta().custom_metadata_map["neco"]


@pytest.mark.parametrize("text", [None, "[1]", "{}", "{"])
def test_a_card_without_an_environment(trained, tmp_path, inside, text):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/environment.json").unlink()
    if text:
        (tmp_path / "run/environment.json").write_text(text)
    status, said = inside("task=export", "checkpoint=run", "weights=teacher", "format=safetensors", "run_dir=out")
    assert status == 0, said
    assert ("the card does not say where the run took place" in said) == (text != "{}")
    assert "`dataset=unknown`" in (tmp_path / "out/README.md").read_text()


def test_the_card_of_a_published_network_names_its_option(tmp_path, monkeypatch):
    for kind, pieces in (("dinov2", 2), ("clip", 2)):
        ours = backbone(kind)
        form = "dinov2" if kind == "dinov2" else "safetensors"
        path = tmp_path / kind / export.FILES[form]
        monkeypatch.setattr(model_card, "_option", lambda node: "tiny")
        told = export.write(ours, node(kind), form, path)
        report = weights.Report("hub", "", "only", "")
        path.with_name("README.md").write_text(
            model_card.card(ours, node(kind), form, path.name, report, told, [], None)
        )
        monkeypatch.setattr(neco, "load_backbone", lambda file, model=None, ours=ours: ours)
        _, text, images, maps = run_card(path.parent, monkeypatch)
        assert len(maps) == pieces and ('model="tiny"' in text) == (kind == "dinov2")
        same(maps, ours(images))
    monkeypatch.undo()
    assert (
        model_card._option(yaml.safe_load(discovery.find("model", "dinov2r_xr_vits14").read_text()))
        == "dinov2r_xr_vits14"
    )
    assert model_card._option(node("dinov2")) is None


def test_an_exported_file_says_what_it_is(trained, inside):
    assert inside("task=export", f"checkpoint={trained}", "format=safetensors", "run_dir=out")[0] == 0
    few = ("dataset.train=12", "dataset.val=6", "eval=retrieval", "eval.retrieval.augment=none")
    status, said = inside("task=eval", "checkpoint=out", *few)
    assert status == 0 and f"weights {weights_hash(load_backbone(str(trained)))}: out/model.safetensors" in said, said


def test_a_finetuned_backbone(finetune, inside, tmp_path):
    status, said = inside("task=export", f"checkpoint={finetune('finetune.steps=1')}", "run_dir=out")
    text = (tmp_path / "out/README.md").read_text()
    assert status == 0 and "Fine-tuned for segmentation, end to end with a decoder, which is not here, on" in text, said
    assert "| `finetune.steps` | `1` |" in text and "backbone and decoder together" in text


def test_numbers_of_other_runs(inside, tmp_path):
    few = ("dataset.train=12", "dataset.val=6", "eval=overcluster", "eval.overcluster.seeds=[0]")
    assert inside("task=eval", *few, "eval.overcluster.k=8", "run_dir=e")[0] == 0
    assert inside("task=export", "results=[e]", "run_dir=out")[0] == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "| shapes | val | overcluster | miou_k8 |" in text and "How it was trained" not in text
    status, said = inside("task=export", "weights=none", "results=[e]", "run_dir=other")
    assert status == 2 and "no number of weights" in said and not (tmp_path / "other/model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["file=model.pt"], "file=model.pt: format=timm writes a .safetensors file"),
        (["file=there/model.safetensors"], "README.md is there already"),
        (["results=[there]"], "results=there: no run with evaluations"),
        (["dataset=shapes"], "an export has none"),
        (["format=dinov2", "model=dinov3_vits16"], "format=dinov2"),
        (["format=onnx", "model.arch=null", "model.size=518", "model.name=vit_giant_patch14_dinov2"], "4.5 GB of"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_told_at_once(options, words, inside, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/README.md").write_text("mine")
    status, said = inside("task=export", *options)
    assert status == 2 and words in said, said
    assert (tmp_path / "there/README.md").read_text() == "mine" and not list(tmp_path.glob("runs/*/*"))


def test_onnx_has_to_be_installed(monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NecoError, match=r"pip install 'neco\[onnx\]'"):
        export.check(backbone("dino"), "onnx")


def test_a_file_that_reads_differently_is_not_kept(monkeypatch, tmp_path):
    save = export.safetensors.torch.save
    spoiled = lambda state, *rest: save({k: v + (k == "norm.bias") for k, v in state.items()}, *rest)  # noqa: E731
    monkeypatch.setattr(export.safetensors.torch, "save", spoiled)
    with pytest.raises(NecoError, match=r"is damaged: its weights are \w+ and not \w+, which were written"):
        export.write(backbone("dino"), node("dino"), "safetensors", tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_load_backbone_imports_neither_hydra_nor_lightning(tmp_path):
    export.write(backbone("dino"), node("dino"), "safetensors", tmp_path / "model.safetensors")
    lines = (
        "import sys, torch\nfrom neco import load_backbone\n"
        f"maps = load_backbone({str(tmp_path)!r})(torch.zeros(1, 3, 48, 64))\n"
        "assert maps.shape == (1, 3, 4, 24)\n"
        "assert not {'hydra', 'omegaconf', 'pytorch_lightning', 'lightning'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", lines], check=True, cwd=discovery.folder().parent)
