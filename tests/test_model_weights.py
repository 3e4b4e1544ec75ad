"""Weights in each layout that people have, from a network written down here independently of timm and of neco."""

import argparse
import collections
import functools
import hashlib
import math
import multiprocessing
import pathlib
import re
import threading
import time
import types
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from weights_support import renamed, three

from neco import download
from neco.errors import NecoError
from neco.model import load_backbone, trained_model, weights
from neco.model.backbone import Backbone
from neco.model.weights import load, weights_hash

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


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def save(content: Any, name: str = "file.pth") -> str:
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save


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


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_file_kinds(tmp_path: Path, kind: str) -> None:
    hub, net = Hub(seed=4), backbone()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
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
    load(net, saved({key: value.half() for key, value in hub.w.items()}))
    assert all(torch.equal(p, hub.w[n].half().float()) for n, p in net.net.state_dict().items())


def test_none_changes_nothing() -> None:
    net = backbone(weights="none")
    before = weights_hash(net)
    report = load(net)
    assert (report.hash, report.matched, weights_hash(net)) == (before, 0, before)


def test_packaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "__file__", str(tmp_path / "weights.py"))
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(saved: Any, value: float) -> None:
    state = Hub().w
    state["blocks.1.ls1.gamma"][3] = value
    with pytest.raises(NecoError, match=r"not finite in 1 tensors: blocks\.1\.ls1\.gamma"):
        load(backbone(), saved(state))


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_runs_only_when_trusted(tmp_path: Path, legacy: bool) -> None:
    path, touched = tmp_path / "old.ckpt", tmp_path / "touched"
    torch.save({"model": Hub().w, "args": Evil(touched)}, path, _use_new_zipfile_serialization=not legacy)
    for use in (
        lambda: load(backbone(), path),
        lambda: load_backbone(str(path)),
        lambda: trained_model(str(path)),
    ):
        with pytest.raises(NecoError, match=r"old\.ckpt needs pickle.* (builtins\.)?getattr.*trust_pickle=true"):
            use()
        assert not touched.exists()
    net = backbone()
    load(net, path, trust_pickle=True)
    assert touched.exists() and same(net, Hub())


def old_run() -> dict[str, Any]:
    from omegaconf import OmegaConf

    config = OmegaConf.create({"lr": 1e-3, "crops": [1, None, True, "x"], "out": {"dir": "${oc.env:HOME}"}})
    return {
        "args": argparse.Namespace(lr=1e-3, out=Path("runs"), nested=types.SimpleNamespace(a=1)),
        "hyper_parameters": config,
        "lists": config.crops,
        "best": np.float64(0.5),
        "numbers": [np.float32(1), np.int64(2), np.bool_(True), np.dtype("float16")],
        "log": collections.defaultdict(list, {"loss": [1.0]}),
        "order": collections.OrderedDict(a=1),
        "torch": torch.__version__,
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_what_old_checkpoints_hold_needs_no_trust(tmp_path: Path, legacy: bool) -> None:
    content = {"model": Hub().w, **old_run()}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=not legacy)
    net = backbone()
    report = load(net, tmp_path / "old.pth")
    assert same(net, Hub()) and report.outside == 0
    held = weights.contents(tmp_path / "old.pth")
    assert held["args"] == content["args"] and held["numbers"] == content["numbers"]


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        (np.zeros(2), r"numpy\.ndarray"),
        (functools.partial(print, 1), r"functools\.partial"),
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        ({NecoError: 1}, r"neco\.errors\.NecoError"),  # as old Lightning keeps its callbacks
        (np.dtype([("a", "O")]), r"numpy\.dtypes?\.\w+"),
    ],
)
def test_everything_else_needs_trust(saved: Any, extra: Any, culprit: str) -> None:
    with pytest.raises(NecoError, match=f"needs pickle.*{culprit}.*trust_pickle=true"):
        load(backbone(), saved({"model": Hub().w, "extra": extra}))


