"""What benchmarks have in common: the options `--quick` and `--json`, and how figures are printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any


def benchmark_parser(description: str, *, quick: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; `quick` says what is less with `--quick`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    return parser


def print_figures(figures: Mapping[str, Any], *, as_json: bool) -> None:
    """One JSON object, or for people a line for each figure."""
    if as_json:
        print(json.dumps(figures))
        return
    lines = list(_flat(figures))
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        print(f"{name:{width}} {value:>18,.4f}" if isinstance(value, float) else f"{name:{width}} {value!s:>18}")


def _flat(figures: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Figures of figures by their path: "spike.elastic.p99_ms"."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
