"""The post-training step: student and EMA teacher, aligned patches, references, loss.

Legend: B images, V views (G global then L local), P = G (V - 1) pairs, N = grid^2 cells, D channels, n references.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from neco import config
from neco.augment.colour import normalise
from neco.errors import NecoError
from neco.loss.base import Loss
from neco.model.backbone import Backbone
from neco.model.head import Head
from neco.training import optim
from neco.training.align import align_pairs, pair_boxes
from neco.training.references import Queue, deal, permutations


class Network(nn.Module):
    """A backbone and its projection head: images (K, 3, H, W) -> unit patch vectors (K, h, w, D)."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class PostTraining(pl.LightningModule):
    """Patch Neighbor Consistency training (arXiv 2408.11054, section 3).

    The teacher starts as an exact copy of the student, head included, never has a graph, and follows the student after
    each optimiser step. All randomness of a step is a function of (seed, step): the position and the tensors are all
    that a checkpoint needs.

    Args:
        sizes: pixels of each view, global ones first.
        steps: optimiser steps of the whole run, over which the schedules go.
    """

    student: Network
    teacher: Network
    loss: Loss
    broken_at: Tensor

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        loss: Loss,
        *,
        options: config.Train,
        optim: config.Optim,
        sizes: list[int],
        global_views: int,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.student = Network(backbone, head)
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.loss = loss
        self.options, self.optim_options, self.steps, self.seed = options, optim, steps, seed
        self.sizes, self.global_views = sizes, global_views
        self.queue = Queue(loss.queue_size, global_views, head.out) if loss.references == "queue" else None
        self.register_buffer("broken_at", torch.tensor(-1), persistent=False)
        self.metrics: dict[str, Tensor] = {}
        self.step_metrics: dict[str, Tensor | float] = {}
        self.saved: dict[str, Any] = {}  # the run's own part of its checkpoints

    def train(self, mode: bool = True) -> "PostTraining":
        super().train(mode)
        self.teacher.eval()
        return self

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """`batch`: uint8 views (B, G, 3, S, S), (B, L, 3, s, s) and crops (B, V, 4); `index`: its number in the run."""
        torch.manual_seed(int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0]))  # stochastic depth
        size = len(batch["crops"])
        images, small = (
            normalise(batch[name].transpose(0, 1).flatten(0, 1)) for name in ("global_views", "local_views")
        )
        with torch.no_grad():
            teacher = self.teacher(images).unflatten(0, (-1, size))
        student = self.student(images).unflatten(0, (-1, size))
        student_small = self.student(small).unflatten(0, (-1, size)) if len(small) else None
        loss, extra = self.pair_loss(teacher, student, student_small, batch["crops"], index)
        for name, value in {"loss": loss.detach(), **extra}.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value / self.options.accumulate
        self.note_broken(loss)
        return loss

    def pair_loss(
        self, teacher: Tensor, student: Tensor, student_small: Tensor | None, crops: Tensor, index: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts from the maps (views, B, h, w, D) and crops (B, V, 4) of batch number `index`."""
        boxes = pair_boxes(crops, self.sizes, self.global_views)
        cells = align_pairs(
            teacher, student, student_small, *boxes, patch=self.student.backbone.patch, grid=self.loss.grid
        )
        if self.queue:
            references = self.queue(teacher, cells[1], self.seed, index)
        else:
            pairs, size, patches, _ = cells[1].shape
            references = deal(cells[1], permutations(self.seed, index, pairs, size * patches, self.device))
        return self.loss(*cells, references)

    def note_broken(self, value: Tensor) -> None:
        """Remember the first step with a number that is not finite, without waiting for the device."""
        step = torch.full_like(self.broken_at, self.global_step + 1)
        self.broken_at = torch.where((self.broken_at < 0) & ~value.detach().isfinite(), step, self.broken_at)

    def raise_if_broken(self, last: Path) -> None:
        """Raises NecoError if loss or gradient was not finite at some step; nothing is saved after it."""
        if (step := int(self.broken_at)) >= 0:
            saved = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint was saved before"
            raise NecoError(
                f"loss or gradient is not a finite number at step {step}; {saved}. Lower optim.lr or train.clip."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["neco"] = self.saved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The end of a shorter run: Lightning would take the longer one for finished.
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        options = self.optim_options
        groups = optim.parameter_groups(
            self.student.backbone, self.student.head, self.loss, options.lr, options.head_lr
        )
        return torch.optim.AdamW(groups, betas=options.betas, fused=self.device.type == "cuda")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before clipping: the gradient's norm over everything that trains."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self.note_broken(norm)
        self.metrics["grad_norm"] = norm

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        step = self.global_step
        optim.schedule(optimizer, step, self.steps, self.optim_options.weight_decay)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        momentum = optim.cosine(*self.options.momentum, step, self.steps)
        follow(self.teacher, self.student, momentum)
        rates = {group["name"]: group for group in optimizer.param_groups}
        self.step_metrics = {
            **self.metrics,
            **{f"lr_{name}": group["lr"] for name, group in rates.items() if "/" not in name},
            "weight_decay": max(group["weight_decay"] for group in rates.values()),
            "momentum": momentum,
        }
        self.metrics = {}


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Moving average in place, parameter by parameter: teacher <- momentum teacher + (1 - momentum) student."""
    ours, theirs = list(teacher.parameters()), [parameter.detach() for parameter in student.parameters()]
    get_ema_multi_avg_fn(momentum)(ours, theirs, None)
