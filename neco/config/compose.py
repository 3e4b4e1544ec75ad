"""The configuration of a job, from what Hydra composed."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from neco.config import validate
from neco.config.validate import plain as resolved
from neco.utils.errors import NecoError


def settings(cfg: Any, hydra: Any) -> validate.Settings:
    """The validated configuration of a job."""
    return validate.validate(plain(cfg), choices(hydra), told(hydra))


def choices(hydra: Any) -> dict[str, Any]:
    return {k: v for k, v in hydra.runtime.choices.items() if not k.startswith("hydra/")}


@contextlib.contextmanager
def traced(hydra: Any) -> Iterator[None]:
    """Errors say where the value was set."""
    try:
        yield
    except NecoError as error:
        node, key = re.match(r"([^=:]*)(?:: (\w+)=)?", str(error)).groups()  # type: ignore[union-attr]
        if place := validate.origin(f"{node}.{key}" if key else node, told(hydra), choices(hydra)):
            raise NecoError(f"{error} [from {place}]") from error
        raise


def told(hydra: Any) -> list[str]:
    """The overrides as they were typed: `${keys}` in them are the configuration's."""
    return OmegaConf.to_container(hydra.overrides.task, resolve=False)  # type: ignore[return-value]


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration without Hydra's, resolved."""
    return resolved(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
