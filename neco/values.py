"""Types of configuration values (checked by pydantic, see `neco.config.validate`) and the pixel statistics."""

from typing import Annotated

from annotated_types import Ge, Gt, Le

Positive = Annotated[int, Ge(1)]
NonNegative = Annotated[int, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)
