"""TensorBoard: event files in `tensorboard/` of the run folder."""

from collections.abc import Mapping
from typing import Any

import yaml

from neco.config.types import PositiveFloat
from neco.logger import base
from neco.logger.base import About, Ended, Table, Tracker
from neco.utils.escape import for_markdown, markdown_block
from neco.utils.text_table import markdown


class Tensorboard(Tracker):
    """Scalars, images, and as text the configuration, protocols and tables. A resumed run replaces what it repeats.

    Args:
        wait: seconds for what is still to be written at the end.
    """

    def __init__(self, *, wait: PositiveFloat = 30) -> None:
        library = base.library("torch.utils.tensorboard", "'neco[tensorboard]'")
        self.build, self.wait = library.SummaryWriter, wait

    def start(self, about: About) -> None:
        """Later steps of the run in the same folder are dropped by readers."""
        self.folder, self.step = about.folder, about.step
        self.writer = self.build(str(about.folder / "tensorboard"), purge_step=about.step + 1, flush_secs=10)
        about_run = {"name": about.name, "group": about.group, "tags": [*about.tags]}
        self._text("about", markdown_block(yaml.safe_dump(about_run, sort_keys=False)))
        self._text("config", markdown_block(yaml.safe_dump(dict(about.config), sort_keys=False)))

    def metrics(self, row: Mapping[str, float], step: int) -> None:
        self.step = step
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Pictures of one kind are told apart by their number."""
        import numpy as np
        from PIL import Image

        self.step = record["step"]
        for name, value in base.numbers(record).items():
            self.writer.add_scalar(name, value, self.step)
        for name, drawn in base.pictures(record, self.folder):
            for number, (path, _) in enumerate(drawn):
                pixels = np.asarray(Image.open(path).convert("RGB"))
                self.writer.add_image(f"{name}/{number}", pixels, self.step, dataformats="HWC")
        if rows := base.classes(record):
            self._text(base.key(record, "classes", "tables"), _markdown(rows))
        self._text(base.key(record, "protocol", "about"), for_markdown(record["protocol"]))

    def results(self, table: Table) -> None:
        self._text("results", _markdown(table))

    def finish(self, ended: Ended) -> None:
        self._text("ended", ended)
        self.writer.close()

    def _text(self, name: str, text: str) -> None:
        self.writer.add_text(name, text, self.step)


def _markdown(table: Table) -> str:
    return markdown([[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in table])
