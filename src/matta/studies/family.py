"""Every size between Student and TA: extracted, scored, timed and saved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from matta.extraction import extract
from matta.nesting import Nested
from matta.studies.training import auc_loss
from matta.studies.tuples import RelevanceData
from matta.submodels import SubModel, layer_names

TIMED_CALLS = 100
TIMED_BATCH = 512
SHORT_NAMES: Mapping[str, str] = {"tables.0": "embeddings", "mlp.0": "hidden 1", "mlp.2": "hidden 2"}


def measure_family(nested: Nested, data: RelevanceData, folder: Path) -> list[dict[str, Any]]:
    """All choices of narrow and wide layers, from the Student up to the TA, in order of size."""
    names = layer_names(nested)
    specs = [SubModel(dict(zip(names, each, strict=True))) for each in product(("narrow", "wide"), repeat=len(names))]
    modules = {_name(spec): extract(nested, spec) for spec in specs}
    latencies = measure_ms(modules, data)
    folder.mkdir(parents=True)
    family = []
    for spec in specs:
        name = _name(spec)
        file = f"{name.replace(' + ', '-').replace(' ', '')}.safetensors"
        save_file(modules[name].state_dict(), folder / file)
        family.append(
            {
                "name": name,
                "layers": dict(spec.choices),
                "parameters": sum(parameter.numel() for parameter in modules[name].parameters()),
                "latency_ms": latencies[name],
                "aucloss": auc_loss(modules[name], data.test),
                "real_aucloss": auc_loss(modules[name], data.real),
                "file": f"{folder.name}/{file}",
            }
        )
    return sorted(family, key=lambda each: each["parameters"])


def _name(spec: SubModel) -> str:
    wide = [SHORT_NAMES.get(layer, layer) for layer, choice in spec.choices.items() if choice == "wide"]
    if len(wide) == len(spec.choices):
        return "TA"
    return " + ".join(wide) or "Student"


@torch.no_grad()
def measure_ms(modules: Mapping[str, nn.Module], data: RelevanceData) -> dict[str, float]:
    """Median milliseconds of a forward of 512 tuples on one thread, the modules in turn."""
    ids = data.test.ids[:TIMED_BATCH]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(TIMED_CALLS):
        for name, module in modules.items():
            start = time.perf_counter()
            module(ids)
            times[name].append(1e3 * (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return {name: median(values) for name, values in times.items()}
