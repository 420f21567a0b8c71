"""What runs, studies, servers and caches read back of what they have written, and data of further forms, is fuzzed."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import distributed

import matta
from matta.ab_testing.joining import read_logs
from matta.errors import MattaError
from matta.lm.benchmarks import contestants
from matta.lm.corpora import _load as load_cached
from matta.lm.corpora import load_corpus
from matta.lm.documents import TextSource, held_out_documents
from matta.lm.extracting import _results as results_of
from matta.lm.judging import choose, write_tasks
from matta.lm.run_listing import listed
from matta.lm.tokens import load_tokenizer
from matta.lm.trained_runs import map_run, read_run_recipe
from matta.sizes.storage import verify
from matta.streams import Categorical, Folder, Numeric, Schema, Stream
from matta.training.factors import load_factors
from matta.training.feeding import Feed
from matta.training.fitting import fit
from matta.training.loop import Training
from matta.training.run_folder import RunFolder
from matta.training.run_settings import Settings
from matta_studies import journal

sys.path.insert(0, str(Path(__file__).parent))
from bad_weights import VERSION, load, snapshot
from good_inputs import make_inputs, tower
from mutations import MOST, refuses_or_reads, write

SCHEMA = Schema(columns={"x": Numeric(), "c": Categorical(vocabulary=4)}, label="label")
FITTED, SHARES = "fitted/checkpoint-00000002", "shares/checkpoint-00000002"
SHARD = f"{SHARES}/shard-00001-model-00001-of-00001.safetensors"
DATA = [(torch.eye(3), torch.tensor([0.0, 1.0, 1.0]))] * 4
SLOW, SLOWEST = min(MOST, 2000), min(MOST, 200)  # for readers that take some milliseconds, or a tenth of a second


class Run:
    """A run of two towers, to be resumed."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        nested = matta.nest(tower(4), tower(8))
        self.path, self.cotrain = path, matta.CoTraining(nested, matta.objectives.Binary())
        self.optimizer = matta.Shampoo(nested, lr=0.01, block_size=4)
        self.accelerator = Accelerator(cpu=True)

    def train(self) -> None:
        quiet: dict[str, Any] = {"progress": False, "tensorboard": False, "accelerator": self.accelerator}
        fit(self.cotrain, DATA, self.optimizer, steps=2, run=self.path, checkpoint_every=1, **quiet)

    def resume(self) -> None:
        """Take up the newest checkpoint."""
        given: dict[str, Any] = dict.fromkeys(("epochs", "clip_norm", "evaluate_every", "best", "patience", "rollback"))
        counts = {"steps": 2, "accumulate": 1, "checkpoint_every": 1, "max_nonfinite": 10, "log_every": 50}
        settings = Settings(**given, **counts, precision="no", resume=True)
        feed, folder = Feed(DATA, self.accelerator, None), RunFolder(self.path, resume=True)
        Training(self.cotrain, self.optimizer, None, feed, settings, None, (), folder, self.accelerator)._resume()


def write_shares(run: Run, path: Path) -> None:
    """The checkpoint of a run as one by shares, which one process of torch.distributed writes."""
    distributed.init_process_group("gloo", init_method=f"file://{path}.store", rank=0, world_size=1)
    try:
        whole = RunFolder(run.path, resume=True).load(run.cotrain, run.optimizer)
        assert whole is not None
        state = {name: value for name, value in whole.items() if name not in ("feeds", "optimizer", "extra_state")}
        folder = RunFolder(path, resume=False)
        folder.begin()
        folder.save_shares(2, run.cotrain, run.optimizer, state, whole["feeds"][0])
        folder.close()
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_inputs(folder)
    run = Run(folder / "fitted")
    run.train()
    shutil.rmtree(folder / "fitted" / "checkpoint-00000001")  # else that would be resumed from
    write_shares(run, folder / "shares")
    (folder / VERSION / "CRC32SUMS").unlink()
    (folder / VERSION / "encoder.json").write_text('{"vocabulary": {"a": 1}}')
    items = folder / "items" / "lambada.jsonl"
    items.parent.mkdir()
    items.write_text('{"text": "One two three.", "domain": null}\n{"text": "Four five."}\n')
    table = {"id": ["r1", "r2"], "predictions": [[0.1], [0.2]], "arm": ["A", "B"], "kind": ["answer", "answer"]}
    pq.write_table(pa.table(table), folder / "answers.parquet")
    pq.write_table(pa.table({"x": [1.5, 2.5], "c": ["a", "b"], "label": [0, 1]}), folder / "data/events/1.parquet")
    (folder / "data/events/1.csv").unlink()
    (folder / "text.txt.gz").write_bytes(gzip.compress(b"A text.\n"))
    (folder / "text.json").write_text('[{"text": "A text."}, {"text": "Another."}]')
    about = {"format": journal.FORMAT, "data": "d"} | {name: version(name) for name in ("matta", "torch")}
    lines = [about, ["job 1", {"loss": 1.0}], ["job 2", {"loss": 2.0}]]
    (folder / "study.journal").write_text("".join(json.dumps(line) + "\n" for line in lines))
    load_corpus(TextSource(path=folder / "data" / "text.txt"), load_tokenizer("bytes"), cache=folder / "cache")
    next((folder / "cache").glob("*/corpus.json")).parent.rename(folder / "corpus")
    return folder


def resumed(name: str) -> Callable[[Path], Callable[[], object]]:
    return lambda folder: Run(folder / name).resume


def of(read: Callable[[Path], object], name: str = "") -> Callable[[Path], Callable[[], object]]:
    return lambda folder: lambda: read(folder / name)


