import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import matta
from matta.errors import RunError
from matta.lm.drafting import draft_pair, measure_drafting

PROMPTS = [torch.randint(1, 50, (length,), generator=torch.Generator().manual_seed(length)) for length in (4, 9)]


def gpt(layers: int, inner: int = 32, vocabulary: int = 50) -> GPT2LMHeadModel:
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"n_embd": 16, "n_head": 2, "n_inner": inner, "n_positions": 64, "vocab_size": vocabulary}
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, initializer_range=0.3, **sizes, **ends))


def nested() -> matta.Nested:
    torch.manual_seed(0)
    return matta.nest(gpt(1), gpt(3, 64), layers={"transformer.h": "first"}, layouts={"*.c_attn.*": 3})


def test_greedy_text_is_that_of_the_ta_token_for_token() -> None:
    pair = draft_pair(nested())
    found = measure_drafting(pair, PROMPTS, new_tokens=24)
    assert found.is_equal
    assert found.tokens > 0
    assert 0 <= found.acceptance <= 1
    assert found.tokens_per_pass >= 1


def test_a_draft_model_as_good_as_the_ta_has_all_its_tokens_kept() -> None:
    pair = draft_pair(nested(), matta.SubModel(default="wide"))
    options = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant"}
    pair.draft.generation_config.assistant_confidence_threshold = 0.0
    found = measure_drafting(pair, PROMPTS[:1], new_tokens=20, **options)
    assert found.is_equal
    assert found.acceptance == 1.0
    assert found.tokens_per_pass > 3


def test_both_models_show_the_same_weights() -> None:
    made = nested()
    pair = draft_pair(made)
    own = {each.data_ptr() for each in made.ta.parameters()}
    assert {each.data_ptr() for each in pair.ta.parameters()} == own
    assert {each.data_ptr() for each in pair.draft.parameters()} <= own


def test_sampled_text_has_tokens_of_the_vocabulary_and_the_seed_repeats_it() -> None:
    pair = draft_pair(nested())
    first, second = (measure_drafting(pair, PROMPTS, new_tokens=12, sample=True, seed=3) for _ in range(2))
    assert (first.tokens, first.acceptance) == (second.tokens, second.acceptance)


def test_what_does_not_generate_is_refused() -> None:
    with pytest.raises(RunError, match="of Linear, which does not generate"):
        draft_pair(matta.nest(nn.Linear(3, 1), nn.Linear(3, 1)))


@pytest.mark.parametrize(("prompts", "tokens"), [([], 4), (PROMPTS, 0)])
def test_nothing_to_generate_is_refused(prompts: list[torch.Tensor], tokens: int) -> None:
    with pytest.raises(RunError, match="expected one or more of both"):
        measure_drafting(draft_pair(nested()), prompts, new_tokens=tokens)
