"""What holds of every nesting, over the whole zoo."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import matta
from architectures import Transformer
from cases import IGNORED, Batch, Case, copy_back, logits, places, plain_student
from matta.errors import SubModelError
from matta.sizes.submodels import layer_names, live, random_sub_model
from zoo import CASES, case

WEIGHTS = matta.Weights(student=0.7, ta=1.3, distill=0.3)
RATE = 0.1
OBJECTIVES = {
    "binary": matta.objectives.Binary,
    "classes": matta.objectives.Classification,
    "tokens": matta.objectives.CausalLM,
}

UNMIXABLE = {"llama_gqa-head_dim": "the rotary table of the model is for one head_dim in all blocks"}

over_the_zoo = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
over_exchangeable_blocks = pytest.mark.parametrize(
    "case", [case for case in CASES if case.mixed], ids=lambda case: case.id
)


# ------------------------------------------------------------------------ Algorithm 2


@pytest.mark.parametrize("outputs", [(2, 2), (2, 5)], ids=["same_outputs", "more_outputs"])
@pytest.mark.parametrize("extra", [0, 3], ids=["one_input", "two_inputs"])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_layer_computes_algorithm_2(outputs: tuple[int, int], extra: int, bias: bool) -> None:
    torch.manual_seed(0)
    student, ta = (
        nn.Linear(4 + more, out, bias=bias, dtype=torch.float64) for more, out in zip((0, extra), outputs, strict=True)
    )
    student_input, ta_input = torch.randn(6, 4).double(), torch.randn(6, 4 + extra).double()
    w_student, w_1, w_2 = _blocks_of_algorithm_2(ta.weight.detach().T, 4, outputs[0])
    shift = ta.bias.detach() if bias else torch.zeros(outputs[1], dtype=torch.float64)

    nested = matta.nest(student, ta, layouts={"weight": 1})

    torch.testing.assert_close(nested.student(student_input), student_input @ w_student + shift[: outputs[0]])
    o_1 = ta_input[:, :4] @ w_student + ta_input[:, 4:] @ w_1
    torch.testing.assert_close(nested.ta(ta_input), torch.cat([o_1, ta_input @ w_2], dim=-1) + shift)


def _blocks_of_algorithm_2(weight: Tensor, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    return weight[:inputs, :outputs], weight[inputs:, :outputs], weight[:, outputs:]


@over_the_zoo
def test_every_projection_computes_algorithm_2(case: Case) -> None:
    nested = case.nest()
    where = places(case, case.build()[0], nested.ta)
    weights = dict(nested.ta.named_parameters(remove_duplicate=False))
    live = dict(nested.student.named_parameters())
    matrices = {name: place for name, place in where.items() if len(place.axes) == 2}
    assert matrices
    for name, (ta_name, (rows, columns)) in matrices.items():
        w_ta, w_student = weights[ta_name], live[name]
        x = torch.randn(2, w_ta.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        more_rows = [i for i in range(w_ta.shape[0]) if i not in rows]
        more_columns = [i for i in range(w_ta.shape[1]) if i not in columns]
        product = x @ w_ta.T
        o_1 = x[:, columns] @ w_student.T + x[:, more_columns] @ w_ta[rows][:, more_columns].T
        torch.testing.assert_close(product[:, rows], o_1, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(product[:, more_rows], x @ w_ta[more_rows].T)


# ------------------------------------------------------------------------ the Student


@over_the_zoo
def test_student_is_a_plain_module_that_holds_its_part_of_the_ta(case: Case) -> None:
    student, ta = case.build()
    plain, batch = plain_student(case, student, ta), case.batch()
    nested = case.nested(student, ta)
    for module in (nested.student, plain):
        module.eval()
    assert torch.equal(logits(nested.student, batch), logits(plain, batch))
    for module in (nested.student, plain):
        module.train()
    torch.testing.assert_close(logits(nested.student, batch), logits(plain, batch), rtol=1e-10, atol=1e-12)
    _assert_same_weights(nested.student, plain, exactly=True)


@over_the_zoo
def test_student_shows_the_present_weights_of_the_ta(case: Case) -> None:
    student, ta = case.build()
    nested, batch = case.nested(student, ta), case.batch()
    with torch.no_grad():
        for parameter in nested.ta.parameters():
            parameter.mul_(0.5).add_(0.1)
    plain = plain_student(case, student, nested.ta)
    assert torch.equal(logits(nested.student.eval(), batch), logits(plain.eval(), batch))


@pytest.mark.parametrize("case", [case for case in CASES if case.width_only], ids=lambda case: case.id)
def test_with_the_rest_zeroed_the_ta_computes_what_the_student_computes(case: Case) -> None:
    student, ta = case.build()
    where = places(case, student, ta)
    nested, batch = case.nested(student, ta), case.batch()
    targets = dict(nested.ta.named_parameters(remove_duplicate=False))
    kept = {id(p): torch.zeros_like(p) for p in nested.ta.parameters()}
    for place in where.values():
        kept[id(targets[place.name])][place.index] = 1.0
    with torch.no_grad():
        for parameter in nested.ta.parameters():
            parameter.mul_(kept[id(parameter)])
    mode = _has_statistics(ta)  # in training mode those of the batch count, in both
    found, expected = (logits(module.train(mode), batch) for module in (nested.ta, nested.student))
    torch.testing.assert_close(found, expected)


@over_the_zoo
def test_the_callers_student_is_unchanged(case: Case) -> None:
    student, ta = case.build()
    before = _anatomy(student)
    state = copy.deepcopy(student.state_dict())
    nested = case.nested(student, ta)
    _cotraining(case, nested)(case.batch()).loss.backward()
    torch.optim.SGD(nested.parameters(), lr=RATE).step()
    assert _anatomy(student) == before
    assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def _anatomy(module: nn.Module) -> list[tuple[str, type, list[str], list[int], int]]:
    return [
        (name, type(part), list(vars(part)), [id(p) for p in part.parameters()], len(part._forward_pre_hooks))
        for name, part in module.named_modules()
    ]


@over_the_zoo
def test_the_optimizer_gets_the_parameters_of_the_ta_and_the_private_ones(case: Case) -> None:
    student, ta = case.build()
    num_private = len(dict(student.named_parameters())) - len(places(case, student, ta))
    nested = case.nested(student, ta)
    found = list(nested.parameters())
    of_the_ta = {id(p) for p in ta.parameters()}
    own = [p for p in found if id(p) not in of_the_ta]
    assert nested.ta is ta
    assert of_the_ta <= {id(p) for p in found}
    assert len(own) == num_private
    assert len(found) == len(of_the_ta) + num_private
    assert bool(own) == bool(case.private)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in found)


# ------------------------------------------------------------------------ gradients and steps


@over_the_zoo
def test_distillation_moves_no_weight_that_only_the_ta_has(case: Case) -> None:
    student, ta = case.build()
    where = places(case, student, ta)
    nested = case.nested(student, ta)
    out = _cotraining(case, nested, matta.Weights(student=0, ta=0, distill=1))(case.batch())
    out.loss.backward()
    shared, ta_only = _split_gradients(nested.ta, where)
    assert ta_only == 0.0
    assert shared > 0.0


@over_the_zoo
def test_the_loss_of_the_ta_moves_all_of_it(case: Case) -> None:
    student, ta = case.build()
    where = places(case, student, ta)
    plain, batch = copy.deepcopy(ta), case.batch()
    nested = case.nested(student, ta)
    _cotraining(case, nested, matta.Weights(student=0, ta=1, distill=0))(batch).loss.backward()
    loss = cross_entropy(case, logits(plain, batch), _labels(batch))
    expected = torch.autograd.grad(loss, list(plain.parameters()), materialize_grads=True)
    for (name, parameter), gradient in zip(nested.ta.named_parameters(), expected, strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}")
    shared, ta_only = _split_gradients(nested.ta, where)
    assert shared > 0.0
    assert ta_only > 0.0


def _split_gradients(ta: nn.Module, where: Mapping[str, Any]) -> tuple[float, float]:
    """The sums of absolute gradients on the Student's part of the TA, and on the rest of it."""
    of_the_student = {id(p): torch.zeros_like(p, dtype=torch.bool) for p in ta.parameters()}
    targets = dict(ta.named_parameters(remove_duplicate=False))
    for place in where.values():
        of_the_student[id(targets[place.name])][place.index] = True
    shared = ta_only = 0.0
    for parameter in ta.parameters():
        if parameter.grad is not None:
            mask = of_the_student[id(parameter)]
            shared += parameter.grad[mask].abs().sum().item()
            ta_only += parameter.grad[~mask].abs().sum().item()
    return shared, ta_only


