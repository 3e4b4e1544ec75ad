"""What a tracker is told of a run: where it is, numbers of steps, evaluations, the table at the end, how it ended.

The keys are the same in every tracker and stay so; docs/tracking.md lists them.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from neco.runs import foreign
from neco.utils.errors import NecoError

Ended = Literal["success", "failed", "interrupted"]
Table = Sequence[Sequence[Any]]  # rows, the first of them names


@dataclass(frozen=True)
class About:
    """The run: its folder, the step it goes on from, its configuration and names for people.

    Attributes:
        name: the overrides; in a multirun those that are this job's own.
        group: the folder of the multirun, if it is one.
        tags: the options chosen for model, dataset and loss.
        rows: so many were there at this step; None where that is not known.
    """

    folder: Path
    step: int
    config: Mapping[str, Any]
    name: str
    group: str | None
    tags: Sequence[str]
    rows: int | None = None


class Tracker:
    """Told what happens, in this order; `wait` seconds are given to it after the end.

    With a number for `wait` it works in a thread of its own (`neco.logger.background`), where it may be slow or fail.
    Constructing does nothing but import: a package that is missing is noticed before anything else is done.
    """

    wait: float | None = None
    rest = ""  # what to do for what was not sent

    def start(self, about: About) -> None:
        """A run begins, or goes on."""

    def metrics(self, row: Mapping[str, float], step: int) -> None:
        """Numbers of a training step, as in metrics.csv."""

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """A record of results.json; `numbers`, `classes` and `pictures` are its parts."""

    def results(self, table: Table) -> None:
        """Numbers before and after."""

    def finish(self, ended: Ended) -> None:
        """Nothing more will come."""

    def tell(self, event: str, *values: Any) -> None:
        """Call the method of this name."""
        getattr(self, event)(*values)

    def close(self) -> None:
        """Called last: what was told is done or given up."""


def library(module: str, package: str) -> Any:
    """Import what a tracker uses, of the package that pip installs. Raises NecoError where it is missing or broken."""
    name = module.rpartition(".")[2]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NecoError(f"{name} is not installed ({error}): pip install {package}") from error
    except (Exception, SystemExit) as error:
        raise NecoError(
            f"{name} cannot be imported ({type(error).__name__}: {error}): install it again (pip install {package}) "
            "or leave it out"
        ) from error


def key(record: Mapping[str, Any], last: str, first: str = "eval") -> str:
    """`eval/<evaluation>/<network>/<last>`."""
    return f"{first}/{record['evaluation']}/{record['network']}/{last}"


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record by their keys."""
    return {key(record, name): value for name, value in record["metrics"].items()}


def classes(record: Mapping[str, Any]) -> Table:
    """The IoU of each class, a column for each metric that has one; empty where none has."""
    found = {name: part["iou"] for name, part in record["details"].items() if isinstance(part, dict) and "iou" in part}
    names = dict.fromkeys(name for iou in found.values() for name in iou)
    return [["class", *found], *([name, *(iou.get(name) for iou in found.values())] for name in names)] if found else []


def pictures(record: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, list[tuple[Path, str]]]]:
    """The files and captions of what was drawn, by `pictures/<evaluation>/<network>/<kind>`."""
    drawn = record.get("pictures", [])
    for kind in dict.fromkeys(picture["kind"] for picture in drawn):
        some = [p for p in drawn if p["kind"] == kind]
        captions = [": ".join(filter(None, (p.get("key"), p.get("caption")))) for p in some]
        files = (foreign.locate_file(folder, p["file"]) for p in some)
        yield key(record, kind, "pictures"), [*zip(files, captions, strict=True)]
