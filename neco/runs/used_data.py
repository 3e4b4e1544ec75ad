"""What the data held that a run used: so that no run goes on with other images, and no sweep keeps a stale number.

A training compares some of its images when it goes on. `data.json` in a run folder lets a sweep see whether a finished
job would find the same data: all that was evaluated, and some of what was trained on.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from neco.dataset.base import Dataset, Sample
from neco.dataset.digests import Contents, joined, store_in
from neco.dataset.inspect import places
from neco.runs import results
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
FILE = "data.json"
SOME = 64  # training images that are compared
Compared = Literal["all", "some"]
Sampled = dict[str, list[tuple[str, str | None]]]  # key -> files of a sample, what they hold: None if not to be read


def spread(samples: Sequence[Sample]) -> list[Sample]:
    """Up to SOME of them, evenly, the same each time."""
    return [samples[place] for place in sorted(places(len(samples), SOME))]


def sample_contents(samples: Sequence[Sample], index: str | None, masks: bool) -> Sampled:
    """What some images hold, and with `masks` their masks, too."""
    store = store_in(index)
    found: Sampled = {}
    for sample in spread(samples):
        found[sample.key] = []
        for ref in (sample.image, sample.mask if masks else None):
            if ref is not None:
                try:
                    digest = store.digests([ref])[0]
                except NecoError:  # training puts up with some
                    digest = None
                found[sample.key].append((str(ref), digest))
    return found


def other_file(before: Sampled, now: Sampled) -> str | None:
    """The first file that holds something else than before, for people; None where all in both are the same."""
    for key, files in before.items():
        for (old, was), (new, digest) in zip(files, now.get(key, []), strict=False):
            if None not in (was, digest) and was != digest:
                return f"{new} is not what it was" if new == old else f"{new} is not what {old} was"
    return None


def moved(before: Sampled, now: Sampled) -> str | None:
    """Where the images are now and were before, for people; None where they did not move."""
    pairs = [(old[0][0], new[0][0]) for key, old in before.items() if (new := now.get(key))]
    if other := next(((old, new) for old, new in pairs if old != new), None):
        return f"the training images lie elsewhere: {other[1]} was {other[0]}. {len(pairs)} were compared: the same"
    return None


def note(folder: Path, node: str, dataset: Dataset, split: str, compared: Compared) -> None:
    """Write to data.json what a split holds; `node`: its key in the configuration."""
    path = folder / FILE
    held = {**_read(path), f"{node}/{split}": [compared, _digest(dataset, split, compared)]}
    results.write(path, json.dumps(held, indent=1) + "\n", mask=False)


def changed(folder: Path, build: Callable[[str], Dataset]) -> str | None:
    """The first split of data.json that holds something else now, for people. `build` makes the data set of a node.

    Raises NecoError where the data are not there.
    """
    datasets: dict[str, Dataset] = {}
    for name, (compared, digest) in _read(folder / FILE).items():
        node, _, split = name.partition("/")
        if _digest(datasets.setdefault(node, build(node)), split, compared) != digest:
            return f"{split} of {node}"
    return None


def _digest(dataset: Dataset, split: str, compared: Compared) -> str:
    samples = dataset.samples(split)
    if compared == "some":
        sampled = sample_contents(samples, dataset.index, masks=True).values()
        held = joined([digest for files in sampled for _, digest in files])
    else:
        refs = [ref for sample in samples for ref in (sample.image, sample.mask) if ref is not None]
        held = Contents([*refs, *dataset.label_files()], dataset.index).digest()
    return joined([*(sample.key for sample in samples), held])


def _read(path: Path) -> Mapping[str, Any]:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    pairs = held.items() if isinstance(held, dict) else ()  # it may have been made by others
    return {key: value for key, value in pairs if isinstance(value, list) and len(value) == 2}
