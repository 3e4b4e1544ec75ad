"""Unreadable images: replaced, named, counted, and too many of them stop the run."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_task_train import Stopped, assert_same_run, stop_after  # noqa: F401

from neco.augment.views import Views
from neco.dataset import inspect
from neco.dataset.base import Sample
from neco.dataset.files import Tree
from neco.training import unreadable
from neco.training.data import MultiView, Positions, loader
from neco.training.module import PostTraining
from neco.utils.errors import NecoError


@pytest.fixture
def photos(tmp_path: Path):
    """`photos(count, unreadable indices)`: a folder of small images, some of which are none."""

    def make(count: int, broken: list[int], name: str = "photos") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for i in range(count):
            path = folder / f"{i:03d}.png"
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
            if i in broken:
                path.write_bytes((b"", b"some text", path.read_bytes()[:1000])[i % 3])
        return folder

    return make


def of(folder: Path) -> list[str]:
    return ["dataset=folder", f"dataset.root={folder}", "dataset.val_fraction=0"]


def listed(run: Path) -> list[list[str]]:
    return [line.split("\t") for line in (run / unreadable.FILE).read_text().splitlines()]


def test_a_bad_image_is_replaced_named_and_changes_nothing_else(train, photos, monkeypatch, stop_after, caplog):  # noqa: F811
    folder = photos(12, [4])
    options = [*of(folder), "dataset.max_bad=0.1", "train.steps=8", "train.save_minutes=1e-9"]
    whole = train(*options, folder="whole")
    assert "1 unreadable images were replaced" in caplog.text
    ((key, path, why),) = listed(whole)
    assert (key, path) == ("004.png", str(folder / "004.png")) and "no known image format" in why
    assert_same_run(whole, train(*options, "train.workers=2", folder="workers"))
    stop_after(5)
    with pytest.raises(Stopped):
        train(*options, folder="halves")
    monkeypatch.undo()
    assert_same_run(whole, train(*options, "train.workers=2", folder="halves"))
    assert listed(whole.parent / "halves") == listed(whole) == listed(whole.parent / "workers")


def test_more_than_a_few_stop_the_run_within_its_first_epoch(inside, photos, tmp_path):
    looked_at = set(np.linspace(0, 199, unreadable.LOOKS).round())
    broken = [i for i in range(100, 200) if i not in looked_at][:3]
    options = [o for o in SMALL if not o.startswith(("dataset.", "train.steps"))] + ["train.batch_size=20"]
    code, said = inside(*options, *of(photos(200, broken)), "train.epochs=1", "run_dir=run", "train.workers=2")
    assert code == 2 and "Traceback" not in said
    assert "3 images cannot be read; dataset.max_bad puts up with 2 of 200" in said and "run/bad_images.txt" in said
    assert [key for key, _, _ in sorted(listed(tmp_path / "run"))] == [f"{i:03d}.png" for i in broken]
    steps = (tmp_path / "run" / "metrics.csv").read_text().count("\n") - 1
    assert steps < 10, "an epoch is 10"
    more = ["train.epochs=1", "run_dir=run", "dataset.max_bad=0.02"]
    code, said = inside(*options, *of(tmp_path / "photos"), *more)
    assert code == 0 and "3 unreadable images were replaced" in said, said
    assert len(listed(tmp_path / "run")) == 3


def test_a_folder_of_broken_files_is_refused_at_a_look(inside, photos, tmp_path):
    options = [option for option in SMALL if not option.startswith("dataset.")]
    code, said = inside(*options, *of(photos(200, list(range(0, 200, 2)))), "run_dir=run")
    assert code == 2 and "images looked at cannot be read; dataset.max_bad puts up with 2 of 200" in said
    assert not (tmp_path / "run").exists()


def test_a_broken_part_of_a_mixture_is_not_hidden_by_the_others(inside, photos):
    photos(200, []), photos(20, list(range(20)), "cats")
    parts = "{photos:{option: folder, root: photos}, cats: {option: folder, root: cats, max_bad: 0.1}}"
    code, said = inside("eval=[]", "dataset=mix", f"dataset.parts={parts}", "dataset.max_bad=0.5")
    assert code == 2 and "dataset.parts.cats.max_bad puts up with 2 of 20" in said, said


def test_a_look_takes_few_images_and_little_time(photos, monkeypatch):
    samples = [Sample(key, path) for key, path in Tree(photos(100, [0, 50, 99])).images().items()]
    unreadable.look(samples, {"": (3, 100)})
    with pytest.raises(NecoError, match=r"2 of \d+ images looked at .* 1 of 100000.*0(00|50|99).png"):
        unreadable.look(samples, {"": (1, 100_000)})  # as if drawn from so many
    read: list[str] = []
    real = inspect.reason
    monkeypatch.setattr(unreadable, "reason", lambda sample, *_: (read.append(sample.key), real(sample))[1])
    unreadable.look(samples, {"": (100, 100)})
    assert len(read) == len(set(read)) == unreadable.LOOKS and {"000.png", "099.png"} <= set(read)
    monkeypatch.setattr(unreadable, "SECONDS", 0.0)
    read.clear()
    unreadable.look(samples, {"": (100, 100)})
    assert len(read) == 1


@given(st.integers(1, 60), st.data())
def test_the_chance_of_a_look_is_hypergeometric(images, data):
    allowed, looked = data.draw(st.integers(0, images)), data.draw(st.integers(1, images))
    found = data.draw(st.integers(0, looked))
    wanted = scipy.stats.hypergeom(images, allowed, looked).sf(found - 1)
    assert unreadable.chance(found, looked, allowed, images) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_an_error_and_no_hang(train, photos, workers):
    options = [*of(photos(12, list(range(12)))), "dataset.max_bad=1", f"train.workers={workers}"]
    with pytest.raises(NecoError, match="100 images that were to replace an unreadable one"):
        train(*options)


def test_a_disk_that_is_away_costs_no_step(train, photos, monkeypatch, caplog, tmp_path):
    folder, real = photos(12, []), PostTraining.optimizer_step
    options = [*of(folder), "train.steps=9", "train.accumulate=2"]
    whole = train(*options, folder="whole")

    def away(module, *given):
        real(module, *given)
        if module.global_step == 4:
            folder.rename(tmp_path / "away")

    monkeypatch.setattr(PostTraining, "optimizer_step", away)
    caplog.set_level("INFO")
    with pytest.raises(NecoError, match="cannot be read"):
        train(*options, folder="other")
    assert (found := re.search(r"saved       step (\d): once they can be read", caplog.text)) and int(found[1]) >= 4
    monkeypatch.undo()
    (tmp_path / "away").rename(folder)
    assert_same_run(whole, train(*options, folder="other"))
    assert not (tmp_path / "other" / unreadable.FILE).exists()


def test_what_can_be_read_again_is_struck_off(photos, tmp_path):
    folder = photos(12, [3, 4])
    samples = [Sample(key, path) for key, path in Tree(folder).images().items()]
    limits = {"": (2, 12)}
    first = unreadable.BadImages(tmp_path, samples, limits)
    for _ in range(2):
        first.note([(3, "cannot\ndecode"), (4, "a\ttab"), (3, "cannot decode")])
    assert [line[0::2] for line in listed(tmp_path)] == [["003.png", "cannot decode"], ["004.png", "a tab"]]
    (folder / "000.png").replace(folder / "003.png")
    again = unreadable.BadImages(tmp_path, samples, limits)
    assert [line[0] for line in listed(tmp_path)] == ["004.png"] and again.known == {"004.png"}
    with pytest.raises(NecoError, match=r"3 images cannot be read; dataset.parts.a.parts.b.max_bad puts up with 2"):
        unreadable.BadImages(tmp_path, [Sample("a/b/" + s.key, s.image) for s in samples], {"a/b/": (2, 12)}).note(
            [(i, "x") for i in (1, 2, 3)]
        )


def test_file_names_of_any_bytes_are_listed(photos, tmp_path):
    sample = Sample("caf\udce9.jpg", "caf\udce9.jpg")
    unreadable.BadImages(tmp_path, [sample], {"": (1, 1)}).note([(0, "why")])
    assert (tmp_path / unreadable.FILE).read_bytes() == b"caf\xe9.jpg\tcaf\xe9.jpg\twhy\n"
    assert unreadable.BadImages(tmp_path, [sample], {"": (1, 1)}).known == {sample.key}


def test_substitutes_are_a_function_of_seed_epoch_and_index(photos):
    samples = [Sample(key, path) for key, path in Tree(photos(12, [4, 7])).images().items()]
    views = Views(global_size=16, local_size=8, local_views=1)
    one, other = (MultiView(samples, views, seed) for seed in (3, 4))
    assert torch.equal(one[1, 4, 0]["global_views"], one[1, 4, 0]["global_views"])
    seen = {bytes(item.numpy()) for item in (one[e, 4, 0]["global_views"] for e in range(9))}
    assert len(seen) == 9 and not torch.equal(one[1, 4, 0]["global_views"], other[1, 4, 0]["global_views"])
    taken = Counter(list(one._candidates(epoch, 4))[1] for epoch in range(200))
    assert len(taken) == 12, "any image may take the place"
    assert {index for index, _ in one[0, 4, 0]["bad"]} <= {4, 7} and one[0, 5, 0]["bad"] == []


def test_batches_are_the_same_for_any_number_of_workers_and_say_what_is_bad(photos):
    samples = [Sample(key, path) for key, path in Tree(photos(12, [4, 7])).images().items()]
    data = MultiView(samples, Views(global_size=16, local_size=8, local_views=1), 3)
    alone, together = (list(loader(data, Positions(12, 6, 4, 3), workers, False)) for workers in (0, 2))
    for a, b in zip(alone, together, strict=True):
        assert a["bad"] == b["bad"] and all(torch.equal(a[key], b[key]) for key in a if key != "bad")
        assert a["global_views"].shape == (6, 2, 3, 16, 16)
    assert {index for batch in alone for index, _ in batch["bad"]} == {4, 7}
    again = data[0, 5 + len(samples), 0]["global_views"]  # a second time in an epoch: the image, with other views
    assert not torch.equal(again, data[0, 5, 0]["global_views"])
