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

from neco import config, devices
from neco.augment.colour import normalise
from neco.errors import NecoError
from neco.loss.base import Loss
from neco.model.backbone import Backbone
from neco.model.head import Head
from neco.model.mask import foreground
from neco.training import optim, strategies, trainable
from neco.training.align import WHOLE, align, align_pairs, pair_boxes, pair_order
from neco.training.references import Queue, from_batch


class Network(nn.Module):
    """A backbone and its projection head: images (K, 3, H, W) -> unit patch vectors (K, h, w, D)."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def attend(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the attention (K, heads, h, w) of CLS to the patches in the last block."""
        maps, attention = self.backbone.forward_attention(images)
        return self.head(maps), attention.detach()


class PostTraining(pl.LightningModule):
    """Patch Neighbor Consistency training (arXiv 2408.11054, section 3).

    The teacher starts as an exact copy of the student, head included, never has a graph, and follows the student after
    each optimiser step: `ema` all of it, `head_ema` its head alone, `frozen` none of it. With `none` there is none: the
    student's own global views give order and references, and the references carry gradient.

    All randomness of a step is a function of (seed, step): position and tensors are all that a checkpoint needs.

    Args:
        steps: optimiser steps of the whole run, over which the schedules go.
    """

    student: Network
    teacher: Network | None
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
        global_views: int,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        trainable.restrict(backbone, options)
        backbone.recompute = options.checkpoint_activations
        self.student = Network(backbone, head)
        alone = options.teacher == "none"
        self.teacher = None if alone else copy.deepcopy(self.student).eval().requires_grad_(False)
        self.loss = loss
        self.options, self.optim_options, self.steps, self.seed = options, optim, steps, seed
        self.global_views = global_views
        self.queue = Queue(loss.queue_size, global_views, head.out) if loss.references == "queue" else None
        self.register_buffer("broken_at", torch.tensor(-1), persistent=False)
        self.metrics: dict[str, Tensor] = {}
        self.step_metrics: dict[str, Tensor | float] = {}
        self.saved: dict[str, Any] = {}  # the run's own part of its checkpoints

    def train(self, mode: bool = True) -> "PostTraining":
        super().train(mode)
        if self.teacher:
            self.teacher.eval()
        return self

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """`batch`: uint8 views (B, G, 3, H, W), (B, L, 3, h, w), crops (B, V, 4), and teacher's views (B, G, 3, H, W)
        where those differ; `index`: its number in the run. With several processes B are the images of this one.
        """
        key = [self.seed, index, devices.rank()] if devices.rank() else [self.seed, index]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))  # stochastic depth
        size = len(batch["crops"])

        def images(name: str) -> Tensor:
            return normalise(batch[name].transpose(0, 1).flatten(0, 1))

        def by_view(maps: Any) -> Any:
            return None if maps is None else maps.unflatten(0, (-1, size))

        large, small = images("global_views"), images("local_views")
        shown = images("teacher_views") if "teacher_views" in batch else large
        teacher, attention = self.target(shown)
        student = None
        if self.global_views > 1:  # a single one is compared with local ones alone: nobody asks the student about it
            student = teacher if self.teacher is None and shown is large else self.student(large)
        student_small = self.student(small) if len(small) else None
        front = None if attention is None else foreground(attention)
        kept = front if front is None or self.loss.mask == "fg" else ~front
        maps = by_view(teacher), by_view(student), by_view(student_small)
        loss, extra = self.pair_loss(*maps, batch["crops"], index, by_view(kept))
        for name, value in {"loss": loss.detach(), **extra}.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value / self.options.accumulate
        self.note_broken(loss)
        return loss

    def target(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps that set the order, and their attention where the loss wants a mask; a graph only without a teacher."""
        network = self.teacher or self.student
        with torch.set_grad_enabled(self.teacher is None and torch.is_grad_enabled()):
            return (network(images), None) if self.loss.mask == "all" else network.attend(images)

    def pair_loss(
        self,
        teacher: Tensor,
        student: Tensor | None,
        student_small: Tensor | None,
        crops: Tensor,
        index: int,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts from the maps (views, B, h, w, D) and crops (B, V, 4) of batch number `index`.

        kept: mask (G, B, h, w) of the teacher's patches that supply references and, aligned, enter the loss.
        """
        loss, patch = self.loss, self.student.backbone.patch
        views = [view for group in (teacher, student_small) if group is not None for view in group]
        sizes = [(patch * view.shape[1], patch * view.shape[2]) for view in views]
        on_global, on_view = pair_boxes(crops, sizes, self.global_views)
        shape = {"patch": patch, "grid": loss.grid}
        ours, theirs = align_pairs(teacher, student, student_small, on_global, on_view, **shape)
        mask = None
        if kept is not None:
            order = pair_order(self.global_views, on_global.shape[2])
            mask = align(kept[..., None].float(), on_global, order, **shape)[..., 0] >= WHOLE
        if self.queue:
            both = None if kept is None or mask is None else (kept, mask)
            references = self.queue(teacher, theirs, self.seed, index, loss.reference_count, both)
        else:
            references = from_batch(loss.references, theirs, loss.reference_count, self.seed, index, mask)
        total, extra = loss(ours, theirs, references, mask)
        return total, extra if mask is None else {**extra, "kept": mask.float().mean()}

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
        # torch would take the groups' values from the checkpoint, and a changed optim.lr would do nothing.
        for group, ours in zip(checkpoint["optimizer_states"][0]["param_groups"], self.groups(), strict=True):
            group |= {"peak_lr": ours["peak_lr"], "betas": self.optim_options.betas}

    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups."""
        rates = self.optim_options.lr, self.optim_options.head_lr, self.optim_options.layer_decay
        return optim.parameter_groups(self.student.backbone, self.student.head, self.loss, *rates)

    def configure_model(self) -> None:
        if self.options.strategy == "fsdp" and self.options.processes > 1:
            for network in filter(None, (self.student, self.teacher)):
                strategies.shard(network, self.device_mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.groups(), betas=self.optim_options.betas, fused=self.device.type == "cuda")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before clipping: the gradient's norm over everything that trains."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = strategies.whole(torch.nn.utils.get_total_norm(grads))
        self.note_broken(norm)
        self.metrics["grad_norm"] = norm

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        step = self.global_step
        optim.schedule(optimizer, step, self.steps, self.optim_options.weight_decay)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        momentum = optim.cosine(*self.options.momentum, step, self.steps)
        if self.teacher:
            part = {"ema": "", "head_ema": "head"}.get(self.options.teacher)
            if part is not None:
                follow(self.teacher.get_submodule(part), self.student.get_submodule(part), momentum)
        rates: dict[str, float] = {}  # the highest of the backbone and of the head
        for group in optimizer.param_groups:
            name = f"lr_{group['name'].split('/')[0]}"
            rates[name] = max(rates.get(name, 0.0), group["lr"])
        self.step_metrics = {
            **self.metrics,
            **rates,
            "weight_decay": max(group["weight_decay"] for group in optimizer.param_groups),
            "momentum": momentum,
        }
        self.metrics = {}


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Moving average in place, parameter by parameter: teacher <- momentum teacher + (1 - momentum) student.

    Only of what trains: the average of two equal numbers is not always the same bits (-0.0).
    """
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if s.requires_grad]
    ours, theirs = (strategies.local(side) for side in zip(*pairs, strict=True))
    get_ema_multi_avg_fn(momentum)(ours, theirs, None)
