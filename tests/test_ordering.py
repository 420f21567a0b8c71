"""`matta.order`: channels in the order in which they matter, and a function that stays the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import matta
import zoo
from cases import Case
from matta.nesting.batches import call, outputs_of, split_labels

CHEAP = (
    *("mlp-width", "dlrm-concat", "dcn-embeddings-width-depth", "heads_first_qkv-heads", "swiglu_fused-d_model"),
    *("cnn-channels-flatten", "mobilenet-width-depth", "lstm-bidirectional", "gpt2-d_model-heads", "llama_gqa-groups"),
)


def outputs(module: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        return outputs_of(call(module.eval(), split_labels(batch)[0]))


def squares(module: nn.Module, batch: Any) -> Tensor:
    found = outputs_of(call(module, split_labels(batch)[0]))
    return torch.stack([each.square().mean() for each in found if each.is_floating_point()]).sum()


def cases() -> Iterator[Any]:
    for each in zoo.CASES:
        yield pytest.param(each, id=each.id, marks=[] if each.id in CHEAP else pytest.mark.stress)


@pytest.mark.parametrize("case", [*cases()])
def test_function_is_unchanged(case: Case) -> None:
    _, ta = case.build()
    before = copy.deepcopy(ta.state_dict())
    for importance in ("magnitude", "activation", "taylor"):
        data = [case.batch(1), case.batch(2)]
        found = matta.find_order(ta, example=case.batch(), data=data, importance=importance, loss=squares)
        assert found.groups
        for expected, actual in zip(outputs(ta, case.batch(3)), outputs(found.module, case.batch(3)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        assert all(bool((scores.diff() <= 0).all()) for scores in found.scores)
    assert all(torch.equal(each, before[name]) for name, each in ta.state_dict().items())


# --- what is a group ------------------------------------------------------------------------------


def sizes(module: nn.Module, example: Any) -> dict[str, int]:
    found = matta.find_order(module, example=example, importance="magnitude")
    return {group.name: group.size for group in found.groups}


def test_heads_move_whole_and_keys_with_their_queries() -> None:
    _, ta = zoo.case("llama_gqa-d_model-heads-depth").build()
    found = matta.find_order(ta, example=zoo.case("llama_gqa-d_model-heads-depth").batch(), importance="magnitude")
    heads = next(group for group in found.groups if ("model.layers.0.self_attn.k_proj.weight", 0) in group.members)
    taken = {name.split(".")[-2]: positions for (name, _), positions in heads.members.items()}
    assert {name: tuple(positions.shape) for name, positions in taken.items()} == {
        "q_proj": (4, 4),
        "k_proj": (4, 2),
        "v_proj": (4, 2),
        "o_proj": (4, 4),
    }
    assert taken["q_proj"][1].tolist() == [4, 5, 6, 7]


class Grouped(nn.Module):
    """A hidden layer behind a GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.GroupNorm(2, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


class Halves(nn.Module):
    """A hidden layer whose halves go through different functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, -1)
        return self.last(torch.cat([left.relu(), right.tanh()], -1))


class Rarely(nn.Module):
    """Two ways from a stream, of which an example takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.often, self.rarely = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.rarely if len(x) > 4 else self.often)(self.stem(x))


class Running(nn.Module):
    """A sum along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).cumsum(-1))


class Written(nn.Module):
    """Two layers that meet where the trace does not see it: one is written down as numbers and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tensor(self.first(x).tolist(), dtype=x.dtype)
        return self.last(self.gate(x) * hidden)


