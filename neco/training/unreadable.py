"""Images that cannot be read: a look before the run, then a list in the run folder and a limit.

Limits are what `Dataset.bad_limits` gives: beginning of a key -> (how many may be unreadable, images).
"""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from neco.dataset.base import Dataset, Sample
from neco.dataset.inspect import FlatImages, places, reason
from neco.distributed import collectives
from neco.training.data import OTHERS
from neco.utils import atomic_files
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)

Limits = Mapping[str, tuple[int, int]]
FILE = "bad_images.txt"
TEXT: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names are any bytes
LOOKS, SECONDS = 48, 5.0  # images read of each part of the data, and how long that may take
CHANCE = 1e-6  # that a data set within its limit is refused at the look


def look(samples: Sequence[Sample], limits: Limits, labelled: Dataset | None = None) -> None:
    """Read a few images, spread evenly, in seconds. Raises NecoError where more than the limit are plainly unreadable.

    Plainly: if the limit was kept, so many of so few would be unreadable with a chance below one in a million.
    """
    for prefix, (allowed, images) in limits.items():
        end = time.monotonic() + SECONDS
        own = [sample for sample in samples if sample.key.startswith(prefix)]
        bad: dict[str, str] = {}
        flat = FlatImages()
        for looked, place in enumerate(places(len(own), LOOKS), 1):
            if why := reason(own[place], labelled, flat):
                bad[own[place].key] = why
                if chance(len(bad), looked, allowed, images) < CHANCE:
                    counted = f"{len(bad)} of {looked} images looked at"
                    raise too_many(counted, prefix, allowed, images, f"The first: {next(iter(bad.values()))}.")
            if time.monotonic() > end:
                break
        flat.warn(prefix.rstrip("/") or "the data")


def chance(bad: int, looked: int, allowed: int, images: int) -> float:
    """Probability of `bad` or more among `looked` at random of `images`, `allowed` of which are bad."""
    ways = (comb(allowed, i) * comb(images - allowed, looked - i) for i in range(bad, looked + 1))
    return sum(ways) / comb(images, looked)


class Unreadable(NecoError):
    """Too many images cannot be read: it may be that a disk is away for a while."""


def too_many(counted: str, prefix: str, allowed: int, images: int, more: str) -> NecoError:
    """The error that ends a run. `counted` of the images whose keys begin with `prefix` are unreadable."""
    key = "dataset." + "".join(f"parts.{part}." for part in prefix.split("/")[:-1]) + "max_bad"
    return Unreadable(
        f"{counted} cannot be read; {key} puts up with {allowed} of {images}. {more} "
        f"Mend or remove them, or raise {key} to go on without them."
    )


class BadImages(pl.Callback):
    """Names each unreadable image once in `bad_images.txt` (key, file, reason), also across resumed runs.

    Batches bring (index, reason) of what their workers could not read. What an earlier part of the run has listed is
    tried again: a disk that was away for a while leaves no trace. Several processes share the file.
    """

    def __init__(
        self, folder: Path, samples: Sequence[Sample], limits: Limits, labelled: Dataset | None = None
    ) -> None:
        self.path, self.samples, self.limits = folder / FILE, samples, limits
        self.known: set[str] = set()
        if collectives.leader() and (listed := self._listed()):
            self.path.unlink()
            again = (i for i, sample in enumerate(samples) if _line(sample.key) in listed)
            self.note([(i, why) for i in again if (why := reason(samples[i], labelled))])

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.note(batch["bad"])
        if len(batch) == 1:
            raise Unreadable(f"{OTHERS} images that were to replace an unreadable one cannot be read: see {self.path}")

    def note(self, found: Sequence[tuple[int, str]]) -> None:
        """List what is new. Raises NecoError as soon as there are more than a limit."""
        if all(_line(self.samples[i].key) in self.known for i, _ in found):
            return
        self.known |= self._listed()  # what other processes found, too
        new = {i: why for i, why in found if _line(self.samples[i].key) not in self.known}
        with atomic_files.open_for_appending(self.path, **TEXT) as file:
            for index, why in new.items():
                sample = self.samples[index]
                self.known.add(_line(sample.key))
                file.write("\t".join(map(_line, (sample.key, str(sample.image), why))) + "\n")
                level = logging.WARNING if len(self.known) <= 3 else logging.DEBUG
                log.log(level, "another image is taken: %s", why.encode(errors="backslashreplace").decode())
        for prefix, (allowed, images) in self.limits.items():
            bad = sum(key.startswith(prefix) for key in self.known)
            if bad > allowed:
                raise too_many(f"{bad} images", prefix, allowed, images, f"They are named in {self.path}.")

    def teardown(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        self.known |= self._listed()
        if self.known and collectives.leader():
            log.warning(
                "%d unreadable images were replaced by others; they are named in %s", len(self.known), self.path
            )

    def _listed(self) -> set[str]:
        if not self.path.is_file():
            return set()
        with self.path.open(**TEXT) as file:
            return {line.split("\t")[0] for line in file}


def _line(text: str) -> str:
    return re.sub(r"[\t\r\n]", " ", text)
