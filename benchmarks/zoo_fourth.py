"""Models of a fourth search outside of the zoo: adjoints, inner gradient steps, ensembles, codes, distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo_cases import Model
from zoo_handwritten import CLASSES, FEATURES, LENGTH, VOCABULARY


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _rows() -> Any:
    return _random(6, FEATURES), None


class _Adjoint(torch.autograd.Function):
    """Euler's steps; the backward integrates backwards, and asks for gradients by the weights that it was given."""

    @staticmethod
    def forward(ctx: Any, field: nn.Module, state: Tensor, *weights: Tensor) -> Tensor:
        for _ in range(3):
            state = state + field(state) / 3
        ctx.field = field
        ctx.save_for_backward(state, *weights)
        return state

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        state, *weights = ctx.saved_tensors
        sums = [torch.zeros_like(each) for each in weights]
        for _ in range(3):
            with torch.enable_grad():
                state = state.detach().requires_grad_()
                moved = ctx.field(state)
                slope, *slopes = torch.autograd.grad(moved, (state, *weights), gradient / 3)
            state, gradient = state - moved.detach() / 3, gradient + slope
            sums = [total + each for total, each in zip(sums, slopes, strict=True)]
        return None, gradient, *sums


class Equation(nn.Module):
    """A differential equation whose gradient an adjoint computes."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(FEATURES, dim), nn.Linear(dim, CLASSES)
        self.field = nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_Adjoint.apply(self.field, self.enter(x), *self.field.parameters()))


class StackedEnsemble(nn.Module):
    """Several networks in one tensor for each weight, run by `functional_call` and `vmap`."""

    def __init__(self, width: int, *, number: int = 3) -> None:
        super().__init__()

        def network() -> nn.Module:
            return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))

        stacked, _ = torch.func.stack_module_state([network() for _ in range(number)])  # type: ignore[arg-type]
        self.weights = nn.ParameterDict({name.replace(".", "_"): each.detach() for name, each in stacked.items()})
        self.pattern = [network().to("meta")]

    def forward(self, x: Tensor) -> Tensor:
        weights = {name.replace("_", "."): each for name, each in self.weights.items()}
        run = torch.vmap(lambda own: torch.func.functional_call(self.pattern[0], own, (x,)))
        return run(weights).mean(0)


class InnerStep(nn.Module):
    """A gradient step on known rows within the forward, as in meta-learning."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor, known: Tensor, target: Tensor) -> Tensor:
        weights = dict(self.net.named_parameters())
        with torch.enable_grad():
            loss = (torch.func.functional_call(self.net, weights, (known,)) - target).pow(2).mean()
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=self.training)
        moved = {name: each - 0.1 * slope for (name, each), slope in zip(weights.items(), slopes, strict=True)}
        return torch.func.functional_call(self.net, moved, (x,))


class CodesInABuffer(nn.Module):
    """The nearest code by `cdist`, of codes that a moving average would move."""

    def __init__(self, dim: int, *, number: int = 5) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(FEATURES, dim), nn.Linear(dim, CLASSES)
        self.register_buffer("codes", torch.randn(number, dim))

    def forward(self, x: Tensor) -> Tensor:
        found = self.enter(x)
        code = self.codes[torch.cdist(found, self.codes).argmin(-1)]
        return self.head(found + (code - found).detach())


class Forecast(nn.Module):
    """A forecast as a distribution, which torch takes for no tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(FEATURES, width, batch_first=True), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        mean, scale = self.head(self.body(x)[0]).unbind(-1)
        return torch.distributions.Independent(torch.distributions.Normal(mean, F.softplus(scale)), 1)


class TransducedActions(nn.Module):
    """HSTU: one matrix for gates, values, queries and keys, attention without softmax, a bias by distance."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.items, self.norm = heads, nn.Embedding(VOCABULARY, dim), nn.LayerNorm(dim)
        self.mixed = nn.Parameter(torch.randn(dim, 4 * heads * head_dim) / dim**0.5)
        self.near, self.leave = nn.Parameter(torch.zeros(2 * LENGTH - 1)), nn.Linear(heads * head_dim, dim)

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        x, places = self.items(history), torch.arange(history.shape[1])
        gate, *parts = F.silu(self.norm(x) @ self.mixed).chunk(4, -1)
        v, q, k = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        scores = F.silu(q @ k.mT + self.near[places[:, None] - places + LENGTH - 1]).tril() / len(places)
        made = (scores @ v).transpose(1, 2).flatten(2)
        x = x + self.leave(gate * F.layer_norm(made, made.shape[-1:]))
        return (x[:, -1] * self.items(item)).sum(-1)


def _model(
    name: str, grows: str, make: Callable[..., nn.Module], student: Any, ta: Any, batch: Any, source: str
) -> Model:
    return Model(name=name, source=source, grows=grows, make=make, student=student, ta=ta, batch=batch)


def _known_rows() -> Any:
    return (_random(4, FEATURES), _random(3, FEATURES).flip(0), _random(3, CLASSES)), None


def _histories() -> Any:
    ids = torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"history": ids, "item": ids[:, 0]}


_HAND = "hand-written"

MODELS: tuple[Model, ...] = (
    _model(
        "Equation with an adjoint",
        "hidden size, width",
        Equation,
        {"dim": 4, "width": 6},
        {"dim": 6, "width": 9},
        _rows,
        _HAND,
    ),
    _model("Ensemble by functional_call", "width", StackedEnsemble, {"width": 4}, {"width": 7}, _rows, _HAND),
    _model("Gradient step inside", "width", InnerStep, {"width": 4}, {"width": 7}, _known_rows, _HAND),
    _model("Codes in a buffer", "hidden size", CodesInABuffer, {"dim": 4}, {"dim": 7}, _rows, _HAND),
    _model(
        "Returns a distribution",
        "width",
        Forecast,
        {"width": 4},
        {"width": 7},
        lambda: (_random(2, LENGTH, FEATURES), None),
        _HAND,
    ),
    _model(
        "HSTU",
        "embedding, heads",
        TransducedActions,
        {"dim": 6, "heads": 2, "head_dim": 3},
        {"dim": 9, "heads": 3, "head_dim": 4},
        _histories,
        "rankers",
    ),
)
"""The most telling models that the fourth search found."""
