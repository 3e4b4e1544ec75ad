"""One view of an image as the published code makes it: PIL through torchvision. Slow; for parity."""

import numpy as np
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from neco.config.types import sides


def view(
    image: Image.Image,
    size: int | tuple[int, int],
    crop: np.ndarray,
    jitter: bool,
    order: np.ndarray,
    factors: np.ndarray,
    grey: bool,
    sigma: float,
) -> Image.Image:
    """RGB image -> RGB image of `size`, a side or (h, w); the parameters are a row of `ViewParams`."""
    x1, y1, x2, y2 = crop.tolist()
    image = F.resized_crop(image, y1, x1, y2 - y1, x2 - x1, list(sides(size)))
    if jitter:
        steps = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
        for step in order:
            image = steps[step](image, float(factors[step]))
    if grey:
        image = F.to_grayscale(image, 3)
    return image.filter(ImageFilter.GaussianBlur(float(sigma))) if sigma else image