@over_the_zoo
def test_three_steps_equal_those_of_separate_weights_copied_back(case: Case) -> None:
    student, ta = case.build()
    batches = [case.batch(seed) for seed in range(3)]
    expected_student, expected_ta, losses = _separate_steps(case, student, copy.deepcopy(ta), batches)

    nested = case.nested(student, ta)
    cotrain = _cotraining(case, nested)
    optimizer = torch.optim.SGD(nested.parameters(), lr=RATE)
    for batch, expected in zip(batches, losses, strict=True):
        out = cotrain(batch)
        found = torch.stack([out.student_loss, out.ta_loss, out.distill_loss])
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-10)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()

    _assert_same_weights(nested.ta, expected_ta)
    _assert_same_weights(nested.student, expected_student)
    assert not torch.equal(next(expected_ta.parameters()), next(case.build()[1].parameters()))


@pytest.mark.parametrize("share", ["embeddings", "none", ["blocks.1.*", "head.*"]], ids=str)
def test_three_steps_hold_for_each_way_of_sharing(share: str | list[str]) -> None:
    patterns = ["tokens.*"] if share == "embeddings" else [] if share == "none" else share
    chosen = case("fused_qkv-d_model-depth")
    names = [name for name, _ in chosen.build()[0].named_parameters()]
    private = tuple(name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns))
    student, ta = chosen.build()
    alone = replace(chosen, private=private)
    batches = [chosen.batch(seed) for seed in range(3)]
    expected_student, expected_ta, _ = _separate_steps(alone, student, copy.deepcopy(ta), batches)
    nested = chosen.nested(student, ta, share=share)
    cotrain = _cotraining(chosen, nested)
    optimizer = torch.optim.SGD(nested.parameters(), lr=RATE)
    for batch in batches:
        optimizer.zero_grad()
        cotrain(batch).loss.backward()
        optimizer.step()
    _assert_same_weights(nested.ta, expected_ta)
    _assert_same_weights(nested.student, expected_student)


