"""Forwards that do more than call layers: mapped functions, rows of several lengths, tables of codes, assertions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.objectives import Classification


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class MappedOverPlaces(nn.Module):
    """A layer for all places and a matrix for each, by torch.vmap."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.matrices = nn.Linear(5, width), nn.Parameter(torch.randn(4, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.vmap(lambda row: self.layer(row).relu(), in_dims=1, out_dims=1)(x)
        return torch.vmap(torch.matmul, in_dims=(1, 0), out_dims=1)(hidden, self.matrices)


class HeadUnderVmap(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: self.head(self.layer(row).relu()))(x)


class StackedEnsemble(nn.Module):
    """Weights of several networks in one parameter each, and their pattern on the meta device in a list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        networks = [self._network(width) for _ in range(3)]
        stacked, _ = torch.func.stack_module_state(networks)  # type: ignore[arg-type]
        self.weights = nn.ParameterDict({name.replace(".", "_"): each.detach() for name, each in stacked.items()})
        self.pattern = [self._network(width).to("meta")]

    @staticmethod
    def _network(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        weights = {name.replace("_", "."): each for name, each in self.weights.items()}
        each = torch.vmap(lambda own: torch.func.functional_call(self.pattern[0], own, (x,)))
        return each(weights).mean(0)


class RowsOfSeveralLengths(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, rows: list[Tensor]) -> Tensor:
        nested = torch.nested.nested_tensor(list(rows), layout=torch.jagged)
        return torch.stack([each.mean(0) for each in self.head(self.layer(nested).relu()).unbind()])


class Codes(nn.Module):
    """The nearest of codes that a buffer keeps."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.register_buffer("codes", torch.randn(number, width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        return self.head(hidden + (self.codes[torch.cdist(hidden, self.codes).argmin(-1)] - hidden).detach())


class Magnitudes(nn.Module):
    """A vector that scales the columns of another module's weight, as DoRA's does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor, base: nn.Linear) -> Tensor:
        return x @ (base.weight / base.weight.norm(dim=1, keepdim=True) * self.weight[:, None]).T


class Decomposed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.entry, self.base, self.scale = nn.Linear(5, width), nn.Linear(width, width), Magnitudes(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale(self.entry(x), self.base))


class MeanOfOne(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).relu()) + torch.mean(x.sum(), dim=0)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (MappedOverPlaces, drawn(2, 4, 5)),
        (StackedEnsemble, drawn(2, 5)),
        (RowsOfSeveralLengths, ([drawn(3, 5), drawn(2, 5)],)),
        (lambda width: Codes(width, 6), drawn(8, 5)),
        (Decomposed, drawn(4, 5)),
        (MeanOfOne, drawn(4, 5)),
    ],
)
def test_it_nests_at_once_and_is_extracted(kind: Callable[[int], nn.Module], inputs: Any) -> None:
    torch.manual_seed(0)
    nested = matta.nest(kind(4), kind(7), example=(inputs, None))
    call = (lambda module: module(*inputs)) if isinstance(inputs, tuple) else (lambda module: module(inputs))
    with torch.no_grad():
        assert torch.equal(call(matta.extract(nested).eval()), call(nested.student.eval()))


def test_more_codes_nest_as_well() -> None:
    torch.manual_seed(0)
    assert matta.nest(Codes(4, 5), Codes(4, 8), example=(drawn(8, 5), None)).plan.placements


class Counts(nn.Module):
    """Experts in a list, whose number the forward asserts."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.experts = number, nn.ModuleList(nn.Linear(5, 3) for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        assert len(self.experts) == self.number
        return torch.stack([each(x) for each in self.experts]).mean(0)


def test_what_the_forward_asserts_of_its_blocks_is_no_foreign_error() -> None:
    nested = matta.nest(Counts(2), Counts(3), layers={"experts": "first"}, example=(drawn(2, 5), None))
    assert {each.note for each in nested.plan.placements.values()} == {"not probed"}


def test_a_head_under_vmap_is_not_fused() -> None:
    torch.manual_seed(0)
    nested = matta.nest(HeadUnderVmap(4), HeadUnderVmap(7), example=(drawn(4, 5), None))
    batch = drawn(4, 5), torch.tensor([0, 1, 2, 0])
    fused, plain = (matta.CoTraining(nested, Classification(fused=each))(batch).loss for each in (None, False))
    torch.testing.assert_close(fused, plain)


class Padded(nn.Module):
    """torch's encoder, which in eval mode takes a faster path for rows with padding."""

    def __init__(self, feed_forward: int, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, feed_forward, batch_first=True)
        self.entry, self.body, self.head = nn.Linear(5, 8), nn.TransformerEncoder(layer, depth), nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.body(self.entry(x), src_key_padding_mask=padding)[:, 0])


PADDED = (drawn(2, 3, 5), torch.tensor([[False, False, True], [False, False, False]])), None


@pytest.mark.parametrize("depth", [1, 2])
def test_an_encoder_with_padding_is_started_from_its_student(depth: int) -> None:
    torch.manual_seed(0)
    student, ta, layers = Padded(6, 1), Padded(9, depth), {"body.layers": "first"} if depth > 1 else {}
    warm = matta.nest(student, ta, example=PADDED, layers=layers, warm_start=True)
    torch.testing.assert_close(warm.ta.eval()(*PADDED[0]), student.eval()(*PADDED[0]), rtol=1e-4, atol=1e-5)


def test_an_encoder_with_padding_is_ordered() -> None:
    torch.manual_seed(0)
    ordered = matta.order(Padded(9, 1), example=PADDED, data=[PADDED], importance="magnitude")
    assert ordered.eval()(*PADDED[0]).shape == (2, 3)
