"""A warm start: before the first step Student and TA compute what the trained Student computed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import matta
from matta.errors import NestingError

X, Y = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])


def _tower(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2))


class Residual(nn.Module):
    """Blocks around an identity; `name` is what the output projection of a block is called."""

    def __init__(self, depth: int, width: int, name: str = "c_proj", norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(depth)
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(Block(width, name, norm) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, width: int, name: str, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6) if norm else nn.Identity()
        self.up = nn.Linear(6, width)
        self.output = name
        self.add_module(name, nn.Linear(width, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + getattr(self, self.output)(functional.gelu(self.up(self.norm(x))))


class Recurrent(nn.Module):
    """Layers in both directions, read at the last step."""

    def __init__(self, kind: Any, width: int, **sizes: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.rnn = kind(5, width, num_layers=2, batch_first=True, bidirectional=True, **sizes)
        self.head = nn.Linear(2 * sizes.get("proj_size", width), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.unsqueeze(1).repeat(1, 3, 1))[0][:, -1])


def _normed(width: int) -> nn.Sequential:
    """Norms with the statistics of a training."""
    torch.manual_seed(width)
    layers = [nn.Linear(5, width), nn.BatchNorm1d(width), nn.GELU(), nn.BatchNorm1d(width, affine=False)]
    model = nn.Sequential(*layers, nn.Linear(width, 2), nn.BatchNorm1d(2))
    for _ in range(5):
        model(3 * torch.randn(16, 5) + 1)
    return model.eval()


def _gpt2(**changes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(len(changes))
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 16, "vocab_size": 11, "n_positions": 8, **changes}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def _logits(module: nn.Module, batch: Any) -> Tensor:
    out = module.eval()(**{k: v for k, v in batch.items() if k != "labels"}) if isinstance(batch, dict) else module(X)
    return out.logits if isinstance(batch, dict) else out


TOKENS = {"input_ids": torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))}
BOTH_WAYS = {"layouts": {"head.weight": matta.Layout.equal(2, axis=1)}}
PAIRS: dict[str, tuple[Any, Any, dict[str, Any], Any]] = {
    "mlp-width": (lambda: _tower(4), lambda: _tower(9), {}, (X, Y)),
    "batch-norm": (lambda: _normed(4), lambda: _normed(9), {}, (X, Y)),
    "residual-width": (lambda: Residual(2, 4), lambda: Residual(2, 7), {}, (X, Y)),
    "residual-depth": (lambda: Residual(2, 4), lambda: Residual(4, 7), {"layers": {"blocks": "even"}}, (X, Y)),
    "residual-ends": (lambda: Residual(2, 4), lambda: Residual(3, 4), {"layers": {"blocks": "ends"}}, (X, Y)),
    "lstm": (lambda: Recurrent(nn.LSTM, 4), lambda: Recurrent(nn.LSTM, 6), BOTH_WAYS, (X, Y)),
    "gru": (lambda: Recurrent(nn.GRU, 4), lambda: Recurrent(nn.GRU, 6), BOTH_WAYS, (X, Y)),
    "lstm-projected": (
        lambda: Recurrent(nn.LSTM, 4, proj_size=2),
        lambda: Recurrent(nn.LSTM, 6, proj_size=3),
        BOTH_WAYS,
        (X, Y),
    ),
    "gpt2-width": (_gpt2, lambda: _gpt2(n_inner=24), {}, TOKENS),
    "gpt2-depth": (_gpt2, lambda: _gpt2(n_layer=4, n_inner=24), {"layers": {"transformer.h": "even"}}, TOKENS),
}


@pytest.mark.parametrize("with_example", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_student_and_ta_start_as_the_student_was(name: str, with_example: bool) -> None:
    make_student, make_ta, rules, batch = PAIRS[name]
    student, ta = make_student(), make_ta()
    before, weights = _logits(student, batch), copy.deepcopy(student.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nested = matta.nest(student, ta, warm_start=True, example=batch if with_example else None, **rules)
    torch.testing.assert_close(_logits(nested.student, batch), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_logits(nested.ta, batch), before, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(weights[key], value) for key, value in student.state_dict().items())
    extracted = matta.extract(nested).state_dict()
    assert all(torch.equal(weights[key], value) for key, value in extracted.items())


@pytest.mark.parametrize("with_example", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_what_only_the_ta_has_still_learns(name: str, with_example: bool) -> None:
    make_student, make_ta, rules, batch = PAIRS[name]
    nested = matta.nest(make_student(), make_ta(), warm_start=True, example=batch if with_example else None, **rules)
    inside = {key: torch.zeros_like(p, dtype=torch.bool) for key, p in nested.ta.named_parameters()}
    for placement in nested.plan.placements.values():
        if placement.ta in inside:
            inside[placement.ta][
                torch.meshgrid(*(torch.tensor(a.positions()) for a in placement.axes), indexing="ij")
            ] = True
    _logits(nested.ta, batch).square().sum().backward()
    gradients = {key: p.grad for key, p in nested.ta.named_parameters() if p.grad is not None}
    assert sum(float(gradient[~inside[key]].abs().sum()) for key, gradient in gradients.items()) > 0


def test_a_projection_of_an_unknown_name_needs_an_example() -> None:
    pair = Residual(2, 4, "finish", norm=True), Residual(3, 4, "finish", norm=True)
    with pytest.raises(NestingError, match=r"extra block blocks.2 \(Block\) an identity.*c_proj.*pass example=batch"):
        matta.nest(*copy.deepcopy(pair), layers={"blocks": "first"}, warm_start=True)
    before = pair[0](X)
    nested = matta.nest(*pair, layers={"blocks": "first"}, warm_start=True, example=(X, Y))
    torch.testing.assert_close(nested.ta(X), before)
    extra = nested.ta.blocks[2]
    assert torch.count_nonzero(extra.finish.weight) == 0
    assert torch.count_nonzero(extra.up.weight) == extra.up.weight.numel()
    assert torch.count_nonzero(extra.norm.weight) == extra.norm.weight.numel()


def test_a_wider_hidden_state_is_refused_and_the_student_starts_alone() -> None:
    student, ta = _gpt2(), _gpt2(n_embd=12, n_head=3, n_inner=24)
    before, weights = _logits(student, TOKENS), copy.deepcopy(ta.state_dict())
    with pytest.raises(NestingError, match=r"logits differ by .*norms over a wider hidden state.*load_state_dict"):
        matta.nest(student, ta, warm_start=True, example=TOKENS)
    assert all(torch.equal(weights[key], value) for key, value in ta.state_dict().items())
    nested = matta.nest(student, ta, example=TOKENS)
    nested.student.load_state_dict(student.state_dict())
    torch.testing.assert_close(_logits(nested.student, TOKENS), before)


class Caching(nn.Module):
    """Keeps a buffer from its first forward on, as a cache of positions is kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(5, width), nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("cache", torch.ones(1), persistent=False)
        return self.out(self.norm(self.into(x))) * self.cache


