"""Every trial of tests/soak with its full count; docs/reliability.md gets a section for each topic that was run.

python scripts/soak.py [TOPIC ...] [--share 0.1] [--minutes 10]
"""

import argparse
import datetime
import importlib
import logging
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from math import ceil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

soak: Any = importlib.import_module("soak")  # tests/soak, not this file

PAGE = ROOT / "docs" / "reliability.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topics", nargs="*", default=soak.TOPICS, help=", ".join(soak.TOPICS))
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which a trial is not tried again")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable(logging.WARNING)
    failed = False
    for topic in given.topics:
        lines, broken = section(topic, given.share, given.minutes)
        failed |= broken
        given.page.write_text(with_section(given.page.read_text(), topic, lines))
    print(f"wrote {given.page}")
    return int(failed)


def section(topic: str, share: float, minutes: float) -> tuple[str, bool]:
    """The section of a topic, and whether a trial failed."""
    about = sys.modules[soak.trials(topic)[0].run.__module__].__doc__ or ""
    rows, broken, begun = ["| fault | what came of it | times |", "|---|---|---|"], False, time.monotonic()
    for trial in soak.trials(topic):
        start, outcomes = time.monotonic(), Counter[Any]()
        with tempfile.TemporaryDirectory(prefix="neco-soak-") as folder:
            try:
                for outcome in trial(Path(folder), ceil(trial.full * share)):
                    outcomes[outcome] += 1
                    if time.monotonic() - start > 60 * minutes:
                        break
            except (Exception, KeyboardInterrupt) as error:
                traceback.print_exc()
                broken = True
                told = str(error).partition("\n")[0] or "interrupted"
                outcomes[soak.Outcome(trial.name, f"**failed**: {told}")] += 1
        print(f"{topic}.{trial.name}: {sum(outcomes.values())} in {time.monotonic() - start:.0f} s", flush=True)
        rows += [f"| {fault} | {result} | {times} |" for (fault, result), times in sorted(outcomes.items())]
    parts = ("" if share == 1 else f" --share {share:g}") + ("" if minutes == 1e9 else f" --minutes {minutes:g}")
    told = (
        f"`NECO_SOAK_SEED={soak.seed()} python scripts/soak.py {topic}{parts}`: {time.monotonic() - begun:.0f} s on "
        f"{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}."
    )
    return "\n\n".join([f"## {topic.capitalize()}", about.strip(), told, "\n".join(rows)]), broken


def with_section(page: str, topic: str, section: str) -> str:
    """The page with a section in place of the topic's earlier one, in the order of the topics."""
    head, *parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    held = {part.split("\n")[0].removeprefix("## ").lower(): part.strip() for part in parts}
    held[topic] = section
    ordered = sorted(held, key=lambda name: soak.TOPICS.index(name) if name in soak.TOPICS else len(soak.TOPICS))
    return "\n\n".join([head.strip(), *(held[name] for name in ordered)]) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
