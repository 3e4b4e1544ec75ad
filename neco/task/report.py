"""task=report: runs beside each other and beside what is published, as a page and as tables."""

import logging
from dataclasses import dataclass
from pathlib import Path

from neco import report
from neco.config.validate import Settings
from neco.report import collect, tables
from neco.utils.text_table import columns

log = logging.getLogger(__name__)


@dataclass
class Job:
    """The runs that have results: the folders named, and those in them, as of several jobs."""

    runs: list[Path]


def prepare(settings: Settings) -> Job:
    """Find the runs. Raises NecoError where there are none."""
    return Job(collect.find(settings.run.runs))


def main(settings: Settings, job: Job, output: Path) -> None:
    """Print the numbers, write the report. Raises NecoError where no run can be read."""
    runs = report.read(job.runs)
    if (left := tables.unfinished(runs)).rows:
        log.info("\n%s\n", columns([left.head, *left.rows]))
    table = tables.headline(runs)
    log.info("\n%s\n\n%s\n", columns([table.head, *table.rows]), "\n".join(table.notes))
    for path in report.write(runs, output, settings.run.formats):
        log.info("wrote       %s", path)
