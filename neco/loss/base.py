"""What the training step asks of a loss.

Shapes: P pairs of views, B images, N aligned patches, n reference patches, D channels.
"""

from typing import Literal

from torch import nn

References = Literal["batch", "batch_other", "batch_any", "queue"]
Mask = Literal["all", "fg", "bg"]


class Loss(nn.Module):
    """A loss compares aligned patches of student and teacher; views, boxes and queue are the training step's business.

    `forward(student (P, B, N, D), teacher (P, B, N, D), references (P, B, n, D), mask (P, B, N) bool or None)` returns
    the scalar to minimise and a dict of detached scalars to log, `kl` among them. Its parameters join optimiser and
    checkpoint.

    Attributes:
        grid: patches are aligned to grid x grid, so N = grid^2.
        references: where the reference patches come from, see `neco.training.references`: the batch itself, or a queue
            of past teacher patches.
        reference_count: n, references of an image and pair.
        queue_size: vectors per global view of that queue.
        mask: which patches count, by the teacher's attention: all, the foreground, or the background.
    """

    grid: int = 7
    references: References = "batch"
    reference_count: int = 49
    queue_size: int = 8192
    mask: Mask = "all"
