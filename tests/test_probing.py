"""The probe: right declarations pass, wrong ones are found, and what it suggests mends them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.errors import NestingError, ProbeError

X, Y = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0])


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 3 * width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v).mean(1)


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 2 * width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(gate.sigmoid() * value).mean(1)


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, width, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(1))


class Joined(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, width), nn.Linear(5, width), nn.Linear(2 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.one(x), self.two(x).relu()], -1)).mean(1)


class Flattened(nn.Module):
    """Channels last, so that the leading part of what is flattened is not the Student's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv1d(4, width, 2), nn.Linear(4 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x).mT.flatten(1))


Case = tuple[Callable[[int], nn.Module], dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "qkv": (Attention, {"qkv.*": 3, "out.*": 1}, {"qkv.*": 1, "out.*": 1}),
    "glu": (Gated, {"up.*": 2, "down.*": 1}, {"up.*": 1, "down.*": 1}),
    "glu-in-three": (Gated, {"up.*": 2, "down.*": 1}, {"up.*": 4, "down.*": 1}),
    "lstm": (Recurrent, {"head.weight": matta.Layout.equal(2, axis=1)}, {"head.weight": 1}),
    "concat": (Joined, {"head.weight": matta.Layout.equal(2, axis=1), "*": 1}, {"*": 1}),
    "flatten": (
        Flattened,
        {"head.weight": matta.Layout.factors([(4, 4), (4, 6)], axis=1), "*": 1},
        {"*": 1},
    ),
}

REST: dict[str, dict[str, int]] = {"concat": {"*": 1}, "flatten": {"*": 1}}
"""What else has to be declared for want of an example; the message is about what is wrong alone."""


def _pair(make: Callable[[int], nn.Module], small: int = 4, large: int = 6) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    if make is Gated:
        small, large = 4, 8
    return make(small), make(large)


@pytest.mark.parametrize("name", CASES)
def test_the_right_layout_passes_and_changes_nothing(name: str) -> None:
    make, right, _ = CASES[name]
    student, ta = _pair(make)
    before = copy.deepcopy(ta.state_dict())
    nested = matta.nest(student, ta, layouts=right, example=(X, Y)).train()
    matta.probe(nested, (X, Y))
    assert all(torch.equal(before[key], value) for key, value in ta.state_dict().items())
    assert nested.ta.training
    assert all(parameter.grad is None for parameter in nested.parameters())


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_layout_is_found_and_the_suggestion_mends_it(name: str) -> None:
    make, _, wrong = CASES[name]
    nested = matta.nest(*_pair(make), layouts=wrong)
    with pytest.raises(ProbeError, match=r"the TA differs from the Student from \w+ on .*layouts=") as caught:
        matta.probe(nested, (X, Y))
    found = re.search(r"layouts=(\{.*?\})(?:, with which they agree| or layouts=)", str(caught.value))
    assert found, caught.value
    suggested = eval(found[1], {"matta": matta})
    mended = matta.nest(*_pair(make), layouts={**suggested, **REST.get(name, {})})
    matta.probe(mended, (X, Y))


@pytest.mark.parametrize("name", CASES)
def test_with_an_example_nothing_need_be_declared(name: str) -> None:
    make, right, _ = CASES[name]
    nested = matta.nest(*_pair(make), example=(X, Y))
    expected = matta.nest(*_pair(make), layouts=right)
    for key, placement in expected.plan.placements.items():
        for axis, other in zip(nested.plan.placements[key].axes, placement.axes, strict=True):
            assert axis.positions() == other.positions(), key


def test_a_trained_pair_is_probed_as_well_as_a_fresh_one() -> None:
    nested = matta.nest(*_pair(Attention), layouts={"qkv.*": 3})
    cotrain = matta.CoTraining(nested, matta.objectives.Classification()).train()
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.5)
    for _ in range(3):
        cotrain((X, Y)).loss.backward()
        optimizer.step()
    matta.probe(nested, (X, Y))


def test_zero_biases_do_not_hide_their_layout() -> None:
    pair = _pair(Attention)
    for module in pair:
        nn.init.zeros_(module.get_parameter("qkv.bias"))
    nested = matta.nest(*pair, layouts={"qkv.weight": 3, "qkv.bias": 1})
    with pytest.raises(ProbeError, match=r"qkv"):
        matta.probe(nested, (X, Y))


def test_every_student_is_probed() -> None:
    layouts = {"qkv.*": 1, "out.*": 1}
    nested = matta.nest([Attention(6), Attention(4)], Attention(6), layouts=layouts)
    with pytest.raises(ProbeError, match="qkv"):
        matta.probe(nested, (X, Y))


