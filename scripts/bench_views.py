"""Milliseconds a worker spends on one image: decoding, then 2 + 4 views. The default beside the published pipeline.

published      written out plainly: torchvision's PIL transforms, each drawing for itself, overlap rule, boxes, floats
applier=pil    our parameters, the published operations, floats
applier=uint8  our parameters, bytes; they are normalised on the device, here added as `+ normalise`
colour=device  crops alone, which is all that a worker does then; `+ recolour` adds jitter, greyscale, blur and
               normalisation, as the device would do them

All on the same JPEG files and one thread, pass by pass in turn. An image's time is the processor time of its best pass,
so that other programs disturb little; shown is the mean over images, and over that of `uint8`.
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T
from torchvision.transforms import functional as F

from neco.augment import batched, reference
from neco.augment.colour import normalise
from neco.augment.views import Crop, Views, overlap, view_rng
from neco.config.types import MEAN, STD
from neco.dataset.base import read_image
from neco.training.align import pair_boxes

HEIGHT, WIDTH = 480, 640


def jpeg(rng: np.random.Generator) -> bytes:
    """A photograph's worth of work for a decoder: soft shapes and sensor noise, about 150 kB."""
    coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    soft = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).astype(int)
    buffer = io.BytesIO()
    noisy = (soft + rng.integers(-12, 12, soft.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2).item()))


FINISH = T.Compose(
    [
        T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.Lambda(blur)], p=0.5),
        T.ToTensor(),
        T.Normalize(MEAN, STD),
    ]
)


def published(path: Path, views: Views, index: int) -> Any:
    torch.manual_seed(index)
    image = Image.open(path).convert("RGB")
    crops: list[Crop] = []
    finished = []
    for view, (size, scale) in enumerate(zip(views.sizes, views.scales, strict=True)):
        wanted = (0.02 if view == 1 else 0.01) * image.width * image.height
        while True:
            y, x, h, w = T.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
            crop = (x, y, x + w, y + h)
            if all(overlap(crop, other) > wanted for other in crops[:2]):
                break
        crops.append(crop)
        finished.append(FINISH(F.resized_crop(image, y, x, h, w, list(size))))
    return finished, pair_boxes(torch.tensor([crops]), views.sizes, global_views=2)


def pil(path: Path, views: Views, index: int) -> Any:
    image = Image.open(path).convert("RGB")
    params = views.sample(view_rng(0, 0, index), image.height, image.width)
    pictures = (reference.view(image, size, *row) for size, *row in zip(views.sizes, *params, strict=True))
    return [F.normalize(F.to_tensor(picture), MEAN, STD) for picture in pictures]


def uint8(path: Path, views: Views, index: int) -> Any:
    image = read_image(str(path))
    return views.apply(image, views.sample(view_rng(0, 0, index), *image.shape[:2]))


def uint8_normalised(path: Path, views: Views, index: int) -> Any:
    return [normalise(group) for group in uint8(path, views, index)]


def crops_alone(path: Path, views: Views, index: int) -> Any:
    image = read_image(str(path))
    params = views.sample(view_rng(0, 0, index), *image.shape[:2])
    return views.apply(image, params.plain()), batched.parameters(params, views.largest_sigma)


def recoloured(path: Path, views: Views, index: int) -> Any:
    groups, colours = crops_alone(path, views, index)
    own = slice(views.global_views), slice(views.global_views, None)
    return [
        normalise(batched.recolour(group, *(values[part] for values in colours)))
        for group, part in zip(groups, own, strict=True)
    ]


PIPELINES: dict[str, Callable[[Path, Views, int], Any]] = {
    "published": published,
    "applier=pil": pil,
    "applier=uint8": uint8,
    "+ normalise": uint8_normalised,
    "colour=device": crops_alone,
    "+ recolour": recoloured,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=30, help="images, each with its own views (%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="passes over them (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    print(f"{WIDTH} x {HEIGHT} JPEG, 2 + 4 views, {args.images} images, best of {args.repeat}, one thread")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.jpg" for i in range(args.images)]
        for file in files:
            file.write_bytes(jpeg(rng))
        for sizes in ((518, 98), (224, 98)):
            views = Views(global_size=sizes[0], local_size=sizes[1])
            times = np.empty((args.repeat, len(PIPELINES), args.images))
            for each in times:
                for row, run in zip(each, PIPELINES.values(), strict=True):
                    for index, file in enumerate(files):
                        start = process_time()
                        run(file, views, index)
                        row[index] = 1e3 * (process_time() - start)
            cost = dict(zip(PIPELINES, times.min(axis=0).mean(axis=1), strict=True))
            for name, milliseconds in cost.items():
                ratio = milliseconds / cost["applier=uint8"]
                print(f"{sizes[0]}/{sizes[1]}  {name:14}{milliseconds:6.1f} ms", f"{ratio:5.1f}x" if ratio > 1 else "")


if __name__ == "__main__":
    main()
