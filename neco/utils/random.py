"""Random numbers that are a function of a key."""

import hashlib

import numpy as np


def generator(*key: object) -> np.random.Generator:
    """Random numbers that are a function of `key` alone: not of workers, order or what was drawn before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
