"""Contrast: the same place in the other view is the positive, reference patches are the negatives.

Pinheiro et al., "Unsupervised learning of dense visual representations" (VADeR, NeurIPS 2020, arXiv 2011.05499):
matched pixels of two views, temperature 0.07, negatives from a memory of the teacher's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neco.config.types import PositiveFloat
from neco.loss.base import References, Referring, pair_mean, similarities


class InfoNCE(Referring):
    """Cross-entropy of finding a patch's aligned teacher patch among its image's references.

    With the cosines c to the teacher's patch at the same place and s_i to the references, and temperature t:
    -log(exp(c / t) / (exp(c / t) + sum_i exp(s_i / t))). References are of other images by default, where none can be
    the positive itself.

    Logs `accuracy`, the share of patches nearer to their own teacher patch than to any reference.
    """

    def __init__(
        self, *, temperature: PositiveFloat = 0.07, references: References = "batch_other", **common: Any
    ) -> None:
        super().__init__(references=references, **common)
        self.temperature = temperature

    def compare(
        self, student: Tensor, teacher: Tensor, references: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        positive = F.cosine_similarity(student, teacher, dim=-1)[..., None]
        logits = torch.cat([positive, similarities(student, references)], -1) / self.temperature
        first = (logits[..., :1] > logits[..., 1:]).all(-1).to(logits)
        return pair_mean(-logits.log_softmax(-1)[..., 0], mask), {"accuracy": pair_mean(first, mask)}
