"""metrics.csv: one row a logged step, one column a metric."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neco import files
from neco.logger.base import About, Tracker


class Csv(Tracker):
    """Appends to metrics.csv in the run folder; a resumed run first drops the rows that it will write again."""

    path: Path
    fields: list[str]

    def start(self, about: About) -> None:
        """Evaluations have results.json, the configuration has config.yaml."""
        self.path, self.fields = about.folder / "metrics.csv", []
        if self.path.is_file():
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            kept = [
                row
                for row in rows
                if (row.get("step") or "").isdigit() and int(row["step"]) <= about.step and None not in row.values()
            ]
            self.fields = list(rows[0]) if rows else []
            self._rewrite(kept)

    def metrics(self, row: Mapping[str, float], step: int) -> None:
        """Append a row; a metric not seen before adds a column."""
        whole = {"step": step, **row}
        if new := [name for name in whole if name not in self.fields]:
            rows: list[dict[str, Any]] = []
            if self.path.is_file():
                with self.path.open(newline="") as file:
                    rows = list(csv.DictReader(file))
            self.fields += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.fields, restval="").writerow(whole)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with files.whole(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.fields, restval="")
            writer.writeheader()
            writer.writerows(rows)
