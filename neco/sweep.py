"""What the runs of a sweep say together."""

import json
import statistics
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from neco.results import columns, write


class Summary(Callback):
    """Prints `summary` when several jobs are done, and keeps it as summary.txt in their folder."""

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        text = summary(folder)
        write(folder / "summary.txt", f"{text}\n")
        print(f"\n{text}\n\nwrote  {folder / 'summary.txt'}")


def summary(folder: Path) -> str:
    """The numbers of all runs in the folder, a line for each network: mean and standard deviation over the seeds.

    Runs are told apart by their overrides; those that differ in the seed alone are one line. Where runs have several
    steps their number is the change from the first to the last, the first line says what was before, and those that
    have only begun are left out.
    """
    found = {path.parent: json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))}
    steps = {run: sorted({r["step"] for r in records}) for run, records in found.items()}
    trained = any(len(several) > 1 for several in steps.values())
    done = [run for run in found if len(steps[run]) > trained]
    if not done:
        return f"(no results in {folder})"
    said = {run: (run / "overrides.txt").read_text().splitlines() for run in done}
    common = set.intersection(*map(set, said.values()))
    before: list[dict[str, float]] = []
    lines: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in done:
        name = " ".join(o for o in said[run] if o not in common and not o.startswith("seed=")) or "all"
        for network in dict.fromkeys(r["network"] for r in found[run]):
            first, last = (_numbers(found[run], steps[run][place], network) for place in (0, -1))
            if trained:
                if first not in before:  # of student and teacher, and of runs with one seed, the same
                    before.append(first)
                last = {metric: value - first[metric] for metric, value in last.items() if metric in first}
            lines.setdefault((name, network), []).append(last)
    metrics = list(dict.fromkeys(metric for values in lines.values() for each in values for metric in each))
    rows = [["runs", "network", *metrics]]
    if trained:
        rows.append(["before", "", *(_spread([v[m] for v in before if m in v]) for m in metrics)])
    for label, values in lines.items():
        rows.append([*label, *(_spread([v[m] for v in values if m in v], "+" if trained else "") for m in metrics)])
    return columns(rows)


def _numbers(records: list[dict[str, Any]], step: int, network: str) -> dict[str, float]:
    chosen = [r for r in records if (r["step"], r["network"]) == (step, network)]
    return {f"{r['evaluation']}/{metric}": value for r in chosen for metric, value in r["metrics"].items()}


def _spread(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.4f}{deviation} ({len(values)})"
