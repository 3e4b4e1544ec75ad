"""Published layouts of weights: told from the keys, brought into timm's names, every tensor accounted for."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import yaml
from torch import Tensor

from neco.config import discovery
from neco.model.backbone import Backbone
from neco.utils.errors import NecoError

# What stands before it, in a file's flattened keys, is where a network begins.
LANDMARK = (
    r"patch_embed\.proj\.weight$|embeddings\.patch_embeddings\.(projection\.)?weight$|(embeddings\.)?class_embedding$"
)
ANY = r"(?:(?:state_dict|model|backbone|net|visual|trunk|vit|dinov\d\w*|vision_model)\.)*"
# Modules that hold another and add their name to its keys: torch.compile, checkpoint_wrapper, FSDP, fairscale,
# DeepSpeed, and DistributedDataParallel with whatever else calls it `module`.
WRAPPERS = r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_fpw_module|_forward_module|module)\."
BOTH = {role: rf"{ANY}{role}\.{ANY}" for role in ("teacher", "student")}


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
RENAMES = (  # other names -> timm's, one after the other; what is called `blocks.N` only by a rule comes after it
    (r"^transformer\.resblocks\.", "blocks."),  # CLIP of OpenAI and open_clip, with more below
    # DINOv2 and DINOv3 hub
    (r"^(register|storage)_tokens$", "reg_token"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks of blocks, as trained with FSDP
    # transformers: ViT, DINOv2, DINOv3, CLIP
    (r"^(pre|post)_?(layrnorm|layernorm)\.", r"norm_\1."),
    (r"^norm_post\.", "norm."),
    (r"^embeddings\.class_embedding$|^embeddings\.cls_token$|^class_embedding$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$|^positional_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^((encoder|model)\.)?layers?\.(\d+)\.", r"blocks.\3."),
    (rf"^{B}mlp\.w12\.", r"\1mlp.fc1."),
    (rf"^{B}mlp\.(w1|gate_proj)\.", r"\1mlp.fc1_g."),
    (rf"^{B}mlp\.w2\.", r"\1mlp.fc1_x."),
    (rf"^{B}mlp\.w3\.", r"\1mlp.fc2."),
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
    (r"n_averaged", "a count, not a weight"),
    (r"(local_)?cls_norm\..+", "norms CLS alone"),
)
DROPPED = (r"reg_token", "registers=drop")


def begins(key: str) -> str | None:
    """What the keys of a network begin with, if this is the one that tells."""
    found = re.search(LANDMARK, key)
    return key[: found.start()] if found else None


def is_ignorable(key: str) -> bool:
    """Whether a backbone does without it."""
    return any(re.fullmatch(keys, key) for keys, _ in IGNORABLE)


def unwrap_name(key: str) -> str:
    """A key without the names of `WRAPPERS`."""
    return re.sub(WRAPPERS, "", key)


def unwrap(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their names without those of `WRAPPERS`, wherever these stand; where two would meet, as is."""
    names = {key: unwrap_name(key) for key in held}
    often = Counter(names.values())
    return {name if often[name] == 1 else key: held[key] for key, name in names.items()}


def recognise(held: Mapping[str, Tensor], source: str = "file", which: str = "auto") -> tuple[str, dict[str, str]]:
    """Name of the layout and, for each network found in it, what its keys begin with; the authors' choice first.

    Args:
        held: as `unwrap` returns it.
        which: `auto`, a role of `FORMATS`, or what the keys of the network begin with, or its last part (`.` where that
            is nothing).

    Raises:
        NecoError: no network, or several of which `which` chooses none.
    """
    prefixes = [prefix for key in held if (prefix := begins(key)) is not None]
    if which not in ("auto", "student", "teacher"):
        chosen = [prefix for prefix in prefixes if prefix.strip(".") == which.strip(".")]
        chosen = chosen or [
            prefix for prefix in prefixes if which.strip(".") and f".{prefix}".endswith(f".{which.strip('.')}.")
        ]
        if not chosen:
            near = discovery.nearest(which, ["auto", "student", "teacher", "none"])
            raise NecoError(f"weights={which}: {source} holds no network of that name, but {_named(prefixes)}{near}")
        prefixes = chosen
    for layout in FORMATS:
        places = {r: [p for p in prefixes if re.fullmatch(pattern, p)] for r, pattern in layout.networks.items()}
        if layout.networks.get("only") == ANY and not places["only"]:
            places["only"] = prefixes  # the one patch embedding of a file is it, wherever it stands
        if not any(places.values()) or not any(re.search(layout.sign, key) for key in held):
            continue
        if several := next((place for place in places.values() if len(place) > 1), None):
            example = several[0].strip(".") or "."
            raise NecoError(
                f"{source} holds several networks that could be meant, {_named(several)}: choose with weights={example}"
            )
        return layout.name, {role: place[0] for role, place in places.items() if place}
    seen = ", ".join([*held][:5]) or "no tensors"
    raise NecoError(f"{source} has no layout that is known here: no patch embedding where a ViT has one ({seen})")


