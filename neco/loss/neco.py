"""NeCo: student and teacher order the same reference patches in the same way (ICLR 2025, arXiv 2408.11054).

Shapes: P pairs of views, B images, N aligned patches, n reference patches, D channels.
"""

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional as F

from neco import devices
from neco.errors import NecoError
from neco.loss.base import Loss, Mask, References
from neco.loss.relaxation import RelaxationName, choose
from neco.loss.sorting import Network, at_least_float32, sort_cross_entropy
from neco.values import Positive, PositiveFloat

Similarity = Literal["cosine", "euclidean"]


class NeCo(Loss):
    """Cross-entropy between the soft orders of the references, by similarity to each patch, of teacher and student.

    For a patch, Q and P (n, n) are the soft permutations that sort its similarities to its image's n references for
    the teacher and for the student; its loss is the mean over references i of -sum_j Q[i, j] log P[i, j]. That is
    averaged over patches and images, then over pairs; with a mask over its patches only, where a pair without any adds
    0 and still counts.

    The floor of the loss is the entropy of Q; `kl`, the difference, is the part that can move.
    """

    def __init__(
        self,
        *,
        network: Network = "bitonic",
        relaxation: RelaxationName = "cauchy",
        art_lambda: Annotated[float, Ge(0), Lt(1)] | None = None,
        student_steepness: PositiveFloat | None = None,
        teacher_steepness: PositiveFloat | None = None,
        similarity: Similarity = "cosine",
        references: References = "batch",
        reference_count: Annotated[int, Ge(2)] | None = None,
        queue_size: Positive = 8192,
        grid: Positive = 7,
        mask: Mask = "all",
    ) -> None:
        super().__init__()
        self.network: Network = network
        self.relaxation = choose(relaxation, art_lambda)
        self.student_steepness = student_steepness or self.relaxation.steepness
        self.teacher_steepness = teacher_steepness or self.relaxation.steepness
        self.similarity: Similarity = similarity
        if reference_count is None and grid < 2:
            raise NecoError("grid=1 aligns one patch an image, and one reference has no order: give reference_count")
        # Read by the training module, which aligns patches on a grid x grid and supplies references and mask.
        self.references, self.queue_size, self.grid, self.mask = references, queue_size, grid, mask
        self.reference_count = reference_count or grid**2

    def forward(
        self, student: Tensor, teacher: Tensor, references: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """student, teacher (P, B, N, D), references (P, B, n, D), mask (P, B, N) bool -> loss, its parts.

        The parts are `kl`, `entropy` and `agreement`, the share of patches whose nearest reference is the same for
        both. Computed in float32 at least, inside autocast as well. The teacher gets no gradient; the references do if
        they require it.
        """
        with torch.autocast(student.device.type, enabled=False):
            ours = similarities(student, references, self.similarity)
            with torch.no_grad():
                theirs = similarities(teacher, references, self.similarity)
            steepness = self.student_steepness, self.teacher_steepness
            rows = ours.flatten(0, 2), theirs.flatten(0, 2)
            loss, entropy = sort_cross_entropy(*rows, self.network, *steepness, self.relaxation)
            agree = (ours.argmax(-1) == theirs.argmax(-1)).to(loss)
            total, floor, agreement = (pair_mean(x.reshape(student.shape[:3]), mask) for x in (loss, entropy, agree))
        return total, {"kl": total.detach() - floor, "entropy": floor, "agreement": agreement}


def similarities(patches: Tensor, references: Tensor, kind: Similarity) -> Tensor:
    """(..., N, D), (..., n, D) -> (..., N, n), larger is nearer: cosine, or the Euclidean distance negated."""
    patches, references = at_least_float32(patches), at_least_float32(references)
    if kind == "euclidean":
        return -torch.cdist(patches, references, compute_mode="donot_use_mm_for_euclid_dist")
    patches, references = F.normalize(patches, dim=-1), F.normalize(references, dim=-1)
    # In float64, as "float32" products may be TF32 or bfloat16 by a global setting, and a steepness of 1000 shows that.
    return (patches.double() @ references.double().mT).to(patches)


def pair_mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (P, B, N) over each pair's patches, those of the mask if given (0 if none), then over pairs.

    With several processes the mask's patches are counted over all of them, so that the mean over processes, which is
    what their gradients become, is that of one process with all images.
    """
    if mask is None:
        return rows.mean()
    kept = devices.total(mask.sum((1, 2))).clamp(min=1) / devices.world()
    return (rows.where(mask, 0).sum((1, 2)) / kept).mean()
