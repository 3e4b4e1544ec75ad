"""What the training step asks of a loss, and what losses are made of.

Shapes: P pairs of views, B images, N aligned patches, n reference patches, D channels.
"""

from abc import abstractmethod
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from neco.config.types import Few, Million
from neco.distributed import collectives
from neco.loss.sorting import at_least_float32
from neco.utils.errors import NecoError

References = Literal["batch", "batch_other", "batch_any", "queue"]
Mask = Literal["all", "fg", "bg"]
Similarity = Literal["cosine", "euclidean"]


class Loss(nn.Module):
    """A loss compares aligned patches of student and teacher; views, boxes and queue are the training step's business.

    What it has of parameters is in `student`: it trains like the head and joins optimiser and checkpoint. Its copy
    `teacher` follows it after each step as the teacher's head follows the student's.

    Attributes:
        references: where reference patches come from, see `neco.training.references`; None: it takes none.
        compared: vectors that each patch is compared with, for the estimate of memory.

    Args:
        grid: patches are aligned to grid x grid, so N = grid^2.
        mask: which patches count, by the teacher's attention: all, the foreground, or the background.
    """

    references: References | None = None
    student: nn.Module | None
    teacher: nn.Module | None

    def __init__(self, *, grid: Few = 7, mask: Mask = "all") -> None:
        super().__init__()
        self.grid, self.mask = grid, mask
        self.compared = grid**2
        self.student = self.teacher = None

    def check(self, device: torch.device) -> None:
        """Raise NecoError if the loss cannot be computed there; called before anything is read."""

    def attach(self, dim: int) -> None:
        """Make the parameters, if any, for vectors of D = dim channels; called once, before training."""

    def forward(
        self, student: Tensor, teacher: Tensor, references: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """student, teacher (P, B, N, D), references (P, B, n, D), mask (P, B, N) bool -> loss, detached scalars to log.

        A loss with a floor, which no student gets below, logs `kl`, the part above it. Computed in float32 at least,
        inside autocast as well. The teacher gets no gradient; references do if they require it.
        """
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
            return self.compare(student, teacher, None if references is None else at_least_float32(references), mask)

    @abstractmethod
    def compare(
        self, student: Tensor, teacher: Tensor, references: Any, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward`, with the precision taken care of."""


class Referring(Loss):
    """A loss that compares each patch with the n reference patches of its image and pair.

    Args:
        references: the batch itself, or a queue of past teacher patches.
        reference_count: n; None: as many as aligned patches.
        queue_size: vectors per global view of that queue.
    """

    references: References

    def __init__(
        self,
        *,
        references: References = "batch",
        reference_count: Annotated[int, Ge(2)] | None = None,
        queue_size: Million = 8192,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if reference_count is None and self.grid < 2:
            raise NecoError("grid=1 aligns one patch an image, and one reference is too few: give reference_count")
        self.references, self.queue_size = references, queue_size
        self.compared = self.reference_count = reference_count or self.grid**2


def similarities(patches: Tensor, references: Tensor, kind: Similarity = "cosine") -> Tensor:
    """(..., N, D), (..., n, D) -> (..., N, n), larger is nearer: cosine, or the Euclidean distance negated."""
    patches, references = at_least_float32(patches), at_least_float32(references)
    if kind == "euclidean":
        return -torch.cdist(patches, references, compute_mode="donot_use_mm_for_euclid_dist")
    return products(F.normalize(patches, dim=-1), F.normalize(references, dim=-1))


def products(x: Tensor, y: Tensor) -> Tensor:
    """Scalar products of vectors (..., N, D), (..., n, D) -> (..., N, n).

    In float64, as "float32" products may be TF32 or bfloat16 by a global setting, and a steepness of 1000 shows that.
    """
    return (x.double() @ y.double().mT).to(x)


def masked_mean(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Mean along `dim`, which stays, of what the mask keeps; 0 where it keeps nothing."""
    if mask is None:
        return x.mean(dim, keepdim=True)
    return x.where(mask, 0).sum(dim, keepdim=True) / mask.sum(dim, keepdim=True).clamp(min=1)


def pair_mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (P, B, N) over each pair's patches, those of the mask if given (0 if none), then over pairs.

    With several processes the mask's patches are counted over all of them, so that the mean over processes, which is
    what their gradients become, is that of one process with all images.
    """
    if mask is None:
        return rows.mean()
    kept = collectives.total(mask.sum((1, 2))).clamp(min=1) / collectives.world()
    return (rows.where(mask, 0).sum((1, 2)) / kept).mean()


def above_floor(loss: Tensor, entropy: Tensor, agree: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and parts of a cross-entropy: its rows (P, B, N), the entropies of its targets, where both sides agree."""
    total, floor, agreement = (pair_mean(rows, mask) for rows in (loss, entropy, agree.to(loss)))
    return total, {"kl": total.detach() - floor, "entropy": floor, "agreement": agreement}
