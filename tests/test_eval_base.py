"""Extraction: pixels as published, nothing around it disturbed, and a cache that is never stale."""

import math
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from eval_support import Conv, Files, Noise, noisy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from neco.config.types import MEAN, STD
from neco.eval import evaluation
from neco.features import extractor
from neco.features.extractor import Draw, Extract, _Items, resize_nearest
from neco.utils.errors import NecoError

REFERENCE_STD = (0.229, 0.224, 0.255)


@pytest.fixture
def dataset(tmp_path: Path) -> Files:
    rng = np.random.default_rng(0)
    return Files(tmp_path, 4, val=[noisy(rng, 45 + 3 * i, 60 - i, 4) for i in range(5)])


class Pixels:
    """A backbone that shows its input: features are the patch's own pixels."""

    patch, dim = 8, 192

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pixel_unshuffle(images, 8).permute(0, 2, 3, 1)


class Counting(Conv):
    """Counts forward passes where the cache's key doesn't see it."""

    def __init__(self, **values: int) -> None:
        super().__init__(8, **values)
        self.passes = [0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes[0] += 1
        return super().forward(images)


def run(extract: Extract, backbone: extractor.PatchFeatures, dataset: Files, size: int = 32, **how) -> torch.Tensor:
    return torch.cat([f for _, f, _ in extract.stream(backbone, dataset, dataset.samples("val"), size, **how)])


@pytest.mark.parametrize("std", [STD, REFERENCE_STD])
def test_pixels_and_masks_are_torchvisions(dataset: Files, std: tuple[float, float, float]) -> None:
    transform = T.Compose([T.Resize((40, 40)), T.ToTensor(), T.Normalize(MEAN, std)])
    target = T.Resize((40, 40), T.InterpolationMode.NEAREST)
    seen = 0
    for rows, features, masks in Extract(workers=0, batch_size=2).stream(
        Pixels(), dataset, dataset.samples("val"), 40, std=std
    ):
        images = torch.nn.functional.pixel_shuffle(features.permute(0, 3, 1, 2), 8)
        for sample, image, mask in zip(dataset.samples("val")[rows], images, masks, strict=True):
            assert torch.equal(image, transform(Image.open(sample.image)))
            assert np.array_equal(mask, np.array(target(Image.open(sample.mask))))
            seen += 1
    assert seen == 5


@pytest.mark.parametrize("side", [17, 40, 80, 101])
def test_floor_masks_take_the_first_pixel_of_a_cell(side: int) -> None:
    mask = torch.from_numpy(np.random.default_rng(side).integers(0, 256, (2, side, side))).to(torch.uint8)
    found = resize_nearest(mask, 40)
    pick = [min(math.floor(np.float32(i) * (np.float32(side) / np.float32(40))), side - 1) for i in range(40)]
    assert torch.equal(found, mask[:, pick][:, :, pick])


def test_batches_and_workers_change_nothing(dataset: Files) -> None:
    draw = Draw((0.5, 1.0), 3, 1)
    results = [
        run(Extract(batch_size=batch, workers=workers), Pixels(), dataset, draw=draw)
        for batch, workers in ((1, 0), (5, 0), (2, 2))
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], run(Extract(workers=0), Pixels(), dataset))


def test_an_array_and_masks_equal_the_stream(dataset: Files) -> None:
    extract, samples = Extract(workers=0, batch_size=2), dataset.samples("val")
    parts = [*extract.stream(Noise(8), dataset, samples, 32)]
    assert np.array_equal(extract(Noise(8), dataset, samples, 32), torch.cat([f for _, f, _ in parts]))
    masks = [*extract.masks(dataset, samples, 32)]
    assert [rows for rows, _ in masks] == [rows for rows, _, _ in parts]
    assert torch.equal(torch.cat([m for _, m in masks]), torch.cat([m for _, _, m in parts]))


