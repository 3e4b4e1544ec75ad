"""Backbones for use in other programs; needs neither Hydra nor Lightning."""

from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from neco.config import discovery, validate
from neco.model import sources as _sources
from neco.model import weights as _weights
from neco.model.backbone import Backbone
from neco.utils.errors import NecoError


def last_checkpoint(source: str) -> str:
    """A run folder stands for its last checkpoint, or what was exported into it; anything else for itself.

    Raises NecoError for a run without any.
    """
    folder = Path(source).expanduser()
    last = folder / "checkpoints" / "last.ckpt"
    if found := next((p for p in (last, folder / "model.safetensors", folder / "model.pth") if p.is_file()), None):
        return str(found)
    if source.endswith(".onnx") or (folder / "model.onnx").is_file():
        raise NecoError(f"{source} is an ONNX program, which onnxruntime runs; here take another format of it")
    if (folder / "results.json").is_file() and not last.parent.is_dir():
        raise NecoError(f"{source} holds an evaluation, no weights: name what it evaluated; or it lost checkpoints/")
    if (folder / "config.yaml").is_file():
        raise NecoError(f"{source} is a run without a checkpoint: no {last}; it stopped before its first save")
    return source


def trained_model(
    source: str | None, trust_pickle: bool = False, *, chosen: str | None = None
) -> dict[str, Any] | None:
    """The `model` node that one of our own checkpoints or exported files holds; None for any other source.

    Its values are as the file has them: `neco.config.validate.validate.build` checks them.

    Args:
        trust_pickle: the file may name the class of an option that users have of their own, too.
        chosen: another class that it may name, because the user has chosen it.

    Raises:
        NecoError: the file holds no such node, or one that names another class or holds components.
    """
    if source is None or not (path := Path(source).expanduser()).is_file():
        return None
    if _sources.is_safetensors(path):
        node = _sources.header(path).get("model")
    else:
        held = _sources.contents(path, trust_pickle).get("neco")
        try:
            node = held and held["config"]["model"]
        except (KeyError, TypeError, IndexError) as error:
            raise NecoError(f"{source} is no checkpoint of a run: it says of itself {held!r:.60}") from error
    if node is None:
        return None
    if not isinstance(node, dict):
        raise NecoError(f"{source} is no checkpoint or export: instead of its network it holds a {type(node).__name__}")
    target = node.get("_target_")
    values = {key: value for key, value in node.items() if key != "_target_"}
    validate.call(validate.refuse_components, source, value=values, where="model")
    known = {*validate.project_targets("model"), *(validate.user_targets("model") if trust_pickle else ()), chosen}
    if not isinstance(target, str) or target not in known:
        raise NecoError(
            f"{source} says that its network is made by {target!r:.60}, which no option of conf/model names. If it is "
            "a network of your own: choose its option, model=NAME"
        )
    return node


def load_backbone(
    source: str | Path,
    *,
    weights: str = "auto",
    model: str | None = None,
    trust_pickle: bool = False,
) -> Backbone:
    """A frozen backbone in evaluation mode: normalised images (B, 3, H, W) -> patch features (B, h, w, D).

    Args:
        source: a run folder, a checkpoint, an exported file, another weights file, a URL; or an option of conf/model
            for its own weights.
        weights: the network of a checkpoint that holds student and teacher (auto: the one its authors evaluate, mostly
            the teacher), or of any others what the keys of the one begin with; none = random.
        model: option of conf/model for files that don't say what they are.
        trust_pickle: let a file run whatever it says while it is read, which some old ones need.

    Raises:
        NecoError: nothing there, an unknown model, or tensors that don't fit it (listed).
    """
    options = {path.stem: path for path in (discovery.folder() / "model").glob("*.yaml")}
    source = str(source)
    if model is None and source in options:
        model, source = source, ""
    source = last_checkpoint(source) if source else ""
    if source and not source.startswith(("http://", "https://")) and not timm.is_model(source):
        try:
            _sources.locate(source, "")  # it must be there
        except NecoError as error:
            raise NecoError(f"{error}{discovery.nearest(source, sorted(options))}") from None
    node = trained_model(source, trust_pickle) if model is None else None
    if node is None:
        if model not in options:
            near = discovery.nearest(str(model), sorted(options))
            raise NecoError(f"{source}: say which network it is with model=NAME of conf/model (got {model!r}{near})")
        node = yaml.safe_load(options[model].read_text())
    which = "auto" if weights == "none" else weights
    with torch.device("meta"):  # what a file says of itself takes no memory until its tensors bear it out
        _weights.check(validate.build(node, "model"), source, which, trust_pickle=trust_pickle)
    backbone = validate.build(node, "model")
    _weights.load(backbone, "none" if weights == "none" else source or None, which, trust_pickle=trust_pickle)
    return backbone.eval().requires_grad_(False)
