"""How long `import matta` takes over `import torch`, and how long `matta --help` takes to answer.

Each figure is the median over fresh processes, in milliseconds; arms are measured in turn.

    python benchmarks/import_time.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

ARMS = {
    "python_ms": ["-c", "pass"],
    "torch_ms": ["-c", "import torch"],
    "matta_ms": ["-c", "import torch, matta; matta.nest"],
    "help_ms": ["-m", "matta", "--help"],
    "study_help_ms": ["-m", "matta", "study", "relevance", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of import and of help, in fresh processes.")
    parser.add_argument("--quick", action="store_true", help="3 rounds in place of 15")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    options = parser.parse_args()
    figures = measure(num_rounds=3 if options.quick else 15)
    if not options.json:
        for name, value in figures.items():
            print(f"{name:16} {value:8.1f}")
    else:
        print(json.dumps(figures))


def measure(*, num_rounds: int) -> dict[str, float]:
    """Median milliseconds of each arm, and of matta over torch by round."""
    rounds = [{name: milliseconds(command) for name, command in ARMS.items()} for _ in range(num_rounds + 1)]
    rounds = rounds[1:]  # the first one fills the file cache
    figures = {name: statistics.median(measured[name] for measured in rounds) for name in ARMS}
    over_torch = statistics.median(measured["matta_ms"] - measured["torch_ms"] for measured in rounds)
    return {"import_ms": over_torch, **figures}


def milliseconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
