"""All trackers of a run as one."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from neco.config.validate import Settings
from neco.logger.base import About
from neco.runs.results import Results, comparison
from neco.utils.masking import mask_nested, mask_secrets
from neco.utils.signals import Interrupted

PLACES = (
    "run_dir",
    "data_root",
    "cache_dir",
    "device",
    "debug",
    "logger",
    "log_seconds",
    "launcher.",
    "sweep.",
)  # they make no other run


class Trackers:
    """All trackers of a run; leaving the block tells them the final table and how it ended.

    Args:
        store: the run's results; a process that does not write them has no trackers.
        step: that the run goes on from; `rows`: how many of metrics there were.
    """

    def __init__(self, settings: Settings, store: Results, step: int = 0, rows: int | None = None) -> None:
        from neco.logger.background import Guard

        self.store, built = store, settings.build_all("logger") if store.writes else {}
        self.each = [Guard(name, each) if each.wait is not None else each for name, each in built.items()]
        self.tell("start", replace(about(settings, store.path.parent, step), rows=rows))

    def tell(self, event: str, *values: Any) -> None:
        """To all of them, without secrets."""
        values = tuple(mask_nested(value) for value in values)
        for tracker in self.each:
            tracker.tell(event, *values)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        stopped = kind and issubclass(kind, Interrupted | KeyboardInterrupt)
        if self.store.records:
            self.tell("results", comparison(self.store.records))
        self.tell("finish", "interrupted" if stopped else "failed" if kind else "success")
        for tracker in self.each:
            tracker.close()


def about(settings: Settings, folder: Path, step: int) -> About:
    """What trackers call a run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra: Any = HydraConfig.get() if HydraConfig.initialized() else None
    multirun = hydra and hydra.mode == RunMode.MULTIRUN
    said = [o for o in settings.overrides if not o.lstrip("+~").startswith(PLACES)]
    own = [o for o in said if not multirun or o not in sys.argv]  # what varies is not in the command line as it is
    tags = [str(settings.choices[group]) for group in ("model", "dataset", "loss") if settings.choices.get(group)]
    name, group = " ".join(own or said) or folder.name, Path(hydra.sweep.dir).name if multirun else None
    return About(folder, step, mask_nested(settings.config), mask_secrets(name), group, tags)
