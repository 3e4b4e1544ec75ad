"""What the training step asks of a loss.

Shapes: P pairs of views, B images, N aligned patches, n reference patches, D channels.
"""

from typing import Literal

from torch import nn


class Loss(nn.Module):
    """A loss compares aligned patches of student and teacher; views, boxes and queue are the training step's business.

    `forward(student (P, B, N, D), teacher (P, B, N, D), references (P, B, n, D), mask (P, B, N) bool or None)` returns
    the scalar to minimise and a dict of detached scalars to log, `kl` among them. Its parameters join optimiser and
    checkpoint.

    Attributes:
        grid: patches are aligned to grid x grid, so N = grid^2.
        references: where the reference patches come from, the batch itself or a queue of past teacher patches.
        queue_size: vectors per global view of that queue.
    """

    grid: int = 7
    references: Literal["batch", "queue"] = "batch"
    queue_size: int = 8192
