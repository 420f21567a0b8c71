"""Convolutions, pooling and shuffles of pixels: where the channels of axes in space and time go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from matta.nesting.channels import Call, Known, Row, Rows

_PLACES: Final = "each of them has several places"


def spatial(known: Known, call: Call) -> None:
    """Pooling and resampling work on the last one, two or three axes."""
    spatial = next((n for n in (1, 2, 3) if f"{n}d" in call.name), call.first.ndim - 2)
    first, rows = call.first.ndim - spatial, known.rows(call.first)
    kept = _in_place(call, call.bound.get("kernel_size"))
    known.put(call.result, {axis: row for axis, row in rows.items() if axis < first or axis - first in kept})


def _in_place(call: Call, kernel: Sequence[int] | None) -> set[int]:
    """Which axes in space or time an operator leaves as they are: its kernel has length one there, and moves by one."""
    if not kernel:
        return set()
    strides, padding = call.bound.get("stride") or kernel, call.bound.get("padding") or [0]
    settings = [list(each) * len(kernel) if len(each) == 1 else list(each) for each in (kernel, strides, padding)]
    return {axis for axis, each in enumerate(zip(*settings, strict=True)) if each == (1, 1, 0)}


def convolution(known: Known, call: Call) -> None:
    """Channels in and out; of several groups each axis of channels is a product, groups times their width."""
    data, weight = known.rows(call["input"]), known.rows(call["weight"])
    groups, transposed = call["groups"], call["transposed"]
    source, target = (0, 1) if transposed else (1, 0)
    rows: Rows = {0: data[0]} if 0 in data else {}
    if groups > 1:
        _in_groups(known, call, data, weight, rows)
    else:
        known.sum_over((call["weight"], source))
        known.tie_all([(0, side[axis]) for side, axis in ((data, 1), (weight, source)) if axis in side])
        rows |= known.tie_all([(1, row) for axis, row in weight.items() if axis == target])
    kept = _in_place(call, call["weight"].shape[2:])
    rows |= {axis: row for axis, row in data.items() if axis - 2 in kept}
    bias = known.rows(call["bias"]).items()
    known.put(call.result, known.tie_all([*rows.items(), *((1, row) for _, row in bias)]))


def _in_groups(known: Known, call: Call, data: Rows, weight: Rows, rows: Rows) -> None:
    """Tie the groups of channels in, of channels out and of the weight, and what is inside of them."""
    groups = call["groups"]
    problem = f"a convolution of {groups} groups mixes them group by group"
    if not call["transposed"]:
        known.sum_over((call["weight"], 1))
    outer, inner = _grouped(known, weight.get(0), groups, problem)
    given, within = _grouped(known, data.get(1), groups, problem)
    if call["transposed"]:
        known.tie_all([(0, row) for row in (inner, within) if row is not None])
        times = call["weight"].shape[1]
        if given is not None and times > 1:
            rows[1] = known.channels.merge((given, weight.get(1, known.channels.new(times))))
        elif given is not None:
            rows[1] = given
    else:
        known.tie_all([(0, row) for row in (weight.get(1), within) if row is not None])
        rows |= {1: weight[0]} if 0 in weight else {}
    known.tie_all([(0, row) for row in (outer, given) if row is not None])


def _grouped(known: Known, row: Row | None, groups: int, problem: str) -> tuple[Row | None, Row | None]:
    """The row of the groups, and the row inside of a group, where there is more than one channel in each."""
    if row is None or len(row) == groups:
        known.channels.units += [] if row is None else [(row, (groups, 1))]
        return row, None
    if not bool((row != 0).all()):
        known.blame([row], problem)
        return None, None
    outer, inner = known.channels.split(row, (groups, len(row) // groups))
    known.blame([row, outer], problem, "split")
    return outer, inner


def spread(known: Known, call: Call) -> None:
    """Channels, each of several places, put into their places: the channels are the slower factor."""
    axis, before, after = call.first.ndim - call.result.ndim + 1, known.rows(call.first), call.result.shape[1]
    rows = {0: before[0]} if 0 in before else {}
    row = before.get(max(axis, 1) if call.name == "col2im" else 1)
    if row is not None and len(row) % after == 0:
        rows |= {1: outer} if (outer := _grouped(known, row, after, _PLACES)[0]) is not None else {}
    known.put(call.result, rows)


def gathered(known: Known, call: Call) -> None:
    """Places gathered into channels: the channels become the slower factor."""
    before, times = known.rows(call.first), call.result.shape[1] // call.first.shape[1]
    rows = {0: before[0]} if 0 in before else {}
    if 1 in before:
        inner = known.channels.new(times)
        rows[1] = known.channels.merge((before[1], inner)) if times > 1 else before[1]
        known.blame([before[1]] if times > 1 else [], _PLACES, "split")
    known.put(call.result, rows)
