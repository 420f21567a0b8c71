"""How long libraries for command lines take to show the help of four options, and how many lines an error has.

argparse is what matta uses; jsonargparse and tyro are measured where they are installed (`pip install jsonargparse
tyro`). Each figure is the median over fresh processes, the libraries in turn.

    python benchmarks/command_lines.py [--quick] [--json]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from figures import benchmark_parser, print_figures

SETTINGS = """
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True, kw_only=True)
class Settings:
    recipe: Path
    out: Path | None = None
    resume: bool = False
    steps: int = 100
"""
PROGRAMS = {
    "argparse": """
import argparse, settings
parser = argparse.ArgumentParser()
parser.add_argument("--recipe"), parser.add_argument("--out"), parser.add_argument("--resume", action="store_true")
parser.add_argument("--steps", type=int)
parser.parse_args()
""",
    "jsonargparse": "import jsonargparse, settings; jsonargparse.auto_cli(settings.Settings)",
    "tyro": "import settings, tyro; tyro.cli(settings.Settings)",
}


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser("Help and errors of libraries for command lines.", quick="3 rounds in place of 9")
    options = parser.parse_args()
    figures = measure(num_rounds=3 if options.quick else 9)
    print_figures(figures, as_json=options.json)


def measure(*, num_rounds: int) -> dict[str, float]:
    """Milliseconds of `--help`, and lines of the error of `--steps many`, of each library that is installed."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS if find_spec(name)}
    lines: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "settings.py").write_text(SETTINGS, encoding="utf-8")
        for name, text in PROGRAMS.items():
            (Path(folder) / f"{name}_program.py").write_text(text, encoding="utf-8")
        for _ in range(num_rounds + 1):
            for name in times:
                start = time.perf_counter()
                subprocess.run([sys.executable, f"{name}_program.py", "--help"], cwd=folder, capture_output=True)
                times[name].append((time.perf_counter() - start) * 1e3)
        for name in times:
            command = [sys.executable, f"{name}_program.py", "--recipe", "x", "--steps", "many"]
            found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            lines[f"{name}_error_lines"] = len(found.stderr.strip().splitlines())
    return {**{f"{name}_help_ms": statistics.median(each[1:]) for name, each in times.items()}, **lines}


if __name__ == "__main__":
    main()
