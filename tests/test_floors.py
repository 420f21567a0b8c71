"""The floors of the house: packages import from lower packages only, modules of a package from lower modules.

The core stays light, and no two modules share a name.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import matta
import matta_studies

PACKAGES = (
    *("errors", "optim", "nesting", "sizes", "choosing", "objectives", "training"),
    *("ab_testing", "streams", "lm", "exporting", "serving", "cli", "__main__"),
)
"""From the ground up: each imports from those before it alone."""

MOST_FLOORS = {
    "optim": 4,
    "nesting": 8,
    "sizes": 4,
    "choosing": 4,
    "objectives": 5,
    "training": 5,
    "ab_testing": 4,
    "streams": 4,
    "lm": 9,
    "exporting": 3,
    "serving": 7,
}
"""The longest chain of imports inside a package: a new floor needs a reason."""

CORE = PACKAGES[: PACKAGES.index("ab_testing") + 1]  # these import torch and nothing heavier
CORE_PACKAGES = {"torch", "safetensors", "jaxtyping", "numpy", *sys.stdlib_module_names}
WITHOUT_TORCH = (
    *("__init__", "__main__", "cli", "errors"),
    *("ab_testing.__init__", "ab_testing.ab_settings", "ab_testing.traffic"),
    *("lm.__init__", "lm.recipe", "lm.recipe_files", "lm.command_settings", "lm.typed_tables"),
    *("serving.__init__", "serving.serve_settings"),
)

ROOT, STUDIES = (Path(package.__file__).parent for package in (matta, matta_studies))
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in sorted(ROOT.rglob("*.py"))}
INSIDE = {package: [name for name in FILES if name.startswith(f"{package}.")] for package in MOST_FLOORS}


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of all that is imported under a node of a module of `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_modules(name: str) -> set[str]:
    """The modules of matta that a module imports anywhere, by their names inside matta."""
    found = set()
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    for each in imports(tree, f"matta.{name}".rpartition(".")[0]):
        parts = each.split(".")
        if parts[0] == "matta" and parts[1:2] != ["__version__"]:
            inner = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            found.add(next((known for known in inner if known in FILES or f"{known}.__init__" in FILES), inner[-1]))
    return found


def imports_at_load(name: str) -> set[str]:
    """Top-level packages imported when a module is loaded: not in functions, not for type checkers."""
    found: set[str] = set()
    todo: list[ast.AST] = list(ast.parse(FILES[name].read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update(each.split(".")[0] for each in imports(node, f"matta.{name}".rpartition(".")[0]))
        else:
            todo += ast.iter_child_nodes(node)
    return found


def floors(package: str) -> dict[str, int]:
    """The floor of each module of a package: one above the highest module of the package that it imports."""
    found: dict[str, int] = {}

    def floor_of(name: str, path: tuple[str, ...] = ()) -> int:
        assert name not in path, f"modules import each other: {' -> '.join((*path, name))}"
        if name not in found:
            below = imported_modules(name) & set(INSIDE[package])
            found[name] = max((floor_of(each, (*path, name)) + 1 for each in below), default=0)
        return found[name]

    for name in INSIDE[package]:
        if not name.endswith("__init__"):
            floor_of(name)
    return found


def test_every_package_has_a_floor() -> None:
    assert {name.split(".")[0] for name in FILES} - {"__init__"} == set(PACKAGES)


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_imports_come_from_lower_packages(name: str) -> None:
    own = name.split(".")[0]
    for imported in imported_modules(name):
        package = imported.split(".")[0]
        if package != own:
            assert package in PACKAGES, f"{name} imports {imported}: import it from the module that defines it"
            assert PACKAGES.index(package) < PACKAGES.index(own), f"{name} imports {imported}, which is not below it"


@pytest.mark.parametrize("package", MOST_FLOORS)
def test_a_package_has_no_more_floors_than_its_story_needs(package: str) -> None:
    assert max(floors(package).values()) + 1 <= MOST_FLOORS[package]


@pytest.mark.parametrize("name", [name for name in FILES if name.split(".")[0] in CORE])
def test_the_core_loads_torch_and_nothing_heavier(name: str) -> None:
    assert imports_at_load(name) <= {"matta", *CORE_PACKAGES}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_help_needs_loads_only_the_standard_library(name: str) -> None:
    assert imports_at_load(name) <= {"matta", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", [name for name in FILES if name != "cli"])
def test_only_the_command_line_names_the_studies(name: str) -> None:
    assert "matta_studies" not in FILES[name].read_text(encoding="utf-8")


def test_help_on_the_studies_loads_only_the_standard_library() -> None:
    for file in (STUDIES / "__init__.py", STUDIES / "study_settings.py"):
        found = {each.split(".")[0] for each in imports(ast.parse(file.read_text(encoding="utf-8")), "matta_studies")}
        assert found <= {"matta", *sys.stdlib_module_names}


def test_no_two_modules_share_a_name() -> None:
    stems = [*(name.split(".")[-1] for name in FILES), *(file.stem for file in STUDIES.rglob("*.py"))]
    names = Counter(stem for stem in stems if stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("package", MOST_FLOORS)
def test_a_package_begins_with_its_table_of_contents(package: str) -> None:
    """The `__init__` of a package has a docstring that names each of its modules, imports, and nothing else."""
    body = ast.parse(FILES[f"{package}.__init__"].read_text(encoding="utf-8")).body
    contents = ast.get_docstring(ast.Module(body, [])) or ""
    missing = [name for name in INSIDE[package] if name.count(".") == 1 and f"`{name.split('.')[1]}`" not in contents]
    assert [name for name in missing if not name.endswith("__init__")] == []
    assert all(isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign | ast.Try) for node in body)
