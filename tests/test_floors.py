"""The floors of the package: each module imports from lower ones only, and the core stays light."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import matta

FLOORS = (
    {"calls", "channels", "errors"},
    {
        "batches",
        "firstorder",
        "heads",
        "layers",
        "layout",
        "losses",
        "moving",
        "preconditioner",
        "processes",
        "storage",
        "schedule",
    },
    {"flow", "fused", "labels"},
    {"objectives", "slicing", "stacking", "tables"},
    {"plan", "shampoo", "tracing"},
    {"acceptance", "ambiguity", "probing", "rules", "widening"},
    {"placing", "units", "warmstart"},
    {"assembly", "nesting"},
    {"factors", "growing", "submodels"},
    {"cotraining", "evaluation", "extraction"},
    {"checkpoints"},
    {"interrupts", "progressive", "randomness", "reporting", "resuming", "runs", "snapshots", "streams", "texttables"},
    {"feeding"},
    {"loop"},
    {"fitting"},
    {"lm"},
    {"studies"},
    {"cli"},
    {"__main__"},
)
NUM_CORE_FLOORS = 11  # from the ground up: these import torch and nothing heavier
CORE_PACKAGES = {"torch", "safetensors", "jaxtyping", *sys.stdlib_module_names}
WITHOUT_TORCH = (
    *("__init__", "__main__", "cli", "errors"),
    *("lm.__init__", "lm.recipe", "lm.settings", "lm.tabled", "studies.__init__", "studies.study_settings"),
)

PACKAGE = Path(matta.__file__).parent
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in FILES]
MODULES = list(zip(NAMES, FILES, strict=True))
CORE = [(name, file) for name, file in MODULES if FLOOR_OF.get(name.split(".")[0], 99) < NUM_CORE_FLOORS]


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of all that is imported under a node of a module of `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_at_load(file: Path, package: str) -> set[str]:
    """Top-level packages imported when a module is loaded: not in functions, not for type checkers."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update(name.split(".")[0] for name in imports(node, package))
        else:
            todo += ast.iter_child_nodes(node)
    return found


def test_every_module_has_a_floor() -> None:
    modules = {name.split(".")[0] for name in NAMES} - {"__init__"}
    assert modules == FLOOR_OF.keys(), "enter a new module into FLOORS, take out one that is gone"


@pytest.mark.parametrize(("name", "file"), MODULES, ids=NAMES)
def test_imports_come_from_lower_floors(name: str, file: Path) -> None:
    if name == "__init__":
        pytest.skip("the facade names every module, and imports each when it is asked for")
    own, _, inside = name.partition(".")
    package = f"matta.{own}" if inside else "matta"
    assert own in FLOOR_OF, f"{name} is not in FLOORS"
    for imported in imports(ast.parse(file.read_text(encoding="utf-8")), package):
        parts = imported.split(".")
        if parts[0] != "matta" or parts[1] == "__version__" or (inside and parts[1] == own):
            continue
        assert parts[1] in FLOOR_OF, f"{name} imports {imported}: import it from the module that defines it"
        assert FLOOR_OF[parts[1]] < FLOOR_OF[own], f"{name} imports {imported}, which is not on a lower floor"


@pytest.mark.parametrize(("name", "file"), CORE)
def test_the_core_loads_torch_and_nothing_heavier(name: str, file: Path) -> None:
    assert imports_at_load(file, "matta") <= {"matta", *CORE_PACKAGES}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_help_needs_loads_only_the_standard_library(name: str) -> None:
    file = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
    assert imports_at_load(file, f"matta.{name}".rpartition(".")[0]) <= {"matta", *sys.stdlib_module_names}
