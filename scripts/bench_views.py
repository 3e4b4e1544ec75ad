"""Milliseconds a worker spends on one image: decoding, 2 + 4 views. Default applier beside the published PIL pipeline.

Both make the same views of the same JPEG files on one thread, pass by pass in turn. An image's time is the processor
time of its best pass, so that other programs disturb little; shown is the mean over images. The published pipeline
ends with float tensors, the default one with bytes that are normalised on the device; the last two columns add that
step on this CPU.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F

from neco.augment import reference
from neco.augment.colour import normalise
from neco.augment.views import Views, view_rng
from neco.dataset.base import read_image
from neco.values import MEAN, STD

HEIGHT, WIDTH = 480, 640


def jpeg(rng: np.random.Generator) -> bytes:
    """A photograph's worth of work for a decoder: soft shapes and sensor noise, about 150 kB."""
    coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    soft = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).astype(int)
    buffer = io.BytesIO()
    noisy = (soft + rng.integers(-12, 12, soft.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def default(path: Path, views: Views, index: int) -> Any:
    image = read_image(str(path))
    return views.apply(image, views.sample(view_rng(0, 0, index), *image.shape[:2]))


def on_device(path: Path, views: Views, index: int) -> Any:
    return [normalise(group) for group in default(path, views, index)]


def published(path: Path, views: Views, index: int) -> Any:
    image = Image.open(path).convert("RGB")
    params = views.sample(view_rng(0, 0, index), image.height, image.width)
    pictures = (reference.view(image, size, *row) for size, *row in zip(views.sizes, *params, strict=True))
    return [F.normalize(F.to_tensor(picture), MEAN, STD) for picture in pictures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=30, help="different images, each with its own views (%(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=5, help="passes over them (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    pipelines: list[Callable[..., Any]] = [published, default, on_device]
    rng = np.random.default_rng(0)
    print(f"{WIDTH} x {HEIGHT} JPEG, 2 + 4 views, {args.images} images x {args.repeat}, one thread: ms per image")
    print(f"{'views':>8} {'published':>10} {'default':>10} {'ratio':>7} {'+ normalise':>12} {'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.jpg" for i in range(args.images)]
        for file in files:
            file.write_bytes(jpeg(rng))
        for sizes in ((518, 98), (224, 98)):
            views = Views(global_size=sizes[0], local_size=sizes[1])
            times = np.empty((len(pipelines), args.images, args.repeat))
            for repeat in range(args.repeat):
                for row, run in enumerate(pipelines):
                    for index, file in enumerate(files):
                        start = time.process_time()
                        run(file, views, index)
                        times[row, index, repeat] = 1e3 * (time.process_time() - start)
            slow, fast, full = times.min(axis=2).mean(axis=1)
            name = f"{sizes[0]}/{sizes[1]}"
            print(
                f"{name:>8} {slow:10.1f} {fast:10.1f} {slow / fast:6.1f}x {full:12.1f} {slow / full:6.1f}x", flush=True
            )


if __name__ == "__main__":
    main()
