"""What is drawn: the right thing in the right place, and nothing drawn changes a number."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_support import Files, noisy
from PIL import Image
from test_eval_rectangular import ALL, HERE, Blind, scene

from neco.eval.retrieval import Retrieval, soft_labels, typical
from neco.features.extractor import resize_nearest
from neco.report import pictures
from neco.report.pictures import colours


@pytest.fixture
def dataset(tmp_path: Path) -> Files:
    made = Files(tmp_path, 4, train=[scene(i) for i in range(4)], val=[scene(i) for i in range(3)])
    made.classes = ("background", *made.classes[1:])
    return made


@pytest.mark.parametrize("evaluation", [each for each, *_ in ALL], ids=lambda each: type(each).__name__)
def test_every_evaluation_draws_and_its_numbers_stay(evaluation, dataset: Files) -> None:
    found = evaluation(Blind(8), dataset, extract=HERE, show=2)
    assert found == evaluation(Blind(8), dataset, extract=HERE)
    keys = {picture.key for picture in found.pictures} - {None}
    assert keys == {"val/0", "val/2"}
    assert all(picture.pixels.dtype == np.uint8 and picture.pixels.std() > 0 for picture in found.pictures)
    kinds = {picture.kind.partition(",")[0] for picture in found.pictures}
    assert (
        kinds
        == {
            "Linear": {"prediction", "confusion"},
            "Overcluster": {"prediction", "confusion", "4 clusters"},
            "Retrieval": {"prediction", "confusion", "nearest patches"},
            "Unsupervised": {"foreground", "communities", "prediction", "confusion"},
            "Attention": {"attention"},
        }[type(evaluation).__name__]
    )


def test_the_nearest_patch_of_a_known_image_is_itself(tmp_path: Path) -> None:
    """Also under the crops of the memory: what is drawn is where the entry was taken from."""
    rng = np.random.default_rng(0)
    pairs = [noisy(rng, 64, 64, 4) for _ in range(4)]
    dataset = Files(tmp_path, 4, train=pairs, val=pairs[1:2])
    values = {"size": 64, "k": 7, "engine": "torch"}
    strips = [
        picture.pixels
        for picture in Retrieval(**values, augment="none")(Blind(8), dataset, extract=HERE, show=1).pictures
        if picture.kind == "nearest patches"
    ]
    assert strips
    for strip in strips:
        query, first = strip[:, :112], strip[:, 128 : 128 + 112]
        assert np.array_equal(query, first) and not np.array_equal(query, strip[:, 244 : 244 + 112])


def test_a_view_is_centred_on_its_patch() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[8:16, 48:56] = (0, 0, 200)  # patch (1, 6) of 5 x 7 and a rest
    view = np.asarray(pictures.patch_view(Image.fromarray(pixels[:, :56]), 1 * 7 + 6, (5, 7)))
    assert view.shape == (112, 112, 3)
    assert (view[52:60, 52:60] == (0, 0, 200)).all() and not (view[:44, :, 2] > 0).any()


def test_labels_lie_over_their_image_and_void_is_dark(tmp_path: Path) -> None:
    image, mask = np.full((30, 50, 3), 200), np.zeros((30, 50), int)
    mask[:, 20:], mask[:10, 20:] = 2, 255
    dataset = Files(tmp_path, 3, val=[(image, mask)])
    (sample,) = dataset.samples("val")
    found = pictures.truth(dataset, sample)
    palette = colours(3).astype(float)
    assert found.pixels.shape == (30, 50, 3) and found.key == "val/0"
    assert np.abs(found.pixels[20, 3] - (0.4 * 200 + 0.6 * palette[0])).max() <= 1
    assert np.abs(found.pixels[20, 40] - (0.4 * 200 + 0.6 * palette[2])).max() <= 1
    assert (found.pixels[3, 40] == 80).all()
    small = resize_nearest(torch.tensor(mask)[None], (3, 5))[0]
    assert np.array_equal(pictures.labels_over(sample, small, 3, "x").pixels, found.pixels)


def test_confusion_is_dark_where_the_share_is() -> None:
    matrix = torch.tensor([[8, 0], [2, 5]])  # of class 0 a fifth is called class 1
    drawn = pictures.confusion(matrix, ("a", "b")).pixels.astype(int).sum(2)
    cells = drawn[-57:-1, -57:-1]
    shade = [[cells[28 * row + 14, 28 * column + 14] for column in range(2)] for row in range(2)]
    assert shade[1][1] < shade[0][0] < shade[0][1] < shade[1][0] == 3 * 255
    many = pictures.confusion(torch.eye(150, dtype=torch.long), [str(i) for i in range(150)])
    assert many.pixels.shape == (600, 600, 3), "no room for names"


def test_colours_have_one_basis_for_all_networks() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 4, 6, 10, generator=generator) * torch.linspace(3, 0.1, 10)
    second = first.flip(0)
    one, two = pictures.as_colours([first, second])
    assert one.shape == (2, 4, 6, 3) and np.array_equal(one, two[::-1])
    turn = torch.linalg.qr(torch.randn(10, 10, generator=generator))[0]
    other = np.stack(pictures.as_colours([first @ turn, second @ turn])).astype(int)
    flips = [np.abs(np.stack([one, two])[..., c] - other[..., c]).max() for c in range(3)]
    mirrored = [np.abs(255 - np.stack([one, two])[..., c] - other[..., c]).max() for c in range(3)]
    assert all(min(pair) <= 2 for pair in zip(flips, mirrored, strict=True)), "a rotation changes no colour but by sign"
    assert pictures.as_colours([first[..., :2]])[0].shape == (2, 4, 6, 3)


def test_typical_patches_are_the_inmost_of_the_largest_classes() -> None:
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[0, :24, 16:] = 1
    mask[0, 32:, 32:] = 2
    assert typical(soft_labels(mask, 8, 3)[0]) in ([2 * 5 + 1, 1 * 5 + 3], [3 * 5 + 1, 1 * 5 + 3])
    assert typical(torch.zeros(5, 5, 3)) == []


def test_a_run_draws_before_and_after(neco, train, tmp_path: Path) -> None:
    chosen = ["show=2", "eval=[retrieval]", "eval.retrieval.k=3", "train.eval_epochs=1", "dataset.val=5"]
    run = train(*chosen, folder="run")
    page = (run / "report.html").read_text()
    assert page.count("features, before</fig") == 2 and page.count("features, student, step 4</fig") == 2
    assert page.count("prediction, k=3, teacher, step 4</fig") == 2 and "prediction, k=3, before" in page
    steps = sorted(path.stem for path in (run / "pictures").glob("features-*"))
    assert steps == ["features-student-0", "features-student-4", "features-teacher-0", "features-teacher-4"]
    records = json.loads((run / "results.json").read_text())
    assert all((run / picture["file"]).is_file() for record in records for picture in record["pictures"])
    beside = tmp_path / "beside"
    command = ["task=eval", f"checkpoint={run}", "dataset.val=5", "eval=retrieval", "eval.retrieval.k=3"]
    command += ["dataset=shapes", "dataset.train=8", f"run_dir={beside}"]
    neco(*command, "compare=own", ok=True)
    both = json.loads((beside / "results.json").read_text())
    assert [record["network"] for record in both] == ["compared", "teacher"] and "show" not in both[0]
    assert both[0]["weights"] != both[1]["weights"]
    neco(*command, "compare=own", "show=1", ok=True)  # measured already, drawn now
    assert "features, compared" in (beside / "report.html").read_text()
    wrong = neco(*command, "compare=/nowhere.pth")
    assert wrong.returncode == 2 and "compare: weights /nowhere.pth: no such file" in wrong.stderr
