"""The post-training step: student and EMA teacher, aligned patches, references, loss.

Legend: B images, V views (G global then L local), P = G (V - 1) pairs, N = grid^2 cells, D channels, n references.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from neco.augment.batched import recolour
from neco.augment.colour import normalise
from neco.config import schema
from neco.loss.base import Loss, Referring
from neco.model.backbone import Backbone
from neco.model.head import Head
from neco.model.mask import foreground
from neco.training import optim as schedules
from neco.training import strategies, trainable
from neco.training.align import WHOLE, align, align_pairs, pair_boxes, pair_order
from neco.training.base import Module
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


class PostTraining(Module):
    """Patch Neighbor Consistency training (arXiv 2408.11054, section 3).

    The teacher starts as an exact copy of the student, head included, never has a graph, and follows the student after
    each optimiser step: `ema` all of it, `head_ema` its head alone, `frozen` none of it. With `none` there is none: the
    student's own global views give order and references, and the references carry gradient. What a loss has of
    parameters goes with the head.

    Position and tensors are all that a checkpoint needs.

    Args:
        clean: the teacher sees the global views in their own colours.
    """

    student: Network
    teacher: Network | None
    loss: Loss
    options: schema.Train
    shown = ("loss", "kl", "accuracy")

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        loss: Loss,
        *,
        options: schema.Train,
        optim: schema.Optim,
        global_views: int,
        steps: int,
        seed: int,
        clean: bool = False,
    ) -> None:
        super().__init__(options=options, optim=optim, steps=steps, seed=seed)
        trainable.restrict(backbone, options)
        backbone.recompute = options.checkpoint_activations
        self.student = Network(backbone, head)
        alone = options.teacher == "none"
        self.teacher = None if alone else copy.deepcopy(self.student).eval().requires_grad_(False)
        self.loss = loss
        loss.attach(head.out)
        self.momentum = schedules.ema_momentum(steps) if options.momentum == "auto" else options.momentum
        self.global_views, self.clean = global_views, clean
        self.recolour = recolour
        self.queue = None
        if isinstance(loss, Referring) and loss.references == "queue":
            self.queue = Queue(loss.queue_size, global_views, head.out)

    def parts(self) -> tuple[Backbone, nn.Module, nn.Module]:
        return self.student.backbone, self.student.head, self.loss

    def train(self, mode: bool = True) -> "PostTraining":
        super().train(mode)
        if self.teacher:
            self.teacher.eval()
        return self

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """`batch`: uint8 views (B, G, 3, H, W), (B, L, 3, h, w), crops (B, V, 4); teacher's views (B, G, 3, H, W) where
        those differ, or `Colours` (B, V, ...) that all views are still to get; `index`: its number in the run. With
        several processes B are the images of this one.
        """
        size = len(batch["crops"])
        self.draw(index, size)

        def rows(values: Tensor) -> Tensor:
            return values.transpose(0, 1).flatten(0, 1)

        def images(name: str, *colours: Tensor) -> Tensor:
            pixels = rows(batch[name])
            return normalise(self.recolour(pixels, *map(rows, colours)) if colours and len(pixels) else pixels)

        def by_view(maps: Any) -> Any:
            return None if maps is None else maps.unflatten(0, (-1, size))

        colours = batch.get("colours", ())
        large = images("global_views", *(values[:, : self.global_views] for values in colours))
        small = images("local_views", *(values[:, self.global_views :] for values in colours))
        shown = images("global_views" if colours else "teacher_views") if self.clean else large
        teacher, attention = self.target(shown)
        student = None
        if self.global_views > 1:  # a single one is compared with local ones alone: nobody asks the student about it
            student = teacher if self.teacher is None and shown is large else self.student(large)
        student_small = self.student(small) if len(small) else None
        front = None if attention is None else foreground(attention)
        kept = front if front is None or self.loss.mask == "fg" else ~front
        maps = by_view(teacher), by_view(student), by_view(student_small)
        loss, extra = self.pair_loss(*maps, batch["crops"], index, by_view(kept))
        return self.account(loss, extra)

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
        references = None
        if self.queue:
            both = None if kept is None or mask is None else (kept, mask)
            references = self.queue(teacher, theirs, self.seed, index, loss.reference_count, both)
        elif isinstance(loss, Referring):
            references = from_batch(loss.references, theirs, loss.reference_count, self.seed, index, mask)
        total, extra = loss(ours, theirs, references, mask)
        return total, extra if mask is None else {**extra, "kept": mask.float().mean()}

    def configure_model(self) -> None:
        if self.options.strategy == "fsdp" and self.options.processes > 1:
            for network in filter(None, (self.student, self.teacher)):
                strategies.shard(network, self.device_mesh)
            if self.loss.student:
                strategies.shard_whole(self.loss, self.device_mesh)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        momentum = schedules.cosine(*self.momentum, self.global_step, self.steps)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.teacher:
            part = {"ema": "", "head_ema": "head"}.get(self.options.teacher)
            if part is not None:
                follow(self.teacher.get_submodule(part), self.student.get_submodule(part), momentum)
        if self.loss.student and self.loss.teacher and self.options.teacher != "frozen":
            follow(self.loss.teacher, self.loss.student, momentum if self.teacher else 0.0)
        self.step_metrics["momentum"] = momentum


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Moving average in place, parameter by parameter: teacher <- momentum teacher + (1 - momentum) student.

    Only of what trains: the average of two equal numbers is not always the same bits (-0.0).
    """
    strategies.reshard(teacher)
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if s.requires_grad]
    ours, theirs = (strategies.local(side) for side in zip(*pairs, strict=True))
    get_ema_multi_avg_fn(momentum)(ours, theirs, None)
