"""Several data sets as one to train on: the published `coco,imagenet100k` run, or any other mixture."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

from neco.config.types import Components
from neco.dataset.base import Dataset, Sample
from neco.utils.errors import NecoError


class Mix(Dataset):
    """The images of all parts, without their labels. How much of a part an epoch sees is the part's own `weight`.

    An epoch of parts of n_1, n_2, ... images and weights w_1, w_2, ... is round(w_1 n_1) + round(w_2 n_2) + ... images,
    shuffled together. The key of an image is `<part>/<its key there>`; `max_bad` holds for each part and for the whole.

    Args:
        parts: data sets by name. In a configuration `coco: 0.5` stands for the option of that name with that weight,
            `cats: {option: folder, root: my/cats}` for one with keys of its own.

    Raises:
        NecoError: no parts, or a name that would make keys ambiguous.
    """

    def __init__(
        self, *, parts: Annotated[dict[str, Dataset] | None, Components("dataset")] = None, **common: Any
    ) -> None:
        super().__init__(**common)
        if not parts:
            raise NecoError("parts: none is given; name options of conf/dataset and weights: parts={coco:1,folder:0.5}")
        if wrong := [name for name in parts if "/" in name]:
            raise NecoError(f"parts: {wrong[0]!r} has a slash, which divides names from keys; call it something else")
        self.parts = {f"{name}/": parts[name] for name in parts}

    @property
    def chooses(self) -> bool:
        return super().chooses or any(part.chooses for part in self.parts.values())

    def find(self, split: str) -> list[Sample]:
        found = []
        for prefix, part in self.parts.items():
            try:
                found += [replace(sample, key=prefix + sample.key, mask=None) for sample in part.samples(split)]
            except NecoError as error:
                key = f"'dataset.parts={{{prefix[:-1]}:{{weight:{part.weight:g},root:FOLDER}},...}}'"
                raise NecoError(f"part {prefix[:-1]}: {error}".replace("dataset.root=FOLDER", key)) from error
        return sorted(found, key=lambda sample: sample.key)

    def shares(self, samples: Sequence[Sample]) -> list[tuple[int, int]]:
        shares = (share for _, part, own in self._divided(samples) for share in part.shares(own))
        return [(images, max(1, round(self.weight * seen))) for images, seen in shares]

    def bad_limits(self, samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
        limits = super().bad_limits(samples)
        for prefix, part, own in self._divided(samples):
            limits |= {prefix + key: limit for key, limit in part.bad_limits(own).items()}
        return limits

    def _divided(self, samples: Sequence[Sample]) -> Iterator[tuple[str, Dataset, list[Sample]]]:
        """Each part with its samples, under the keys they have there, in the order of `samples`."""
        for prefix, part in sorted(self.parts.items()):
            own = [replace(s, key=s.key.removeprefix(prefix)) for s in samples if s.key.startswith(prefix)]
            if own:
                yield prefix, part, own