def test_modes_gradients_and_random_states_are_as_before(dataset: Files) -> None:
    backbone = Conv(8)
    backbone.train()
    backbone.project.eval()  # a frozen part inside a network in training
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        first = run(Extract(workers=2, batch_size=2), backbone, dataset)
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert backbone.training and backbone.dropout.training and not backbone.project.training
    assert first.dtype == torch.float32 and not first.requires_grad and torch.is_grad_enabled()
    assert torch.equal(first, run(Extract(workers=0, batch_size=2), backbone, dataset))  # no dropout, no bfloat16


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([(0.5, 1.0), (0.5, 2.0)]), st.text(max_size=5))
def test_crops_lie_in_the_image_and_keep_to_scale_and_ratio(
    w: int, h: int, scale: tuple[float, float], key: str
) -> None:
    draw = Draw(scale, 1, 2)
    x1, y1, x2, y2 = draw.box(key, w, h)
    assert 0 <= x1 < x2 <= w and 0 <= y1 < y2 <= h
    assert (x1, y1, x2, y2) == draw.box(key, w, h)
    if min(w, h) >= 50 and max(w, h) / min(w, h) <= 4 / 3:
        assert (x2 - x1) * (y2 - y1) >= 0.48 * w * h
        assert 0.73 <= (x2 - x1) / (y2 - y1) <= 1.37


def test_draws_differ_by_seed_turn_and_image() -> None:
    boxes = [Draw((0.5, 1.0), s, t).box(k, 640, 480) for s in (0, 1) for t in (0, 1) for k in "abc"]
    assert len({*boxes}) == len(boxes)


