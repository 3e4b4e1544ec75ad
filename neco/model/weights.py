"""Weights of a backbone from wherever they are: recognised from their keys, matched strictly, never through pickle."""

import contextlib
import errno
import functools
import hashlib
import importlib
import json
import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from pickle import UnpicklingError
from typing import Any, Literal
from urllib.parse import urlparse

import numpy as np
import safetensors.torch
import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from torch import Tensor, nn

from neco import interrupt
from neco.download import alone, fetch
from neco.errors import NecoError
from neco.model import lora
from neco.model.backbone import Backbone
from neco.progress import transfers

Which = Literal["auto", "student", "teacher"]
# What stands before it, in a file's flattened keys, is where a network begins.
LANDMARK = (
    r"patch_embed\.proj\.weight$|embeddings\.patch_embeddings\.(projection\.)?weight$|(embeddings\.)?class_embedding$"
)
ANY = r"(?:(?:state_dict|model|module|backbone|net|visual|trunk|vit|dinov\d\w*|vision_model|_orig_mod)\.)*"
BOTH = {role: rf"{ANY}{role}\.{ANY}" for role in ("teacher", "student")}


class Damaged(NecoError):
    """A file that cannot be read as weights."""


@dataclass(frozen=True, slots=True)
class Format:
    """A layout: `sign`, found in a key of the file, gives it away.

    `networks` are what it may hold (`student`, `teacher`, or `only`) with what their keys begin with; `auto` takes the
    first that is there, which is the one that the method's authors evaluate.
    """

    name: str
    networks: Mapping[str, str]
    sign: str = ""


