"""Similarities within an image: the student's patches resemble each other as much as the teacher's do.

Simeoni et al., "DINOv3" (arXiv 2508.10104), Gram anchoring: ||X_S X_S^T - X_G X_G^T||_F^2 over the unit patch vectors
of an image; as in its code, divided by the number of entries. There the teacher is an early checkpoint, here it is the
run's own, of another view.
"""

from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor

from neco.loss.base import Loss, masked_mean, pair_mean, similarities


class Gram(Loss):
    """Mean square, over pairs of an image's patches, of the difference between the student's and teacher's cosines."""

    def __init__(self, *, grid: Annotated[int, Ge(2)] = 7, **common: Any) -> None:
        super().__init__(grid=grid, **common)

    def compare(
        self, student: Tensor, teacher: Tensor, references: Any, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        error = (similarities(student, student) - similarities(teacher, teacher)).square()
        rows = masked_mean(error, None if mask is None else mask[..., None, :], -1)[..., 0]
        return pair_mean(rows, mask), {}
