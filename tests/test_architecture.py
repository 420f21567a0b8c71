"""docs/architecture.md shows the floors that the imports have, and names functions that there are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
TOOL = ROOT / "tools" / "floors.py"


def floors(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A package of two floors, with a page to draw it into."""
    package = tmp_path / "house"
    (package / "upper").mkdir(parents=True)
    for name, text in {
        "__init__.py": "from house import cli",
        "cellar.py": "",
        "cli.py": 'RUN = "house.upper.stairs:climb"',
        "upper/__init__.py": "",
        "upper/stairs.py": "def climb():\n    from house.cellar import light\n",
        "upper/roof.py": "from . import stairs",
    }.items():
        (package / name).write_text(text)
    (tmp_path / "page.md").write_text(
        "# House\n<!-- floors: written by tools/floors.py -->\n<!-- end of floors -->\nend\n"
    )
    return package


def test_the_picture_is_that_of_the_imports() -> None:
    checked = floors(ROOT / "src" / "matta", PAGE, "--check")
    assert checked.returncode == 0, checked.stderr


def test_the_picture_shows_imports_at_load_in_functions_and_by_name(house: Path) -> None:
    page = house.parent / "page.md"
    assert floors(house, page).returncode == 0
    assert page.read_text() == (
        "# House\n<!-- floors: written by tools/floors.py -->\n```text\n"
        " 2  cli     imports upper\n 1  upper   imports cellar\n 0  cellar\n\n"
        "Inside each package, from the ground up:\n\n    upper   stairs < roof\n"
        "```\n<!-- end of floors -->\nend\n"
    )
    assert floors(house, page, "--check").returncode == 0


def test_a_changed_import_is_noticed(house: Path) -> None:
    page = house.parent / "page.md"
    floors(house, page)
    (house / "cli.py").write_text("")
    checked = floors(house, page, "--check")
    assert checked.returncode == 1 and "the floors have changed" in checked.stderr


def test_parts_that_import_each_other_are_refused(house: Path) -> None:
    (house / "cellar.py").write_text("import house.upper.roof")
    drawn = floors(house, house.parent / "page.md")
    assert drawn.returncode == 1 and "cycle" in drawn.stderr


def test_a_page_without_markers_is_refused(house: Path) -> None:
    page = house.parent / "page.md"
    page.write_text("# House\n")
    drawn = floors(house, page)
    assert drawn.returncode == 1 and "must have one line" in drawn.stderr
    assert page.read_text() == "# House\n"


def test_functions_that_the_page_names_are_there() -> None:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "src").rglob("*.py")]
    defined = {each.name for tree in trees for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}
    named = set(re.findall(r"`(\w+)\(\)`", PAGE.read_text(encoding="utf-8")))
    assert len(named) > 10
    assert named <= defined
