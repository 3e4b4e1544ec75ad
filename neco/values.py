"""Types of configuration values (checked by pydantic, see `neco.config.validate`) and the pixel statistics."""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

Positive = Annotated[int, Ge(1)]
NonNegative = Annotated[int, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]  # of a running mean
Seed = Annotated[int, Ge(0), Lt(2**63)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Size = Positive | tuple[Positive, Positive]  # pixels: the side of a square, or height and width

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a `Size`."""
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)
