"""Relaxed sorting networks: values to soft permutations, and the cross-entropy between two of those with its gradient.

Petersen et al., "Monotonic differentiable sorting networks" (ICLR 2022). A comparator on wires a and b replaces their
values x_a, x_b by `alpha x_a + (1 - alpha) x_b` and `(1 - alpha) x_a + alpha x_b` with alpha = alpha(s (x_b - x_a)),
s the steepness, and mixes the two columns of the permutation matrix P with the same weights. P starts as the identity;
P[i, j] is the share of item i at rank j, ascending; its rows and columns sum to one.

Shapes: R rows (vectors to sort), n values of a row = wires of the network = items = ranks.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neco.loss.relaxation import CAUCHY, Relaxation
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
Network = Literal["bitonic", "odd_even"]
Engine = Literal["auto", "torch", "triton"]
# Rows at a time: few enough for the cache of a core, on a GPU many enough to hide the launches; either within a bound.
CPU_ROWS, CUDA_ROWS, MAX_BYTES = 128, 1 << 14, 1 << 29
TRITON_VALUES = 256  # at most; beyond that a program of the Triton engine runs out of registers
MAX_WORKERS = 4  # Python's lock lets no more threads of small operations run side by side


class Comparators(NamedTuple):
    """Comparators that act at once on regularly spaced wires.

    They compare wire a = wire + block * wire_step + run * 2 * reach + 0..width - 1 with wire b = a + reach. Of P only
    `items` rows, from item + block * item_step on, can be non-zero on a block's wires: the others are skipped. A range
    that leaves 0..n - 1 falls on a margin of zeros.
    """

    wire: int
    reach: int
    width: int
    runs: int
    blocks: int
    wire_step: int
    item: int
    items: int
    item_step: int
    signs: tuple[int, ...]  # of each block: +1 ascending, -1 descending

    @property
    def size(self) -> int:
        return self.blocks * self.runs * self.width

    def sides(self, wires: Tensor, margin: int | None = None) -> tuple[Tensor, Tensor]:
        """The two sides (blocks, runs, width, items, R), views of wires (n, margin + n + margin, R).

        Without a margin, wires is (n, 1, R) and `items` is 1.
        """
        by_wire, by_item, by_row = wires.stride()
        items, item, by_item = (1, 0, 0) if margin is None else (self.items, self.item + margin, by_item)
        by_block = self.wire_step * by_wire + self.item_step * by_item
        size = (self.blocks, self.runs, self.width, items, wires.shape[2])
        stride = (by_block, 2 * self.reach * by_wire, by_wire, by_item, by_row)
        start = wires.storage_offset() + self.wire * by_wire + item * by_item
        return wires.as_strided(size, stride, start), wires.as_strided(size, stride, start + self.reach * by_wire)


@lru_cache
def comparators(network: Network, n: int) -> tuple[Comparators, ...]:
    """The network for n values, in the order of execution.

    `odd_even`: n layers of neighbours. `bitonic`: the network for N = 2^m >= n wires without its first N - n wires and
    every comparator that touches them, which is how PyPI `diffsort` reads "any n".
    """
    if network not in get_args(Network):
        raise NecoError(f"sorting network {network!r} does not exist; choose one of {', '.join(get_args(Network))}")
    if n < 2:
        raise NecoError(f"a sorting network needs at least 2 values, got n = {n}")
    blocks: list[Comparators] = []
    if network == "odd_even":
        for layer in range(n):
            start, items = layer % 2, min(2 * layer + 2, n)
            step = 2 if items < n else 0  # an item spreads by one wire per layer: a band along the diagonal, until full
            count = (n - start) // 2
            blocks.append(Comparators(start, 1, 1, 1, count, 2, step and start - layer, items, step, (1,) * count))
        return tuple(block for block in blocks if block.size)
    absent = (1 << (n - 1).bit_length()) - n
    for stage in range((n - 1).bit_length()):
        size = 2 << stage  # a stage sorts groups of this many wires: P is block diagonal after it
        top = -absent % size  # wires of the first group where that is incomplete
        for reach in (1 << bit for bit in range(stage, -1, -1)):
            part, sign = -absent % (2 * reach), (-1) ** (absent // size)
            if part > reach:
                blocks.append(Comparators(0, reach, part - reach, 1, 1, 0, 0, top, 0, (sign,)))
            if top > part:
                runs = (top - part) // (2 * reach)
                blocks.append(Comparators(part, reach, reach, runs, 1, 0, 0, top, 0, (sign,)))
            if n > top:
                count, first = (n - top) // size, (absent + top) // size
                signs = tuple((-1) ** (first + group) for group in range(count))
                runs = size // (2 * reach)
                blocks.append(Comparators(top, reach, reach, runs, count, size, top, size, size, signs))
    return tuple(blocks)


def soft_sort(
    x: Tensor, network: Network = "bitonic", steepness: float | None = None, relaxation: Relaxation = CAUCHY
) -> tuple[Tensor, Tensor]:
    """Sort x (..., n) softly, ascending -> (sorted values (..., n), permutations P (..., n, n)), differentiable.

    P[..., i, j] is the share of item i at rank j, and `sorted = x P`. Half-precision input is computed in float32.
    This is the plain form, for use and for tests; training uses `sort_cross_entropy`.
    """
    n = x.shape[-1]
    steepness = relaxation.steepness if steepness is None else steepness
    rows = at_least_float32(x).reshape(-1, n)
    wires = torch.arange(n, device=x.device)
    identity = torch.eye(n, device=x.device, dtype=rows.dtype)[:, :, None].expand(n, n, len(rows))
    state = torch.cat([rows.t()[:, None], identity], 1)  # (n wires, value and n items, R)
    for block in comparators(network, n):
        a, b = (side.flatten() for side in block.sides(wires[:, None, None]))
        sign = torch.tensor(block.signs, device=x.device).repeat_interleave(block.size // block.blocks)
        low, high = state[a], state[b]
        v = (high - low)[:, :1] * (steepness * sign[:, None, None])
        share, rest = relaxation.share(v, steepness), relaxation.share(-v, steepness)
        state = state.index_copy(0, a, rest * low + share * high).index_copy(0, b, share * low + rest * high)
    values, items = state[:, 0], state[:, 1:]
    return values.t().reshape(x.shape), items.permute(2, 1, 0).reshape(*x.shape, n)


def sort_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    network: Network = "bitonic",
    student_steepness: float | None = None,
    teacher_steepness: float | None = None,
    relaxation: Relaxation = CAUCHY,
    engine: Engine = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy between the soft permutations of student (R, n) and teacher (R, n), row by row.

    Returns loss (R,), the mean over items i of -sum_j Q[i, j] log P[i, j], and entropy (R,), the same with log Q, where
    P sorts the student's row and Q the teacher's. Only the student gets a gradient, and only from the loss.

    Computed in float32 for float32 and half-precision input, in float64 for float64. Shares of P below the smallest
    normal number count as that number, with zero gradient. Beyond the steepness up to which float32 holds them all
    (`relaxation.float32`: odd_even multiplies n times, some tails are exponential) it is computed in float64.

    The gradient is computed in the forward pass, a chunk of rows at a time, so memory grows neither with the layers nor
    (but for the result) with the rows. The engine `auto` is triton on CUDA unless `triton_refusal` says why not.

    Raises NecoError if the shapes differ or `engine` is triton and that is refused.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise NecoError(f"student and teacher must both be (R, n), got {(*student.shape,)} and {(*teacher.shape,)}")
    student = at_least_float32(student)
    steepness = [relaxation.steepness if s is None else s for s in (student_steepness, teacher_steepness)]
    dtype = student.dtype if fits_float32(network, steepness[0], relaxation) else torch.float64
    sort = choose_engine(engine, network, student.shape[1], steepness[0], relaxation, student.device, student.dtype)
    x, y = (v.detach().to(dtype) * s for v, s in zip((student, teacher), steepness, strict=True))
    if torch.is_grad_enabled() and student.requires_grad:
        return _SortCrossEntropy.apply(student, x, y, network, relaxation, steepness, sort)
    loss, entropy = sort(x, y, network, relaxation, steepness, None)
    return loss.to(student), entropy.to(student)


def fits_float32(network: Network, steepness: float, relaxation: Relaxation) -> bool:
    return steepness <= relaxation.float32.get(network, math.inf)


def choose_engine(
    engine: Engine,
    network: Network,
    n: int,
    steepness: float,
    relaxation: Relaxation,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function, like `_sort_cross_entropy`, that sorts n values; `steepness` is the student's.

    Raises NecoError if `engine` is triton and cannot do it.
    """
    if engine == "torch" or (engine == "auto" and device.type != "cuda"):
        return _sort_cross_entropy
    if refusal := triton_refusal(network, n, steepness, relaxation, device, dtype):
        if engine == "triton":
            raise NecoError(f"engine=triton: {refusal}; engine=auto takes torch for that")
        return _sort_cross_entropy
    from neco.loss import sorting_triton

    return sorting_triton.sort_cross_entropy


