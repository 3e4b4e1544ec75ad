"""Confusion matrices, IoU and matching against loops over pixels and over all assignments."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neco.eval.common import metrics
from neco.utils.errors import NecoError


def case(seed: int, predictions: int, classes: int, pixels: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    target = rng.integers(classes, size=pixels)
    prediction = np.where(rng.random(pixels) < 0.6, target % predictions, rng.integers(predictions, size=pixels))
    target[rng.random(pixels) < 0.1] = 255
    return torch.tensor(prediction), torch.tensor(target)


def slow_iou(prediction: torch.Tensor, target: torch.Tensor, value: int, label: int) -> float:
    pairs = [(p, t) for p, t in zip(prediction.tolist(), target.tolist(), strict=True) if t != 255]
    both = sum(p == value and t == label for p, t in pairs)
    either = sum(p == value or t == label for p, t in pairs)
    return both / either if either else 0.0


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6))
def test_confusion_and_iou_equal_counting(seed: int, predictions: int, classes: int) -> None:
    prediction, target = case(seed, predictions, classes)
    matrix = metrics.confusion(prediction, target, predictions, classes)
    assert matrix.shape == (predictions, classes) and matrix.dtype == torch.int64
    iou = metrics.pairwise_iou(matrix)
    for value in range(predictions):
        for label in range(classes):
            assert matrix[value, label] == ((prediction == value) & (target == label)).sum()
            assert iou[value, label] == pytest.approx(slow_iou(prediction, target, value, label), abs=1e-12)


def test_confusion_adds_up_over_parts_and_takes_uint8() -> None:
    prediction, target = case(1, 5, 4)
    whole = metrics.confusion(prediction, target, 5, 4)
    parts = [
        metrics.confusion(p, t.to(torch.uint8), 5, 4)
        for p, t in zip(prediction.split(37), target.split(37), strict=True)
    ]
    assert torch.equal(sum(parts), whole)


@pytest.mark.parametrize(
    ("prediction", "target", "says"),
    [([3], [0], "prediction holds 3..3"), ([0], [4], "target holds 4"), ([-1], [0], "-1"), ([0, 1], [0], "shape")],
)
def test_confusion_checks_ranges(prediction: list[int], target: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        metrics.confusion(torch.tensor(prediction), torch.tensor(target), 3, 4)


def test_absent_classes_are_left_out_or_count_as_zero() -> None:
    matrix = torch.tensor([[8, 2, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])  # class 2 nowhere, 3 predicted only
    iou = [8 / 11, 5 / 7, None, 0.0]
    found = metrics.by_class(metrics.class_iou(matrix), ("a", "b", "c", "d"))
    assert list(found.values()) == [value if value is None else pytest.approx(value) for value in iou]
    assert metrics.miou(matrix, "standard") == pytest.approx((8 / 11 + 5 / 7 + 0) / 3)
    assert metrics.miou(matrix, "reference") == pytest.approx((8 / 11 + 5 / 7 + 0) / 4)
    with pytest.raises(NecoError, match="no labelled pixel"):
        metrics.miou(torch.zeros(3, 3, dtype=torch.long))


@pytest.mark.parametrize(("predictions", "classes"), [(4, 4), (6, 4), (3, 5)])
def test_one_to_one_is_the_best_of_all_assignments(predictions: int, classes: int) -> None:
    for seed in range(5):
        prediction, target = case(seed, predictions, classes)
        matrix = metrics.confusion(prediction, target, predictions, classes)
        iou = metrics.pairwise_iou(matrix)
        mapping = metrics.match_one_to_one(matrix)
        if predictions >= classes:
            best = max(sum(iou[v, c] for c, v in enumerate(p)) for p in permutations(range(predictions), classes))
            chosen = [
                max((iou[v, c].item() for v in range(predictions) if mapping[v] == c), default=0)
                for c in range(classes)
            ]
        else:
            best = max(sum(iou[v, c] for v, c in enumerate(p)) for p in permutations(range(classes), predictions))
            chosen = [iou[v, mapping[v]].item() for v in range(predictions)]
        assert sum(chosen) == pytest.approx(float(best))


def test_values_left_over_become_background() -> None:
    matrix = torch.tensor([[0, 0, 9], [9, 0, 0], [0, 9, 0], [0, 1, 2], [0, 2, 1]])
    assert metrics.match_one_to_one(matrix).tolist() == [2, 0, 1, 0, 0]


def test_many_to_one_takes_the_highest_precision_and_the_lowest_of_equals() -> None:
    matrix = torch.tensor([[1, 5, 3], [4, 4, 0], [0, 2, 2], [0, 0, 0], [0, 0, 7]])
    assert metrics.match_many_to_one(matrix).tolist() == [1, 0, 1, 0, 2]


def test_remap_equals_counting_the_renamed_predictions() -> None:
    prediction, target = case(3, 9, 4)
    matrix = metrics.confusion(prediction, target, 9, 4)
    mapping = metrics.match_many_to_one(matrix)
    assert torch.equal(metrics.remap(matrix, mapping), metrics.confusion(mapping[prediction], target, 4, 4))


def test_classes_without_a_labelled_pixel_are_absent() -> None:
    matrix = torch.tensor([[3, 0, 1], [2, 0, 0]])
    assert (
        metrics.absent(matrix, ["a", "b", "c"]) == {"absent": ["b"]} and metrics.absent(matrix[:, [0, 2]], "ac") == {}
    )
