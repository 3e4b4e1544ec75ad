"""References against plain lists: each patch dealt once, a first-in-first-out queue, exact resume."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neco.training.references import DEAL, PUSH, Queue, check_queue, deal, draws, from_batch, permutations
from neco.utils.errors import NecoError

P, G, B, N, D = 4, 2, 3, 4, 5


def teacher(step: int = 0) -> Tensor:
    return torch.randn(P, B, N, D, generator=torch.Generator().manual_seed(step))


def maps(step: int = 0) -> Tensor:
    return torch.randn(G, B, 4, 3, D, generator=torch.Generator().manual_seed(1000 + step))


def rows(x: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.reshape(-1, x.shape[-1]).tolist()}


def test_deal_uses_each_patch_of_the_pair_once() -> None:
    pool, order = teacher(), permutations(0, 7, P, B * N)
    references = deal(pool, order)
    for pair in range(P):
        flat = [pool[pair, image, patch] for image in range(B) for patch in range(N)]
        for place, source in enumerate(order[pair].tolist()):
            assert torch.equal(references[pair, place // N, place % N], flat[source])
        assert rows(references[pair]) == rows(pool[pair])


def test_deal_passes_gradients() -> None:
    pool = teacher().requires_grad_()
    deal(pool, permutations(0, 0, P, B * N)).sum().backward()
    assert torch.equal(pool.grad, torch.ones_like(pool))


def sources(pool: Tensor, references: Tensor) -> Tensor:
    """Which patch of the pair's pool each reference is, (P, B, n)."""
    flat = pool.flatten(1, 2)
    same = (references.flatten(1, 2)[:, :, None] == flat[:, None]).all(-1)
    assert (same.sum(-1) == 1).all()
    return same.int().argmax(-1).view(references.shape[:3])


MASK = torch.rand(P, B, N, generator=torch.Generator().manual_seed(5)) < 0.4
MASK[1] = False
MASK[1, 2, 1] = True  # a pair with a single patch


