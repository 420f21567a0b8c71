"""Text for a language model: reading, tokenising and packing, beside the co-training step that uses it up.

The pair is that of recipes/gpt2_mini: a GPT-2 of 4 layers, d 128, FFN 512, context 256, batch 16 over bytes; TA of 6
layers with FFN x2. AdamW. The text is CPython's help on topics, several times over, as lines of JSON; the byte-pair
encoding is learned from it. One thread, times are processor time (of all threads), medians over rounds, arms in turn.

`*_tokens_per_s`: `step` the co-training step on a batch in memory; `once` reading and tokenising local files before a
run; `dealt` batches of what is tokenised, shuffled; `streamed` reading, tokenising, packing and shuffling at once. By
bytes, and `bpe_*` with 4,096 byte-pair tokens.
`ratio` is `streamed` to `step`: how many times faster the text comes than it is used up, with nothing side by side.
`dealt_share_percent`, `streamed_share_percent`: of a training step's time, what its text takes.

    python benchmarks/lm_data.py [--quick] [--json]
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from figures import benchmark_parser, print_figures

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import matta
from matta.lm.corpora import load_corpus
from matta.lm.documents import TextSource
from matta.lm.packing import PackedTokens
from matta.lm.tokens import END, load_tokenizer

CONTEXT, BATCH = 256, 16


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(
        "Reading, tokenising and packing beside the co-training step.", quick="fewer rounds, under a minute"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), num_rounds=2 if options.quick else 9, num_copies=2 if options.quick else 8)
    print_figures(figures, as_json=options.json)


def measure(folder: Path, *, num_rounds: int, num_copies: int) -> dict[str, float]:
    """Tokens a second in each arm, and the ratios."""
    source = TextSource(path=write_text(folder, num_copies))
    step, count = trainer(source), 2
    arms: dict[str, Callable[[], int]] = {"step": lambda: step(count)}
    for prefix, tokenizer in (("", load_tokenizer("bytes")), ("bpe_", load_tokenizer(learn_pairs(folder)))):
        arms |= data_arms(prefix, source, tokenizer, folder / "cache")
    rounds = [{name: rate(arm) for name, arm in arms.items()} for _ in range(num_rounds + 1)][1:]
    figures = {f"{name}_tokens_per_s": statistics.median(each[name] for each in rounds) for name in arms}
    ratios = {
        "ratio": [each["streamed"] / each["step"] for each in rounds],
        "dealt_share_percent": [100 / (1 + each["dealt"] / each["step"]) for each in rounds],
        "streamed_share_percent": [100 / (1 + each["streamed"] / each["step"]) for each in rounds],
    }
    return {**figures, **{name: statistics.median(each) for name, each in ratios.items()}}


def write_text(folder: Path, num_copies: int) -> Path:
    """The topics as lines of JSON."""
    lines = [json.dumps({"text": topic}) + "\n" for topic in pydoc_data.topics.topics.values()]
    for index in range(num_copies):
        (folder / f"text-{index}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def learn_pairs(folder: Path) -> Path:
    """A folder with the files of a small byte-pair encoding."""
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(
        pydoc_data.topics.topics.values(), vocab_size=4096, special_tokens=[END], show_progress=False
    )
    (folder / "pairs").mkdir()
    learned.save_model(str(folder / "pairs"))
    return folder / "pairs"


def trainer(source: TextSource) -> Callable[[int], int]:
    """Some co-training steps on a batch in memory; gives the tokens used up."""
    torch.manual_seed(0)
    sizes = {
        "n_embd": 128,
        "n_head": 4,
        "n_positions": CONTEXT,
        "vocab_size": 257,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    student = GPT2LMHeadModel(GPT2Config(n_layer=4, n_inner=512, **sizes, **rates))
    ta = GPT2LMHeadModel(GPT2Config(n_layer=6, n_inner=1024, **sizes, **rates))
    nested = matta.nest(student, ta, layers={"transformer.h": "first"})
    cotrain = matta.CoTraining(nested, matta.objectives.CausalLM())
    optimizer = torch.optim.AdamW(nested.parameters(), lr=1e-4, foreach=True)
    batch = next(PackedTokens(source, load_tokenizer("bytes"), context=CONTEXT, batch=BATCH))

    def train(steps: int) -> int:
        for _ in range(steps):
            optimizer.zero_grad()
            cotrain(batch).loss.backward()
            optimizer.step()
        return steps * batch["input_ids"].numel()

    return train


def data_arms(prefix: str, source: TextSource, tokenizer: Any, cache: Path) -> dict[str, Callable[[], int]]:
    """What gives text, by name; each arm gives the tokens that it made."""

    def once() -> int:
        return len(load_corpus(source, tokenizer, None).tokens)

    def streamed() -> int:
        settings = {"context": CONTEXT, "batch": BATCH, "passes": 1, "seed": 0, "buffer": 512}
        return sum(each["input_ids"].numel() for each in PackedTokens(source, tokenizer, stream=True, **settings))

    dealer = PackedTokens(source, tokenizer, context=CONTEXT, batch=BATCH, seed=0, cache=cache)

    def dealt() -> int:
        return sum(each["input_ids"].numel() for each in islice(dealer, 500))

    return {f"{prefix}once": once, f"{prefix}dealt": dealt, f"{prefix}streamed": streamed}


def rate(arm: Callable[[], int]) -> float:
    """Tokens by processor second."""
    start = time.process_time()
    count = arm()
    return count / (time.process_time() - start)


if __name__ == "__main__":
    main()
