"""How rows of channels go through an operator that only moves data, such as a view, a slice or a transpose."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from matta.nesting.channels import Call, Known, Row, common_factors


def move(known: Known, call: Call) -> None:
    """Views, slices, transposes and lookups: each row is moved by the operator itself."""
    source = call.first
    results = [leaf for leaf in tree_leaves(call.out) if isinstance(leaf, Tensor)]
    landed: list[dict[int, list[tuple[int, Row]]]] = [{} for _ in results]
    for axis, row in known.rows(source).items():
        shape = [1] * len(call.shape)
        shape[axis] = len(row)
        shadow = row.view(shape).expand(call.shape)
        for slot, moved in zip(landed, tree_leaves(_again(call, shadow)), strict=True):
            _land(known, call, slot, axis, row, moved)
    for out, slot in zip(results, landed, strict=True):
        known.put(out, {axis: _merged(known, call, axis, out.shape, rows) for axis, rows in slot.items()})


def view(known: Known, call: Call) -> None:
    """A view that splits axes and merges them at once is two: into the factors of both shapes, and out of them."""
    _note_units(known, call)
    factors = common_factors(call.shape, call.result.shape)
    if factors is None or factors in (tuple(call.shape), tuple(call.result.shape)):
        move(known, call)
        return
    plain = torch.ops.aten.view.default
    middle = call.first.new_empty(factors)
    move(known, Call(plain, (call.first, list(factors)), {}, middle, call.shape))
    move(known, Call(plain, (middle, list(call.result.shape)), {}, call.result, middle.shape))


def as_complex(known: Known, call: Call) -> None:
    """Pairs of numbers as one complex number, or back: the axis of the pairs comes or goes."""
    axes = min(call.first.ndim, call.result.ndim)
    known.put(call.result, {axis: row for axis, row in known.rows(call.first).items() if axis < axes})


def masked(known: Known, call: Call) -> None:
    """Rows picked by a mask, one after the other: their channels are the fastest factor of what comes out."""
    data, mask, size = call["self"], call["mask"], len(call.result)
    row = known.rows(data).get(data.ndim - 1)
    if row is not None and mask.shape[-1] == 1 and bool((row != 0).all()) and size:
        times = size // len(row)
        known.put(call.result, {0: known.channels.merge((known.channels.new(times), row)) if times > 1 else row})
    elif row is not None:
        problem = f"{call.name!r} picks some of {len(row)} of them"
        known.blame([row], problem)
        known.put(call.result, {0: known.lose(size, problem)})


def packed(known: Known, call: Call) -> None:
    """Sequences of several lengths as places one after the other, or back: two axes become one, or one two."""
    rows, more = known.rows(call.first), call.result.ndim - call.first.ndim
    known.put(call.result, {axis + more: row for axis, row in rows.items() if axis + more >= max(1, 1 + more)})


def _note_units(known: Known, call: Call) -> None:
    """Note rows that a view splits or merges with factors of 1: the heads of a model that has one head."""
    before, after = call.shape, call.result.shape
    for axis, row in known.rows(call.first).items():
        stretches = [_stretch(shape, prod(before[:axis]), len(row)) for shape in (before, after)]
        shorter, longer = sorted(stretches, key=len)
        units = longer[shorter.count(1) :]
        if shorter and 1 in units and prod(units) == len(row):
            known.channels.units.append((row, units))


def _stretch(shape: torch.Size, start: int, size: int) -> tuple[int, ...]:
    """The axes of a shape that lie between two places, with those of length 1 at its ends."""
    ends = [(prod(shape[:i]), prod(shape[: i + 1])) for i in range(len(shape))]
    return tuple(shape[i] for i, (low, high) in enumerate(ends) if start <= low and high <= start * size)


def _again(call: Call, shadow: Tensor) -> Any:
    """The operator once more, on channels in place of data."""
    if call.name in ("view", "_unsafe_view", "reshape"):
        return shadow.reshape(call["size"])
    if call.name == "constant_pad_nd":
        return call.func(shadow, call["pad"], 0)
    rest, named = tree_map(_to_cpu, (call.args[1:], call.kwargs))
    return call.func(shadow, *rest, **named)


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _land(known: Known, call: Call, slot: dict[int, list[tuple[int, Row]]], axis: int, row: Row, moved: Tensor) -> None:
    """Find the axis that a row has come to lie on."""
    whole = moved.shape
    for i, stride in enumerate(moved.stride()):
        moved = moved.narrow(i, 0, 1) if stride == 0 and moved.shape[i] > 1 else moved
    if not moved.numel():
        return  # nothing was there to be followed
    varying = [i for i in range(moved.ndim) if moved.shape[i] > 1 and _varies(moved, i)]
    if len(varying) == 1:
        others = [i for i in range(moved.ndim) if i != varying[0]]
        found = moved.amax(others) if others else moved
        if not torch.equal(found, row):
            known.channels.cuts.append(found)
            known.shaped.append((known.steps.place[-1][0], row))
        slot.setdefault(varying[0], []).append((axis, found))
    elif len(varying) > 1:
        known.shaped.append((known.steps.place[-1][0], row))
        sizes = " x ".join(str(moved.shape[i]) for i in varying)
        problem = f"{call.name!r} splits {len(row)} of them into {sizes}"
        flat = moved.amax([i for i in range(moved.ndim) if i not in varying]) if len(varying) < moved.ndim else moved
        is_product = torch.equal(flat.flatten(), row) and bool((row != 0).all())
        factors = known.channels.split(row, tuple(flat.shape)) if is_product else None
        known.blame([row, *(factors or ())[:-1]], problem, "split" if factors else "lost")
        for n, i in enumerate(varying):
            slot.setdefault(i, []).append((axis, factors[n] if factors else known.lose(whole[i], problem)))
    elif call.name in _STRETCHES and whole[axis] == 1 and bool((moved != 0).any()):
        known.channels.cuts.append(found := moved.flatten()[:1])
        slot.setdefault(axis, []).append((axis, found))  # a stretch of one channel, such as half of two
    elif (repeated := _beside(call, axis, row)) is not None:
        slot.setdefault(repeated, []).append((axis, row.expand(whole[repeated])))
    elif bool((moved != 0).any()):
        known.blame([row], f"{call.name!r} picks one of {len(row)} of them by its index", "picked")


_STRETCHES = frozenset("slice narrow split split_with_sizes chunk unsafe_split unsafe_split_with_sizes index".split())


def _beside(call: Call, axis: int, row: Row) -> int | None:
    """The axis into which a view merges an axis of one channel with the axis behind it, as of rotary halves."""
    before, after = call.shape, call.result.shape
    if call.name not in ("view", "_unsafe_view", "reshape") or len(row) > 1 or axis == 0 or axis + 1 >= len(before):
        return None
    starts = [i for i in range(len(after)) if prod(after[:i]) == prod(before[:axis]) and after[i] == before[axis + 1]]
    return starts[-1] if starts and before[axis + 1] > 1 and len(after) < len(before) else None


def _varies(moved: Tensor, axis: int) -> bool:
    """Whether different channels lie along an axis; padding (0) is none."""
    return bool(((moved != moved.amax(axis, keepdim=True)) & (moved != 0)).any())


def _merged(known: Known, call: Call, axis: int, shape: torch.Size, rows: list[tuple[int, Row]]) -> Row:
    """Where axes merge into one, its row is their product; those of an input count for nothing beside others."""
    own = sorted((source, row) for source, row in rows if not known.channels.is_input(row[row != 0]))
    own = [pair for pair in own if call.shape[pair[0]] > 1] or own  # one place, such as the last token, is no factor
    if len(own) < 2:
        return own[0][1] if own else rows[-1][1]
    problem = f"{call.name!r} merges their axis with another"
    factors = _factors_of(known, call, axis, shape, [source for source, _ in own])
    if factors is None:
        known.blame([row for _, row in own[:-1]], problem)
        return own[-1][1]
    whole = known.channels.merge(factors)
    known.blame(factors[:-1], problem, "split")
    return whole


def _factors_of(known: Known, call: Call, axis: int, shape: torch.Size, own: list[int]) -> tuple[Row, ...] | None:
    """The rows of the axes that a view merges into one, in order, with new ones where nothing is known of an axis."""
    before, after = call.shape, prod(shape[axis + 1 :])
    end = next((i for i in reversed(range(len(before) + 1)) if prod(before[i:]) >= after), 0)
    start = next((i for i in reversed(range(end + 1)) if prod(before[i:end]) >= shape[axis]), 0)
    exact = prod(before[end:]) == after and prod(before[start:end]) == shape[axis]
    if not exact or call.name not in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        return None
    rows, new = known.rows(call.first), known.channels.new
    factors = [rows[i] if i in own else new(before[i]) for i in range(start, end) if before[i] > 1]
    return tuple(factors) if all(bool((factor != 0).all()) for factor in factors) else None