def test_several_students_add_their_gradients_in_one_ta() -> None:
    chosen = case("transformer-d_model-heads-depth")
    student, ta = chosen.build()
    deeper = replace(chosen, make=lambda: (Transformer(dim=8, width=10, depth=3), student), layers={}, depth={})
    second = deeper.build()[0]
    batch = chosen.batch()
    grads = {name: torch.zeros_like(p) for name, p in ta.named_parameters()}
    for pair, model in ((chosen, student), (deeper, second)):
        plain = plain_student(pair, model, ta)
        losses = _three_losses(pair, logits(plain, batch), logits(ta, batch), _labels(batch))
        mine = _gradients(WEIGHTS.student * losses[0] + WEIGHTS.distill * losses[2], plain)
        for name, place in places(pair, model, ta).items():
            grads[place.name][place.index] += mine[name]
    for name, gradient in _gradients(WEIGHTS.ta * losses[1], ta).items():
        grads[name] += gradient

    nested = matta.nest([student, second], ta, layers={"blocks": "first"})
    _cotraining(chosen, nested)(batch).loss.backward()
    for name, parameter in ta.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=0, atol=1e-10)


def _separate_steps(
    case: Case, student: nn.Module, ta: nn.Module, batches: list[Batch]
) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """Eq. 1-3 on two models with weights of their own; gradients summed by index, weights copied back."""
    where = places(case, student, ta)
    plain = plain_student(case, student, ta).train()
    targets = dict(ta.train().named_parameters(remove_duplicate=False))
    history = []
    for batch in batches:
        losses = _three_losses(case, logits(plain, batch), logits(ta, batch), _labels(batch))
        history.append(torch.stack(losses).detach())
        student_loss, ta_loss, distill_loss = losses
        student_grads = _gradients(WEIGHTS.student * student_loss + WEIGHTS.distill * distill_loss, plain)
        ta_grads = _gradients(WEIGHTS.ta * ta_loss, ta)
        by_identity = {id(p): ta_grads[name] for name, p in ta.named_parameters()}
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if name in where:
                    by_identity[id(targets[where[name].name])][where[name].index] += student_grads[name]
                else:
                    parameter -= RATE * student_grads[name]
            for name, parameter in ta.named_parameters():
                parameter -= RATE * ta_grads[name]
        copy_back(plain, ta, where)
    return plain, ta, history


