"""Frozen patch features of a data set: images read and cut, the forward pass, the cache.

Shapes: N images of a split, B of a batch, H W pixels of the input, h w patches, D channels.
"""

import contextlib
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils import data
from torchvision.transforms import functional as colour

from neco.config.types import MEAN, STD, PositiveFloat, Size, Width, Workers, sides
from neco.dataset import decode
from neco.dataset.base import Dataset, Sample, mask_size, read_image, read_label, same_frame
from neco.dataset.digests import Contents, noting, store_in
from neco.distributed import collectives
from neco.distributed.devices import full_precision
from neco.distributed.workers import named_workers, stack, start_worker
from neco.features.cache import Cache, Entry, Spec
from neco.model.weights import weights_hash
from neco.utils import signals
from neco.utils.errors import NecoError
from neco.utils.progress import track
from neco.utils.random import generator


class PatchFeatures(Protocol):
    """What evaluations need of a backbone: (B, 3, H, W) normalised images -> (B, h, w, D)."""

    patch: int
    dim: int

    def __call__(self, images: Tensor, /) -> Tensor: ...


def token_grid(size: int | Sequence[int], patch: int) -> tuple[int, int]:
    """Patches (h, w) of an input."""
    height, width = sides(size)
    return height // patch, width // patch


T = TypeVar("T")
Nearest = Literal["centre", "floor"]  # which pixel stands for a cell: PIL's (the middle one) or torch's (the first)
RATIO = 4 / 3  # the most elongated crop, either way