# The first format with its sign and one of its networks is taken: the specific before the general.
FORMATS = (
    Format("neco checkpoint", {r: rf"state_dict\.{r}\.backbone\.net\." for r in ("teacher", "student")}),
    Format("fine-tuned neco checkpoint", {"only": r"state_dict\.segmenter\.backbone\.net\."}),
    Format(
        "MoCo v3",
        {r: rf"{ANY}{encoder}_encoder\." for r, encoder in (("student", "base"), ("teacher", "momentum"))},
    ),
    Format("TimeT", {"student": rf"{ANY}feature_extractor\.{ANY}", "teacher": BOTH["teacher"]}, r"feature_extractor\."),
    Format("Leopart", {"student": rf"{ANY}model\.", "teacher": BOTH["teacher"]}, r"model\.prototypes\."),
    Format(
        "published NeCo checkpoint",
        {"teacher": r"state_dict\.teacher\.", "student": r"state_dict\.model\."},
        r"^state_dict\.(teacher\.|(teacher_)?projection_head\.)",
    ),
    Format("CrIBo", BOTH, r"^centroids_queue"),
    Format("iBOT", BOTH, r"^ibot_loss\."),
    Format("DINO or CrOC", BOTH, r"^dino_loss\."),
    Format("student and teacher", BOTH),
    Format("MAE", {"only": ANY}, r"decoder_(embed|pred)\."),
    Format("CLIP", {"only": ANY}, r"transformer\.resblocks\.\d+\.attn\.in_proj_weight$|vision_model\."),
    Format("transformers", {"only": ANY}, r"embeddings\.patch_embeddings\."),
    Format("DINOv3 hub", {"only": ANY}, r"storage_tokens$"),
    Format("DINOv2 hub", {"only": ANY}, r"mask_token$"),
    Format("plain backbone", {"only": ANY}),
)
B = r"(blocks\.\d+\.)"
RENAMES = (  # other names -> timm's, one after the other
    (r"^transformer\.resblocks\.", "blocks."),  # CLIP of OpenAI and open_clip, with more below
    # DINOv2 and DINOv3 hub
    (r"^(register|storage)_tokens$", "reg_token"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks of blocks, as trained with FSDP
    (rf"^{B}mlp\.w12\.", r"\1mlp.fc1."),
    (rf"^{B}mlp\.(w1|gate_proj)\.", r"\1mlp.fc1_g."),
    (rf"^{B}mlp\.w2\.", r"\1mlp.fc1_x."),
    (rf"^{B}mlp\.w3\.", r"\1mlp.fc2."),
    # transformers: ViT, DINOv2, DINOv3, CLIP
    (r"^(pre|post)_?(layrnorm|layernorm)\.", r"norm_\1."),
    (r"^norm_post\.", "norm."),
    (r"^embeddings\.class_embedding$|^embeddings\.cls_token$|^class_embedding$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$|^positional_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^((encoder|model)\.)?layers?\.(\d+)\.", r"blocks.\3."),
    (r"^layernorm\.", "norm."),
    (rf"^{B}(layernorm_before|layer_norm1)\.", r"\1norm1."),
    (rf"^{B}(layernorm_after|layer_norm2)\.", r"\1norm2."),
    (rf"^{B}(attention\.attention|attention|self_attn)\.", r"\1attn."),
    (rf"^{B}attn\.(query|key|value)\.", lambda m: f"{m[1]}attn.{m[2][0]}_proj."),
    (rf"^{B}attn\.(output\.dense|o_proj|out_proj)\.", r"\1attn.proj."),
    (rf"^{B}(intermediate\.dense|mlp\.weights_in|mlp\.up_proj)\.", r"\1mlp.fc1."),
    (rf"^{B}(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", r"\1mlp.fc2."),
    (rf"^{B}layer_scale(\d)\.lambda1$|^{B}gamma_(\d)$", lambda m: f"{m[1] or m[3]}ls{m[2] or m[4]}.gamma"),
    # CLIP
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (rf"^{B}ln_(\d)\.", r"\1norm\2."),
    (rf"^{B}attn\.in_proj_", r"\1attn.qkv."),
    (rf"^{B}mlp\.c_fc\.", r"\1mlp.fc1."),
    (rf"^{B}mlp\.c_proj\.", r"\1mlp.fc2."),
)
EVA = ((rf"^{B}ls(\d)\.gamma$", r"\1gamma_\2"), (rf"^{B}mlp\.fc1\.", r"\1mlp.fc1_x."))  # where timm's has other names
IGNORABLE = (  # (keys, why a backbone does without them)
    (r"mask_token|masked_embed", "masked-image pretraining only"),
    (r"decoder[_.].+", "the decoder of masked pretraining"),
    (r"(\w*head|fc|classifier|projector|predictor|pooler|prototypes|attn_pool)\..+|proj", "a head, not the backbone"),
    (r"fc_norm\..+", "norms the mean of patches"),
    (r"rope_embed(dings)?\..+", "fixed frequencies, which the network computes"),
    (r"position_ids", "a range, not a weight"),
    (r"(local_)?cls_norm\..+", "norms CLS alone"),
)
DROPPED = (r"reg_token", "registers=drop")
# What old checkpoints hold beside tensors. A file chooses the arguments, so that here stands only what merely keeps
# them: nothing that imports, opens or calls. Of NumPy no arrays and no structured types either, whose state a file
# could forge to point anywhere in memory. Interpolations of OmegaConf are resolved when read, and nobody reads them.
HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "typing.Any",
    "torch.torch_version.TorchVersion",
    *(f"builtins.{kind}" for kind in ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes")),
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    *(f"pathlib._local.{kind}" for kind in ("PosixPath", "PurePosixPath", "PureWindowsPath")),  # Python 3.13
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.base.{kind}" for kind in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Integer", "Float", "Boolean", "String", "Path", "Bytes")),
    "numpy.dtype",
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
        left = ""
        for why in dict.fromkeys(self.ignored.values()):
            keys = [key for key, reason in self.ignored.items() if reason == why]
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            left += f", {', '.join(keys[:3])}{more} ignored ({why})"
        network = "" if self.which == "only" else f", {self.which}"
        outside = f", {self.outside} tensors of other parts" if self.outside else ""
        merged = f", adapters merged into {self.merged}" if self.merged else ""
        told = f"{self.matched} matched{merged}{left}{outside}"
        return f"weights {self.hash}: {self.source} ({self.format}{network}), {told}"