def test_a_refused_ta_that_has_got_a_buffer_meanwhile_has_its_weights_again() -> None:
    student, ta = Caching(4), Caching(8)
    before = copy.deepcopy(ta.state_dict())
    with pytest.raises(NestingError, match="logits differ by"):
        matta.nest(student, ta, warm_start=True, example=(X, Y))
    assert all(torch.equal(before[name], value) for name, value in ta.state_dict().items())


def test_a_wider_mlp_that_is_not_residual_is_refused_where_depth_is_added() -> None:
    def deep(depth: int) -> nn.Module:
        torch.manual_seed(depth)
        return nn.Sequential(nn.Linear(5, 6), nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth))), nn.Linear(6, 2))

    with pytest.raises(NestingError, match=r"blocks that are not residual .* nest without it and start the Student al"):
        matta.nest(deep(2), deep(3), layers={"1": "first"}, warm_start=True, example=(X, Y))


def test_inputs_that_are_not_known_are_named() -> None:
    class Raw(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, width), nn.Parameter(torch.ones(width, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) @ self.down

    with pytest.raises(
        NestingError, match=r"which axis of down \(Raw, of shape \(4, 2\)\) its inputs are on.*pass example"
    ):
        matta.nest(Raw(4), Raw(6), warm_start=True)
    student = Raw(4)
    nested = matta.nest(student, Raw(6), warm_start=True, example=(X, Y))
    torch.testing.assert_close(nested.ta(X), student(X))


def test_without_a_warm_start_the_ta_is_untouched() -> None:
    ta = _tower(9)
    before = copy.deepcopy(ta.state_dict())
    nested = matta.nest(_tower(4), ta, example=(X, Y))
    assert all(torch.equal(before[name], tensor) for name, tensor in ta.state_dict().items())
    assert torch.equal(nested.student[0].weight, before["0.weight"][:4])


def test_modes_and_gradients_are_as_before() -> None:
    student, ta = _tower(4).train(), _tower(9).train()
    ta[2].eval()
    nested = matta.nest(student, ta, warm_start=True, example=(X, Y))
    assert ta.training
    assert not ta[2].training
    assert student.training
    assert all(parameter.grad is None for parameter in nested.parameters())


def test_tied_weights_and_private_ones_start_as_they_were() -> None:
    student, ta = _gpt2(), _gpt2(n_inner=24)
    before = _logits(student, TOKENS)
    nested = matta.nest(student, ta, private=["transformer.ln_f.*"], warm_start=True)
    torch.testing.assert_close(_logits(nested.student, TOKENS), before)
    assert nested.ta.lm_head.weight is nested.ta.transformer.wte.weight


def test_a_block_that_is_repeated_is_not_silenced() -> None:
    class Looped(Residual):
        def __init__(self, depth: int, width: int) -> None:
            super().__init__(1, width)
            self.blocks = nn.ModuleList([self.blocks[0]] * depth)

    with pytest.raises(NestingError, match="its logits differ by"):
        matta.nest(Looped(2, 4), Looped(3, 7), layers={"blocks": "first"}, warm_start=True, example=(X, Y))


@pytest.mark.parametrize("with_example", [True, False])
def test_a_buffer_that_a_training_has_set_is_named(with_example: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(5))
            self.tower = _tower(width)

        def forward(self, x: Tensor) -> Tensor:
            return self.tower(x - self.mean)

    student, ta = Scaled(4), Scaled(9)
    student.mean += 1
    example = (X, Y) if with_example else None
    with pytest.raises(NestingError, match="the TA's buffer mean has other values than the Student's; copy them"):
        matta.nest(student, ta, warm_start=True, example=example)
    ta.mean.copy_(student.mean)
    nested = matta.nest(student, ta, warm_start=True, example=example)
    torch.testing.assert_close(nested.ta(X), student(X))


class WithHidden(nn.Module):
    """Returns its hidden state before or behind the logits."""

    def __init__(self, width: int, is_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.body, self.head, self.is_first = nn.Linear(5, width), nn.Linear(width, 1), is_first

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).relu()
        score = self.head(hidden)
        return (hidden, score) if self.is_first else {"score": score, "hidden": hidden}


@pytest.mark.parametrize("is_first", [False, True])
def test_a_hidden_state_returned_beside_the_logits_may_grow(is_first: bool) -> None:
    student, ta = WithHidden(4, is_first), WithHidden(8, is_first)
    key: Any = 1 if is_first else "score"
    expected = student(X)[key]
    nested = matta.nest(student, ta, example=(X, Y), warm_start=True)
    torch.testing.assert_close(nested.ta(X)[key], expected)
    assert not torch.equal(WithHidden(8, is_first)(X)[key], expected)
