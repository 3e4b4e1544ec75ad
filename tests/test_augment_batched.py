"""Colours of a batch on the device against those of a worker: each step alone, all together, and in a training."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import losses
from test_augment_appliers import noise, photo

from neco.augment import batched
from neco.augment.views import ViewParams, Views, view_rng
from neco.config import validate
from neco.training.data import MultiView
from neco.utils.errors import NecoError

COLOURS = {name: 0.0 for name in ("jitter_probability", "grey_probability", "blur_probability")}


def difference(views: Views, image: np.ndarray, params: ViewParams) -> torch.Tensor:
    """Levels between the device's views and the worker's, of global and of local ones."""
    colours = batched.parameters(params, views.largest_sigma)
    groups = slice(views.global_views), slice(views.global_views, None)
    found = []
    for made, plain, own in zip(views.apply(image, params), views.apply(image, params.plain()), groups, strict=True):
        before = plain.clone()
        ours = batched.recolour(plain, *(values[own] for values in colours))
        assert ours.dtype == torch.uint8 and ours.shape == made.shape and torch.equal(plain, before)
        found.append((ours.int() - made.int()).abs().flatten())
    return torch.cat(found)


def all_differences(image: np.ndarray, draws: int = 12, **options: Any) -> torch.Tensor:
    views = Views(**{"global_size": (112, 84), "local_size": 42, **options})
    drawn = (views.sample(view_rng(0, 0, index), *image.shape[:2]) for index in range(draws))
    return torch.cat([difference(views, image, params) for params in drawn])


@pytest.mark.parametrize("image", [noise(), photo()], ids=["noise", "photo"])
@pytest.mark.parametrize("step", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_a_step_is_within_a_level_of_the_worker(image: np.ndarray, step: int) -> None:
    views = Views(global_size=(112, 84), local_size=42, **COLOURS | {"jitter_probability": 1.0}, jitter=(1, 1, 1, 0.5))
    for index in range(12):
        params = views.sample(view_rng(0, 0, index), *image.shape[:2])
        away = difference(views, image, params._replace(order=np.full((6, 1), step)))
        assert away.max() <= 1 and (away > 0).float().mean() < 1e-3


@pytest.mark.parametrize("image", [noise(), photo()], ids=["noise", "photo"])
@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.25, 0.7, 1.0, 2.0, 5.0])
def test_blur_is_within_a_level_of_the_worker(image: np.ndarray, sigma: float) -> None:
    away = all_differences(image, 3, **COLOURS | {"blur_probability": 1.0}, blur_sigma=(sigma, sigma))
    assert away.max() <= 1 and away.float().mean() < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_views": 1, "local_views": 6},
        {"local_views": 0},
        {"jitter_probability": 1.0, "grey_probability": 1.0, "blur_probability": 1.0},
        {"jitter_strength": 1.25, "blur_strength": 3.0, "jitter_probability": 1.0},
        {"global_size": (5, 3), "local_size": 1, "blur_probability": 1.0},  # views smaller than the blur
    ],
    ids=str,
)
def test_everything_together_is_the_workers(options: dict[str, Any]) -> None:
    for image in (noise(), photo()):
        away = all_differences(image, 10, **options)
        assert away.max() <= 7 and (away > 1).float().mean() < 1e-4 and (away > 0).float().mean() < 1e-2


def test_nothing_drawn_is_nothing_done() -> None:
    """The neutral parameters leave each byte, and jitter of strength 0 what the worker makes of it."""
    views = Views(global_size=112, local_size=42, **COLOURS)
    params = views.sample(view_rng(0, 0, 0), 240, 320)
    for plain in views.apply(photo(), params):
        colours = batched.parameters(params._replace(jitter=params.jitter), views.largest_sigma)
        assert torch.equal(plain, batched.recolour(plain, *(values[: len(plain)] for values in colours)))
    assert all_differences(photo(), 3, **COLOURS | {"jitter_probability": 1.0}, jitter=(0.0,) * 4).max() <= 1


def test_views_of_a_batch_do_not_depend_on_each_other() -> None:
    views, image = Views(global_size=56, local_size=28), photo()
    params = views.sample(view_rng(0, 0, 3), *image.shape[:2])
    colours = batched.parameters(params, views.largest_sigma)
    local, own = views.apply(image, params.plain())[1], [values[2:] for values in colours]
    whole = batched.recolour(local, *own)
    for i in range(len(local)):
        alone = batched.recolour(local[i : i + 1], *(values[i : i + 1] for values in own))
        assert torch.equal(alone[0], whole[i])


def test_where_colours_are_applied() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [Views(colour=how).batched(place) for how in ("auto", "worker", "device") for place in (cpu, gpu)] == [
        False, True, False, False, True, True,
    ]  # fmt: skip
    assert not Views(applier="pil").batched(gpu)
    with pytest.raises(NecoError, match="colour=device: PIL"):
        Views(applier="pil", colour="device")


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["augment.teacher=clean", "augment.global_size=[32,48]", "augment.multi_scale=[0.5,1]"],
        ["augment.local_views=0", "train.accumulate=2"],
    ],
    ids=str,
)
def test_training_with_either_is_nearly_the_same(train, caplog, more: list[str]) -> None:
    runs = []
    for how in ("worker", "device"):
        with caplog.at_level("INFO", "neco"):
            runs.append(losses(train(*more, f"augment.colour={how}", "train.drop_path=0", folder=how)))
        assert ("coloured on the device" in caplog.text) == (how == "device")
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_a_clean_teacher_takes_no_crops_of_its_own(tmp_path) -> None:
    settings = validate.load("augment.teacher=clean", "dataset.train=2", "dataset.val=1", f"cache_dir={tmp_path}")
    views = settings.build("augment").resolve(8, 64)
    samples = settings.build("dataset").samples("train")
    worker, device = (MultiView(samples, views, 0, plain)[0, 0, 0] for plain in (False, True))
    assert "teacher_views" not in device and torch.equal(device["global_views"], worker["teacher_views"])
    assert torch.equal(device["crops"], worker["crops"])
