"""One optimizer step of the paper's pair at full size: GPT-2 Medium in a TA of 36 layers, batch 1 x 128, float32.

Builds `recipes/gpt2_medium_c4` with fresh weights, nests it, and takes one co-training step. Printed are the largest
memory of the process, what `matta plan` says of the same step (an upper bound), and the seconds of the step. Shampoo's
state alone takes 23 GiB; with --quick, 2 and 3 layers in place of 24 and 36, it can be run anywhere.

    python benchmarks/full_size.py [--optimizer adamw|shampoo] [--quick] [--json]
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

import matta
from figures import benchmark_parser, print_figures
from matta.lm.costs import step_memory
from matta.lm.decoders import build_pair, make_optimizer, nest_pair
from matta.lm.recipe import Recipe
from matta.lm.recipe_files import read_recipe
from matta.objectives import CausalLM

RECIPE = Path(__file__).parents[1] / "recipes" / "gpt2_medium_c4"
BATCH, CONTEXT = 1, 128
GIB = 2**30


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(
        "One optimizer step of the full-size GPT-2 Medium pair.", quick="2 and 3 layers in place of 24 and 36, seconds"
    )
    parser.add_argument("--optimizer", choices=["adamw", "shampoo"], default="adamw")
    options = parser.parse_args()
    overrides = [f"train.optimizer={options.optimizer}", "train.precision=no"]
    if options.quick:
        overrides += ["model.student.n_layer=2", "model.ta.n_layer=3", "family.k=[]"]
    figures = measure(read_recipe(RECIPE, overrides))
    if options.quick:
        print("--quick: 2 and 3 layers, not the 24 and 36 of the full size", file=sys.stderr)
    print_figures(figures, as_json=options.json)


def measure(recipe: Recipe) -> dict[str, Any]:
    """Take the step."""
    before = peak_bytes()
    torch.manual_seed(0)
    nested = nest_pair(recipe.model, *build_pair(recipe.model, 50257))
    planned = step_memory(nested, recipe.train, batch=BATCH, context=CONTEXT)
    optimizer = make_optimizer(recipe.train, nested)
    cotrain = matta.CoTraining(nested, CausalLM()).train()
    for model in (nested.ta, nested.student):
        model.config.use_cache = False
    tokens = torch.randint(50257, (BATCH, CONTEXT))
    watched = nested.ta.get_submodule("transformer.h.0.mlp.c_fc").weight
    kept = watched.detach().clone()
    start = time.perf_counter()
    out = cotrain({"input_ids": tokens, "labels": tokens})
    out.loss.backward()
    seconds = time.perf_counter() - start
    optimizer.step()
    assert bool((watched != kept).all(0).any()), "the step moved nothing"
    return {
        "student_parameters": sum(each.numel() for each in nested.student.parameters()),
        "ta_parameters": sum(each.numel() for each in nested.ta.parameters()),
        "tokens": tokens.numel(),
        "forward_backward_s": seconds,
        "step_s": time.perf_counter() - start,
        "peak_gib": peak_bytes() / GIB,
        "peak_without_imports_gib": (peak_bytes() - before) / GIB,
        "planned_gib": planned.total / GIB,
        "planned_optimizer_gib": planned.optimizer / GIB,
        "student_loss_nats": out.student_loss.item(),
        "ta_loss_nats": out.ta_loss.item(),
        "distill_loss_nats": out.distill_loss.item(),
    }


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
