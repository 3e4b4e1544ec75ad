"""Weights & Biases: one W&B run a run folder, online or kept for `wandb sync`."""

import contextlib
import logging
import netrc
import os
import secrets
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from neco.config.types import PositiveFloat
from neco.logger import base, csv
from neco.logger.base import About, Ended, Table, Tracker
from neco.runs.results import write
from neco.utils.errors import NecoError
from neco.utils.masking import mask_secrets

log = logging.getLogger(__name__)
REACH = 4  # seconds in which a server has to answer
OPEN = 15.0  # and to open a run
BLOCK = 32768  # of LevelDB's log format, in which W&B keeps a run


class Wandb(Tracker):
    """Resuming the run folder continues the run, whose id is kept there.

    Values that are null come from W&B's variables: WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS,
    WANDB_NAME, WANDB_NOTES, WANDB_JOB_TYPE, WANDB_DIR, WANDB_RUN_ID.

    Args:
        project: null: WANDB_PROJECT, else neco.
        mode: `auto` is what WANDB_MODE or WANDB_DISABLED say; without them online where a key is known (`wandb login`,
            WANDB_API_KEY) and the server answers, else offline. With `disabled` nothing is kept.
        group: of the run; null: WANDB_RUN_GROUP, else the folder of the multirun.
        tags: beside those of model, dataset and loss; empty: WANDB_TAGS.
        wait: seconds for what is still to be sent at the end.

    Raises:
        NecoError: W&B is not installed, or WANDB_MODE is no mode.
    """

    def __init__(
        self,
        *,
        project: str | None = None,
        entity: str | None = None,
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        group: str | None = None,
        tags: list[str] | None = None,
        wait: PositiveFloat = 30,
    ) -> None:
        self.library, self.wait, self.mode = base.library("wandb", "wandb"), wait, _mode() if mode == "auto" else mode
        self.group = group or _variable("RUN_GROUP")
        self.tags = tags or (_variable("TAGS") or "").split(",")
        self.options: dict[str, Any] = {
            "project": project or _variable("PROJECT") or "neco",
            "entity": entity or _variable("ENTITY"),
            "notes": _variable("NOTES"),
        }
        self.run: Any = None

    def start(self, about: About) -> None:
        """Sends the configuration; says how to upload where it is offline."""
        self.folder, name = about.folder, _variable("NAME") or about.name
        if about.group and name != about.name:  # jobs of a multirun share the variable
            name = f"{name} {about.name}"
        id_file = about.folder / "wandb_id.txt"
        if not id_file.is_file() or not id_file.read_text().strip():
            write(id_file, (not about.group and _variable("RUN_ID")) or secrets.token_hex(4))
        why = "" if self.mode == "online" else "mode=offline" if self.mode == "offline" else _unreachable()
        place = Path(_variable("DIR") or about.folder).expanduser()
        place.mkdir(parents=True, exist_ok=True)  # W&B would take a temporary one
        # Its console capture would have every line of ours wait for its service.
        settings: dict[str, Any] = {"console": "off", "silent": True, "reinit": "create_new", "init_timeout": OPEN}
        if mask_secrets(command := " ".join(sys.argv)) != command:
            settings["x_disable_meta"] = True  # else W&B keeps the command line as it was typed
        values = {
            **self.options,
            "id": id_file.read_text().strip(),
            "name": name[:128],
            "group": self.group or about.group,
            "job_type": _variable("JOB_TYPE") or about.config["task"],
            "tags": [*dict.fromkeys(tag.strip()[:64] for tag in (*about.tags, *self.tags) if tag.strip())],
            "dir": str(place),
            "resume": "allow",
            "settings": settings,
        }
        try:
            self.run = self.library.init(**values, mode="offline" if why else "online")
        except Exception as error:
            if why or self.mode != "auto":
                raise
            why = f"{type(error).__name__}: {error}".splitlines()[0][:150]
            self.library.teardown(1)  # its service holds the id
            self.run = self.library.init(**values, mode="offline")
        self.run.config.update(dict(about.config), allow_val_change=True)
        kind = ("offline-run-*" if why else "run-*") + (f"-{values['id']}" if _variable("DIR") else "")
        self.rest = f"To upload: wandb sync {shlex.quote(str(place / 'wandb'))}/{kind}"
        if why:
            log.info("wandb       offline: %s. %s", why, self.rest)
        else:
            log.info("wandb       %s", self.run.url)
        self._catch_up(about, 1 + _last(place, values["id"]) if why else self.run.step)

    def tell(self, event: str, *values: Any) -> None:
        """Once W&B has failed it is left alone, else it fails again at the end of the program, in many lines."""
        if self.mode == "disabled":
            return
        try:
            super().tell(event, *values)
        except Exception:
            with contextlib.suppress(Exception):
                self.library.teardown(1)
            raise

    def _catch_up(self, about: About, first: int) -> None:
        """From step `first` on, what the run has saved and its W&B, which was killed with it, has not."""
        path = about.folder / "metrics.csv"
        if not about.step or not path.is_file():
            return
        for row in filter(csv.is_sound, csv.read(path)[1]):
            step = int(row.pop("step"))
            if first <= step <= about.step:
                self.run.log({name: float(value) for name, value in row.items() if value}, step=step)

    def metrics(self, row: Mapping[str, float], step: int) -> None:
        """W&B takes no step twice: what a resumed run repeats is there already."""
        if step >= self.run.step:
            self.run.log(dict(row), step=step)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Numbers, pictures and a table of classes, at the record's step or the first one after it that W&B takes."""
        values: dict[str, Any] = base.numbers(record)
        for name, drawn in base.pictures(record, self.folder):
            values[name] = [self.library.Image(str(path), caption=caption) for path, caption in drawn]
        if rows := base.classes(record):
            values[base.key(record, "classes", "tables")] = self._table(rows)
        self.run.log(values, step=max(record["step"], self.run.step))
        self.run.summary[base.key(record, "protocol", "about")] = record["protocol"]

    def results(self, table: Table) -> None:
        """The table `results`."""
        self.run.log({"results": self._table(table)}, step=self.run.step)

    def finish(self, ended: Ended) -> None:
        """A failed run is `failed`; an interrupted one `preempted` until it goes on."""
        self.run.summary["ended"] = ended
        if ended == "interrupted":
            self.run.mark_preempting()
        self.run.finish(exit_code={"success": 0, "failed": 1, "interrupted": 130}[ended])

    def _table(self, table: Table) -> Any:
        head, *rows = table
        return self.library.Table(columns=[*head], data=[[*row] for row in rows])


