"""Clustering: the student tells which prototype the teacher's patch at the same place is assigned to.

Ziegler and Asano, "Self-supervised learning of object parts for semantic segmentation" (Leopart, CVPR 2022, arXiv
2204.13101): SwAV (arXiv 2006.09882) of patches, 300 prototypes. There assignments are found on whole views and aligned,
here on aligned patches.
"""

import copy
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from neco.config.types import Few, Million, PositiveFloat
from neco.distributed import collectives
from neco.loss.base import Loss, above_floor, similarities


class Leopart(Loss):
    """Cross-entropy between the teacher's balanced assignment to prototypes and the student's softmax over them.

    With cosines s of the student's patch to the trained prototypes k and temperature t: -sum_k q_k log p_k, where
    p = softmax(s / t). q is the patch's row of the plan that Sinkhorn's algorithm makes of the teacher's patches, of
    all images and pairs (and processes), and the teacher's prototypes, so that each prototype gets as much.
    `agreement` is the share of patches whose first prototype is the same for both.

    Args:
        prototypes: their number.
        temperature: of the student's softmax.
        epsilon: of Sinkhorn's entropy; the smaller, the harder the assignment.
        iterations: of Sinkhorn.
    """

    student: nn.Linear
    teacher: nn.Linear

    def __init__(
        self,
        *,
        prototypes: Million = 300,
        temperature: PositiveFloat = 0.1,
        epsilon: Annotated[float, Ge(0.005)] = 0.05,  # exp(-2 / epsilon) has to be a float64
        iterations: Few = 3,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.compared = prototypes
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations

    def attach(self, dim: int) -> None:
        self.student = nn.Linear(dim, self.compared, bias=False)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def compare(
        self, student: Tensor, teacher: Tensor, references: Any, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_p = (similarities(student, self.student.weight) / self.temperature).log_softmax(-1)
        with torch.no_grad():
            q = sinkhorn(similarities(teacher, self.teacher.weight), self.epsilon, self.iterations, mask).to(log_p)
        agree = log_p.argmax(-1) == q.argmax(-1)
        return above_floor(-(q * log_p).sum(-1), -torch.special.xlogy(q, q).sum(-1), agree, mask)


def sinkhorn(scores: Tensor, epsilon: float, iterations: int, mask: Tensor | None = None) -> Tensor:
    """Scores (..., K) up to 1 -> assignments (..., K) in float64 whose rows sum to 1, and whose columns nearly equally.

    Rows outside the mask (...) are 0. With several processes the columns are those of all.
    """
    plan = ((scores.double() - 1) / epsilon).exp()
    if mask is not None:
        plan = plan * mask[..., None]
    tiny = torch.finfo(plan.dtype).tiny
    for _ in range(iterations):
        plan = plan / collectives.total(plan.flatten(0, -2).sum(0)).clamp(min=tiny)
        plan = plan / plan.sum(-1, keepdim=True).clamp(min=tiny)
    return plan
