"""Batches and models as people send them: each gives the value that it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import matta
from matta.objectives import Binary, CausalLM, Classification

VOCABULARY = 11


def _llama(width: int, **options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=width // 2, vocab_size=VOCABULARY, max_position_embeddings=16, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _nested_llamas(**options: Any) -> matta.Nested:
    torch.manual_seed(0)
    return matta.nest(_llama(8, **options), _llama(8, **options))


def _tower(width: int, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, outputs))


def _nested_towers(outputs: int = 3) -> matta.Nested:
    torch.manual_seed(0)
    return matta.nest(_tower(4, outputs), _tower(8, outputs))


def _weights(nested: matta.Nested) -> list[Tensor]:
    return [each.detach().clone() for each in nested.parameters()]


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    nested = _nested_llamas(tie_word_embeddings=True)
    matta.save(nested, tmp_path / "pair")
    (file,) = (tmp_path / "pair").glob("*.safetensors")
    with safe_open(file, "pt") as saved:
        shapes = [tuple(saved.get_slice(name).get_shape()) for name in saved.keys()]  # noqa: SIM118 (no mapping)
    assert shapes.count((VOCABULARY, 8)) == 1
    again = matta.load(tmp_path / "pair", _llama(8, tie_word_embeddings=True), _llama(8, tie_word_embeddings=True))
    assert again.ta.lm_head.weight is again.ta.model.embed_tokens.weight
    extracted = matta.extract(again)
    assert extracted.lm_head.weight is extracted.model.embed_tokens.weight


@pytest.mark.parametrize("optimizer", ["adamw", "shampoo"])
def test_a_batch_without_a_label_that_counts_moves_nothing(optimizer: str) -> None:
    nested = _nested_towers()
    before = _weights(nested)
    adamw = torch.optim.AdamW(nested.parameters(), weight_decay=0.0)
    trained = adamw if optimizer == "adamw" else matta.Shampoo(nested)
    cotrain = matta.CoTraining(nested, Classification())
    ignored = (torch.randn(4, 2), torch.full((4,), -100))
    result = matta.fit(cotrain, [ignored] * 2, trained, steps=2, progress=False)
    assert result.num_skipped == 0
    assert cotrain(ignored).loss == 0
    assert all(map(torch.equal, _weights(nested), before))
    matta.fit(cotrain, [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))], trained, steps=1, progress=False)
    assert all(each.isfinite().all() for each in nested.parameters())


@pytest.mark.parametrize("sizes", [(8, 8, 3), (8, 1, 8), (1, 2, 3)])
def test_a_short_batch_of_a_step_weighs_as_its_labels_do(sizes: tuple[int, ...]) -> None:
    """A step of accumulated batches is one of all their rows, wherever the short or ignored ones are."""
    count = sum(sizes)
    inputs, labels = torch.randn(count, 2), torch.randint(3, (count,))
    labels[1 : count // 2] = -100
    parts = list(zip(inputs.split(list(sizes)), labels.split(list(sizes)), strict=True))
    moved = []
    for data, accumulate in ((parts, len(parts)), ([(inputs, labels)], 1)):
        nested = _nested_towers()
        optimizer = torch.optim.SGD(nested.parameters(), lr=0.5)
        matta.fit(matta.CoTraining(nested, Classification()), data, optimizer, accumulate=accumulate, progress=False)
        moved.append(_weights(nested))
    torch.testing.assert_close(*moved)


def test_a_last_short_batch_is_a_step_and_counts_as_its_rows_in_an_evaluation() -> None:
    inputs, labels = torch.randn(7, 2), torch.randint(3, (7,))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=4)
    nested = _nested_towers()
    found = matta.Evaluation(data=data, objective=Classification())(nested)
    whole = matta.Evaluation(data=[(inputs, labels)], objective=Classification())(nested)
    assert found == pytest.approx(whole)
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.1)
    assert matta.fit(matta.CoTraining(nested, Classification()), data, optimizer, epochs=1, progress=False).steps == 2


def test_padding_on_the_left_is_padding_on_the_right() -> None:
    """With the attention mask, and -100 for padding and for the first token, which nothing stands before."""
    nested = _nested_llamas()
    rows = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2, 6])]

    def batch(*, left: bool) -> dict[str, Tensor]:
        ids, mask, labels = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5), torch.full((2, 5), -100)
        for index, row in enumerate(rows):
            place = slice(5 - len(row), 5) if left else slice(len(row))
            ids[index, place], mask[index, place], labels[index, place] = (
                row,
                1,
                row.clone().index_fill(0, torch.tensor([0]), -100),
            )
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def gradients(batches: list[Any]) -> list[Tensor]:
        nested.zero_grad()
        cotrain = matta.CoTraining(nested, CausalLM())
        count = cotrain.num_labels(batches)
        for each in batches:
            cotrain(each, num_labels=count).loss.backward()
        return [each.grad for each in nested.parameters()]  # type: ignore[misc]

    alone = gradients([{"input_ids": row.unsqueeze(0), "labels": row.unsqueeze(0)} for row in rows])
    for left in (False, True):
        torch.testing.assert_close(gradients([batch(left=left)]), alone, rtol=1e-4, atol=1e-6)


def test_left_padding_has_the_loss_of_transformers() -> None:
    nested = _nested_llamas()
    batch = {
        "input_ids": torch.tensor([[0, 0, 3, 1], [5, 1, 2, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 3, 1], [5, 1, 2, 6]]),
    }
    torch.testing.assert_close(matta.CoTraining(nested, CausalLM())(batch).ta_loss, nested.ta(**batch).loss)


def test_weights_in_bfloat16_and_a_head_in_float32() -> None:
    class Mixed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(2, width).bfloat16(), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.bfloat16()).relu().float())

    torch.manual_seed(0)
    nested = matta.nest(Mixed(4), Mixed(8), example=(torch.randn(4, 2), None))
    data = [(torch.randn(4, 2), torch.tensor([0, 2, -100, 1]))] * 2
    for optimizer in (matta.Shampoo(nested, lr=0.01), torch.optim.AdamW(nested.parameters(), lr=0.01)):
        for fused in (False, True):
            cotrain = matta.CoTraining(nested, Classification(fused=fused))
            result = matta.fit(cotrain, data, optimizer, steps=2, clip_norm=1.0, progress=False)
            assert result.num_skipped == 0
            assert cotrain(data[0]).loss.dtype == torch.float32
    assert (nested.ta.body.weight.dtype, nested.ta.head.weight.dtype) == (torch.bfloat16, torch.float32)
    extracted = matta.extract(nested).eval()
    assert torch.equal(extracted(data[0][0]), nested.student.eval()(data[0][0]))


def test_a_forward_that_takes_keywords_alone(tmp_path: Path) -> None:
    class Keywords(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.tower = _tower(width, 1)

        def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.tower(x) * scale

    batch = {"x": torch.randn(4, 2), "labels": torch.tensor([0.0, 1, 1, 0])}
    nested = matta.nest(Keywords(4), Keywords(8), example=batch, warm_start=True)
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.1)
    matta.fit(
        matta.CoTraining(nested, Binary()), [batch] * 2, optimizer, steps=2, run=tmp_path / "run", tensorboard=False
    )
    module = matta.extract(nested, matta.wide(nested)).eval()
    assert torch.equal(module(x=batch["x"]), nested.ta.eval()(x=batch["x"]))
    matta.Evaluation(data=[batch], objective=Binary())(nested)


ENCODERS = {"tokens": transformers.BertForTokenClassification, "masked": transformers.BertForMaskedLM}


@pytest.mark.parametrize("kind", ENCODERS)
def test_tokens_are_classes_of_positions(kind: str) -> None:
    """Tagging and masked language models: `Classification` has the loss of Transformers, with nothing shifted."""

    def make(inner: int) -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=inner,
            num_labels=4, max_position_embeddings=8,
        )  # fmt: skip
        return ENCODERS[kind](config)

    torch.manual_seed(0)
    nested = matta.nest(make(8), make(16)).eval()
    labels = torch.tensor([[1, -100, 3, 0, -100], [-100, 2, -100, -100, -100]])
    batch = {"input_ids": torch.randint(VOCABULARY, (2, 5)), "labels": labels}
    out = matta.CoTraining(nested, Classification()).eval()(batch)
    torch.testing.assert_close(out.ta_loss, nested.ta(**batch).loss)
    torch.testing.assert_close(out.student_loss, nested.student(**batch).loss)


def test_a_decoder_with_shifted_inputs_has_the_loss_of_transformers() -> None:
    """Sequence to sequence: `Classification` against the labels, from which the decoder's inputs were made."""

    def make(inner: int) -> nn.Module:
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=inner, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        return transformers.T5ForConditionalGeneration(config)

    torch.manual_seed(0)
    nested = matta.nest(make(8), make(16)).eval()
    labels = torch.tensor([[4, 2, 7], [5, -100, -100]])
    shifted = nested.ta.prepare_decoder_input_ids_from_labels(labels=labels)
    batch = {"input_ids": torch.randint(VOCABULARY, (2, 4)), "decoder_input_ids": shifted, "labels": labels}
    out = matta.CoTraining(nested, Classification()).eval()(batch)
    torch.testing.assert_close(out.ta_loss, nested.ta(**batch).loss)
    with pytest.raises(
        matta.errors.LabelError, match=r"CausalLM, which shifts the labels, .* shifted already; expected"
    ):
        matta.CoTraining(nested, CausalLM())(batch)
    whole = {**batch, "decoder_input_ids": labels.clamp(min=0)}  # not shifted: CausalLM is right
    out = matta.CoTraining(nested, CausalLM()).eval()(whole)
    expected = nested.ta(**{**whole, "labels": None}).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(out.ta_loss, torch.nn.functional.cross_entropy(expected, labels[:, 1:].flatten()))
