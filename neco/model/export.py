"""Weights out, in the names and files of other libraries; a file is read again before it counts.

Shapes: B images, H W pixels, h w patches, D channels.
"""

import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import GluMlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from neco.config.types import MEAN, STD
from neco.config.validate import build
from neco.model import weights
from neco.model.backbone import Backbone
from neco.utils import atomic_files
from neco.utils.errors import NecoError
from neco.utils.masking import mask_nested, mask_secrets

Format = Literal["timm", "dinov2", "safetensors", "onnx"]
FILES: dict[Format, str] = {
    "timm": "model.safetensors",
    "dinov2": "model.pth",
    "safetensors": "model.safetensors",
    "onnx": "model.onnx",
}
ONNX = ("onnx", "onnxscript", "onnxruntime")
ONNX_BYTES = 1.5e9  # above it torch spreads a model over several files
TOLERANCE = 1e-4  # of an ONNX file's features, as a share of the largest value
BLOCK = r"(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma"
HUB = rf"cls_token|pos_embed|reg_token|(patch_embed\.proj|norm)\.(weight|bias)|blocks\.\d+\.({BLOCK})"


def check(network: Backbone, form: Format) -> None:
    """Raises NecoError for a network, which may be on the meta device, that `write` could not write in this form."""
    if form == "dinov2":
        hub_arguments(network)
    if form == "onnx":
        if lost := [name for name in ONNX if importlib.util.find_spec(name) is None]:
            raise NecoError(f"format=onnx needs {', '.join(lost)}: pip install 'neco[onnx]', or {' '.join(ONNX)}")
        if (size := sum(value.nbytes for value in network.parameters())) > ONNX_BYTES:
            raise NecoError(f"format=onnx: {size / 1e9:.1f} GB of weights do not fit into one file; use safetensors")


def timm_arguments(network: Backbone) -> dict[str, Any]:
    """What `timm.create_model(name, ...)` takes to build the network."""
    spec = network.spec
    given = {"num_classes": 0, "global_pool": "", "img_size": spec["size"], "dynamic_img_size": True, **spec["arch"]}
    if spec["registers"] == "drop":
        given["reg_tokens" if isinstance(network.net, VisionTransformer) else "num_reg_tokens"] = 0
    return given


def hub_arguments(network: Backbone) -> dict[str, Any]:
    """What `DinoVisionTransformer` of the DINOv2 repository takes to build the network, its positions included.

    Raises NecoError, with the reason, where that class has no such network.
    """
    net, block, keys = network.net, network.net.blocks[0], network.net.state_dict().keys()
    needed = {"cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias", "norm.bias"}
    gated = isinstance(block.mlp, GluMlp)
    faults = [f"it has {key}" for key in keys if not re.fullmatch(HUB, key)][:1]
    faults += [f"it has no {key}" for key in sorted(needed - keys)]
    if net.reg_token is not None and net.pos_embed is not None and not net.no_embed_class:
        faults.append("its registers have positions")
    if not isinstance(block.mlp.act, nn.SiLU if gated else nn.GELU):
        faults.append(f"its activation is {type(block.mlp.act).__name__}")
    if net.norm.eps != 1e-6:
        faults.append(f"its norms add {net.norm.eps:g}, not 1e-06")
    if network.inputs != "imagenet":
        faults.append(f"its inputs are {network.inputs}'s")
    if faults:
        raise NecoError(f"format=dinov2: {network.spec['name']} is no network of DINOv2's code: {'; '.join(faults)}")
    registers = 0 if net.reg_token is None else net.reg_token.shape[1]
    antialias = network.pos_interp == "timm" or (network.pos_interp == "hub" and registers > 0)
    return {
        "img_size": network.size,
        "patch_size": network.patch,
        "embed_dim": network.dim,
        "depth": network.depth,
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc2.in_features / network.dim * (1.5 if gated else 1),  # gated: it takes 2/3 of that
        "ffn_layer": "swiglufused" if gated else "mlp",
        "init_values": 1.0 if hasattr(block.ls1, "gamma") else None,
        "block_chunks": 0,
        "num_register_tokens": registers,
        "interpolate_antialias": antialias,
        "interpolate_offset": 0.0 if antialias else 0.1,
    }


def hub_state(network: Backbone) -> dict[str, Tensor]:
    """The weights under the names of DINOv2's repository, all that its class wants. Raises as `hub_arguments` does."""
    gated = hub_arguments(network)["ffn_layer"] != "mlp"
    state = network.net.state_dict()
    if network.net.no_embed_class:  # the position of CLS is in its token
        state["pos_embed"] = torch.cat([torch.zeros_like(state["cls_token"]), state["pos_embed"]], 1)
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
    if gated:
        state = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for key, v in state.items()}
    return {**state, "mask_token": state["cls_token"].new_zeros(1, network.dim)}


