"""`matta extract` from the file of a TA: memory and time against a plain copy of a file of the sub-model's size.

    python benchmarks/extracting.py            a TA of 3 GB (GPT-2 Medium in it, random weights): three minutes
    python benchmarks/extracting.py --quick    a TA of 0.2 GB

With --json one JSON object and nothing else. `extract_peak_mb` is the most memory that the process had,
`extract_peak_over_sub_model_mb` that less the size of the sub-model, `extract_peak_over_imports_mb` less what Python
has once Transformers is imported. `extract_gb_per_s_vs_copy` is the speed of the whole command after its imports (plan,
slices, comparison, checksums, put on disk), in bytes of the sub-model, to that of `shutil.copyfile`, put on disk too:
the median of pairs, in turn. Both read files that were just written or read, which are in memory where that suffices.
`start_cpu_seconds` is what Python, torch and Transformers take to start, which no copy does. Other processes disturb
times; processor time (`extract_cpu_seconds`, `copy_cpu_seconds`, all threads) they disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from figures import benchmark_parser, print_figures
from matta.lm import extracting
from matta.lm.command_settings import ExtractSettings
from matta.lm.planning import nest_on_meta
from matta.lm.recipe_files import NESTED, read_recipe
from matta.lm.tokens import load_tokenizer
from matta.lm.trained_runs import write_run
from matta.sizes.saving import WEIGHTS, save_plans, split_state
from matta.sizes.storage import add_checksums
from matta.sizes.weight_files import PIECE, write_weights

RECIPE = Path(__file__).parent.parent / "recipes" / "gpt2_mini"
FULL = (
    *("data.context=1024", "model.student.n_positions=1024", "model.student.n_embd=1024", "model.student.n_head=16"),
    *("model.student.n_layer=24", "model.student.n_inner=4096", "model.ta.n_layer=36", "model.ta.n_inner=8192"),
)
QUICK = (
    *FULL[:-4],
    "model.student.n_layer=2",
    "model.student.n_inner=2048",
    "model.ta.n_layer=3",
    "model.ta.n_inner=4096",
)
MEGABYTE = 1e6


def write_made_up_run(path: Path, overrides: tuple[str, ...]) -> int:
    """A run of random weights, never in memory; the bytes of its weights."""
    recipe = read_recipe(RECIPE, [*overrides, "family.k=[]"])
    nested = nest_on_meta(recipe)
    path.mkdir()
    write_run(path, recipe, nested, load_tokenizer("bytes"))
    save_plans(nested, path / NESTED)
    file = path / NESTED / WEIGHTS
    write_weights(file, {name: (like, pieces(like)) for name, like in split_state(nested)[0].items()})
    add_checksums(path / NESTED, WEIGHTS)
    return file.stat().st_size


def pieces(like: Tensor) -> Iterator[Tensor]:
    for start in range(0, like.numel(), PIECE):
        yield torch.randn(min(PIECE, like.numel() - start))


def measured(run: Path, model: str, *, pairs: int) -> dict[str, Any]:
    """In a process of its own: the memory of the first extraction, the speed of all."""
    imports, start = peak_mb(), time.process_time()
    seconds: dict[str, list[tuple[float, float]]] = {"extract": [], "copy": []}
    peak, size = 0.0, 0
    with tempfile.TemporaryDirectory(dir=run.parent) as name:
        for _ in range(pairs):
            out = Path(name) / "out"
            seconds["extract"].append(
                timed(lambda out=out: extracting.run(ExtractSettings(run=run, models=(model,), out=out)))
            )
            peak = peak or peak_mb()
            written = next(out.rglob("model.safetensors"))
            size = written.stat().st_size
            seconds["copy"].append(timed(lambda written=written: copy(written, Path(name) / "copy")))
            shutil.rmtree(out)
    ratios = [copied / extracted for (extracted, _), (copied, _) in zip(*seconds.values(), strict=True)]
    wall, cpu = (
        {name: statistics.median(each[kind] for each in found) for name, found in seconds.items()} for kind in (0, 1)
    )
    return {
        "sub_model_mb": size / MEGABYTE,
        "extract_peak_mb": peak,
        "extract_peak_over_sub_model_mb": peak - size / MEGABYTE,
        "extract_peak_over_imports_mb": peak - imports,
        "start_cpu_seconds": start,
        "extract_cpu_seconds": cpu["extract"],
        "copy_cpu_seconds": cpu["copy"],
        "extract_seconds": wall["extract"],
        "copy_seconds": wall["copy"],
        "extract_gb_per_s": size / 1e9 / wall["extract"],
        "extract_gb_per_s_vs_copy": statistics.median(ratios),
    }


def peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent had when it made this process
        line = next(each for each in status.read_text().splitlines() if each.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / MEGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE


def timed(call: Any) -> tuple[float, float]:
    """Seconds, and seconds of processor time."""
    os.sync()
    start, start_cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - start_cpu


def copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    target.unlink()


def measure(*, quick: bool) -> dict[str, Any]:
    """The figures of the Student, and by model."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        size = write_made_up_run(run, QUICK if quick else FULL)
        for model in ("student", "k=2"):
            command = [sys.executable, __file__, "--measure", str(run), model]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[model] = json.loads(done.stdout.splitlines()[-1])
    return {"ta_mb": size / MEGABYTE, **results["student"], "models": results}


def main() -> None:
    parser = benchmark_parser("Extraction from the file of a large TA.", quick="a TA of 0.2 GB")
    parser.add_argument("--measure", nargs=2, metavar=("RUN", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(measured(Path(options.measure[0]), options.measure[1], pairs=3)), file=sys.__stdout__)
        return
    print_figures(measure(quick=options.quick), as_json=options.json)


if __name__ == "__main__":
    main()
