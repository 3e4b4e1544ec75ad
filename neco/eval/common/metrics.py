"""Confusion matrices and everything that is read off them: IoU, its mean, the matching of clusters to classes.

Shapes: K predicted values (classes or clusters), C classes. A confusion matrix is int64 (K, C): pixels by (prediction,
ground truth); matrices of parts of a set add up to the matrix of the set.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from neco.dataset.base import IGNORE
from neco.utils.errors import NecoError

Compat = Literal["standard", "reference"]


def confusion(prediction: Tensor, target: Tensor, predictions: int, classes: int) -> Tensor:
    """Count pixels by (prediction, ground truth), those with target 255 left out.

    Args:
        prediction: integers in 0..predictions-1, any shape.
        target: integers in 0..classes-1 or 255, same shape.

    Returns: int64 (predictions, classes), on the device of the inputs.

    Raises:
        ValueError: the shapes differ or a value is out of range.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    valid = target != IGNORE
    prediction, target = prediction[valid].long(), target[valid].long()
    for name, values, limit in (("prediction", prediction, predictions), ("target", target, classes)):
        low, high = (int(extreme) for extreme in values.aminmax()) if values.numel() else (0, 0)
        if low < 0 or high >= limit:
            raise ValueError(f"{name} holds {low}..{high}, but must be within 0..{limit - 1}")
    counts = torch.bincount(prediction * classes + target, minlength=predictions * classes)
    return counts.reshape(predictions, classes)


def pairwise_iou(matrix: Tensor) -> Tensor:
    """IoU of each predicted value with each class, float64 (K, C); 0 where neither has a pixel."""
    union = matrix.sum(1, keepdim=True) + matrix.sum(0, keepdim=True) - matrix
    return matrix.double() / union.clamp(min=1)


def class_iou(matrix: Tensor) -> Tensor:
    """tp / (tp + fp + fn) of each class, (C, C) -> float64 (C,); NaN for a class that occurs nowhere."""
    iou = pairwise_iou(matrix).diagonal()
    return iou.masked_fill((matrix.sum(0) + matrix.sum(1)) == 0, torch.nan)


def miou(matrix: Tensor, compat: Compat = "standard") -> float:
    """Mean IoU over classes of a (C, C) matrix.

    A class in neither prediction nor ground truth is left out (`standard`) or counts as 0 (`reference`).

    Raises:
        NecoError: not one pixel was counted.
    """
    if not matrix.any():
        raise NecoError("no labelled pixel: every mask is empty or holds only pixels to ignore (255)")
    iou = class_iou(matrix)
    return float(iou.nanmean() if compat == "standard" else iou.nan_to_num(0).mean())


def match_one_to_one(matrix: Tensor, rest: int = 0) -> Tensor:
    """Class of each predicted value, (K, C) -> int64 (K,): the assignment that maximises the sum of IoUs (Hungarian).

    Where K > C the values left over become class `rest`, the background.
    """
    # Classes in rows and costs 1 - IoU, as published: ties fall the same way.
    classes, values = linear_sum_assignment(1 - pairwise_iou(matrix).T.cpu().numpy())
    mapping = torch.full((len(matrix),), rest, device=matrix.device)
    mapping[torch.as_tensor(values)] = torch.as_tensor(classes, device=matrix.device)
    return mapping


def match_many_to_one(matrix: Tensor) -> Tensor:
    """Class of each predicted value, (K, C) -> int64 (K,): the one with the highest precision, the lowest of equals."""
    rows = matrix.cpu().numpy()  # numpy's argmax promises the first of equals; the column sum divides them all alike
    return torch.as_tensor(rows.argmax(1), device=matrix.device)


def remap(matrix: Tensor, mapping: Tensor) -> Tensor:
    """The (C, C) matrix after every predicted value k was replaced by class mapping[k]."""
    classes = matrix.shape[1]
    return matrix.new_zeros(classes, classes).index_add_(0, mapping, matrix)


def by_class(iou: Tensor, classes: Sequence[str]) -> dict[str, float | None]:
    """IoU (C,) by class name, None where a class occurs nowhere: ready for JSON."""
    return {name: None if value != value else value for name, value in zip(classes, iou.tolist(), strict=True)}


def absent(matrix: Tensor, classes: Sequence[str]) -> dict[str, list[str]]:
    """`{"absent": names}` of the classes without a pixel in the ground truth of a (K, C) matrix, {} without any."""
    names = [name for name, pixels in zip(classes, matrix.sum(0).tolist(), strict=True) if not pixels]
    return {"absent": names} if names else {}
