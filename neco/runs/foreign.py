"""Read what a run left in its folder, which may be anybody's: as data of known types, within bounds, from inside it.

Every function raises NecoError, in one line that names the file, for what is damaged, too large or not there to be
read: a link or `..` that leads out of the folder, a pipe, a device.
"""

import io
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from annotated_types import Ge, Le
from typing_extensions import TypedDict

from neco.utils.errors import NecoError
from neco.utils.yaml_file import load_yaml

MAX_BYTES = 2**28  # of a file that is read whole: a million rows of metrics.csv
MAX_DEPTH = 64  # of nested JSON
MAX_SIDE = 8192  # pixels of a picture
MAX_SHOWN = 1000  # images of a gallery

Count = Annotated[int, Ge(0), Le(2**53)]


class Picture(TypedDict):
    """What an evaluation drew: of which image (None: of all), and the file in the run folder."""

    kind: str
    file: str
    key: NotRequired[str | None]
    caption: NotRequired[str | None]


class Detail(TypedDict):
    """More about a metric: IoU by class, deviation over the seeds of the evaluation."""

    iou: NotRequired[dict[str, float | None] | None]
    std: NotRequired[float | None]


class Record(TypedDict):
    """An evaluation of a network at a step, as results.json holds it."""

    step: Count
    network: str
    evaluation: str
    weights: str
    dataset: str
    protocol: str
    metrics: dict[str, float]
    details: NotRequired[dict[str, Any]]
    asked: NotRequired[str | None]
    fraction: NotRequired[Annotated[float, Ge(0), Le(1)]]
    split: NotRequired[str | None]
    model: NotRequired[str | None]
    state: NotRequired[str | None]
    checkpoint: NotRequired[str | None]
    seconds: NotRequired[float | None]
    peak_memory_gb: NotRequired[float | None]
    saved: NotRequired[dict[str, str] | None]
    show: NotRequired[int]
    pictures: NotRequired[list[Picture]]


class Status(TypedDict):
    """How a job of a sweep ended, as status.json holds it."""

    status: str
    job: int
    overrides: list[str]
    objective: NotRequired[float | None]
    message: NotRequired[str]
    config: NotRequired[str]
    id: NotRequired[str]


class Environment(TypedDict):
    """Where a run took place, as environment.json holds it."""

    choices: NotRequired[dict[str, Any] | None]
    packages: NotRequired[dict[str, str] | None]


class Shown(TypedDict):
    """The images of a gallery and the names of the classes, as pictures/shown.json holds them."""

    keys: list[str]
    classes: list[str]


def locate_file(folder: Path, name: str) -> Path:
    """Return the path of a file of the run, which need not exist."""
    try:
        path = (root := folder.resolve()) / name
        found = path.resolve()
        if not found.is_relative_to(root):
            raise NecoError(f"{folder / name} leads out of the run folder: it is not read")
        if found.exists() and not found.is_file():
            raise NecoError(f"{folder / name} is a folder, a pipe or a device, not a file")
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a name that no file can have
        raise NecoError(f"{folder}: no file can be named {name!r:.80} ({error})") from error
    return found


def read_bytes(folder: Path, name: str, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a file of the run; nothing where there is none."""
    path = locate_file(folder, name)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise NecoError(f"{folder / name} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise NecoError(f"{folder / name} is larger than {limit >> 20} MB: it is not read")
    return data


def read_text(folder: Path, name: str) -> str:
    """Return the text of a file of the run; what is no UTF-8 is replaced."""
    return read_bytes(folder, name).decode("utf-8", "replace")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the run; nothing where there is none."""
    path = locate_file(folder, "config.yaml")
    return load_yaml(path) if path.exists() else {}


def read_json(folder: Path, name: str, kind: Any) -> Any:
    """Return what a JSON file of the run holds, as a `kind`; None where there is none."""
    if not (data := read_bytes(folder, name)):
        return None
    try:
        return check(parse_json(data), kind)
    except ValueError as error:
        raise NecoError(f"{folder / name} is damaged ({error}): mend it or move it away") from error


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of the run, in the order in which they were recorded."""
    found: list[dict[str, Any]] = read_json(folder, "results.json", list[Record]) or []
    for record in found:
        for name in record["metrics"]:
            try:
                check(record.get("details", {}).get(name), Detail | None)
            except ValueError as error:
                path = folder / "results.json"
                raise NecoError(f"{path} is damaged (details of {record['evaluation']}/{name}: {error})") from error
    return [{"asked": None, "details": {}, "fraction": 1.0, **record} for record in found]


def read_picture(folder: Path, name: str) -> np.ndarray | None:
    """Return a JPEG or PNG file as uint8 (H, W) or (H, W, 3); None where there is none."""
    from PIL import Image

    if not (data := read_bytes(folder, name)):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            if max(picture.size) > MAX_SIDE:
                raise ValueError(f"{picture.width} x {picture.height} pixels")
            return np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
    except Exception as error:  # of broken pictures PIL raises just anything
        raise NecoError(f"{folder / name} is no picture that is shown here ({error})") from error


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds. Raises ValueError for any other text, and for one that is nested too deep."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    level, depth = [found], 0
    while level:
        level = [
            each
            for part in level
            for each in (part.values() if isinstance(part, dict) else part if isinstance(part, list) else ())
            if isinstance(each, dict | list)
        ]
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    return found


def check(value: Any, kind: Any) -> Any:
    """Return the value if it has this type. Raises ValueError that says where it has not."""
    from pydantic import ValidationError

    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}{': ' if place else ''}{first['msg']}, not {first['input']!r:.60}") from None
    return value  # with keys that are not known here


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def lookup(node: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Return the value of a dotted key of a nested mapping, or the default where it has no such key."""
    found: Any = node
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return default
        found = found[part]
    return found
