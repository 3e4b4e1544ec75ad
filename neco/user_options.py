"""Check the option files that users keep in the working folder and in their config folder, before Hydra reads them.

Hydra itself builds what its own node `hydra` names (callbacks, launcher, logging), and reads `machine/default.yaml`
without being asked: a folder that was downloaded must not run anything in this way.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neco.config import call, flatten, refuse_components, user_folders
from neco.errors import NecoError
from neco.yaml_file import load_yaml

HYDRA = ("mode", "sweep", "sweeper")  # keys of `hydra` that experiments and sweeps may set
# Settings that can run commands: shell lines, and any option of sbatch
RUNS_CODE = ("launcher.setup", "launcher.extra")


def is_option_file(path: Path) -> bool:
    """Return whether there is a file. Raises NecoError for something of that name that cannot be read as one."""
    try:
        there, known = path.is_file(), os.path.lexists(path)
    except OSError as error:
        raise NecoError(f"{path}: cannot be read: {error.strerror}") from error
    if known and not there:
        raise NecoError(f"{path}: is no file, or a link to none")
    return there


def check_option_file(path: Path, group: str, package: str | None) -> None:
    """Raise NecoError for an option file that could make Hydra build something, or that cannot be read.

    Args:
        group: the folder of the option, e.g. `machine`.
        package: of its first line, `# @package PACKAGE`.
    """
    node = load_yaml(path)
    packages = [package or "", *re.findall(r"@([\w.]+)", " ".join(_texts(node.get("defaults"))))]
    if any("hydra" in name.split(".") for name in packages):
        raise NecoError(
            f"{path}: adds to the node hydra; only its keys {', '.join(HYDRA)} can be set, as hydra: {{...}}"
        )
    if group == "machine":
        _check_machine(path, node, package)
        return
    hydra = node.get("hydra") or {}
    if not isinstance(hydra, Mapping) or (wrong := [key for key in hydra if key not in HYDRA]):
        told = f"hydra.{wrong[0]}" if isinstance(hydra, Mapping) else f"hydra={hydra!r:.100}"
        raise NecoError(f"{path}: {told}: an option may set only {', '.join(HYDRA)} of hydra")
    call(refuse_components, str(path), value=hydra, where="hydra")
    for text in _texts(hydra):
        if re.fullmatch(r"\s*\$\{.*\}\s*", text, re.DOTALL):  # it may stand for a node with a `_target_`
            raise NecoError(f"{path}: hydra: {text!r:.100}: Hydra's own keys take no references; write the value")
    params = (hydra.get("sweeper") or {}).get("params") or {}
    for key in (str(key).lstrip("+~") for key in params):
        if re.match(r"hydra\b", key) or key == "trust_pickle":
            raise NecoError(f"{path}: hydra.sweeper.params: {key} can be set on the command line only")


def _check_machine(path: Path, node: dict[str, Any], package: str | None) -> None:
    if package != "_global_":
        raise NecoError(f"{path}: its first line has to be '# @package _global_'")
    for key in ("hydra", "defaults"):
        if key in node:
            raise NecoError(
                f"{path}: {key}: a machine file holds settings only, it chooses no options and no components"
            )
    call(refuse_components, str(path), value=node, where="")
    trusted = path.parent.parent.resolve() == user_folders()[-1].resolve()
    for key in () if trusted else set(flatten(node)) & set(RUNS_CODE):
        own = user_folders()[-1] / "machine" / path.name
        raise NecoError(f"{path}: {key} can run commands: set it on the command line or in {own}")


def check_override(override: str) -> None:
    """Raise NecoError for an argument that would make Hydra build something."""
    key, _, value = override.lstrip("+~").partition("=")
    parts = re.split(r"[.@]", key)
    if parts[0] == "hydra" and ({"_target_", "class", "()"} & {*parts} or re.search(r"_target_|\(\)|\bclass\b", value)):
        raise NecoError(f"{override}: the components of hydra are those of conf/hydra; they cannot be replaced")


def machine_files(choices: Mapping[str, Any]) -> list[Path]:
    """Return the machine files that were read for these choices."""
    names = [name for group, name in choices.items() if group.split("@")[0] == "machine" and name]
    files = [[base / "machine" / f"{name}.yaml" for base in user_folders()] for name in names]
    return [path for paths in files for path in [path for path in paths if path.is_file()][:1]]


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, keys included."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield str(key)
            yield from _texts(below)
    elif isinstance(value, list):
        for below in value:
            yield from _texts(below)
    elif isinstance(value, str):
        yield value
