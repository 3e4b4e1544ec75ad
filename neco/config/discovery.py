"""Find the options of conf/ and of the user's own folders."""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from neco.utils.errors import NecoError
from neco.utils.yaml_file import load_yaml


def folder() -> Path:
    """`conf/`: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "conf", package.parent / "conf") if (path / "config.yaml").is_file())


def groups() -> set[str]:
    """The groups of options, `machine` among them, which only users have."""
    return {path.name for path in folder().iterdir() if path.is_dir()} | {"machine"}


def user_folders() -> list[Path]:
    """Where users keep options of their own and `machine.yaml`: the working folder and the user's config folder.

    Raises:
        NecoError: there is no working folder.
    """
    try:
        here = Path.cwd()
    except OSError as error:
        raise NecoError(
            f"the working folder cannot be used ({error.strerror}), it may have been removed: cd to one that is there"
        ) from error
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [here, config / "neco"]


def options(group: str) -> list[str]:
    """The names of a group's options, the user's among them; `_name.yaml` holds what options share and is none."""
    return sorted({path.stem for base in (folder(), *user_folders()) for path in base.glob(f"{group}/[!_]*.yaml")})


def find(group: str, name: str) -> Path:
    """The file of an option."""
    for base in (folder(), *user_folders()):
        if (path := base / group / f"{name}.yaml").is_file():
            return path
    raise NecoError(f"no such option: {group}={name}{nearest(name, options(group))} [looked in conf/{group}]")


def lineage(group: str, name: str) -> list[str]:
    """The option and, after it, those of its group that it is based on."""
    if not any((base / group / f"{name}.yaml").is_file() for base in (folder(), *user_folders())):
        return []
    bases = load_yaml(find(group, name)).get("defaults") or []
    return [name, *(each for base in bases if isinstance(base, str) for each in lineage(group, base.split("@")[0]))]


def nearest(wrong: str, valid: Sequence[str]) -> str:
    """`; did you mean 'x'?` or the list of what there is."""
    if match := difflib.get_close_matches(wrong, valid, 1, 0.6):
        return f"; did you mean '{match[0]}'?"
    begun = [name for name in valid if len(name) > 2 and len(wrong) > 2 and wrong.startswith(name)]
    if len(begun) == 1:  # evaluation: eval
        return f"; did you mean '{begun[0]}'?"
    return f"; there is: {', '.join(valid)}" if 0 < len(valid) <= 40 else ""


def flatten(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys of a nested mapping."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from flatten(value, f"{prefix}{key}.")