def triton_refusal(
    network: Network, n: int, steepness: float, relaxation: Relaxation, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why the Triton engine cannot do it, if it cannot."""
    if relaxation.light:
        return "it has cauchy, reciprocal and optimal, no relaxation with exponential tails"
    if not 1 < n <= TRITON_VALUES:
        return f"it sorts from 2 up to {TRITON_VALUES} values, not n = {n}"
    if dtype == torch.float64 or not fits_float32(network, steepness, relaxation):
        return f"it computes in float32, which {network} at steepness {steepness:g} in {dtype} does not"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a GPU, and this is {device.type} (TRITON_INTERPRET=1 tries it on the CPU, slowly)"
    return _triton_broken(device)


@lru_cache
def _triton_broken(device: torch.device) -> str | None:
    """Why it cannot be used on this device: it is tried once, beside torch."""
    try:
        from neco.loss import sorting_triton

        generator = torch.Generator().manual_seed(0)
        x, y = (100 * torch.rand(2, 8, 16, generator=generator)).to(device)
        found = []
        for sort in (_sort_cross_entropy, sorting_triton.sort_cross_entropy):
            gradient = torch.empty_like(x)
            found.append(torch.cat([*sort(x, y, "bitonic", CAUCHY, (100, 100), gradient), gradient.flatten()]))
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    except Exception as error:  # no Triton, no C compiler, no Python.h, an old driver: each raises something else
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        log.warning("no sorting by Triton on %s, torch does it: %s", device, why)
        return f"Triton does not work here ({why})"
    return None


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 if it is of half precision: sorting in less leaves rows that sum to 1.03 and exact zeros."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _SortCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, x, y, network, relaxation, steepness, sort):  # type: ignore[override]
        gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
        loss, entropy = sort(x, y, network, relaxation, steepness, gradient)
        ctx.save_for_backward(gradient.mul_(steepness[0]).to(student))
        loss, entropy = loss.to(student), entropy.to(student)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, loss, entropy):  # type: ignore[override]
        return ctx.saved_tensors[0] * loss[:, None], None, None, None, None, None, None


def _sort_cross_entropy(
    x: Tensor,
    y: Tensor,
    network: Network,
    relaxation: Relaxation,
    steepness: Sequence[float],
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss and entropy (R,) of x, y (R, n), each times its steepness; fills `gradient` (R, n) = d loss / d x if given.

    An engine is a function with this signature.
    """
    rows, n = x.shape
    loss, entropy = x.new_empty(2, rows)
    row_bytes = x.element_size() * sum(block.size * block.items for block in comparators(network, n))
    chunk = min(CUDA_ROWS if x.is_cuda else CPU_ROWS, MAX_BYTES // row_bytes, rows)
    chunk = max(1, -(-chunk // 32)) * 32  # whole vector registers

    def work(starts: range) -> None:
        with torch.inference_mode(x.is_inference()):  # a mode belongs to its thread
            sorter = _Sorter(network, relaxation, steepness, n, chunk, x)
            for start in starts:
                part = slice(start, start + chunk)
                sorter(x[part], y[part], loss[part], entropy[part], None if gradient is None else gradient[part])

    if x.is_cuda:
        work(range(0, rows, chunk))
        return loss, entropy
    # A thread for every other chunk and none inside the many small operations: a barrier at each costs more than it
    # gives, and on a busy machine (data workers) it waits for the scheduler: seconds instead of milliseconds.
    threads = torch.get_num_threads()
    workers = max(1, min(threads, MAX_WORKERS, -(-rows // chunk)))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, (range(worker * chunk, rows, workers * chunk) for worker in range(workers))))
    finally:
        torch.set_num_threads(threads)  # part of that setting is the process's
    return loss, entropy


class _Block(NamedTuple):
    """One `Comparators` as views into the buffers of a `_Sorter`: pairs are its two sides."""

    values: tuple[Tensor, Tensor]
    student: tuple[Tensor, Tensor]
    teacher: tuple[Tensor, Tensor]
    grad: tuple[Tensor, Tensor]
    sign: Tensor
    gap: Tensor
    share: Tensor
    shares_student: tuple[Tensor, ...]  # the share and, of light relaxations, what it leaves of 1
    shares_teacher: tuple[Tensor, ...]
    stored: Tensor
    scratch: Tensor
    grad_share: Tensor
    mix: Tensor
    push: Tensor


class _Sorter:
    """Buffers for R rows, wires first and rows last so that every operation runs along contiguous rows, in place."""

    def __init__(
        self, network: Network, relaxation: Relaxation, steepness: Sequence[float], n: int, rows: int, like: Tensor
    ) -> None:
        self.relaxation = relaxation
        self.steepness = torch.cat([like.new_full((rows,), value) for value in steepness])
        plan = comparators(network, n)
        margin = max(0, *(max(-b.item, b.item + (b.blocks - 1) * b.item_step + b.items - n) for b in plan))
        total, stored = sum(b.size for b in plan), sum(b.size * b.items for b in plan)
        self.values = like.new_empty(n, 1, 2 * rows)  # student's rows, then teacher's
        padded = like.new_zeros(2, n, n + 2 * margin, rows)
        self.student, self.teacher = padded[:, :, margin : margin + n]
        signs = torch.tensor([-sign for b in plan for sign in b.signs for _ in range(b.size // b.blocks)])
        self.sign = signs.to(like, non_blocking=True)[:, None]  # v = sign (a - b)
        self.gap, *self.shares = like.new_empty(3 if relaxation.light else 2, total, 2 * rows)
        self.mix, self.push, self.grad_share = like.new_empty(3, total, rows)
        differences = like.new_empty(stored, rows)
        scratch = like.new_empty(max(b.size * b.items for b in plan), rows)
        self.blocks, at, kept = [], 0, 0
        for b in plan:
            one, every = (b.blocks, b.runs, b.width, 1, -1), (b.blocks, b.runs, b.width, b.items, rows)
            part, size = slice(at, at + b.size), b.size * b.items
            shares = [share[part].view(one) for share in self.shares]
            self.blocks.append(
                _Block(
                    values=b.sides(self.values),
                    student=b.sides(padded[0], margin),
                    teacher=b.sides(padded[1], margin),
                    grad=b.sides(self.values[..., :rows]),
                    sign=self.sign[part].view(one),
                    gap=self.gap[part].view(one),
                    share=shares[0],
                    shares_student=tuple(share[..., :rows] for share in shares),
                    shares_teacher=tuple(share[..., rows:] for share in shares),
                    stored=differences[kept : kept + size].view(every),
                    scratch=scratch[:size].view(every),
                    grad_share=self.grad_share[part].view(b.blocks, b.runs, b.width, rows),
                    mix=self.mix[part].view(one),
                    push=self.push[part].view(one),
                )
            )
            at, kept = at + b.size, kept + size

    def __call__(self, x: Tensor, y: Tensor, loss: Tensor, entropy: Tensor, gradient: Tensor | None) -> None:
        """Sort x and y (r, n), r <= R; write loss and entropy (r,) and gradient (r, n)."""
        r, n = x.shape
        rows = self.values.shape[2] // 2
        self.values.zero_()
        self.values[:, 0, :r], self.values[:, 0, rows : rows + r] = x.t(), y.t()
        for b in self.blocks:
            torch.sub(*b.values, out=b.gap)
            self.relaxation.share(b.gap * b.sign, self.steepness, out=b.share)
            _exchange(b.values, (b.share,), b.gap, b.gap)
        for rest in self.shares[1:]:
            self.relaxation.share(self.gap * -self.sign, self.steepness, out=rest)
        for matrix in self.student, self.teacher:
            matrix.zero_().diagonal().fill_(1)
        for b in self.blocks:
            torch.sub(*b.teacher, out=b.scratch)
            _exchange(b.teacher, b.shares_teacher, b.scratch, b.scratch)
        for b in self.blocks:
            torch.sub(*b.student, out=b.stored)
            _exchange(b.student, b.shares_student, b.stored, b.scratch)

        p, q, tiny = self.student, self.teacher, torch.finfo(x.dtype).tiny
        loss.copy_(p.clamp_min_(tiny).log().mul_(q).sum((0, 1))[:r].div_(-n))
        entropy.copy_(torch.special.xlogy(q, q).sum((0, 1))[:r].div_(-n))
        if gradient is None:
            return
        lost = p <= tiny
        torch.div(q, p, out=p).masked_fill_(lost, 0)  # -n dloss/dP, in P's place
        for b in reversed(self.blocks):  # a layer is symmetric: its transpose is itself
            torch.sub(*b.student, out=b.scratch)
            torch.sum(b.stored.mul_(b.scratch), 3, out=b.grad_share)  # -dloss/dshare
            _exchange(b.student, b.shares_student, b.scratch, b.scratch)
        # share(gap) gap leaves side a for side b; what depends on the gap, for all comparators at once
        gap, share = self.gap[:, :rows], self.shares[0][:, :rows]
        slope = self.relaxation.slope(gap * self.sign, self.steepness[:rows]).mul_(self.sign)
        torch.addcmul(share, gap, slope, out=self.mix)
        torch.mul(self.grad_share, slope, out=self.push)
        self.values.zero_()
        for b in reversed(self.blocks):
            flow = torch.addcmul(b.push, b.mix, b.grad[0] - b.grad[1])
            b.grad[0].sub_(flow)
            b.grad[1].add_(flow)
        gradient.copy_(self.values[:, 0, :r].t().div(-n))


def _exchange(sides: tuple[Tensor, Tensor], shares: tuple[Tensor, ...], difference: Tensor, scratch: Tensor) -> None:
    """Move a share of the difference a - b from side a to side b, in place. Shares at most 1 leave nothing negative.

    Where 1 - share comes with its own relative precision the result keeps that, and overwrites `scratch`.
    """
    a, b = sides
    share, *rest = shares
    if not rest:
        a.addcmul_(share, difference, value=-1)
        b.addcmul_(share, difference)
    else:
        torch.mul(a, share, out=scratch)
        a.mul_(rest[0]).addcmul_(b, share)
        b.mul_(rest[0]).add_(scratch)