def _three_losses(case: Case, student: Tensor, ta: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    soft = ta.detach().sigmoid() if case.target == "binary" else ta.detach().softmax(-1)
    return (
        cross_entropy(case, student, labels),
        cross_entropy(case, ta, labels),
        cross_entropy(case, student, soft, kept=labels),
    )


def cross_entropy(case: Case, logits: Tensor, labels: Tensor, kept: Tensor | None = None) -> Tensor:
    """-sum y log p, averaged over examples (tokens: over next tokens that are not ignored)."""
    if case.target == "binary":
        p = logits.sigmoid()
        return -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    if case.target == "tokens":
        next_tokens = (labels if kept is None else kept)[:, 1:]
        mask = next_tokens != IGNORED
        logits = logits[:, :-1][mask]
        labels = next_tokens[mask] if kept is None else labels[:, :-1][mask]
    if not labels.is_floating_point():
        labels = torch.eye(logits.shape[-1], dtype=torch.float64)[labels]
    return -(labels * logits.log_softmax(-1)).sum(-1).mean()


def _gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return {name: gradient.clone() for name, gradient in zip(names, found, strict=True)}


# ------------------------------------------------------------------------ sub-models


@over_the_zoo
def test_the_extracted_student_equals_the_live_one(case: Case) -> None:
    student, ta = case.build()
    nested, batch = case.nested(student, ta), case.batch()
    _cotraining(case, nested)(batch).loss.backward()  # moves running statistics
    torch.optim.SGD(nested.parameters(), lr=RATE).step()
    extracted = matta.extract(nested)
    assert torch.equal(logits(extracted.eval(), batch), logits(nested.student.eval(), batch))
    _assert_is_plain(extracted, student)


@over_the_zoo
def test_the_extracted_wide_model_is_the_ta(case: Case) -> None:
    nested, batch = case.nest(), case.batch()
    spec = matta.wide(nested)
    extracted = matta.extract(nested, spec)
    expected = logits(nested.ta.eval(), batch)
    assert torch.equal(logits(live(nested, spec).eval(), batch), expected)
    assert torch.equal(logits(extracted.eval(), batch), expected)
    _assert_is_plain(extracted, nested.ta)


def _specs(case: Case, nested: matta.Nested) -> dict[str, dict[int, str]]:
    """Choices for the blocks of the TA, by name: mixtures of wide, narrow and skipped ones."""
    last = len(nested.ta.get_submodule(case.mixed or "")) - 1
    narrow = dict.fromkeys(range(last + 1), "narrow")
    return {
        "narrow": narrow,
        "ends_wide": {**narrow, 0: "wide", last: "wide"},
        "last_wide": {**narrow, last: "wide"},
        "first_skipped": {**narrow, last: "wide", 0: "skip"},
    }


@over_exchangeable_blocks
@pytest.mark.parametrize("chosen", ["narrow", "ends_wide", "last_wide", "first_skipped"])
def test_a_mix_is_the_ta_with_some_of_its_blocks_cut_to_the_student(case: Case, chosen: str) -> None:
    student, ta = case.build()
    nested, batch = case.nested(student, ta), case.batch()
    choices = _specs(case, nested)[chosen]
    spec = matta.SubModel({f"{case.mixed}.{index}": choice for index, choice in choices.items()})
    mixed, extracted = live(nested, spec).eval(), matta.extract(nested, spec).eval()
    found = logits(mixed, batch)
    assert torch.equal(logits(extracted, batch), found)
    _assert_is_plain(extracted, None)
    if not _has_statistics(ta):
        expected = logits(_mixed_by_hand(case, student, ta, choices), batch)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def _mixed_by_hand(case: Case, student: nn.Module, ta: nn.Module, choices: dict[int, str]) -> nn.Module:
    assert case.mixed is not None
    where = places(case, student, ta)
    made = copy.deepcopy(ta).eval()
    weights = dict(ta.named_parameters())
    blocks = []
    for index, choice in choices.items():
        block = made.get_submodule(f"{case.mixed}.{index}")
        if choice == "narrow":
            block = copy.deepcopy(student.get_submodule(f"{case.mixed}.0")).eval()
            with torch.no_grad():
                for name, parameter in block.named_parameters():
                    cut = where[f"{case.mixed}.0.{name}"].index
                    parameter.copy_(weights[f"{case.mixed}.{index}.{name}"][cut])
        if choice != "skip":
            blocks.append(block)
    parent, _, leaf = case.mixed.rpartition(".")
    setattr(made.get_submodule(parent), leaf, nn.ModuleList(blocks))
    if hasattr(made, "config"):
        made.config.use_cache = False
    return made


@over_the_zoo
def test_one_wide_layer_is_extracted_as_it_runs_or_refused(case: Case) -> None:
    if case.id in UNMIXABLE:
        pytest.skip(UNMIXABLE[case.id])
    nested, batch = case.nest(), case.batch()
    names = layer_names(nested)
    assert names
    spec = matta.wide_narrow_wide(nested, 1)
    if "hidden" in names and len(names) > 1:
        with pytest.raises(SubModelError, match="hidden width"):
            matta.extract(nested, spec)
        return
    extracted = matta.extract(nested, spec).eval()
    assert torch.equal(logits(extracted, batch), logits(live(nested, spec).eval(), batch))
    _assert_is_plain(extracted, None)


@over_the_zoo
def test_all_layers_narrow_are_the_student_or_all_of_the_tas_layers_at_its_width(case: Case) -> None:
    nested, batch = case.nest(), case.batch()
    spec = matta.narrow(nested)
    extracted = matta.extract(nested, spec).eval()
    found = logits(extracted, batch)
    assert torch.isfinite(found).all()
    assert torch.equal(found, logits(live(nested, spec).eval(), batch))
    if case.width_only and not _has_statistics(nested.ta):
        assert torch.equal(found, logits(nested.student.eval(), batch))


@over_the_zoo
def test_random_sub_models_are_trained_as_one_more_student(case: Case) -> None:
    nested, batch = case.nest(), case.batch()
    if case.id in UNMIXABLE:
        pytest.skip(UNMIXABLE[case.id])
    draw = random_sub_model(nested)
    for seed in range(3):
        extracted = matta.extract(nested, draw(Random(seed)))
        assert logits(extracted, batch).shape == logits(nested.ta, batch).shape
    cotrain = matta.CoTraining(nested, OBJECTIVES[case.target](), sample=draw).train()
    cotrain(batch).loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in nested.parameters())


