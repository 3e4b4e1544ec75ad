"""Types of configuration values (checked by pydantic, see `neco.config.validate.validate`) and the pixel statistics."""

import dataclasses
import fractions
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, Predicate


@dataclasses.dataclass(frozen=True)
class Components:
    """Marks a parameter, by `Annotated`, that takes a mapping of components: nodes of this group by any name."""

    group: str


def share(value: float | str) -> float:
    """A `Share` as a number. Raises ValueError or ZeroDivisionError for text that is none."""
    return float(fractions.Fraction(value))


def number_in_0_1_or_text_like_1_8(text: str) -> bool:  # pydantic's message is this name
    try:
        return 0 < share(text) <= 1
    except (ValueError, ZeroDivisionError):
        return False


def text_of_one_line(text: str) -> bool:
    return text.isprintable()


Positive = Annotated[int, Ge(1)]
NonNegative = Annotated[int, Ge(0)]
# What nobody means to be more is bounded: a zero too many is found out before it takes all memory or processes.
Few = Annotated[int, Ge(1), Le(1000)]
NoneOrFew = Annotated[int, Ge(0), Le(1000)]
Workers = NoneOrFew | Literal["auto"]  # see `neco.distributed.collectives.readers`
Width = Annotated[int, Ge(1), Le(2**16)]  # channels, or images at once
Pixels = Annotated[int, Ge(1), Le(2**14)]  # of a side: as many as the largest image has
Million = Annotated[int, Ge(1), Le(10**6)]
Factor = Annotated[float, Ge(0), Le(100)]
Fraction = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]  # of a running mean
Seed = Annotated[int, Ge(0), Lt(2**63)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
Share = PositiveFraction | Annotated[str, Predicate(number_in_0_1_or_text_like_1_8)]  # 0.1 or "1/8"
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Line = Annotated[str, Predicate(text_of_one_line)]
Size = Pixels | tuple[Pixels, Pixels]  # pixels: the side of a square, or height and width

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a `Size`."""
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)
