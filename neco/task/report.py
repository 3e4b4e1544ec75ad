"""task=report: the numbers of runs beside each other and beside what is published."""

import csv
import glob
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neco import published
from neco.config import Settings
from neco.errors import NecoError
from neco.results import Results, columns, write

log = logging.getLogger(__name__)
HEAD = ["run", "model", "weights", "data set", "evaluation", "metric"]
HEAD.extend(["measured", "published", "difference", "protocol"])


@dataclass
class Job:
    """The runs that have results."""

    runs: list[Path]


def prepare(settings: Settings) -> Job:
    """Find the runs. Raises NecoError where there are none."""
    named = [Path(path) for pattern in settings.run.runs for path in sorted(glob.glob(str(Path(pattern).expanduser())))]
    runs = [path for path in dict.fromkeys(named) if (path / "results.json").is_file()]
    if not runs:
        patterns = " ".join(settings.run.runs)
        raise NecoError(
            f"runs=[{','.join(settings.run.runs)}]: {len(named)} folders fit {patterns}, none has a results.json; name "
            "run folders: runs=[runs/train/*,runs/eval/*]"
        )
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
    log.info("\nNumbers in percent. A published one is comparable as far as its protocol is the same: docs/evaluate.md")
    log.info("wrote       %s, %s", output / "report.md", output / "report.csv")


def table(run: Path) -> Iterator[list[str]]:
    """The rows of a run: of its first and last step, each number with what is published of it, if anything is."""
    records, (config, _) = Results(run, writes=False).records, read(run)
    steps = {record["step"] for record in records}
    seen = set()
    for record in records:
        first = record["network"] == "compared" or (config["task"] == "train" and not record["step"])
        network = "before" if first else record["network"]
        key = network, record["evaluation"], record["step"], record["weights"], record["asked"]
        if record["step"] not in (min(steps), max(steps)) or key in seen:  # before, student and teacher are the same
            continue
        seen.add(key)
        model, state = identity(run, record)
        fraction = record.get("fraction", 1.0)
        evaluation = re.sub("_vit[sb]$", "", record["evaluation"])  # presets
        name = record["dataset"] + (f" x {fraction:.3g}" if fraction < 1 else "")
        for metric, value in record["metrics"].items():
            if not isinstance(value, int | float):
                raise NecoError(f"{run / 'results.json'}: {evaluation}/{metric} is {value!r}, no number")
            line = [str(run), model, network, name, evaluation, metric, f"{100 * value:.1f}"]
            asked = record["dataset"], f"{evaluation}/{metric}", fraction
            known = published.find(model, "before" if first else state, *asked)
            beside = [(f"{row.percent:.1f} ({row.source})", f"{100 * value - row.percent:+.1f}") for row in known]
            for pair in beside or [("", "")]:
                yield [*line, *pair, record["protocol"]]


def read(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a run, and which option of each group it is from. Raises NecoError where they are lost."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        about = json.loads((run / "environment.json").read_text())
        return {"task": config["task"], **config}, dict(about.get("choices") or {})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise NecoError(f"{run} is no whole run folder: {error}") from error


def identity(run: Path, record: Mapping[str, Any]) -> tuple[str, str]:
    """The option of conf/model that a record is of, and whether its weights are from `before` or `after` NeCo."""
    config, choices = read(run)
    checkpoint, model = record.get("checkpoint"), record.get("model") or choices.get("model", "")
    if config["task"] == "eval" and checkpoint:
        near = [Path(checkpoint).expanduser(), *Path(checkpoint).expanduser().parents]
        trained = next((folder for folder in near if (folder / "environment.json").is_file()), run)
        model = model if trained.resolve() == run.resolve() else read(trained)[1].get("model", model)
    return model, "after" if checkpoint or config["task"] == "train" else "before"


def markdown(rows: list[list[str]]) -> str:
    """A table of GitHub's kind."""
    head, *body = ("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"
