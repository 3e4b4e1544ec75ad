"""What is wrong with a command line, in one sentence, with what was probably meant.

All advice comes from one look-up: `Names` knows the groups, their options and the keys of each, read from conf/. The
functions below only find out which word Hydra stumbled over, and look up its parts.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neco.config import discovery, validate
from neco.utils.commands import PLAIN, format_override, key_of, shell_word
from neco.utils.errors import NecoError
from neco.utils.yaml_file import load_yaml

# Of groups whose option may be taken for a path: what that is, and the overrides that name it
OWN = {"dataset": ("a folder", "dataset=folder ", "dataset.root"), "model": ("a file or run", "", "checkpoint")}
HYDRA = ("hydra/launcher", "hydra/sweeper")


@dataclass(frozen=True)
class Names:
    """What there is to be named on a command line.

    Attributes:
        options: of each group.
        keys: of each key the options (`GROUP=OPTION`) that have it; "" is for keys that are always there.
        lists: the keys and groups that take several values.
        unset: the keys that are null in conf/, so that it does not say what they take.
    """

    options: dict[str, list[str]]
    keys: dict[str, list[str]]
    lists: set[str]
    unset: set[str]

    @classmethod
    def read(cls) -> "Names":
        """From conf/ and the user's folders."""
        options = {group: discovery.options(group) for group in discovery.groups() if group not in ("hydra", "machine")}
        keys: dict[str, list[str]] = {}
        lists, unset = {*validate.LISTS}, set()
        for group, name, node in _nodes({**options, **{group: discovery.options(group) for group in HYDRA}}):
            own = group and group not in ("task", "experiment", "sweep", *HYDRA)  # the others' files begin at the top
            prefix = f"{group}.{name}." if group in validate.LISTS else f"{group}." if own else ""
            for key, value in _leaves(node, prefix):
                owner = f"{group}={name}" if group else ""
                if group not in ("experiment", "sweep"):
                    keys.setdefault(key, []).append(owner)
                if isinstance(value, list):
                    lists.add(key)
                elif value is None:
                    unset.add(key)
        return cls(options, keys, lists, unset)

    def groups_with(self, option: str) -> list[str]:
        """The groups that have an option of this name."""
        return [group for group, names in self.options.items() if option in names]

    def find(self, key: str, task: str) -> str:
        """The key or group that a wrong one most likely stands for: of the task, if that has one; else empty."""
        key = key.replace("-", "_")
        places = [*self.options, *self.keys]
        last = key.rpartition(".")[2]
        ends = [k for k in places if k == key or k.endswith(f".{key}")] or [
            k for k in places if k.rpartition(".")[2] == last
        ]
        if ends:  # the task's own before those of all tasks, before those of some option
            owners = [f"task={task}", ""]
            return min(ends, key=lambda k: ([*(o in self.keys.get(k, [""]) for o in owners), True].index(True), len(k)))
        return _near(key, places)


def _nodes(options: dict[str, list[str]]) -> Iterator[tuple[str, str, Any]]:
    """(group, option, its file) for all files of options, those that they are based on included.

    A file that cannot be read has no names to advise: it is not what the message is about.
    """
    yield "", "", load_yaml(discovery.folder() / "config.yaml")
    for group, names in options.items():
        for name in names:
            with contextlib.suppress(NecoError):
                for base in discovery.lineage(group, name):
                    yield group, name, load_yaml(discovery.find(group, base))


