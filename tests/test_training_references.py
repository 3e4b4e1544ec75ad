"""References against plain lists: each patch dealt once, a first-in-first-out queue, exact resume."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neco.errors import NecoError
from neco.training.references import DEAL, PUSH, Queue, check_queue, deal, draws, permutations

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
    check_queue(64 * 49, 64, 7)
    with pytest.raises(NecoError, match=r"loss.queue_size=3135 .* needs 3136"):
        check_queue(3135, 64, 7)
