"""Where the seconds before the first step go."""

import time

_marks = [("", time.monotonic())]


def begin() -> None:
    """A job begins: what came before it, in the first job of a process, was Hydra."""
    if len(_marks) > 1:
        _marks[:] = [("", time.monotonic())]
    else:
        mark("Hydra")


def mark(what: str) -> None:
    """`what` is done."""
    _marks.append((what, time.monotonic()))


def told() -> str:
    """`9.1 s: imports 4.2, ...`, of this job so far."""
    parts = [f"{what} {now - _marks[i][1]:.1f}" for i, (what, now) in enumerate(_marks[1:])]
    return f"{_marks[-1][1] - _marks[0][1]:.1f} s: {', '.join(parts)}"
