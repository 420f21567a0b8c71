"""FLOPs of a language model: matta's count from its layers, beside the counter of torch on a forward of fake tensors.

The model is the TA of `recipes/gpt2_medium_c4`. Both give the same number, and the counter has to run the model once
for each member of a family. Each time is the median of rounds in turn.

    python benchmarks/flops.py [--quick] [--json]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from figures import benchmark_parser, print_figures
from matta.lm.costs import cost_of, family_costs
from matta.lm.planning import nest_on_meta
from matta.lm.recipe_files import read_recipe
from matta.nesting.nested import Nested
from matta.sizes.submodels import layer_names

RECIPE = Path(__file__).parents[1] / "recipes" / "gpt2_medium_c4.toml"
CONTEXT = 1024


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser("FLOPs of a TA: from its layers, and by torch's counter.", quick="2 rounds in place of 5")
    options = parser.parse_args()
    figures = measure(num_rounds=2 if options.quick else 5)
    print_figures(figures, as_json=options.json)


def measure(*, num_rounds: int) -> dict[str, float]:
    """FLOPs per token by both, and the milliseconds that they and a family of ten sizes take."""
    nested = nest_on_meta(read_recipe(RECIPE, ()))
    last = len(layer_names(nested))
    ks = range(0, last, max(1, last // 10))[:10]
    arms: dict[str, Callable[[], float]] = {
        "layers": lambda: cost_of(nested.ta, CONTEXT).flops_per_token,
        "counter": lambda: counted(nested) / CONTEXT,
        "family_of_ten": lambda: len(family_costs(nested, ks, CONTEXT)),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    found: dict[str, float] = {}
    for _ in range(num_rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            found[name] = arm()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {
        "flops_per_token": found["layers"],
        "counter_flops_per_token": found["counter"],
        **{f"{name}_ms": statistics.median(each) for name, each in times.items()},
    }


def counted(nested: Nested) -> float:
    """The matrix products of one sequence through the TA, with attention in plain operators, which torch counts."""
    config = nested.ta.config
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model = type(nested.ta)._from_config(config, attn_implementation="eager")
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, CONTEXT, dtype=torch.int64), use_cache=False)
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
