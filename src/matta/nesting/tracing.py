"""Which axes of a module's parameters must grow together, found by running it once.

`trace` runs a copy of the module on an example, follows every channel of every parameter
(`matta.nesting.operators`) and joins the channels that meet into *dimensions*: the width of a hidden layer, of a
residual stream, of one half of a gate. An axis of a parameter is then a row of *parts*, each of them
one dimension, and two models of one class can be laid over each other part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from matta.errors import NestingError, TracingError
from matta.nesting.batches import Batch, call, split_labels
from matta.nesting.channels import Channels, Known, Row, Rows
from matta.nesting.layout import Layout, Segment
from matta.nesting.operators import Flow
from matta.nesting.slicing import deep_copy


@final
@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of an axis: each index of `dimension`, `repeat` times in a row."""

    dimension: int
    size: int
    repeat: int = 1


@final
@dataclass(frozen=True, kw_only=True)
class Dimension:
    """Axes of parameters that have one width and must grow together.

    Legend: `size` is the width; `members` are (parameter or buffer, axis); `is_input` and `is_output`
    say that it is an axis of a tensor that the module receives or returns; `problem`, if any, is
    where its channels were lost from sight.
    """

    size: int
    members: tuple[tuple[str, int], ...]
    is_input: bool
    is_output: bool
    problem: str | None


@final
@dataclass(frozen=True, kw_only=True)
class Trace:
    """What `trace` found.

    Legend: `axes` gives the parts of each axis longer than 1, by (parameter or buffer, axis), of which
    `buffers` are no parameters;
    `outputs` the parts of what each module computes; `output_shapes` the shapes that the whole
    module returned.
    """

    dimensions: tuple[Dimension, ...]
    axes: Mapping[tuple[str, int], tuple[Part, ...]]
    buffers: frozenset[str]
    outputs: Mapping[str, tuple[Part, ...]]
    output_shapes: tuple[torch.Size, ...]

    def follows(self, parts: tuple[Part, ...]) -> bool:
        """Whether the channels of an axis stayed in sight."""
        return all(self.dimensions[part.dimension].problem is None for part in parts)

    def describe(self, dimension: int) -> str:
        """The axes of a dimension, for a message."""
        names = [f"{name} (axis {axis})" for name, axis in self.dimensions[dimension].members]
        return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def trace(module: nn.Module, example: Batch) -> Trace:
    """The dimensions of a module, from one run of a copy of it on an example batch.

    The run is in evaluation mode, without gradients; the module is left as it was. Any operator
    that matta knows is followed, whichever module it stands in. Where channels are lost from sight
    (a reshape into heads, a sort, an unknown operator), the dimension carries the `problem`.

    Raises:
        TracingError: the module fails on the example, or cannot be copied.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [part] = trace(mlp, (torch.zeros(5, 3), None)).outputs["0"]
        >>> trace(mlp, (torch.zeros(5, 3), None)).describe(part.dimension)
        '0.weight (axis 0), 0.bias (axis 0), 2.weight (axis 1)'
    """
    module, known = _copied(module).eval(), Known()
    owners: dict[str, Rows] = {}
    for name, tensor in state_of(module):
        owners[name] = known.label(tensor)
    seen: dict[str, Rows] = {}
    _watch(module, known, seen)
    result = run_followed(module, known, split_labels(example)[0])
    returned = result_tensors(result)
    outputs = [row for tensor in returned for row in known.rows(tensor).values()]
    rows = {(name, axis): row for name, found in owners.items() for axis, row in found.items()}
    atlas = Atlas(known.channels, rows, outputs)
    own = {name: _own_channels(layer, name, rows, seen) for name, layer in module.named_modules()}
    return Trace(
        dimensions=atlas.dimensions(),
        axes={key: atlas.parts(row) for key, row in rows.items()},
        buffers=frozenset(name for name, _ in module.named_buffers()),
        outputs={name: atlas.parts(row) for name, row in atlas.own_axes(seen, own)},
        output_shapes=tuple(tensor.shape for tensor in returned),
    )


def _copied(module: nn.Module) -> nn.Module:
    try:
        return deep_copy(module)
    except NestingError as error:
        raise TracingError(str(error)) from error


