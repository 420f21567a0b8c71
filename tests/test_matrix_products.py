"""FLOPs and activations of modules whose products hide in kernels, against the formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import matta
from matta.choosing.matrix_products import count_flops
from matta.choosing.measuring import measure_cost

ROWS, LENGTH, WIDTH = 3, 6, 16
X = torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(ROWS, WIDTH, 7, 7, generator=torch.Generator().manual_seed(1))


def linear(inputs: int, outputs: int, positions: int = LENGTH) -> int:
    return 2 * inputs * outputs * positions


ATTENTION = 2 * 2 * LENGTH * LENGTH * WIDTH
PROJECTIONS = 4 * linear(WIDTH, WIDTH)


class Heads(nn.Module):
    def __init__(self, keys: int = 4, **options: Any) -> None:
        super().__init__()
        self.keys, self.options = keys, options
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, 4 * keys), nn.Linear(WIDTH, 4 * keys)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        found = scaled_dot_product_attention(q, k, v, enable_gqa=self.keys < 4, **self.options)
        return self.o(found.transpose(1, 2).flatten(2))


class Called(nn.Module):
    """A layer, and how it is called."""

    def __init__(self, layer: nn.Module, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.layer, x)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True)


def recurrent(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    return Called(kind(WIDTH, 8, batch_first=True, **options), lambda layer, x: layer(x)[0])


GATES = LENGTH * (linear(WIDTH, 8, 1) + linear(8, 8, 1))
ENCODER = PROJECTIONS + ATTENTION + 2 * linear(WIDTH, 32)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "attention": (Heads, X, PROJECTIONS + ATTENTION),
    "causal": (lambda: Heads(is_causal=True), X, PROJECTIONS + ATTENTION),
    "masked": (lambda: Heads(attn_mask=torch.zeros(LENGTH, LENGTH)), X, PROJECTIONS + ATTENTION),
    "grouped queries": (lambda: Heads(2), X, 2 * linear(WIDTH, WIDTH) + 2 * linear(WIDTH, 8) + ATTENTION),
    "torch's attention": (
        lambda: Called(nn.MultiheadAttention(WIDTH, 4, batch_first=True), lambda layer, x: layer(x, x, x)[0]),
        X,
        PROJECTIONS + ATTENTION,
    ),
    "torch's encoder layer": (encoder, X, ENCODER),
    "torch's encoder": (lambda: nn.TransformerEncoder(encoder(), 2), X, 2 * ENCODER),
    "LSTM": (lambda: recurrent(nn.LSTM), X, 4 * GATES),
    "LSTM both ways": (lambda: recurrent(nn.LSTM, bidirectional=True), X, 8 * GATES),
    "GRU": (lambda: recurrent(nn.GRU), X, 3 * GATES),
    "bilinear": (
        lambda: Called(nn.Bilinear(WIDTH, WIDTH, 4), lambda layer, x: layer(x, x)),
        X,
        4 * linear(WIDTH, WIDTH) + linear(WIDTH, 4),
    ),
    "a vector of weights": (lambda: Called(nn.Linear(WIDTH, 1), lambda layer, x: x @ layer.weight[0]), X, 6 * 32),
    "depthwise": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, padding=1), IMAGES, 2 * WIDTH * 9 * 49),
    "groups": (lambda: nn.Conv2d(WIDTH, 8, 3, groups=4, stride=2), IMAGES, 2 * 8 * 4 * 9 * 9),
    "bags": (lambda: nn.EmbeddingBag(WIDTH, 4), torch.zeros(ROWS, LENGTH, dtype=torch.int64), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_formula_whatever_kernel_computes_them(name: str) -> None:
    build, x, expected = CASES[name]
    assert measure_cost(build().eval(), x).flops == expected


def test_products_by_groups_of_rows_meet_one_matrix_each() -> None:
    rows, experts = torch.ones(6, 16, dtype=torch.bfloat16), torch.ones(3, 16, 8, dtype=torch.bfloat16)
    ends = torch.tensor([1, 3, 6], dtype=torch.int32)
    assert count_flops(nn.Identity(), lambda: torch._grouped_mm(rows, experts, offs=ends)) == linear(16, 8, 6)


def test_each_size_of_a_transformer_counts_its_attention() -> None:
    class Decoder(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(WIDTH, 4, hidden, batch_first=True) for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    nested = matta.nest(Decoder(8), Decoder(32), example=(X, None))
    family = matta.family(nested, evaluate=lambda module: 0.0, example=(X, None), calls=0, progress=False)
    hidden = {"narrow": 8, "wide": 32}
    assert len(family.sizes) == 4
    for size in family.sizes:
        widths = [hidden[choice] for choice in size.layers.values()]
        assert size.flops == 2 * (PROJECTIONS + ATTENTION) + sum(2 * linear(WIDTH, width) for width in widths)


def test_activations_inside_of_a_fast_kernel_are_seen() -> None:
    held = LENGTH * WIDTH * 4
    assert measure_cost(encoder().eval(), X).activation_bytes >= 4 * held, "queries, keys, values and their inputs"
    assert measure_cost(recurrent(nn.LSTM).eval(), X).activation_bytes >= LENGTH * 4 * 8 * 4, "the gates of all steps"
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled


def test_what_a_forward_holds_for_any_batch_is_no_activation_of_an_example() -> None:
    class Composed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.up.weight @ self.down.weight)

    for count in (2, 7):
        cost = measure_cost(Composed(), torch.ones(count, 32))
        assert (cost.bytes, cost.activation_bytes) == (4 * (2 * 32 * 2 + 32 * 32), 4 * 32)
    cost = measure_cost(Composed(), torch.ones(1, 32))
    assert (cost.bytes, cost.activation_bytes) == (4 * 2 * 32 * 2, 4 * (32 * 32 + 32)), "one example cannot tell them"


def test_examples_are_counted_by_their_labels_where_ids_come_first() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags, self.out = nn.EmbeddingBag(30, 8), nn.Linear(8, 2)

        def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
            return self.out(self.bags(ids, offsets))

    inputs = torch.arange(12), torch.tensor([0, 2, 5])
    cost = measure_cost(Bags().eval(), inputs, torch.zeros(3))
    assert cost.flops == linear(8, 2, 1) and cost.activation_bytes >= 4 * (8 + 2)
    assert measure_cost(Bags().eval(), inputs).flops == 3 * linear(8, 2, 1) / 12
    assert measure_cost(nn.Linear(8, 2), torch.ones(4, 8), torch.zeros(4, 5)).flops == linear(8, 2, 1)
    assert measure_cost(nn.Linear(8, 2), torch.ones(4, 8), torch.zeros(20)).flops == linear(8, 2, 1), "flattened"
