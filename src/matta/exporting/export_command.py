"""`matta export`: a model of a run of `matta train` as a file, with its bits per byte measured before and after."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import nn

from matta.exporting.formats import Exported, export
from matta.lm.bits_per_byte import bits_per_byte
from matta.lm.command_settings import ExportSettings
from matta.lm.documents import held_out_documents, text_source
from matta.lm.extracting import model_of, spec_of
from matta.lm.trained_runs import LanguageRun, load_run


def run(settings: ExportSettings) -> dict[str, Any]:
    """Write the file, and print what it is and how good.

    Raises:
        RunError: the folder is no run, or the model none of its.
        ExportError: the format cannot hold it.
    """
    trained = load_run(settings.run)
    model: Any = model_of(trained.nested, *spec_of(trained.nested, settings.model))
    context = trained.recipe.data.context
    ids = torch.randint(model.config.vocab_size, (2, context), generator=torch.Generator().manual_seed(0))
    documents = _documents(trained)

    def evaluate(module: nn.Module) -> float:
        logits_only = _Named(module)
        return bits_per_byte(logits_only, trained.tokenizer, documents, context=context, batch=2).bits_per_byte

    is_file = settings.written_format in ("onnx", "torch_export")
    done = export(
        model,
        settings.out,
        format=settings.written_format,  # type: ignore[arg-type]
        example={"input_ids": ids, "labels": ids},
        open_axes=(0, 1),
        int8=settings.int8,
        evaluate=evaluate if documents and is_file else None,
    )
    before = evaluate(model) if documents and is_file else None
    _print(done, before)
    return {
        "path": str(done.path),
        "format": done.format,
        "bytes": done.bytes,
        "error": done.error,
        "bits_per_byte": done.quality,
        "bits_per_byte_before": before,
    }


class _Named(nn.Module):
    """Takes `input_ids` and leaves out what an exported file does not take."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        return self.module(input_ids=input_ids)


def _documents(trained: LanguageRun) -> list[str]:
    data = trained.recipe.data
    if data.evaluate is None:
        return []
    return held_out_documents(text_source(data.evaluate, held_out=True), data.evaluate_bytes)


def _print(done: Exported, before: float | None) -> None:
    console = Console()
    console.print(f"{done.path}: {done.format}, {done.bytes:,} bytes", highlight=False)
    console.print(f"largest difference of logits: {done.error:.2g} of the largest", highlight=False)
    if done.quality is not None:
        console.print(f"bits per byte: {before:.4f} before, {done.quality:.4f} as exported", highlight=False)
