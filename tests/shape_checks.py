"""Jaxtyping's shapes are checked in tests only, and by this checker: array annotations alone.

mypy has the other annotations; leaving them out keeps names that exist only for type checkers
(imports under TYPE_CHECKING) out of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
from beartype import beartype


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check each argument and result of a function that is annotated with a jaxtyping shape."""
    if not isinstance(function, type):
        hints = function.__annotations__
        function.__annotations__ = {name: hint for name, hint in hints.items() if "jaxtyping." in str(hint)}
        return beartype(function)
    return function


def modules_with_shapes(package: Path) -> list[str]:
    """Full names of the modules of `package` that import jaxtyping."""
    return [
        ".".join(file.relative_to(package.parent).with_suffix("").parts)
        for file in sorted(package.rglob("*.py"))
        if "from jaxtyping import" in file.read_text(encoding="utf-8")
    ]


def install(package: Path) -> None:
    """Check the shapes of every module of `package` that imports jaxtyping, from now on."""
    jaxtyping.install_import_hook(modules_with_shapes(package), f"{__name__}.check_shapes")