@dataclass(frozen=True)
class Draw:
    """A random resized crop, joint with the mask, and what else is drawn for each image of one pass over a split.

    A pure function of (seed, turn, key of the image). `scale`: range of the crop's share of the area; a draw that
    doesn't fit is repeated, after ten the crop is the whole frame (as far as the ratio allows), as in torchvision.
    `flips`: half of the images, with their masks, are mirrored. `colours`: whether they are jittered. `aspect`: width
    by height of the input, which crops have up to 4/3 either way.
    """

    scale: tuple[float, float]
    seed: int
    turn: int
    flips: bool = False
    colours: bool = True
    aspect: float = 1.0

    def box(self, key: str, width: int, height: int) -> tuple[int, int, int, int]:
        """The crop (x1, y1, x2, y2) of an image, in pixels."""
        rng = generator(self.seed, self.turn, key, "crop")
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = self.aspect * math.exp(rng.uniform(-math.log(RATIO), math.log(RATIO)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return x, y, x + w, y + h
        w, h = min(width, round(height * RATIO * self.aspect)), min(height, round(width * RATIO / self.aspect))
        x, y = (width - w) // 2, (height - h) // 2
        return x, y, x + w, y + h

    def cut(self, key: str, picture: Image.Image) -> Image.Image:
        """An image, or its mask, cropped and mirrored."""
        picture = picture.crop(self.box(key, *picture.size))
        if self.flips and generator(self.seed, self.turn, key, "flip").random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return picture

    def jitter(self, key: str, image: Image.Image) -> Image.Image:
        """Brightness, contrast, saturation, hue, each by up to 0.1 and with probability 1/2, in this order."""
        if not self.colours:
            return image
        rng = generator(self.seed, self.turn, key, "colour")
        changes = (colour.adjust_brightness, 1), (colour.adjust_contrast, 1), (colour.adjust_saturation, 1)
        for change, middle in (*changes, (colour.adjust_hue, 0)):
            amount = rng.uniform(middle - 0.1, middle + 0.1)
            if rng.random() < 0.5:
                image = change(image, amount)
        return image


def resize_nearest(maps: Tensor, size: Size) -> Tensor:
    """Integer maps (B, H, W) -> (B, *size): output pixel i of n shows input pixel floor(i * H / n)."""
    return F.interpolate(maps[:, None].float(), size=sides(size), mode="nearest")[:, 0].to(maps.dtype)


class _Items(data.Dataset):
    """Image (3, H, W) and mask (H, W) of each sample, uint8; what isn't wanted is empty."""

    def __init__(
        self,
        dataset: Dataset,
        samples: Sequence[Sample],
        size: Size,
        *,
        images: bool,
        nearest: Nearest | None,
        draw: Draw | None = None,
    ) -> None:
        self.dataset, self.samples, self.size = dataset, samples, sides(size)
        self.images, self.nearest, self.draw = images, nearest, draw

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | NecoError:
        try:
            with noting(store_in(self.dataset.index).remember):
                return self._read(self.samples[index])
        except NecoError as error:  # raised, the loader would wrap it into a traceback
            return error

    def _read(self, sample: Sample) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(read_image(sample)) if self.images else None
        label = Image.fromarray(read_label(self.dataset, sample).astype(np.uint8)) if self.nearest else None
        frames = [frame.size for frame in (image, label) if frame]
        if image and sample.mask and not label:
            frames.append(mask_size(self.dataset, sample))  # read later: the features are kept
        same_frame(sample, frames[0], frames[-1])
        if self.draw:
            image = self.draw.cut(sample.key, self.draw.jitter(sample.key, image)) if image else None
            label = self.draw.cut(sample.key, label) if label else None
        frame, empty = self.size[::-1], torch.empty(0, dtype=torch.uint8)
        pixels = masks = empty
        if image:
            pixels = torch.from_numpy(np.array(image.resize(frame, Image.Resampling.BILINEAR))).permute(2, 0, 1)
        if label and self.nearest == "centre":
            masks = torch.from_numpy(np.array(label.resize(frame, Image.Resampling.NEAREST)))
        elif label:
            masks = resize_nearest(torch.from_numpy(np.array(label))[None], self.size)[0]
        return pixels, masks


def _collate(items: list[tuple[Tensor, Tensor] | NecoError]) -> list[Tensor] | NecoError:
    errors = [item for item in items if isinstance(item, NecoError)]
    return errors[0] if errors else stack(items)


class Extract:
    """How evaluations compute frozen patch features, and where they keep them. Nothing here changes results.

    Args:
        batch_size: images a forward pass.
        workers: processes that decode and resize; 0 = this one; `auto` as `train.workers`.
        device: where the backbone is moved; `auto` leaves it where it is.
        cache_dir: folder in which the features of backbones with parameters are kept; null = nowhere.
        cache_gb: bound of that folder, in 10^9 bytes; what was not used for longest goes first.
    """

    def __init__(
        self,
        *,
        batch_size: Width = 32,
        workers: Workers = "auto",
        device: str | torch.device = "auto",
        cache_dir: str | None = None,
        cache_gb: PositiveFloat = 50.0,
    ) -> None:
        self.batch_size = batch_size
        self.workers = workers
        self.device = device
        self.cache = Cache(Path(cache_dir).expanduser() if cache_dir else None, cache_gb)

    def __call__(
        self,
        backbone: PatchFeatures,
        dataset: Dataset,
        samples: Sequence[Sample],
        size: Size,
        *,
        draw: Draw | None = None,
        what: str = "images",
    ) -> np.ndarray:
        """All features of `samples` at a size: float32 (N, h, w, D), memory-mapped where the cache has them."""
        shape = *token_grid(size, backbone.patch), backbone.dim
        spec = self._spec(backbone, samples, size, STD, draw)
        contents = _contents(spec, dataset, samples)
        if (cached := self.cache.find(spec, contents)) is not None:
            return cached
        items = _Items(dataset, samples, size, images=True, nearest=None, draw=draw)
        if spec and self.cache.fits((len(samples), *shape)):  # never all of them in memory
            for _ in self._compute(spec, contents, backbone, items, STD, what):
                pass
            if (cached := self.cache.find(spec, contents)) is not None:
                return cached
        features = np.empty((len(samples), *shape), np.float32)
        for rows, part, _ in self._compute(spec, contents, backbone, items, STD, what):
            features[rows] = part
        return features

    def stream(
        self,
        backbone: PatchFeatures,
        dataset: Dataset,
        samples: Sequence[Sample],
        size: Size,
        *,
        nearest: Nearest | None = "centre",
        std: tuple[float, float, float] = STD,
        draw: Draw | None = None,
        keep: bool = True,
        what: str = "images",
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """One pass: yields rows of `samples`, features float32 (B, h, w, D) and masks uint8 (B, H, W), on the CPU.

        Images and masks are squashed to `size`, images by PIL's antialiased bilinear. The backbone is in evaluation
        mode during each forward pass, and as it was in between; no random state is touched.

        Args:
            nearest: how masks are resized; None yields empty ones, without reading them.
            std: of the normalisation.
            draw: random crop and jitter; None = the whole image.
            keep: use the cache; not for what is drawn once and never again.
            what: is extracted, for the progress display.
        """
        if not samples:
            return
        spec = self._spec(backbone, samples, size, std, draw) if keep else None
        contents = _contents(spec, dataset, samples)
        cached = self.cache.find(spec, contents)
        items = _Items(dataset, samples, size, images=cached is None, nearest=nearest, draw=draw)
        if cached is not None:
            parts = self._load(items, f"masks of {what}") if nearest else self._rows(len(samples))
            for rows, (_, masks) in parts:
                yield rows, torch.from_numpy(np.array(cached[rows])), masks
            return
        yield from self._compute(spec, contents, backbone, items, std, what)

    def _compute(
        self,
        spec: Spec | None,
        contents: Contents | None,
        backbone: PatchFeatures,
        items: _Items,
        std: tuple[float, float, float],
        what: str,
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """What `stream` yields, and into the cache with it."""
        batches = self._load(items, f"features of {what}")
        begun = ((rows, self._begin(backbone, images, std), masks) for rows, (images, masks) in batches)
        with Entry(self.cache, spec, contents) as entry:
            for rows, found, masks in _behind(begun):  # a GPU has always something to compute
                features = found()
                entry.write(features.numpy())
                yield rows, features, masks

    def masks(
        self, dataset: Dataset, samples: Sequence[Sample], size: Size, *, nearest: Nearest = "centre"
    ) -> Iterator[tuple[slice, Tensor]]:
        """The masks alone, as `stream` yields them: rows of `samples` and uint8 (B, H, W)."""
        items = _Items(dataset, samples, size, images=False, nearest=nearest)
        for rows, (_, masks) in self._load(items, "masks"):
            yield rows, masks

    def _load(self, items: _Items, what: str) -> Iterator[tuple[slice, list[Tensor]]]:
        loader = data.DataLoader(
            items,
            self.batch_size,
            num_workers=self.readers,
            collate_fn=_collate,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else the loader draws a seed from the global one
        )
        start = 0
        with signals.held():
            batches = iter(loader)
        with named_workers():
            for batch in track(batches, what, total=len(loader)):
                if isinstance(batch, NecoError):
                    raise batch
                rows = slice(start, min(start + self.batch_size, len(items)))
                yield rows, batch
                start = rows.stop

    def _rows(self, images: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """What `_load` yields when there is nothing to read."""
        for start in range(0, images, self.batch_size):
            yield slice(start, min(start + self.batch_size, images)), [torch.empty(0, dtype=torch.uint8)] * 2

    def forward(self, backbone: PatchFeatures, images: Tensor, std: tuple[float, float, float] = STD) -> Tensor:
        """Images uint8 (B, 3, H, W) -> features float32 (B, h, w, D), on the CPU. Raises NecoError for others."""
        return self._begin(backbone, images, std)()

    @property
    def readers(self) -> int:
        """`workers` as a number."""
        return collectives.readers(self.workers, self.device)

    @torch.no_grad()
    def _begin(self, backbone: PatchFeatures, images: Tensor, std: tuple[float, float, float]) -> Callable[[], Tensor]:
        """Start `forward`; what is returned waits for its result, but not for what a GPU is given to do after it."""
        device = self.place(backbone)
        pixels = collectives.send(images, device).float().div(255).sub(_on(device, MEAN)).div(_on(device, std))
        training = [part for part in _modules(backbone) if part.training]
        for part in training:
            part.training = False
        try:
            with torch.autocast(device.type, enabled=False), full_precision():
                features = backbone(pixels).float().contiguous()  # here, not by the copy
        finally:
            for part in training:
                part.training = True
        wanted = (len(images), *token_grid(images.shape[2:], backbone.patch), backbone.dim)
        if features.shape != wanted:
            raise NecoError(f"{type(backbone).__name__} gave features of shape {tuple(features.shape)}, not {wanted}")
        finite, done = features.isfinite().all(), None
        if device.type == "cuda":
            done = torch.cuda.current_stream(device).record_event()

        def result() -> Tensor:
            with _beside(device, done):
                found, sound = features.cpu(), bool(finite)
            if not sound:
                raise NecoError(
                    f"{type(backbone).__name__} gave features that are not finite: its weights are unusable"
                )
            return found

        return result

    def place(self, backbone: PatchFeatures) -> torch.device:
        """Move the backbone where it shall work; the device."""
        if isinstance(backbone, nn.Module) and self.device != "auto":
            backbone.to(self.device)
        return next((p.device for part in _modules(backbone) for p in part.parameters()), torch.device("cpu"))

    def _spec(
        self,
        backbone: PatchFeatures,
        samples: Sequence[Sample],
        size: Size,
        std: tuple[float, float, float],
        draw: Draw | None,
    ) -> Spec | None:
        """Everything that features depend on but what the images hold; None where none are kept, or without weights."""
        if self.cache.folder is None or not isinstance(backbone, nn.Module) or not [*backbone.parameters()]:
            return None
        sources = {inspect.getfile(used) for used in (Extract, decode.read_pixels, type(backbone))}
        return {
            "weights": weights_hash(backbone),
            "network": [(name, type(part).__qualname__, _settings(part)) for name, part in backbone.named_modules()],
            "computed": ("float32", self.place(backbone).type),
            "normalisation": (MEAN, std),
            "size": sides(size),
            "draw": asdict(draw) if draw else None,
            "samples": [(sample.key, sample.range) for sample in samples],
            "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "pillow")},
            "source": [hashlib.sha256(Path(source).read_bytes()).hexdigest() for source in sorted(sources)],
        }


def _contents(spec: Spec | None, dataset: Dataset, samples: Sequence[Sample]) -> Contents | None:
    """What the images hold; None where features are not kept."""
    return Contents([sample.image for sample in samples], dataset.index) if spec else None


def _behind(items: Iterable[T]) -> Iterator[T]:
    """Each item when the next one is there, the last one then."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


@contextlib.contextmanager
def _beside(device: torch.device, done: torch.cuda.Event | None) -> Iterator[None]:
    """A block whose copies from a GPU wait for an event alone; without one it is any other."""
    if done is None:
        yield
        return
    stream = _stream(device)
    stream.wait_event(done)
    with torch.cuda.stream(stream):
        yield


@functools.cache  # memory is kept for each stream
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache  # a fresh tensor each time would be a copy to the device that the host waits for
def _on(device: torch.device, colours: tuple[float, float, float]) -> Tensor:
    """A number for each colour, to compute with images (B, 3, H, W)."""
    return torch.tensor(colours, device=device).reshape(3, 1, 1)


def _modules(backbone: PatchFeatures) -> list[nn.Module]:
    return [*backbone.modules()] if isinstance(backbone, nn.Module) else []


def _settings(part: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module: heads, scales, interpolation rule and the like, which no weight shows."""
    plain = (bool, int, float, str, tuple, type(None))
    return {key: value for key, value in vars(part).items() if isinstance(value, plain) and key != "training"}
