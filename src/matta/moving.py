"""Rows of channels through an operator that moves data: the operator itself moves them, as it would the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from matta.calls import Call
from matta.channels import Known, Row


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
        known.put(out, {axis: _innermost(known, call, rows) for axis, rows in slot.items()})


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
        slot.setdefault(varying[0], []).append((axis, found))
    elif len(varying) > 1:
        sizes = " x ".join(str(moved.shape[i]) for i in varying)
        problem = f"{call.name!r} splits {len(row)} of them into {sizes}"
        known.blame([row], problem)
        for i in varying:
            slot.setdefault(i, []).append((axis, known.lose(whole[i], problem)))
    elif bool((moved != 0).any()):
        known.blame([row], f"{call.name!r} picks one of {len(row)} of them by its index")


def _varies(moved: Tensor, axis: int) -> bool:
    """Whether different channels lie along an axis; padding (0) is none."""
    return bool(((moved != moved.amax(axis, keepdim=True)) & (moved != 0)).any())


def _innermost(known: Known, call: Call, rows: list[tuple[int, Row]]) -> Row:
    """Where axes merge into one, its row is that of the innermost; the others cannot grow."""
    own = [row for _, row in sorted(rows) if not known.channels.is_input(row[row != 0])]
    if not own:
        return rows[-1][1]
    known.blame(own[:-1], f"{call.name!r} merges their axis with another")
    return own[-1]
