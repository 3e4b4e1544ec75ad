"""Reference patches of every pair of views: dealt from the batch, or drawn from a queue of past teacher patches.

Every draw is a function of (seed, step, what for, which list), made on the CPU: the same on any device, on any number
of devices, and after a resume.

Shapes: P pairs (first view global, G-major), G global views, B images, N aligned patches, D channels.
"""

import numpy as np
import torch
from torch import Tensor, nn

from neco.errors import NecoError

DEAL, PUSH, DRAW = range(3)
PUSHED_PER_IMAGE = 10


def draws(seed: int, step: int, use: int, lists: int, population: int, count: int) -> Tensor:
    """(lists, count): independent draws of `count` out of range(population), without replacement, in random order."""
    generators = (np.random.Philox(key=[seed, step], counter=[0, 0, use, number]) for number in range(lists))
    drawn = [np.random.Generator(philox).permutation(population)[:count] for philox in generators]
    return torch.from_numpy(np.stack(drawn))


def permutations(seed: int, step: int, pairs: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The permutations (pairs, count) that `deal` the references of a training step."""
    return draws(seed, step, DEAL, pairs, count, count).to(device, non_blocking=True)


def deal(teacher: Tensor, permutations: Tensor) -> Tensor:
    """References (P, B, N, D) from the pair's own aligned teacher patches (P, B, N, D): each is used exactly once.

    All patches of a pair form one pool, image by image and row by row; permutations (P, B * N) say which patch of it
    goes to place 0, 1, ... of image 0, then of image 1, ... (METHOD: references `batch`).
    """
    pairs = torch.arange(len(teacher), device=teacher.device)[:, None]
    return teacher.flatten(1, 2)[pairs, permutations].view_as(teacher)


def check_queue(queue_size: int, batch_size: int, grid: int) -> None:
    """Raise NecoError for a queue that never holds the references of one step."""
    if queue_size < (draw := batch_size * grid**2):
        raise NecoError(
            f"loss.queue_size={queue_size} is below one draw of references: a batch of {batch_size} images x "
            f"{grid} x {grid} patches needs {draw}; raise it, lower the batch size or take loss.references=batch"
        )


class Queue(nn.Module):
    """First in, first out: the last `size` teacher patches of each of `views` global views, vectors of `dim`.

    Its whole state (vectors, how many were ever pushed) is in the state dict. The count lives on the host, so that
    using it never waits for the device.
    """

    vectors: Tensor

    def __init__(self, size: int, views: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(views, size, dim))
        self.pushed = 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.pushed)

    def set_extra_state(self, state: Tensor) -> None:
        self.pushed = int(state)

    @property
    def filled(self) -> int:
        """Vectors that each view holds."""
        return min(self.pushed, self.vectors.shape[1])

    @torch.no_grad()
    def push(self, vectors: Tensor) -> None:
        """Append vectors (G, m, D), m at most the size, in the place of the oldest."""
        count, size = vectors.shape[1], self.vectors.shape[1]
        places = (torch.arange(count, device=vectors.device) + self.pushed) % size
        self.vectors.index_copy_(1, places, vectors.to(self.vectors))
        self.pushed += count

    def forward(self, maps: Tensor, teacher: Tensor, seed: int, step: int) -> Tensor:
        """Push patches of the raw teacher maps (G, B, h, w, D), then draw the references (P, B, N, D) of all pairs.

        Each view pushes 10 B random patches (at most its size); each pair draws B * N of its global view's vectors
        without replacement. While the queue holds fewer than that, the references are those of the batch, dealt from
        the aligned patches `teacher` (P, B, N, D).
        """
        patches = maps.flatten(1, 3)
        views, population = patches.shape[:2]
        count = min(PUSHED_PER_IMAGE * maps.shape[1], self.vectors.shape[1], population)
        self.push(_take(patches, draws(seed, step, PUSH, views, population, count)))
        pairs, needed = len(teacher), teacher.shape[1] * teacher.shape[2]
        if self.filled < needed:
            return deal(teacher, permutations(seed, step, pairs, needed, teacher.device))
        drawn = draws(seed, step, DRAW, pairs, self.filled, needed)
        return _take(self.vectors, drawn.view(views, -1)).to(teacher.dtype).view_as(teacher)


def _take(vectors: Tensor, indices: Tensor) -> Tensor:
    """vectors (G, m, D), indices (G, k) -> (G, k, D)."""
    indices = indices.to(vectors.device, non_blocking=True)
    return vectors[torch.arange(len(vectors), device=vectors.device)[:, None], indices]