def _named(prefixes: list[str]) -> str:
    """Networks of a file as `weights=` takes them."""
    return " and ".join(prefix.strip(".") or ". (the top level)" for prefix in prefixes) or "none"


def match(backbone: Backbone, held: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of `backbone.net` from a network's tensors under any known names, and the keys that were ignored.

    Shapes are compared before anything is computed of tensors together: a file could make a sum of any size.
    """
    net, wanted = backbone.net, backbone.net.state_dict()
    state = _rename(held, wanted, where)
    zero = _attention(state, wanted)
    periods = next((value for key, value in state.items() if re.fullmatch(r"rope_embed(dings)?\.periods", key)), None)
    own = getattr(getattr(net, "rope", None), "periods", None)
    if (
        periods is not None
        and own is not None
        and not own.is_meta
        and (periods.shape != own.shape or not torch.allclose(periods.float(), own.float(), rtol=1e-2))  # of bfloat16
    ):
        raise NecoError(f"{where} has other periods of rotary positions than {backbone.spec['name']} computes")
    reasons = (*IGNORABLE, DROPPED) if backbone.spec["registers"] == "drop" else IGNORABLE
    ignored = {key: why for key in sorted(set(state) - set(wanted)) for keys, why in reasons if re.fullmatch(keys, key)}
    state = {key: value for key, value in state.items() if key not in ignored}
    ignored |= dict.fromkeys(zero, "zero, and the network has none")
    pos, cls = state.get("pos_embed"), state.get("cls_token")
    if net.no_embed_class and pos is not None and cls is not None and pos.ndim == 3 and _side(pos.shape[1] - 1):
        first, rest = pos[:, :1], pos[:, 1:]
        if first.shape == cls.shape:
            # timm keeps no position for CLS beside registers: x + pos is the same with the sum as the token
            state |= {"cls_token": cls + first, "pos_embed": rest}
    _check_shapes(backbone, state, where)
    return state, ignored


def _rename(held: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors under timm's names. Raises NecoError for two of one name and for what are no plain numbers."""
    if sparse := [key for key, value in held.items() if value.layout != torch.strided]:
        raise NecoError(f"{where} holds sparse tensors: {', '.join(sparse[:10])}")
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
    needed = {key for key in state if key in wanted or re.search(r"\.attn\.[qkv]_proj\.", key)}
    loose = [
        key
        for key, value in state.items()
        if value.is_quantized or (key in needed and (value.is_meta or not value.is_floating_point()))
    ]
    if loose:
        kinds = ", ".join(f"{key} ({state[key].dtype})".replace("torch.", "") for key in loose[:10])
        raise NecoError(f"{where} holds no plain floating-point numbers for: {kinds}")
    return state


def _check_shapes(backbone: Backbone, state: Mapping[str, Tensor], where: str) -> None:
    """Raise NecoError where keys are missing, left over or of another shape; it shows some of each kind."""
    wanted: dict[str, Tensor] = backbone.net.state_dict()
    missing = [f"missing: {key}" for key in wanted if key not in state]
    surplus = [f"left over: {key}" for key in state if key not in wanted]
    shapes = [
        f"shape: {key} is {tuple(state[key].shape)} in the file, {tuple(wanted[key].shape)} in the network"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if faults := [fault for row in zip_longest(missing, surplus, shapes) for fault in row if fault]:
        lines = sorted(faults[:10]) + [f"... {len(faults) - 10} more"] * (len(faults) > 10)
        shown, keys = "\n  ".join(lines), "1 key" if len(faults) == 1 else f"{len(faults)} keys"
        raise NecoError(f"{where} does not fit {backbone.architecture}: {keys}\n  {shown}{_hint(backbone, state)}")


def _attention(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Give queries, keys and values the arrangement of the network, in place; biases left out because they are zero.

    Files hold one matrix or three, and one bias, three or two: keys need none.
    """
    zero = []
    for attn in [key.removesuffix("q_proj.weight") for key in state if key.endswith(".attn.q_proj.weight")]:
        if (whole := wanted.get(f"{attn}qkv.weight")) is not None:
            rows, width = len(whole) // 3, whole.shape[1]
            _join(state, attn, "weight", (rows, width))
            if f"{attn}q_proj.bias" in state:
                state.setdefault(f"{attn}k_proj.bias", state[f"{attn}q_proj.bias"].new_zeros(rows))
            _join(state, attn, "bias", (rows,))
    for key in [key for key in state if key.endswith(".attn.qkv.bias")]:
        bias, mask = state[key], state.get(f"{key}_mask")
        if bias.ndim != 1 or len(bias) % 3 or (mask is not None and mask.shape != bias.shape):
            continue  # `match` names what does not fit
        state.pop(f"{key}_mask", None)
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


def _join(state: dict[str, Tensor], attn: str, kind: str, shape: tuple[int, ...]) -> None:
    """Queries, keys and values as one tensor, where there are all three and each has its shape."""
    names = [f"{attn}{part}_proj.{kind}" for part in "qkv"]
    if all(name in state and state[name].shape == shape for name in names):
        state[f"{attn}qkv.{kind}"] = torch.cat([state.pop(name) for name in names])


def _side(tokens: int) -> int:
    """Side of the square grid with that many tokens, or 0."""
    side = math.isqrt(max(0, tokens))
    return side if side * side == tokens else 0


def _hint(backbone: Backbone, state: Mapping[str, Tensor]) -> str:
    """What is likely to help, after a line break; empty where nothing is."""
    net, name, is_like = backbone.net, backbone.spec["name"], ""
    if any(".lora_" in key for key in state):
        return "\nthe file has adapters of peft beside its weights: merge them there first (merge_and_unload)"
    traits = _traits(state)
    if traits and traits != _traits(net.state_dict()):
        width, depth, patch, registers, *_ = traits
        options = [option for option in discovery.options("model") if _traits_of(option) == traits]
        fits = f"this is model={' or '.join(options)}" if options else "no option of conf/model is like it"
        count = "1 block" if depth == 1 else f"{depth} blocks"
        is_like = f"\nthe file is {width} wide, {count}, patch {patch}, {registers or 'no'} registers: {fits}"
    if ("reg_token" in state) != (net.reg_token is not None):
        is_like += "\nfile and model differ in registers: dinov2_* has none, dinov2r_* keeps, dinov2r_xr_* drops them"
    if is_like:
        return is_like
    if "_dinov3." in name and "blocks.0.attn.qkv.bias" in state:
        return f"\nthe file's queries and values have biases: model.name={name.replace('_dinov3.', '_dinov3_qkvb.')}"
    if "norm.weight" not in state:
        return "\nthe file has no norm of patches, as after fine-tuning with mean pooling: take the pretrained one"
    pos, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    fitting = patches is not None and patches.shape == net.patch_embed.proj.weight.shape
    if fitting and pos is not None and net.pos_embed is not None and pos.ndim == 3 and pos.shape[1] > 1:
        side = _side(pos.shape[1]) or _side(pos.shape[1] - 1)
        if not side or pos.shape[1] == net.pos_embed.shape[1]:
            return ""
        return f"\nthe file's positions are for model.size={side * backbone.patch} (inputs may have any size)"
    return ""


# Width and blocks of timm's ViTs by the word in their names.
SIZES = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
Traits = tuple[int, int, int, int, bool, bool, bool, bool]


def _traits(state: Mapping[str, Tensor]) -> Traits | None:
    """Width, blocks, patch, registers; has it positions, layer scale, a norm before the blocks, gates?

    None for a state (of timm's names) without a patch embedding.
    """
    patches, registers = state.get("patch_embed.proj.weight"), state.get("reg_token")
    if patches is None or patches.ndim != 4:
        return None
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    count = 0 if registers is None or registers.ndim != 3 else registers.shape[1]
    parts = [re.search(r"ls1\.gamma|\.gamma_1", key) for key in state], [key.endswith("fc1_g.weight") for key in state]
    scaled, gated = (any(found) for found in parts)
    before = "norm_pre.weight" in state
    return patches.shape[0], depth, patches.shape[2], count, "pos_embed" in state, scaled, before, gated


def _traits_of(option: str) -> Traits | None:
    """Those of an option of conf/model, from the name of its network alone: building all would take seconds."""
    node: dict[str, Any] = yaml.safe_load(discovery.find("model", option).read_text()) or {}
    name, arch = str(node.get("name")), node.get("arch") or {}
    found = re.match(r"vit_([a-z]+)_patch(\d+)_(?:reg(\d)_)?", name)
    if not found or found[1] not in SIZES:
        return None
    width, depth = SIZES[found[1]]
    rotary, registers = "dinov3" in name, int(found[3] or 0)
    return (
        arch.get("embed_dim", width), arch.get("depth", depth), arch.get("patch_size", int(found[2])),
        4 if rotary else registers, not rotary, "dinov" in name, "clip" in name, False,
    )  # fmt: skip