@pytest.mark.parametrize("scale", [(0.5, 1.0), (0.5, 2.0)])
def test_crops_are_distributed_as_torchvisions(scale: tuple[float, float]) -> None:
    found = np.array([Draw(scale, 0, 0).box(str(i), 500, 375) for i in range(3000)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        frame = torch.empty(3, 375, 500)
        drawn = [T.RandomResizedCrop.get_params(frame, [*scale], [3 / 4, 4 / 3]) for _ in range(3000)]
    wanted = np.array([(x, y, x + w, y + h) for y, x, h, w in drawn])
    for boxes in (found, wanted):
        full = (boxes == (0, 0, 500, 375)).all(1).mean()
        assert full < 0.01 if scale[1] == 1 else 0.1 < full < 0.2  # EVALUATION: 15%
    np.testing.assert_allclose(found.mean(0), wanted.mean(0), atol=7)
    np.testing.assert_allclose(found.std(0), wanted.std(0), atol=5)


def test_jitter_is_mild_and_leaves_some_images_alone() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(30, 220, (20, 20, 3), dtype=np.uint8))
    changed = [np.array(Draw((1, 1), 0, t).jitter("a", image)).astype(int) - np.array(image) for t in range(200)]
    untouched = np.mean([not change.any() for change in changed])
    assert 0.02 < untouched < 0.13  # 1/16
    assert max(np.abs(change).mean() for change in changed) < 50


def test_image_and_mask_are_cropped_together(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).integers(0, 4, (6, 9)).repeat(10, 0).repeat(10, 1)
    dataset = Files(tmp_path, 4, val=[(np.repeat(mask[..., None] * 60, 3, 2), mask)] * 3)
    for draw in (Draw((0.5, 0.7), 0, 0, flips, colours=False) for flips in (False, True)):
        items = _Items(dataset, dataset.samples("val"), 60, images=True, nearest="centre", draw=draw)
        for pixels, masks in items:
            assert (pixels[0] == masks * 60).float().mean() > 0.6  # the rest is interpolation between cells
            assert (pixels[0] == masks.flip(0) * 60).float().mean() < 0.5


def test_half_of_the_images_are_mirrored_where_it_is_asked_for() -> None:
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    mirrored = 0
    for key in map(str, range(400)):
        plain, flipped = (np.array(Draw((1, 1), 0, 0, flips).cut(key, picture)) for flips in (False, True))
        mirrored += np.array_equal(plain[:, ::-1], flipped)
        assert np.array_equal(plain, flipped) or np.array_equal(plain[:, ::-1], flipped)
    assert 160 < mirrored < 240


@pytest.mark.parametrize(
    ("given_size", "published", "patch", "image_size", "size"),
    [
        (None, 512, 14, None, 518),
        (None, 512, 16, None, 512),
        (None, 448, 14, None, 448),
        (None, 448, 16, None, 448),
        (None, 448, 8, 128, 128),
        (None, 512, 14, 128, 126),
        (None, 512, 14, 64, 56),  # 70 is nearer, but would enlarge
        (None, 512, 16, 8, 16),
        (None, 512, 14, 512, 504),
        (70, 512, 14, 64, 70),
    ],
)
def test_input_size(given_size: int | None, published: int, patch: int, image_size: int | None, size: int) -> None:
    dataset = SimpleNamespace(image_size=image_size)
    assert evaluation.input_size(given_size, published, patch, dataset) == (size, size)


def test_a_size_that_is_no_multiple_names_its_neighbours() -> None:
    with pytest.raises(NecoError, match=r"size=512 .* patch 14: use 504 or 518"):
        evaluation.input_size(512, 512, 14, SimpleNamespace(image_size=None))


def test_labelled_sorts_and_refuses_what_cannot_be_evaluated(dataset: Files) -> None:
    dataset.rows["val"] = dataset.rows["val"][::-1]
    assert [s.key for s in evaluation.labelled(dataset, "val")] == [f"val/{i}" for i in range(5)]
    assert [s.key for s in evaluation.labelled(dataset, "val", 2)] == [f"val/{i}" for i in range(4)]
    with pytest.raises(NecoError, match="drop_last=6 leaves none"):
        evaluation.labelled(dataset, "val", 6)
    dataset.classes = ()
    with pytest.raises(NecoError, match="no labels on val"):
        evaluation.labelled(dataset, "val")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_one_clean_error(dataset: Files, workers: int) -> None:
    path = Path(dataset.samples("val")[3].image)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(NecoError) as caught:
        run(Extract(workers=workers), Noise(8), dataset)
    assert str(path) in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_mask_of_another_size_is_an_error(tmp_path: Path) -> None:
    dataset = Files(tmp_path, 2, val=[(np.zeros((20, 30, 3)), np.zeros((20, 31)))])
    with pytest.raises(NecoError, match=r"\(30, 20\).*\(31, 20\)"):
        run(Extract(workers=0), Noise(8), dataset)


def test_an_image_that_exif_turns_takes_its_mask_along(tmp_path: Path) -> None:
    image, mask = noisy(np.random.default_rng(0), 48, 64, 4)
    dataset = Files(tmp_path, 4, val=[(image, mask)])
    (sample,) = dataset.samples("val")
    exif = Image.Exif()
    for orientation, turned in ((3, mask[::-1, ::-1]), (6, np.rot90(mask, -1))):
        exif[ExifTags.Base.Orientation] = orientation
        Image.open(sample.image).save(sample.image, exif=exif)
        for workers in (0, 2):
            (read,) = [part[2] for part in Extract(workers=workers).stream(Pixels(), dataset, [sample], turned.shape)]
            np.testing.assert_array_equal(read[0], turned)
        Extract(workers=0)(Pixels(), dataset, [sample], 32)
    Image.fromarray(mask[:-1].astype(np.uint8)).save(sample.mask)
    wanted = rf"{sample.image} is \(48, 64\) .* {sample.mask} is \(64, 47\)"
    for read in (
        lambda: run(Extract(workers=2), Pixels(), dataset),
        lambda: Extract(workers=0)(Pixels(), dataset, [sample], 32),
    ):
        with pytest.raises(NecoError, match=wanted):
            read()


def test_unusable_features_are_named(dataset: Files) -> None:
    backbone = Conv(8)
    backbone.dim = 13
    with pytest.raises(NecoError, match=r"Conv gave features of shape \(5, 4, 4, 12\), not \(5, 4, 4, 13\)"):
        run(Extract(workers=0), backbone, dataset)
    backbone.dim = 12
    backbone.project.bias.data[0] = torch.nan
    with pytest.raises(NecoError, match="not finite"):
        run(Extract(workers=0), backbone, dataset)


def cached(tmp_path: Path, **values) -> Extract:
    return Extract(workers=0, batch_size=2, cache_dir=str(tmp_path / "cache"), **values)


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").glob("*") if path.name != "CACHEDIR.TAG")


def test_the_cache_is_read_without_the_backbone(dataset: Files, tmp_path: Path) -> None:
    backbone, extract = Counting(), cached(tmp_path)
    first = run(extract, backbone, dataset)
    assert backbone.passes == [3] and len(files(tmp_path)) == 1
    assert torch.equal(run(extract, backbone, dataset), first)
    mapped = extract(backbone, dataset, dataset.samples("val"), 32)
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, first)
    assert torch.equal(run(cached(tmp_path), Counting(), dataset, nearest="floor"), first)  # equal weights
    assert backbone.passes == [3] and len(files(tmp_path)) == 1


