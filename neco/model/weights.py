"""Weights of a backbone from wherever they are: recognised from their keys, matched strictly, never through pickle."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from neco.config.validate import call
from neco.model import lora
from neco.model.backbone import Backbone
from neco.model.sources import Damaged, cache_of, check_backed, header, locate, read
from neco.model.state_dict_formats import begins, is_ignorable, match, recognise, unwrap
from neco.utils.errors import NecoError

Which = str  # auto, student, teacher, or what the keys of one of a file's networks begin with


@dataclass(frozen=True, slots=True)
class Report:
    """What `load` did: where the weights came from, which network of the file, how its keys were used.

    `hash` is `weights_hash` of the backbone afterwards, `ignored` maps keys of the network that were not needed to
    the reason, `outside` counts the tensors of the file that belong to something else (other networks, optimiser),
    `others` says where other networks begin, `merged` counts the weights that had adapters, `stored` names the types of
    those that are no float32.
    """

    source: str
    format: str
    which: str
    hash: str
    matched: int = 0
    ignored: dict[str, str] = field(default_factory=dict)
    outside: int = 0
    merged: int = 0
    others: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()

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
        outside += f" (other networks: {', '.join(self.others)})" if self.others else ""
        outside += f", stored as {', '.join(self.stored)}" if self.stored else ""
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
            the teacher, but of MoCo v3, Leopart and TimeT the student. Of any other two networks, what the keys of
            the one begin with.
        trust_pickle: let a file run whatever it says while it is read, which some old ones need.

    Raises:
        NecoError: nothing there, no connection, a file that needs pickle, an unknown layout, no such network in it,
            keys that are missing, left over or of another shape (listed), or values that aren't finite (named).
    """
    source = backbone.weights if source is None else str(source)
    if source == "none":
        return Report("none", "random", "only", weights_hash(backbone))
    path = locate(source, backbone.spec["name"])
    state, report = find(backbone, path, source, which, trust_pickle=trust_pickle)
    where = f"{source} ({report.format})"
    if broken := [key for key, value in state.items() if not value.float().isfinite().all()]:
        raise NecoError(f"{where} has values that are not finite in {len(broken)} tensors: {', '.join(broken[:10])}")
    backbone.net.load_state_dict(state)
    digest, noted = weights_hash(backbone), header(path).get("weights")
    if noted not in (None, digest) and not report.ignored:
        raise Damaged(f"{path} is damaged: its weights are {digest} and not {noted}, which were written")
    return replace(report, hash=digest)


def check(outline: Backbone, source: str | None, which: Which = "auto", *, trust_pickle: bool = False) -> None:
    """Raise NecoError where `load` would find that a local file does not fit; takes no memory for a network.

    Args:
        outline: the network on the meta device. Where the file itself describes it, only this tells that the
            description is true: a header of a hundred bytes can ask for any width.
    """
    if source and source != "none" and Path(source).expanduser().exists():
        find(outline, locate(source, ""), source, which, trust_pickle=trust_pickle)


def find(
    backbone: Backbone, path: Path, source: str, which: Which = "auto", *, trust_pickle: bool = False
) -> tuple[dict[str, Tensor], Report]:
    """The state of `backbone.net`, which may be on the meta device, in a file, and how its keys were used (no `hash`).

    Raises as `load` does, but does not look at values. `source` is what messages call the file.
    """
    try:
        held = unwrap(read(path, trust_pickle))
        layout, networks = recognise(held, source, which)
        role = which if which in ("student", "teacher") else next(iter(networks))
        if role not in networks:
            found = "one plain network" if "only" in networks else f"the {', '.join(networks)} only"
            raise NecoError(f"weights={which}: {source} holds {found}; use weights=auto")
        prefix = networks[role]
        other = [p for key in held if (p := begins(key)) is not None and p != prefix]
        deeper = tuple(p for p in other if p.startswith(prefix))
        own = [key for key in held if key.startswith(prefix) and not (deeper and key.startswith(deeper))]
        inside = {key.removeprefix(prefix): held[key] for key in own}
        check_backed({key: value for key, value in inside.items() if not is_ignorable(key)}, source)
    except Damaged as error:
        if path == cache_of(source):
            path.unlink(missing_ok=True)
            raise NecoError(f"{error}. The download was removed: the same command fetches it again") from error
        raise
    folded = call(lora.fold, f"{source} ({layout})", state=inside)
    state, ignored = match(backbone, folded, f"{source} ({layout})")
    stored = tuple(sorted({str(value.dtype).removeprefix("torch.") for value in state.values()} - {"float32"}))
    counts = len(held) - len(inside), len(folded.keys() - inside.keys())
    return state, Report(
        source, layout, role, "", len(state), ignored, *counts, tuple(p.rstrip(".") for p in other), stored
    )


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
