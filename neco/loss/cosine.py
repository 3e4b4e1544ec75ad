"""Agreement of views alone: the student's patch points where the teacher's at the same place does.

Grill et al., "Bootstrap your own latent" (BYOL, NeurIPS 2020, arXiv 2006.07733), equation 2, half of it and of patches.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from neco.loss.base import Loss, pair_mean


class Cosine(Loss):
    """1 - cos(student's patch, teacher's patch). Nothing but the following teacher keeps it from collapse."""

    def compare(
        self, student: Tensor, teacher: Tensor, references: Any, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return pair_mean(1 - F.cosine_similarity(student, teacher, dim=-1), mask), {}
