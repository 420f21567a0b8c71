"""One small input of each kind that matta reads, in one folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import matta
from matta.ab_testing import AnswerLog
from matta.choosing.family import Size
from matta.lm import teacher_labels
from matta.lm.folders import export
from matta.lm.recipe_files import NESTED, read_recipe
from matta.lm.tokens import load_tokenizer
from matta.lm.trained_runs import RESULTS, write_run
from matta.objectives.labels import TopK

SIZES = {"n_embd": 8, "n_head": 2, "n_positions": 16}
RECIPE = """
[model]
architecture = "gpt2"
student = { n_layer = 1, n_inner = 8, n_embd = 8, n_head = 2, n_positions = 16 }
ta = { n_layer = 2, n_inner = 16 }
[data]
train = "pydoc"
tokenizer = "bytes"
context = 16
[train]
steps = 2
batch = 2
learning_rate = 1e-3
"""


def tower(width: int) -> nn.Sequential:
    """Student or TA of the nesting that is saved, and published."""
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))


def make_inputs(folder: Path) -> None:
    """Write them."""
    torch.manual_seed(0)
    (folder / "recipe.toml").write_text(RECIPE)
    _write_run(folder)
    nested = matta.nest(tower(4), tower(8))
    matta.save(nested, folder / "nesting")
    matta.Snapshots(folder / "snapshots", every_events=1).publish(nested)
    costs = {"bytes": 40, "flops": 2.0, "activation_bytes": 4.0, "latencies": ()}
    sizes = [
        Size(name=name, layers={"0": choice}, parameters=n, quality=1.0 / n, **costs)
        for name, choice, n in [("Student", "narrow", 21), ("TA", "wide", 41)]
    ]
    matta.Family(sizes=tuple(sizes)).save(folder / "nesting")
    _write_labels(folder / "labels")
    _write_data(folder / "data")


def _write_run(folder: Path) -> None:
    run, tokenizer = folder / "run", load_tokenizer("bytes")
    recipe = read_recipe(folder / "recipe.toml")
    ends = {"vocab_size": len(tokenizer), "bos_token_id": 256, "eos_token_id": 256}
    student = GPT2LMHeadModel(GPT2Config(n_layer=1, n_inner=8, **SIZES, **ends))
    ta = GPT2LMHeadModel(GPT2Config(n_layer=2, n_inner=16, **SIZES, **ends))
    nested = matta.nest(student, ta, layers={"transformer.h": "first"}).eval()
    run.mkdir()
    write_run(run, recipe, nested, tokenizer)
    matta.save(nested, run / NESTED)
    (run / RESULTS).write_text(json.dumps({"steps": 2, "models": []}))
    export(matta.extract(nested).eval(), folder / "model", tokenizer=tokenizer)


def _write_labels(folder: Path) -> None:
    about = teacher_labels.About(
        teacher="T",
        top=2,
        vocabulary=257,
        tokenizer="t",
        data="d",
        context=4,
        num_samples=3,
        samples_per_shard=2,
        precision="no",
        matta="0",
    )
    teacher_labels.begin(folder, about)
    for shard in range(2):
        samples = np.arange(2 * shard, 2 * shard + about.rows_of(shard))
        tokens = torch.arange(2).expand(len(samples), 3, 2)
        labels = TopK(tokens, torch.full((len(samples), 3, 2), -1.0), tokens[..., 0])
        teacher_labels.write_shard(folder, shard, about, samples, labels)


def _write_data(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    (folder / "text.txt").write_text("A text.\n")
    (folder / "text.jsonl").write_text('{"text": "A text."}\n{"text": "Another."}\n')
    pq.write_table(pa.table({"text": ["A text.", "Another."]}), folder / "text.parquet")
    (folder / "events").mkdir()
    (folder / "events" / "1.csv").write_text("x,label\n1.5,0\n2.5,1\n")
    with AnswerLog(folder / "answers.jsonl") as log:
        for i in range(40):
            arm = "AB"[i % 2]
            log.answer(f"r{i}", arm=arm, model=arm, version=1, predictions=[0.1], latency_ms=1.0, time_s=float(i))
            log.outcome(f"r{i}", outcomes=[float(i % 3 == 0)], time_s=i + 0.5)
