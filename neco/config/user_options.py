"""Check the option files that users keep in the working folder and in their config folder, before Hydra reads them.

Hydra itself builds what its own node `hydra` names (callbacks, launcher, logging), and reads `machine/default.yaml`
without being asked: a folder that was downloaded must not run anything in this way.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neco.config.discovery import flatten, user_folders
from neco.config.validate import call, refuse_components
from neco.utils.errors import NecoError
from neco.utils.yaml_file import load_yaml

HYDRA = ("mode", "sweep", "sweeper")  # keys of `hydra` that experiments and sweeps may set
RUNS_CODE = ("setup", "extra")  # keys of `launcher` that can run commands: shell lines, and any option of sbatch


def is_option_file(path: Path) -> bool:
    """Return whether there is a file. Raises NecoError for something of that name that cannot be read as one."""
    try:
        there, known = path.is_file(), os.path.lexists(path)
    except OSError as error:
        raise NecoError(f"{path}: cannot be read: {error.strerror}") from error
    if known and not there:
        raise NecoError(f"{path}: is no file, or a link to none")
    return there


def check_option_name(name: str) -> None:
    """Raise NecoError for the name of an option, GROUP/NAME, that would lead out of the folders of options.

    Files elsewhere, named in the `defaults` of an option for example, would be read unchecked.
    """
    if name.startswith("/") or ".." in name.split("/"):
        raise NecoError(f"{name}: the name of an option leads out of its group; options are GROUP/NAME without '..'")


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
    _check_launcher(path, node, packages)
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
        if {"hydra", "trust_pickle", "launcher"} & {*re.findall(r"\w+", key)}:  # also as `experiment@hydra`
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


def _check_launcher(path: Path, node: Mapping[str, Any], packages: list[str]) -> None:
    """Raise NecoError where an option sets what can run commands, unless it is in the user's config folder."""
    own = user_folders()[-1]
    if any(folder.resolve() == own.resolve() for folder in path.parents):
        return
    given = node.get("launcher")
    keys = [f"launcher.{key}" for key in flatten(given) if key in RUNS_CODE]
    keys += ["launcher"] if isinstance(given, str) else []  # a reference, which may stand for these keys
    keys += ["launcher" for name in packages if "launcher" in name.split(".")]
    if keys:
        machine = own / "machine" / (path.name if path.parent.name == "machine" else "default.yaml")
        raise NecoError(f"{path}: {keys[0]} can run commands: set it on the command line or in {machine}")


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
