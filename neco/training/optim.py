"""AdamW over named parameter groups, and the schedules of everything that changes with the step."""

import math
from typing import Any

import torch
from torch import nn


def cosine(first: float, last: float, step: int, total: int) -> float:
    """Value at `step` of 0..total-1 on half a cosine: last + (first - last) (1 + cos(pi step / total)) / 2.

    Starts at `first` exactly; `last` is the value at step `total`, which is never taken (DINO's schedule).
    """
    return last + 0.5 * (first - last) * (1.0 + math.cos(math.pi * step / total))


# The published run: 0.9995 over 25 epochs of COCO's 118,287 images in batches of 64 (arXiv 2408.11054).
PUBLISHED_MOMENTUM, PUBLISHED_STEPS = 0.9995, 46_200


def ema_momentum(steps: int) -> tuple[float, float]:
    """Teacher momentum at the first and last step of a run of `steps` for `train.momentum=auto`.

    A teacher with the published momentum needs some 10,000 steps to leave its start. In a shorter run it has to follow
    faster: 1 - momentum = 0.0005 (46200 / steps)^(3/4), the power law through the published value at the published
    length and the value tuned on the demo (0.98 at 300 steps). Longer runs keep the published value.
    """
    pace = (1.0 - PUBLISHED_MOMENTUM) * max(1.0, PUBLISHED_STEPS / steps) ** 0.75
    return max(0.0, 1.0 - pace), 1.0


def teacher_start_fraction(momentum: tuple[float, float], steps: int) -> float:
    """Weight of the teacher's start in its average after `steps`: the product of the momentum of all steps."""
    return math.prod(cosine(*momentum, step, steps) for step in range(steps))


def polynomial(first: float, step: int, total: int, power: float) -> float:
    """Value at `step` of 0..total-1: first (1 - step / total)^power, 0 at step `total`, which is never taken."""
    return first * (1.0 - step / total) ** power


def parameter_groups(
    backbone: nn.Module, head: nn.Module, extra: nn.Module, lr: float, head_lr: float, layer_decay: float = 1.0
) -> list[dict]:
    """Groups `backbone`, `backbone/no_decay`, `head`, `head/no_decay` of the trainable parameters.

    Biases and 1-D parameters have no weight decay. Parameters of the loss (`extra`) train like the head. Each group
    keeps its first learning rate as `peak_lr`; empty groups are left out.

    With a `layer_decay` below 1 block i of d trains at lr layer_decay^(d - 1 - i) in groups `backbone/block<i>...`, the
    embeddings at lr layer_decay^d in `backbone/embeddings...`; the last block and the final norm remain in `backbone`.
    """
    parts = [("backbone", lr, [*backbone.named_parameters()])]
    if layer_decay < 1:
        parts = _layers(backbone, lr, layer_decay)
    parts.append(("head", head_lr, [*head.named_parameters(), *extra.named_parameters()]))
    groups = []
    for name, rate, named in parts:
        for suffix, decays in (("", True), ("/no_decay", False)):
            fits = [p for n, p in named if p.requires_grad and (p.ndim > 1 and not n.endswith("bias")) == decays]
            if fits:
                groups.append({"name": name + suffix, "params": fits, "lr": rate, "peak_lr": rate, "decays": decays})
    return groups


def _layers(backbone: Any, lr: float, decay: float) -> list[tuple[str, float, list[tuple[str, nn.Parameter]]]]:
    """Name, rate and parameters of each layer, the fastest first."""
    layers: dict[int, list[tuple[str, nn.Parameter]]] = {below: [] for below in range(backbone.depth + 1)}
    for name, parameter in backbone.named_parameters():
        layers[max(0, backbone.depth - backbone.place(name))].append((name, parameter))
    names = ["", *(f"/block{i}" for i in reversed(range(backbone.depth - 1))), "/embeddings"]
    return [(f"backbone{names[below]}", lr * decay**below, named) for below, named in layers.items()]


def schedule(
    optimizer: torch.optim.Optimizer,
    step: int,
    total: int,
    weight_decay: tuple[float, float],
    power: float | None = None,
) -> None:
    """Set each group's learning rate and weight decay for `step` of `total`; with a `power` rates are `polynomial`."""
    for group in optimizer.param_groups:
        peak = group["peak_lr"]
        group["lr"] = polynomial(peak, step, total, power) if power else cosine(peak, 0.0, step, total)
        group["weight_decay"] = cosine(*weight_decay, step, total) if group["decays"] else 0.0
