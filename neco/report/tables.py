"""The tables of a report, as text for every writer. Numbers are in percent unless they name a unit."""

import csv
import io
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neco.report.collect import Number, Plot, Run, differing
from neco.utils.escape import for_csv

MARK = "* measured by another protocol than the published number: docs/evaluate.md"
COMPARED = "Before: what is compared with, as nothing was trained."
NOTE = "In percent. Only published weights, before and after post-training, on all of val, have published numbers."


@dataclass(frozen=True)
class Table:
    """Cells of text; `notes` stand below."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: Sequence[str] = ()

    def numeric(self, column: int) -> bool:
        """Whether a column is one of numbers."""
        cells = [row[column] for row in self.rows if row[column]]
        return column > 0 and bool(cells) and all(re.fullmatch(r"[-+]?[\d.]+( ± .*)?", cell) for cell in cells)

    def csv(self) -> str:
        """As comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([for_csv(c) for c in row] for row in (self.head, *self.rows))
        return text.getvalue()


def headline(runs: Sequence[Run], numbered: bool = True, digits: int = 1) -> Table:
    """Every number before, after and beside what is published. `numbered`: protocols are notes below."""
    protocols = [*dict.fromkeys(number.protocol for run in runs for number in run.numbers)]
    trained = any(number.before is not None for run in runs for number in run.numbers)
    head = ["run", "model", "network", "weights", "from", "data set", "evaluation", "metric", "before"]
    head += ["published before", "after" if trained else "measured", "std", "change", "published", "protocol"]
    rows = []
    for run in runs:
        for n in run.numbers:
            place = str(protocols.index(n.protocol) + 1) if numbered else n.protocol
            change = _change(None if n.before is None else n.value - n.before, digits)
            earlier = "; ".join(n.beside(known, n.before) for known in n.published_before)
            later = "; ".join(n.beside(known, n.value) for known in n.published)
            what = [run.label, n.model, n.network, n.weights, n.source, n.dataset + n.part, n.evaluation, n.metric]
            figures = [_figure(value, digits) for value in (n.before, n.value, n.std)]
            rows.append([*what, figures[0], earlier, *figures[1:], change, later, place])
    notes = [NOTE, *([MARK] if any("*)" in cell for row in rows for cell in row) else [])]
    notes += [COMPARED] if trained and any(not r.steps[1] for r in runs if r.numbers) else []
    if numbered:
        notes += [f"Protocol {i}: {protocol}" for i, protocol in enumerate(protocols, 1)]
    return compact(Table("Numbers", head, rows, notes), () if len(runs) > 1 else ("run",))


def compact(table: Table, without: Sequence[str] = ()) -> Table:
    """The table without empty columns and those named."""
    kept = [i for i, name in enumerate(table.head) if name not in without and any(row[i] for row in table.rows)]
    return Table(table.title, [table.head[i] for i in kept], [[r[i] for i in kept] for r in table.rows], table.notes)


def unfinished(runs: Sequence[Run]) -> Table:
    """The runs that have not come to their end, and why: what they have is no result, or not all of it."""
    return Table("Not done", ["run", "how it ended"], [[run.label, run.unfinished] for run in runs if run.unfinished])


def classes(run: Run) -> Iterator[tuple[Number, Table]]:
    """IoU of each class, of the network that counts: what gained most first."""
    for n in run.result:
        rows = []
        for name, value in n.iou.items():
            before = n.iou_before.get(name)
            change = None if value is None or before is None else 100 * (value - before)
            cells = [_figure(None if v is None else 100 * v) for v in (before, value)]
            rows.append((-(change or 0), [name, *cells, _change(change)]))
        if rows:
            head = ["class", "before", "after" if n.iou_before else "IoU", "change"]
            ordered = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
            yield n, compact(Table(f"IoU by class: {n.name}, {n.network}", head, ordered))


def sweep(plot: Plot) -> Table:
    """The points of a plot."""
    places = sorted({point[0] for points in plot.lines.values() for point in points})
    rows = []
    for label, points in plot.lines.items():
        held = {x: f"{mean:.1f} ± {std:.1f} ({n})" if n > 1 else f"{mean:.1f}" for x, mean, std, n in points}
        rows.append([label, *(held.get(x, "") for x in places)])
    head = [plot.categories[int(x)] if plot.categories else f"{x:g}" for x in places]
    notes = ["± standard deviation, (how many runs)"] if any("±" in cell for row in rows for cell in row) else []
    return Table(f"{plot.title} over {plot.key}", [plot.key, *head], rows, notes)


def settings(runs: Sequence[Run]) -> Table:
    """What the runs were told that differs."""
    said = differing(runs, seeds=True)
    rows = [[run.label, *(values[i] for values in said.values())] for i, run in enumerate(runs)]
    return Table("What differs", ["run", *said], rows if said else [])


def costs(runs: Sequence[Run]) -> Table:
    """Time and memory of trainings and evaluations."""
    rows = []
    for run in runs:
        if speed := run.curves.get("images_per_second"):
            batch = (run.config.get(run.config.get("task", "")) or {}).get("batch_size")
            spans = [
                (step - last, rate) for last, (step, rate) in zip([0.0, *(x for x, _ in speed)], speed, strict=False)
            ]
            spent = sum(steps * batch / rate for steps, rate in spans if rate) if isinstance(batch, int) else None
            peak = max((value for _, value in run.curves.get("peak_memory_gb", [])), default=None)
            cells = [_figure(spent, 0), _figure(peak, 2), _figure(statistics.median(rate for _, rate in speed))]
            rows.append([run.label, "training", "", _figure(speed[-1][0], 0), *cells])
        once = {(r["evaluation"], r["step"], r["weights"], r["asked"]): r for r in reversed(run.records)}
        for r in reversed(once.values()):
            cells = [_figure(r.get("seconds")), _figure(r.get("peak_memory_gb"), 2), ""]
            rows.append([run.label, r["evaluation"], r["network"], str(r["step"]), *cells])
    head = ["run", "what", "network", "step", "seconds", "peak memory, GB", "images/s"]
    return compact(Table("Time and memory", head, rows), () if len(runs) > 1 else ("run",))


def _change(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{round(value, digits) + 0:+.{digits}f}"  # + 0: none is -0.0


def _figure(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
