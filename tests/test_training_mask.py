"""What a run does with the foreground."""

import pytest
import torch
from conftest import losses


@pytest.mark.parametrize("mask", ("fg", "bg"))
@pytest.mark.parametrize("more", ([], ["loss.references=queue", "loss.queue_size=64"], ["loss.references=batch_other"]))
def test_training_with_a_mask(train, mask, more):
    folder = train(f"loss.mask={mask}", *more)
    kept = losses(folder, "kept")
    assert len(kept) == 4 and all(0 < share < 1 for share in kept)
    assert losses(folder) != losses(train(*more, folder="all"))


def test_fg_and_bg_are_never_both(train):
    shares = [losses(train(f"loss.mask={mask}", "train.steps=1", folder=mask), "kept")[0] for mask in ("fg", "bg")]
    assert sum(shares) <= 1


@pytest.mark.parametrize("more", ([], ["train.accumulate=4"]))
def test_empty_masks_and_batch_of_one_are_finite(train, monkeypatch, more):
    empty = torch.zeros
    monkeypatch.setattr("neco.training.module.foreground", lambda a: empty(len(a), *a.shape[2:], dtype=torch.bool))
    assert losses(train("loss.mask=fg", *more)) == [0.0] * 4
    queue = train("loss.mask=fg", "loss.references=queue", "loss.queue_size=64", *more, folder="queue")
    assert losses(queue) == [0.0] * 4
