"""What the jobs of a sweep say together."""

import csv
import io
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from neco.errors import NecoError
from neco.results import Results, columns, markdown, write

STATUS = "status.json"  # of a job: how it ended, its objective or message, its overrides, a digest of its configuration


class Summary(Callback):
    """Prints the table when several jobs are done."""

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if os.environ.get("RANK", "0") != "0":  # of torchrun
            return
        if [*folder.glob(f"*/{STATUS}")] and not config.get("launcher", {}).get("detach"):
            print(f"\n{summary(folder)}\n\nwrote  {folder / 'summary.txt'}, .md, .csv")


def status(folder: Path) -> dict[str, Any]:
    """What the status.json of a job says; empty where there is none, or a damaged one."""
    path = folder / STATUS
    try:
        said = json.loads(path.read_text())
        if lacking := {"status", "job", "overrides"} - {*said}:
            raise ValueError(f"no {min(lacking)}")
        return {**said}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        print(f"{path} is damaged ({error}): taken as not there", file=sys.stderr)
        return {}


def summary(folder: Path) -> str:
    """The table of all jobs in the folder; written there as summary.txt and .md, the numbers of each job as .csv.

    A line for each network of the jobs that differ in the seed alone: mean and standard deviation. Where jobs have
    several steps their number is the change from the first to the last, the first line says what was before. Jobs that
    have not ended well are lines of their own.
    """
    said = {path.parent: one for path in folder.glob(f"*/{STATUS}") if (one := status(path.parent))}
    jobs = sorted(said, key=lambda job: (said[job]["job"], job.name))
    found: dict[Path, list[dict[str, Any]]] = {}
    for job in jobs:
        try:
            found[job] = Results(job, writes=False).records
        except NecoError as error:
            found[job], said[job] = [], {**said[job], "status": "damaged", "message": str(error)}
    done = [job for job in jobs if said[job]["status"] == "done"]
    trained = any(len({r["step"] for r in found[job]}) > 1 for job in done)
    common = set.intersection(*(set(said[job]["overrides"]) for job in jobs)) if jobs else set()
    before: list[dict[str, float]] = []
    lines: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    table: list[dict[str, Any]] = []
    last: dict[str, Any]
    for job in jobs:
        own = [o for o in said[job]["overrides"] if o not in common]
        about = {"folder": job.name, "runs": " ".join(own), **{k: said[job].get(k) for k in ("status", "objective")}}
        for network in dict.fromkeys(r["network"] for r in found[job]) or [""]:
            steps = [r["step"] for r in found[job]] or [0]
            first, last = (_numbers(found[job], step, network) for step in (min(steps), max(steps)))
            earlier = {f"{metric} before": value for metric, value in first.items()} if trained else {}
            table.append({**about, "network": network, **last, **earlier, "message": said[job].get("message", "")})
            if job not in done:
                continue
            if trained:
                if first and first not in before:  # of student and teacher, and of runs with one seed, the same
                    before.append(first)
                last = {metric: value - first[metric] for metric, value in last.items() if metric in first}
            elif not last and about["objective"] is not None:
                last = {"objective": about["objective"]}
            name = " ".join(o for o in own if not o.startswith("seed=")) or "all"
            lines.setdefault((name, network, "done"), []).append(last)
        if job not in done:
            lines[" ".join(own) or job.name, "", said[job]["status"]] = []
    metrics = list(dict.fromkeys(metric for values in lines.values() for each in values for metric in each))
    rows = [["runs", "network", "status", *metrics]]
    if trained:
        rows.append(["before", "", "", *(_spread([v[m] for v in before if m in v]) for m in metrics)])
    for label, values in lines.items():
        rows.append([*label, *(_spread([v[m] for v in values if m in v], "+" if trained else "") for m in metrics)])
    protocols = dict.fromkeys(f"protocol  {r['evaluation']}: {r['protocol']}" for job in done for r in found[job])
    damaged = (said[job]["message"] for job in jobs if said[job]["status"] == "damaged")
    below = ["(n): runs, mean ± standard deviation", *protocols, *damaged]
    text, sheet = "\n".join([columns(rows), *below]) if jobs else f"(no jobs in {folder})", io.StringIO()
    writer = csv.DictWriter(sheet, dict.fromkeys(key for row in table for key in row), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    page = "\n".join([markdown(rows), *(f"- {line}" for line in below), ""])
    for name, content in (("txt", f"{text}\n"), ("md", page), ("csv", sheet.getvalue())):
        write(folder / f"summary.{name}", content)
    return text


def _numbers(records: list[dict[str, Any]], step: int, network: str) -> dict[str, float]:
    chosen = [r for r in records if (r["step"], r["network"]) == (step, network)]
    return {f"{r['evaluation']}/{metric}": value for r in chosen for metric, value in r["metrics"].items()}


def _spread(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    finite = all(map(math.isfinite, values))  # statistics.stdev takes no others
    deviation = f" ± {statistics.stdev(values) if finite else math.nan:.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.4f}{deviation} ({len(values)})"
