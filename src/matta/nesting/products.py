"""How channels go through products of matrices, and what is made like them: what is summed over meets, and is gone."""

from __future__ import annotations

from torch import Tensor

from matta.nesting.channels import Call, Known, Row, Rows


def _matmul(known: Known, call: Call, first: Tensor, second: Tensor) -> Rows:
    """Products of two stacks of matrices, or of a matrix and a vector."""
    left, right = known.rows(first), known.rows(second)
    last, inner = first.ndim - 1, max(second.ndim - 2, 0)
    if last in left and inner in right:
        known.channels.tie(left[last], right[inner])
    known.sum_over((first, last), (second, inner))
    found = [(axis, row) for axis, row in left.items() if axis != last]
    found += [(axis, row) for axis, row in right.items() if axis != inner]
    return known.tie_all(found)


def product(known: Known, call: Call) -> None:
    """Products of matrices."""
    known.put(call.result, _matmul(known, call, *call.args[:2]))


def solved(known: Known, call: Call) -> None:
    """The solution of A·X = B, or of X·A = B: the columns of A become rows of X."""
    ndim, is_left = call["B"].ndim, call["left"]
    given, found = known.rows(call["self"]), list[tuple[int, Row]]()
    found += [pair for pair in known.rows(call["B"]).items() if pair[0] != (ndim - 2 if is_left else ndim - 1)]
    found += [(axis, row) for axis, row in given.items() if axis < ndim - 2]
    across = ndim - 1 if is_left else ndim - 2
    if across in given:
        found.append((2 * ndim - 3 - across, given[across]))
    known.put(call.result, known.tie_all(found))


def add_product(known: Known, call: Call) -> None:
    """Products of matrices, with something added."""
    rows = _matmul(known, call, *call.args[1:3])
    added = known.broadcast([call.args[0]], call.result)
    known.put(call.result, known.tie_all([*rows.items(), *added.items()]))


def trilinear(known: Known, call: Call) -> None:
    """A product of three tensors, each with new axes of length 1, of which some axes are summed."""
    found = []
    for tensor, expand in zip(call.args[:3], call.args[3:6], strict=True):
        axes = [axis for axis in range(tensor.ndim + len(expand)) if axis not in expand]
        found += [(axes[axis], row) for axis, row in known.rows(tensor).items()]
    summed = set(call["sumdim"])
    weight, axes = (
        call.args[1],
        [axis for axis in range(call.args[1].ndim + len(call.args[4])) if axis not in call.args[4]],
    )
    for axis in range(weight.ndim):
        if axes[axis] in summed:
            known.sum_over((weight, axis))
    rows = {axis: row for axis, row in known.tie_all(found).items() if axis not in summed}
    known.put(call.result, {axis - sum(gone < axis for gone in summed): row for axis, row in rows.items()})


def grouped_product(known: Known, call: Call) -> None:
    """Rows of data times the matrix of the group (the expert) that each belongs to."""
    data, weight = call.args[0], call.args[1]
    left, right = known.rows(data), known.rows(weight)
    assert (data.ndim, weight.ndim) == (2, 3)
    known.tie_all([(0, rows[1]) for rows in (left, right) if 1 in rows])
    known.sum_over((weight, 1))
    known.put(call.result, {1: right[2]} if 2 in right else {})


def distances(known: Known, call: Call) -> None:
    """Distances of the rows of two matrices, or of two stacks of them: what they are taken over is gone."""
    one, other = (known.rows(tensor) for tensor in call.args[:2])
    last = [tensor.ndim - 1 for tensor in call.args[:2]]
    if last[0] in one and last[1] in other:
        known.channels.tie(one[last[0]], other[last[1]])
    known.sum_over(*zip(call.args[:2], last, strict=True))
    ndim = call.result.ndim
    found = [(axis + ndim - last[0] - 1, row) for axis, row in one.items() if axis < last[0]]
    places = {axis: axis + ndim - last[1] - 1 + (axis == last[1] - 1) for axis in other if axis < last[1]}
    found += [(place, other[axis]) for axis, place in places.items()]
    known.put(call.result, known.tie_all(found))