@pytest.mark.parametrize("count", (2, N, 3 * N + 1))
@pytest.mark.parametrize("kept", (None, MASK), ids=("all", "masked"))
@pytest.mark.parametrize("source", ("batch", "batch_other", "batch_any"))
def test_sources_of_references(source: str, kept: Tensor | None, count: int) -> None:
    pool = teacher()
    references = from_batch(source, pool, count, 0, 7, kept)
    assert references.shape == (P, B, count, D)
    if source == "batch_other" and kept is not None:  # the single patch of pair 1 is its own image's only choice
        references, pool, kept = (torch.cat([x[:1], x[2:]]) for x in (references, pool, kept))
    index = sources(pool, references)
    allowed = torch.ones(pool.shape[:3], dtype=torch.bool) if kept is None else kept
    assert allowed.flatten(1).gather(1, index.flatten(1)).all(), "masked patches supply none"
    for pair in range(len(pool)):
        uses = index[pair].flatten().bincount(minlength=B * N)[allowed[pair].flatten()]
        if source == "batch":
            assert uses.max() - uses.min() <= 1, "dealt evenly"
        elif source == "batch_other":
            for image in range(B):
                assert not (index[pair, image] // N == image).any()
                own = index[pair, image].bincount(minlength=B * N)
                others = allowed[pair].clone()
                others[image] = False
                assert own[others.flatten()].max() - own[others.flatten()].min() <= 1
    again = from_batch(source, teacher(), count, 0, 7, None if kept is None else MASK)
    assert torch.equal(again[0], references[0])
    assert not torch.equal(from_batch(source, teacher(), count, 0, 8)[0], references[0])


def test_any_patch_comes_equally_often() -> None:
    index = torch.stack([sources(teacher(), from_batch("batch_any", teacher(), N, 0, step)) for step in range(300)])
    share = index.flatten().bincount(minlength=B * N) / index.numel()
    assert (share - 1 / (B * N)).abs().max() < 0.01


def test_batch_is_the_published_deal() -> None:
    assert torch.equal(from_batch("batch", teacher(), N, 3, 4), deal(teacher(), permutations(3, 4, P, B * N)))
    everything = torch.ones(P, B, N, dtype=torch.bool)
    assert torch.equal(from_batch("batch", teacher(), N, 3, 4, everything), from_batch("batch", teacher(), N, 3, 4))


def test_queue_keeps_to_the_mask() -> None:
    queue, raw = Queue(40, G, D), maps()
    kept = torch.rand(raw.shape[:4], generator=torch.Generator().manual_seed(2)) < 0.3
    kept[1] = False  # a view without any: everything
    queue(raw, teacher(), 0, 0, 3, (kept, torch.ones(P, B, N, dtype=torch.bool)))
    assert rows(queue.vectors[0, : queue.filled]) <= rows(raw[0][kept[0]])
    assert rows(queue.vectors[1, : queue.filled]) <= rows(raw[1])
    assert queue(raw, teacher(), 0, 1, 3).shape == (P, B, 3, D)


def test_draws_depend_on_every_part_of_the_key() -> None:
    first = draws(1, 2, DEAL, 3, 50, 50)
    assert torch.equal(first.sort(1)[0], torch.arange(50).expand(3, 50))
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert torch.equal(first, draws(1, 2, DEAL, 3, 50, 50))
    assert torch.equal(first[:2], draws(1, 2, DEAL, 2, 50, 50))
    for other in (draws(0, 2, DEAL, 3, 50, 50), draws(1, 3, DEAL, 3, 50, 50), draws(1, 2, PUSH, 3, 50, 50)):
        assert (other != first).any(1).all()


@given(size=st.integers(1, 12), pushes=st.lists(st.integers(1, 12), max_size=8))
@settings(max_examples=50, deadline=None)
def test_queue_is_first_in_first_out(size: int, pushes: list[int]) -> None:
    queue, plain, clock = Queue(size, G, 1), deque(maxlen=size), 0
    for count in (min(push, size) for push in pushes):
        new = torch.arange(clock, clock + count) + 1.0
        clock += count
        queue.push(torch.stack([new, -new])[..., None])
        plain.extend(new.tolist())
        assert queue.filled == len(plain)
        for view, sign in enumerate((1, -1)):
            assert sorted((sign * queue.vectors[view, : queue.filled, 0]).tolist()) == sorted(plain)


def test_queue_draws_old_patches_of_the_right_view_without_replacement() -> None:
    queue, seen = Queue(size=40, views=G, dim=D), [set(), set()]
    for step in range(6):
        raw, aligned = maps(step), teacher(step)
        references = queue(raw, aligned, seed=0, step=step)
        for view in range(G):
            seen[view] |= rows(raw[view])
        assert queue.filled == min(40, 10 * B * (step + 1))
        for pair in range(P):
            assert len(rows(references[pair])) == B * N and rows(references[pair]) <= seen[pair // (P // G)]


def test_queue_pushes_ten_patches_an_image() -> None:
    queue = Queue(size=1000, views=G, dim=D)
    big = torch.randn(G, B, 9, 9, D)
    queue(big, teacher(), 0, 0)
    assert queue.filled == 10 * B and rows(queue.vectors[1, : 10 * B]) <= rows(big[1])
    small = Queue(size=20, views=G, dim=D)
    small(big, teacher(), 0, 0)
    assert small.filled == 20 and len(rows(small.vectors[0])) == 20


def test_short_queue_deals_from_the_batch() -> None:
    queue, aligned = Queue(size=100, views=G, dim=D), teacher().repeat(1, 4, 1, 1)
    references = queue(maps(), aligned, seed=3, step=5)
    assert queue.filled == 30 < 48 == aligned.shape[1] * N
    assert torch.equal(references, deal(aligned, permutations(3, 5, P, 48)))


def test_resume_is_exact() -> None:
    def run(queue: Queue, steps: range) -> list[Tensor]:
        return [queue(maps(step), teacher(step), seed=1, step=step) for step in steps]

    straight = Queue(30, G, D)
    expected = run(straight, range(8))
    first, second = Queue(30, G, D), Queue(30, G, D)
    run(first, range(4))
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(expected[4:], run(second, range(4, 8)), strict=True))
    assert torch.equal(straight.vectors, second.vectors) and straight.pushed == second.pushed


def test_queue_carries_no_gradient() -> None:
    queue = Queue(30, G, D)
    assert not queue(maps().requires_grad_(), teacher(), 0, 0).requires_grad


def test_check_queue() -> None:
    check_queue(64 * 49, 64, 49)
    with pytest.raises(NecoError, match=r"loss.queue_size=3135 .* needs 3136"):
        check_queue(3135, 64, 49)
