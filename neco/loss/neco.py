"""NeCo: student and teacher order the same reference patches in the same way (ICLR 2025, arXiv 2408.11054).

Shapes: P pairs of views, B images, N aligned patches, n reference patches, D channels.
"""

from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from neco.config.types import PositiveFloat
from neco.loss.base import Referring, Similarity, above_floor, similarities
from neco.loss.relaxation import RelaxationName, choose
from neco.loss.sorting import Engine, Network, choose_engine, sort_cross_entropy


class NeCo(Referring):
    """Cross-entropy between the soft orders of the references, by similarity to each patch, of teacher and student.

    For a patch, Q and P (n, n) are the soft permutations that sort its similarities to its image's n references for
    the teacher and for the student; its loss is the mean over references i of -sum_j Q[i, j] log P[i, j]. That is
    averaged over patches and images, then over pairs; with a mask over its patches only, where a pair without any adds
    0 and still counts.

    The floor of the loss is the entropy of Q; `kl`, the difference, is the part that can move. `agreement` is the share
    of patches whose nearest reference is the same for both.

    Args:
        network, relaxation, art_lambda: how sorting is relaxed, see `neco.loss.sorting`.
        steepness: how hard the orders are, the higher the harder: of both, or (student, teacher); None: that of the
            relaxation.
        similarity: of patches and references; the Euclidean distance is negated, so that larger is nearer.
    """

    def __init__(
        self,
        *,
        network: Network = "bitonic",
        relaxation: RelaxationName = "cauchy",
        art_lambda: Annotated[float, Ge(0), Lt(1)] | None = None,
        steepness: PositiveFloat | tuple[PositiveFloat, PositiveFloat] | None = None,
        similarity: Similarity = "cosine",
        engine: Engine = "auto",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.network: Network = network
        self.relaxation = choose(relaxation, art_lambda)
        given = steepness or self.relaxation.steepness
        student, teacher = given if isinstance(given, tuple) else (given, given)
        self.steepness = float(student), float(teacher)
        self.similarity: Similarity = similarity
        self.engine: Engine = engine

    def check(self, device: torch.device) -> None:
        n, steepness = self.reference_count, self.steepness[0]
        choose_engine(self.engine, self.network, n, steepness, self.relaxation, device)

    def compare(
        self, student: Tensor, teacher: Tensor, references: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ours = similarities(student, references, self.similarity)
        with torch.no_grad():
            theirs = similarities(teacher, references, self.similarity)
        rows = ours.flatten(0, 2), theirs.flatten(0, 2)
        loss, entropy = sort_cross_entropy(*rows, self.network, *self.steepness, self.relaxation, self.engine)
        agree = ours.argmax(-1) == theirs.argmax(-1)
        return above_floor(loss.view_as(agree), entropy.view_as(agree), agree, mask)