def load(
    backbone: Backbone, source: str | Path | None = None, which: Which = "auto", *, trust_pickle: bool = False
) -> Report:
    """Fill `backbone` with the weights of `source`, every tensor of both sides accounted for.

    Args:
        backbone: changed in place.
        source: `none` (leave it random), `hub` (the published weights of its name), another hub name of timm, a URL,
            a file (.pth .pt .ckpt .safetensors) or `package:FILE`; None means `backbone.weights`.
        which: the network of a file that holds student and teacher; `auto` is the one that its authors evaluate:
            the teacher, but of MoCo v3, Leopart and TimeT the student.
        trust_pickle: let a file run whatever it says while it is read, which some old ones need.

    Raises:
        NecoError: nothing there, no connection, a file that needs pickle, an unknown layout, no such network in it,
            keys that are missing, left over or of another shape (listed), or values that aren't finite (named).
    """
    source = backbone.weights if source is None else str(source)
    if source == "none":
        return Report("none", "random", "only", weights_hash(backbone))
    path = locate(source, backbone.spec["name"])
    try:
        held = read(path, trust_pickle)
    except Damaged as error:
        if path == cache_of(source):
            path.unlink(missing_ok=True)
            raise NecoError(f"{error}. The download was removed: the same command fetches it again") from error
        raise
    layout, networks = recognise(held, source)
    role = next(iter(networks)) if which == "auto" else which
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
    elif found := re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+)/(?:resolve|blob)/([^/]+)/([^?]+).*", source):
        return _from_hugging_face(found[1], found[3], found[2])
    elif source.startswith(("http://", "https://")):
        return _download(source)
    elif source == "hub" or (timm.is_model(source) and not path.exists()):
        return _from_hub(name if source == "hub" else source)
    if not path.is_file():
        raise NecoError(f"weights {source}: no such file ({path.absolute()}) and no hub name that timm knows")
    return path


