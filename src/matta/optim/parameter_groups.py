"""The groups of parameters that Shampoo takes: which are preconditioned, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from matta.errors import OptimizerError
from matta.optim.divided_parameters import is_sharded, sharding_group
from matta.optim.first_order import GRAFTS


def shampoo_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of a module that keep embeddings (and weights tied to one) out of the preconditioner.

    `Shampoo(module)` uses them by itself. Call this to give the groups their own settings; a table that is no
    `nn.Embedding` belongs in a group with `"precondition": False` too.

    Raises:
        OptimizerError: the module's weights are slices of another's, as those of a live Student are.

    Example:
        >>> module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
        >>> [(len(group["params"]), group["precondition"]) for group in shampoo_groups(module)]
        [(2, True), (1, False)]
    """
    if not all(parameter.is_leaf for parameter in module.parameters()):
        raise OptimizerError(
            "received a live Student, whose weights are slices of the TA's; expected the whole nesting"
        )
    tables = {
        id(parameter)
        for each in module.modules()
        if isinstance(each, nn.Embedding | nn.EmbeddingBag) or getattr(each, "sparse", False) is True
        for parameter in each.parameters(recurse=False)
    }
    embedded = [parameter for parameter in module.parameters() if id(parameter) in tables]
    others = [parameter for parameter in module.parameters() if id(parameter) not in tables]
    groups = [{"params": others, "precondition": True}, {"params": embedded, "precondition": False}]
    return [group for group in groups if group["params"]]


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """A convolution is the matrix (out, in * k * k)."""
    return parameter.shape[0], parameter.numel() // max(parameter.shape[0], 1)


def is_preconditioned(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter gets factors; else it gets the graft's own step."""
    if not group["precondition"] or parameter.ndim < 2 or parameter.numel() == 0:
        return False
    return max(matrix_shape(parameter)) <= group["max_dim"]


def refuse_sparse_matrices(group: Mapping[str, Any]) -> None:
    """Refuse to precondition by the gradient of some rows.

    Raises:
        OptimizerError: a gradient of a matrix that is preconditioned is sparse.
    """
    for parameter in group["params"]:
        if parameter.grad is not None and parameter.grad.is_sparse and is_preconditioned(parameter, group):
            raise OptimizerError(
                f"received a sparse gradient of a matrix that is preconditioned, of shape {tuple(parameter.shape)}; "
                f"expected the module in place of its parameters, which tells that it is an embedding, or a group of "
                f"its own with 'precondition': False"
            )


def distinct(params: Iterable[Any]) -> list[Any]:
    """Each parameter once, in order; entries may be (name, parameter)."""
    return list({id(each[1] if isinstance(each, tuple) else each): each for each in params}.values())


def expand_modules(params: nn.Module | Iterable[Any]) -> Iterable[Any]:
    """Parameters or groups as torch takes them: a module or a group's module becomes its `shampoo_groups`."""
    if isinstance(params, nn.Module):
        return shampoo_groups(params)
    expanded: list[Any] = []
    for entry in params:
        if isinstance(entry, dict) and isinstance(entry["params"], nn.Module):
            groups = shampoo_groups(entry["params"])
            expanded += [{**group, **entry, "params": group["params"]} for group in groups]
        else:
            expanded.append(entry)
    return expanded


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse settings out of range, and parameters that cannot be moved.

    Raises:
        OptimizerError: there are some.
    """
    for name, expected, holds in _RANGES:
        try:
            is_right = holds(group[name])
        except TypeError:
            is_right = False
        if not is_right:
            raise OptimizerError(f"{name}={group[name]!r} is out of range; expected {expected}")
    for name in _NOT_OURS:
        if group.get(name):
            raise OptimizerError(
                f"received {name}={group[name]!r} in a group, which Shampoo has not; expected {_INSTEAD}"
            )
    for parameter in group["params"]:
        if is_sharded(parameter):
            sharding_group(parameter)
        if parameter.is_complex():  # indices kept as a parameter never have a gradient: they stay as they are
            raise OptimizerError(f"received a parameter of type {parameter.dtype}; expected real floating point")


_NOT_OURS = ("maximize", "amsgrad", "momentum", "nesterov", "dampening")  # other optimizers', which change the steps
_INSTEAD = "betas for momentum, and the negative of the loss to maximize it"


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral)


_RANGES: Sequence[tuple[str, str, Callable[[Any], bool]]] = (
    ("lr", "a finite number from 0 up", lambda value: 0 <= value < math.inf),
    (
        "betas",
        "two numbers from 0 to below 1",
        lambda value: len(value) == 2 and 0 <= min(value) <= max(value) < 1,
    ),
    ("eps", "a number from 0 up", lambda value: value >= 0),
    ("weight_decay", "a number from 0 up", lambda value: value >= 0),
    ("graft", " or ".join(map(repr, GRAFTS)), lambda value: value in GRAFTS),
    ("block_size", "a whole number from 1 up", lambda value: _is_whole(value) and value >= 1),
    ("max_dim", "a whole number from 0 up", lambda value: _is_whole(value) and value >= 0),
    ("statistics_every", "a whole number from 1 up", lambda value: _is_whole(value) and value >= 1),
    ("refresh_every", "a whole number from 1 up", lambda value: _is_whole(value) and value >= 1),
    ("root_eps", "a number over 0", lambda value: value > 0),
    ("young_eps", "a number from 0 up", lambda value: value >= 0),
)
