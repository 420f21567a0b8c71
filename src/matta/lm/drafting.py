"""The Student drafts and the TA verifies: Transformers' assisted generation with two models from one set of weights.

Text is the TA's own: greedily token for token, sampled from the same distribution (Leviathan et al., "Fast Inference
from Transformers via Speculative Decoding", ICML 2023).
"""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from matta.errors import RunError
from matta.nesting.nested import Nested
from matta.sizes.extraction import share
from matta.sizes.submodels import SubModel, wide

DRAFT, TA = "draft", "ta"


@final
@dataclass(frozen=True)
class DraftPair:
    """A model and the smaller one that drafts for it: `pair.ta.generate(ids, assistant_model=pair.draft)`."""

    ta: PreTrainedModel
    draft: PreTrainedModel


@final
@dataclass(frozen=True, kw_only=True)
class Drafting:
    """What drafting came to: tokens per second with it and without, of the same prompts in turn.

    `acceptance` is the share of drafted tokens that the TA kept, and `tokens_per_pass` how many tokens came of a
    forward pass of the TA. `is_equal` says whether all texts are those of the TA alone; sampled ones differ by chance.
    """

    tokens: int
    acceptance: float
    tokens_per_pass: float
    tokens_per_s: float
    alone_tokens_per_s: float
    is_equal: bool

    @property
    def speed(self) -> float:
        """Times as fast as the TA alone."""
        return self.tokens_per_s / self.alone_tokens_per_s


def draft_pair(nested: Nested, draft: SubModel | None = None) -> DraftPair:
    """The TA and a sub-model that drafts for it, by default the Student, over one copy of the weights.

    Raises:
        RunError: they are no models of Transformers that generate, or have different vocabularies.
        SubModelError: `draft` does not fit the nesting.

    Example:
        >>> import torch, matta
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> def gpt(layers):
        ...     ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        ...     config = GPT2Config(n_layer=layers, vocab_size=9, n_embd=8, n_head=2, n_positions=32, **ends)
        ...     return GPT2LMHeadModel(config)
        >>> nested = matta.nest(gpt(1), gpt(3), layers={"transformer.h": "first"})
        >>> pair = draft_pair(nested)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> text = pair.ta.generate(ids, assistant_model=pair.draft, max_new_tokens=8, do_sample=False)
        >>> bool((text == pair.ta.generate(ids, max_new_tokens=8, do_sample=False)).all())
        True
    """
    models = share(nested, {DRAFT: draft, TA: wide(nested)})
    for name, model in models.items():
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            raise RunError(
                f"the {name} model is of {type(model).__name__}, which does not generate; expected a decoder of "
                f"Transformers, such as GPT2LMHeadModel"
            )
    ta, small = models[TA], models[DRAFT]
    assert isinstance(ta, PreTrainedModel) and isinstance(small, PreTrainedModel)
    if ta.config.vocab_size != small.config.vocab_size:
        raise RunError(
            f"the draft model has {small.config.vocab_size} tokens and the TA {ta.config.vocab_size}; expected the same"
        )
    return DraftPair(ta, small)


def measure_drafting(
    pair: DraftPair,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int = 64,
    sample: bool = False,
    seed: int = 0,
    **options: Any,
) -> Drafting:
    """Generate with the draft model and without, prompt by prompt in turn.

    Args:
        pair: From `draft_pair`.
        prompts: Ids of tokens, of shape (tokens,) each.
        new_tokens: Of each text.
        sample: Whether tokens are sampled; greedy otherwise.
        seed: Of the sampling.
        options: Further ones of Transformers' `generate`, such as `num_assistant_tokens`.

    Raises:
        RunError: no prompts, or no tokens asked for.
    """
    if not prompts or new_tokens < 1:
        raise RunError(f"received {len(prompts)} prompts and new_tokens={new_tokens}; expected one or more of both")
    kept = {"max_new_tokens": new_tokens, "do_sample": sample, **options}
    _generate(pair.ta, prompts[0], seed, kept)  # to warm up
    alone = _Generated()
    drafted = _Generated()
    is_equal = True
    for prompt in prompts:
        text = alone.add(pair, prompt, seed, kept)
        is_equal = (
            torch.equal(text, drafted.add(pair, prompt, seed, {**kept, "assistant_model": pair.draft})) and is_equal
        )
    return Drafting(
        tokens=drafted.tokens,
        acceptance=(drafted.tokens - drafted.ta_passes) / max(drafted.draft_passes, 1),
        tokens_per_pass=drafted.tokens / drafted.ta_passes,
        tokens_per_s=drafted.tokens / drafted.seconds,
        alone_tokens_per_s=alone.tokens / alone.seconds,
        is_equal=is_equal,
    )


@final
@dataclass
class _Generated:
    """Texts so far: their tokens, seconds, and forward passes."""

    tokens: int = 0
    seconds: float = 0.0
    ta_passes: int = 0
    draft_passes: int = 0

    def add(self, pair: DraftPair, prompt: Tensor, seed: int, options: Mapping[str, Any]) -> Tensor:
        """Generate one more."""
        start = time.perf_counter()
        with _counted(pair.ta) as ta_passes, _counted(pair.draft) as draft_passes:
            text = _generate(pair.ta, prompt, seed, options)
        self.seconds += time.perf_counter() - start
        self.tokens += text.shape[1] - len(prompt)
        self.ta_passes += len(ta_passes)
        self.draft_passes += len(draft_passes)
        return text


def _generate(model: PreTrainedModel, prompt: Tensor, seed: int, options: Mapping[str, Any]) -> Tensor:
    torch.manual_seed(seed)
    ids = prompt[None].to(model.device)
    text: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return text


@contextmanager
def _counted(module: nn.Module) -> Iterator[list[None]]:
    """A list that grows by one with each forward pass."""
    passes: list[None] = []
    hook = module.register_forward_pre_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        hook.remove()
