"""Train on a stream in processes that are killed with -9 at random moments, and compare with an uninterrupted run.

    python tests/stream_crashes.py FOLDER NUM_KILLS SEED

Prints a JSON object: how many kills there were, in how many runs, and what differed. Processes are forked, so that
torch is loaded once. A kill comes at a random time after the first step, the writing of checkpoints, quarantine and
snapshots included.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (loaded before the forks)
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

import matta
import matta.training.fitting
from matta.streams import Categorical, EventBatch, Folder, Numeric, Schema, Stream

NUM_EVENTS, BATCH_SIZE = 400, 16
COLUMNS = {
    "place": Categorical(buckets=16),
    "user": Categorical(vocabulary=40),
    "x": Numeric(low=-50, high=50),
    "y": Numeric(required=True),
}
SCHEMA = Schema(columns=COLUMNS, label="late", time="number")
NAMES = ("place", "user", "x", "y", "late", "number")


class Ranker(nn.Module):
    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.place, self.user = (nn.Embedding(rows, embedding) for rows in SCHEMA.num_ids)
        self.hidden = nn.Linear(2 * embedding + SCHEMA.num_numbers, width)
        self.drop, self.out = nn.Dropout(0.1), nn.Linear(width, 1)

    def forward(self, categorical: Tensor, numeric: Tensor) -> Tensor:
        parts = [self.place(categorical[:, 0]), self.user(categorical[:, 1]), numeric]
        return self.out(self.drop(torch.relu(self.hidden(torch.cat(parts, -1))))).squeeze(-1)


class Ledger:
    """Counts how often each event was trained on; saved with the run, as the weights are."""

    def __init__(self, begun: int | None) -> None:
        self.counts, self._begun = torch.zeros(NUM_EVENTS, dtype=torch.int64), begun

    def before_step(self, cotrain: matta.CoTraining, batch: Any, out: Any) -> None:
        assert isinstance(batch, EventBatch) and batch.times is not None
        self.counts.index_add_(0, batch.times.long(), torch.ones(len(batch.times), dtype=torch.int64))

    def after_step(self, cotrain: matta.CoTraining) -> None:
        if self._begun is not None:
            os.write(self._begun, b".")
            os.close(self._begun)
            self._begun = None

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"].clone()


def write_events(folder: Path) -> int:
    """Events in all three formats, with bad rows and files among them; how many rows are bad."""
    folder.mkdir()
    generator = random.Random(0)
    events: list[dict[str, Any]] = []
    for number in range(NUM_EVENTS):
        place, user = generator.choice("ABCDEFGH"), f"user {min(int(generator.expovariate(0.05)), 99)}"
        x = None if generator.random() < 0.1 else generator.gauss(3, 2)
        events.append({"place": place, "user": user, "x": x, "y": generator.random(), "late": number % 2})
    rows = [{**event, "number": number} for number, event in enumerate(events)]
    bad = [{**row, "x": 99.0} for row in rows[::20]]
    for at, row in enumerate(bad):
        rows.insert(21 * at, row)
    for index, part in enumerate(np.array_split(np.arange(len(rows)), 6)):
        chosen = [rows[int(each)] for each in part]
        stem = folder / f"{index}"
        if index % 3 == 0:
            pq.write_table(pa.Table.from_pylist(chosen), stem.with_suffix(".parquet"), row_group_size=50)
        elif index % 3 == 1:
            lines = [",".join("" if row[name] is None else str(row[name]) for name in NAMES) for row in chosen]
            stem.with_suffix(".csv").write_text("\n".join([",".join(NAMES), *lines]), encoding="utf-8")
        else:
            lines = [json.dumps(row) for row in chosen]
            stem.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "5b.parquet").write_bytes(b"PAR1")
    return len(bad)


def train(events: Path, out: Path, begun: int | None) -> None:
    """One run, or the rest of one; what came of it is written to `out`."""
    torch.manual_seed(0)
    nested = matta.nest(Ranker(8, 4), Ranker(16, 4))
    optimizer = torch.optim.Adagrad(nested.parameters(), lr=0.1)
    source = Folder(events, idle_s=0, settle_s=0, block_bytes=2000, num_rows=40)
    stream = Stream(source, SCHEMA, batch_size=BATCH_SIZE, quarantine=out / "bad.jsonl")
    ledger = Ledger(begun)
    validation = matta.ProgressiveValidation(window=100, num_bins=256, watch={"wide": matta.wide(nested)})
    snapshots = matta.Snapshots(out / "snapshots", every_events=100, encoder=stream.encoder)
    matta.fit(
        matta.CoTraining(nested, matta.objectives.Binary(), ramp=matta.Ramp(start=5, steps=20)),
        stream,
        optimizer,
        observers=[ledger, validation, snapshots],
        run=out / "run",
        resume=True,
        checkpoint_every=3,
        tensorboard=False,
        progress=False,
    )
    weights = torch.cat([each.detach().flatten() for each in nested.parameters()])
    came = {
        "weights": weights.numpy().tobytes().hex(),
        "trained": ledger.counts.tolist(),
        "counts": [stream.counts.events, stream.counts.bad_rows, stream.counts.bad_files],
        "encoder": stream.encoder.state_dict(),
        "values": validation.values(),
        "points": validation.points,
        "quarantine": (out / "bad.jsonl").read_text(encoding="utf-8"),
    }
    (out / "came.json").write_text(json.dumps(came), encoding="utf-8")


def run_once(events: Path, out: Path, delay_s: float | None) -> float | None:
    """Train in a process of its own, killed so long after its first step; the seconds from there to its end, if any."""
    out.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            train(events, out, writing)
            os._exit(0)
        except BaseException as error:  # a fork must never return
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    start = time.monotonic()
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the training failed")
    return time.monotonic() - start if os.WIFEXITED(status) else None


def main(folder: Path, num_kills: int, seed: int) -> dict[str, Any]:
    """Kill until there were enough kills and the last run has ended."""
    torch.set_num_threads(1)
    num_bad = write_events(folder / "events")
    (folder / "reference").mkdir()
    train(folder / "events", folder / "reference", None)  # here, so that everything is loaded before the forks
    reference = json.loads((folder / "reference" / "came.json").read_text(encoding="utf-8"))
    duration = run_once(folder / "events", folder / "timed", None)
    assert duration is not None
    generator, kills, ended, differing = random.Random(seed), 0, 0, set()
    out = folder / "killed"
    while kills < num_kills or out.exists():
        delay = generator.uniform(0, 0.7 * duration) if kills < num_kills else None
        if run_once(folder / "events", out, delay) is None:
            kills += 1
            continue
        came = json.loads((out / "came.json").read_text(encoding="utf-8"))
        differing |= {name for name in reference if came[name] != reference[name]}
        snapshot = matta.read_snapshot(out / "snapshots", lambda: Ranker(8, 4))
        assert snapshot.events >= NUM_EVENTS - 100 - BATCH_SIZE
        ended += 1
        shutil.rmtree(out)
    found = {"trained": sorted(set(reference["trained"])), "counts": reference["counts"], "num_bad": num_bad}
    return {"kills": kills, "ended": ended, "differing": sorted(differing), **found}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
