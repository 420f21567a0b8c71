"""A small GPT-2 on bytes in eight sizes, for the study of equal compute: each of three blocks narrow or wide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from matta.nesting.batches import Batch
from matta.nesting.nested import Nested, nest
from matta.objectives import CausalLM
from matta_studies.compute_tasks import PRUNING_EXAMPLES, WIDEST, Task, important
from matta_studies.language import TEXT_FILE, Text, bits_per_byte, build, load_text, read_topics
from matta_studies.language_plan import GptSize
from matta_studies.rankers import WarmStart

CONTEXT: Final = 64


@final
@dataclass(frozen=True, kw_only=True)
class GptWidths:
    """A GPT-2 of three blocks, each with a narrow or a wide FFN."""

    narrow: GptSize
    wide: GptSize


GPT: Final = GptWidths(
    narrow=GptSize(layers=3, width=48, ffn=96, heads=3), wide=GptSize(layers=3, width=48, ffn=384, heads=3)
)


@final
class Topics(Task):
    """The text of the language study, byte by byte."""

    warm_up = 0.1
    pruning_rows = PRUNING_EXAMPLES // CONTEXT

    def __init__(self, text: Text, widths: GptWidths = GPT) -> None:
        self.text, self.gpt = text, widths
        self.objective, self.num_examples = CausalLM(), text.train.numel() // CONTEXT

    def build(self, size: str) -> GPT2LMHeadModel:
        made, wide = (build(each, CONTEXT, 0.08) for each in (self.gpt.narrow, self.gpt.wide))
        for letter, block, other in zip(size, made.transformer.h, wide.transformer.h, strict=True):
            if letter == "w":
                block.mlp = other.mlp
        return wide if size == WIDEST else made

    def nested(self, student: nn.Module, *, ta: nn.Module | None = None, warm_start: WarmStart = False) -> Nested:
        return nest(student, ta or self.build(WIDEST), layouts={"*.c_attn.*": 3}, warm_start=warm_start)

    def batches(self, batch: int, generator: torch.Generator) -> Iterator[Batch]:
        flat, offsets = self.text.train.reshape(-1), torch.arange(CONTEXT)
        while True:
            starts = torch.randint(len(flat) - CONTEXT + 1, (batch, 1), generator=generator)
            ids = flat[starts + offsets]
            yield {"input_ids": ids, "labels": ids}

    def losses(self, module: nn.Module) -> dict[str, float]:
        return {part: bits_per_byte(module, getattr(self.text, part), CONTEXT) for part in ("validation", "test")}

    @torch.no_grad()
    def pruned(self, ta: nn.Module, size: str) -> nn.Module:
        assert isinstance(ta, GPT2LMHeadModel)
        made = self.build(size)
        state: dict[str, Tensor] = ta.state_dict()
        seen: dict[int, Tensor] = {}
        hooks = [
            block.mlp.c_proj.register_forward_pre_hook(lambda _, inputs, index=index: seen.update({index: inputs[0]}))
            for index, block in enumerate(ta.transformer.h)
        ]
        ta(input_ids=self.text.train.reshape(-1, CONTEXT)[: self.pruning_rows])
        for hook in hooks:
            hook.remove()
        for index, (letter, block) in enumerate(zip(size, made.transformer.h, strict=True)):
            if letter == "n":
                at = f"transformer.h.{index}.mlp"
                read = state[f"{at}.c_proj.weight"]  # of (units, outputs)
                kept = important(seen[index].flatten(0, -2), read.T, block.mlp.c_proj.weight.shape[0])
                state[f"{at}.c_proj.weight"] = read[kept]
                state[f"{at}.c_fc.weight"] = state[f"{at}.c_fc.weight"][:, kept]
                state[f"{at}.c_fc.bias"] = state[f"{at}.c_fc.bias"][kept]
        made.load_state_dict(state)
        return made

    def widths(self, size: str) -> str:
        return "FFN " + "-".join(str(self.gpt.wide.ffn if letter == "w" else self.gpt.narrow.ffn) for letter in size)

    def limited(self, num_examples: int) -> Topics:
        rows = -(-num_examples * CONTEXT // self.text.train.shape[1])
        return Topics(replace(self.text, train=self.text.train[:rows]), self.gpt)


def write_topics(folder: Path) -> str:
    """Put the text into a folder; which it is, in a word."""
    text = read_topics()
    (folder / TEXT_FILE).write_bytes(text)
    return f"topics, {len(text)} bytes"


def load_topics(folder: Path) -> Topics:
    """The task of the text in a folder."""
    return Topics(load_text(folder))