@pytest.mark.parametrize("batch", [(X, Y), {"x": X, "labels": Y}, {"x": X}, ((X,), None)])
def test_any_batch_will_do(batch: Any) -> None:
    matta.probe(matta.nest(*_pair(Gated), layouts={"up.*": 2}), batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_precision_will_do(dtype: torch.dtype) -> None:
    pair = [module.to(dtype) for module in _pair(Attention)]
    matta.probe(matta.nest(*pair, layouts={"qkv.*": 3}), (X.to(dtype), Y))
    assert {parameter.dtype for module in pair for parameter in module.parameters()} == {dtype}


def test_depth_does_not_count() -> None:
    class Deep(nn.Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 5)) for _ in range(depth)
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x.mean(1)

    for rule in ("first", "last", "ends", [0, 2]):
        matta.nest(Deep(4, 2), Deep(6, 4), layers={"blocks": rule}, example=(X, None))


def test_norms_over_a_wider_state_are_made_to_see_the_students() -> None:
    def net(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(5, width), nn.LayerNorm(width), nn.ReLU(), nn.RMSNorm(width), nn.Linear(width, 2)
        )

    matta.nest(net(4), net(6), example=(X, None))


def test_models_that_cannot_be_run_are_refused() -> None:
    nested = matta.nest(*_pair(Attention), layouts={"qkv.*": 3}).to("meta")
    with pytest.raises(ProbeError, match="on the meta device and cannot be run; probe it once its weights are there"):
        matta.probe(nested, (X, Y))


def test_what_no_declaration_mends_is_said() -> None:
    class Turned(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(torch.fft.fft(input).real)

    pair = [nn.Sequential(nn.Linear(5, width), Turned(width, 2)) for width in (4, 6)]
    with pytest.raises(
        ProbeError, match=r"from 1 on .*if the two models differ there by design .* nest with probe=False"
    ):
        matta.probe(matta.nest(*pair), (X, Y))


def test_a_number_that_follows_from_the_width_is_no_difference() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            centred = input / input.pow(2).mean(-1, keepdim=True).sqrt()
            return super().forward(centred) / self.in_features**0.5

    matta.nest(*(nn.Sequential(nn.Linear(5, width), Scaled(width, 2)) for width in (4, 6)), example=(X, Y))


class Normed(nn.Module):
    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.convolution, self.norm, self.head = nn.Conv1d(4, width, 1), norm(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.convolution(x)).mean(2))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, lambda width: nn.GroupNorm(1, width), nn.PReLU])
def test_signals_as_long_as_the_ta_has_channels_are_no_channels(norm: Callable[[int], nn.Module]) -> None:
    matta.nest(Normed(3, norm), Normed(X.shape[-1], norm), example=(X, Y))


class OwnType(nn.Module):
    """Makes a float32 tensor itself, as the first state of a recurrent network is made."""

    def __init__(self, width: int, halves: int = 1) -> None:
        super().__init__()
        self.up = nn.utils.parametrizations.weight_norm(nn.Linear(5, halves * width))
        self.down = nn.Linear(width, 2)
        self.halves = halves

    def forward(self, x: Tensor) -> Tensor:
        first = self.up(x.mean(1).float() + torch.zeros(5)).chunk(self.halves, -1)[-1]
        return self.down(first.relu())


def test_a_module_that_makes_tensors_of_its_own_type_is_probed_in_it() -> None:
    matta.nest(OwnType(3), OwnType(6), example=(X, Y))
    wrong = {"up.*": 1, "down.*": 1}
    with pytest.raises(ProbeError, match=r"the TA differs from the Student from down on"):
        matta.nest(OwnType(3, 2), OwnType(6, 2), layouts=wrong, example=(X, Y))


class Fields(NamedTuple):
    x: Tensor


def test_inputs_may_be_a_named_tuple() -> None:
    matta.nest(*_pair(Gated), example=(Fields(X), Y))


def test_models_of_different_classes_are_told_so() -> None:
    pair = [nn.Sequential(nn.Linear(5, width), nn.Linear(width, classes)) for width, classes in ((3, 2), (6, 4))]
    with pytest.raises(ProbeError, match=r"logits have shape \(3, 4, 2\) .*TA's \(3, 4, 4\); expected the same c"):
        matta.nest(*pair, example=(X, Y))


def test_an_example_that_the_student_cannot_take_is_refused() -> None:
    with pytest.raises(ProbeError, match=r"the Student does not run on the example: .* pass as `example` a batch such"):
        matta.nest(*_pair(Gated), example=(X[..., :3], Y))


