"""Draw the floors of a package from its imports, and keep the picture in a document up to date.

    python tools/floors.py src/matta docs/architecture.md           # writes the picture between its two markers
    python tools/floors.py src/matta docs/architecture.md --check   # fails if the picture is another one

The floor of a part is one above the highest floor that it imports from, whether at load, inside functions,
or by a name such as "package.module:function".
`__init__` of the whole package and `__main__` are left out: they lead to every part.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

BEGIN = "<!-- floors: written by tools/floors.py -->"
END = "<!-- end of floors -->"
WIDTH = 120
ENTRY_POINT = re.compile(r"[a-z_]\w*(\.\w+)+:\w+")  # "module:attribute", which a command line imports when it runs

Graph = Mapping[str, frozenset[str]]


def parts(folder: Path) -> dict[str, list[Path]]:
    """The modules and packages right inside a package, with the files of each."""
    files = [file for file in sorted(folder.glob("*.py")) if not file.stem.startswith("__")]
    packages = sorted(file.parent for file in folder.glob("*/__init__.py"))
    return {each.stem: [each] for each in files} | {each.name: sorted(each.rglob("*.py")) for each in packages}


def imported_names(file: Path, package: str) -> Iterator[str]:
    """Full names of all that a module of `package` imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and ENTRY_POINT.fullmatch(str(node.value)):
            yield str(node.value).replace(":", ".")


def imports(folder: Path, root: Path) -> Graph:
    """Which parts of a package import which others of it; `root` is the folder that the package path begins at."""
    name = ".".join(folder.relative_to(root).parts)
    inside = parts(folder)
    found = {}
    for part, files in inside.items():
        names = {
            each.removeprefix(f"{name}.").split(".")[0]
            for file in files
            for each in imported_names(file, ".".join(file.relative_to(root).parent.parts))
            if each.startswith(f"{name}.")
        }
        found[part] = frozenset((names & inside.keys()) - {part})
    return found


def floors(graph: Graph) -> list[list[str]]:
    """The parts of each floor, from the ground up.

    Raises:
        CycleError: parts import each other, so that none of them is below the others.
    """
    height: dict[str, int] = {}
    for part in TopologicalSorter(graph).static_order():
        height[part] = 1 + max((height[below] for below in graph[part]), default=-1)
    made: list[list[str]] = [[] for _ in range(max(height.values(), default=-1) + 1)]
    for part in sorted(height):
        made[height[part]].append(part)
    return made


def picture(package: Path) -> str:
    """The floors of a package, the highest first, and below them those inside each package of it."""
    package = package.resolve()
    graph = imports(package, package.parent)
    width = max(map(len, graph), default=0) + 2
    lines = []
    for number, floor in reversed([*enumerate(floors(graph))]):
        for part in floor:
            below = ", ".join(sorted(graph[part]))
            lines += wrapped(f"{number if part == floor[0] else '':>2}  {part:<{width}}", below and f"imports {below}")
    inner = {part: imports(package / part, package.parent) for part in graph if (package / part).is_dir()}
    lines += ["", "Inside each package, from the ground up:", ""] if inner else []
    for part, own in inner.items():
        lines += wrapped(f"    {part:<{width}}", " < ".join(" ".join(floor) for floor in floors(own)))
    return "\n".join(["```text", *lines, "```"])


def wrapped(label: str, text: str) -> list[str]:
    """A label and the text beside it, over as many lines as it takes."""
    made = textwrap.wrap(text, WIDTH - len(label), break_on_hyphens=False) or [""]
    return [f"{label}{made[0]}".rstrip(), *(" " * len(label) + line for line in made[1:])]


def redrawn(text: str, drawn: str) -> str:
    """A document with the picture between its markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the document must have one line {BEGIN!r}, and one {END!r} below it")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{drawn}\n{text[text.index(END) :]}"


def main() -> int:
    """Redraw or check; 1 where the picture is not the package's."""
    parser = argparse.ArgumentParser(description="Draw the floors of a package into a document.")
    parser.add_argument("package", type=Path)
    parser.add_argument("document", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the picture is another one")
    options = parser.parse_args()
    text = options.document.read_text(encoding="utf-8")
    try:
        new = redrawn(text, picture(options.package))
    except (CycleError, ValueError) as error:
        print(f"{options.document}: {error}", file=sys.stderr)
        return 1
    if options.check and new != text:
        print(
            f"{options.document}: the floors have changed; run {Path(__file__).name} without --check", file=sys.stderr
        )
        return 1
    if not options.check:
        options.document.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