def _leaves(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if key not in ("defaults", "hydra", "_target_"):
            yield f"{prefix}{key}", value
            if isinstance(value, dict):
                yield from _leaves(value, f"{prefix}{key}.")


def _near(name: str, valid: Sequence[str]) -> str:
    found = re.match(r"; did you mean '(.*)'\?", discovery.nearest(name, valid))
    return found[1] if found else ""


def arrange(arguments: Sequence[str]) -> list[str]:
    """The arguments with Hydra's own options first, wherever they stood: Hydra reads only words that stand together.

    Raises:
        NecoError: an option that Hydra does not have, or that lacks its value.
    """
    from hydra._internal.utils import get_args_parser

    actions = {name: action for action in get_args_parser()._actions for name in action.option_strings}
    options, words, rest = [], [], [*arguments]
    while rest:
        word = rest.pop(0)
        name, given, _ = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif not (action := actions.get(name)):
            raise NecoError(_unknown_option(word, rest, arguments))
        elif given or action.nargs == 0:
            options.append(word)
        else:
            choices = [*(action.choices or [])]
            if rest and (rest[0] in choices if choices else "=" not in rest[0]):
                options += [word, rest.pop(0)]
            elif action.nargs == "?":
                options.append(word)
            else:
                wanted = f"one of {', '.join(choices)}: {word} {choices[0]}" if choices else "a value"
                raise NecoError(f"{word}: needs {wanted}")
    return [*options, *words]


def _unknown_option(word: str, rest: Sequence[str], arguments: Sequence[str]) -> str:
    name, _, value = word.lstrip("-").partition("=")
    value = value or (rest[0] if rest and not rest[0].startswith("-") and "=" not in rest[0] else "")
    found = Names.read().find(name, _task(arguments)) if name else ""
    meant = _as_typed(found, value) if value else f"{found}=VALUE"
    return f"{word}: settings are written KEY=VALUE" + (f"; did you mean {meant}?" if found else ", see --help")


def _as_typed(key: str, value: str) -> str:
    """KEY=VALUE for a shell, with more quotes only if Hydra does not read the value as it was typed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        return format_override(key, value)
    return shell_word(f"{key}={value}")


def _task(overrides: Sequence[str]) -> str:
    return next((o.partition("=")[2] for o in reversed(overrides) if key_of(o) == "task"), "train")


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """What Hydra complains about, in one sentence, with what was probably meant."""
    text = str(error)
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, NecoError):  # of a resolver
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) and error.errno:  # before the job starts, only the folder of the run is made
        return f"run_dir: cannot make the folder {error.filename}: {error.strerror}"
    if option := re.search(r"Could not (?:find|load) '([^']+)'", text):
        groups = [group for group in (*discovery.groups(), *HYDRA) if option[1].startswith(f"{group}/")]
        group = max(groups, key=len, default="")
        return _wrong_option(group or option[1].partition("/")[0], option[1].removeprefix(f"{group}/"))
    if key := re.search(r"Could not override '([^']+)'", text):
        return _wrong_key(key[1], overrides)
    if several := re.search(r"Ambiguous value for argument '(.+)'", text):
        return _several_values(several[1])
    if override := getattr(error, "override", None):
        return _unreadable(override, text.splitlines()[0], overrides)
    if "Config group override must be" in text:
        wrong = next((o for o in overrides if re.fullmatch(r"\w+=(null|)", o)), text.strip())
        return f"{wrong}: an option of the group is wanted, see --help"
    return " ".join(text.split())


def _wrong_option(group: str, name: str) -> str:
    """`name` is no option of the group: it may be one of another, or a path."""
    said, names = f"{group}={name}: no such option", Names.read()
    if elsewhere := names.groups_with(name):
        return f"{said}; did you mean {elsewhere[0]}={name}?"
    if path := _as_path(group, name):
        return f"{said}; {path}"
    valid = names.options.get(group) or discovery.options(group)
    return f"{said}{discovery.nearest(name, valid)} [looked in conf/{group}]"


def _as_path(group: str, text: str) -> str:
    """The overrides that name a path in place of an option of the group, if the text looks like one; else empty."""
    if group not in OWN or not (
        text.startswith(("~", ".")) or "/" in text or Path(text).suffix[1:].isalpha() or Path(text).exists()
    ):
        return ""
    what, choice, key = OWN[group]
    return f"{what} of your own is {choice}{format_override(key, text)}"


def _several_values(override: str) -> str:
    """`a,b` is a sweep, without -m."""
    key, _, value = override.partition("=")
    plain, names, jobs = (
        key.lstrip("+~").replace("val_dataset.", "dataset."),
        Names.read(),
        "-m starts one job for each",
    )
    several = f"several values of one job are written {shell_word(f'{key}=[{value}]')}"
    if plain in names.lists:
        return f"{override}: {several}; {jobs}"
    text = f"{jobs} of several values; a single text with commas is quoted: {format_override(key, value)}"
    return f"{override}: {several}; {text}" if plain in names.unset else f"{override}: {text}"


def _wrong_key(key: str, overrides: Sequence[str]) -> str:
    """There is no such key, or not with these options."""
    names, task = Names.read(), _task(overrides)
    node, _, rest = key.partition(".")
    if node == "val_dataset" and not any(key_of(o) == "dataset@val_dataset" for o in overrides):
        return f"{key}: no labelled set is chosen to evaluate on; choose it with dataset@val_dataset=NAME"
    plain = key.replace("val_dataset.", "dataset.", 1)
    chosen = rest.partition(".")[0]
    if node in validate.LISTS and chosen and not _is_selected(node, chosen, overrides):
        near = "" if chosen in names.options[node] else discovery.nearest(chosen, names.options[node])
        return f"{key}: {node}={chosen} is not selected; add it: {node}=[{chosen},...]{near}"
    if owners := [owner for owner in names.keys.get(plain, []) if owner]:
        has = " or ".join(owners if len(owners) <= 4 else [*owners[:3], "..."])
        return f"{key}: a key of {has}, not of this command with task={task} [from the command line]"
    if "@" not in key and (found := names.find(plain, task)):
        return f"{key}: no such key or group; did you mean '{found}'? [from the command line]"
    parent, _, last = plain.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in names.keys if k.rpartition(".")[0] == parent]
    return f"{key}: no such key{discovery.nearest(last, siblings)} [from the command line]"


def _is_selected(group: str, name: str, overrides: Sequence[str]) -> bool:
    """Whether an option of a list is among those typed, or those of conf/config.yaml."""
    typed = [o.partition("=")[2] for o in overrides if key_of(o) == group]
    defaults = load_yaml(discovery.folder() / "config.yaml")["defaults"]
    usual = next(str(each[group]) for each in defaults if isinstance(each, dict) and group in each)
    return bool(re.search(rf"\b{re.escape(name)}\b", [usual, *typed][-1]))


def _unreadable(override: str, why: str, overrides: Sequence[str]) -> str:
    """Hydra's grammar does not take it: a word without `=`, or characters that need quotes."""
    key, equals, value = override.partition("=")
    if meant := _untypographic(override):
        return f"{override}: holds quotes, dashes or spaces of a word processor; did you mean {meant}?"
    if equals and (key != key.strip() or value != value.strip()):
        return f"{override}: no spaces around `=`; did you mean {_as_typed(key.strip(), value.strip())}?"
    if not equals:
        return _bare_word(override, overrides)
    if path := _as_path(key.lstrip("+~"), value):
        return f"{override}: no such option; {path}"
    reason = "" if why.startswith("Lexer") else f" ({why})"  # an exception's name and the override once more
    return (
        f"{override}: cannot be read as KEY=VALUE{reason}; values with special characters need quotes within quotes: "
        f"{format_override(key, value)}"
    )


def _untypographic(word: str) -> str:
    """A word whose key has typographic quotes, dashes or spaces, without these; else empty. Values may hold them."""
    plain = re.sub("[“”„«»‘’‚]", "", re.sub("[–—−]", "-", word.replace("\xa0", " "))).strip()
    plain = re.sub("^-+", "--", plain)
    key = word.partition("=")[0]
    return plain if plain.partition("=")[0] != key and not key.isascii() and plain.isascii() else ""


def _bare_word(word: str, overrides: Sequence[str]) -> str:
    said, names, place = f"{word}: is no KEY=VALUE", Names.read(), [*overrides].index(word) if word in overrides else 0
    if groups := names.groups_with(word):
        return f"{said}; did you mean {groups[0]}={word}?"
    before, after = overrides[place - 1] if place else "", [*overrides[place + 1 : place + 3]]
    if after[:1] == ["="] or (after and after[0].startswith("=")):
        value = "".join(after)[1:] if after[0] == "=" else after[0][1:]
        return f"{said}: no spaces around `=`; did you mean {_as_typed(word, value)}?"
    if "=" in before and not before.startswith("-"):
        key, _, value = before.partition("=")
        return f"{said}; a value with spaces needs quotes within quotes: {format_override(key, f'{value} {word}')}"
    if PLAIN.fullmatch(word) and (found := names.find(word, _task(overrides))):
        return f"{said}; did you mean {found}=VALUE?"
    return f"{said}, see --help"
