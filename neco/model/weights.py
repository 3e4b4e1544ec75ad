"""Weights of a backbone from wherever they are: recognised from their keys, matched strictly, never through pickle."""

import hashlib
import math
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal
from urllib.parse import urlparse
from urllib.request import urlopen

import safetensors.torch
import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from torch import Tensor, nn

from neco.errors import NecoError
from neco.model import lora
from neco.model.backbone import Backbone
from neco.progress import track

Which = Literal["auto", "student", "teacher"]
LANDMARK = "patch_embed.proj.weight"  # what stands before it, in a file's flattened keys, is where a network begins
ANY = r"(?:(?:state_dict|model|module|backbone|net)\.)*"


@dataclass(frozen=True, slots=True)
class Format:
    """A layout: for each network it holds (`student`, `teacher`, or `only`), what its keys begin with."""

    name: str
    networks: Mapping[str, str]


# The first format whose networks are all found is taken: the specific before the general.
FORMATS = (
    Format("neco checkpoint", {r: rf"state_dict\.{r}\.backbone\.net\." for r in ("student", "teacher")}),
    Format("published NeCo checkpoint", {"student": r"state_dict\.model\.", "teacher": r"state_dict\.teacher\."}),
    Format("student and teacher", {r: rf"{ANY}{r}\.{ANY}" for r in ("student", "teacher")}),
    Format("teacher", {"teacher": rf"{ANY}teacher\.{ANY}"}),
    Format("student", {"student": rf"{ANY}student\.{ANY}"}),
    Format("plain backbone", {"only": ANY}),
)
RENAMES = (  # other names -> timm's
    (r"register_tokens", "reg_token"),  # DINOv2 hub
    (r"(blocks\.\d+\.mlp\.)w12(\..+)", r"\1fc1\2"),  # DINOv2 hub, giant
    (r"(blocks\.\d+\.mlp\.)w3(\..+)", r"\1fc2\2"),
)
IGNORABLE = (  # (keys, why a backbone does without them)
    (r"mask_token", "masked-image pretraining only"),
    (r"(\w*head|fc|classifier|projector|predictor|attn_pool)\..+", "a head, not the backbone"),
)
DROPPED = (r"reg_token", "registers=drop")
CONVERT = (
    "import torch; old = torch.load('{}', weights_only=False); torch.save({{k: v for k, v in old.items() "
    "if k in ('state_dict', 'model', 'student', 'teacher') or hasattr(v, 'shape')}}, 'new.pth')"
)


@dataclass(frozen=True, slots=True)
class Report:
    """What `load` did: where the weights came from, which network of the file, how its keys were used.

    `hash` is `weights_hash` of the backbone afterwards, `ignored` maps keys of the network that were not needed to
    the reason, `outside` counts the tensors of the file that belong to something else (other networks, optimiser),
    `merged` the weights that had adapters.
    """

    source: str
    format: str
    which: str
    hash: str
    matched: int = 0
    ignored: dict[str, str] = field(default_factory=dict)
    outside: int = 0
    merged: int = 0

    def __str__(self) -> str:
        if not self.matched:
            return f"weights {self.hash}: random"
        left = "".join(f", {key} ignored ({why})" for key, why in self.ignored.items())
        network = "" if self.which == "only" else f", {self.which}"
        outside = f", {self.outside} tensors of other parts" if self.outside else ""
        merged = f", adapters merged into {self.merged}" if self.merged else ""
        told = f"{self.matched} matched{merged}{left}{outside}"
        return f"weights {self.hash}: {self.source} ({self.format}{network}), {told}"


