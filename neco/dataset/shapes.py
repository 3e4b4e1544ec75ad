"""`shapes`: drawn scenes with exact masks, the data set that is always there.

Eight classes, background included, differ by texture and outline; colours, contrast, polarity, phase and light are
random, scale and direction a little, so that raw pixels say next to nothing about the class: structure does.
"""

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from neco.config.types import Million, NonNegative
from neco.dataset.base import Dataset, Sample, pair_samples, require_split
from neco.dataset.files import Tree
from neco.utils import atomic_files
from neco.utils.errors import NecoError
from neco.utils.progress import track

SIZE = 128  # pixels
TAU = np.float32(2 * np.pi)
Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float32) + np.float32(0.5)  # pixel centres
Rng = np.random.Generator
Texture = Callable[[Rng, np.ndarray, np.ndarray], np.ndarray]  # values at the pixels (x, y), any scale and offset
Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]  # bool: inside; unit radius, about


class Shapes(Dataset):
    """Drawn once into a folder below `root` that is named after everything the pictures depend on, then read as files.

    Args:
        root: cache folder.
        train, val: number of images of each split.
        seed: of the drawings; image i of a split is a function of (seed, split, i) alone.
    """

    classes = ("background", "stripes", "checker", "dots", "zigzag", "bricks", "grid", "blotches")
    image_size = SIZE

    def __init__(
        self, *, root: str, train: Million = 1000, val: Million = 200, seed: NonNegative = 0, **common: Any
    ) -> None:
        super().__init__(**common)
        self.root = Path(root).expanduser()
        self.counts = {"train": train, "val": val}
        self.seed = seed

    def find(self, split: str) -> list[Sample]:
        require_split(split, tuple(self.counts), "shapes")
        content = f"{Path(__file__).read_text()} {self.counts} {self.seed}"
        folder = self.root / hashlib.sha256(content.encode()).hexdigest()[:12]
        atomic_files.tidy(self.root)  # whoever died once the images had their name left an empty folder
        if not folder.is_dir():
            self._check_root()
            try:
                self._write(folder)
            except OSError as error:
                advice = "Set cache_dir (or dataset.root) to a folder that can be written to."
                raise NecoError(f"cannot write the drawn images to {folder}: {error}. {advice}") from error
        return pair_samples(*(Tree(folder / split / kind).images() for kind in ("images", "masks")))

    def _check_root(self) -> None:
        """Raises NecoError where something else lies in `root`, which was meant for another data set."""
        there = sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []
        if others := [
            name for name in there if not re.fullmatch(r"[0-9a-f]{12}|\..*", name) and name != atomic_files.CACHE_TAG
        ]:
            raise NecoError(
                f"dataset.root={self.root} holds {', '.join(others[:3])}{' ...' if others[3:] else ''}: dataset=shapes "
                "draws its images into a folder of its own. Leave dataset.root out, or choose another data set"
            )

    def _write(self, folder: Path) -> None:
        """Draw into a temporary folder, then rename it: the first process wins, nobody ever sees half a data set."""
        self.root.mkdir(parents=True, exist_ok=True)
        with atomic_files.scratch(self.root) as temporary:
            work = temporary / "shapes"
            atomic_files.make_cache_folder(work)
            for split, count in self.counts.items():
                for kind in ("images", "masks"):
                    (work / split / kind).mkdir(parents=True)
                for i in track(range(count), f"drawing shapes {split}"):
                    image, mask = draw(self.seed, split, i)
                    # subsampling 0: halved colour resolution would blur textures of one brightness away
                    Image.fromarray(image).save(work / split / "images" / f"{i:05d}.jpg", quality=95, subsampling=0)
                    Image.fromarray(mask).save(work / split / "masks" / f"{i:05d}.png")
            with ThreadPoolExecutor(16) as pool:  # one by one is 20 times slower
                list(pool.map(atomic_files.sync, work.rglob("*")))
            try:
                atomic_files.rename(work, folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same images
                    raise


def draw(seed: int, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene -> image uint8 (SIZE, SIZE, 3), mask uint8 (SIZE, SIZE) of class numbers."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 2 * index + (split == "val")]))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    image = np.empty((SIZE, SIZE, 3), np.float32)
    _paint(rng, image, mask == 0, BACKGROUNDS[rng.integers(len(BACKGROUNDS))])
    for label in rng.permutation(np.arange(1, len(Shapes.classes)))[: rng.integers(4, 8)]:
        texture, outline = OBJECTS[label - 1]
        unit, centre = rng.uniform(20, 38), rng.uniform(8, SIZE - 8, 2)
        left, top, right, bottom = np.clip([*(centre - 1.5 * unit), *(centre + 1.5 * unit)], 0, SIZE).astype(int)
        box = np.s_[top:bottom, left:right]
        inside = np.zeros((SIZE, SIZE), bool)
        inside[box] = outline(*_frame(rng, X[box], Y[box], unit, centre))
        _paint(rng, image, inside, texture)
        mask[inside] = label
    image *= _light(rng, X, Y) * (1 + 0.15 * _noise(rng, 12, 48))[..., None]  # uneven, as under leaves
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0.5, 2.5))
    return image.clip(0, 255).astype(np.uint8), mask


