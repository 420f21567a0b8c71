"""The index algebra of an axis: its positions are those of a block, and slices are what the positions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matta.errors import LayoutError
from matta.nesting.layout import Axis, Layout, Segment

PAIRS = st.tuples(st.integers(0, 4), st.integers(0, 3)).map(lambda pair: (pair[0], pair[0] + pair[1]))
SEGMENTS = st.lists(PAIRS, min_size=1, max_size=3).map(
    lambda pairs: Segment(tuple(s for s, _ in pairs), tuple(t for _, t in pairs))
)
AXES = st.lists(SEGMENTS, min_size=1, max_size=3).map(lambda segments: Axis(tuple(segments)))


@given(SEGMENTS)
def test_a_segment_is_the_leading_block_of_its_factors(segment: Segment) -> None:
    block = np.arange(segment.ta_size).reshape(segment.ta)[tuple(slice(s) for s in segment.student)]
    assert segment.positions() == block.ravel().tolist()
    assert segment.student_size == block.size


@given(AXES)
def test_the_positions_of_an_axis_rise_and_count(axis: Axis) -> None:
    positions = axis.positions()
    assert len(positions) == axis.student_size
    assert positions == sorted(set(positions))
    assert all(0 <= position < axis.ta_size for position in positions)


@given(AXES, st.integers(0, 2))
def test_taking_is_indexing_by_the_positions_on_any_axis(axis: Axis, dim: int) -> None:
    shape = [2, 3, 2]
    shape[dim] = axis.ta_size
    tensor = torch.arange(float(np.prod(shape))).reshape(shape)
    expected = tensor.index_select(dim, torch.tensor(axis.positions(), dtype=torch.long))
    assert torch.equal(axis.take(tensor, dim), expected)


@given(AXES)
def test_the_gradient_of_taking_lands_on_the_positions_alone(axis: Axis) -> None:
    tensor = torch.zeros(axis.ta_size, requires_grad=True)
    axis.take(tensor, 0).sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.nonzero().ravel().tolist() == axis.positions()


@given(AXES)
def test_a_widened_axis_is_all_of_it(axis: Axis) -> None:
    widened = Axis(tuple(segment.widened() for segment in axis.segments))
    assert widened.positions() == list(range(axis.ta_size))
    assert not widened.grows


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 4))
def test_equal_segments_are_a_concatenation_of_that_many(count: int, small: int, more: int) -> None:
    sizes = count * small, count * (small + more)
    equal = Layout.equal(count).resolve(0, *sizes)
    concat = Layout.concat([(small, small + more)] * count).resolve(0, *sizes)
    assert equal.positions() == concat.positions()


def test_a_plain_axis_is_a_view() -> None:
    tensor = torch.zeros(6, 4)
    assert Axis.plain(2, 6).take(tensor, 0).data_ptr() == tensor.data_ptr()
    assert Axis.plain(4, 4).take(tensor, 1) is tensor


def test_a_grown_axis_of_heads_is_what_numpy_cuts() -> None:
    axis = Layout.factors([(2, 3), (4, 5)]).resolve(0, 8, 15)
    assert axis.positions() == np.arange(15).reshape(3, 5)[:2, :4].ravel().tolist()


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis.plain(3, 3), ":"),
        (Axis.plain(3, 5), ":3"),
        (Layout.equal(3).resolve(0, 6, 9), "(3x:2 of 3)"),
        (Layout.concat([(2, 4), (5, 5)]).resolve(0, 7, 9), "(:2 of 4)+(5)"),
        (Layout.concat([(5, 5), (2, 4)]).resolve(0, 7, 9), ":7"),
    ],
)
def test_an_axis_is_written_as_its_slice_or_its_pieces(axis: Axis, expected: str) -> None:
    assert str(axis) == expected


def test_layouts_of_several_axes_are_joined() -> None:
    both = Layout.equal(3) | Layout.concat([(1, 2), (1, 1)], axis=1)
    assert both.resolve(0, 3, 6).positions() == [0, 2, 4]
    assert both.resolve(1, 2, 3).positions() == [0, 2]
    assert both.resolve(2, 2, 3).positions() == [0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segment((1, 2), (3,)), r"same length; received student=\(1, 2\), ta=\(3,\)"),
        (lambda: Segment((), ()), r"received student=\(\), ta=\(\)"),
        (lambda: Segment((4,), (3,)), r"\(4,\) do not fit into the TA's \(3,\).*at most as large; swap"),
        (lambda: Segment((-1,), (3,)), r"\(-1,\) do not fit"),
        (lambda: Layout.equal(0), r"cut into 0 segments; expected 1 or more"),
        (lambda: Layout.equal(3) | Layout.equal(2), r"axis 0 is laid out twice.*keep one"),
        (lambda: Layout.equal(3).resolve(0, 4, 6), r"4 long in the Student and 6 in the TA.*declare Layout.concat"),
        (lambda: Layout.concat([(2, 3)]).resolve(0, 4, 6), r"laid out as 2 of 3, but is 4 long .* and 6 in the TA"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        make()  # type: ignore[operator]
