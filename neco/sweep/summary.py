"""What the jobs of a sweep say together."""

import csv
import io
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from neco.runs.results import Results, percent, spread, write
from neco.runs.status import IDLE, STATUS, status
from neco.utils import processes
from neco.utils.errors import NecoError
from neco.utils.escape import for_csv, for_markdown
from neco.utils.masking import one_line, print_line
from neco.utils.text_table import columns, markdown

unwritten: list[NecoError] = []  # Hydra makes a warning of what a callback raises


class Summary(Callback):
    """Prints the table when several jobs are done."""

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if processes.number("RANK"):
            return
        if [*folder.glob(f"*/{STATUS}")] and not config.get("launcher", {}).get("detach"):
            print_line(f"\n{summary(folder)}\n")
            if not unwritten:
                print_line(f"wrote  {folder / 'summary.txt'}, .md, .csv")
            if config.get("report") and [*folder.glob("*/results.json")]:
                from neco import report  # takes a second, which the start of the program needs not

                report.of_sweep(folder)


def summary(folder: Path) -> str:
    """The table of all jobs in the folder; written there as summary.txt and .md, the numbers of each job as .csv.

    A line for each network of the jobs that differ in the seed alone: mean and standard deviation. Where all of them
    were evaluated at step 0, too, their number is the change since, and a line `before`, for all below it until the
    next, says what was there. Jobs that have not ended well are lines of their own.
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
    common = set.intersection(*(set(said[job]["overrides"]) for job in jobs)) if jobs else set()
    lines: dict[tuple[str, str, str], list[tuple[dict[str, float], dict[str, float]]]] = {}
    table: list[dict[str, Any]] = []
    last: dict[str, Any]
    for job in jobs:
        own = [o for o in said[job]["overrides"] if o not in common and not IDLE.fullmatch(o.partition("=")[0])]
        about = {"folder": job.name, "runs": " ".join(own), **{k: said[job].get(k) for k in ("status", "objective")}}
        for network in dict.fromkeys(r["network"] for r in found[job]) or [""]:
            step = max((r["step"] for r in found[job]), default=0)
            first, last = _numbers(found[job], 0, network) if step else {}, _numbers(found[job], step, network)
            earlier = {f"{metric} before": value for metric, value in first.items()}
            table.append({**about, "network": network, **last, **earlier, "message": said[job].get("message", "")})
            if job not in done:
                continue
            if not last and about["objective"] is not None:
                last = {"objective": about["objective"]}
            name = " ".join(o for o in own if not o.startswith("seed=")) or "all"
            lines.setdefault((name, network, "done"), []).append((first, last))
        if job not in done:
            lines[" ".join(own) or job.name, "", said[job]["status"]] = []
    metrics = list(dict.fromkeys(metric for pairs in lines.values() for _, last in pairs for metric in last))
    rows = [["runs", "network", "status", *metrics]]
    before: list[dict[str, float]] = []
    for label, pairs in lines.items():
        firsts, values = [first for first, _ in pairs], [last for _, last in pairs]
        if trained := bool(firsts) and all(firsts):
            values = [
                {metric: value - first[metric] for metric, value in last.items() if metric in first}
                for first, last in pairs
            ]
            if firsts != before:  # of student and teacher, and of what changes only the training, the same
                rows.append(["before", "", "", *(_spread([v[m] for v in firsts if m in v]) for m in metrics)])
                before = firsts
        rows.append([*label, *(_spread([v[m] for v in values if m in v], "+" if trained else "") for m in metrics)])
    protocols = dict.fromkeys(f"protocol  {r['evaluation']}: {r['protocol']}" for job in done for r in found[job])
    damaged = (said[job]["message"] for job in jobs if said[job]["status"] == "damaged")
    signed = "; with a sign: the change since step 0, `before`, of the lines below that" if before else ""
    below = [f"(n): runs, mean ± standard deviation, in percent{signed}", *protocols, *damaged]
    text, sheet = "\n".join([columns(rows), *map(one_line, below)]) if jobs else f"(no jobs in {folder})", io.StringIO()
    head = dict.fromkeys(key for row in table for key in row)
    writer = csv.DictWriter(sheet, head, restval="", lineterminator="\n")
    writer.writerow({key: for_csv(key) for key in head})
    writer.writerows({key: for_csv(cell) for key, cell in row.items()} for row in table)
    page = "\n".join([markdown(rows), *(f"- {for_markdown(line)}" for line in below), ""])
    try:
        for name, content in (("txt", f"{text}\n"), ("md", page), ("csv", sheet.getvalue())):
            write(folder / f"summary.{name}", content)
    except NecoError as error:
        unwritten.append(error)
    return text


def _numbers(records: list[dict[str, Any]], step: int, network: str) -> dict[str, float]:
    chosen = [r for r in records if (r["step"], r["network"]) == (step, network)]
    return {f"{r['evaluation']}/{metric}": value for r in chosen for metric, value in r["metrics"].items()}


def _spread(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{percent(mean, sign)}{f' ± {percent(deviation)}' if len(values) > 1 else ''} ({len(values)})"