class Split(nn.Module):
    """Eight channels and their single gate, from one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 9)

    def forward(self, x: Tensor) -> Tensor:
        gate, hidden = self.layer(x).split([1, 8], -1)
        return hidden * gate.sigmoid()


def test_a_silent_branch_does_not_hide_what_an_operator_fixes() -> None:
    module = Running()
    nn.init.zeros_(module.last.weight)
    assert not sizes(module, torch.randn(2, 3))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Grouped(), "the module computes something else with them in another order"),
        (Running(), "the module computes something else with them in another order"),
        (Written(), "the module computes something else with them in another order"),
        (Rarely(), "rarely.weight may have them too, but took no part in the run; pass an example that reaches it"),
    ],
    ids=["group_norm", "cumsum", "written", "unreached"],
)
def test_what_cannot_be_ordered_is_left_with_the_reason(module: nn.Module, reason: str) -> None:
    found = matta.find_order(module, example=torch.randn(2, 3), importance="magnitude")
    assert not found.groups
    assert reason in {left.reason for left in found.left}
    assert reason in str(found)


def test_a_single_channel_has_no_order() -> None:
    split = nn.Sequential(Split(), nn.Linear(8, 2))
    found = matta.find_order(split, example=torch.randn(2, 3), importance="magnitude")
    assert [group.size for group in found.groups] == [8]
    assert "it is a single channel" in {left.reason for left in found.left}


def test_halves_of_an_axis_are_ordered_apart() -> None:
    module = Halves()
    found = matta.find_order(module, example=torch.randn(2, 3), importance="magnitude")
    assert [group.size for group in found.groups] == [4, 4]
    ordered = found.module.first.weight
    assert {tuple(row) for row in ordered[:4].tolist()} == {tuple(row) for row in module.first.weight[:4].tolist()}


# --- how much channels matter -----------------------------------------------------------------------


def units(scales_in: list[float], scales_out: list[float]) -> nn.Module:
    """One input, hidden units and one output, with the given weights."""
    size = len(scales_in)
    module = nn.Sequential(nn.Linear(1, size, bias=False), nn.ReLU(), nn.Linear(size, 1, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor(scales_in)[:, None])
        module[2].weight.copy_(torch.tensor(scales_out)[None])
    return module


BATCHES = [
    (torch.tensor([[1.0], [-0.5]]), torch.tensor([[0.0], [0.0]])),
    (torch.tensor([[2.0]]), torch.tensor([[0.0]])),
]


def squared_error(module: nn.Module, batch: Any) -> Tensor:
    return functional.mse_loss(module(batch[0]), batch[1])


def test_magnitude_is_the_product_of_norms() -> None:
    ordered = matta.order(units([3.0, 1.0, 2.0], [1.0, 8.0, 2.0]), example=BATCHES[0], importance="magnitude")
    assert ordered[0].weight.flatten().tolist() == [1.0, 2.0, 3.0]


def test_activation_is_the_mean_absolute_value_that_the_next_layer_is_fed() -> None:
    found = matta.find_order(units([3.0, -1.0, 2.0], [1.0, 9.0, 2.0]), example=BATCHES[0], data=BATCHES)
    assert found.module[0].weight.flatten().tolist() == [3.0, 2.0, -1.0]
    fed = torch.tensor([(1.5 + 6.0), (1.0 + 4.0), 0.25])  # the mean of each batch, added up
    torch.testing.assert_close(found.scores[0], fed / fed.mean())


def test_taylor_is_the_weight_times_its_gradient() -> None:
    module = units([3.0, 1.0, 2.0], [1.0, 8.0, -0.5])
    found = matta.find_order(module, example=BATCHES[0], data=BATCHES, importance="taylor", loss=squared_error)
    expected = torch.zeros(3)
    for batch in BATCHES:
        first, last = torch.autograd.grad(squared_error(module, batch), list(module.parameters()))
        expected += (first * module[0].weight).sum(1).abs() + (last * module[2].weight).sum(0).abs()
    torch.testing.assert_close(found.scores[0], expected.sort(descending=True).values.detach())


def test_taylor_takes_an_objective() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))
    batch = torch.randn(8, 3), torch.arange(8) % 4
    objective = matta.objectives.Classification()

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(module(batch[0]), batch[1])

    found = [
        matta.order(module, example=batch, data=[batch], importance="taylor", loss=each) for each in (objective, loss)
    ]
    assert torch.equal(found[0][0].weight, found[1][0].weight)
    assert module[0].weight.grad is None


def test_no_more_batches_are_read_than_asked_for() -> None:
    read = []

    def endless() -> Iterator[Any]:
        while True:
            read.append(1)
            yield BATCHES[0]

    matta.order(units([1.0, 2.0], [1.0, 1.0]), example=BATCHES[0], data=endless(), num_batches=3)
    assert len(read) == 3


def test_leading_slice_after_order_is_the_better_student() -> None:
    torch.manual_seed(0)
    ta = units([0.01, 3.0, 0.02, 2.0], [0.01, 1.0, 0.02, 1.0])
    ordered = matta.order(ta, example=BATCHES[0], data=BATCHES)
    x = BATCHES[0][0]
    errors = [
        float((matta.nest(units([0.0] * 2, [0.0] * 2), each, warm_start="ta").student(x) - ta(x)).detach().abs().max())
        for each in (ta, ordered)
    ]
    assert errors[1] < 1e-3 < errors[0]


# --- principal axes ---------------------------------------------------------------------------------


class Embedded(nn.Module):
    """Two embeddings that a linear layer reads, and a hidden layer."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.user, self.film = nn.Embedding(9, width), nn.Embedding(7, width)
        self.first, self.last = nn.Linear(2 * width, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(torch.cat([self.user(x[:, 0]), self.film(x[:, 1])], -1)).relu())


PAIRS = (torch.stack([torch.arange(20) % 9, torch.arange(20) % 7], 1), torch.zeros(20, 1))


@pytest.mark.parametrize("importance", ["magnitude", "activation", "taylor"])
def test_a_leading_slice_of_turned_channels_holds_what_has_few_dimensions(importance: Any) -> None:
    torch.manual_seed(0)
    ta = Embedded()
    with torch.no_grad():
        for table in (ta.user, ta.film):  # two directions, spread over six channels
            table.weight.copy_(torch.randn(len(table.weight), 2) @ torch.randn(2, 6))
    arguments = {"example": PAIRS, "importance": importance, "data": [PAIRS], "loss": squared_error}
    errors = []
    for rotate in (False, True):
        found = matta.find_order(ta, rotate=rotate, **arguments)
        torch.testing.assert_close(found.module(PAIRS[0]), ta(PAIRS[0]))
        layouts = {"first.weight": matta.Layout.concat([(2, 6)] * 2, axis=1)}
        student = matta.nest(slim(), found.module, layouts=layouts, warm_start="ta").student
        errors.append(float((student(PAIRS[0]) - ta(PAIRS[0])).detach().abs().max()))
        assert all(bool((scores.diff() <= 0).all()) for scores in found.scores)
    assert errors[1] < 0.15 * errors[0]
    assert {group.name: turned for group, turned in zip(found.groups, found.rotated, strict=True)} == {
        "first.weight (axis 0)": False,
        "user.weight (axis 1)": True,
        "film.weight (axis 1)": True,
    }