def trace_layouts(student: nn.Module, ta: nn.Module, example: Batch) -> dict[str, Layout]:
    """The layouts by which `matta.nest` lays a Student into a wider module of the same class.

    Both are traced on the example. The layout of a growing axis says what it consists of: one plain
    stretch (1), or several parts (embeddings one after the other, halves of a gate, a flattened
    image). Left out are parameters that only one of the two has, that do not grow, or whose channels
    are lost from sight, such as attention heads: `matta.nest` knows common ones by itself, and says
    which others to declare.

    Raises:
        TracingError: a module fails on the example, or an axis has other parts in the one than in
            the other.

    Example:
        >>> def model(width):
        ...     return nn.Sequential(nn.Conv1d(1, width, 1), nn.Flatten(), nn.Linear(2 * width, 1))
        >>> trace_layouts(model(2), model(3), (torch.zeros(1, 1, 2), None))["2.weight"].axes
        {1: (Segment(student=(2, 2), ta=(3, 2)),)}
    """
    return match_layouts(trace(student, example), trace(ta, example))


def match_layouts(student: Trace, ta: Trace) -> dict[str, Layout]:
    """The layouts of one traced module in another: see `trace_layouts`.

    Raises:
        TracingError: an axis has other parts in the one than in the other.
    """
    layouts: dict[str, Layout] = {}
    for name, wider in _growing(student, ta).items():
        both = {axis: (student.axes.get((name, axis), ()), ta.axes[name, axis]) for axis in wider}
        if all(parts and student.follows(parts) and ta.follows(others) for parts, others in both.values()):
            axes = {axis: _segments(f"axis {axis} of {name}", *pair) for axis, pair in both.items()}
            layouts[name] = Layout(axes)
    return layouts


def _growing(student: Trace, ta: Trace) -> dict[str, list[int]]:
    """The axes that differ in length, of each parameter that both have."""
    found: dict[str, list[int]] = {}
    shared = {name for name, _ in student.axes} - student.buffers
    for (name, axis), parts in ta.axes.items():
        if name in shared and _length(parts) != (_length(student.axes.get((name, axis), ())) or 1):
            found.setdefault(name, []).append(axis)
    return found


def _length(parts: tuple[Part, ...]) -> int:
    return sum(part.size * part.repeat for part in parts)


def _segments(axis: str, student: tuple[Part, ...], ta: tuple[Part, ...]) -> int | tuple[Segment, ...]:
    if len(student) == len(ta) == student[0].repeat == ta[0].repeat == 1:
        return 1
    fits = len(student) == len(ta) and all(
        one.size <= other.size and one.repeat == other.repeat for one, other in zip(student, ta, strict=True)
    )
    if not fits:
        raise TracingError(
            f"{axis} consists of {_sizes(student)} in the Student, but of {_sizes(ta)} in the TA; expected as "
            f"many parts in both, each at least as large in the TA; declare its layout by hand in `layouts`"
        )
    return tuple(
        Segment((one.size,), (other.size,))
        if one.repeat == 1
        else Segment((one.size, one.repeat), (other.size, other.repeat))
        for one, other in zip(student, ta, strict=True)
    )


def _sizes(parts: tuple[Part, ...]) -> str:
    sizes = [str(part.size) if part.repeat == 1 else f"{part.size} x {part.repeat}" for part in parts]
    return " + ".join(sizes[:8]) + (f" + {len(sizes) - 8} more" if len(sizes) > 8 else "")


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and those buffers that hold numbers; each once, by its first name."""
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point())


def _watch(module: nn.Module, known: Known, seen: dict[str, Rows]) -> None:
    """Note where the run is, and what each module returns the first time that it is called."""

    def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            known.place.pop()
            tensors = result_tensors(output)
            if tensors:
                seen.setdefault(name, known.rows(tensors[0]))

        return hook

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, __: known.place.append(name)

    for name, layer in module.named_modules():
        layer.register_forward_pre_hook(enter(name))
        layer.register_forward_hook(leave(name))


def result_tensors(output: Any) -> list[Tensor]:
    """The logits of what a module returned; all tensors in it where it has none."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = tree_leaves(output if logits is None else logits)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Switch off fused kernels that a Flow cannot look into."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.enabled = onednn


def run_followed(module: nn.Module, known: Known, inputs: Any) -> Any:
    """What a module returns on the inputs of a batch, with channels followed from all that is labelled.

    Raises:
        TracingError: the module fails on them.
    """
    floats = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    for tensor in floats:
        known.label(tensor, is_input=True)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_plain_kernels())
        stack.enter_context(Flow(known))
        try:
            return call(module, inputs)
        except Exception as error:
            raise TracingError(
                f"the module fails on the example with {type(error).__name__}: {error}; "
                f"pass as `example` a batch such as it trains on"
            ) from error


