"""metrics.csv: one row a logged step, one column a metric."""

import csv
import io
import logging
import shutil
from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import Any

from neco.logger.base import About, Tracker
from neco.utils import atomic_files

log = logging.getLogger(__name__)
Row = dict[str, Any]


def read(path: Path) -> tuple[list[str], list[Row]]:
    """The columns and rows of a metrics.csv, damaged ones too."""
    with path.open(newline="", errors="replace") as file:
        return parse(file.read())


def parse(text: str) -> tuple[list[str], list[Row]]:
    """The columns and rows of the text of a metrics.csv."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        return list(reader.fieldnames or []), list(reader)
    except csv.Error:  # a field of more than 128 kB
        return [], []


def is_sound(row: Row) -> bool:
    """Whether it is a step and numbers, all that there are columns for."""
    try:
        return 0 <= int(row["step"]) <= 2**53 and all(value == "" or float(value) is not None for value in row.values())
    except (KeyError, TypeError, ValueError):
        return False


class Csv(Tracker):
    """Appends to metrics.csv in the run folder; a resumed run first drops the rows that it will write again."""

    path: Path
    fields: list[str]

    def start(self, about: About) -> None:
        """Evaluations have results.json, the configuration has config.yaml."""
        self.path, self.fields = about.folder / "metrics.csv", []
        kept = []
        if self.path.is_file():
            self.fields, rows = read(self.path)
            sound = [*map(is_sound, rows)]
            if not all(sound[:-1]):  # a kill may leave half of the last
                aside = self.path.with_name("metrics.damaged.csv")
                with (
                    atomic_files.whole(aside) as file,
                    self.path.open("rb") as held,
                ):  # in place of a link, not through it
                    shutil.copyfileobj(held, file)
                log.warning("%s is damaged: kept as %s, here without the lines that cannot be read", self.path, aside)
            kept = [row for row in compress(rows, sound) if int(row["step"]) <= about.step]
            self._rewrite(kept)
        if len(kept) < (about.rows or 0):
            log.warning("%s has %d of the %d rows up to step %d", self.path, len(kept), about.rows, about.step)

    def metrics(self, row: Mapping[str, float], step: int) -> None:
        """Append a row; a metric not seen before adds a column."""
        whole = {"step": step, **row}
        if new := [name for name in whole if name not in self.fields]:
            rows = read(self.path)[1] if self.path.is_file() else []
            self.fields += new
            self._rewrite(rows)
        with atomic_files.open_for_appending(self.path, newline="") as file:
            csv.DictWriter(file, self.fields, restval="").writerow(whole)

    def _rewrite(self, rows: list[Row]) -> None:
        with atomic_files.whole(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.fields, restval="")
            writer.writeheader()
            writer.writerows(rows)
