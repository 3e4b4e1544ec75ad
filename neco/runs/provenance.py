"""Where weights are from, and the network that they belong to."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from neco.config.discovery import options
from neco.config.validate import Settings, build, call, examine, option
from neco.model import last_checkpoint, trained_model, weights
from neco.model.weights import Which, locate
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
APART = ("_target_", "weights", "drop_path")  # keys of a model that make no other network


def source_of_weights(settings: Settings) -> tuple[str | None, Which]:
    """`checkpoint` and `weights` of the configuration as what `neco.model.weights.load` takes: (source, which)."""
    run = settings.run
    if run.weights == "none":
        if run.checkpoint:
            raise NecoError(f"weights=none: random weights, yet checkpoint={run.checkpoint}; give one of the two")
        return "none", "auto"
    source = run.checkpoint and last_checkpoint(run.checkpoint)
    if source and not source.startswith(("http://", "https://", "package:")) and not timm.is_model(source):
        if source in options("model") and not Path(source).exists():
            raise NecoError(f"checkpoint={source}: no such file or run; did you mean model={source}?")
        locate(source, "")  # a file: it must be there
    if source is None and run.weights != "auto":
        raise NecoError(f"weights={run.weights}: name the checkpoint that holds it: checkpoint=RUN_FOLDER_OR_FILE")
    return source, run.weights


def model_of(settings: Settings, source: str | None) -> dict[str, Any]:
    """The `model` node: that with which `source` was made, `model.KEY=VALUE` changed in it; or the one that was chosen.

    Raises NecoError for a file that does not say it where nothing was chosen, and for one that does not fit: before
    memory is taken for a network that the file only claims to hold.
    """
    model = _model_of(settings, source)
    weights.check(outline(model), source, settings.run.weights, trust_pickle=settings.run.trust_pickle)
    return model


def _model_of(settings: Settings, source: str | None) -> dict[str, Any]:
    given, known = settings.config["model"], source not in (None, "none")
    named = any(re.match(r"[+~]*(model|experiment|sweep)[=@]", override) for override in settings.overrides)
    if named:
        examine(given, "model")
    chosen = given["_target_"] if named else None
    held = trained_model(source, settings.run.trust_pickle, chosen=chosen) if known else None
    if held and not named:
        for override in settings.overrides:
            if found := re.match(r"[+~]*model\.([\w.]+)", override):
                _copy(given, held, *found[1].split("."))
        call(examine, f"checkpoint={source}", node=held, where="model")
        return held
    if held and (differ := [key for key in {**given, **held} if key not in APART and given.get(key) != held.get(key)]):
        told = ", ".join(f"{key}={given.get(key)} (there {held.get(key)})" for key in differ)
        log.warning("checkpoint=%s was made with another network; used here: %s", source, told)
    if known and not named:
        raise NecoError(f"checkpoint={source} does not say which network it is: add model=NAME (--help lists them)")
    return given


def network_name(settings: Settings, model: Mapping[str, Any]) -> str:
    """What to call the network of a `model` node: the chosen option, or timm's architecture without its tag.

    The tag names weights of timm, which the network need not have: mocov3_vits16 is `vit_small_patch16_224.dino` there.
    """
    architecture, chosen = str(model.get("name", "")).partition(".")[0], settings.choices.get("model")
    if chosen in options("model") and option("model", chosen, settings.config).get("name") == model.get("name"):
        return f"{chosen} ({architecture})" if architecture else f"{chosen}"
    return architecture


def _copy(source: Mapping[str, Any], target: dict[str, Any], key: str, *more: str) -> None:
    """The value at a path of keys."""
    if more:
        target[key] = dict(below) if isinstance(below := target.get(key), Mapping) else {}
        _copy(source.get(key) or {}, target[key], *more)
    else:
        target[key] = source.get(key)


def outline(model: Mapping[str, Any] | None) -> Any:
    """The network of a `model` node on the meta device: all is known of it, nothing allocated."""
    with torch.device("meta"):
        return build(model, "model")