def load(backbone: Backbone, source: str | Path | None = None, which: Which = "auto") -> Report:
    """Fill `backbone` with the weights of `source`, every tensor of both sides accounted for.

    Args:
        backbone: changed in place.
        source: `none` (leave it random), `hub` (the published weights of its name), another hub name of timm, a URL,
            a file (.pth .pt .ckpt .safetensors) or `package:FILE`; None means `backbone.weights`.
        which: the network of a file that holds student and teacher; `auto` prefers the teacher.

    Raises:
        NecoError: nothing there, no connection, a file that needs pickle, an unknown layout, no such network in it,
            keys that are missing, left over or of another shape (listed), or values that aren't finite (named).
    """
    source = backbone.weights if source is None else str(source)
    if source == "none":
        return Report("none", "random", "only", weights_hash(backbone))
    path = locate(source, backbone.spec["name"])
    held = read(path)
    layout, networks = recognise(held, source)
    role = next(r for r in ("teacher", "only", "student") if r in networks) if which == "auto" else which
    if role not in networks:
        found = "one plain network" if "only" in networks else f"the {', '.join(networks)} only"
        raise NecoError(f"weights={which}: {source} holds {found}; use weights=auto")
    prefix = networks[role]
    inside = {key.removeprefix(prefix): value for key, value in held.items() if key.startswith(prefix)}
    folded = lora.fold(inside)
    state, ignored = match(backbone, folded, f"{source} ({layout})")
    backbone.net.load_state_dict(state)
    outside, merged = len(held) - len(inside), len(folded.keys() - inside.keys())
    return Report(source, layout, role, weights_hash(backbone), len(state), ignored, outside, merged)


def weights_hash(module: nn.Module) -> str:
    """First 12 digits of the SHA-256 over names, types, shapes and bytes of a module's state, sorted by name.

    Adapters are merged first, so that it is the hash of the plain network that `load` makes of them.
    """
    digest = hashlib.sha256()
    for name, value in sorted(lora.fold(module.state_dict()).items()):
        if hasattr(value, "full_tensor"):  # sharded: every process asks, every process gets the whole
            value = value.full_tensor()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def locate(source: str, name: str) -> Path:
    """The local file that `source` means, downloaded (once) if need be; `name` is what `hub` stands for."""
    path = Path(source).expanduser()
    if source.startswith("package:"):
        path = Path(__file__).parent / source.removeprefix("package:")
    elif source.startswith(("http://", "https://")):
        return _download(source)
    elif source == "hub" or (timm.is_model(source) and not path.exists()):
        return _from_hub(name if source == "hub" else source)
    if not path.is_file():
        raise NecoError(f"weights {source}: no such file ({path.absolute()}) and no hub name that timm knows")
    return path


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, keys of nested dictionaries joined by dots, memory-mapped where the format allows it."""
    return _flatten(contents(path))


def contents(path: Path) -> dict[str, Any]:
    """What a weights file or checkpoint holds. Raises NecoError for one that is damaged, of another kind or unsafe."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises just anything for files that are something else
        culprits = re.findall(r"GLOBAL (\S+)", str(error)) if isinstance(error, UnpicklingError) else []
        if culprits and zipfile.is_zipfile(path):  # above is the first; here all can be had
            culprits = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if not culprits:
            reason = str(error).splitlines()[0] if isinstance(error, OSError | safetensors.SafetensorError) else ""
            raise NecoError(
                f"{path} cannot be read as weights (.pth, .pt, .ckpt, .safetensors): "
                f"{reason or 'it is damaged or something else'}"
            ) from error
        raise NecoError(
            f"{path} needs pickle, which can run any code, for: {', '.join(culprits)}. If you trust it, "
            f'convert it once: python -c "{CONVERT.format(path)}"'
        ) from error
    if not isinstance(held, dict):
        raise NecoError(f"{path} cannot be read as weights: it holds a {type(held).__name__}, no tensors by name")
    return held


def recognise(held: Mapping[str, Tensor], source: str = "file") -> tuple[str, dict[str, str]]:
    """Name of the layout and, for each network found in it, what its keys begin with."""
    prefixes = [key.removesuffix(LANDMARK) for key in held if key.endswith(LANDMARK)]
    for layout in FORMATS:
        found = {r: [p for p in prefixes if re.fullmatch(pattern, p)] for r, pattern in layout.networks.items()}
        if any(len(places) > 1 for places in found.values()):
            raise NecoError(f"{source} holds several networks that could be meant: {found}")
        if all(found.values()):
            return layout.name, {role: places[0] for role, places in found.items()}
    seen = ", ".join([*prefixes][:5]) or ", ".join([*held][:5]) or "no tensors"
    raise NecoError(f"{source} has no layout that is known here: no ViT's {LANDMARK} where one was looked for ({seen})")


