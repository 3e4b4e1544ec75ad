"""The model card: a README.md for a model hub, with numbers that carry their protocols and code that runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from neco.config import discovery
from neco.config.types import MEAN, STD
from neco.model import export
from neco.model.backbone import Backbone
from neco.model.weights import Report
from neco.runs.results import percent
from neco.utils.escape import for_markdown, markdown_block, markdown_code, markdown_table

LICENSE = "yours to set; weights trained from others keep theirs"
TASKS = {
    "train": "Post-trained with Patch Neighbor Consistency ([arXiv 2408.11054](https://arxiv.org/abs/2408.11054))",
    "finetune": "Fine-tuned for segmentation, end to end with a decoder, which is not here",
}
NONE = {  # where no numbers were recorded
    "": "None were recorded of these weights: `python -m neco task=eval` measures.",
    "finetune": "Those of the run are of backbone and decoder together: `python -m neco task=eval` measures these.",
}
RULES = {
    "hub": "as DINOv2's code does",
    "timm": "to the exact size, antialiased, as timm does",
    "neco": "as the published NeCo code does: scale factors with an offset of 0.1, not antialiased",
}


@dataclass(frozen=True)
class Training:
    """How weights came about: the task of their run, what they started from (and which network of it).

    `differs`: key -> (value, default); `environment`: the run's environment.json.
    """

    task: str
    start: str
    which: str
    differs: Mapping[str, tuple[Any, Any]]
    environment: Mapping[str, Any]


def card(
    network: Backbone,
    node: Mapping[str, Any],
    form: export.Format,
    file: str,
    report: Report,
    verified: str,
    records: Sequence[Mapping[str, Any]],
    training: Training | None,
) -> str:
    """Markdown with the front matter of a model hub. `file` is the name of the weights beside it."""
    how = f", {TASKS[training.task].partition(' ')[0].lower()} with neco" if training else ""
    title = for_markdown(network.architecture) + how
    head = {
        "library_name": {"timm": "timm", "onnx": "onnx"}.get(form, "pytorch"),
        "pipeline_tag": "image-feature-extraction",
        "tags": ["neco", "image-feature-extraction", "vision-transformer", form],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}# license: {LICENSE}\n---",
        f"# {title}",
        _about(network, form, file, report, verified),
        "## How to load",
        *(f"{text}\n\n{markdown_block(code, 'python')}" for text, code in examples(network, node, form, file)),
        *(["## How it was trained", _training(training)] if training else []),
        "## Numbers",
        _numbers(records) if records else NONE.get(training.task if training else "", NONE[""]),
    ]
    return "\n\n".join(parts) + "\n"


def _about(network: Backbone, form: export.Format, file: str, report: Report, verified: str) -> str:
    role = "" if report.which == "only" else f", the {report.which} of its run"
    millions = sum(value.numel() for value in network.parameters()) / 1e6
    lines = [
        f"- A ViT with patches of {network.patch} pixels, {network.depth} blocks, {network.dim} channels: "
        f"{millions:.1f} M parameters{role}. Registers: {0 if network.net.reg_token is None else network.prefix - 1}.",
        f"- Its patch features are the tokens of the last block after the final norm, "
        f"(B, H / {network.patch}, W / {network.patch}, {network.dim}).",
        f"- {markdown_code(file)}, format `{form}`: {verified}.",
    ]
    if network.net.pos_embed is not None:
        lines.append(
            f"- Positions are for {network.size} x {network.size} pixels, where all libraries agree. For other sizes "
            f"they are resampled, which is no part of the weights; here `{network.pos_interp}`: "
            f"{RULES[network.pos_interp]}. Features of other sizes and the numbers below hold with that rule."
        )
    return "\n".join(lines)


def examples(network: Backbone, node: Mapping[str, Any], form: export.Format, file: str) -> list[tuple[str, str]]:
    """What is said of a piece of code, and the code. One after the other they run in the folder of the weights."""
    mean, std = (export.timm_config(network)["pretrained_cfg"][name] for name in ("mean", "std"))
    quoted = json.dumps(file, ensure_ascii=False)
    own = form not in ("onnx", "dinov2") and network.inputs != "imagenet"
    ours, theirs = f"the mean {MEAN} and deviation {STD} of ImageNet", f"the mean {mean} and deviation {std}"
    found = [(
        f"Images are RGB in 0..1, normalised with {ours}.",
        f"import torch\n\nimages = torch.randn(2, 3, {network.size}, {network.size})",
    )]  # fmt: skip
    option = _option(node)
    if form != "onnx" and (form != "dinov2" or option):
        more = f', model="{option}"' if form == "dinov2" else ""
        code = f"from neco import load_backbone\n\nmaps = load_backbone({quoted}{more})(images)"
        found.append(("With neco, at any multiple of the patch:", code))
    pixels, change = "images", ""
    if own:
        pixels = "pixels"
        change = (
            "column = lambda values: torch.tensor(values).reshape(3, 1, 1)\n"
            f"pixels = (images * column({STD}) + column({MEAN}) - column({mean})) / column({std})\n"
        )
    tail = f"maps = model.forward_features({pixels})[:, model.num_prefix_tokens :]  # (B, h * w, D)"
    if form in ("timm", "safetensors"):
        arguments = "".join(f", {key}={value!r}" for key, value in export.timm_arguments(network).items())
        wants = f"With timm, which wants {theirs}" if own else "With timm"
        load = f"model.load_state_dict(load_file({quoted}), strict=True)"
        found.append((
            f"{wants} (at other sizes it resamples positions by its own rule):",
            "import timm\nfrom safetensors.torch import load_file\n\n"
            f'model = timm.create_model("{network.spec["name"]}"{arguments}).eval()\n{load}\n{change}{tail}',
        ))  # fmt: skip
    if form == "timm" and file == export.FILES["timm"]:
        found.append((
            'From this folder, or with `"hf-hub:OWNER/NAME"` once it is uploaded:',
            f'model = timm.create_model("local-dir:.", pretrained=True).eval()\n{tail}',
        ))  # fmt: skip
    if form == "dinov2":
        arguments = "".join(f"    {key}={value!r},\n" for key, value in export.hub_arguments(network).items())
        found.append((
            "With the class of [DINOv2](https://github.com/facebookresearch/dinov2), same positions at every size:",
            f"from dinov2.models.vision_transformer import DinoVisionTransformer\n\nmodel = DinoVisionTransformer(\n"
            f'{arguments}).eval()\nmodel.load_state_dict(torch.load({quoted}, weights_only=True), strict=True)\n'
            'maps = model.forward_features(images)["x_norm_patchtokens"]  # (B, h * w, D)',
        ))  # fmt: skip
    if form == "onnx":
        found.append((
            "With onnxruntime; any number of images, any multiple of the patch:",
            f'import onnxruntime\n\nsession = onnxruntime.InferenceSession({quoted})\n'
            '(maps,) = session.run(None, {"images": images.numpy()})  # (B, h, w, D)',
        ))  # fmt: skip
    return found


def _option(node: Mapping[str, Any]) -> str | None:
    """The option of conf/model that builds this network."""

    def key(values: Mapping[str, Any]) -> dict[str, Any]:
        return {"registers": "keep", "pos_interp": "hub", "inputs": "imagenet", "arch": {}} | {
            name: value for name, value in values.items() if name not in ("weights", "drop_path")
        }

    files = sorted((discovery.folder() / "model").glob("[!_]*.yaml"))
    return next((path.stem for path in files if key(yaml.safe_load(path.read_text())) == key(node)), None)


def _training(training: Training) -> str:
    place = training.environment
    which = "" if training.which == "auto" else f" ({training.which})"
    start = training.start if "://" in training.start else training.start.rpartition("/")[2]
    data = markdown_code(f"dataset={(place.get('choices') or {}).get('dataset', 'unknown')}")
    packages = place.get("packages") or {}
    facts = packages.get("neco"), place.get("git") or "unknown", packages.get("torch"), place.get("device")
    neco, revision, torch, device = (for_markdown(str(fact)) for fact in facts)
    text = (
        f"{TASKS[training.task]}, on the images of {data}, starting from {markdown_code(start)}{which}. "
        f"neco {neco}, revision {revision}, torch {torch}, on {device}."
    )
    differing = training.differs.items()
    rows = [[markdown_code(key), _value(value), _value(default)] for key, (value, default) in differing]
    if not rows:
        return f"{text} All values are the defaults of `task={training.task}`."
    differs = markdown_table([["key", "value", "default"], *rows])
    return f"{text} Values that differ from the defaults of `task={training.task}`:\n\n{differs}"


def _numbers(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            *map(for_markdown, (r["dataset"], r.get("split") or "", r["evaluation"], metric)),
            percent(value),
            markdown_code(r["protocol"]),
        ]
        for r in records
        for metric, value in r["metrics"].items()
    ]
    head = ["data set", "split", "evaluation", "metric", "value", "protocol"]
    rows = [list(row) for row in dict.fromkeys(map(tuple, rows))]
    return f"In percent. Numbers of different protocols are not comparable.\n\n{markdown_table([head, *rows])}"


def _value(value: Any) -> str:
    return "" if value is None else markdown_code(str(value))
