"""Mixtures: which images, how often, and training on them."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_task_train import Stopped, assert_same_run, state, stop_after  # noqa: F401

from neco.dataset.base import Dataset, Sample
from neco.dataset.mix import Mix
from neco.training.data import Positions, contents
from neco.utils.errors import NecoError


class Listed(Dataset):
    classes = ("a", "b")

    def __init__(self, images: int, **common) -> None:
        super().__init__(**common)
        self.images = images

    def find(self, split: str) -> list[Sample]:
        return [Sample(f"{split}{i:02d}", f"{i}.png", f"{i}_mask.png") for i in range(self.images)]


def test_keys_are_prefixed_sorted_and_unlabelled():
    mix = Mix(parts={"b": Listed(2), "a": Listed(1), "a-b": Listed(1)})
    samples = mix.samples("val")
    assert [s.key for s in samples] == sorted(s.key for s in samples) == ["a-b/val00", "a/val00", "b/val00", "b/val01"]
    assert mix.classes == () and all(sample.mask is None for sample in samples)
    assert [s.image for s in samples] == ["0.png", "0.png", "0.png", "1.png"]


def test_shares_and_limits_follow_the_order_of_samples():
    inner = Mix(parts={"x": Listed(10, weight=0.5), "y": Listed(4)}, weight=2, max_bad=0.5)
    mix = Mix(parts={"b": Listed(200, weight=2, max_bad=0.02), "a-b": Listed(7, weight=0.5), "b-": inner})
    samples = mix.samples("train")
    assert mix.shares(samples) == [(7, 4), (10, 10), (4, 8), (200, 400)]
    assert mix.bad_limits(samples) == {
        "": (2, 221), "a-b/": (0, 7), "b-/": (7, 14), "b-/x/": (0, 10), "b-/y/": (0, 4), "b/": (4, 200),
    }  # fmt: skip
    assert Listed(3, weight=0.01).shares(samples[:3]) == [(3, 1)], "an epoch sees one at least"


def test_names_that_cannot_be_told_from_keys_are_refused():
    with pytest.raises(NecoError, match="slash"):
        Mix(parts={"a/b": Listed(1)})


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=3), st.integers(1, 5))
def test_an_epoch_sees_each_share_evenly(shares, epochs):
    total, starts = sum(images for images, _ in shares), np.cumsum([0, *(images for images, _ in shares)])
    over_all: Counter[int] = Counter()
    for epoch in range(epochs):
        indices = contents(shares, epoch, seed=5).tolist()
        assert len(set(indices)) == len(indices) == sum(seen for _, seen in shares), "copies have numbers of their own"
        counts = Counter(index % total for index in indices)
        over_all += counts
        for start, (images, seen) in zip(starts, shares, strict=False):
            own = [counts[index] for index in range(start, start + images)]
            assert sum(own) == seen and max(own) - min(own) <= 1
    for start, (images, seen) in zip(starts, shares, strict=False):
        own = [over_all[index] for index in range(start, start + images)]
        assert sum(own) == epochs * seen and max(own) - min(own) <= 1, "no image falls behind over the epochs either"


def test_half_an_epoch_is_a_random_half_and_then_the_other():
    first, second = (set(contents([(100, 50)], epoch, 3).tolist()) for epoch in (0, 1))
    assert first | second == set(range(100)) and first != set(range(50))
    assert set(contents([(100, 50)], 0, 4).tolist()) != first
    one, other = contents([(40, 20), (40, 20)], 0, 3).reshape(2, 20)
    assert set(one.tolist()) != set((other - 40).tolist()), "parts have rounds of their own"


@given(st.integers(1, 9), st.integers(1, 12), st.data())
def test_a_resumed_stream_of_shares_is_the_tail_of_the_whole(batch, batches, data):
    shares, start = [(5, 3), (4, 8), (3, 3)], data.draw(st.integers(0, batches))
    whole = list(Positions(14, batch, batches, 3, shares=shares))
    assert list(Positions(14, batch, batches, 3, start, shares)) == whole[start:]


def test_whole_shares_are_the_stream_without_shares():
    assert list(Positions(9, 4, 20, 3, shares=[(5, 5), (4, 4)])) == list(Positions(9, 4, 20, 3))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_a_mixture_trains_resumes_and_records_its_parts(train, photos, monkeypatch, stop_after):  # noqa: F811
    mix = [
        "dataset=mix", "train.steps=8", "train.save_minutes=1e-9", "augment.jitter_strength=0.5",
        f"dataset.parts={{shapes:{{weight:0.5,train:12,val:4}},"
        f"cats:{{option:folder,root:{photos},val_fraction:0,weight:2}}}}",
    ]  # fmt: skip
    whole = train(*mix, folder="whole")  # an epoch is 6 + 12 images: step 5 is in the second
    stop_after(5)
    with pytest.raises(Stopped):
        train(*mix, folder="halves")
    monkeypatch.undo()
    moved = photos.rename(photos.with_name("moved"))
    mix = [option.replace(str(photos), str(moved)) for option in mix]  # the place of files may change
    assert_same_run(whole, train(*mix, "train.workers=2", "dataset.max_bad=0.2", folder="halves"))
    held = state(whole)["neco"]["config"]["dataset"]["parts"]
    assert held["cats"]["root"] == str(photos) and held["shapes"]["train"] == 12 and held["shapes"]["weight"] == 0.5
    with pytest.raises(NecoError, match=re.escape("dataset.parts.cats.weight: 2 -> 3")):
        train(*(option.replace("weight:2", "weight:3") for option in mix), folder="halves")


def test_a_machine_file_and_data_root_reach_the_parts(inside, tmp_path):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "default.yaml").write_text("# @package _global_\ndata_root: /from/machine\n")
    (tmp_path / "dataset").mkdir()
    mine = "# mine\ndefaults: [_common]\n_target_: neco.dataset.folder.Folder\nroot: ${data_root}/mine\n"
    (tmp_path / "dataset" / "mine.yaml").write_text(mine)
    said = inside("dataset=mix", "dataset.parts={mine:1,shapes:1}")[1]
    assert "/from/machine/mine does not exist" in said and "'dataset.parts={mine:{weight:1,root:FOLDER},...}'" in said
    assert (
        "/elsewhere/mine does not exist" in inside("dataset=mix", "dataset.parts={mine:1}", "data_root=/elsewhere")[1]
    )
