"""The run folder: what was asked (config, overrides), where it ran (environment) and what came out (results.json)."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neco.config.discovery import nearest
from neco.runs import foreign
from neco.utils import atomic_files
from neco.utils.errors import NecoError
from neco.utils.masking import mask_secrets
from neco.utils.text_table import columns


class Objective(NamedTuple):
    """The number that a sweep or search compares its jobs by, and which one it is: EVALUATION/NETWORK/METRIC."""

    name: str
    value: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Objective":
        """The first number of an evaluation's record."""
        metric, value = next(iter(record["metrics"].items()))
        return cls(f"{record['evaluation']}/{record['network']}/{metric}", value)


def write(path: Path, text: str, *, mask: bool = True) -> None:
    """Write a text file whole or not at all, its secrets masked. Raises NecoError if it cannot be written.

    Args:
        mask: False for names of files, which are read again.
    """
    text = mask_secrets(text) if mask else text
    try:
        with atomic_files.whole(
            path, "w", encoding="utf-8", errors="surrogateescape"
        ) as file:  # names of files are any bytes
            file.write(text)
    except OSError as error:
        raise atomic_files.refused(path, error) from error


GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")


class Results:
    """results.json: one record for each evaluation of one network at one step, rewritten whole at each change."""

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.writes = writes  # else only kept in mind: another process writes the same
        self.path = folder / "results.json"
        self.records = foreign.read_records(folder)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, in place of an earlier one that answers the same."""

        def key(r: dict[str, Any]) -> tuple:
            return r["step"], r["network"], r["evaluation"], r["asked"], r["weights"]

        self.records = [r for r in self.records if key(r) != key(record)] + [record]
        self.save()

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The record with these values: step, network, evaluation, weights, and `asked`, all else it depends on."""
        return next((r for r in self.records if wanted.items() <= r.items()), None)

    def history(self, monitor: str) -> list[tuple[int, float]]:
        """(step, number) of each evaluation so far of `EVALUATION/NETWORK/METRIC`, in order.

        Raises NecoError, with the names there are, when something was recorded and nothing is called so.
        """
        found, names = {}, set()
        asked = {r["evaluation"]: r["asked"] for r in self.records}  # of the last: numbers of one protocol and data set
        for r in (r for r in self.records if r["asked"] == asked[r["evaluation"]]):
            for metric, value in r["metrics"].items():
                names.add(name := f"{r['evaluation']}/{r['network']}/{metric}")
                if name == monitor:
                    found[r["step"]] = value
        if names and not found:
            raise NecoError(f"train.monitor={monitor}: no such number{nearest(monitor, sorted(names))}")
        return sorted(found.items())

    def drop_after(self, step: int) -> None:
        """Forget what came after `step`: a run that resumes there does it again."""
        if any(r["step"] > step for r in self.records):
            self.records = [r for r in self.records if r["step"] <= step]
            self.save()

    def save(self) -> None:
        if self.writes:
            write(self.path, json.dumps(self.records, indent=1) + "\n")


def comparison(records: list[dict[str, Any]]) -> list[list[Any]]:
    """Names of columns, then a row for each evaluation, metric and network: its numbers at the last step, and before.

    Before is step 0: a number from within a training is none of its start.
    """
    steps = {r["step"] for r in records}
    last = max(steps)
    values = ["before", "after", "change"] if {0} < steps else ["value"]
    rows: list[list[Any]] = [["dataset", "evaluation", "metric", "network", *values, "std", "protocol"]]
    for record in (r for r in records if r["step"] == last):
        same = {**{key: record[key] for key in ("network", "evaluation", "asked")}, "step": 0}
        before: dict[str, float] = next((r["metrics"] for r in records if same.items() <= r.items()), {})
        for name, value in record["metrics"].items():
            old = before.get(name)
            numbers = [old, value, None if old is None else value - old] if values[1:] else [value]
            std = (record.get("details", {}).get(name) or {}).get("std")  # over seeds of the evaluation
            about = [record["dataset"], record["evaluation"], name, record["network"]]
            rows.append([*about, *numbers, std, record["protocol"]])
    return rows


def table(records: list[dict[str, Any]]) -> str:
    """`comparison` as text; the protocols that the numbers are measured by and the last weights stand below."""
    if not records:
        return "(no evaluations)"
    head, *rows = comparison(records)
    signs = ["+" if name == "change" else "" for name in head]
    cells = [
        [percent(v, sign) if isinstance(v, int | float) else v or "" for v, sign in zip(row, signs, strict=True)]
        for row in rows
    ]
    shown = [i for i, name in enumerate(head) if name != "protocol" and (name != "std" or any(r[i] for r in cells))]
    below = ["in percent", *(f"protocol  {row[-1]}" for row in rows)]
    last = max(record["step"] for record in records)
    for record in (r for r in records if r["step"] == last):
        source = record.get("checkpoint") or (record.get("model") and f"model={record['model']}") or ""
        below.append(f"weights   {record['network']}: {record['weights']}{', ' * bool(source)}{source}")
    below += [f"warning   {text}" for r in records if r["step"] == last for text in r.get("warnings", [])]
    return "\n".join([columns([[row[i] for i in shown] for row in (head, *cells)]), *dict.fromkeys(below)])


def percent(share: float, sign: str = "") -> str:
    """Return a share (0..1) as people read it: 0.3333 is 33.33, in percent. Files for programs keep shares."""
    return f"{100 * share:{sign}.2f}"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; of one value 0), both NaN where a value is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
