"""All data sets at once, for `task=check`."""

from typing import Any

from neco.dataset.base import Dataset, Sample
from neco.utils.errors import NecoError


class All(Dataset):
    """Stands for every option that has a place of its own."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)

    def find(self, split: str) -> list[Sample]:
        raise NecoError("dataset=all is for task=check, which says which are there; choose one, or dataset=mix")
