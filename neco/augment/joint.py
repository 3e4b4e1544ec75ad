"""A random crop of an image and its mask, for training on masks: scale, place, mirror, colours.

Shapes: H W pixels of the image, S of the crop's side.
"""

import numpy as np
from PIL import Image

from neco.augment import colour
from neco.config.types import MEAN

FILL = tuple(round(255 * value) for value in MEAN)  # pixels beyond the image: zero once normalised


class JointCrop:
    """uint8 image (H, W, 3) and mask (H, W) -> (S, S, 3) and (S, S): a function of the generator's state alone.

    The image is enlarged to a short side of `side` pixels (None: it stays) times a factor uniform in `scale`; a crop of
    S x S is taken at random, mirrored with probability `flip`, and each of brightness, contrast, saturation and hue
    changes with probability 1/2, by up to its `jitter`, in random order. Where the image ends within the crop, at its
    right or lower border, the mask says `ignore`. Image and mask are read in the same frame, the mask's nearest pixel.
    """

    def __init__(
        self,
        crop: int,
        *,
        side: int | None,
        scale: tuple[float, float],
        flip: float,
        jitter: tuple[float, float, float, float],
        ignore: int,
    ) -> None:
        self.crop, self.side, self.scale, self.flip, self.ignore = crop, side, scale, flip, ignore
        self.middle, self.jitter = np.array([1.0, 1.0, 1.0, 0.0]), np.array(jitter)

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        box, size, flips = self.place(rng, *mask.shape)
        chance, strength = rng.random((2, 4))
        order = rng.permutation(4)
        pixels, label = (
            np.asarray(Image.fromarray(array).resize(size, how, box=box))
            for array, how in ((image, Image.Resampling.BILINEAR), (mask, Image.Resampling.NEAREST))
        )
        if flips:
            pixels, label = pixels[:, ::-1], label[:, ::-1]
        factors = self.middle + (2 * strength - 1) * self.jitter
        changes = (chance < 0.5) & (self.jitter > 0)  # a hue turned by nothing is not quite the same
        pixels = colour.jitter(np.ascontiguousarray(pixels), order[changes[order]], factors)
        width, height = size
        whole = np.full((self.crop, self.crop, 3), FILL, np.uint8)
        labels = np.full((self.crop, self.crop), self.ignore, np.uint8)
        whole[:height, :width], labels[:height, :width] = pixels, label
        return whole, labels

    def place(
        self, rng: np.random.Generator, height: int, width: int
    ) -> tuple[tuple[float, float, float, float], tuple[int, int], bool]:
        """What is seen of the image, (x1, y1, x2, y2) in its pixels; as how many (width, height); whether mirrored."""
        factor = rng.uniform(*self.scale) * (self.side / min(height, width) if self.side else 1)
        scaled = [max(1, round(length * factor)) for length in (width, height)]
        seen = [min(length, self.crop) for length in scaled]
        starts = [int(rng.integers(length - part + 1)) for length, part in zip(scaled, seen, strict=True)]
        (x, y), (w, h) = starts, seen
        across, down = width / scaled[0], height / scaled[1]
        # the last edge may come out a rounding error beyond the image
        box = x * across, y * down, min(width, (x + w) * across), min(height, (y + h) * down)
        return box, (w, h), bool(rng.random() < self.flip)