def read(path: Path, trust_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a file, keys of nested dictionaries joined by dots, memory-mapped where the format allows it."""
    return _flatten(contents(path, trust_pickle))


def contents(path: Path, trust_pickle: bool = False) -> dict[str, Any]:
    """What a weights file or checkpoint holds. Raises NecoError for one that is damaged, of another kind or unsafe."""
    zipped = zipfile.is_zipfile(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipped and _is_program(path):
            if not trust_pickle:
                raise UnpicklingError("GLOBAL TorchScript")
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
        with torch.serialization.safe_globals(_harmless()):
            try:
                held = torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=zipped)
            except UnpicklingError as error:  # it names the first class; of most files all can be had
                if zipped and (unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(path)):
                    raise UnpicklingError("".join(f"GLOBAL {name} " for name in unsafe)) from error
                raise
    except Exception as error:  # torch raises just anything for files that are something else
        found = re.findall(r"(?:GLOBAL|got <class) '?([\w.]+)", str(error))
        if found and isinstance(error, UnpicklingError) and not trust_pickle:
            raise NecoError(
                f"{path} needs pickle, which can run any code, for: {', '.join(found)}. If you trust where it comes "
                "from: trust_pickle=true"
            ) from error
        told = trust_pickle or isinstance(error, safetensors.SafetensorError)
        told = told or (isinstance(error, OSError) and error.errno != errno.EINVAL)  # of mapping what is too short
        raise Damaged(
            f"{path} cannot be read as weights (.pth, .pt, .ckpt, .safetensors): "
            f"{(told and str(error).partition(chr(10))[0]) or 'it is damaged or something else'}"
        ) from error
    if not isinstance(held, dict):
        raise NecoError(f"{path} cannot be read as weights: it holds a {type(held).__name__}, no tensors by name")
    return held


def header(path: Path) -> dict[str, Any]:
    """What `task=export` noted in a `.safetensors` file: its `model` node and the hash of its `weights`. Or nothing."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("neco", "{}"))
    except (OSError, ValueError, safetensors.SafetensorError):  # `contents` says what is wrong
        return {}


def _is_program(path: Path) -> bool:
    """Whether an archive is one of TorchScript."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _forget_default(*default: Any) -> dict[Any, Any]:
    """A defaultdict without what it would call; the type is one that torch fills."""
    return OrderedDict()


@functools.cache
def _harmless() -> list[Any]:
    scalar = np.float64().__reduce__()[0]
    known: list[Any] = [type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]]
    known += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    known += [(PureWindowsPath, "pathlib.WindowsPath"), (_forget_default, "collections.defaultdict")]
    for name in HARMLESS:
        module, _, attribute = name.rpartition(".")
        with contextlib.suppress(ImportError, AttributeError):  # not installed, or not in this version
            known.append((getattr(importlib.import_module(module), attribute), name))
    return known


def recognise(held: Mapping[str, Tensor], source: str = "file") -> tuple[str, dict[str, str]]:
    """Name of the layout and, for each network found in it, what its keys begin with; the authors' choice first."""
    prefixes = [key[: found.start()] for key in held if (found := re.search(LANDMARK, key))]
    for layout in FORMATS:
        places = {r: [p for p in prefixes if re.fullmatch(pattern, p)] for r, pattern in layout.networks.items()}
        if not any(places.values()) or not any(re.search(layout.sign, key) for key in held):
            continue
        if any(len(several) > 1 for several in places.values()):
            raise NecoError(f"{source} holds several networks that could be meant: {places}")
        return layout.name, {role: place[0] for role, place in places.items() if place}
    seen = ", ".join([*prefixes][:5]) or ", ".join([*held][:5]) or "no tensors"
    raise NecoError(f"{source} has no layout that is known here: no patch embedding where a ViT has one ({seen})")


def match(backbone: Backbone, held: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of `backbone.net` from a network's tensors under any known names, and the keys that were ignored."""
    wanted: dict[str, Tensor] = backbone.net.state_dict()
    state: dict[str, Tensor] = {}
    for given, value in held.items():
        key = given
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        if key not in wanted:
            key = next((other for pattern, name in EVA if (other := re.sub(pattern, name, key)) in wanted), key)
        if key in state:
            raise NecoError(f"{where} holds {key} twice, once as {given}")
        state[key] = value[(None,) * (3 - value.ndim)] if key in ("cls_token", "pos_embed") else value
    zero = _attention(state, wanted)
    reasons = (*IGNORABLE, DROPPED) if backbone.spec["registers"] == "drop" else IGNORABLE
    ignored = {key: why for key in sorted(set(state) - set(wanted)) for keys, why in reasons if re.fullmatch(keys, key)}
    state = {key: value for key, value in state.items() if key not in ignored}
    ignored |= dict.fromkeys(zero, "zero, and the network has none")
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
    sparse = [key for key in wanted if state[key].layout != torch.strided]
    if sparse:
        raise NecoError(f"{where} holds sparse tensors: {', '.join(sparse[:10])}")
    broken = [key for key in wanted if not state[key].float().isfinite().all()]
    if broken:
        raise NecoError(f"{where} has values that are not finite in {len(broken)} tensors: {', '.join(broken[:10])}")
    return state, ignored


def _attention(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Give queries, keys and values the arrangement of the network, in place; biases left out because they are zero.

    Files hold one matrix or three, and one bias, three or two: keys need none.
    """
    zero = []
    for attn in [key.removesuffix("q_proj.weight") for key in state if key.endswith(".attn.q_proj.weight")]:
        if f"{attn}qkv.weight" in wanted:
            biases = [state.pop(f"{attn}{part}_proj.bias", None) for part in "qkv"]
            state[f"{attn}qkv.weight"] = torch.cat([state.pop(f"{attn}{part}_proj.weight") for part in "qkv"])
            if (given := next((bias for bias in biases if bias is not None), None)) is not None:
                state[f"{attn}qkv.bias"] = torch.cat([torch.zeros_like(given) if b is None else b for b in biases])
    for key in [key for key in state if key.endswith(".attn.qkv.bias")]:
        bias, mask = state[key], state.pop(f"{key}_mask", None)
        if mask is not None:  # DINOv3 hub: 0 for the keys, where the bias may be anything
            state[key] = bias = torch.where(mask == 0, 0, bias)
        queries, keys, values = bias.chunk(3)
        own = key.removesuffix("qkv.bias")
        if key not in wanted and not bias.any():
            zero.append(key)
            del state[key]
        elif f"{own}q_bias" in wanted and key not in wanted and not keys.any():
            del state[key]
            state |= {f"{own}q_bias": queries, f"{own}v_bias": values}
    return zero


def _side(tokens: int) -> int:
    """Side of the square grid with that many tokens, or 0."""
    side = math.isqrt(tokens)
    return side if side * side == tokens else 0


def _hint(backbone: Backbone, state: Mapping[str, Tensor]) -> str:
    net, name = backbone.net, backbone.spec["name"]
    if ("reg_token" in state) != (net.reg_token is not None):
        return "\nfile and model differ in registers: dinov2_* has none, dinov2r_* keeps, dinov2r_xr_* drops them"
    if "_dinov3." in name and "blocks.0.attn.qkv.bias" in state:
        return f"\nthe file's queries and values have biases: model.name={name.replace('_dinov3.', '_dinov3_qkvb.')}"
    if "norm.weight" not in state:
        return "\nthe file has no norm of patches, as after fine-tuning with mean pooling: take the pretrained one"
    pos, patch = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    fits = patch is not None and patch.shape == net.patch_embed.proj.weight.shape
    if fits and pos is not None and net.pos_embed is not None and pos.shape[1] != net.pos_embed.shape[1]:
        side = _side(pos.shape[1]) or _side(pos.shape[1] - 1)
        return f"\nthe file's positions are for model.size={side * backbone.patch} (inputs may have any size)"
    return ""


def _flatten(tree: Any, path: str = "", depth: int = 0) -> dict[str, Tensor]:
    if isinstance(tree, Tensor):
        return {path: tree}
    if depth > 30:
        raise NecoError(f"a file of weights holds itself, or is nested too deep: {path[:60]}...")
    items = tree.items() if isinstance(tree, dict) else ()  # no other mapping: OmegaConf's would resolve what it holds
    return {k: v for key, value in items for k, v in _flatten(value, f"{path}.{key}".lstrip("."), depth + 1).items()}


def _unreachable(what: str, error: Exception) -> NecoError:
    return NecoError(
        f"cannot download {what}: {error}. Give a local file (checkpoint=PATH or model.weights=PATH), "
        "or start from random weights (model.weights=none)"
    )


def _from_hub(name: str) -> Path:
    """The weights file of timm's model `name`."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise NecoError(f"weights hub: timm knows no published weights for {name}; give its name with a tag, or a file")
    return _from_hugging_face(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")


def _from_hugging_face(repository: str, file: str, revision: str = "main") -> Path:
    """A file of a repository, from the cache of its client or through it, with the token of whoever is logged in."""
    cached = try_to_load_from_cache(repository, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:  # one look first: the download itself retries for half a minute
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision), timeout=10)
        return Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # of the client's HTTP library, which it has changed
        raise _unreachable(f"{file} from {repository}", error) from error


def cache_of(url: str) -> Path:
    """Where the file behind a URL is kept: in torch's hub folder, under its name and a hash of the URL."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(urlparse(url).path).name}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _download(url: str) -> Path:
    """The file behind a URL, downloaded once.

    A name that ends in the beginning of its SHA-256, as torch's hub has it (`name-0123abcd.pth`), is checked.
    """
    path = cache_of(url)
    if path.exists():
        return path
    digest = re.search(r"[^-]-(?!\d+\.)([0-9a-f]{8,64})\.\w+$", path.name[9:])  # digits alone are a date
    try:
        with alone(path), transfers() as bar:
            report = bar(path.name, None)

            def show(done: int, total: int | None) -> None:
                interrupt.check()
                report(done, total)

            if path.exists():  # another process was at it
                return path
            part = fetch(url, path, show, pinned=digest is not None, tries=2)
            with part.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if digest and not found.startswith(digest[1]):
                part.unlink()
                raise NecoError(f"its SHA-256 is {found} instead of {digest[1]}...")
            part.replace(path)
    except (NecoError, OSError) as error:
        raise _unreachable(url, error) from error
    return path
