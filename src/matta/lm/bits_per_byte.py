"""How well a language model predicts a text: bits per byte and perplexity, by rolling windows.

Bits per byte do not hang on the tokenizer, so that models with different ones can be compared, as long as no text is
unknown to them; the perplexity of a token does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from matta.errors import RunError
from matta.lm.tokens import TextEncoder, marks_of
from matta.nesting.batches import logits_of
from matta.training.evaluation import evaluating
from matta.training.processes import collected, dealt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BITS_PER_NAT: Final = 1 / math.log(2)


@final
@dataclass(frozen=True, kw_only=True)
class TextScore:
    """What a model makes of a text.

    The units of the standard error are documents, or the windows of a single one.
    """

    bits_per_byte: float
    perplexity: float  # of a token; infinite from 710 nats on
    num_bytes: int  # of the text in UTF-8
    num_tokens: int  # that were predicted
    num_unknown: int  # of them: each stands for any text, so that with many the bits per byte are too few
    standard_error: float | None  # of the bits per byte; None with fewer than two units
    unit_bits: tuple[float, ...] = field(repr=False)
    unit_bytes: tuple[float, ...] = field(repr=False)


class Window(NamedTuple):
    """A piece of a text that the model reads at once."""

    tokens: Tensor  # (inputs + 1,): the model reads all but the last and predicts all but the first
    num_scored: int  # of the predictions these count, the last ones; the others are scored by earlier windows
    unit: int


def bits_per_byte(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    context: int,
    batch: int,
    overlap: int = 1,
    together: bool = False,
) -> TextScore:
    """Bits per byte and perplexity of a text, or of several documents, each scored for itself.

    Every token is predicted exactly once. The first of a document is predicted from what stands before it in training:
    the mark of a beginning, if the tokenizer puts that before each text, or else of an end, as lm-eval does (which
    reads a beginning twice); with a tokenizer that has neither it is not scored, and its bytes count all the same. The
    model stays as it is, its mode included.

    Args:
        model: Gives logits of (batch, tokens, vocabulary), or an object with `.logits`.
        tokenizer: The model's; no special tokens are added, and none are read out of the text.
        text: A text, or documents.
        context: Tokens that the model reads at once.
        batch: Windows at a time.
        overlap: Tokens that a window reads again of what the one before has scored: at least 1. More give each
            token more to go by, and take context / (context − overlap + 1) times as long.
        together: Share the windows among the processes of torch.distributed, which must all call this.

    Raises:
        RunError: an overlap that leaves nothing to score, a context beyond the model's, or no tokens to predict.
    """
    _check(model, context, batch, overlap)
    documents = [text] if isinstance(text, str) else [each for each in text if each]
    encoder, first = TextEncoder(tokenizer), _first_token(tokenizer)
    windows: list[Window] = []
    sizes: list[float] = []
    for document in documents:
        found, edges = _document_windows(encoder, document, first, context, overlap)
        if len(documents) == 1:
            windows, sizes = found, np.diff(edges).tolist()
        else:
            windows += [window._replace(unit=len(sizes)) for window in found]
            sizes.append(float(edges[-1]))
    if not windows:
        raise RunError("the text has no token to predict; expected at least one (two without a mark of a beginning)")
    nats = _nats(model, windows, batch, len(sizes), together=together)
    unknown = getattr(tokenizer, "unk_token_id", None)
    scored = torch.cat([window.tokens[-window.num_scored :] for window in windows])
    return _score(nats, sizes, len(scored), 0 if unknown is None else int((scored == unknown).sum()))


def unknown_note(num_unknown: int, num_tokens: int) -> str | None:
    """What to say of a text with tokens that stand for any text; None: it has none.

    Example:
        >>> unknown_note(0, 4) is None, unknown_note(1, 4).partition(":")[0]
        (True, '1 of 4 tokens of the text are unknown to the tokenizer')
    """
    if not num_unknown:
        return None
    return (
        f"{num_unknown:,} of {num_tokens:,} tokens of the text are unknown to the tokenizer: its bits per byte are too "
        f"low, and compare with no other tokenizer"
    )


def change(score: TextScore, baseline: TextScore) -> tuple[float, float | None]:
    """The difference of two models' bits per byte on one text, and its standard error by paired units.

    Much smaller than the errors of the two, since a unit that is hard for one model is hard for the other. Without
    paired units (another text, or windows cut otherwise by another tokenizer) the errors are taken as independent.
    """
    difference = score.bits_per_byte - baseline.bits_per_byte
    if score.unit_bytes == baseline.unit_bytes:
        bits = [a - b for a, b in zip(score.unit_bits, baseline.unit_bits, strict=True)]
        return difference, ratio_error(bits, score.unit_bytes)
    if score.standard_error is None or baseline.standard_error is None:
        return difference, None
    return difference, math.hypot(score.standard_error, baseline.standard_error)


def ratio_error(values: Sequence[float], sizes: Sequence[float]) -> float | None:
    """Standard error of sum(values) / sum(sizes) over independent units (the delta method).

    Example:
        >>> ratio_error([1.0, 0.0, 1.0, 0.0], [1, 1, 1, 1])  # of a mean: √(0.25 · 4/3 / 4)
        0.28867513459481287
        >>> ratio_error([1.0], [1]) is None
        True
    """
    if len(values) < 2:
        return None
    rate = math.fsum(values) / math.fsum(sizes)
    squares = math.fsum((value - rate * size) ** 2 for value, size in zip(values, sizes, strict=True))
    return math.sqrt(squares * len(values) / (len(values) - 1)) / math.fsum(sizes)


def rolling_windows(tokens: Sequence[int], context: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """(first, end, scored): a window reads tokens first … end−2 and predicts up to end−1, of which `scored` count.

    Together they predict every token but the first exactly once; all windows but the only one are full, so the last
    one reads more again than `overlap`.

    Example:
        >>> list(rolling_windows(range(8), context=3, overlap=1))
        [(0, 4, 3), (3, 7, 3), (4, 8, 1)]
        >>> list(rolling_windows(range(8), context=3, overlap=3))
        [(0, 4, 3), (1, 5, 1), (2, 6, 1), (3, 7, 1), (4, 8, 1)]
    """
    end = min(context + 1, len(tokens))
    if end > 1:
        yield 0, end, end - 1
    while end < len(tokens):
        scored = min(context - overlap + 1, len(tokens) - end)
        end += scored
        yield end - context - 1, end, scored


def _check(model: nn.Module, context: int, batch: int, overlap: int) -> None:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if batch < 1 or not 1 <= overlap <= context:
        raise RunError(
            f"context={context}, batch={batch}, overlap={overlap}: expected a batch of at least 1 and an overlap from "
            f"1 to the context"
        )
    if limit is not None and context > limit:
        raise RunError(f"context={context} is beyond the model's {limit} positions; expected at most these")


def _first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the first token of a document is predicted from, one token or none: what stands before it in training."""
    first = tokenizer.bos_token_id if tokenizer.eos_token_id is None else marks_of(tokenizer).before_text
    return [] if first is None else [first]


