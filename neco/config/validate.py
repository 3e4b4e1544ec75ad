"""From a composed configuration to validated objects. Imports neither torch nor the rest of the project.

A node with a `_target_` is checked against the signature of that class, any other node against the dataclass of its
name in `neco.config.schema`: the constructor is the schema. `validate` builds everything that needs no data, so that
what would fail after hours fails in the first second.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from neco.config.discovery import find, flatten, folder, groups, lineage, nearest, user_folders
from neco.config.schema import SPINE, Run
from neco.config.types import Components
from neco.utils import atomic_files
from neco.utils.errors import NecoError
from neco.utils.yaml_file import load_yaml

log = logging.getLogger(__name__)


LEAVES = ("model", "augment", "dataset", "val_dataset", "loss", "head", "extract")
LISTS = ("eval", "logger")
RULES: Any = {"arbitrary_types_allowed": True, "allow_inf_nan": False}
MAX_DEPTH, MAX_VALUES = 16, 100_000  # of a value: what comes from a file may hold itself, or stand for 10^9 values


def register_resolvers() -> None:
    """Give Hydra what `${cache_home:}` and `${run_folder:...}` in conf/config.yaml stand for."""
    from omegaconf import OmegaConf

    def run_folder(run_dir: Any) -> str:
        if run_dir is None:
            raise NecoError("run_dir: the name of a folder is wanted")
        found = call(atomic_files.expand_user, "run_dir", text=str(run_dir))
        if "${" in str(Path(found).absolute()):  # Hydra takes it for a value to look up
            raise NecoError(f"run_dir={found}: a name with '${{' in it cannot be the folder of a run; choose another")
        return found

    def cache_home() -> str:
        return os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")

    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    OmegaConf.register_new_resolver("cache_home", cache_home, replace=True)


@contextlib.contextmanager
def without_working_folder() -> Iterator[None]:
    """A block in which no module is imported from the working folder. Raises NecoError where there is none."""
    before, here = sys.path[:], user_folders()[0]
    sys.path[:] = [path for path in before if path and Path(path).absolute() != here]
    try:
        yield
    finally:
        sys.path[:] = before


@functools.cache
def project_targets(group: str) -> frozenset[str]:
    """Return the `_target_`s of a group in conf/; for `extract` and `head`, which are no groups, the only one."""
    nodes = [load_yaml(path) for path in folder().glob(f"{group}/*.yaml")]
    if not nodes:
        nodes = [load_yaml(path).get(group) or {} for path in (folder() / "config.yaml", *folder().glob("task/*.yaml"))]
    return frozenset(node["_target_"] for node in nodes if "_target_" in node)


def user_targets(group: str) -> set[str]:
    """Return the `_target_`s of the options that users have of their own. What else lies there counts for nothing."""
    found: set[Any] = set()
    if group not in groups():  # `extract` and `head` have no options
        return found
    for path in (path for base in user_folders() for path in base.glob(f"{group}/**/*.yaml")):
        with contextlib.suppress(NecoError):
            found.add(str(load_yaml(path).get("_target_", "")))
    return found - {""}


def locate(target: str) -> Any:
    """Import the class or function that a `_target_` names."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise NecoError(f"_target_: {target} cannot be imported ({error})") from error
    if not callable(found):
        raise NecoError(f"_target_: {target} is no class but a {type(found).__name__}")
    return found


def component_class(node: Any, where: str, group: str = "") -> Any:
    """Return the class that a node is to be built of, imported after it is known that an option of its group names it.

    Raises NecoError for a node without `_target_` and for any other `_target_`. `group`: where `where` does not say it.
    """
    name = group or re.split(r"\W", where)[0]
    group = {"val_dataset": "dataset"}.get(name, name)
    if not isinstance(node, Mapping) or "_target_" not in node:
        option = where.replace("val_dataset", "dataset@val_dataset")
        raise NecoError(f"{where}={node!r:.100}: an option of the group is wanted; choose one with {option}=NAME")
    target, known = node["_target_"], project_targets(group)
    if not isinstance(target, str) or (target not in known and target not in user_targets(group)):
        own = (
            f"; a class of your own needs an option file that names it, {group}/NAME.yaml" if group in groups() else ""
        )
        near = nearest(target, sorted(known)) if isinstance(target, str) else ""
        near = near if "did you mean" in near else f"; there is: {', '.join(sorted(known))}"
        raise NecoError(f"{where}._target_={target!r:.100}: no option of {group} names this class{near}{own}")
    return locate(target)


