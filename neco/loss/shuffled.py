"""The control of NeCo: the same loss at the same cost, with nothing to learn from."""

from torch import Tensor

from neco.loss.neco import NeCo


class Shuffled(NeCo):
    """NeCo in which each image is compared with the teacher's patches of the image before it in the batch.

    Everything else (views, references, network, schedule) is as in NeCo, so a gain that NeCo owes to the agreement of
    views is gone here, and one that it owes to anything else stays.
    """

    def compare(
        self, student: Tensor, teacher: Tensor, references: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As NeCo's, with the teacher's images moved on by one."""
        return super().compare(student, teacher.roll(1, dims=1), references, mask)