def test_the_cache_misses_whatever_changes_features(dataset: Files, tmp_path: Path) -> None:
    extract, backbone = cached(tmp_path), Counting()
    run(extract, backbone, dataset)

    def missed(backbone: Conv = backbone, samples: slice = slice(None), size: int = 32, **how) -> bool:
        before = len(files(tmp_path))
        for _ in extract.stream(backbone, dataset, dataset.samples("val")[samples], size, **how):
            pass
        return len(files(tmp_path)) == before + 1

    assert not missed()
    assert missed(size=40)
    assert missed(std=REFERENCE_STD)
    assert (
        missed(draw=Draw((0.5, 1.0), 0, 0))
        and missed(draw=Draw((0.5, 1.0), 0, 1))
        and missed(draw=Draw((0.5, 1.0), 1, 0))
    )
    assert missed(samples=slice(4))
    assert missed(samples=slice(None, None, -1))
    assert missed(Counting(seed=1))
    backbone.pos_interp = "timm"  # what only an attribute shows
    assert missed()
    path = Path(dataset.samples("val")[0].image)
    Image.fromarray(np.array(Image.open(path)) // 2).save(path)
    assert missed()
    assert not missed()
    times, content = path.stat(), path.read_bytes()
    path.write_bytes(content)
    assert path.stat().st_mtime_ns != times.st_mtime_ns and not missed(), "the same content"
    Image.new("RGB", (60, 45), "red").save(path, "BMP")
    assert missed()
    times = path.stat()
    Image.new("RGB", (60, 45), "blue").save(path, "BMP")  # as many bytes, the old time
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and path.stat().st_mtime_ns == times.st_mtime_ns and missed()


def test_backbones_without_weights_are_not_kept(dataset: Files, tmp_path: Path) -> None:
    run(cached(tmp_path), Noise(8), dataset)
    assert files(tmp_path) == []


def test_a_pass_that_was_cut_off_leaves_nothing(dataset: Files, tmp_path: Path) -> None:
    stream = cached(tmp_path).stream(Conv(8), dataset, dataset.samples("val"), 32)
    next(stream)
    assert len(files(tmp_path)) == 1
    stream.close()
    assert files(tmp_path) == []


def test_a_truncated_file_is_written_again(dataset: Files, tmp_path: Path) -> None:
    first = run(cached(tmp_path), Conv(8), dataset)
    (path,) = files(tmp_path)
    for keep in (0, 50, path.stat().st_size - 4):
        path.write_bytes(path.read_bytes()[:keep])
        assert torch.equal(run(cached(tmp_path), Conv(8), dataset), first)
        assert path.stat().st_size == 128 + first.numel() * 4 + 4


@pytest.mark.parametrize("place", [3, 60, 200, -30, -1])
def test_a_damaged_file_is_computed_again(dataset: Files, tmp_path: Path, place: int) -> None:
    first = run(cached(tmp_path), Counting(), dataset)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x41
    path.write_bytes(content)
    backbone = Counting()
    assert torch.equal(run(cached(tmp_path), backbone, dataset), first) and backbone.passes == [3]


def test_more_classes_than_eight_bits_tell_apart_are_refused(dataset: Files) -> None:
    dataset.classes = tuple(str(i) for i in range(256))
    with pytest.raises(NecoError, match="256 classes: evaluations tell at most 255 apart"):
        evaluation.labelled(dataset, "val")


def test_the_cache_is_bounded_and_forgets_the_longest_unused(dataset: Files, tmp_path: Path) -> None:
    one = 128 + 5 * 16 * 12 * 4
    extract = cached(tmp_path, cache_gb=2.5 * one / 1e9)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.npy").write_bytes(bytes(10 * one))  # not ours: neither counted nor touched
    for seed in (0, 1):
        run(extract, Counting(seed=seed), dataset)
    for age, path in enumerate(files(tmp_path)):
        os.utime(path, (1e9 - age, 1e9 - age))
    survivor = Counting(seed=0)
    run(extract, survivor, dataset)  # used again
    run(extract, Counting(seed=2), dataset)
    assert survivor.passes == [0] and len(files(tmp_path)) == 3 and (tmp_path / "cache" / "mine.npy").exists()
    again = Counting(seed=0)
    run(extract, again, dataset)
    assert again.passes == [0]


def test_what_cannot_be_kept_is_a_warning(dataset: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(cached(tmp_path, cache_gb=1e-6), Conv(8), dataset)
    assert files(tmp_path) == [] and "cache_gb" in caplog.text
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(run(cached(tmp_path), Conv(8), dataset)) == 5
    assert "not kept in" in caplog.text
