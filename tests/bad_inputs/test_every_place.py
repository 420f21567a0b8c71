"""Each JSON file that matta reads, with values of any type in any place: chance seldom finds the one bad place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
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