def test_nothing_harmless_is_a_function_that_does_something() -> None:
    """A new entry has to be thought about: what can a file make of it that chooses the arguments?"""
    for kind in weights._harmless():
        thing = kind[0] if isinstance(kind, tuple) else kind
        assert isinstance(thing, type) or thing in (np.float64().__reduce__()[0], weights._forget_default), kind
    assert {name.partition(".")[0] for name in weights.HARMLESS} <= {
        "argparse", "builtins", "numpy", "omegaconf", "pathlib", "torch", "types", "typing"
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_a_program(tmp_path: Path) -> None:
    """As OpenAI publishes CLIP."""
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "ViT-B-16.pt")
    with pytest.raises(NecoError, match=r"ViT-B-16\.pt needs pickle.*TorchScript.*trust_pickle=true"):
        weights.read(tmp_path / "ViT-B-16.pt")
    assert set(weights.read(tmp_path / "ViT-B-16.pt", trust_pickle=True)) == {"weight", "bias"}


@pytest.mark.parametrize("trust", [False, True])
def test_damaged_files_are_named(tmp_path: Path, trust: bool) -> None:
    path = tmp_path / "cut.pth"
    torch.save(Hub().w, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(NecoError, match=r"cut\.pth cannot be read as weights"):
        load(backbone(), path, trust_pickle=trust)


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_files_that_are_no_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(NecoError, match=name):
        load(backbone(), str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "which", "message"),
    [
        (Hub().w, "teacher", "weights=teacher: .*one plain network.*weights=auto"),
        ({"teacher": Hub().w}, "student", "weights=student: .*the teacher only"),
        ({"model": Hub().w, "module": Hub().w}, "auto", "several networks"),
        ({"features.0.weight": torch.ones(1)}, "auto", r"no layout.*features\.0\.weight"),
        ({"epoch": 3}, "auto", "no tensors"),
        ({"ema_of_something.patch_embed.proj.weight": torch.ones(1)}, "auto", r"no layout.*ema_of_something"),
    ],
)
def test_files_without_the_network_asked_for(saved: Any, content: Any, which: Any, message: str) -> None:
    with pytest.raises(NecoError, match=f"(?s){message}"):
        load(backbone(), saved(content), which)


def test_no_such_file() -> None:
    with pytest.raises(NecoError, match=r"weights /nowhere/x\.pth: no such file"):
        load(backbone(), "/nowhere/x.pth")


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


# -- downloads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A web server over a folder with `hub.pth`, and an empty cache for what is downloaded.

    Its `wanted` lists the range of each request. A path with `short` breaks off in the middle of its first answer.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "PAUSE", 0.001)
    (tmp_path / "www").mkdir()
    torch.save(Hub().w, tmp_path / "www" / "hub.pth")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            httpd.wanted.append(wanted)
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                return self.send_error(404)
            body = path.read_bytes()
            begin = int(wanted[6:-1]) if wanted and self.headers.get("If-Range") == '"1"' else 0
            self.send_response(206 if begin else 200)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(body) - begin))
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            time.sleep(0.2 * ("slow" in self.path))
            broken = "broken" in self.path or ("short" in self.path and not begin)
            self.wfile.write(body[begin : len(body) // 2 if broken else None])

    httpd: Any = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "www")))
    httpd.wanted, httpd.url = [], f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name[8:] for path in (tmp_path / "home" / "hub" / "checkpoints").glob("[!.]*"))


def test_url_is_downloaded_once(server: Any, tmp_path: Path) -> None:
    hub, net = Hub(), backbone()
    load(net, f"{server.url}/hub.pth?download=true")
    assert same(net, hub)
    load(net, f"{server.url}/hub.pth?download=true")
    assert cached(tmp_path) == ["-hub.pth"] and server.wanted == [None]


def test_interrupted_download_goes_on(server: Any, tmp_path: Path) -> None:
    path, net = tmp_path / "www" / "short.pth", backbone()
    torch.save(Hub().w, path)
    load(net, f"{server.url}/short.pth")
    assert same(net, Hub()) and cached(tmp_path) == ["-short.pth"]
    assert server.wanted == [None, f"bytes={path.stat().st_size // 2}-"]


