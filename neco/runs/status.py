"""What a job of a sweep says of itself in its folder."""

import re
import sys
from pathlib import Path
from typing import Any

from neco.runs import foreign
from neco.utils.errors import NecoError
from neco.utils.masking import print_line

STATUS = "status.json"  # of a job: how it ended, its objective or message, its overrides, a digest of its configuration


# Keys that make no other job: where it runs and what it shows
IDLE = re.compile(r"run_dir|show|report|device|debug|cache_dir|data_root|(hydra|extract|launcher|logger|sweep).*")


def status(folder: Path) -> dict[str, Any]:
    """What the status.json of a job says; empty where there is none, or a damaged one."""
    try:
        return foreign.read_json(folder, STATUS, foreign.Status) or {}
    except NecoError as error:
        print_line(f"{error}; taken as not there", sys.stderr)
        return {}
