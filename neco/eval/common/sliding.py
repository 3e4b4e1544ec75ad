"""Segmentation by sliding windows: a whole segmenter on images of any shape, scored against masks at their own size.

Shapes: H W pixels of the image, H' W' as the network sees it, S of a window's side, C classes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils import data

from neco.config.types import MEAN, STD
from neco.dataset.base import Dataset, Sample
from neco.dataset.inspect import read_pair
from neco.distributed import collectives
from neco.distributed.devices import full_precision
from neco.distributed.workers import named_workers, start_worker
from neco.eval.common.metrics import absent, by_class, class_iou, confusion, miou
from neco.eval.evaluation import Result, labelled
from neco.features.extractor import Extract
from neco.report.pictures import predictions, shown
from neco.utils import signals
from neco.utils.errors import NecoError
from neco.utils.progress import track


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin: every `stride` pixels, the last one at the border. `length` is at least `window`."""
    return [*range(0, length - window, stride), length - window]


@torch.no_grad()
def slide(network: nn.Module, image: Tensor, window: int, stride: int, batch: int = 32) -> Tensor:
    """Scores of a normalised image, (3, H', W') -> (C, H', W'): means over the windows that show a pixel.

    Both sides are at least `window`; `batch` windows are computed at once.
    """
    corners = [(y, x) for y in starts(image.shape[1], window, stride) for x in starts(image.shape[2], window, stride)]
    scores, count = image.new_zeros(()), image.new_zeros(image.shape[1:])
    for first in range(0, len(corners), batch):
        part = corners[first : first + batch]
        found = network(torch.stack([image[:, y : y + window, x : x + window] for y, x in part]))
        if not first:
            scores = found.new_zeros(found.shape[1], *image.shape[1:])
        for (y, x), own in zip(part, found, strict=True):
            scores[:, y : y + window, x : x + window] += own
            count[y : y + window, x : x + window] += 1
    return scores / count


class SlidingWindows:
    """mIoU of a segmenter on val: short side of `side` pixels, windows of `crop`, mean scores, bilinear to (H, W).

    Args:
        side: of what the network sees; None: the image as it is, unless its short side is below `crop`: then `crop`.
        stride: pixels from one window to the next.
        decoder: what the protocol calls the network.
    """

    def __init__(self, crop: int, *, side: int | None, stride: int, trained: str = "segmenter") -> None:
        self.crop, self.side, self.stride, self.trained = crop, side, stride, trained

    def plan(self, patch: int, dataset: Dataset) -> tuple[str, list[Sample]]:
        """What the numbers depend on: the protocol and the images. Raises NecoError where there are no labels."""
        return self.protocol, labelled(dataset, "val")

    @property
    def protocol(self) -> str:
        """Name of what is computed."""
        side = f"side={self.side}" if self.side else f"own_size>={self.crop}"
        return f"segmentation/{self.trained}/{side}/window={self.crop}/stride={self.stride}/full_size"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') of an image of (H, W)."""
        short = min(height, width)
        factor = (self.side or max(short, self.crop)) / short
        return round(height * factor), round(width * factor)

    def __call__(
        self, network: nn.Module, dataset: Dataset, *, extract: Extract | None = None, seed: int = 0, show: int = 0
    ) -> Result:
        """Evaluate a network (B, 3, S, S) -> (B, C, S, S), which is left in the mode it was in. `seed` changes nothing.

        Several processes share the images. `show`: so many are drawn with what is predicted.

        Returns: metrics `miou` and `accuracy` (of pixels); details: IoU by class.
        """
        extract = extract or Extract()
        device = extract.place(network)  # type: ignore[arg-type]
        classes, whole = len(dataset.classes), labelled(dataset, "val")
        samples, some = collectives.share(whole), shown(whole, show)
        wanted, drawn = {sample.key for sample in some}, {}
        matrix = torch.zeros(classes, classes, dtype=torch.int64)
        mean, std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (MEAN, STD))
        training = network.training
        network.eval()
        try:
            with torch.autocast(device.type, enabled=False), full_precision():
                pairs = self._load(dataset, samples, extract.readers)
                for sample, (image, mask) in zip(samples, pairs, strict=True):
                    pixels = image.to(device).float().div(255).sub(mean).div(std)
                    scores = slide(network, pixels, self.crop, self.stride, extract.batch_size)
                    predicted = F.interpolate(scores[None], size=mask.shape, mode="bilinear")[0].argmax(0)
                    matrix += confusion(predicted, mask.to(device), classes, classes).cpu()
                    if sample.key in wanted:
                        drawn[sample.key] = predicted.cpu()
        finally:
            network.train(training)
        matrix = collectives.total(matrix)
        metrics = {"miou": miou(matrix), "accuracy": float(matrix.diagonal().sum() / matrix.sum())}
        iou = by_class(class_iou(matrix), dataset.classes)
        details = {"miou": {"iou": iou, **absent(matrix, dataset.classes)}}
        labels = {key: label for part in collectives.merge(drawn) for key, label in part.items()}
        pictures = predictions(dataset, some, [labels[sample.key] for sample in some], matrix)
        return Result(self.protocol, metrics, details, pictures=pictures)

    def _load(self, dataset: Dataset, samples: Any, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 (3, H', W') and masks (H, W), one by one."""
        loader = data.DataLoader(
            _Pairs(self, dataset, samples),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else the loader draws a seed from the global one
        )
        with signals.held():
            pairs = iter(loader)
        with named_workers():
            for pair in track(pairs, "segmenting", total=len(samples)):
                if isinstance(pair, NecoError):
                    raise pair
                yield pair


class _Pairs(data.Dataset):
    def __init__(self, windows: SlidingWindows, dataset: Dataset, samples: Any) -> None:
        self.windows, self.dataset, self.samples = windows, dataset, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | NecoError:
        try:
            image, mask = read_pair(self.dataset, self.samples[index])
        except NecoError as error:  # raised, the loader would wrap it into a traceback
            return error
        height, width = self.windows.size(*image.shape[:2])
        seen = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        assert mask is not None  # see `labelled`
        return torch.from_numpy(np.array(seen)).permute(2, 0, 1), torch.from_numpy(mask.astype(np.uint8))