def read_journal(folder: Path) -> object:
    """As a study that is stopped at once."""
    with pytest.raises(KeyboardInterrupt), journal.kept(lambda jobs: (), folder / "study", "d", Console(quiet=True)):
        raise KeyboardInterrupt
    return None


def stream(folder: Path) -> None:
    for batch in Stream(Folder(folder, idle_s=0), SCHEMA, batch_size=2, quarantine=folder.parent / "aside.jsonl"):
        assert all(bool(value.isfinite().all()) for value in batch.values())


def text(name: str) -> Callable[[Path], Callable[[], object]]:
    return of(lambda path: held_out_documents(TextSource(path=path), 100), name)


def tasks(folder: Path) -> object:
    return write_tasks(choose("lambada"), folder / "items", folder / "tasks")


Reader = tuple[str, Callable[[Path], Callable[[], object]], int]
READERS: dict[str, Reader] = {
    "marker": ("fitted/fit.json", of(lambda path: RunFolder(path, resume=True), "fitted"), MOST),
    "checkpoint": (f"{FITTED}/training.json", resumed("fitted"), MOST),
    "its weights": (f"{FITTED}/model.safetensors", resumed("fitted"), MOST),
    "its state": (f"{FITTED}/training.safetensors", resumed("fitted"), MOST),
    "its checksums": (f"{FITTED}/CRC32SUMS", of(verify, FITTED), MOST),
    "shares": (f"{SHARES}/training.json", resumed("shares"), SLOW),
    "a share": (SHARD, resumed("shares"), SLOW),
    "place of a process": (f"{SHARES}/process-00000.json", resumed("shares"), SLOW),
    "their checksums": (f"{SHARES}/CRC32SUMS", resumed("shares"), SLOW),
    "listing": (f"{FITTED}/training.json", of(listed, "fitted"), MOST),
    "factors": ("fitted/preconditioner.safetensors", of(load_factors, "fitted"), MOST),
    "plans to load": ("nesting/nested.json", of(load), SLOW),
    "weights to load": ("nesting/nested.safetensors", of(load), SLOW),
    "encoder": (f"{VERSION}/encoder.json", of(snapshot), MOST),
    "latest": ("snapshots/latest", of(snapshot), SLOWEST),  # waits for a version that is being removed
    "recipe of a run": ("run/recipe.json", of(read_run_recipe, "run"), MOST),
    "results": ("run/results.json", of(results_of, "run"), MOST),
    "results to judge": ("run/results.json", of(lambda path: contestants([str(path)]), "run"), SLOWEST),
    "model to judge": ("model/config.json", of(lambda path: contestants([str(path)]), "model"), MOST),
    "its tokenizer's settings": ("model/tokenizer_config.json", of(lambda p: contestants([str(p)]), "model"), MOST),
    "configuration": ("run/configs/ta/config.json", of(map_run, "run"), SLOWEST),
    "tokenizer": ("run/tokenizer/tokenizer.json", of(map_run, "run"), SLOWEST),
    "tokenizer's settings": ("run/tokenizer/tokenizer_config.json", of(map_run, "run"), SLOWEST),
    "cached tokens": ("corpus/corpus.json", of(load_cached, "corpus"), MOST),
    "items": ("items/lambada.jsonl", of(tasks), MOST),
    "journal": ("study.journal", of(read_journal), MOST),
    "log in Parquet": ("answers.parquet", of(lambda path: read_logs([path]), "answers.parquet"), MOST),
    "events in Parquet": ("data/events/1.parquet", of(stream, "data/events"), SLOW),
    "text in gzip": ("text.txt.gz", text("text.txt.gz"), MOST),
    "list of texts": ("text.json", text("text.json"), MOST),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", READERS)
def test_a_reader_reads_or_refuses(kind: str, good: Path) -> None:
    name, reader, tries = READERS[kind]
    refuses_or_reads(good / name, reader(good), tries=tries)


DEEP = "[" * 3000
FOUND = [
    ("marker", DEEP, r"fit.json is damaged"),
    ("checkpoint", "{}", r"checkpoint-00000002 cannot be resumed from: .*extra_state"),
    ("checkpoint", DEEP, r"no checkpoint in .* is whole"),
    ("its checksums", "00000000  a\0b\n", r"CRC32SUMS is damaged"),
    ("items", DEEP, r"lambada.jsonl, line 1 is not JSON"),
    ("journal", f"{DEEP}\n{DEEP}\n", r"is no journal of a study"),
    ("cached tokens", "{}", None),
    ("cached tokens", '{"size": 9}', None),
    ("cached tokens", '{"size": 18, "kind": ",u2", "fingerprint": "", "counts": {}}', None),
    ("listing", "[]", None),
    ("latest", "9" * 5000, r"latest is damaged: it names 9{50}; expected a version"),
    ("configuration", '{"model_type": "gpt2", "n_layer": 1180591620717411303424}', r"expected a size below 2\^31"),
]


@pytest.mark.parametrize(("kind", "content", "line"), FOUND)
def test_what_was_found(kind: str, content: str, line: str | None, good: Path) -> None:
    name, reader, _ = READERS[kind]
    file, read = good / name, reader(good)
    before = {each: each.read_bytes() for each in (file, file.with_name("CRC32SUMS")) if each.is_file()}
    try:
        write(file, content.encode())
        with nullcontext() if line is None else pytest.raises(MattaError, match=line):
            read()
    finally:
        for each, whole in before.items():
            each.write_bytes(whole)