def timm_config(network: Backbone) -> dict[str, Any]:
    """The `config.json` with which timm builds the network from a folder or a hub."""
    name, _, tag = network.spec["name"].partition(".")
    clip = network.inputs == "clip"
    pretrained = {
        "tag": tag or "neco",
        "input_size": [3, network.size, network.size],
        "fixed_input_size": False,
        "mean": OPENAI_CLIP_MEAN if clip else MEAN,
        "std": OPENAI_CLIP_STD if clip else STD,
        "interpolation": "bicubic",
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    given = timm_arguments(network)
    shown = {"num_classes": given.pop("num_classes"), "global_pool": given["global_pool"], "num_features": network.dim}
    return {"architecture": name, **shown, "pretrained_cfg": pretrained, "model_args": given}


def write(
    network: Backbone,
    node: dict[str, Any],
    form: Format,
    path: Path,
    beside: Callable[[str], Mapping[str, str]] = lambda told: {},
) -> str:
    """Write the weights, whole or not at all, and read them again; says what was compared.

    Args:
        network: on the CPU, in evaluation mode.
        node: of the configuration, which builds the network; `.safetensors` and `.onnx` files hold it.
        path: with the suffix of `FILES[form]`.
        beside: given what was compared, the texts of other files in that folder, which come with the weights.

    Raises:
        NecoError: `check` finds fault, or what was read again is not what was written; then nothing is kept.
    """
    check(network, form)
    digest = weights.weights_hash(network)
    about = {"neco": json.dumps({"model": mask_nested(node), "weights": digest})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.scratch(path.parent) as folder:
        part = folder / path.name
        if form == "onnx":
            _write_onnx(network, part, about)
            told = _compare(network, _session(part), [(1, 0, 0), (2, -1, 2)], TOLERANCE)
        else:
            if form == "dinov2":
                torch.save(hub_state(network), part)
            else:
                part.write_bytes(
                    safetensors.torch.save(network.net.state_dict(), about)
                )  # save_file: for the owner only
            again = build({**node, "weights": "none"}, "model").eval()
            if (found := weights.load(again, str(part)).hash) != digest:
                raise NecoError(f"{path}: weights {digest} were written and {found} were read")
            told = _compare(network, again, [(1, 0, 0)], 0)
        told = f"weights {digest}, {told}"
        for name, text in beside(told).items():
            (folder / name).write_text(mask_secrets(text), encoding="utf-8")
        whole = sorted(folder.iterdir(), key=lambda file: file == part)  # the weights last
        for written in whole:
            atomic_files.sync(written)
        for written in whole:
            atomic_files.rename(written, path.with_name(written.name))
    return told


@torch.no_grad()
def _compare(
    network: Backbone, other: Callable[[Tensor], Tensor], inputs: list[tuple[int, int, int]], tolerance: float
) -> str:
    """Compare features of noise, `inputs` being images and how many patches their sides differ from the usual size."""
    largest, shapes = 0.0, []
    for images, *more in inputs:
        height, width = (network.size + patches * network.patch for patches in more)
        noise = torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(0))
        ours, theirs = network(noise), other(noise)
        error = float((ours - theirs).abs().max() / ours.abs().max()) if ours.shape == theirs.shape else math.inf
        shapes.append(f"{images}x{height}x{width}")
        if not error <= tolerance:
            raise NecoError(
                f"the file's features of {shapes[-1]} images are not the network's ({error:.0e} of the largest)"
            )
        largest = max(largest, error)
    differ = f"differ by at most {largest:.0e} of the largest" if largest else "are equal"
    return f"read again, features of {' and '.join(shapes)} images {differ}"


def _write_onnx(network: Backbone, path: Path, about: dict[str, str]) -> None:
    """Images (B, 3, H, W) -> features (B, h, w, D) of any number and size."""
    images = torch.zeros(2, 3, 3 * network.patch, 5 * network.patch)
    batch, h, w = (torch.export.Dim(name, min=1, max=2**20) for name in ("batch", "h", "w"))  # torch 2.7 wants an end
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes={"images": {0: batch, 2: network.patch * h, 3: network.patch * w}},
    )
    assert program is not None
    program.model.metadata_props.update(about)
    program.save(str(path))


def _session(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