def slim() -> Embedded:
    small = Embedded(2)
    small.first = nn.Linear(4, 8)
    return small


def test_the_axes_of_taylor_are_those_of_gradients_and_activations() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double(), torch.randn(50, 3).double()
    batch = x, torch.randn(50, 2).double()
    found = matta.find_order(module, example=batch, data=[batch], importance="taylor", loss=squared_error, rotate=True)
    hidden = found.module[0](x).detach().requires_grad_()
    functional.mse_loss(found.module[1](hidden), batch[1]).backward()
    logarithm = torch.zeros(4, 4).double()
    for rows in (hidden.detach(), hidden.grad):
        values, axes = torch.linalg.eigh(rows.T @ rows)
        logarithm += axes * values.clamp(min=1e-10 * float(values[-1])).log() @ axes.T
    torch.testing.assert_close(logarithm, logarithm.diag().diag(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.scores[0].double(), logarithm.diag(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2-d_model-heads", "dlrm-concat", "lstm-bidirectional"])
def test_what_is_not_linear_is_ordered_and_not_turned(name: str) -> None:
    _, ta = zoo.case(name).build()
    example = zoo.case(name).batch()
    found = matta.find_order(ta, example=example, importance="magnitude", rotate=True)
    for expected, actual in zip(outputs(ta, example), outputs(found.module, example), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not all(found.rotated)


# --- errors ----------------------------------------------------------------------------------------


def no_graph(module: nn.Module, batch: Any) -> Any:
    return squared_error(module, batch).detach()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance": "random"}, "importance='random'; expected one of: activation, taylor, magnitude"),
        ({}, "importance='activation' needs batches to measure on; pass data=,"),
        ({"importance": "taylor", "data": BATCHES}, "needs the loss whose slope it takes, and received loss=None"),
        ({"importance": "taylor", "data": BATCHES, "loss": no_graph}, "the loss returned a tensor of shape"),
        ({"data": []}, "data= gave no batch"),
        ({"data": BATCHES, "num_batches": 0}, "num_batches=0; expected 1 or more"),
        ({"data": [(torch.full((1, 1), torch.nan), None)]}, "the activation scores are not finite"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(matta.MattaError) as error:
        matta.order(units([1.0, 2.0], [1.0, 1.0]), example=BATCHES[0], **arguments)
    assert message in str(error.value)


def test_a_module_that_fails_on_the_example_is_refused() -> None:
    with pytest.raises(matta.MattaError, match="the module fails on the example with RuntimeError"):
        matta.order(nn.Linear(3, 2), example=torch.zeros(1, 4), importance="magnitude")


def test_the_example_may_be_a_list_as_a_data_loader_gives_it() -> None:
    module = units([1.0, 2.0], [1.0, 1.0])
    x = torch.ones(2, 1)
    a, b = (matta.order(module, example=each, importance="magnitude") for each in ([x, torch.ones(2)], x))
    assert all(torch.equal(one, other) for one, other in zip(a.parameters(), b.parameters(), strict=True))


# --- depth -----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Blocks that add so much of a fixed turn of their input."""

    def __init__(self, strengths: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in strengths)
        with torch.no_grad():
            for block, strength in zip(self.blocks, strengths, strict=True):
                block.weight.copy_(torch.tensor([[1.0, -strength], [strength, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_that_turn_the_stream_most_are_kept_in_their_order() -> None:
    data = [(torch.randn(4, 2), None)]
    kept = matta.best_layers(Residual([0.1, 0.9, 0.0, 0.5]), {"blocks": 2}, data=data)
    assert kept == {"blocks": [1, 3]}
    nested = matta.nest(Residual([0.0, 0.0]), Residual([0.1, 0.9, 0.0, 0.5]), layers=kept)
    assert nested.student.blocks[1].weight[1, 0].item() == 0.5


@pytest.mark.parametrize(
    ("keep", "data", "message"),
    [
        ({"layers": 1}, [], "keep={'layers': 1} names no module list; the module has: 'blocks' (2)"),
        ({"blocks": 3}, [], "the list has 2 blocks; expected 1 to 2"),
        ({"blocks": 1}, [], "not every block of the list was seen"),
    ],
)
def test_blocks_that_cannot_be_ranked(keep: dict[str, int], data: list[Any], message: str) -> None:
    with pytest.raises(matta.MattaError) as error:
        matta.best_layers(Residual([0.1, 0.2]), keep, data=data)
    assert message in str(error.value)
