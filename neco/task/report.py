"""task=report: the numbers of runs beside each other and beside what is published."""

import csv
import glob
import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from neco import published
from neco.config import Settings
from neco.errors import NecoError
from neco.results import Results, columns, markdown, write

log = logging.getLogger(__name__)
HEAD = ["run", "model", "weights", "data set", "evaluation", "metric"]
HEAD.extend(["measured", "published", "difference", "protocol"])


@dataclass
class Job:
    """The runs that have results: the folders named, and those in them, as of several jobs."""

    runs: list[Path]


def prepare(settings: Settings) -> Job:
    """Find the runs. Raises NecoError where there are none."""
    patterns = [str(Path(pattern).expanduser()) for pattern in settings.run.runs]
    named = [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern))]
    found = [[path / "results.json", *sorted(path.glob("*/results.json"))] for path in named]
    runs = [*dict.fromkeys(file.parent for files in found for file in files if file.is_file())]
    if not runs:
        told = f"runs=[{','.join(settings.run.runs)}]: {len(named)} folders fit, none has a results.json"
        raise NecoError(f"{told}; name run folders: runs=[runs/train/*,runs/eval/*]")
    return Job(runs)


def main(settings: Settings, job: Job, output: Path) -> None:
    """Print and write the table."""
    rows = []
    for run in job.runs:
        try:
            rows += [*table(run)]
        except NecoError as error:
            log.warning("left out    %s", error)
    if not rows:
        raise NecoError(f"none of {len(job.runs)} runs has a number that can be read; see above")
    log.info("\n%s", columns([HEAD, *rows]))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEAD, *rows])
    write(output / "report.csv", text.getvalue())
    write(output / "report.md", markdown([HEAD, *rows]))
    log.info(
        "\nIn percent. Only published weights, before and after post-training, on all of val, have published ones."
    )
    log.info("* measured by another protocol than the published number: docs/evaluate.md")
    log.info("wrote       %s, %s", output / "report.md", output / "report.csv")


def table(run: Path) -> Iterator[list[str]]:
    """The rows of a run: of its first and last step, each number with what is published of it, if anything is.

    A difference that is marked is one to a number of another protocol.
    """
    records = Results(run, writes=False).records
    steps = {record["step"] for record in records}
    seen = set()
    for record in records:
        before = len(steps) > 1 and not record["step"]
        network = "before" if before else record["network"]
        key = network, record["evaluation"], record["step"], record["weights"], record["asked"]
        if record["step"] not in (min(steps), max(steps)) or key in seen:  # before, student and teacher are the same
            continue
        seen.add(key)
        model, state, fraction = record.get("model", ""), record.get("state", ""), record.get("fraction", 1.0)
        evaluation = re.sub("_vit[sb]$", "", record["evaluation"])  # presets
        name = record["dataset"] + (f" x {Fraction(fraction).limit_denominator(1000)}" if fraction < 1 else "")
        mark = "" if "/reference/" in record["protocol"] else "*"
        for metric, value in record["metrics"].items():
            if not isinstance(value, int | float):
                raise NecoError(f"{run / 'results.json'}: {evaluation}/{metric} is {value!r}, no number")
            line = [str(run), model, network, name, evaluation, metric, f"{100 * value:.1f}"]
            known = published.find(model, state, record["dataset"], f"{evaluation}/{metric}", fraction)
            beside = [(f"{p.percent:.1f} ({p.source})", f"{100 * value - p.percent:+.1f}{mark}") for p in known]
            for pair in beside or [("", "")]:
                yield [*line, *pair, record["protocol"]]