def records(path: Path, blocks: int | None = None) -> list[Any]:
    """The records of W&B's file of a run, or of its last blocks, as far as they are whole."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data = path.read_bytes()
    at = 7 if blocks is None else max(7, (len(data) // BLOCK - blocks) * BLOCK)
    found, part = [], None
    while at + 7 <= len(data):
        if (rest := BLOCK - at % BLOCK) < 7:
            at += rest
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += 7 + size
        if not kind or at > len(data):
            break
        if kind in (1, 2):  # whole, or the first part
            part = b""
        if part is not None:
            part += data[at - size : at]
            if kind in (1, 4):  # whole, or the last part
                found.append(Record.FromString(part))
    return found


def _last(folder: Path, run: str) -> int:
    """The last step that earlier lives of a run have for `wandb sync`; -1: none."""
    found = [-1]
    for path in folder.glob(f"wandb/*run-*-{run}/run-{run}.wandb"):
        with contextlib.suppress(Exception):  # damaged, or of another W&B
            found += [r.history.step.num for r in records(path, 64) if r.HasField("history")]
    return max(found)


def _variable(name: str) -> str | None:
    """One of W&B's variables; None where it is not set, or empty."""
    return os.environ.get(f"WANDB_{name}", "").strip() or None


def _mode() -> Literal["auto", "offline", "disabled"]:
    """What the variables say of `mode=auto`; also by the names that W&B's modes had. Raises NecoError for others."""
    if (_variable("DISABLED") or "").lower() in ("true", "1", "yes", "y", "t", "on"):
        return "disabled"
    mode, modes = _variable("MODE") or "online", ("online", "offline", "disabled")
    mode = {"run": "online", "dryrun": "offline"}.get(mode.lower(), mode.lower())
    if mode not in modes:
        raise NecoError(f"WANDB_MODE={mode}: must be {', '.join(modes[:-1])} or {modes[-1]}")
    return "disabled" if mode == "disabled" else "offline" if mode == "offline" else "auto"


def _unreachable() -> str:
    """Why a run cannot be online; empty where it can."""
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        known = any("wandb" in host or host in url for host in netrc.netrc(os.environ.get("NETRC")).hosts)
    except (OSError, netrc.NetrcParseError):
        known = False
    if not known and not os.environ.get("WANDB_API_KEY"):
        return "no key is known (wandb login)"
    try:
        urllib.request.urlopen(url, timeout=REACH).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except (OSError, ValueError) as error:
        return f"{url} does not answer ({getattr(error, 'reason', error)})"
    return ""
