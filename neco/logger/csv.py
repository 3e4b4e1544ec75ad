"""metrics.csv: one row a logged step, one column a metric."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only


class Csv(Logger):
    """Appends to metrics.csv in the run folder; a resumed run first drops the rows that it will write again."""

    def __init__(self, *, folder: Path, step: int = 0) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.fields: list[str] = []
        if self.path.is_file():
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            kept = [
                row
                for row in rows
                if (row.get("step") or "").isdigit() and int(row["step"]) <= step and None not in row.values()
            ]
            self.fields = list(rows[0]) if rows else []
            self._rewrite(kept)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; a metric not seen before adds a column. Evaluations have results.json instead."""
        if any(name.startswith("eval/") for name in metrics):
            return
        row = {"step": step, **metrics}
        if new := [name for name in row if name not in self.fields]:
            rows: list[dict[str, Any]] = []
            if self.path.is_file():
                with self.path.open(newline="") as file:
                    rows = list(csv.DictReader(file))
            self.fields += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.fields, restval="").writerow(row)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.fields, restval="")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)
