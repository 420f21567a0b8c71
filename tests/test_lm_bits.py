"""Bits per byte: every token predicted once, as a plain loop and lm-eval count them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from matta.errors import RunError
from matta.lm.bits_per_byte import bits_per_byte, change, rolling_windows

transformers = pytest.importorskip("transformers")

from matta.lm.documents import Document  # noqa: E402
from matta.lm.tokens import TextEncoder, marks_of, token_blocks  # noqa: E402

TEXT = "Wide above, narrow below: ein größeres Modell ⊃ das kleine 🪆. " * 4


def byte_tokenizer(*, marks: bool = True) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|endoftext|>"} if marks else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def tiny_gpt2(seed: int = 0, positions: int = 32) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=257, n_positions=positions, initializer_range=0.5,
        bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def nats_one_by_one(model: Any, tokens: list[int], context: int, overlap: int) -> list[float]:
    """A plain reference: each prediction by a pass of its own over what its window holds before it."""
    found: list[float] = []
    predicted = 1
    while predicted < len(tokens):
        take = context if predicted == 1 else context - overlap + 1
        end = min(predicted + take, len(tokens))
        start = max(0, end - context - 1)
        for at in range(predicted, end):
            with torch.no_grad():
                logits = model(torch.tensor([tokens[start:at]])).logits[0, -1]
            found.append(-torch.log_softmax(logits.float(), -1)[tokens[at]].item())
        predicted = end
    return found


@pytest.mark.parametrize(("context", "overlap", "batch"), [(32, 1, 3), (16, 8, 4), (7, 7, 64), (32, 32, 5)])
@pytest.mark.parametrize("marks", [True, False])
def test_bits_are_those_of_predictions_made_one_by_one(context: int, overlap: int, batch: int, marks: bool) -> None:
    model, tokenizer = tiny_gpt2().eval(), byte_tokenizer(marks=marks)
    tokens = [256] * marks + tokenizer(TEXT)["input_ids"]
    expected = nats_one_by_one(model, tokens, context, overlap)
    score = bits_per_byte(model, tokenizer, TEXT, context=context, batch=batch, overlap=overlap)
    assert score.num_bytes == len(TEXT.encode())
    assert score.num_tokens == len(expected) == len(TEXT.encode()) - (not marks)
    assert score.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / len(TEXT.encode()), rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-6)


def test_bits_equal_lm_evals_rolling_likelihood() -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model, tokenizer = tiny_gpt2().float(), byte_tokenizer()
    documents = [TEXT, TEXT[:5], TEXT[20:]]
    judge = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    requests = [Instance("loglikelihood_rolling", {}, (each,), 0) for each in documents]
    nats = -sum(judge.loglikelihood_rolling(requests, disable_tqdm=True))
    score = bits_per_byte(model, tokenizer, documents, context=32, batch=2)
    num_bytes = sum(len(each.encode()) for each in documents)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


def test_the_first_token_follows_what_stands_before_it_in_training() -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    model = Uniform(300)
    bits_per_byte(model, tokenizer, "ab", context=8, batch=1)
    puts = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = puts
    bits_per_byte(model, tokenizer, "ab", context=8, batch=1)
    assert [[first for first, _ in model.read], len(tokenizer)] == [[256, 257], 258]


@pytest.mark.parametrize("mark", [None, "</s>"])
def test_a_tokenizer_written_in_python_counts_all_bytes(mark: str | None) -> None:
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    tokenizer.eos_token = mark
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(400, 400))
    model.forward = lambda input_ids: model[0](input_ids)  # type: ignore[method-assign]
    score = bits_per_byte(model, tokenizer, "größer", context=3, batch=4)
    assert (score.num_bytes, score.num_tokens) == (8, 7 if mark is None else 8)


@pytest.mark.parametrize("length", range(30))
@pytest.mark.parametrize(("context", "overlap"), [(1, 1), (4, 1), (4, 2), (4, 4), (9, 3)])
def test_windows_predict_all_but_the_first_once(length: int, context: int, overlap: int) -> None:
    spans = list(rolling_windows(range(length), context, overlap))
    assert [at for _, end, scored in spans for at in range(end - scored, end)] == list(range(1, length))
    assert all(1 <= scored < end - start <= context + 1 for start, end, scored in spans)
    assert all(end - start - scored >= overlap for start, end, scored in spans[1:])


def test_a_model_of_even_odds_has_the_bits_of_its_vocabulary() -> None:
    class Even(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return torch.zeros(*input_ids.shape, 256)

    plain = TEXT.encode("ascii", "replace").decode()
    score = bits_per_byte(Even(), byte_tokenizer(), plain, context=10, batch=2)
    assert score.bits_per_byte == pytest.approx(8)
    assert score.perplexity == pytest.approx(256)
    assert score.standard_error == pytest.approx(0, abs=1e-6)
    assert score.unit_bytes == (10,) * (len(plain) // 10) + (len(plain) % 10,) * (len(plain) % 10 > 0)


def test_a_model_that_has_diverged_has_bits_and_no_finite_perplexity() -> None:
    class Diverged(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0] * 256 + [1e4]).expand(*input_ids.shape, 257)

    score = bits_per_byte(Diverged(), byte_tokenizer(), "short", context=16, batch=8)
    assert score.perplexity == math.inf
    assert score.bits_per_byte == pytest.approx(1e4 / math.log(2))


def test_a_model_without_a_mask_is_scored_on_texts_of_several_lengths() -> None:
    class Bigram(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(257, 257)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.table(input_ids)

    torch.manual_seed(0)
    model, documents = Bigram(), [TEXT[:9], TEXT]
    together, *apart = (
        bits_per_byte(model, byte_tokenizer(), text, context=16, batch=8) for text in (documents, *documents)
    )
    expected = [each.bits_per_byte * each.num_bytes for each in apart]
    assert together.unit_bits == pytest.approx(expected, rel=1e-6)


def test_batches_and_order_of_documents_do_not_matter() -> None:
    model, tokenizer = tiny_gpt2(), byte_tokenizer()
    documents = [TEXT[:9], TEXT, TEXT[30:77], ""]
    one = bits_per_byte(model, tokenizer, documents, context=16, batch=1)
    many = bits_per_byte(model, tokenizer, documents[::-1], context=16, batch=7)
    assert many.bits_per_byte == pytest.approx(one.bits_per_byte, rel=1e-6)
    assert many.unit_bits[::-1] == pytest.approx(one.unit_bits, rel=1e-6)
    assert many.standard_error == pytest.approx(one.standard_error, rel=1e-6)


def test_the_standard_error_is_that_of_documents_drawn_again() -> None:
    model, tokenizer = tiny_gpt2(), byte_tokenizer()
    documents = [TEXT[start : start + 5 + start % 23] for start in range(0, 200, 2)]
    score = bits_per_byte(model, tokenizer, documents, context=32, batch=16)
    bits, sizes = torch.tensor(score.unit_bits), torch.tensor(score.unit_bytes)
    drawn = torch.randint(len(documents), (4000, len(documents)), generator=torch.Generator().manual_seed(0))
    spread = (bits[drawn].sum(1) / sizes[drawn].sum(1)).std().item()
    assert score.standard_error == pytest.approx(spread, rel=0.05)


def test_a_change_is_judged_by_pairs() -> None:
    tokenizer = byte_tokenizer()
    first, second = (bits_per_byte(tiny_gpt2(seed), tokenizer, TEXT, context=16, batch=8) for seed in (0, 1))
    difference, error = change(second, first)
    assert difference == pytest.approx(second.bits_per_byte - first.bits_per_byte)
    rates = [(b - a, size) for a, b, size in zip(first.unit_bits, second.unit_bits, first.unit_bytes, strict=True)]
    squares = sum((bits - difference * size) ** 2 for bits, size in rates)
    assert error == pytest.approx(math.sqrt(squares * len(rates) / (len(rates) - 1)) / first.num_bytes)
    assert change(first, first) == (0, 0)
    other = bits_per_byte(tiny_gpt2(1), tokenizer, TEXT, context=8, batch=8)
    assert change(other, first)[1] == pytest.approx(math.hypot(other.standard_error, first.standard_error))


def test_one_unit_has_no_standard_error() -> None:
    score = bits_per_byte(tiny_gpt2(), byte_tokenizer(), "short", context=16, batch=8)
    assert score.standard_error is None
    assert change(score, score) == (0, None)


def test_the_model_keeps_its_modes() -> None:
    model = tiny_gpt2().train()
    model.transformer.h[0].eval()
    score = bits_per_byte(model, byte_tokenizer(), TEXT, context=16, batch=8)
    assert model.training and not model.transformer.h[0].training
    assert score == bits_per_byte(model.eval(), byte_tokenizer(), TEXT, context=16, batch=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 33, "batch": 1}, "context=33 is beyond the model's 32 positions; expected at most these"),
        ({"context": 8, "batch": 0}, "expected a batch of at least 1"),
        ({"context": 8, "batch": 1, "overlap": 9}, "an overlap from 1 to the context"),
        ({"context": 8, "batch": 1, "overlap": 0}, "an overlap from 1 to the context"),
        ({"context": 8, "batch": 1, "text": ""}, "has no token to predict"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        bits_per_byte(tiny_gpt2(), byte_tokenizer(), **{"text": TEXT, **arguments})


NAMED = "A text may say </s> or <s>, and <unk> too: </s></s> größer </s> it goes on."


def _trained(kind: str) -> Any:
    """A tokenizer whose special tokens the text says by name."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if kind == "written in Python":
        return transformers.ByT5Tokenizer(extra_ids=0)
    special = ["<unk>", "<s>", "</s>"]
    made: dict[str, tuple[Any, Any, Any]] = {
        "byte-level BPE": (
            models.BPE(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        ),
        "unigram": (
            models.Unigram(),
            pre_tokenizers.Metaspace(),
            trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False),
        ),
        "words": (
            models.WordLevel(unk_token="<unk>"),  # type: ignore[call-arg]
            pre_tokenizers.Whitespace(),
            trainers.WordLevelTrainer(special_tokens=special, show_progress=False),
        ),
    }  # fmt: skip
    model, cut, trainer = made[kind]
    inner = Tokenizer(model)
    inner.pre_tokenizer = cut
    inner.train_from_iterator([TEXT, NAMED.replace("</s>", "the end").replace("<s>", "a start")] * 4, trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


class Uniform(torch.nn.Module):
    """Gives every token the same chance, and keeps what it has read."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.read = size, list[list[int]]()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.read += input_ids.tolist()
        return torch.zeros(*input_ids.shape, self.size)


@pytest.mark.parametrize("kind", ["byte-level BPE", "unigram", "words", "written in Python"])
def test_the_name_of_a_special_token_is_text_as_in_training(kind: str) -> None:
    tokenizer = _trained(kind)
    (block,) = token_blocks([Document(NAMED, ends=False)], TextEncoder(tokenizer), marks_of(tokenizer))
    model = Uniform(len(tokenizer))
    score = bits_per_byte(model, tokenizer, NAMED, context=300, batch=1)
    assert model.read == [[tokenizer.eos_token_id, *block.tokens[:-1].tolist()]]
    assert kind == "unigram" or tokenizer.eos_token_id not in block.tokens  # a unigram model has it as a piece, too
    assert (score.num_tokens, score.num_bytes) == (len(block.tokens), len(NAMED.encode()))
    assert score.bits_per_byte == pytest.approx(score.num_tokens * math.log2(model.size) / score.num_bytes)
    unknown = block.tokens.tolist().count(tokenizer.unk_token_id)
    assert (score.num_unknown, unknown > 0) == (unknown, kind in ("unigram", "words"))
    cut = bits_per_byte(model, tokenizer, NAMED, context=5, batch=3)
    assert (cut.num_tokens, math.fsum(cut.unit_bytes)) == (score.num_tokens, score.num_bytes)
