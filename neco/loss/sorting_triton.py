"""The engine `triton` of `neco.loss.sorting`: both sorts, the cross-entropy and its gradient in one kernel.

A program takes rows in turn. Of a row it first sorts the values, which gives every comparator's share; then, BLOCK
items at a time, it carries their rows of Q and of P through the network, keeps what the student's layers received, and
comes back with the gradient to the shares; at last it carries that back to the values. What it keeps it writes over
with its next row: memory does not grow with the rows, but for the result. A program is one warp, above 128 values two,
so threads hardly wait for each other; sums have one order, so results repeat bit by bit.

Bitonic: after stage b an item has spread over 2^(b+1) wires, and only those are carried. Comparators of wires w and
w + reach are found by a sum over an axis of two, which a warp does in registers or with one shuffle. Odd-even: even and
odd wires are two tensors, and one of them shifts for every second layer.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from neco.loss.relaxation import EPS, Relaxation

OFFSET = tl.constexpr(EPS)
RESIDENT = 12  # programs at once on a multiprocessor, as far as their registers let them


@lru_cache
def layers(network: str, n: int, device: torch.device) -> Tensor:
    """The network as a table (2, layers, wires), wires a power of two: each wire's partner and the direction.

    The direction is 1 ascending, -1 descending, 0 where a wire has no partner. The first wires of bitonic are absent,
    as in `neco.loss.sorting.comparators`, and the last ones of odd_even, whose layers are filled up to an even number.
    """
    size = 1 << (n - 1).bit_length()
    wire = torch.arange(size)
    if network == "bitonic":
        steps = [(stage, reach) for stage in range(size.bit_length() - 1) for reach in range(stage, -1, -1)]
        partner = torch.stack([wire ^ (1 << reach) for _, reach in steps])
        sign = torch.stack([1 - 2 * (wire >> (stage + 1) & 1) for stage, _ in steps])
        absent = wire < size - n
    else:
        odd = torch.arange(n + n % 2)[:, None] % 2
        partner = ((wire + odd) ^ 1) - odd
        partner = torch.where((partner < 0) | (partner >= size), wire, partner)
        sign = torch.ones_like(partner)
        sign[n:] = 0
        absent = wire >= n
    sign = torch.where(absent | absent[partner] | (partner == wire), 0, sign)
    return torch.stack([partner, sign]).to(device, torch.int32)


def sort_cross_entropy(
    x: Tensor,
    y: Tensor,
    network: str,
    relaxation: Relaxation,
    steepness: Sequence[float],
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `neco.loss.sorting._sort_cross_entropy`; x, y float32, gradient contiguous, relaxation not light."""
    rows, n = x.shape
    loss, entropy = torch.empty_like(x[:, 0]), torch.empty_like(y[:, 0])
    if not rows:
        return loss, entropy
    size = sizes(network, n)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(rows, processors * min(RESIDENT, 1024 // size["WIRES"]))
    scratch = x.new_empty(programs, 5 * size["DEPTH"] * size["WIRES"] + size["KEPT"])
    with torch.cuda.device_of(x):
        _kernel[(programs,)](
            x.contiguous(),
            y.contiguous(),
            loss,
            entropy,
            loss if gradient is None else gradient,
            layers(network, n, x.device),
            scratch,
            rows,
            **size,
            RELAXATION=relaxation.share.__name__,
            GRADIENT=gradient is not None,
        )
    return loss, entropy


def sizes(network: str, n: int) -> dict[str, int]:
    """What the kernel is compiled for: DEPTH layers, BLOCK items at a time, which leave KEPT numbers behind."""
    stages = (n - 1).bit_length()
    # as many as the registers of so many warps hold, and their programs' scratch the second cache: docs/log.md
    block = min(4 if network == "bitonic" and n <= 64 else 8, 1 << stages)
    if network == "bitonic":
        depth = stages * (stages + 1) // 2
        kept = block * sum((stage + 1) * max(block, 2 << stage) for stage in range(stages))
    else:
        depth = n + n % 2
        kept = block * depth * (1 << stages) // 2
    return {
        "n": n,
        "WIRES": 1 << stages,
        "STAGES": stages,
        "DEPTH": depth,
        "BLOCK": block,
        "KEPT": kept,
        "BITONIC": network == "bitonic",
        "num_warps": 2 if n > 128 else 1,
    }


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x,
    y,
    loss,
    entropy,
    gradient,
    table,
    scratch,
    rows,
    n: tl.constexpr,
    WIRES: tl.constexpr,
    STAGES: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    BITONIC: tl.constexpr,
    RELAXATION: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    LAYERS: tl.constexpr = DEPTH * WIRES
    FIRST: tl.constexpr = WIRES - n if BITONIC else 0
    TINY: tl.constexpr = 1.1754943508222875e-38
    # Shares of teacher and student, then of the student d flow / d gap, d share / d gap, - d loss / d share; each
    # (DEPTH, WIRES); then what layers received.
    share = scratch + tl.program_id(0).to(tl.int64) * (5 * LAYERS + KEPT)
    mix, slope, push, kept = share + 2 * LAYERS, share + 3 * LAYERS, share + 4 * LAYERS, share + 5 * LAYERS
    wire = tl.arange(0, WIRES)
    real = (wire >= FIRST) & (wire < FIRST + n)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * n + wire - FIRST
        for side in range(2):
            value = tl.load((y if side == 0 else x) + at, mask=real, other=0.0)
            for layer in range(DEPTH):
                here = layer * WIRES + wire
                partner = tl.load(table + here)
                sign = tl.load(table + LAYERS + here).to(tl.float32)
                gap = value - tl.gather(value, partner, 0)
                low = tl.where(wire < partner, 1.0, -1.0)
                moved, rate = _relaxed(-sign * low * gap, RELAXATION)
                moved *= tl.abs(sign)
                tl.store(share + side * LAYERS + here, low * moved)
                if GRADIENT:
                    rate *= -sign
                    tl.store(mix + here, moved + low * gap * rate)
                    tl.store(slope + here, low * rate)
                    tl.store(push + here, tl.zeros([WIRES], tl.float32))
                value -= moved * gap
        tl.debug_barrier()  # what other threads wrote

        row_loss, row_entropy = 0.0, 0.0
        for start in range(FIRST // BLOCK * BLOCK, FIRST + n, BLOCK):
            # Two tensors: of two names for one, Triton would not carry the second from turn to turn.
            p, q = tl.zeros([BLOCK, WIRES], tl.float32), tl.zeros([BLOCK, WIRES], tl.float32)
            for side in range(2):
                q = p
                save = GRADIENT and side == 1
                if BITONIC:
                    p = _bitonic(share + side * LAYERS, kept, save, start, STAGES, BLOCK)
                else:
                    p = _odd_even(share + side * LAYERS, kept, save, start, WIRES, DEPTH, BLOCK)
            item = start + tl.arange(0, BLOCK)[:, None]
            q = tl.where((item >= FIRST) & (item < FIRST + n) & real[None, :], q, 0.0)
            held = tl.maximum(p, TINY, propagate_nan=tl.PropagateNan.ALL)  # a network that diverges has to show
            row_loss -= tl.sum(q * tl.log(held))
            row_entropy -= tl.sum(q * tl.log(tl.maximum(q, TINY)))
            if GRADIENT:
                grad = tl.where(p <= TINY, 0.0, -q / held)
                tl.debug_barrier()
                if BITONIC:
                    _bitonic_back(grad, share + 2 * LAYERS, push + LAYERS, kept + KEPT, start, STAGES, BLOCK)
                else:
                    _odd_even_back(grad, share + LAYERS, push, kept, WIRES, DEPTH, BLOCK)
                tl.debug_barrier()
        tl.store(loss + row, row_loss / n)
        tl.store(entropy + row, row_entropy / n)

        if GRADIENT:
            grad = tl.zeros([WIRES], tl.float32)
            for back in range(DEPTH):
                layer = (DEPTH - 1 - back) * WIRES
                partner = tl.load(table + layer + wire)
                flow = tl.load(mix + layer + wire) * (grad - tl.gather(grad, partner, 0))
                pushed = tl.load(push + layer + tl.minimum(wire, partner))
                grad -= flow + tl.load(slope + layer + wire) * pushed
            tl.store(gradient + at, grad / n, mask=real)
        tl.debug_barrier()


@triton.jit
def _relaxed(v, RELAXATION: tl.constexpr):
    """Share and slope, as in `neco.loss.relaxation`; also small shares keep their relative precision."""
    size = tl.abs(v)
    if RELAXATION == "cauchy":
        far = size > 1.0
        t = tl.where(far, 1.0 / tl.maximum(size, 1.0), size)
        s = t * t  # atan by a minimax polynomial on 0..1
        a = 0.0028662257
        a = a * s - 0.0161657367
        a = a * s + 0.0429096138
        a = a * s - 0.0752896400
        a = a * s + 0.1065626393
        a = a * s - 0.1420889944
        a = a * s + 0.1999355085
        a = a * s - 0.3333314528
        angle = (t + t * s * a) * 0.3183098861837907
        tail = tl.where(far, angle, 0.5 - angle)
        slope = -0.3183098861837907 / (1.0 + v * v)
    elif RELAXATION == "reciprocal":
        tail = 1.0 / (2.0 + size)
        slope = -tail * tail
    else:
        tl.static_assert(RELAXATION == "optimal")
        far = size > 0.25
        inverse = 1.0 / (tl.maximum(size, 0.25) + OFFSET)
        tail = tl.where(far, 0.0625 * inverse, 0.5 - size)
        slope = tl.where(far, -0.0625 * inverse * inverse, -1.0)
    return tl.where(v > 0, tail, 1.0 - tail), slope


@triton.jit
def _gap(x, ROWS: tl.constexpr, WIRES: tl.constexpr, REACH: tl.constexpr):
    """x[:, low] - x[:, high] of each comparator, at both of its wires."""
    low = (1 - 2 * (tl.arange(0, WIRES) // REACH % 2)).to(tl.float32)
    pairs = tl.reshape(x * low[None, :], [ROWS, WIRES // (2 * REACH), 2, REACH])
    gap = tl.broadcast_to(tl.sum(pairs, axis=2, keep_dims=True), [ROWS, WIRES // (2 * REACH), 2, REACH])
    return tl.reshape(gap, [ROWS, WIRES])


@triton.jit
def _bitonic(share, kept, save, start, STAGES: tl.constexpr, BLOCK: tl.constexpr):
    """P (BLOCK, 2^STAGES) of the items from `start` on; keeps what each layer received if `save`."""
    p = tl.where(tl.arange(0, BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :], 1.0, 0.0)
    for stage in tl.static_range(STAGES):
        if 2 << stage > BLOCK:
            half = tl.arange(0, 2)[None, :, None] == (start >> stage & 1)
            p = tl.reshape(tl.where(half, p[:, None, :], 0.0), [BLOCK, 2 << stage])
        for step in tl.static_range(stage + 1):
            p = _bitonic_layer(p, share, kept, save, start, max(BLOCK, 2 << stage), 1 << (stage - step), BLOCK)
            share += 1 << STAGES
            kept += BLOCK * max(BLOCK, 2 << stage)
    return p


@triton.jit
def _bitonic_layer(p, share, kept, save, start, SPREAD: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr):
    wire = tl.arange(0, SPREAD)
    here = kept + tl.arange(0, BLOCK)[:, None] * SPREAD + wire[None, :]
    tl.store(here, p, mask=tl.full([BLOCK, SPREAD], save, tl.int1))
    moved = tl.load(share + (start & -SPREAD) + wire)
    return p - moved[None, :] * _gap(p, BLOCK, SPREAD, REACH)


@triton.jit
def _bitonic_back(grad, share, push, kept, start, STAGES: tl.constexpr, BLOCK: tl.constexpr):
    """Add to `push` of each comparator what the gradient to P says; the pointers are one past the last layer's."""
    for back in tl.static_range(STAGES):
        for step in tl.static_range(STAGES - back):
            share -= 1 << STAGES
            push -= 1 << STAGES
            kept -= BLOCK * max(BLOCK, 1 << (STAGES - back))
            grad = _bitonic_layer_back(
                grad, share, push, kept, start, max(BLOCK, 1 << (STAGES - back)), 1 << step, BLOCK
            )
        if 1 << (STAGES - back) > BLOCK:
            half = tl.arange(0, 2)[None, :, None] == (start >> (STAGES - 1 - back) & 1)
            halves = tl.reshape(grad, [BLOCK, 2, 1 << (STAGES - 1 - back)])
            grad = tl.sum(tl.where(half, halves, 0.0), axis=1)


@triton.jit
def _bitonic_layer_back(grad, share, push, kept, start, SPREAD: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient to what the layer received: a layer is its own transpose."""
    wire = tl.arange(0, SPREAD)
    p = tl.load(kept + tl.arange(0, BLOCK)[:, None] * SPREAD + wire[None, :])
    change = _gap(grad, BLOCK, SPREAD, REACH)
    here = push + (start & -SPREAD) + wire
    tl.store(here, tl.load(here) + tl.sum(_gap(p, BLOCK, SPREAD, REACH) * change, axis=0))
    moved = tl.load(share + (start & -SPREAD) + wire)
    return grad - moved[None, :] * change


@triton.jit
def _shifted(x, BY: tl.constexpr, ROWS: tl.constexpr, WIRES: tl.constexpr):
    """x[:, wire + BY]; at the end the nearest."""
    wire = tl.minimum(tl.maximum(tl.arange(0, WIRES) + BY, 0), WIRES - 1)
    return tl.gather(x, tl.broadcast_to(wire[None, :], [ROWS, WIRES]), 1)


@triton.jit
def _odd_even(share, kept, save, start, WIRES: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """As `_bitonic`; keeps the differences instead."""
    pair = tl.arange(0, WIRES // 2)
    item = start + tl.arange(0, BLOCK)[:, None]
    here = kept + tl.arange(0, BLOCK)[:, None] * (WIRES // 2) + pair[None, :]
    wanted = tl.full([BLOCK, WIRES // 2], save, tl.int1)
    even = tl.where(item == 2 * pair[None, :], 1.0, 0.0)
    odd = tl.where(item == 2 * pair[None, :] + 1, 1.0, 0.0)
    for layer in range(0, DEPTH, 2):
        gap = even - odd
        tl.store(here + layer * (BLOCK * WIRES // 2), gap, mask=wanted)
        gap *= tl.load(share + layer * WIRES + 2 * pair)[None, :]
        even, odd = even - gap, odd + gap
        above = _shifted(even, 1, BLOCK, WIRES // 2)
        gap = odd - above
        tl.store(here + (layer + 1) * (BLOCK * WIRES // 2), gap, mask=wanted)
        gap *= tl.load(share + (layer + 1) * WIRES + 2 * pair + 1)[None, :]
        odd -= gap
        even = tl.where(pair[None, :] == 0, even, _shifted(above + gap, -1, BLOCK, WIRES // 2))
    return tl.reshape(tl.join(even, odd), [BLOCK, WIRES])


@triton.jit
def _odd_even_back(grad, share, push, kept, WIRES: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.arange(0, WIRES // 2)
    here = kept + tl.arange(0, BLOCK)[:, None] * (WIRES // 2) + pair[None, :]
    even, odd = tl.split(tl.reshape(grad, [BLOCK, WIRES // 2, 2]))
    for back in range(2, DEPTH + 1, 2):
        layer = DEPTH - back
        above = _shifted(even, 1, BLOCK, WIRES // 2)
        change = odd - above
        to = push + (layer + 1) * WIRES + 2 * pair + 1
        tl.store(to, tl.load(to) + tl.sum(tl.load(here + (layer + 1) * (BLOCK * WIRES // 2)) * change, axis=0))
        change *= tl.load(share + (layer + 1) * WIRES + 2 * pair + 1)[None, :]
        odd -= change
        even = tl.where(pair[None, :] == 0, even, _shifted(above + change, -1, BLOCK, WIRES // 2))
        change = even - odd
        to = push + layer * WIRES + 2 * pair
        tl.store(to, tl.load(to) + tl.sum(tl.load(here + layer * (BLOCK * WIRES // 2)) * change, axis=0))
        change *= tl.load(share + layer * WIRES + 2 * pair)[None, :]
        even, odd = even - change, odd + change