class Scored(nn.Module):
    """Layers that return a loss, one number, by a module that has weights of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last, self.loss = nn.Linear(5, width), nn.Linear(width, 3), Weighed()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.first(x))
        return {"loss": self.loss(logits), "logits": logits}


class Weighed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, logits: Tensor) -> Tensor:
        return (logits * self.weight).logsumexp(-1).sum()


def test_a_module_with_weights_may_return_one_number() -> None:
    assert matta.nest(Scored(4), Scored(6), example=(torch.ones(2, 5), None)).plan.placements


class Graph(nn.Module):
    """Means over neighbours by a sparse buffer."""

    def __init__(self, width: int, layout: str) -> None:
        super().__init__()
        neighbours = torch.eye(4).roll(1, 0) + torch.eye(4)
        self.register_buffer("neighbours", getattr(neighbours, f"to_{layout}")())
        self.nodes, self.layer, self.head = nn.Embedding(4, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.sparse.mm(self.neighbours, self.layer(self.nodes.weight)).relu()[ids])


@pytest.mark.parametrize("layout", ["sparse", "sparse_csr"])
def test_a_sparse_buffer_is_copied_and_compared(layout: str) -> None:
    example = torch.tensor([0, 3]), None
    nested = matta.nest(Graph(4, layout), Graph(6, layout), example=example, warm_start=True)
    assert torch.equal(matta.extract(nested).eval()(example[0]), nested.student.eval()(example[0]))
    other = Graph(6, layout)
    other.neighbours = 2 * other.neighbours
    with pytest.raises(NestingError, match="the TA's buffer neighbours has other values than the Student's"):
        matta.nest(Graph(4, layout), other, example=example, warm_start=True, probe=False)


class FieldConvolutions(nn.Module):
    """Kernels over fields, not over the channels of their embeddings; of the fields the two largest values stay."""

    def __init__(self, embedding: int, channels: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(7, embedding) for _ in range(4))
        self.convolution = nn.Conv2d(1, channels, (3, 1), padding=(1, 0))
        self.head = nn.Linear(channels * 2 * embedding, 1)

    def forward(self, ids: Tensor) -> Tensor:
        fields = torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1)
        found = self.convolution(fields[:, None]).relu()
        places = found.topk(2, dim=2).indices.sort(dim=2).values
        return self.head(found.gather(2, places).flatten(1))


def test_embeddings_beside_the_places_of_a_convolution_are_laid_out() -> None:
    torch.manual_seed(0)
    ids = torch.randint(7, (6, 4))
    nested = matta.nest(FieldConvolutions(3, 2), FieldConvolutions(5, 4), example=(ids, None))
    nested.requires_grad_(False)
    student, ta = nested.student, nested.ta
    assert torch.equal(student.head.weight, ta.head.weight.view(1, 4, 2, 5)[:, :2, :, :3].flatten(1))


class GatedFields(nn.Module):
    """Embeddings one after the other, each field times a weight of its own that is repeated over its channels."""

    def __init__(self, embedding: int, gate_first: bool) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(7, embedding) for _ in range(4))
        self.gate, self.embedding, self.gate_first = nn.Parameter(torch.randn(4)), embedding, gate_first
        self.body = nn.Linear(4 * embedding, 4 * embedding)
        self.head = nn.Linear(4 * embedding, 1)

    def forward(self, ids: Tensor) -> Tensor:
        fields = torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1).flatten(1)
        gate = self.gate.softmax(0)[:, None].repeat(1, self.embedding).view(1, -1)
        gated = gate * fields if self.gate_first else fields * gate
        return self.head(gated + fields * self.body(gated).relu())


@pytest.mark.parametrize("gate_first", [False, True])
def test_a_weight_for_each_field_does_not_tie_the_channels_of_its_embedding(gate_first: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randint(7, (6, 4))
    nested = matta.nest(GatedFields(3, gate_first), GatedFields(5, gate_first), example=(ids, None))
    nested.requires_grad_(False)
    student, ta = nested.student, nested.ta
    assert torch.equal(student.head.weight, ta.head.weight.view(1, 4, 5)[:, :, :3].flatten(1))
    assert torch.equal(student.body.weight, ta.body.weight.view(4, 5, 4, 5)[:, :3, :, :3].flatten(2).flatten(0, 1))


class SeenNotAgain(nn.Module):
    """Scores for all items, of which those that were seen get minus infinity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.items, self.scores = nn.Embedding(9, width), nn.Linear(width, 9, bias=False)

    def forward(self, seen: Tensor) -> Tensor:
        logits = self.scores(self.items(seen).mean(1))
        return logits.scatter_(1, seen, float("-inf"))


@pytest.mark.parametrize("warm_start", [False, True])
def test_infinities_that_both_compute_are_no_difference(warm_start: bool) -> None:
    seen = torch.randint(9, (4, 3), generator=torch.Generator().manual_seed(0))
    nested = matta.nest(SeenNotAgain(4), SeenNotAgain(6), example=(seen, None), warm_start=warm_start)
    ordered = matta.order(nested.ta, example=(seen, None), data=[(seen, None)])
    torch.testing.assert_close(ordered(seen), nested.ta(seen))
