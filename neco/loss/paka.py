"""Kernel alignment: the patches of an image vary together in the student as they do in the teacher.

Yeo et al., "Patch-level kernel alignment for dense self-supervised learning" (PaKA, arXiv 2509.05606), with the linear
kernel; the measure is Kornblith et al., "Similarity of neural network representations revisited" (ICML 2019).
"""

from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from neco.loss.base import Loss, masked_mean, pair_mean, products

EPS = 1e-8  # a norm of a kernel: patches that differ by less than 1e-4 count as equal


class PaKA(Loss):
    """1 - CKA of the linear kernels K and L (N, N) of an image's student and teacher patches.

    CKA = <HKH, HLH> / (||HKH|| ||HLH||) with H = I - 11^T / N, Frobenius products and norms. Images count by their
    patches; one with a single patch has no kernel and does not count.
    """

    def __init__(self, *, grid: Annotated[int, Ge(2)] = 7, **common: Any) -> None:
        super().__init__(grid=grid, **common)

    def compare(
        self, student: Tensor, teacher: Tensor, references: Any, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ours, theirs = (F.normalize(centred_kernel(x, mask).flatten(-2), dim=-1, eps=EPS) for x in (student, teacher))
        rows = 1 - (ours * theirs).sum(-1, keepdim=True).expand(student.shape[:3])
        return pair_mean(rows, None if mask is None else mask & (mask.sum(-1, keepdim=True) > 1)), {}


def centred_kernel(patches: Tensor, mask: Tensor | None) -> Tensor:
    """HKH (..., N, N) of patches (..., N, D); zero where the mask (..., N) leaves one out."""
    kept = None if mask is None else mask[..., None]
    centred = patches - masked_mean(patches, kept, -2)
    centred = centred if kept is None else centred.where(kept, 0)
    return products(centred, centred)
