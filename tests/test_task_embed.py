"""task=embed: features as evaluations compute them, resume, unreadable images, space on the disk."""

import csv
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

from neco import load_backbone
from neco.config import validate
from neco.config.types import MEAN, STD
from neco.task import embed
from neco.utils import signals
from neco.utils.errors import NecoError

DOCS = Path(__file__).parents[1] / "docs"
COUNT = 12


@pytest.fixture
def folder(tmp_path):
    """Images of several sizes; the names of some need care."""
    root, rng = tmp_path / "images", np.random.default_rng(0)
    (root / "a, b").mkdir(parents=True)
    for i in range(COUNT):
        pixels = rng.integers(0, 255, (20 + 7 * (i % 4), 60 - 9 * (i % 3), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / ("a, b" if i % 2 else ".") / f'"{i:02d}" é.png')
    (root / "ordinary.png").write_bytes((root / '"00" é.png').read_bytes())
    (root / b"\xff.png".decode(errors="surrogateescape")).write_bytes((root / "ordinary.png").read_bytes())
    return root


@pytest.fixture
def run(folder, tmp_path):
    """`run("key=value", ...)` runs task=embed on the images; returns index.csv and a reader of features."""

    def go(*overrides: str, out: str = "out"):
        settings = validate.load(
            "task=embed", "dataset=folder", f"dataset.root={folder}", "embed.size=16", "extract.workers=0",
            "extract.batch_size=5", f"run_dir={tmp_path / out}", *overrides,
        )  # fmt: skip
        embed.main(settings, embed.prepare(settings), tmp_path / out)
        return read(tmp_path / out)

    return go


def read(out: Path) -> dict[str, np.ndarray]:
    found = {}
    with (out / "index.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        for line in csv.DictReader(file):
            row, h, w = (int(line[name]) for name in ("row", "h", "w"))
            with safetensors.safe_open(out / line["file"], "np") as shard:
                found[line["key"]] = shard.get_slice("features")[row : row + h * w].reshape(h, w, -1)
    return found


def wanted(path: Path, tall: int, wide: int) -> np.ndarray:
    """Features by a derivation of its own: resized by PIL, normalised, one image at a time."""
    pixels = np.asarray(Image.open(path).convert("RGB").resize((wide, tall), Image.Resampling.BILINEAR)) / 255
    images = torch.tensor((pixels - MEAN) / STD).float().permute(2, 0, 1)[None]
    return load_backbone("tiny")(images)[0].numpy()


@pytest.mark.parametrize("size", ["[16,24]", "native"])
def test_features_of_every_image(size, run, folder):
    found = run(f"embed.size={size}", "embed.limit=44", "embed.shard_mb=0.01", "embed.dtype=float32")
    assert len(found) == COUNT + 2 and "\udcff.png" in found and 'a, b/"01" é.png' in found
    for key, maps in found.items():
        width, height = Image.open(folder / key).size
        shrink = min(1, 44 / max(width, height))
        tall, wide = (16, 24) if size != "native" else (min(5, round(n * shrink / 8)) * 8 for n in (height, width))
        assert maps.shape == (tall // 8, wide // 8, 96) and max(tall, wide) <= 44
        np.testing.assert_allclose(maps, wanted(folder / key, tall, wide), rtol=1e-4, atol=1e-4)


def test_means(run):
    maps, means = run(), run("embed.pool=mean", out="means")
    for key, mean in means.items():
        assert mean.shape == (1, 1, 96) and mean.dtype == np.float16
        np.testing.assert_allclose(mean[0, 0], maps[key].astype(np.float32).mean((0, 1)), atol=5e-3)


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_was(run, tmp_path, monkeypatch):
    whole = run("embed.shard_mb=0.002", out="whole")
    save, written = safetensors.torch.save, []

    def note(*what):
        written.append(what)
        return save(*what)

    def break_off(descriptor):
        if len(written) == 4:  # in the middle of a file
            os.truncate(descriptor, 1000)
            written.append("half")
            raise Killed

    monkeypatch.setattr(safetensors.torch, "save", note)
    monkeypatch.setattr("os.fsync", break_off)
    with pytest.raises(Killed):
        run("embed.shard_mb=0.002")
    left = sorted((tmp_path / "out").glob("features-*"))
    assert len(left) == 3 and not (tmp_path / "out/index.csv").exists()
    before = [path.stat().st_mtime_ns for path in left]
    again = run("embed.shard_mb=0.002")
    assert [path.stat().st_mtime_ns for path in left] == before and len(written) > 5
    assert [*again] == [*whole] and all((again[key] == whole[key]).all() for key in whole)
    assert not list((tmp_path / "out").glob(".features*.part"))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_file_is_not_gone_on_without(lost, run, tmp_path):
    run("embed.shard_mb=0.002")
    (tmp_path / f"out/features-{lost:05d}.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("features-*")}
    with pytest.raises(NecoError, match=rf"features-{lost:05d}\.safetensors is gone: remove the later"):
        run("embed.shard_mb=0.002")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("features-*")} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [("embed.dtype=float32", "values"), ("weights=none", "weights"), ("model.pos_interp=neco", "model")],
)
def test_a_folder_holds_features_of_one_kind(change, words, run):
    run()
    with pytest.raises(NecoError, match=f"holds features of other {words}; give task=embed one of its own"):
        run(change)


def test_changed_images_are_not_gone_on_with(run, folder):
    run()
    (folder / "new.png").write_bytes((folder / "ordinary.png").read_bytes())
    with pytest.raises(NecoError, match="other images"):
        run()


def test_unreadable_images_are_named_and_limited(run, folder, tmp_path):
    (folder / "broken.png").write_bytes(b"no image")
    found = run("dataset.max_bad=0.1", "embed.shard_mb=0.002")
    assert len(found) == COUNT + 2
    assert re.fullmatch(r"broken.png\tcannot decode .*broken.png.*\n", (tmp_path / "out/bad_images.txt").read_text())
    with pytest.raises(NecoError, match=r"dataset\.max_bad puts up with 0 of 15"):
        run("dataset.max_bad=0", out="strict")
    assert not (tmp_path / "strict").exists()


def test_too_many_unreadable_images_end_the_run(run, folder, tmp_path, monkeypatch):
    (folder / "broken.png").write_bytes(b"no image")
    monkeypatch.setattr(embed, "look", lambda *_: None)  # which looks at a few of many
    with pytest.raises(NecoError, match=r"1 images cannot be read.*named in .*out/bad_images.txt"):
        run("dataset.max_bad=0")


def test_a_full_disk_is_told_before(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(embed.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NecoError, match=r"the features of 14 images need .* embed\.pool=mean"):
        run()


def test_a_damaged_file_is_named(run, tmp_path):
    run()
    (tmp_path / "out/features-00000.safetensors").write_bytes(b"0" * 20)
    with pytest.raises(NecoError, match=r"features-00000.safetensors is damaged"):
        run()


def test_an_interruption_ends_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "asked", 15)
    with pytest.raises(signals.Interrupted):
        run()
    assert not list((tmp_path / "out").glob("*features*"))


def test_the_lines_of_the_docs_read_it(run, tmp_path, monkeypatch):
    maps = run()
    (text,) = [
        t for t in re.findall(r"```python\n(.*?)```", (DOCS / "export.md").read_text(), re.DOTALL) if "index.csv" in t
    ]
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(text.replace("runs/embed/X", "out").replace("cat.jpg", "ordinary.png"), space)
    assert (space["maps"] == maps["ordinary.png"]).all() and space["maps"].ndim == 3
