"""The Jaccard index of attention against loops over pixels, and its invariances."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from eval_support import Conv, Files, Noise, noisy, reorder
from PIL import Image
from test_model_mask import slow

from neco.config.types import MEAN, STD
from neco.dataset.base import Sample
from neco.eval.attention import Attention
from neco.features.extractor import Extract
from neco.model.backbone import Backbone
from neco.utils.errors import NecoError

ROOT = Path(__file__).parents[1]
HERE = Extract(workers=0, batch_size=3)


class Red:
    """Attention = the mean red of a patch, in one head; in the other its square; positive."""

    patch, dim, heads = 8, 4, 2

    def forward_attention(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
        red = torch.nn.functional.avg_pool2d(images[:, :1], self.patch)[:, 0] * STD[0] + MEAN[0]
        return None, torch.stack([red, red**2], 1) / red.sum((1, 2))[:, None, None, None] / 1.1


class Hash(Noise):
    """Attention that knows nothing."""

    heads = 3

    def forward_attention(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, super().__call__(images)[..., :3].permute(0, 3, 1, 2).exp()


def named(dataset: Files, background: int = 0) -> Files:
    dataset.classes = tuple("background" if i == background else name for i, name in enumerate(dataset.classes))
    return dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Files:
    """Odd sizes, void; the last image is all background."""
    rng = np.random.default_rng(0)
    pairs = [noisy(rng, 61 + 7 * i, 77 - 5 * i, 4) for i in range(5)]
    pairs.append((pairs[0][0], np.zeros_like(pairs[0][1])))
    return named(Files(tmp_path, 4, val=pairs))


def slow_jaccards(dataset: Files, size: int, mass: float, clean: bool, background: int) -> np.ndarray:
    """For each image with foreground: of the merged map and of each head, pixel by pixel."""
    rows = []
    for sample in dataset.samples("val"):
        image = np.asarray(Image.open(sample.image).resize((size, size), Image.Resampling.BILINEAR))
        mask = np.asarray(Image.open(sample.mask).resize((size, size), Image.Resampling.NEAREST))
        if not ((mask != background) & (mask != 255)).any():
            continue
        pixels = torch.tensor((image / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
        heads = Red().forward_attention(pixels)[1][0]
        row = []
        for part in (heads, heads[:1], heads[1:]):
            if clean:
                kept = slow(part[None])[0]
            else:
                flat, kept, held = part.mean(0).double().numpy(), np.zeros(part.shape[1:], bool), 0.0
                for place in np.argsort(-flat, axis=None):
                    if held < mass * flat.sum():
                        kept.flat[place] = True
                    held += flat.flat[place]
            both = either = 0
            for y in range(size):
                for x in range(size):
                    if mask[y, x] != 255:
                        here, there = kept[y // 8, x // 8], mask[y, x] != background
                        both, either = both + (here and there), either + (here or there)
            row.append(both / either)
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(("mass", "clean", "background"), [(0.6, True, 0), (0.6, False, 2), (0.3, False, 0)])
def test_equals_the_slow_implementation(dataset: Files, mass: float, clean: bool, background: int) -> None:
    dataset.classes = tuple("background" if i == background else str(i) for i in range(4))
    found = Attention(size=64, mass=mass, clean=clean)(Red(), dataset, extract=HERE)
    wanted = slow_jaccards(dataset, 64, mass, clean, background)
    assert found.metrics["jaccard"] == pytest.approx(wanted[:, 0].mean())
    assert found.metrics["jaccard_best_head"] == pytest.approx(wanted[:, 1:].max(1).mean())
    assert found.details["jaccard_best_head"]["heads"] == pytest.approx(wanted[:, 1:].mean(0).tolist())
    assert found.details["jaccard"]["images"] == len(wanted) == (5 if background == 0 else 6)


def test_an_attention_that_is_the_foreground_gives_one_and_noise_gives_chance(tmp_path: Path) -> None:
    rng, pairs = np.random.default_rng(1), []
    for _ in range(6):
        mask = np.zeros((64, 64), int)
        y, x = rng.integers(5, size=2) * 8
        mask[y : y + 24, x : x + 24] = 1 + rng.integers(2)
        image = np.repeat(255 * (mask > 0)[..., None], 3, 2) + rng.integers(0, 2, (64, 64, 3)) * (mask == 0)[..., None]
        pairs.append((image, mask))
    dataset = named(Files(tmp_path, 3, 64, val=pairs))
    found = Attention(clean=False, mass=0.95)(Red(), dataset, extract=HERE)
    assert found.metrics == {"jaccard": 1.0, "jaccard_best_head": 1.0}
    noise = Attention(clean=False)(Hash(8), dataset, extract=HERE).metrics
    assert noise["jaccard"] < 0.25  # chance: a quarter of the patches, of which 9 of 64 count
    assert noise["jaccard"] < noise["jaccard_best_head"] < 0.35


def test_batch_size_workers_order_and_cache_change_nothing(dataset: Files, tmp_path: Path) -> None:
    backbone = Backbone(name="vit_tiny_patch16_224", size=32, arch={"embed_dim": 24, "depth": 2, "num_heads": 3})
    kept = Extract(workers=0, cache_dir=str(tmp_path / "cache"))
    first = Attention(size=64)(backbone, dataset, extract=kept)
    assert Attention(size=64)(backbone, dataset, extract=kept) == first
    assert len([*(tmp_path / "cache").glob("*.npy")]) == 1 and len(first.details["jaccard_best_head"]["heads"]) == 3
    reorder(dataset, "val")
    other = Attention(size=64)(backbone, dataset, extract=Extract(batch_size=1, workers=1))
    assert other.metrics == pytest.approx(first.metrics, abs=1e-6)


def test_what_cannot_work_is_refused_before_anything_is_read(dataset: Files) -> None:
    dataset.rows["val"] = [Sample("a", "not there.png", "not there.png")]
    with pytest.raises(NecoError, match="Conv gives no attention of a CLS token"):
        Attention(size=64)(Conv(8), dataset, extract=HERE)
    without = Backbone(name="vit_base_patch16_siglip_gap_224.webli", size=32, arch={"embed_dim": 24, "depth": 1})
    with pytest.raises(NecoError, match=r"siglip.* has no CLS token"):
        Attention(size=64)(without, dataset, extract=HERE)
    with pytest.raises(NecoError, match="size=30 is no multiple"):
        Attention(size=30)(Red(), dataset, extract=HERE)
    dataset.classes = ("sky", "road", "tree", "car")
    with pytest.raises(NecoError, match="Files has no class called background, so no foreground"):
        Attention().plan(8, dataset)


def test_a_set_without_foreground_is_named(dataset: Files) -> None:
    dataset.rows["val"] = dataset.rows["val"][-1:]
    with pytest.raises(NecoError, match="none of 1 images shows anything but background"):
        Attention(size=64)(Red(), dataset, extract=HERE)


OTHERS = {"size": 40, "mass": 0.4, "clean": False}


@pytest.mark.parametrize("key", OTHERS)
def test_every_option_of_the_yaml_does_something(dataset: Files, key: str) -> None:
    options = yaml.safe_load((ROOT / "conf/eval/attention.yaml").read_text())
    assert options.pop("_target_") == "neco.eval.attention.Attention" and options.keys() == OTHERS.keys()
    options["size"] = 64
    before = Attention(**options)(Red(), dataset, extract=HERE)
    after = Attention(**options | {key: OTHERS[key]})(Red(), dataset, extract=HERE)
    assert after.metrics != before.metrics and after.protocol != before.protocol