def _has_statistics(module: nn.Module) -> bool:
    """Whether it holds BatchNorm, whose statistics are each model's own."""
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def test_hidden_layers_of_an_mlp_are_wide_or_narrow_each_for_itself() -> None:
    chosen = case("mlp-width")
    nested, batch = chosen.nest(), chosen.batch()
    first, second, logit = (*nested.ta.hidden, nested.ta.logit)
    assert layer_names(nested) == ("hidden.0", "hidden.1")
    for widths in ((12, 4), (6, 9), (6, 4), (12, 9)):
        choices = ["wide" if width in (12, 9) else "narrow" for width in widths]
        extracted = matta.extract(nested, matta.SubModel(dict(zip(("hidden.0", "hidden.1"), choices, strict=True))))
        one, two = widths
        x = functional.linear(batch[0][0], first.weight[:one], first.bias[:one]).tanh()
        x = functional.linear(x, second.weight[:two, :one], second.bias[:two]).tanh()
        expected = functional.linear(x, logit.weight[:, :two], logit.bias).squeeze(-1)
        torch.testing.assert_close(logits(extracted, batch), expected)
        assert [layer.out_features for layer in extracted.hidden] == list(widths)


def _assert_is_plain(module: nn.Module, like: nn.Module | None) -> None:
    """The user's classes with weights of their own, without a trace of matta."""
    assert not list(_traces(module))
    assert b"matta" not in "".join(module.state_dict()).encode()
    for parameter in module.parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.is_leaf
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    if like is not None:
        assert [type(part) for part in module.modules()] == [type(part) for part in like.modules()]
        assert list(module.state_dict()) == list(like.state_dict())
        for name, part in module.named_modules():
            assert set(vars(part)) == set(vars(like.get_submodule(name))), name


