"""Each JSON file that matta reads, with values of any type in any place: chance seldom finds the one bad place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

import matta
from matta.serving.application import Application
from matta.serving.serve_settings import ServeSettings
from matta.serving.served_models import ServedModels

sys.path.insert(0, str(Path(__file__).parent))
from good_inputs import tower
from mutations import MOST, every_change, require_all_read_or_refused
from test_fuzzed_readers import READERS as OF_USERS
from test_fuzzed_readers import good as users
from test_fuzzed_runs import READERS as OF_RUNS
from test_fuzzed_runs import good as runs

__all__ = ["runs", "users"]  # fixtures


def is_json(name: str) -> bool:
    return name.endswith((".json", ".jsonl", ".journal"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind, (name, _) in OF_USERS.items() if is_json(name)])
def test_files_of_users(kind: str, users: Path) -> None:
    name, read = OF_USERS[kind]
    check(users / name, lambda: read(users), MOST)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind, (name, _, _) in OF_RUNS.items() if is_json(name)])
def test_files_of_runs(kind: str, runs: Path) -> None:
    name, reader, tries = OF_RUNS[kind]
    check(runs / name, reader(runs), tries)


def check(file: Path, read: Callable[[], object], most: int) -> None:
    require_all_read_or_refused(file, read, every_change(file.read_bytes(), most))


INPUT = {"name": "input_0", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6], "parameters": {}}
BODIES = {
    "infer": {"id": "r1", "inputs": [INPUT], "outputs": [{"name": "logits"}], "parameters": {"size": "TA"}},
    "outcomes": {"id": "r1", "outcomes": [1, 0]},
}


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_of_requests(kind: str, tmp_path: Path) -> None:
    models = ServedModels(matta.nest(tower(4), tower(8)), example=(torch.ones(2, 3), None))
    application = Application(models, ServeSettings(split="TA=1", log=tmp_path / "log"))
    good, path = json.dumps(BODIES[kind]).encode(), f"/v2/models/model/{kind}"
    with TestClient(application.asgi) as client:
        for body in (*every_change(good, 10_000), b"[" * 3000):
            answer = client.post(path, content=body)
            assert answer.status_code in (200, 400), (body, answer.text)
        answer = client.post(path, content=good)
        assert answer.status_code == 200, answer.text
    for line in (tmp_path / "log").read_text().splitlines():
        json.loads(line)
