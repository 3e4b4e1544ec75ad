"""Which image comes when: a stream that is a function of (seed, batch number) alone."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neco.config import Train
from neco.training.data import Positions
from neco.training.loop import Plan

OPTIONS = {
    "epochs": 3, "steps": None, "batch_size": 4, "accumulate": 1, "drop_path": 0.0, "momentum": (0.9, 1.0),
    "clip": None, "precision": "fp32", "workers": 0, "resume": "auto",
    "eval_epochs": 1, "save_epochs": 1, "save_minutes": 1.0,
    "log_steps": 1,
}  # fmt: skip


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 20), st.data())
def test_a_resumed_stream_is_the_tail_of_the_whole(images, batch, batches, data):
    start = data.draw(st.integers(0, batches))
    whole = list(Positions(images, batch, batches, seed=3))
    assert list(Positions(images, batch, batches, seed=3, start=start)) == whole[start:]
    assert all(len(positions) == batch for positions in whole)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 4))
def test_every_image_once_an_epoch(images, batch, epochs):
    stream = [p for positions in Positions(images, batch, epochs * images // batch + 1, seed=1) for p in positions]
    for epoch in range(epochs):
        assert Counter(i for e, i in stream[epoch * images : (epoch + 1) * images] if e == epoch) == Counter(
            range(images)
        )


def test_epochs_and_seeds_are_shuffled_differently():
    def order(seed, epoch):
        return [i for p in Positions(50, 50, 2, seed) for e, i in p if e == epoch]

    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0) and order(1, 0) != sorted(order(1, 0))


@pytest.mark.parametrize(
    ("images", "batch", "epochs", "steps"), [(10, 4, 3, 7), (8, 4, 3, 6), (3, 4, 1, 1), (100, 1, 2, 200)]
)
def test_plan_counts_whole_steps(images, batch, epochs, steps):
    assert Plan(images, Train(**{**OPTIONS, "batch_size": batch, "epochs": epochs})).steps == steps


def test_plan_marks_are_the_first_step_at_which_an_epoch_is_over():
    plan = Plan(10, Train(**{**OPTIONS, "epochs": 4}))
    assert plan.steps == 10
    assert plan.marks(1) == {3: 1, 5: 2, 8: 3}  # the end of the run is no mark
    assert plan.marks(2) == {5: 2}
    assert plan.marks(0) == {}
    assert Plan(10, Train(**{**OPTIONS, "steps": 5})).marks(1) == {3: 1}
