"""Groups of axes that must be permuted together, so that a module's channels can be put in another order.

`matta.nesting.tracing` follows channels for what may grow; here they are followed once more, with axes that are
products (heads times head_dim) taken apart into their factors. The channels that meet (residual adds, norms, tied
and fused projections, the heads of queries, keys and values) are one group. A group whose channels an input, an
output or an operator fixes is left alone, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matta.errors import NestingError, TracingError
from matta.nesting.batches import Batch, split_labels
from matta.nesting.channels import Channels, Known, Product, Row, Rows
from matta.nesting.slicing import deep_copy
from matta.nesting.tracing import Atlas, result_tensors, run_followed, state_of

AxisKey = tuple[str, int]
"""The name of a parameter or buffer, and one of its axes."""


@final
@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that change places together.

    Legend: `members` gives, for each axis that has them, the indices of each channel, as (size, times); `seen` where
    activations show them: a module that sums over them, its argument and the axis of it, with indices alike.
    """

    size: int
    members: Mapping[AxisKey, Tensor]
    seen: tuple[tuple[str, int, int, Tensor], ...] = ()

    def index(self, key: AxisKey, length: int, order: Tensor) -> Tensor:
        """What picks the channels of an axis in a new order: `order` gives the old channel of each place."""
        index, positions = torch.arange(length), self.members[key]
        index[positions.flatten()] = positions[order].flatten()
        return index

    @property
    def name(self) -> str:
        """The first axis that has the channels."""
        first, axis = next(iter(self.members))
        return f"{first} (axis {axis})"


@final
@dataclass(frozen=True, kw_only=True)
class Left:
    """Channels that keep their places, the axes that have them, and why."""

    size: int
    members: tuple[AxisKey, ...]
    reason: str

    @property
    def name(self) -> str:
        """The first axis that has the channels."""
        return f"{self.members[0][0]} (axis {self.members[0][1]})"


def find_groups(module: nn.Module, example: Batch) -> tuple[list[Group], list[Left]]:
    """The groups of a module by one run of a copy of it, and what is left where it is.

    Groups are what the run shows; that the function stays the same is for the caller to check.

    Raises:
        TracingError: the module fails on the example, or cannot be copied.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [group], left = find_groups(mlp, (torch.zeros(5, 3), None))
        >>> list(group.members), [each.reason for each in left]
        ([('0.weight', 0), ('0.bias', 0), ('2.weight', 1)], ['the module takes them in', 'they are in its output'])
    """
    run = _follow(module, example)
    factors = _Factors(run.known.channels, run.known.products)
    rows = {(key, level): row for key, own in run.rows.items() for level, row in enumerate(factors.levels(own))}
    atlas = Atlas(run.known.channels, rows, [])  # type: ignore[arg-type]
    return _sorted_out(_gathered(atlas, run, factors, rows), _reasons(run, factors), run)


# --- the run --------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True)
class _Run:
    """What one run showed: rows of parameters and buffers, of what modules took and gave, and of the results."""

    known: Known
    rows: dict[AxisKey, Row]
    taken: dict[str, list[Rows]]
    given: dict[str, list[Rows]]
    outputs: list[Row]
    fixed: frozenset[str]  # buffers that are no statistics of a norm
    unreached: dict[str, tuple[int, ...]]


@final
class _Reached(TorchDispatchMode):
    """Notes which tensors operators are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the tensors, and call the operator."""
        self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def _follow(module: nn.Module, example: Batch) -> _Run:
    try:
        module = deep_copy(module).eval()
    except NestingError as error:
        raise TracingError(str(error)) from error
    known, reached = Known(keep_products=True), _Reached()
    owned = {name: known.label(tensor) for name, tensor in state_of(module)}
    taken: dict[str, list[Rows]] = {}
    given: dict[str, list[Rows]] = {}
    _watch(module, known, taken, given)
    with reached:
        result = run_followed(module, known, split_labels(example)[0])
    parameters = dict(module.named_parameters())
    statistics = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if isinstance(part, _NormBase)
        for name, _ in part.named_buffers(recurse=False)
    }
    return _Run(
        known=known,
        rows={(name, axis): row for name, rows in owned.items() for axis, row in rows.items()},
        taken=taken,
        given=given,
        outputs=[row for tensor in result_tensors(result) for row in known.rows(tensor).values()],
        fixed=frozenset(owned.keys() - parameters.keys() - statistics),
        unreached={n: tuple(p.shape) for n, p in parameters.items() if id(p) not in reached.seen and p.numel()},
    )