def _traces(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        held = [*type(part).__mro__, *_leaves(vars(part))]
        yield from (f"{name}: {thing}" for thing in held if _module_of(thing).split(".")[0] == "matta")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (key, *_leaves(inner))
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _module_of(thing: Any) -> str:
    found = getattr(thing, "__module__", None) or type(thing).__module__
    return f"{thing}." if isinstance(thing, str) and thing.startswith("matta") else str(found)


@pytest.mark.parametrize("name", ["transformer-heads", "early_exit-private"])
def test_an_extracted_model_is_unpickled_where_matta_is_not(name: str, tmp_path: Path) -> None:
    chosen = case(name)
    nested, batch = chosen.nest(), chosen.batch()
    extracted = matta.extract(nested).eval()
    expected = logits(extracted, batch)
    torch.save((extracted, batch, expected), tmp_path / "model.pt")
    assert b"matta" not in pickle.dumps(extracted)
    code = (
        "import sys; sys.modules['matta'] = None\n"
        "import torch; module, batch, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "out = module(**{k: v for k, v in batch.items() if k != 'labels'}).logits if isinstance(batch, dict)"
        " else module(*batch[0])\n"
        "assert torch.equal(out, expected)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------ shared by the tests


def _cotraining(case: Case, nested: matta.Nested, weights: matta.Weights = WEIGHTS) -> matta.CoTraining:
    return matta.CoTraining(nested, OBJECTIVES[case.target](), weights=weights).train()


def _labels(batch: Batch) -> Tensor:
    return batch["labels"] if isinstance(batch, dict) else batch[1]


def _assert_same_weights(found: nn.Module, expected: nn.Module, *, exactly: bool = False) -> None:
    wanted = dict(expected.named_parameters())
    assert {name for name, _ in found.named_parameters()} == set(wanted)
    atol = 0.0 if exactly else 1e-10
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), wanted[name].detach(), rtol=0, atol=atol, msg=lambda t, n=name: f"{n}: {t}"
        )
