"""Reports of runs: collect.py reads them, tables.py and charts.py say it; a writer for each kind of file."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from neco.distributed import collectives
from neco.report import collect, html, latex, markdown, tables
from neco.runs.results import write as write_text
from neco.utils.errors import NecoError
from neco.utils.masking import print_line

log = logging.getLogger(__name__)


def write(runs: Sequence[collect.Run], folder: Path, formats: Iterable[str]) -> list[Path]:
    """Write `report.html`, `.md`, `.tex` and `.csv` of these runs, as far as they are wanted; returns the files."""
    several = len(runs) > 1
    extra = map(tables.sweep, collect.sweeps(runs)) if several else (table for _, table in tables.classes(runs[0]))
    found = [
        *([tables.unfinished(runs)] if several else []),
        tables.headline(runs),
        *extra,
        *([tables.settings(runs)] if several else []),
        tables.costs(runs),
    ]
    shown, title = [table for table in found if table.rows], html.title(runs)
    writers = {
        "html": (".html", lambda path: html.write(path, runs)),
        "markdown": (".md", lambda path: write_text(path, markdown.markdown(title, shown))),
        "latex": (".tex", lambda path: write_text(path, latex.latex(shown))),
        "csv": (".csv", lambda path: write_text(path, tables.headline(runs, numbered=False, digits=6).csv())),
    }
    written = []
    for form, (suffix, writer) in writers.items():
        if form in formats:
            written.append(folder / f"report{suffix}")
            writer(written[-1])
    return written


def read(paths: Sequence[Path]) -> list[collect.Run]:
    """The runs of these folders; what is damaged is left out with a warning. Raises NecoError where none is left."""
    runs = []
    for path, label in zip(paths, collect.labels(paths), strict=True):
        try:
            runs.append(collect.read(path, label))
        except NecoError as error:
            log.warning("left out    %s", error)
    if not any(run.numbers for run in runs):
        left = "".join(f"; {run.label} {run.unfinished}" for run in runs[:3] if run.unfinished)
        raise NecoError(f"none of {len(paths)} runs has a number that can be read{left or '; see above'}")
    return collect.told_apart(runs)


def of_run(folder: Path) -> None:
    """End a run with its page. What goes wrong here is a warning: the run is done."""
    if page := _page(folder, lambda: [collect.read(folder)]):
        log.info("report      %s", page)


def of_sweep(folder: Path) -> None:
    """End a sweep with the page of all its jobs, as `of_run`; printed, as what is logged is of jobs."""
    if page := _page(folder, lambda: read(collect.find([str(folder)]))):
        print_line(f"report {page}")


def _page(folder: Path, runs: Callable[[], list[collect.Run]]) -> Path | None:
    if collectives.leader():
        try:
            return write(runs(), folder, ["html"])[0]
        except Exception as error:
            log.warning("no report: %s: %s", type(error).__name__, error)
    return None
