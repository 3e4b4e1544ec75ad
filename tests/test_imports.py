"""The house: packages import only packages below them, and no module imports itself by way of others.

Imports inside functions and for types count.
"""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import neco

ROOT = Path(neco.__file__).parent
# From the top down. `loss`, `augment` and `dataset` know nothing of each other.
ORDER = [
    "__main__", "cli", "job", "sweep", "task", "training", "eval", "features", "report", "logger", "runs", "model",
    "loss", "augment", "dataset", "config", "distributed", "utils",
]  # fmt: skip
SIBLINGS = {"loss", "augment", "dataset"}
PUBLIC = {"__init__"}  # what `import neco` offers, on demand

MODULES = {
    ".".join(("neco", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if "conf" not in path.relative_to(ROOT).parts
}


def imported(module: str) -> set[str]:
    """The modules of neco that a module imports anywhere in its source."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports within neco are absolute"
            parent = node.module or ""
            names = [f"{parent}.{a.name}" if f"{parent}.{a.name}" in MODULES else parent for a in node.names]
        else:
            continue
        found |= {name for name in names if name in MODULES and name != "neco"}
    return found - {module}


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


IMPORTS = {module: imported(module) for module in MODULES}


def test_every_package_has_its_place():
    packages = {package(module) for module in MODULES} - PUBLIC
    assert packages == set(ORDER), "name a new package in ORDER, at its height"


def test_modules_import_downwards_only():
    wrong = defaultdict(list)
    for module, others in IMPORTS.items():
        own = package(module)
        if own in PUBLIC:
            continue
        for other in others:
            theirs = package(other)
            sideways = own != theirs and {own, theirs} <= SIBLINGS
            if sideways or ORDER.index(theirs) < ORDER.index(own):
                wrong[module].append(other)
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    list(TopologicalSorter(IMPORTS).static_order())