def walk_values(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of nested mappings and lists with its place. Raises NecoError beyond MAX_DEPTH or MAX_VALUES."""
    pending, count = [(where, value, 0)], 0
    while pending:
        place, part, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise NecoError(
                f"{where}: is nested too deep, or holds too much, for a value of the configuration".lstrip(": ")
            )
        yield place, part
        if isinstance(part, Mapping):
            pending += [(f"{place}.{key}".lstrip(".")[:200], below, depth + 1) for key, below in part.items()]
        elif isinstance(part, list | tuple | set | frozenset):
            pending += [(place, below, depth + 1) for below in part]


def refuse_components(value: Any, where: str) -> None:
    """Raise NecoError where a value holds a component at any depth."""
    for place, part in walk_values(value, where):
        if isinstance(part, Mapping) and "_target_" in part:
            place = f"{place}._target_".lstrip(".")
            raise NecoError(f"{place}={part['_target_']!r:.100}: a value holds data only; nothing is built there")


def parameters(target: Callable[..., Any]) -> dict[str, tuple[inspect.Parameter, Any]]:
    """What `target` takes by name, with types; `**keywords` of a constructor stand for what its base class takes."""
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    classes = target.__mro__ if inspect.isclass(target) else ()
    for function in [vars(owner)["__init__"] for owner in classes if "__init__" in vars(owner)] or [target]:
        hints = get_type_hints(function, include_extras=True)
        taken = list(inspect.signature(function).parameters.values())[1 if classes else 0 :]
        for parameter in taken:
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                found.setdefault(parameter.name, (parameter, hints.get(parameter.name, Any)))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
            break
    return found


def check(
    target: Callable[..., Any], values: Mapping[str, Any], where: str, runtime: Sequence[str] = ()
) -> dict[str, Any]:
    """`values` converted to the annotations of `target`; unknown, missing and mistyped ones are errors that say so.

    A parameter annotated with `Components` takes nodes, which are built when all other values are known to be right.
    """
    known = {name: found for name, found in parameters(target).items() if name not in runtime}
    values = {name: value for name, value in values.items() if value != "???"}  # YAML's way of asking for one
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in known:
            raise NecoError(f"{prefix}{name}: no such key{nearest(str(name), list(known))}")
    for name, (parameter, _) in known.items():
        if parameter.default is parameter.empty and name not in values:
            raise NecoError(f"{prefix}{name}: needs a value")
    kinds = {name: _components(known[name][1]) for name in values}
    for name, value in values.items():
        if not kinds[name]:
            refuse_components(value, f"{prefix}{name}")
    checked = {}
    for name in sorted(values, key=lambda name: kinds[name] is not None):
        value, group = values[name], kinds[name]
        if group and isinstance(value, Mapping):
            value = {key: build(node, f"{prefix}{name}.{key}", group) for key, node in value.items()}
        checked[name] = _convert(value, known[name][1], f"{prefix}{name}")
    return {name: checked[name] for name in values}


def _components(hint: Any) -> str | None:
    """The group of the components that a parameter declares by its annotation."""
    return next((mark.group for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Components)), None)


def _convert(value: Any, hint: Any, where: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        if (
            isinstance(value, str) and not value.strip() and "bool" not in str(hint)
        ):  # run_dir=$NOT_SET is not the working folder
            raise ValueError("is empty (a variable that is not set?); leave it out, or write null")
        if isinstance(value, bool) and "bool" not in str(hint) and hint is not Any:
            raise ValueError("a number or text is wanted, not true/false")
        kind = TypeAdapter(hint, config=RULES)
        with contextlib.suppress(ValidationError):
            return kind.validate_python(value)
        if isinstance(value, str | int | float):  # runs=x is a list of one
            with contextlib.suppress(ValidationError):
                return kind.validate_python([value])
        return kind.validate_python(value)
    except ValidationError as error:
        reasons = dict.fromkeys(_reason(detail, hint) for detail in error.errors())
        raise NecoError(f"{where}={value!r:.200}: {'; or '.join(reasons).lower()}") from error
    except ValueError as error:
        raise NecoError(f"{where}={value!r:.200}: {error}") from error


def _reason(detail: Any, hint: Any) -> str:
    """What pydantic says is wrong with a value; of lists, how many values they hold, as the tuples of `hint` say."""
    sizes = {str(len(get_args(kind))) for kind in (hint, *get_args(hint)) if get_origin(kind) is tuple}
    # too few values are "missing", at the last part of the place
    if sizes and detail["type"] in ("tuple_type", "too_long", "missing"):
        return f"must be a list of {' or '.join(sorted(sizes))} values, written [a,b]"
    return str(detail["msg"])


def examine(
    node: Any, where: str, group: str = "", runtime: Sequence[str] = ()
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the class of a node and its checked values. Raises NecoError for whatever `build` would refuse."""
    target = component_class(node, where, group)
    return target, check(target, {key: value for key, value in node.items() if key != "_target_"}, where, runtime)


def build(node: Any, where: str, group: str = "", /, **runtime: Any) -> Any:
    """The object that a node with a `_target_` describes; `runtime` are arguments that never come from YAML.

    `group` is the one whose options may name its class, where `where` does not begin with it.
    """
    target, values = examine(node, where, group, tuple(runtime))
    return call(target, where, **values, **runtime)


def option(group: str, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The node of an option as Hydra composes it, `${keys}` taken from the whole (resolved) configuration."""
    from omegaconf import OmegaConf

    path = find(group, name)
    load_yaml(path)  # says what is wrong with it; OmegaConf has other rules for numbers
    whole = OmegaConf.create({**config, group: OmegaConf.load(path)})
    node: dict[str, Any] = OmegaConf.to_container(whole, resolve=True)[group]  # type: ignore[index, call-overload, assignment]
    for base in node.pop("defaults", []):
        node = {**(option(group, base, config) if base != "_self_" else {}), **node}
    return node


def mixed(node: Mapping[str, Any], where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A mixture with each part as a whole node: `coco: 0.5` is the option `coco` with this weight.

    A mapping sets any key of the option, and `option` names it where the part is called something else.
    """
    parts = {}
    if not isinstance(node["parts"], Mapping | None):  # a text is what bash makes of {coco:1,folder:0.5}
        example = f"'{where}.parts={{coco:1,folder:0.5}}'"
        raise NecoError(f"{where}.parts={node['parts']!r}: a mapping is wanted, quoted for the shell: {example}")
    for name, given in (node["parts"] or {}).items():
        place, given = f"{where}.parts.{name}", dict(given) if isinstance(given, Mapping) else {"weight": given}
        chosen = given.pop("option", name)
        part = {**call(option, place, group="dataset", name=chosen, config=config), **given}
        parts[name] = mixed(part, place, config) if "parts" in part else part
    return {**node, "parts": parts}


def call(target: Callable[..., Any], where: str, /, **values: Any) -> Any:
    """`target(**values)`, its complaints prefixed by the place in the configuration."""
    try:
        return target(**values)
    except NecoError as error:
        raise NecoError(f"{where}: {name_keys(str(error), where)}") from error


def name_keys(message: str, where: str) -> str:
    """A message of a data set, which says `dataset.KEY`, with the keys of `val_dataset` where that is the node."""
    if where.partition(".")[0] != "val_dataset":
        return message
    return re.sub(r"(?<![\w./\\])dataset\.(?!zip\b|tar\b)(?=[a-z_]+\b)", "val_dataset.", message)


class Spine(dict[str, Any]):
    """The validated nodes of the spine, by name."""

    def __missing__(self, name: str) -> Any:
        raise NecoError(f"{name}: this part of the configuration is not there; leave out ~{name}")


@dataclasses.dataclass
class Settings:
    """A validated configuration.

    Attributes:
        config: the composed nodes, plain and resolved.
        run: the keys at the top.
        spine: the validated nodes of the spine, by name.
        choices: the option chosen in each group.
        overrides: what the command line said.
    """

    config: dict[str, Any]
    run: Run
    spine: Spine
    choices: dict[str, Any]
    overrides: list[str]

    def chosen(self, name: str) -> bool:
        """Whether the command line speaks of this group or key."""
        return any(re.match(rf"[+~]*{re.escape(name)}[=.@]", override) for override in self.overrides)

    def build(self, name: str, **runtime: Any) -> Any:
        """The object of the leaf `name`, e.g. `model`, `dataset`, `loss`."""
        return build(self.config.get(name), name, **runtime)

    def build_all(self, name: str, **runtime: Any) -> dict[str, Any]:
        """The objects of a list group, by option: `eval` or `logger`."""
        return {key: build(node, f"{name}.{key}", **runtime) for key, node in self.config[name].items()}


def validate(config: dict[str, Any], choices: Mapping[str, Any], overrides: Sequence[str] = ()) -> Settings:
    """Check every key of a composed and resolved configuration.

    Raises NecoError for the first thing that is wrong. Reads no data and allocates no network.
    """
    config = {name: node for name, node in config.items() if name != "launcher"}  # neco.sweep.launcher reads it
    top = {field.name for field in dataclasses.fields(Run)}
    known = top | SPINE.keys() | set(LEAVES) | set(LISTS)
    for name in config:
        if name not in known:
            raise NecoError(f"{name}: no such key{nearest(str(name), sorted(known))}")
    if (recipe := choices.get("experiment")) and "train" in config and choices.get("task") != "train":
        raise NecoError(
            f"experiment={recipe}: a recipe of task=train; with task={choices.get('task')} leave it out and choose "
            "model=... and dataset=..."
        )
    run = Run(**check(Run, {name: config[name] for name in config if name in top}, ""))
    if run.trust_pickle and not any(re.match(r"\+*trust_pickle=", override) for override in overrides):
        raise NecoError("trust_pickle=True: say it on the command line; no file can say whom you trust")
    spine = Spine()
    for name, schema in SPINE.items():
        if name in config:
            if not isinstance(config[name], Mapping):
                raise NecoError(f"{name}={config[name]!r}: its keys are wanted: {name}.KEY=VALUE")
            spine[name] = call(schema, name, **check(schema, config[name], name))
    # A preset may hold values for evaluations and loggers that were not chosen: those arrive without a _target_.
    for name in LISTS:
        nodes = config.get(name) or {}
        if not isinstance(nodes, Mapping):
            raise NecoError(f"{name}={nodes!r:.100}: its options are wanted: {name}=[NAME,...]")
        config[name] = {k: node for k, node in nodes.items() if not isinstance(node, Mapping) or "_target_" in node}
    for name in ("dataset", "val_dataset"):
        if isinstance(config.get(name), Mapping) and "parts" in config[name]:
            config[name] = mixed(config[name], name, config)
    if surplus := preset_for_another(config, choices, overrides):
        config["loss"] = {key: value for key, value in config["loss"].items() if key not in surplus}
        keys = ", ".join(f"loss.{key}" for key in surplus)
        log.info("experiment=%s without %s: loss=%s has none", choices["experiment"], keys, choices["loss"])
    settings = Settings(config, run, spine, dict(choices), list(overrides))
    for name in LISTS:
        settings.build_all(name)
    for name in ("dataset", "augment", "loss", "val_dataset"):
        if config.get(name) is not None:
            settings.build(name)
    settings.build("extract", device="cpu")
    return settings


def preset_for_another(config: Mapping[str, Any], choices: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Keys that the preset sets for another loss and the chosen one does not have."""
    node = config.get("loss")
    if not choices.get("experiment") or not isinstance(node, Mapping) or "_target_" not in node:
        return []
    known = {"_target_", *parameters(component_class(node, "loss"))}
    preset = f"experiment/{choices['experiment']}.yaml"
    said = [override for override in overrides if not override.startswith("loss=")]  # the choice sets no key
    found = [key for key in node if key not in known and origin(f"loss.{key}", said, choices).endswith(preset)]
    losses = [locate(target) for target in project_targets("loss")] if found else []
    return [key for key in found if any(key in parameters(loss) for loss in losses)]


def plain(composed: Any) -> dict[str, Any]:
    """The composed nodes as plain values, `${keys}` resolved. Raises NecoError that names one that cannot be."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return _expand_users(OmegaConf.to_container(composed, resolve=True))
    except OmegaConfBaseException as error:  # which says not where
        said = str(error).partition("\n")[0]
        for key in flatten(OmegaConf.to_container(composed)):
            try:
                node = OmegaConf.select(composed, key)
                OmegaConf.is_config(node) and OmegaConf.to_container(node, resolve=True)
            except OmegaConfBaseException:
                wrong = key  # the last is the deepest
        raise NecoError(f"{wrong}: {said}") from error


def _expand_users(node: Any, where: str = "") -> Any:
    """Replace `~` in every text that is a path below a home folder, whichever key it is of."""
    if isinstance(node, dict):
        return {key: _expand_users(value, f"{where}{key}.") for key, value in node.items()}
    if isinstance(node, list):
        return [_expand_users(value, where) for value in node]
    is_path = isinstance(node, str) and (node == "~" or re.match(r"~[\w.-]*/", node))
    return call(atomic_files.expand_user, where[:-1], text=node) if is_path else node


def load(*overrides: str) -> Settings:
    """The validated settings of `python -m neco OVERRIDES`, for scripts, notebooks and tests."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    register_resolvers()
    around, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a run that this is called from
    with without_working_folder():
        Plugins.instance()  # imports all of hydra_plugins that it finds
    try:
        with initialize_config_dir(str(folder()), version_base="1.3"):
            composed = compose("config", list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = around
    choices = {k: v for k, v in composed.hydra.runtime.choices.items() if not k.startswith("hydra/")}
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    return validate(plain(composed), choices, list(overrides))


def origin(key: str, overrides: Sequence[str], choices: Mapping[str, Any]) -> str:
    """Where the value of `key` was set: the command line or a file of conf/; empty when nowhere."""
    names = [override.lstrip("+~").split("=")[0] for override in overrides]
    said = [i for i, name in enumerate(names) if key == name or key.startswith(f"{name}.")]
    if said:
        return f"the command line ({overrides[max(said, key=lambda i: (len(names[i]), i))]})"
    # What is composed later comes first here.
    places = [(f"{group}/{choices.get(group)}", "") for group in ("machine", "sweep", "experiment", "task")]
    for group, choice in choices.items():
        group, _, node = group.rpartition("@")
        for option in choice if isinstance(choice, list) else [choice]:
            package = f"{node}.{option}" if node in LISTS else node
            places += [(f"{group or node}/{name}", package) for name in lineage(group or node, option)]
    for place, package in [*places, ("config", "")]:
        for base in (folder(), *(user_folders() if place != "config" else ())):
            path = base / f"{place}.yaml"
            relative = key if not package else key.removeprefix(f"{package}.")
            if not path.is_file() or (package and relative == key):
                continue
            with contextlib.suppress(NecoError):  # of another, with the name of the one that was read
                if relative in flatten(load_yaml(path)):
                    return f"conf/{place}.yaml" if base == folder() else str(path)
    return ""
