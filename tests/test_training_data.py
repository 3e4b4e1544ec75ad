"""Which image comes when: a stream that is a function of (seed, batch number) alone."""

from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from conftest import CONF
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from neco.augment.views import Views, batch_scale
from neco.config.schema import Train
from neco.dataset.base import Sample
from neco.training.callbacks import Plan
from neco.training.data import MultiView, Positions, loader

OPTIONS = {**yaml.safe_load((CONF / "task" / "train.yaml").read_text())["train"], "epochs": 3, "batch_size": 4}


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 20), st.data())
def test_a_resumed_stream_is_the_tail_of_the_whole(images, batch, batches, data):
    start = data.draw(st.integers(0, batches))
    whole = list(Positions(images, batch, batches, seed=3))
    assert list(Positions(images, batch, batches, seed=3, start=start)) == whole[start:]
    assert all(len(positions) == batch for positions in whole)
    assert [{number for _, _, number in positions} for positions in whole] == [{n} for n in range(batches)]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 4))
def test_every_image_once_an_epoch(images, batch, epochs):
    stream = [p for positions in Positions(images, batch, epochs * images // batch + 1, seed=1) for p in positions]
    for epoch in range(epochs):
        assert Counter(i for e, i, _ in stream[epoch * images : (epoch + 1) * images] if e == epoch) == Counter(
            range(images)
        )


def test_epochs_and_seeds_are_shuffled_differently():
    def order(seed, epoch):
        return [i for p in Positions(50, 50, 2, seed) for e, i, _ in p if e == epoch]

    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0) and order(1, 0) != sorted(order(1, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_has_one_scale_and_the_crops_of_any(tmp_path, workers):
    for index in range(3):
        Image.fromarray(np.full((50, 70, 3), 50 * index, np.uint8)).save(tmp_path / f"{index}.png")
    samples = [Sample(str(index), str(tmp_path / f"{index}.png")) for index in range(3)]

    def batches(**more):
        views = Views(global_size=(16, 32), local_size=24, local_views=1, teacher="clean", **more).resolve(8, 64)
        return list(loader(MultiView(samples, views, 5), Positions(3, 2, 12, 5), workers, pin=False))

    scales = 0.5, 1.0, 1.5
    sizes = {0.5: ([8, 16], [16, 16]), 1.0: ([16, 32], [24, 24]), 1.5: ([24, 48], [32, 32])}  # 12, 36: whole patches
    for number, (one, other) in enumerate(zip(batches(), scaled := batches(multi_scale=scales), strict=True)):
        assert torch.equal(one["crops"], other["crops"])
        large, small = sizes[batch_scale(5, number, scales)]
        assert list(one["global_views"].shape) == list(one["teacher_views"].shape) == [2, 2, 3, 16, 32]
        assert list(other["global_views"].shape) == list(other["teacher_views"].shape) == [2, 2, 3, *large]
        assert list(other["local_views"].shape) == [2, 1, 3, *small]
    assert len({batch["global_views"].shape for batch in scaled}) == 3


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