def test_hash_in_the_name_is_checked(server: Any, tmp_path: Path) -> None:
    body = (tmp_path / "www" / "hub.pth").read_bytes()
    right, wrong = f"dino-{hashlib.sha256(body).hexdigest()[:8]}.pth", "dino-0123456f.pth"
    for name in (right, wrong):
        (tmp_path / "www" / name).write_bytes(body)
    load(backbone(), f"{server.url}/{right}")
    with pytest.raises(NecoError, match=rf"cannot download .*SHA-256 is {right[5:13]}\w+ instead of 0123456f"):
        load(backbone(), f"{server.url}/{wrong}")
    (tmp_path / "www" / "dino-20241201.pth").write_bytes(body)  # a date
    load(backbone(), f"{server.url}/dino-20241201.pth")
    (tmp_path / "www" / "half.pth").write_bytes(body[:1000])
    with pytest.raises(NecoError, match=r"damaged.*The download was removed"):
        load(backbone(), f"{server.url}/half.pth")
    assert sorted(cached(tmp_path)) == sorted([f"-{right}", "-dino-20241201.pth"])


def test_of_two_processes_one_downloads(server: Any, tmp_path: Path) -> None:
    url, context = f"{server.url}/slow.pth", multiprocessing.get_context("fork")
    (tmp_path / "www" / "slow.pth").write_bytes(b"x" * 1000)
    both = [context.Process(target=weights.locate, args=(url, "")) for _ in range(2)]
    with download.alone(weights.cache_of(url)):  # so that both have started before one goes on
        for process in both:
            process.start()
        both[0].join(0.3)
        assert server.wanted == [] and all(process.is_alive() for process in both)
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert server.wanted == [None] and cached(tmp_path) == ["-slow.pth"]


@pytest.mark.parametrize(("name", "left"), [("absent.pth", []), ("broken.pth", ["-broken.pth.part"])])
def test_failed_download_says_what_to_do(server: Any, tmp_path: Path, name: str, left: list[str]) -> None:
    torch.save(Hub().w, tmp_path / "www" / "broken.pth")
    with pytest.raises(NecoError, match=rf"cannot download http.*{name}.*checkpoint=PATH.*model\.weights=none"):
        load(backbone(), f"{server.url}/{name}")
    assert [name for name in cached(tmp_path) if not name.endswith("version")] == left


def test_cache_that_cannot_be_written(server: Any, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where a folder should be")
    with pytest.raises(NecoError, match=r"cannot download http.*home.*checkpoint=PATH"):
        load(backbone(), f"{server.url}/hub.pth")


@pytest.mark.parametrize("source", ["hub", "vit_small_patch14_dinov2.lvd142m"])
def test_hub_without_a_connection_fails_at_once(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *place, revision: None)
    monkeypatch.setattr(weights, "get_hf_file_metadata", offline)
    start = time.monotonic()
    with pytest.raises(NecoError, match=r"timm/vit_small_patch14_dinov2\.lvd142m.*Give a local file"):
        load(backbone(), source)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("source", "place"),
    [
        (None, ("timm/vit_small_patch14_dinov2.lvd142m", "model.safetensors", "main")),
        ("https://huggingface.co/FunAILab/NeCo/resolve/v1/a/b.ckpt?download=true", ("FunAILab/NeCo", "a/b.ckpt", "v1")),
        ("https://huggingface.co/facebook/dinov2-small/blob/main/x.bin", ("facebook/dinov2-small", "x.bin", "main")),
    ],
)
def test_hugging_face_reads_its_cache_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None, place: tuple[str, ...]
) -> None:
    hub, net, asked = Hub(), backbone(weights="hub"), []
    safetensors.torch.save_file(hub.w, tmp_path / "model.safetensors")

    def cached(*place: str, revision: str) -> str:
        asked.append((*place, revision))
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr(weights, "try_to_load_from_cache", cached)
    load(net, source)
    assert asked == [place] and same(net, hub)


def test_hub_name_without_published_weights() -> None:
    with pytest.raises(NecoError, match="no published weights for vit_small_patch16_18x2_224"):
        load(backbone(), "vit_small_patch16_18x2_224")