def _paint(rng: Rng, image: np.ndarray, inside: np.ndarray, texture: Texture) -> None:
    """Fill a region in place: a random colour that varies with the texture along a random colour direction, in a light.

    The texture gets zero mean, unit deviation and random sign: neither brightness nor contrast may tell the class.
    """
    x, y = X[inside], Y[inside]
    value = texture(rng, x, y)
    direction = rng.normal(size=3)  # of either sign
    direction *= rng.uniform(14, 32) / np.linalg.norm(direction)  # above this, raw pixels begin to match by texture
    direction /= value.std() + 1e-6
    colour = rng.uniform(45, 210, 3) - value.mean() * direction
    image[inside] = (colour.astype(np.float32) + value[:, None] * direction.astype(np.float32)) * _light(rng, x, y)


def _frame(
    rng: Rng, x: np.ndarray, y: np.ndarray, unit: float, centre: np.ndarray, turn: float = np.pi
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels -> coordinates around `centre` in units of `unit` pixels, slightly stretched, turned by up to `turn`."""
    angle, stretch = rng.uniform(-turn, turn), np.exp(rng.uniform(-0.15, 0.15))
    x, y = x - np.float32(centre[0]), y - np.float32(centre[1])
    cos, sin = np.float32(np.cos(angle) / unit), np.float32(np.sin(angle) / unit)
    return (cos * x + sin * y) * np.float32(stretch), (cos * y - sin * x) / np.float32(stretch)


def _light(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A ramp of brightness in a random direction, (..., 1)."""
    u, _ = _frame(rng, x, y, SIZE, np.full(2, SIZE / 2))
    return (np.float32(rng.uniform(0.75, 1.1)) * (1 + np.float32(rng.uniform(0, 0.6)) * u))[..., None]


def _lattice(rng: Rng, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Texture coordinates: a period of 8 to 11 pixels, any phase, within 20 degrees of upright."""
    return _frame(rng, x, y, rng.uniform(8, 11), rng.uniform(0, SIZE, 2), turn=0.35)


def _noise(rng: Rng, shortest: float, longest: float, stretch: float = 1.0) -> np.ndarray:
    """Random field (SIZE, SIZE) of periods (pixels) between the two, `stretch` times longer in one random direction."""
    fy, fx = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None]
    angle = rng.uniform(0, TAU)
    along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    frequency = np.hypot(along * stretch, across)
    spectrum = rng.standard_normal((2, *frequency.shape), np.float32)
    band = (frequency > 1 / longest) & (frequency < 1 / shortest)
    field = np.fft.irfft2((spectrum[0] + 1j * spectrum[1]) * band, s=(SIZE, SIZE))
    return (field / field.std()).astype(np.float32)


def _stripes(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.tanh(2 * np.sin(TAU * _lattice(rng, x, y)[0]))


def _checker(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    u, v = _lattice(rng, x, y)
    return np.tanh(4 * np.sin(0.7 * TAU * u) * np.sin(0.7 * TAU * v))


def _dots(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    u, v = _lattice(rng, x, y)
    waves = (np.cos(TAU * (u * np.cos(a) + v * np.sin(a))) for a in (TAU / 3, 2 * TAU / 3, TAU))
    return np.tanh(2 * (sum(waves) - 0.6))


def _zigzag(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    u, v = _lattice(rng, x, y)
    return np.tanh(2 * np.sin(TAU * (u + 1.6 * np.abs(0.7 * v % 1 - 0.5))))


def _bricks(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    u, v = _lattice(rng, x, y)
    u = 0.6 * u + 0.5 * (np.floor(v) % 2)
    return np.tanh(8 * (0.35 - np.maximum(np.abs(u % 1 - 0.5) / 0.6 - 0.33, np.abs(v % 1 - 0.5))))


def _grid(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    u, v = _lattice(rng, x, y)
    return np.tanh(4 * (np.maximum(np.cos(0.8 * TAU * u), np.cos(0.8 * TAU * v)) - 0.75))


def _blotches(rng: Rng, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.tanh(4 * _noise(rng, 9, 16)[y.astype(int), x.astype(int)])


def _background(shortest: float, longest: float, stretch: float = 1.0) -> Texture:
    return lambda rng, x, y: _noise(rng, shortest, longest, stretch)[y.astype(int), x.astype(int)]


def _polygon(radii: list[float], turn: float = 0.0) -> Outline:
    """Corners at equal angles and at these distances; inside by the even-odd rule."""
    angles = turn + TAU * np.arange(len(radii)) / len(radii)
    us, vs = radii * np.cos(angles), radii * np.sin(angles)

    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        odd = np.zeros(u.shape, bool)
        for u0, v0, u1, v1 in zip(us, vs, np.roll(us, 1), np.roll(vs, 1), strict=True):
            odd ^= ((v0 > v) != (v1 > v)) & (u < (u1 - u0) * (v - v0) / (v1 - v0) + u0)
        return odd

    return inside


BACKGROUNDS = (_background(24, 96), _background(2.5, 5), _background(3, 40), _background(4, 9, stretch=6))
OBJECTS: tuple[tuple[Texture, Outline], ...] = (
    (_stripes, lambda u, v: u**2 + v**2 < 0.8),  # disc
    (_checker, _polygon([1.15] * 4)),  # square
    (_dots, _polygon([1.25] * 3)),  # triangle
    (_zigzag, _polygon([1.15, 0.65] * 5)),  # star
    (_bricks, lambda u, v: (np.maximum(abs(u), abs(v)) < 1) & (np.minimum(abs(u), abs(v)) < 0.4)),  # cross
    (_grid, lambda u, v: abs(u**2 + v**2 - 0.56) < 0.44),  # ring
    (_blotches, lambda u, v: (u / 1.2) ** 2 + (v / 0.65) ** 2 < 1),  # ellipse
)