def _watch(module: nn.Module, known: Known, taken: dict[str, list[Rows]], given: dict[str, list[Rows]]) -> None:
    """Note what each module with weights of its own takes and gives the first time that it is called."""

    def enter(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            known.place.append(name)
            taken.setdefault(name, [known.rows(tensor) for tensor in tensors_taken(args, kwargs)])

        return hook

    def leave(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            known.place.pop()
            given.setdefault(name, [known.rows(tensor) for tensor in result_tensors(output)])

        return hook

    for name, part in module.named_modules():
        part.register_forward_pre_hook(enter(name), with_kwargs=True)
        part.register_forward_hook(leave(name))


def tensors_taken(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a module is called with, in order."""
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


# --- axes that are products ------------------------------------------------------------------------


@final
class _Factors:
    """For every channel of an axis that is a product, the channel of each factor; unequal readings are blamed."""

    def __init__(self, channels: Channels, products: Sequence[Product]) -> None:
        self._channels = channels
        while True:
            before = channels.classes(torch.arange(len(channels)))
            self._levels = self._table(products)
            if torch.equal(before, channels.classes(torch.arange(len(channels)))):
                break
        self.inside = self._fastest(products)

    def _table(self, products: Sequence[Product]) -> list[Row]:
        """By level, the factor of each class; what two products say of one class is tied."""
        most = max((len(each.factors) for each in products), default=0)
        levels = [torch.zeros(len(self._channels), dtype=torch.long) for _ in range(most)]
        for product in products:
            whole = self._channels.classes(product.whole)
            for level, factor in zip(levels, product.factors, strict=False):
                self._channels.tie(level[whole], factor)
                level[whole] = torch.where(whole != 0, factor, 0)
        return levels

    def levels(self, row: Row, depth: int = 4) -> list[Row]:
        """The rows that an axis consists of: itself, or those of its factors, which may be products again."""
        classes = self._channels.classes(row)
        found = [torch.where(classes != 0, level[classes], 0) for level in self._levels]
        found = [each for each in found if bool(each.any())]
        if not found or not depth:
            return [classes]
        plain = torch.where(found[0] == 0, classes, 0)
        deeper = [deep for each in found for deep in self.levels(each, depth - 1)]
        return [*deeper, plain] if bool(plain.any()) else deeper

    def _fastest(self, products: Sequence[Product]) -> Row:
        """The classes of fastest factors: what a head consists of."""
        found = [self.levels(product.factors[-1])[-1] for product in products]
        return torch.cat(found).unique() if found else torch.zeros(0, dtype=torch.long)


# --- groups ----------------------------------------------------------------------------------------


def _gathered(
    atlas: Atlas, run: _Run, factors: _Factors, rows: Mapping[tuple[AxisKey, int], Row]
) -> Iterator[tuple[Tensor, dict[AxisKey, Tensor | None], tuple[tuple[str, int, int, Tensor], ...]]]:
    """Each chain of channels: its classes, its indices on every axis (None where they are uneven), where it is seen."""
    members: dict[int, dict[AxisKey, Tensor | None]] = {}
    for (key, _), row in rows.items():
        for start, positions in _positions(atlas, row):
            own = members.setdefault(start, {})
            own[key] = None if key in own else positions
    seen: dict[int, list[tuple[str, int, int, Tensor]]] = {}
    for module, argument, axis, row in _consumed(run, factors):
        for start, positions in _positions(atlas, row):
            if positions is not None and any(name.rpartition(".")[0] == module for name, _ in members.get(start, {})):
                seen.setdefault(start, []).append((module, argument, axis, positions))
    classes = torch.arange(len(atlas.start))
    for start, own in members.items():
        yield classes[atlas.start == start], own, tuple(seen.get(start, ()))


def _positions(atlas: Atlas, row: Row) -> Iterator[tuple[int, Tensor | None]]:
    """The chains on an axis, with the indices of each of their channels as (size, times)."""
    known = (row != 0).nonzero().flatten()
    starts = atlas.start[row[known]]
    for start in starts.unique().tolist():
        indices = known[starts == start]
        places = atlas.place[row[indices]]
        size = int((atlas.start == start).sum())
        counts = torch.bincount(places, minlength=size)
        if bool((counts == counts[0]).all()):
            yield start, indices[places.argsort(stable=True)].view(size, -1)
        else:
            yield start, None


def _consumed(run: _Run, factors: _Factors) -> Iterator[tuple[str, int, int, Row]]:
    """Axes of what modules take that are not in what they give: they sum over them."""
    for module, arguments in run.taken.items():
        given = [factors.levels(row) for rows in run.given.get(module, []) for row in rows.values()]
        kept = torch.cat([level for levels in given for level in levels]) if given else torch.zeros(0).long()
        for argument, rows in enumerate(arguments):
            for axis, row in rows.items():
                for level in factors.levels(row):
                    yield module, argument, axis, torch.where(torch.isin(level, kept), 0, level)


_INSIDE: Final = "they are the channels inside of heads, whose order an encoding of positions may fix"
_APART: Final = "no other axis of a parameter has them"
_UNEVEN: Final = "they do not lie evenly on an axis"


def _reasons(run: _Run, factors: _Factors) -> list[tuple[Tensor, str]]:
    """Classes that stay in place, and why; the first reason counts."""
    channels = run.known.channels
    found = [(channels.inputs(), "the module takes them in")]
    found += [(row, "they are in its output") for row in run.outputs]
    found += [(row, problem) for row, problem in channels.problems]
    found += [(row, f"the buffer {name} has them") for (name, _), row in run.rows.items() if name in run.fixed]
    plain = [(torch.cat(factors.levels(row)) if len(row) else row, reason) for row, reason in found]
    return [*plain, (factors.inside, _INSIDE)]


def _sorted_out(
    gathered: Iterator[tuple[Tensor, dict[AxisKey, Tensor | None], tuple[tuple[str, int, int, Tensor], ...]]],
    reasons: Sequence[tuple[Tensor, str]],
    run: _Run,
) -> tuple[list[Group], list[Left]]:
    groups: list[Group] = []
    left: list[Left] = []
    for classes, members, seen in gathered:
        positions = {key: each for key, each in members.items() if each is not None}
        reason = next((text for fixed, text in reasons if bool(torch.isin(classes, fixed).any())), None)
        if reason is None and len(positions) < len(members):
            reason = _UNEVEN
        if reason is None and len(members) < 2:
            reason = _APART
        reason = reason or _unreached(members, run)
        if len(classes) > 1 and reason is None:
            groups.append(Group(size=len(classes), members=positions, seen=seen))
        elif len(classes) > 1 and reason is not None:
            left.append(Left(size=len(classes), members=tuple(members), reason=reason))
    return groups, left


def _unreached(members: Mapping[AxisKey, Tensor | None], run: _Run) -> str | None:
    """Why channels must stay for the sake of a parameter that took no part in the run."""
    lengths = {len(run.rows[key]) for key in members}
    for name, shape in run.unreached.items():
        if lengths & {size for size in shape if size > 1}:
            return f"{name} may have them too, but took no part in the run; pass an example that reaches it"
    return None