def _document_windows(
    encoder: TextEncoder, document: str, prefix: list[int], context: int, overlap: int
) -> tuple[list[Window], np.ndarray[Any, Any]]:
    """The windows of a document, a unit each, and the bytes at which their scored parts begin, and the last ends."""
    ids, first_characters = encoder.with_starts(document)
    tokens = prefix + ids.tolist()
    held = torch.tensor(tokens, dtype=torch.int64)
    spans = list(rolling_windows(tokens, context, overlap))
    windows = [Window(held[start:end], scored, unit) for unit, (start, end, scored) in enumerate(spans)]
    num_bytes = len(document.encode())
    starts = np.cumsum([0, *(scored for _, _, scored in spans[:-1])]) + (1 - len(prefix))
    if not spans or first_characters is None:  # the bytes are then spread evenly over the tokens
        edges = starts * (num_bytes / max(1, len(tokens) - len(prefix)))
    else:
        edges = _bytes_before(document)[first_characters[starts]]
    edges[0] = 0
    return windows, np.append(edges, num_bytes)


def _bytes_before(text: str) -> np.ndarray[Any, Any]:
    """How many bytes of UTF-8 stand before each character, and in all."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    lengths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(lengths)])


def _nats(
    model: nn.Module, windows: Sequence[Window], batch: int, num_units: int, *, together: bool
) -> np.ndarray[Any, Any]:
    """The nats of each unit, in float64."""
    nats = np.zeros(num_units)
    held = (each for each in chain(model.parameters(), model.buffers()) if not each.is_meta)  # some may be sharded
    device = next(held, torch.empty(0)).device
    groups = [windows[at : at + batch] for at in range(0, len(windows), batch)]
    found: list[list[float]] = []
    with evaluating(model):
        for group, counts in dealt(groups, together=together):
            logits = _logits(model, [window.tokens[:-1] for window in group], device)
            scored = [_nats_of(row, window) for row, window in zip(logits, group, strict=True)]
            found += [scored] if counts else []
    for group, scored in zip(groups, collected(found, together=together), strict=True):
        for window, value in zip(group, scored, strict=True):
            nats[window.unit] += value
    return nats


def _nats_of(logits: Tensor, window: Window) -> float:
    """The nats of the predictions of a window that count."""
    targets, end = window.tokens[-window.num_scored :].to(logits.device), len(window.tokens) - 1
    losses = cross_entropy(logits[end - window.num_scored : end].float(), targets, reduction="none")
    return float(losses.double().sum())


def _logits(model: nn.Module, inputs: Sequence[Tensor], device: torch.device) -> Tensor:
    """(windows, tokens, vocabulary); shorter windows are filled up on the right, where nothing reads."""
    lengths = torch.tensor([len(each) for each in inputs])
    tokens = nn.utils.rnn.pad_sequence(list(inputs), batch_first=True).to(device)
    arguments: dict[str, Any] = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    if lengths.min() < lengths.max() and _takes_mask(model):
        arguments["attention_mask"] = (torch.arange(tokens.shape[1]) < lengths[:, None]).long().to(device)
    return logits_of(model(input_ids=tokens, **arguments))


def _takes_mask(model: nn.Module) -> bool:
    """Whether its forward has an argument for it; one that has none reads from left to right all the same."""
    arguments = inspect.signature(model.forward).parameters.values()
    return any(each.name == "attention_mask" or each.kind is each.VAR_KEYWORD for each in arguments)


def _score(nats: np.ndarray[Any, Any], sizes: Sequence[float], num_tokens: int, num_unknown: int) -> TextScore:
    bits = [float(each) * BITS_PER_NAT for each in nats]
    return TextScore(
        bits_per_byte=math.fsum(bits) / math.fsum(sizes),
        perplexity=_exponential(math.fsum(nats) / num_tokens),
        num_bytes=round(math.fsum(sizes)),
        num_tokens=num_tokens,
        num_unknown=num_unknown,
        standard_error=ratio_error(bits, sizes),
        unit_bits=tuple(bits),
        unit_bytes=tuple(sizes),
    )


def _exponential(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:  # from 710 on: a model that has diverged
        return math.inf
