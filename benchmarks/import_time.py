"""How long `import matta` takes on top of `import torch`, and how long `matta --help` takes to answer.

Each figure is the median over fresh processes, in milliseconds, measured in turn. `import_ms` (with
`matta.nest`, which loads the core) and `torch_ms` are taken inside one process; the rest are whole commands.

    python benchmarks/import_time.py [--quick] [--json]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

from figures import benchmark_parser, print_figures

COMMANDS = {
    "python_ms": ["-c", "pass"],
    "help_ms": ["-m", "matta", "--help"],
    "study_help_ms": ["-m", "matta", "study", "relevance", "--help"],
}

IMPORTS = """
import json, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import matta; matta.nest
end = time.perf_counter()
print(json.dumps({"import_ms": (end - middle) * 1e3, "torch_ms": (middle - start) * 1e3}))
"""


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser("Time of import and of help, in fresh processes.", quick="3 rounds in place of 15")
    options = parser.parse_args()
    figures = measure(num_rounds=3 if options.quick else 15)
    print_figures(figures, as_json=options.json)


def measure(*, num_rounds: int) -> dict[str, float]:
    """Median of each figure; the first round fills the file cache and is dropped."""
    rounds = [measure_once() for _ in range(num_rounds + 1)][1:]
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def measure_once() -> dict[str, float]:
    """Each figure once."""
    imports = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(imports.stdout)
    for name, command in COMMANDS.items():
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        figures[name] = (time.perf_counter() - start) * 1e3
    return figures


if __name__ == "__main__":
    main()
