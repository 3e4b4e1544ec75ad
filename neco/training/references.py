"""Reference patches of every pair of views: dealt from the batch, or drawn from a queue of past teacher patches.

Every draw is a function of (seed, step, what for, which list), made on the CPU: the same on any device, on any number
of devices, and after a resume.

Shapes: P pairs (first view global, G-major), G global views, B images, N aligned patches, D channels.
"""

import numpy as np
import torch
from torch import Tensor, nn

from neco.distributed import collectives
from neco.utils.errors import NecoError

DEAL, PUSH, DRAW, ANY = range(4)
PUSHED_PER_IMAGE = 10


def draws(seed: int, step: int, use: int, lists: int, population: int, count: int) -> Tensor:
    """(lists, count): independent draws of `count` out of range(population), without replacement, in random order."""
    drawn = [_generator(seed, step, use, number).permutation(population)[:count] for number in range(lists)]
    return torch.from_numpy(np.stack(drawn))


def permutations(seed: int, step: int, pairs: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The permutations (pairs, count) that `deal` the references of a training step."""
    return collectives.send(draws(seed, step, DEAL, pairs, count, count), device)


def deal(teacher: Tensor, permutations: Tensor) -> Tensor:
    """References (P, B, N, D) from the pair's own aligned teacher patches (P, B, N, D): each is used exactly once.

    All patches of a pair form one pool, image by image and row by row; permutations (P, B * N) say which patch of it
    goes to place 0, 1, ... of image 0, then of image 1, ... (METHOD: references `batch`).
    """
    pairs = torch.arange(len(teacher), device=teacher.device)[:, None]
    return teacher.flatten(1, 2)[pairs, permutations].view_as(teacher)


def from_batch(
    source: str,
    teacher: Tensor,
    count: int,
    seed: int,
    step: int,
    kept: Tensor | None = None,
) -> Tensor:
    """`count` references for each image, from the pair's own aligned teacher patches (P, B, N, D) -> (P, B, count, D).

    - `batch`: the pool is dealt in random order, image after image, from its start again when it is used up.
    - `batch_other`: likewise, each image passing over its own patches; needs two images.
    - `batch_any`: any patch at any place, its own and twice the same included.

    Patches outside `kept` (P, B, N) are passed over; a pair that keeps none, which has no loss either, gets any.
    With several processes the pool is that of all their images, in their order; each gets the references of its own.
    """
    own = slice(collectives.rank() * teacher.shape[1], (collectives.rank() + 1) * teacher.shape[1])
    teacher, kept = collectives.gather(teacher, 1), None if kept is None else collectives.gather(kept, 1)
    pairs, images, patches, _ = teacher.shape
    device, pool = teacher.device, torch.arange(pairs, device=teacher.device)[:, None]
    order = permutations(seed, step, pairs, images * patches, device)
    if kept is None and source == "batch" and count <= patches:  # nothing to pass over: no sorting
        return teacher.flatten(1, 2)[pool, order[:, : images * count]].unflatten(1, (images, count))[:, own]
    allowed = torch.ones_like(order, dtype=torch.bool) if kept is None else kept.flatten(1).gather(1, order)
    if source == "batch_other":
        others = order[:, None] // patches != torch.arange(images, device=device)[:, None]
        order, allowed = order[:, None].expand_as(others), allowed[:, None] & others
        places = torch.arange(images * count, device=device).view(images, count)
    elif source == "batch_any":
        free = np.stack([_generator(seed, step, ANY, pair).random(images * count) for pair in range(pairs)])
        places = collectives.send(torch.from_numpy(free), device) * allowed.sum(1, keepdim=True)
    else:
        places = torch.arange(images * count, device=device)
    index = _pick(order, allowed, places.long()).view(pairs, images * count)
    return teacher.flatten(1, 2)[pool, index].unflatten(1, (images, count))[:, own]


def _generator(seed: int, step: int, use: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, use, number]))


def _pick(order: Tensor, allowed: Tensor, places: Tensor) -> Tensor:
    """The allowed entries of each row of `order` (..., M), at `places` (..., k), going round after the last."""
    first = (~allowed).to(torch.uint8).argsort(dim=-1, stable=True)  # no waiting for how many there are
    places = places % allowed.sum(-1, keepdim=True).clamp(min=1)
    return order.gather(-1, first.gather(-1, places.expand(*order.shape[:-1], -1)))


def check_queue(queue_size: int, batch_size: int, references: int) -> None:
    """Raise NecoError for a queue that never holds the references of one step."""
    if queue_size < (draw := batch_size * references):
        raise NecoError(
            f"loss.queue_size={queue_size} is below one draw of references: a batch of {batch_size} images x "
            f"{references} references needs {draw}; raise it, lower the batch size or take loss.references=batch"
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

    def forward(
        self,
        maps: Tensor,
        teacher: Tensor,
        seed: int,
        step: int,
        count: int | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Push patches of the raw teacher maps (G, B, h, w, D), then draw the references (P, B, count, D) of all pairs.

        Each view pushes 10 B random patches (at most its size); each pair draws B * count of its global view's vectors
        without replacement. While the queue holds fewer than that, the references are those of the batch, dealt from
        the aligned patches `teacher` (P, B, N, D).

        With several processes there is one queue, the same in each: fed by the images of all, drawn from for all.

        Args:
            count: references an image; None = N.
            kept: masks (G, B, h, w) of `maps` and (P, B, N) of `teacher`: other patches are neither pushed nor dealt.
                A view without any pushes all kinds.
        """
        patches, count = maps.flatten(1, 3), count or teacher.shape[2]
        views, local = patches.shape[:2]
        world, first = collectives.world(), collectives.rank() * local
        pushed = min(PUSHED_PER_IMAGE * maps.shape[1] * world, self.vectors.shape[1], local * world)
        order = draws(seed, step, PUSH, views, local * world, local * world if kept else pushed)
        order = collectives.send(order, maps.device)
        if kept:
            mask = collectives.gather(kept[0].flatten(1), 1).gather(1, order)
            order = _pick(order, mask | ~mask.any(1, keepdim=True), torch.arange(pushed, device=maps.device))
        mine = (order >= first) & (order < first + local)  # each process supplies its own patches, and else zeros
        vectors = _take(patches, (order - first).clamp(0, local - 1)) * mine[..., None]
        self.push(collectives.total(vectors))
        pairs, needed = len(teacher), teacher.shape[1] * count
        if self.filled < needed * world:
            return from_batch("batch", teacher, count, seed, step, kept and kept[1])
        drawn = draws(seed, step, DRAW, pairs, self.filled, needed * world)
        drawn = drawn[:, collectives.rank() * needed : (collectives.rank() + 1) * needed].reshape(views, -1)
        return _take(self.vectors, drawn).to(teacher.dtype).view(*teacher.shape[:2], count, -1)


def _take(vectors: Tensor, indices: Tensor) -> Tensor:
    """vectors (G, m, D), indices (G, k) -> (G, k, D)."""
    indices = collectives.send(indices, vectors.device)
    return vectors[torch.arange(len(vectors), device=vectors.device)[:, None], indices]
