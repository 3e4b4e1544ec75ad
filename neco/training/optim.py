"""AdamW over named parameter groups, and the cosine schedules of everything that changes with the step."""

import math

import torch
from torch import nn


def cosine(first: float, last: float, step: int, total: int) -> float:
    """Value at `step` of 0..total-1 on half a cosine: last + (first - last) (1 + cos(pi step / total)) / 2.

    Starts at `first` exactly; `last` is the value at step `total`, which is never taken (DINO's schedule).
    """
    return last + 0.5 * (first - last) * (1.0 + math.cos(math.pi * step / total))


def parameter_groups(backbone: nn.Module, head: nn.Module, extra: nn.Module, lr: float, head_lr: float) -> list[dict]:
    """Groups `backbone`, `backbone/no_decay`, `head`, `head/no_decay` of the trainable parameters.

    Biases and 1-D parameters have no weight decay. Parameters of the loss (`extra`) train like the head. Each group
    keeps its first learning rate as `peak_lr`; empty groups are left out.
    """
    groups = []
    for name, rate, modules in (("backbone", lr, [backbone]), ("head", head_lr, [head, extra])):
        named = [(n, p) for module in modules for n, p in module.named_parameters() if p.requires_grad]
        for suffix, decays in (("", True), ("/no_decay", False)):
            chosen = [p for n, p in named if (p.ndim > 1 and not n.endswith("bias")) == decays]
            if chosen:
                groups.append({"name": name + suffix, "params": chosen, "lr": rate, "peak_lr": rate, "decays": decays})
    return groups


def schedule(optimizer: torch.optim.Optimizer, step: int, total: int, weight_decay: tuple[float, float]) -> None:
    """Set each group's learning rate and weight decay for `step` of `total`."""
    for group in optimizer.param_groups:
        group["lr"] = cosine(group["peak_lr"], 0.0, step, total)
        group["weight_decay"] = cosine(*weight_decay, step, total) if group["decays"] else 0.0
