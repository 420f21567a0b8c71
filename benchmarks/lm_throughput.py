"""Tokens a second of co-training a pair, beside the Transformers Trainer training its Student and its TA alone.

The pair, text, batch, optimizer and precision of `recipes/gpt2_mini`, without sampled sub-models (the Trainer has
none). The three arms run in turn in one process on one thread, `matta.fit` and the Trainer each as a user calls them,
both with `matta.Shampoo`; times are processor time, from the first batch on. `ratio` is (Trainer on the Student +
Trainer on the TA) / co-training, the median over rounds: over 1.0, both models come out of one run sooner than out of
two. `adamw_ratio` is the same with AdamW, `gpt2_vocabulary_ratio` with AdamW, 50,257 tokens and a quarter of the batch,
where heads and losses in one count for more.

    python benchmarks/lm_throughput.py [--quick] [--json]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import matta
from figures import benchmark_parser, print_figures
from matta.lm.decoders import build_pair, make_optimizer, nest_pair
from matta.lm.documents import text_source
from matta.lm.packing import PackedTokens
from matta.lm.recipe import Recipe
from matta.lm.recipe_files import read_recipe
from matta.lm.tokens import load_tokenizer
from matta.objectives import CausalLM

RECIPE = Path(__file__).parents[1] / "recipes" / "gpt2_mini"
SETTINGS = {
    "": [],
    "adamw_": ["train.optimizer=adamw"],
    "gpt2_vocabulary_": ["train.optimizer=adamw", "model.student.vocab_size=50257", "train.batch=2"],
}
Arm = Callable[[], float]  # takes the steps; processor seconds from the first batch on


class Samples(Dataset[dict[str, Tensor]]):
    """The same sequences for every arm."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.rows = [
            {"input_ids": ids, "labels": labels}
            for batch in batches
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class Timed:
    """Batches that note when the first one is drawn."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches, self.start = batches, 0.0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.start = time.process_time()
        yield from self.batches


class Clock(TrainerCallback):
    """Notes when the Trainer begins its first step."""

    start = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self.start = time.process_time()


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(
        "Throughput of co-training beside the Transformers Trainer.", quick="fewer and shorter rounds, under a minute"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rounds, steps = (3, 2) if options.quick else (5, 8)
    figures: dict[str, float] = {}
    for prefix, overrides in SETTINGS.items():
        measured = compare(read_recipe(RECIPE, overrides), num_rounds=rounds, steps=steps)
        figures |= {f"{prefix}{name}": value for name, value in measured.items()}
    print_figures(figures, as_json=options.json)


def compare(recipe: Recipe, *, num_rounds: int, steps: int) -> dict[str, float]:
    """Tokens a second of each arm, and the ratio."""
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    source = text_source(recipe.data.train)
    packed = PackedTokens(source, tokenizer, context=recipe.data.context, batch=recipe.train.batch, seed=0)
    batches = [next(packed) for _ in range(steps)]
    torch.manual_seed(0)
    student, ta = build_pair(recipe.model, len(tokenizer), end_of_text=tokenizer.eos_token_id)
    nested = nest_pair(recipe.model, *build_pair(recipe.model, len(tokenizer), end_of_text=tokenizer.eos_token_id))
    for model in (student, ta, nested.student, nested.ta):
        model.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            "cotraining": together(recipe, nested, batches),
            "trainer_student": alone(recipe, student, batches, folder),
            "trainer_ta": alone(recipe, ta, batches, folder),
        }
        rounds = [{name: arm() for name, arm in arms.items()} for _ in range(num_rounds + 1)][1:]
    tokens = steps * recipe.train.batch * recipe.data.context
    ratios = [(each["trainer_student"] + each["trainer_ta"]) / each["cotraining"] for each in rounds]
    speeds = {name: tokens / statistics.median(each[name] for each in rounds) for name in arms}
    both = tokens / statistics.median(each["trainer_student"] + each["trainer_ta"] for each in rounds)
    figures = {f"{name}_tokens_per_s": value for name, value in {**speeds, "trainer_both": both}.items()}
    return {"ratio": statistics.median(ratios), **figures}


def together(recipe: Recipe, nested: matta.Nested, batches: list[dict[str, Tensor]]) -> Arm:
    """`matta.fit` on the pair."""
    cotrain = matta.CoTraining(nested, CausalLM())
    optimizer = make_optimizer(recipe.train, nested)

    def run() -> float:
        data = Timed(batches)
        matta.fit(cotrain, data, optimizer, steps=len(batches), clip_norm=recipe.train.clip_norm, progress=False)
        return time.process_time() - data.start

    return run


def alone(recipe: Recipe, model: nn.Module, batches: list[dict[str, Tensor]], folder: str) -> Arm:
    """The Trainer on one model, with the same optimizer, clipping and batches."""
    part = recipe.train
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": len(batches),
        "per_device_train_batch_size": part.batch,
        "max_grad_norm": part.clip_norm,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    optimizer = make_optimizer(part, model)

    def run() -> float:
        clock = Clock()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=Samples(batches),
            optimizers=(optimizer, None),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)  # which writes to standard output
        trainer.train()
        return time.process_time() - clock.start

    return run


if __name__ == "__main__":
    main()
