"""What a tracker is told of a run: where it is, numbers of steps, evaluations, the table at the end, how it ended.

The keys are the same in every tracker and stay so; docs/tracking.md lists them.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from neco import run_folder
from neco.config import Settings
from neco.errors import NecoError
from neco.interrupt import Interrupted
from neco.masking import mask_nested, mask_secrets
from neco.results import Results, comparison

Ended = Literal["success", "failed", "interrupted"]
Table = Sequence[Sequence[Any]]  # rows, the first of them names
PLACES = (
    "run_dir",
    "data_root",
    "cache_dir",
    "device",
    "debug",
    "logger",
    "log_seconds",
    "launcher.",
    "sweep.",
)  # they make no other run


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

    With a number for `wait` it works in a thread of its own, where it may be slow or fail (see `neco.logger.guard`).
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


class Trackers:
    """All trackers of a run; leaving the block tells them the final table and how it ended.

    Args:
        store: the run's results; a process that does not write them has no trackers.
        step: that the run goes on from; `rows`: how many of metrics there were.
    """

    def __init__(self, settings: Settings, store: Results, step: int = 0, rows: int | None = None) -> None:
        from neco.logger.guard import Guard

        self.store, built = store, settings.build_all("logger") if store.writes else {}
        self.each = [Guard(name, each) if each.wait is not None else each for name, each in built.items()]
        self.tell("start", replace(about(settings, store.path.parent, step), rows=rows))

    def tell(self, event: str, *values: Any) -> None:
        """To all of them, without secrets."""
        values = tuple(mask_nested(value) for value in values)
        for tracker in self.each:
            tracker.tell(event, *values)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        stopped = kind and issubclass(kind, Interrupted | KeyboardInterrupt)
        if self.store.records:
            self.tell("results", comparison(self.store.records))
        self.tell("finish", "interrupted" if stopped else "failed" if kind else "success")
        for tracker in self.each:
            tracker.close()


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


def about(settings: Settings, folder: Path, step: int) -> About:
    """What trackers call a run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra: Any = HydraConfig.get() if HydraConfig.initialized() else None
    multirun = hydra and hydra.mode == RunMode.MULTIRUN
    said = [o for o in settings.overrides if not o.lstrip("+~").startswith(PLACES)]
    own = [o for o in said if not multirun or o not in sys.argv]  # what varies is not in the command line as it is
    tags = [str(settings.choices[group]) for group in ("model", "dataset", "loss") if settings.choices.get(group)]
    name, group = " ".join(own or said) or folder.name, Path(hydra.sweep.dir).name if multirun else None
    return About(folder, step, mask_nested(settings.config), mask_secrets(name), group, tags)


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
        files = (run_folder.locate_file(folder, p["file"]) for p in some)
        yield key(record, kind, "pictures"), [*zip(files, captions, strict=True)]
