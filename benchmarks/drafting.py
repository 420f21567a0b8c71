"""The Student drafts and the TA verifies: how many tokens are kept, and what it does to the speed, on held-out text.

    python benchmarks/drafting.py                trains the pair of recipes/gpt2_mini (4 and 6 layers) and one of 1 and
                                                 12 layers, 250 steps each: about fifteen minutes
    python benchmarks/drafting.py --quick        a few steps of small models: under a minute
    python benchmarks/drafting.py --run RUN      the pair of a run of matta train

With --json one JSON object and nothing else: for each pair, greedily and sampled, `speed` is tokens per second over
those of the TA alone, in turn, `acceptance` the share of drafted tokens that the TA keeps, `tokens_per_pass` tokens to
a forward pass of the TA, `is_equal` whether greedy text is the TA's own. One thread.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from figures import benchmark_parser, print_figures
from matta.lm.documents import held_out_documents, text_source
from matta.lm.drafting import draft_pair, measure_drafting
from matta.lm.trained_runs import load_run

RECIPE = Path(__file__).parent.parent / "recipes" / "gpt2_mini"
PAIRS = {
    "gpt2_mini, 4 and 6 layers": ("family.k=[0]",),
    "1 and 12 layers": ("family.k=[0]", "model.student.n_layer=1", "model.ta.n_layer=12"),
}
SMALL = ("model.student.n_embd=32", "model.student.n_inner=64", "model.ta.n_inner=128", "data.evaluate_bytes=2000")
PROMPT, NUM_ASSISTED = 48, 5


def trained(folder: Path, *overrides: str) -> Path:
    command = [sys.executable, "-m", "matta", "train", str(RECIPE), "--out", str(folder), *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def measured(run: Path, *, num_prompts: int, new_tokens: int) -> dict[str, Any]:
    """Greedy and sampled, on beginnings of the run's held-out text."""
    found = load_run(run)
    data = found.recipe.data
    assert data.evaluate is not None
    text = "\n".join(held_out_documents(text_source(data.evaluate, held_out=True), data.evaluate_bytes))
    ids = torch.tensor(found.tokenizer(text)["input_ids"])
    starts = torch.linspace(0, len(ids) - PROMPT - 1, num_prompts).long()
    prompts = [ids[start : start + PROMPT] for start in starts]
    pair = draft_pair(found.nested)
    results = {}
    for name, sample in (("greedy", False), ("sampled", True)):
        drafting = measure_drafting(
            pair, prompts, new_tokens=new_tokens, sample=sample, num_assistant_tokens=NUM_ASSISTED
        )
        results[name] = {
            "speed": drafting.speed,
            "acceptance": drafting.acceptance,
            "tokens_per_pass": drafting.tokens_per_pass,
            "tokens_per_s": drafting.tokens_per_s,
            **({} if sample else {"is_equal": drafting.is_equal}),
        }
    return results


def main() -> None:
    parser = benchmark_parser(
        "The Student drafts, the TA verifies.", quick="a few steps of small models: under a minute"
    )
    parser.add_argument("--run", type=Path, action="append", default=[], help="a run of matta train, not a fresh pair")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = {"num_prompts": 2, "new_tokens": 24} if options.quick else {"num_prompts": 8, "new_tokens": 128}
    results = {str(run): measured(run, **size) for run in options.run}
    if not options.run:
        with tempfile.TemporaryDirectory() as folder:
            steps = ("train.steps=4", *SMALL) if options.quick else ("train.steps=250",)
            for index, (name, overrides) in enumerate([*PAIRS.items()][:1] if options.quick else PAIRS.items()):
                run = trained(Path(folder, str(index)), *overrides, *steps)
                results[name] = measured(run, **size)
    print_figures(results, as_json=options.json)


if __name__ == "__main__":
    main()