def _own_channels(layer: nn.Module, name: str, rows: dict[tuple[str, int], Row], seen: dict[str, Rows]) -> list[Row]:
    """The rows of a layer's own parameters; a norm that has none notes its width all the same."""
    prefix = f"{name}." if name else ""
    own = {prefix + key for key, _ in layer.named_parameters(recurse=False)}
    if own or not isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return [row for (key, _), row in rows.items() if key in own]
    found = seen.get(name, {})
    return [found[max(found)]] if found else []


@final
class Atlas:
    """Dimensions, as chains of channel classes that follow one another on every axis that has them.

    `start` gives the first class of the chain that a class is in, and `place` where in it that class stands.
    """

    def __init__(self, channels: Channels, rows: dict[tuple[str, int], Row], outputs: list[Row]) -> None:
        self._channels, self._rows, self._outputs = channels, rows, outputs
        self._count = len(channels)
        self.start, self.place = self._chains()
        everything = [self._classes(row) for row in rows.values()]
        known = self.start[torch.cat(everything).unique()] if everything else self.start[:0]
        starts, sizes = known.unique(return_counts=True)
        self._sizes = sizes.tolist()
        self._index = torch.full((self._count,), -1)
        self._index[starts] = torch.arange(len(starts))

    def _classes(self, row: Row) -> Row:
        return self._channels.classes(row)

    def _chains(self) -> tuple[Row, Row]:
        """For each class the first of its chain, and its place in it."""
        steps, heads, tails = self._steps()
        before = torch.arange(self._count)
        source, target = steps[:, 0], steps[:, 1]
        follows = torch.bincount(source, minlength=self._count)
        leads = torch.bincount(target, minlength=self._count)
        one_way = (follows[source] == 1) & (leads[target] == 1) & ~tails[source] & ~heads[target]
        before[target[one_way]] = source[one_way]
        place = (before != torch.arange(self._count)).long()
        while not torch.equal(before, before[before]):
            place = place + place[before]
            before = before[before]
        return before, place

    def _steps(self) -> tuple[Tensor, Row, Row]:
        """Pairs of classes that follow each other on some axis, and those where an axis is cut."""
        heads = torch.zeros(self._count, dtype=torch.bool)
        tails, pairs = heads.clone(), []
        for row in [*self._rows.values(), *self._channels.cuts]:
            values, counts = torch.unique_consecutive(self._classes(row), return_counts=True)
            heads[values[0]], tails[values[-1]] = True, True
            even = (counts[:-1] == counts[1:]) & (values[1:] != 0) & (values[:-1] != 0)
            heads[values[1:][~even]], tails[values[:-1][~even]] = True, True
            pairs.append(torch.stack([values[:-1], values[1:]], dim=1)[even])
        joined = torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.long)
        return joined.unique(dim=0), heads, tails

    def parts(self, row: Row) -> tuple[Part, ...]:
        """An axis as parts; channels that are not known are left out."""
        values, counts = torch.unique_consecutive(self._classes(row[row != 0]), return_counts=True)
        firsts = (self.place[values] == 0).nonzero().flatten().tolist()
        found = []
        for first in firsts:
            dimension = int(self._index[self.start[values[first]]])
            size, repeat = self._sizes[dimension], int(counts[first])
            found.append(Part(dimension=dimension, size=size, repeat=repeat))
        return tuple(found)

    def dimensions(self) -> tuple[Dimension, ...]:
        members: list[list[tuple[str, int]]] = [[] for _ in self._sizes]
        for key, row in self._rows.items():
            for dimension in self._of(row):
                members[dimension].append(key)
        outputs = {dimension for row in self._outputs for dimension in self._of(row)}
        problems: dict[int, str] = {}
        for row, problem in self._channels.problems:
            for dimension in self._of(row):
                problems.setdefault(dimension, problem)
        inputs = set(self._of(self._channels.inputs()))
        return tuple(
            Dimension(
                size=size,
                members=tuple(members[i]),
                is_input=i in inputs,
                is_output=i in outputs,
                problem=problems.get(i),
            )
            for i, size in enumerate(self._sizes)
        )

    def _of(self, row: Row) -> list[int]:
        """The dimensions on an axis, each once."""
        found: list[int] = self._index[self.start[self._classes(row[row != 0])]].unique().tolist()
        return [dimension for dimension in found if dimension >= 0]  # an input's own axes are none

    def own_axes(self, seen: dict[str, Rows], own: dict[str, list[Row]]) -> Iterator[tuple[str, Row]]:
        """Of each module's output the one axis that its own parameters span, if there is just one."""
        for name, rows in seen.items():
            mine = {dimension for row in own[name] for dimension in self._of(row)}
            axes = [row for row in rows.values() if mine & set(self._of(row))]
            if len(axes) == 1:
                yield name, axes[0]
