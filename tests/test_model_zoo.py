"""The zoo of benchmarks/zoo.py: each model nests, or is refused with a remedy that works; never wrongly in silence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from zoo_cases import Model, examine, remedies
from zoo_models import MODELS

QUICK = ("Starcoder2ForCausalLM", "Mamba2ForCausalLM")


def _parameters() -> list[object]:
    quick = [each for each in MODELS if each.source in ("hand-written", "rankers") and "PEFT" not in each.name]
    quick += [each for each in MODELS if each.name in QUICK]
    return [
        pytest.param(each, id=f"{each.name}, {each.grows}", marks=() if each in quick else pytest.mark.stress)
        for each in MODELS
    ]


@pytest.mark.filterwarnings("ignore:.*(weight_norm|torch.ao|quantiz).*")
@pytest.mark.parametrize("model", _parameters())
def test_a_model_nests_or_is_refused_with_a_remedy_that_works(model: Model) -> None:
    found = examine(model)
    assert not found.wrong
    assert not found.foreign
    assert found.nested if model.mended is None else found.remedy_works, found.refusal
    assert not found.nested or found.warm == "kept" or found.warm.startswith("refused: ")


def test_the_zoo_is_large() -> None:
    assert len(MODELS) >= 60
    assert len({(each.name, each.grows) for each in MODELS}) == len(MODELS)


def test_remedies_are_read_off_a_message() -> None:
    message = (
        "it differs; declare layouts={'a.*': 2} or layouts={'b': matta.Layout.equal(4, axis=1)}, with each of which"
    )
    assert [list(each["layouts"]) for each in remedies(message)] == [["a.*"], ["b"]]
    assert remedies(
        "declare layouts={'a': matta.Layout.concat([(student, ta), ...], axis=1)}, or nest with probe=False"
    ) == [{"probe": False}]
