"""Relations without sorting: student and teacher see a patch among the same references in the same way.

Zheng et al., "ReSSL: Relational self-supervised learning with weak augmentation" (NeurIPS 2021, arXiv 2107.09282), of
images; here of patches, with NeCo's references in place of its memory.
"""

from typing import Any

import torch
from torch import Tensor

from neco.config.types import PositiveFloat
from neco.loss.base import Referring, above_floor, similarities


class SoftCE(Referring):
    """Cross-entropy between the softmax of a patch's similarities to the references, of teacher and student.

    With cosines s (student) and t (teacher) to references i: -sum_i q_i log p_i, where p = softmax(s / student
    temperature) and q = softmax(t / teacher temperature). All that NeCo has but the sorting; logs what NeCo logs.
    """

    def __init__(
        self, *, student_temperature: PositiveFloat = 0.1, teacher_temperature: PositiveFloat = 0.04, **common: Any
    ) -> None:
        super().__init__(**common)
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature

    def compare(
        self, student: Tensor, teacher: Tensor, references: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_p = (similarities(student, references) / self.student_temperature).log_softmax(-1)
        with torch.no_grad():
            log_q = (similarities(teacher, references) / self.teacher_temperature).log_softmax(-1)
        q, agree = log_q.exp(), log_p.argmax(-1) == log_q.argmax(-1)
        return above_floor(-(q * log_p).sum(-1), -(q * log_q).sum(-1), agree, mask)
