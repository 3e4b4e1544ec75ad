"""What may be shown and kept: text without secrets and without characters that steer a terminal.

Every text file, log, tracker and message passes through `mask_secrets`; nothing else decides what is secret.
"""

import hashlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import unquote

MASK = "***"
# Names of values that are secret. `tokens`, `cls_token` and `key` are none.
SECRET = re.compile(
    r"(?i)(.*[._-])?((access|auth|api|refresh|session|security|bearer|hf|hub|git(hub|lab)|wandb|huggingface)[_-]?token"
    r"|passw(or)?d|passphrase|pwd|secret|credentials?|(api|access|secret|private|account)[_-]?key([_-]?id)?)"
    r"|(.*\.)?token|authorization|(?-i:[A-Z0-9_]*_(TOKEN|KEY|SECRET|PASS|PASSWORD))"
)
# Parameters of an address that say which file is meant.
HARMLESS = re.compile(
    r"(?i)id|(file|path)?name|file(path)?|path|d(ownload|l)|raw|v(ersion)?|rev(ision)?|ref|format|type|export|confirm"
    r"|rlkey|resourcekey"
)
# Parameters that sign an address: they change with each signing.
SIGNING = re.compile(
    r"(?i)x-.*|s[a-z]{1,2}|e|exp|ts?|.*(sig|token|secret|pass|key|cred|auth|access|expir|policy|hash|jwt|code|session|date|time).*"
)
_ADDRESS = re.compile(r"://([^\s\"'<>`|]+)")
_USER = re.compile(r"([^/@]*@)+|[^/@:]*:(?!\d+([/?#]|$)).*@")  # a password may hold / and @
_PARAMETER = re.compile(r"(?<![\w.%-])([\w.%-]+)=([^&;#]*)")
_PAIR = re.compile(r"([=:]\s?(?:(?:Bearer|Basic|Token) )?[\"']?)([^\s\"',;&<>()\[\]{}]+)")
_NAME = re.compile(r"[\w.-]+(?=[\"']?\s?$)")
_PARTS = (
    "token",
    "key",
    "pass",
    "secret",
    "cred",
    "pwd",
    "auth",
)  # fast to look for
_STORAGE = re.compile(r"(hydra\.sweeper\.storage=[\"']?)[^\s\"']+")  # others may write there
_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|wandb_v\d+_\w{16,}"
    r"|AKIA[A-Z0-9]{16}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)"
)
_OPEN = {"null", "none", "true", "false"}  # values that tell nothing
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def mask_secrets(text: str) -> str:
    """Return the text with `***` for passwords, tokens, keys and signatures; masked text stays as it is.

    An address loses user and password. Of its parameters the names stay, and the values that say which file it is; any
    other value becomes `***`, with six digits of its hash unless it signs the address. So two files keep two addresses,
    and an address that was signed again is still the same.
    """
    if "=" in text or ":" in text:
        text = _STORAGE.sub(lambda found: found[0] if found[0].endswith("=null") else found[1] + MASK, text)
        text = _ADDRESS.sub(lambda found: f"://{_mask_address(found[1])}", text)
        text = _PAIR.sub(_mask_pair, text)
    for name, value in os.environ.items():
        if len(value) >= 12 and "/" not in value and value in text and SECRET.fullmatch(name):
            text = text.replace(value, MASK)
    return _TOKEN.sub(MASK, text)


def mask_nested(value: Any, name: str = "") -> Any:
    """Return a nested mapping or list with secrets masked in its texts; `name` is the key that holds the value."""
    if isinstance(value, str):
        secret = value and value.lower() not in _OPEN and SECRET.fullmatch(name)
        return MASK if secret else mask_secrets(value)
    if isinstance(value, Mapping):
        return {key: mask_nested(each, str(key)) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mask_nested(each, name) for each in value)
    return value


def make_printable(text: str) -> str:
    """Return the text with control characters, but for tabs and line ends, and changes of direction as escapes."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return `make_printable` of the text without line ends and tabs, for a cell of a table."""
    return make_printable(re.sub(r"\s", " ", text))


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print a message for people."""
    print(make_printable(mask_secrets(text)), file=stream or sys.stdout, flush=True)


def print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, as sys.excepthook does."""
    print_line("".join(traceback.format_exception(kind, error, trace)), sys.stderr)


class Formatter(logging.Formatter):
    """Formats records, their tracebacks included, as `print_line` shows them."""

    def format(self, record: logging.LogRecord) -> str:
        return make_printable(mask_secrets(super().format(record)))


def _mask_address(rest: str) -> str:
    """What follows `://`."""
    rest = _USER.sub(f"{MASK}@", rest, count=1) if _USER.match(rest) else rest
    place, mark, query = rest.partition("?")
    if mark and "=" not in query and len(query) >= 16 and not query.startswith(MASK):
        return f"{place}?{MASK}{_digest(query)}"
    return _PARAMETER.sub(lambda found: f"{found[1]}={_mask_parameter(found[1], found[2])}", rest)


def _mask_parameter(name: str, value: str) -> str:
    name = unquote(name)
    if not value or value.startswith(MASK) or HARMLESS.fullmatch(name):
        return value
    return MASK if SIGNING.fullmatch(name) else MASK + _digest(value)


def _mask_pair(found: re.Match[str]) -> str:
    before = found.string[max(0, found.start() - 60) : found.start()]
    name = _NAME.search(before) if any(part in before.lower() for part in _PARTS) else None
    if not name or found[2].startswith(MASK) or found[2].lower() in _OPEN or not SECRET.fullmatch(name[0]):
        return found[0]
    return found[1] + MASK


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode(errors="replace")).hexdigest()[:6]
