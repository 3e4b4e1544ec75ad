"""Dense post-training of vision transformers with Patch Neighbor Consistency."""

from typing import Any

__all__ = ["load_backbone"]


def __getattr__(name: str) -> Any:
    if name == "load_backbone":  # on demand: `python -m neco --help` must not wait for torch
        from neco.model import load_backbone

        return load_backbone
    raise AttributeError(f"module 'neco' has no attribute {name!r}")
