"""Weights & Biases: the same metrics, the configuration and the evaluation results of a run."""

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

log = logging.getLogger(__name__)


class Wandb(Logger):
    """One W&B run a run folder: resuming the folder continues the run.

    `mode=auto` is online when a key is known (`wandb login` or WANDB_API_KEY), else offline, with the command that
    uploads it later.
    """

    def __init__(
        self,
        *,
        folder: Path,
        step: int = 0,
        project: str = "neco",
        entity: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        group: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.step = Path(folder), step
        self.options: dict[str, Any] = {"project": project, "entity": entity, "group": group, "tags": tags}
        self.mode = mode
        self._run: Any = None

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return self.folder.name

    @property
    def run(self) -> Any:
        """The W&B run, started at first use; its id is kept in the run folder."""
        if self._run is None:
            import wandb

            mode = self.mode
            if mode == "auto":
                known = _key_known()
                mode = "online" if known and os.environ.get("WANDB_MODE") != "offline" else "offline"
            id_file = self.folder / "wandb_id.txt"
            if not id_file.is_file():
                id_file.write_text(secrets.token_hex(4))
            self._run = wandb.init(
                **self.options,
                id=id_file.read_text().strip(),
                name=self.folder.name,
                dir=str(self.folder),
                mode=mode,
                resume="allow",
            )
            if mode == "offline":
                log.info("W&B is offline; to upload: wandb sync %s", Path(self._run.dir).parent)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration."""
        self.run.config.update(dict(params), allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Metrics of one step; keys are those of metrics.csv and `eval/<evaluation>/<network>/<metric>`."""
        self.run.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run, so that the next job of a sweep starts its own."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "success" else 1)
            self._run = None


def _key_known() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