def match(backbone: Backbone, held: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of `backbone.net` from a network's tensors under any known names, and the keys that were ignored."""
    wanted: dict[str, Tensor] = backbone.net.state_dict()
    state = {}
    for key, value in held.items():
        for pattern, name in RENAMES:
            key = re.sub(f"^{pattern}$", name, key)
        state[key] = value
    reasons = (*IGNORABLE, DROPPED) if backbone.spec["registers"] == "drop" else IGNORABLE
    ignored = {key: why for key in sorted(set(state) - set(wanted)) for keys, why in reasons if re.fullmatch(keys, key)}
    state = {key: value for key, value in state.items() if key not in ignored}
    pos = state.get("pos_embed")
    if pos is not None and backbone.net.no_embed_class and "cls_token" in state and _side(pos.shape[1] - 1):
        # timm keeps no position for CLS beside registers: x + pos is the same with the sum as the token
        state |= {"cls_token": state["cls_token"] + pos[:, :1], "pos_embed": pos[:, 1:]}

    faults = [f"missing: {key}" for key in wanted if key not in state]
    faults += [f"left over: {key}" for key in state if key not in wanted]
    faults += [
        f"shape: {key} is {tuple(state[key].shape)} in the file, {tuple(wanted[key].shape)} in the network"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if faults:
        shown = "\n  ".join(faults[:10] + ["..."] * (len(faults) > 10))
        raise NecoError(
            f"{where} does not fit {backbone.spec['name']}: {len(faults)} keys\n  {shown}{_hint(backbone, state)}"
        )
    broken = [key for key in wanted if not state[key].isfinite().all()]
    if broken:
        raise NecoError(f"{where} has values that are not finite in {len(broken)} tensors: {', '.join(broken[:10])}")
    return state, ignored


def _side(tokens: int) -> int:
    """Side of the square grid with that many tokens, or 0."""
    side = math.isqrt(tokens)
    return side if side * side == tokens else 0


def _hint(backbone: Backbone, state: Mapping[str, Tensor]) -> str:
    net = backbone.net
    if ("reg_token" in state) != (net.reg_token is not None):
        return "\nfile and model differ in registers: dinov2_* has none, dinov2r_* keeps, dinov2r_xr_* drops them"
    pos, patch = state.get("pos_embed"), state[LANDMARK].shape == net.patch_embed.proj.weight.shape
    if patch and pos is not None and net.pos_embed is not None and pos.shape[1] != net.pos_embed.shape[1]:
        side = _side(pos.shape[1]) or _side(pos.shape[1] - 1)
        return f"\nthe file's positions are for model.size={side * backbone.patch} (inputs may have any size)"
    return ""


def _flatten(tree: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(tree, Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, Mapping) else ()
    return {k: v for key, value in items for k, v in _flatten(value, f"{path}.{key}".lstrip(".")).items()}


def _unreachable(what: str, error: Exception) -> NecoError:
    return NecoError(
        f"cannot download {what}: {error}. Give a local file (checkpoint=PATH or model.weights=PATH), "
        "or start from random weights (model.weights=none)"
    )


def _from_hub(name: str) -> Path:
    """The weights file of timm's model `name`, from the Hugging Face cache or hub."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise NecoError(f"weights hub: timm knows no published weights for {name}; give its name with a tag, or a file")
    place = config.hf_hub_id, config.hf_hub_filename or "model.safetensors"
    cached = try_to_load_from_cache(*place)
    if isinstance(cached, str):
        return Path(cached)
    try:
        get_hf_file_metadata(hf_hub_url(*place), timeout=10)  # one look: the download itself retries for half a minute
        return Path(hf_hub_download(*place))
    except Exception as error:  # of the client's HTTP library, which it has changed
        raise _unreachable(f"{name} from {config.hf_hub_id}", error) from error


def _download(url: str) -> Path:
    """The file behind a URL, kept in torch's hub folder under its name and a hash of the URL."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / name
        try:
            with urlopen(url, timeout=10) as response, part.open("wb") as file:
                length = int(response.headers.get("Content-Length") or 0)
                blocks = iter(lambda: response.read(1 << 20), b"")
                for block in track(blocks, f"downloading {name}", total=math.ceil(length / (1 << 20)) or None):
                    file.write(block)
        except (OSError, HTTPException) as error:
            raise _unreachable(url, error) from error
        if length and part.stat().st_size != length:
            raise _unreachable(url, EOFError(f"{part.stat().st_size} of {length} bytes came"))
        part.replace(path)
    return path
