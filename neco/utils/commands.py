"""Commands and overrides for people to paste into a shell, whatever their values hold.

A value is read three times: by the shell, by Hydra's grammar and by OmegaConf, which takes `${` for an interpolation.
An *override* here is KEY=VALUE as Hydra reads it; what a user typed and Hydra took is one as it is.
"""

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[a-z_./][\w./-]*", re.ASCII | re.IGNORECASE)


def override(key: str, value: Any) -> str:
    """KEY=VALUE in Hydra's grammar, which gives `value` back: text, numbers, None and lists of them."""
    return f"{key}={_hydra_value(value)}"


def format_override(key: str, value: Any) -> str:
    """KEY=VALUE to paste into a shell, for messages that advise one."""
    return shell_word(override(key, value))


def format_command(overrides: Iterable[str], python: str | None = None) -> str:
    """`python -m neco OVERRIDES` to paste into a shell; the one place that prints such a command.

    Args:
        python: None is the name of the interpreter that the user typed, without its folder.
    """
    if python is None:
        python = Path(sys.orig_argv[0]).name if sys.orig_argv[1:3] == ["-m", "neco"] else "python"
    return " ".join([shell_word(python), "-m neco", *map(shell_word, overrides)])


def select(overrides: Iterable[str], *names: str) -> list[str]:
    """The overrides of these keys or groups, and of all keys in them."""
    return [o for o in overrides if any(f"{key_of(o)}.".startswith(f"{name}.") for name in names)]


def key_of(override: str) -> str:
    """The key or group that an override sets, adds or deletes."""
    return override.lstrip("+~").partition("=")[0]


def escape_interpolation(text: str) -> str:
    """Text that OmegaConf takes as it is: `${` stands for an interpolation, `\\\\${` for itself."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def shell_word(text: str) -> str:
    """One word for the shell, in double quotes if it has single ones for Hydra in it and nothing that they let pass."""
    return f'"{text}"' if "'" in text and not re.search(r'["$`\\!\n]', text) else shlex.quote(text)


def _hydra_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(_hydra_value, value))}]"
    text = escape_interpolation(str(value))
    if PLAIN.fullmatch(text):
        return text
    # Backslashes count double before a quote, the closing one included, and stand for themselves elsewhere.
    doubled = re.sub(r"(\\+)(?='|\Z)", r"\1\1", text)
    return "'" + doubled.replace("'", "\\'") + "'"
