from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import matta
from matta.errors import CheckpointError, MattaError, RunError
from matta.streams import Encoder, Numeric, Schema


class Tied(nn.Module):
    """An embedding tied to the output, and a hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(9, 4), nn.Linear(4, width), nn.Linear(4, 9, bias=False)
        self.back = nn.Linear(width, 4)
        self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.back(torch.relu(self.hidden(self.embed(ids)))))


def small() -> nn.Module:
    return Tied(3)


def large() -> nn.Module:
    return Tied(6)


def test_what_is_read_is_what_was_published(tmp_path: Path) -> None:
    nested = matta.nest(small(), large())
    encoder = Encoder(Schema(columns={"x": Numeric()}, label="y"))
    models = {"student": None, "wide": matta.wide(nested)}
    snapshots = matta.Snapshots(tmp_path / "new", every_s=60, models=models, encoder=encoder)
    assert snapshots.publish(nested) == 1
    snapshot = matta.read_snapshot(tmp_path / "new", small)
    wide = matta.read_snapshot(tmp_path / "new", large, model="wide")
    ids = torch.arange(9)
    with torch.no_grad():
        assert torch.equal(snapshot.module(ids), nested.eval().student(ids))
        assert torch.equal(wide.module(ids), nested.ta(ids))
    assert type(snapshot.module) is Tied and not snapshot.module.training
    assert snapshot.module.out.weight is snapshot.module.embed.weight
    assert snapshot.version == 1 and abs(snapshot.time_s - time.time()) < 600
    assert snapshot.encoder is not None
    assert Encoder.from_state(snapshot.encoder).schema == encoder.schema


def test_versions_come_every_so_many_events_and_the_last_are_kept(tmp_path: Path) -> None:
    nested = matta.nest(nn.Linear(2, 1), nn.Linear(2, 1))
    snapshots = matta.Snapshots(tmp_path, every_events=10, keep=2)
    data = [(torch.randn(4, 2), torch.ones(4))] * 16
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.1)
    cotrain = matta.CoTraining(nested, matta.objectives.Binary())
    matta.fit(cotrain, data, optimizer, observers=[snapshots], progress=False)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["00000004", "00000005", "latest"]
    snapshot = matta.read_snapshot(tmp_path, lambda: nn.Linear(2, 1))
    assert (snapshot.version, snapshot.events) == (5, 60)
    again = matta.Snapshots(tmp_path, every_events=10)
    again.load_state_dict(snapshots.state_dict())
    matta.fit(cotrain, data[:2], optimizer, observers=[again], progress=False)
    assert matta.read_snapshot(tmp_path, lambda: nn.Linear(2, 1)).events == 72


def test_versions_come_every_so_many_seconds(tmp_path: Path) -> None:
    nested = matta.nest(nn.Linear(2, 1), nn.Linear(2, 1))
    cotrain = matta.CoTraining(nested, matta.objectives.Binary())
    snapshots = matta.Snapshots(tmp_path, every_s=0.05)
    snapshots.after_step(cotrain)
    assert not list(tmp_path.iterdir())
    time.sleep(0.06)
    snapshots.after_step(cotrain)
    assert matta.read_snapshot(tmp_path, lambda: nn.Linear(2, 1)).version == 1


def publish_versions(folder: str, count: int) -> None:
    """Publish versions whose weights all equal one number."""
    nested = matta.nest(nn.Linear(40, 40), nn.Linear(40, 40))
    snapshots = matta.Snapshots(folder, every_events=1, keep=2)
    for value in range(count):
        with torch.no_grad():
            for parameter in nested.parameters():
                parameter.fill_(value)
        snapshots.publish(nested)


FORKS = """
import os, sys
import test_snapshots
test_snapshots.publish_versions(sys.argv[1], 1)  # everything is loaded before the forks
for line in sys.stdin:
    child = os.fork()
    if not child:
        test_snapshots.publish_versions(sys.argv[1], 1 << 30)
    print(child, flush=True)
    sys.stdin.readline()
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@contextmanager
def forked_writers(folder: Path) -> Iterator[Callable[[], Callable[[], None]]]:
    """Begins a writer, and gives what kills it. None is left behind, also when the test fails."""
    command = [sys.executable, "-c", FORKS, str(folder)]
    forks = subprocess.Popen(
        command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert forks.stdin is not None and forks.stdout is not None
    asked, told, running = forks.stdin, forks.stdout, set[int]()

    def ask(line: str) -> str:
        asked.write(line)
        asked.flush()
        return told.readline()

    def begin() -> Callable[[], None]:
        child = int(ask("fork\n"))
        running.add(child)

        def kill() -> None:
            os.kill(child, signal.SIGKILL)
            running.discard(child)
            assert ask("wait\n") == "gone\n"

        return kill

    try:
        yield begin
        asked.close()
        assert forks.wait() == 0
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)
        forks.kill()
        forks.wait()
        for pipe in (asked, told):
            pipe.close()


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder where fsync costs nothing, if there is one: kills, unlike power cuts, do not need the disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


