"""`matta.fit` on a stream of Parquet files, beside a bare loop over tensors in memory: a ranker's small step.

The same nested pair (Student MLP 64-32, TA 4x), losses and optimizer (AdamW) on the same events, batch 512, on one
thread, arms in turn in one process. Times are processor time, medians over rounds. The stream has 2 columns of ids, one
hashed and one with a vocabulary, and 8 numbers with running normalisation, 2% of them missing.

`events_per_s_ratio`: `matta.fit` on the stream to the bare loop over `CoTraining`; `separate_ratio`: to a loop without
anything of matta's, whose two models share no weights; `watched_ratio`: with progressive validation and snapshots on.
`parse_share`: reading, checking and encoding alone, of the time of `matta.fit` on the stream.

    python benchmarks/stream.py [--quick] [--json]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import matta
from figures import benchmark_parser, print_figures
from matta.streams import Categorical, EventBatch, Folder, Numeric, Schema, Stream

NUM_FILES, NUM_NUMBERS, NUM_IDS, BATCH_SIZE = 4, 8, 1000, 512
COLUMNS = {
    "user": Categorical(buckets=NUM_IDS),
    "item": Categorical(vocabulary=NUM_IDS),
    **{f"x{index}": Numeric() for index in range(NUM_NUMBERS)},
}
SCHEMA = Schema(columns=COLUMNS, label="clicked", time="time", arguments=("ids", "numbers"))


class Ranker(nn.Module):
    def __init__(self, hidden: tuple[int, int], embedding: int) -> None:
        super().__init__()
        self.user, self.item = (nn.Embedding(rows, embedding) for rows in SCHEMA.num_ids)
        self.mlp = nn.Sequential(
            nn.Linear(2 * embedding + SCHEMA.num_numbers, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], 1),
        )

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        parts = [self.user(ids[:, 0]), self.item(ids[:, 1]), numbers]
        return self.mlp(torch.cat(parts, dim=-1)).squeeze(-1)


def rankers() -> tuple[Ranker, Ranker]:
    torch.manual_seed(0)
    return Ranker((64, 32), 16), Ranker((256, 128), 32)


def prepare() -> tuple[matta.CoTraining, torch.optim.Optimizer]:
    student, ta = rankers()
    numbers = SCHEMA.num_numbers
    inputs = matta.Layout.concat([(16, 32), (16, 32), (numbers, numbers)], axis=1)
    nested = matta.nest(student, ta, layouts={"mlp.0.weight": inputs})
    optimizer = torch.optim.AdamW(nested.parameters(), lr=1e-3, foreach=True)
    return matta.CoTraining(nested, matta.objectives.Binary()), optimizer


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(
        "matta.fit on a file stream beside a bare loop.", quick="fewer rounds, under half a minute"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), num_rounds=4 if options.quick else 15, num_events=200 * BATCH_SIZE)
    print_figures(figures, as_json=options.json)


def measure(folder: Path, *, num_rounds: int, num_events: int) -> dict[str, float]:
    """Events a second in each arm, and the ratios."""
    (folder / "events").mkdir()
    write_events(folder / "events", num_events)
    batches = list(stream(folder))
    arms: dict[str, Callable[[], None]] = {
        "bare": lambda: bare(batches),
        "separate": lambda: separate(batches),
        "stream": lambda: fitted(folder, watched=False),
        "watched": lambda: fitted(folder, watched=True),
        "parse": lambda: drain(folder),
    }
    rounds = [{name: timed(arm) for name, arm in arms.items()} for _ in range(num_rounds + 1)][1:]
    median = {name: statistics.median(each[name] for each in rounds) for name in arms}
    figures = {f"{name}_events_per_s": num_events / median[name] for name in arms}
    pairs = {
        "events_per_s_ratio": ("bare", "stream"),
        "separate_ratio": ("separate", "stream"),
        "watched_ratio": ("bare", "watched"),
        "parse_share": ("parse", "stream"),
    }
    ratios = {name: statistics.median(each[a] / each[b] for each in rounds) for name, (a, b) in pairs.items()}
    return {**figures, **ratios}


def write_events(folder: Path, num_events: int) -> None:
    """Made events in a few files."""
    random = np.random.default_rng(0)
    for index, count in enumerate(len(part) for part in np.array_split(np.arange(num_events), NUM_FILES)):
        numbers = random.normal(5, 3, (NUM_NUMBERS, count))
        numbers[random.random(numbers.shape) < 0.02] = np.nan
        columns: dict[str, object] = {f"x{i}": each for i, each in enumerate(numbers)}
        columns["user"] = [f"user {each}" for each in random.zipf(1.3, count) % 5000]
        columns["item"] = random.zipf(1.3, count) % 2000
        columns["clicked"] = random.integers(2, size=count)
        columns["time"] = 1.7e9 + 86400 * index + np.sort(random.random(count)) * 86400
        pq.write_table(pa.table(columns), folder / f"{index:03}.parquet")


def stream(folder: Path) -> Stream:
    return Stream(Folder(folder / "events", idle_s=0), SCHEMA, batch_size=BATCH_SIZE, quarantine=folder / "bad.jsonl")


def bare(batches: list[EventBatch]) -> None:
    """The loop that anybody would write around the nested pair."""
    cotrain, optimizer = prepare()
    for batch in batches:
        optimizer.zero_grad()
        cotrain(batch).loss.backward()
        optimizer.step()


def separate(batches: list[EventBatch]) -> None:
    """Plain PyTorch: two models with weights of their own, and the three losses."""
    models = nn.ModuleList(rankers())
    optimizer = torch.optim.AdamW(models.parameters(), lr=1e-3, foreach=True)
    for batch in batches:
        optimizer.zero_grad()
        labels = batch["labels"]
        student, ta = (model(batch["ids"], batch["numbers"]) for model in models)
        taught = torch.sigmoid(ta.detach())
        (cross_entropy(student, labels) + cross_entropy(ta, labels) + cross_entropy(student, taught)).backward()
        optimizer.step()


def fitted(folder: Path, *, watched: bool) -> None:
    """A call of `matta.fit` on the stream."""
    cotrain, optimizer = prepare()
    data = stream(folder)
    snapshots = matta.Snapshots(folder / "snapshots", every_events=20_000, encoder=data.encoder)
    observers = [matta.ProgressiveValidation(), snapshots] if watched else []
    matta.fit(cotrain, data, optimizer, observers=observers, progress=False)


def drain(folder: Path) -> None:
    """Read, check and encode; nothing is trained."""
    for _ in stream(folder):
        pass


def timed(arm: Callable[[], None]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    arm()
    return time.process_time() - start


if __name__ == "__main__":
    main()
