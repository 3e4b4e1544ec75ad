"""Read YAML files that may come from anybody: as data, within bounds, every fault one message that names the file."""

from pathlib import Path
from typing import Any

import yaml

from neco.utils.errors import NecoError

MAX_BYTES = 2**20
MAX_VALUES = 100_000  # aliases count as what they stand for: a file of nine lines can stand for 10^9 values
MAX_DEPTH = 64


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds, `{}` for an empty file. Builds plain values only, never objects.

    Raises NecoError for a file that cannot be read, is not UTF-8, is not YAML or no mapping, or exceeds the bounds.
    """
    try:
        if path.is_fifo():
            raise NecoError(f"{path}: is a pipe, not a file")  # to open it would wait for ever
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise NecoError(f"{path}: larger than {MAX_BYTES >> 20} MB, which no configuration is")
        found = _construct(data.decode("utf-8-sig"), path)
    except OSError as error:
        raise NecoError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise NecoError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except RecursionError as error:
        raise NecoError(f"{path}: is nested more than {MAX_DEPTH} levels deep") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:  # ValueError: of dates and of numbers of 5,000 digits
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise NecoError(f"{path}{place}: is not valid YAML: {problem}") from error
    if not isinstance(found, dict | None):
        raise NecoError(f"{path}: holds a {type(found).__name__}; it must be a mapping, KEY: VALUE in each line")
    return found or {}


def _construct(text: str, path: Path) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _count_values(root, {}, 0) > MAX_VALUES:
            raise NecoError(f"{path}: stands for more than {MAX_VALUES:,} values, which no configuration does")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, known: dict[yaml.Node, int], depth: int) -> int:
    """Return how many values a node stands for, aliases written out. Raises RecursionError for one that is too deep."""
    if depth > MAX_DEPTH:  # so is one that holds itself
        raise RecursionError
    if node not in known:
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        known[node] = 1 + sum(_count_values(part, known, depth + 1) for part in parts)
    return known[node]