def test_a_reader_never_sees_a_broken_version(memory: Path) -> None:
    """The writer is killed at 25 random moments, while the reader polls."""
    folder = memory / "published"
    generator, num_read, last = random.Random(0), 0, 0
    with forked_writers(folder) as begin:
        for _ in range(25):
            kill = begin()
            until = time.monotonic() + generator.uniform(0.0, 0.2)
            while time.monotonic() < until or not (folder / "latest").exists():
                if (folder / "latest").exists():
                    snapshot = matta.read_snapshot(folder, lambda: nn.Linear(40, 40))
                    assert len(torch.cat([each.flatten() for each in snapshot.module.parameters()]).unique()) == 1
                    assert snapshot.version >= last
                    last, num_read = snapshot.version, num_read + 1
            kill()
            assert matta.read_snapshot(folder, lambda: nn.Linear(40, 40)).version >= last
    assert num_read > 25 and last > 10


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no snapshot"):
        matta.read_snapshot(tmp_path, small)
    matta.Snapshots(tmp_path, every_s=1).publish(matta.nest(small(), large()))
    with pytest.raises(CheckpointError, match="has no model 'wide'; it has: student"):
        matta.read_snapshot(tmp_path, small, model="wide")
    with pytest.raises(CheckpointError, match="does not fit the module that build gave"):
        matta.read_snapshot(tmp_path, large)
    with pytest.raises(MattaError, match=r"received a Tied as build; expected a function that builds one"):
        matta.read_snapshot(tmp_path, small())  # type: ignore[arg-type]
    version = tmp_path / "00000001"
    weights = (version / "student.safetensors").read_bytes()
    (version / "student.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="student.safetensors is damaged: its checksum"):
        matta.read_snapshot(tmp_path, small)
    (version / "student.safetensors").unlink()
    with pytest.raises(CheckpointError, match="student.safetensors cannot be read: No such file"):
        matta.read_snapshot(tmp_path, small)
    (version / "student.safetensors").write_bytes(weights)
    (version / "snapshot.json").write_text((version / "snapshot.json").read_text().replace("0", "1"))
    with pytest.raises(CheckpointError, match="snapshot.json is damaged: its checksum"):
        matta.read_snapshot(tmp_path, small)
    (version / "snapshot.json").write_text(json.dumps([])[:1])
    with pytest.raises(CheckpointError, match="snapshot.json is damaged"):
        matta.read_snapshot(tmp_path, small)


@pytest.mark.parametrize("settings", [{}, {"every_events": 0}, {"every_s": 1, "keep": 0}])
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, int]) -> None:
    with pytest.raises(RunError, match="expected one of the first two"):
        matta.Snapshots(tmp_path, **settings)


def test_a_model_names_a_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="it names a file"):
        matta.Snapshots(tmp_path, every_s=1, models={"../student": None})


def test_a_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> object:
            return {"seen": 3}

        def set_extra_state(self, state: object) -> None: ...

    nested = matta.nest(Counting(3, 1), Counting(3, 1))
    with pytest.raises(RunError, match="keeps _extra_state in its state, which is not a tensor.*with matta.save"):
        matta.Snapshots(tmp_path, every_events=1).publish(nested)
    assert not any(tmp_path.iterdir())
