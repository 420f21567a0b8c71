"""The examples run, and end with what they are meant to show."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import matta

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert not list(tmp_path.iterdir()), "an example left something behind"
    return capsys.readouterr().out


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    return lambda name: output_of(name, tmp_path, monkeypatch, capsys)


def test_every_example_is_tested() -> None:
    tested = set(re.findall(r'run\("(\w+\.py)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert {file.name for file in EXAMPLES.glob("*.py")} == tested


def test_plain_loop(run) -> None:  # type: ignore[no-untyped-def]
    right = [float(found) for found in re.findall(r"([\d.]+)% right", run("plain_loop.py"))]
    assert len(right) == 3
    assert min(right[0], right[-1]) > 80


def test_transformers_trainer(run) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("transformers")
    found = re.search(r"counting: \[(.*)\]", run("transformers_trainer.py"))
    assert found is not None
    counted = [int(token) for token in found[1].split(",")]
    assert counted == [(counted[0] + step) % 32 for step in range(12)]


def test_lightning_module(run) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("lightning")
    shown = run("lightning_module.py")
    losses = dict(re.findall(r"'val_(\w+)_loss': '([\d.]+)'", shown))
    assert float(losses["ta"]) < float(losses["student"]) < 1.2
    assert "(0): Linear(in_features=16, out_features=8, bias=True)" in shown


class Tagger(nn.Module):
    """Logits of each position, from a table."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.table, self.head = nn.Embedding(6, width), nn.Linear(width, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids))


def cotraining() -> matta.CoTraining:
    return matta.CoTraining(matta.nest(Tagger(4), Tagger(8)), matta.objectives.CausalLM())


def examples() -> list[dict[str, Tensor]]:
    """Eight sequences, each with one more label ignored than the one before."""
    ids = torch.randint(6, (8, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.where(torch.arange(10) >= torch.arange(8).unsqueeze(1), -100)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def train_with_transformers(folder: Path, batch: int, accumulate: int) -> matta.CoTraining:
    from transformers import TrainingArguments

    trainer, cotrain = runpy.run_path(str(EXAMPLES / "transformers_trainer.py"))["CoTrainer"], cotraining()
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=3,
        learning_rate=1.0, optim="sgd", max_grad_norm=0.1, lr_scheduler_type="constant", use_cpu=True,
        train_sampling_strategy="sequential", remove_unused_columns=False, label_names=["labels"], save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer(cotrain, arguments, train_dataset=examples()).train()
    return cotrain


def train_with_lightning(folder: Path, batch: int, accumulate: int) -> matta.CoTraining:
    import lightning

    module, cotrain = runpy.run_path(str(EXAMPLES / "lightning_module.py"))["CoTrainingModule"], cotraining()

    class Descending(module):  # type: ignore[misc,valid-type]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.cotrain.nested.parameters(), lr=1.0)

    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=3, accumulate_grad_batches=accumulate, gradient_clip_val=0.1, logger=False,
        default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Descending(cotrain, lr=1.0), DataLoader(examples(), batch_size=batch))
    return cotrain


@pytest.mark.parametrize("train", [train_with_transformers, train_with_lightning])
def test_trainers_weigh_every_label_of_a_step_alike(train: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("lightning")
    whole, parts = (dict(train(tmp_path, *sizes).nested.ta.named_parameters()) for sizes in ((8, 1), (2, 4)))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    assert not torch.equal(whole["head.weight"], cotraining().nested.ta.head.weight)


def test_online(run) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("pyarrow")
    shown = run("online.py")
    versions = [(int(version), int(events)) for version, events in re.findall(r"version (\d+), after (\d+)", shown)]
    assert versions == sorted(versions) and versions[-1] == (5, 7980)
    losses = [float(loss) for loss in re.findall(r"AucLoss ([\d.]+)", shown)]
    assert len(losses) == 2 and max(losses) < 0.25  # the best there can be is about 0.1; chance is 0.5
    assert "7980 events, 20 rows set aside" in shown


BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_benchmarks_import_what_is_there(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("matta", "matta_studies"):
            module = importlib.import_module(str(node.module))
            for each in node.names:
                found = hasattr(module, each.name) or (
                    hasattr(module, "__path__") and importlib.util.find_spec(f"{node.module}.{each.name}")
                )
                assert found, f"{node.module} has no {each.name}"


def test_figures_of_benchmarks_are_one_json_object_or_a_line_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS[0].parent))
    print_figures = importlib.import_module("figures").print_figures
    found = {"ratio": 0.5, "spike": {"size": {"p99_ms": 1234.5}, "count": 3}}
    print_figures(found, as_json=True)
    assert json.loads(capsys.readouterr().out) == found
    print_figures(found, as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["ratio", "0.5000"], ["spike.size.p99_ms", "1,234.5000"], ["spike.count", "3"]]
