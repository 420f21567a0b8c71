"""Which channels meet: the channels of a module's parameters followed through one forward pass.

Every index of every axis of every parameter gets a number, its *channel*. A run of the module under
a `TorchDispatchMode` passes the channels along: an operator that moves data moves them, one that
works element by element *ties* those that meet (a residual add, a product, a bias), and a product of
matrices ties those that it sums over. Only ATen operators are known, no class of module, so a layer
that nobody has heard of is followed like any other. An operator that is not known, or that splits a
row of channels over two axes, leaves a *problem* at them; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

Row = Tensor
"""Channels along one axis, one number for each index; 0 where none is known."""

Rows = dict[int, Row]
"""The rows of a tensor's axes, by axis; an axis of length 1, or an unknown one, has none."""


@final
class Channels:
    """A union-find over channels, worked on a row at a time.

    Example:
        >>> channels = Channels()
        >>> a, b = channels.new(2), channels.new(2)
        >>> _ = channels.tie(a, b.flip(0))
        >>> (channels.classes(b) == a.flip(0)).all().item()
        True
    """

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.long)
        self._is_input = torch.zeros(1, dtype=torch.bool)
        self.problems: list[tuple[Row, str]] = []
        self.cuts: list[Row] = []

    def __len__(self) -> int:
        """Number of channels, that of the unknown one included."""
        return len(self._parent)

    def new(self, size: int, *, is_input: bool = False) -> Row:
        """A row of `size` channels that were not there before."""
        row = torch.arange(len(self._parent), len(self._parent) + size)
        self._parent = torch.cat([self._parent, row])
        self._is_input = torch.cat([self._is_input, torch.full((size,), is_input)])
        return row

    def classes(self, row: Row) -> Row:
        """One number for each channel, the same for channels that are tied."""
        while True:
            above = self._parent[row]
            if torch.equal(above, row):
                return row
            self._parent[row] = self._parent[above]
            row = above

    def tie(self, first: Row, second: Row) -> Row:
        """Make the channels of two rows the same, index by index; the row of both."""
        both = (first != 0) & (second != 0)
        one, other = first[both], second[both]
        while True:
            one, other = self.classes(one), self.classes(other)
            apart = one != other
            if not apart.any():
                return torch.where(first != 0, first, second)
            low, high = torch.minimum(one, other)[apart], torch.maximum(one, other)[apart]
            self._parent.scatter_reduce_(0, high, low, "amin")

    def is_input(self, row: Row) -> bool:
        """Whether the row is an axis of a tensor that the module was called with."""
        return bool(self._is_input[row].any())

    def inputs(self) -> Row:
        """All channels of the axes of such tensors."""
        return self._is_input.nonzero().flatten()

    def blame(self, row: Row, problem: str) -> None:
        """Leave a problem at the channels of a row."""
        self.problems.append((row[row != 0], problem))


@final
class Flow(TorchDispatchMode):
    """Passes rows of channels along while it is active.

    Leave out the fused operators that torch takes for speed while this is active:
    `matta.tracing.trace` switches them off.
    """

    def __init__(self) -> None:
        super().__init__()
        self.channels = Channels()
        self.place: list[str] = []
        self._rows: Any = WeakTensorKeyDictionary()

    def label(self, tensor: Tensor, *, is_input: bool = False) -> Rows:
        """Give the axes of `tensor` channels of their own; of an input, all but the batch axis."""
        axes = range(1 if is_input else 0, tensor.ndim)
        rows = {axis: self.channels.new(tensor.shape[axis], is_input=is_input) for axis in axes}
        self.put(tensor, rows)
        return self.rows(tensor)

    def rows(self, tensor: object) -> Rows:
        """The rows known of a tensor."""
        return self._rows.get(tensor, {}) if isinstance(tensor, Tensor) else {}

    def put(self, tensor: Tensor, rows: Rows) -> None:
        """Take note of the rows of a tensor."""
        kept = {axis: row for axis, row in rows.items() if len(row) > 1 and bool((row != 0).any())}
        assert all(tensor.shape[axis] == len(row) for axis, row in kept.items())
        self._rows[tensor] = kept

    def blame(self, rows: Iterable[Row], problem: str) -> None:
        """Leave a problem, with the place where it arose, at rows of channels."""
        place = f" in {self.place[-1]!r}" if self.place and self.place[-1] else ""
        for row in rows:
            self.channels.blame(row, f"{problem}{place}")

    def lose(self, size: int, problem: str) -> Row:
        """A row in place of one that cannot be followed: what it meets has the problem as well."""
        row = self.channels.new(size)
        self.blame([row], problem)
        return row

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator, then its rule on the rows of its arguments."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shape = tensors[0].shape if tensors else torch.Size()  # some operators change it in place
        out = func(*args, **(kwargs or {}))
        if any(self.rows(tensor) for tensor in tensors):
            _rule(func)(self, _Call(func, args, kwargs or {}, out, shape))
        return out


@final
class _Call:
    """One call of an operator, its arguments by name."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, shape: torch.Size) -> None:
        self.func, self.args, self.kwargs, self.out, self.shape = func, args, kwargs, out, shape
        self.name = _name(func)
        schema = func._schema.arguments
        self.bound = {argument.name: argument.default_value for argument in schema}
        self.bound |= {argument.name: value for argument, value in zip(schema, args, strict=False)}
        self.bound |= kwargs

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    @property
    def first(self) -> Tensor:
        """The first argument that is a tensor."""
        return next(leaf for leaf in tree_leaves(self.args) if isinstance(leaf, Tensor))

    @property
    def result(self) -> Tensor:
        """The first result."""
        return next(leaf for leaf in tree_leaves(self.out) if isinstance(leaf, Tensor))

    @property
    def tensors(self) -> list[Tensor]:
        """All arguments that are tensors."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


_Rule = Callable[[Flow, _Call], None]


def _name(func: Any) -> str:
    return str(func._schema.name.split("::")[1]).removesuffix("_")


def _rule(func: Any) -> _Rule:
    """The rule of an operator: by its name, else by what torch says of its kind."""
    name = _name(func)
    if name in _RULES:
        return _RULES[name]
    arguments = {argument.name for argument in func._schema.arguments}
    if torch.Tag.pointwise in func.tags:
        return _pointwise
    if {"dim", "keepdim"} <= arguments or (name in _SUMS and "dim" not in arguments):
        return _reduce
    if "pool" in name or name.startswith("upsample"):
        return _spatial
    if name.endswith("_like") or name.startswith("new_"):
        return _forget
    return _unknown


def _tie_all(flow: Flow, found: Iterable[tuple[int, Row]]) -> Rows:
    """The rows of one tensor from those of several; what falls on the same axis is tied."""
    rows: Rows = {}
    for axis, row in found:
        rows[axis] = flow.channels.tie(rows[axis], row) if axis in rows else row
    return rows


def _broadcast(flow: Flow, tensors: Sequence[Tensor], out: Tensor) -> Rows:
    """The rows of an element-by-element result; axes align at the right, those of length 1 stretch."""
    found = []
    for tensor in tensors:
        offset = out.ndim - tensor.ndim
        rows = flow.rows(tensor).items()
        found += [(axis + offset, row) for axis, row in rows if len(row) == out.shape[axis + offset]]
    return _tie_all(flow, found)


def _pointwise(flow: Flow, call: _Call) -> None:
    flow.put(call.result, _broadcast(flow, call.tensors, call.result))


def _keep(flow: Flow, call: _Call) -> None:
    flow.put(call.result, flow.rows(call.first))


def _forget(flow: Flow, call: _Call) -> None:
    """Results that depend on sizes alone, or that no channel can be followed into."""


def _unknown(flow: Flow, call: _Call) -> None:
    rows = [row for tensor in call.tensors for row in flow.rows(tensor).values()]
    problem = f"matta cannot follow them through the operator {call.name!r}"
    flow.blame(rows, problem)
    for out in (leaf for leaf in tree_leaves(call.out) if isinstance(leaf, Tensor)):
        flow.put(out, {axis: flow.lose(size, problem) for axis, size in enumerate(out.shape)})


def _axes(dim: Any, ndim: int) -> set[int]:
    if dim is None or dim == []:
        return set(range(ndim))
    return {axis % ndim for axis in ([dim] if isinstance(dim, int) else dim)}


def _reduce(flow: Flow, call: _Call) -> None:
    """Axes that are summed (or averaged, or searched for a maximum) lose their rows."""
    ndim = call.first.ndim
    gone = _axes(call.bound.get("dim"), ndim)
    kept = [axis for axis in range(ndim) if axis not in gone]
    rows = flow.rows(call.first)
    for out in (leaf for leaf in tree_leaves(call.out) if isinstance(leaf, Tensor)):
        place = {axis: axis if call.bound.get("keepdim") else i for i, axis in enumerate(kept)}
        flow.put(out, {place[axis]: row for axis, row in rows.items() if axis in place})


def _spatial(flow: Flow, call: _Call) -> None:
    """Pooling and resampling work on the last one, two or three axes."""
    spatial = next((n for n in (1, 2, 3) if f"{n}d" in call.name), call.first.ndim - 2)
    rows = flow.rows(call.first)
    flow.put(call.result, {axis: row for axis, row in rows.items() if axis < call.first.ndim - spatial})


def _order(flow: Flow, call: _Call) -> None:
    """Sorting keeps the other axes; which channel ends where depends on the data."""
    dim = call["dim"] % call.first.ndim
    rows = flow.rows(call.first)
    problem = f"they are reordered by {call.name!r}"
    flow.blame([row for axis, row in rows.items() if axis == dim], problem)
    for out in call.out:
        lost = {dim: flow.lose(out.shape[dim], problem)} if dim in rows and out.ndim == call.first.ndim else {}
        flow.put(out, {axis: row for axis, row in rows.items() if axis != dim} | lost)


def _matmul(flow: Flow, call: _Call, first: Tensor, second: Tensor) -> Rows:
    """Products of two stacks of matrices, or of a matrix and a vector."""
    left, right = flow.rows(first), flow.rows(second)
    last, inner = first.ndim - 1, max(second.ndim - 2, 0)
    if last in left and inner in right:
        flow.channels.tie(left[last], right[inner])
    found = [(axis, row) for axis, row in left.items() if axis != last]
    found += [(axis, row) for axis, row in right.items() if axis != inner]
    return _tie_all(flow, found)


def _product(flow: Flow, call: _Call) -> None:
    flow.put(call.result, _matmul(flow, call, *call.args[:2]))


def _add_product(flow: Flow, call: _Call) -> None:
    rows = _matmul(flow, call, *call.args[1:3])
    added = _broadcast(flow, [call.args[0]], call.result)
    flow.put(call.result, _tie_all(flow, [*rows.items(), *added.items()]))


def _convolution(flow: Flow, call: _Call) -> None:
    """Channels in and out; a depthwise one ties them, another grouped one is refused."""
    data, weight = flow.rows(call["input"]), flow.rows(call["weight"])
    groups, transposed = call["groups"], call["transposed"]
    source, target = (0, 1) if transposed else (1, 0)
    in_channels = call["input"].shape[1]
    bias = flow.rows(call["bias"]).items()
    rows: Rows = {0: data[0]} if 0 in data else {}
    if groups == 1:
        _tie_all(flow, [(0, side[axis]) for side, axis in ((data, 1), (weight, source)) if axis in side])
        rows |= _tie_all(flow, [(1, row) for axis, row in weight.items() if axis == target])
    elif groups == in_channels == call.result.shape[1]:
        sides = [side[axis] for side, axis in ((data, 1), (weight, 0)) if axis in side]
        rows |= _tie_all(flow, [(1, row) for row in sides])
    else:
        involved = [row for side in (data, weight) for axis, row in side.items() if axis < 2]
        problem = f"a convolution of {groups} groups mixes them group by group"
        flow.blame(involved, problem)
        rows[1] = flow.lose(call.result.shape[1], problem)
    flow.put(call.result, _tie_all(flow, [*rows.items(), *((1, row) for _, row in bias)]))


def _row_norm(flow: Flow, call: _Call) -> None:
    """Layer norm and RMS norm: the weights belong to the last axes."""
    size = len(call["normalized_shape"])
    offset = call["input"].ndim - size
    found = [*flow.rows(call["input"]).items()]
    for name in ("weight", "bias"):
        found += [(axis + offset, row) for axis, row in flow.rows(call.bound.get(name)).items()]
    flow.put(call.result, _tie_all(flow, found))


def _channel_norm(flow: Flow, call: _Call) -> None:
    """Batch norm and group norm: weights and statistics belong to axis 1."""
    found = [*flow.rows(call["input"]).items()]
    for name in ("weight", "bias", "running_mean", "running_var"):
        found += [(1, row) for row in flow.rows(call.bound.get(name)).values()]
    flow.put(call.result, _tie_all(flow, found))


def _embedding(flow: Flow, call: _Call) -> None:
    rows = flow.rows(call["weight"])
    flow.put(call.result, {call.result.ndim - 1: rows[1]} if 1 in rows else {})


def _glu(flow: Flow, call: _Call) -> None:
    rows = dict(flow.rows(call["self"]))
    dim = call["dim"] % call["self"].ndim
    if dim in rows:
        first, second = rows[dim].chunk(2)
        rows[dim] = flow.channels.tie(first, second)
    flow.put(call.result, rows)


def _cat(flow: Flow, call: _Call) -> None:
    dim = call["dim"] % call.result.ndim
    parts = [tensor for tensor in call["tensors"] if tensor.ndim == call.result.ndim]
    found = [(axis, row) for part in parts for axis, row in flow.rows(part).items() if axis != dim]
    blank = [torch.zeros(part.shape[dim], dtype=torch.long) for part in parts]
    joined = torch.cat([flow.rows(part).get(dim, zeros) for part, zeros in zip(parts, blank, strict=True)])
    flow.put(call.result, {**_tie_all(flow, found), dim: joined})


def _stack(flow: Flow, call: _Call) -> None:
    dim = call["dim"] % call.result.ndim
    found = [pair for tensor in call["tensors"] for pair in flow.rows(tensor).items()]
    flow.put(call.result, {axis + (axis >= dim): row for axis, row in _tie_all(flow, found).items()})


def _copy(flow: Flow, call: _Call) -> None:
    flow.put(call.result, _broadcast(flow, [call["self"], call["src"]], call.result))


def _index_put(flow: Flow, call: _Call) -> None:
    """`x[rows] = values`: the axes behind the indexed ones meet."""
    target, values = call["self"], call["values"]
    offset = target.ndim - values.ndim
    known = range(len(call["indices"]), target.ndim)
    found = [pair for pair in flow.rows(target).items() if pair[0] in known]
    rows = ((axis + offset, row) for axis, row in flow.rows(values).items())
    found += [pair for pair in rows if pair[0] in known and len(pair[1]) == target.shape[pair[0]]]
    flow.put(call.result, _tie_all(flow, found))


def _scatter(flow: Flow, call: _Call) -> None:
    """What is added or written along `dim` meets what is there on the other axes."""
    dim = call["dim"] % call["self"].ndim
    sources = [call.bound.get(name) for name in ("self", "source", "src")]
    found = [pair for tensor in sources for pair in flow.rows(tensor).items() if pair[0] != dim]
    flow.put(call.result, _tie_all(flow, found))


def _gather(flow: Flow, call: _Call) -> None:
    dim = call["dim"] % call["self"].ndim
    rows = flow.rows(call["self"])
    problem, shape = "they are picked by data", call.result.shape
    flow.blame([row for axis, row in rows.items() if axis == dim], problem)
    lost = {dim: flow.lose(shape[dim], problem)} if dim in rows else {}
    flow.put(call.result, {axis: row[: shape[axis]] for axis, row in rows.items() if axis != dim} | lost)


def _move(flow: Flow, call: _Call) -> None:
    """Views, slices, transposes and lookups: each row is moved by the operator itself."""
    source = call.first
    results = [leaf for leaf in tree_leaves(call.out) if isinstance(leaf, Tensor)]
    landed: list[dict[int, list[tuple[int, Row]]]] = [{} for _ in results]
    for axis, row in flow.rows(source).items():
        shape = [1] * len(call.shape)
        shape[axis] = len(row)
        shadow = row.view(shape).expand(call.shape)
        for slot, moved in zip(landed, tree_leaves(_again(call, shadow)), strict=True):
            _land(flow, call, slot, axis, row, moved)
    for out, slot in zip(results, landed, strict=True):
        flow.put(out, {axis: _innermost(flow, call, rows) for axis, rows in slot.items()})


def _again(call: _Call, shadow: Tensor) -> Any:
    """The operator once more, on channels in place of data."""
    if call.name in ("view", "_unsafe_view", "reshape"):
        return shadow.reshape(call["size"])
    if call.name == "constant_pad_nd":
        return call.func(shadow, call["pad"], 0)
    rest, named = tree_map(_to_cpu, (call.args[1:], call.kwargs))
    return call.func(shadow, *rest, **named)


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _land(flow: Flow, call: _Call, slot: dict[int, list[tuple[int, Row]]], axis: int, row: Row, moved: Tensor) -> None:
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
            flow.channels.cuts.append(found)
        slot.setdefault(varying[0], []).append((axis, found))
    elif len(varying) > 1:
        sizes = " x ".join(str(moved.shape[i]) for i in varying)
        problem = f"{call.name!r} splits {len(row)} of them into {sizes}"
        flow.blame([row], problem)
        for i in varying:
            slot.setdefault(i, []).append((axis, flow.lose(whole[i], problem)))
    elif bool((moved != 0).any()):
        flow.blame([row], f"{call.name!r} picks one of {len(row)} of them by its index")


def _varies(moved: Tensor, axis: int) -> bool:
    """Whether different channels lie along an axis; padding (0) is none."""
    return bool(((moved != moved.amax(axis, keepdim=True)) & (moved != 0)).any())


def _innermost(flow: Flow, call: _Call, rows: list[tuple[int, Row]]) -> Row:
    """Where axes merge into one, its row is that of the innermost; the others cannot grow."""
    own = [row for _, row in sorted(rows) if not flow.channels.is_input(row[row != 0])]
    if not own:
        return rows[-1][1]
    flow.blame(own[:-1], f"{call.name!r} merges their axis with another")
    return own[-1]


_SUMS: Final = frozenset({"sum", "mean", "prod", "max", "min", "any", "all", "var", "std", "argmax", "norm"})

_RULES: Final[dict[str, _Rule]] = {
    **dict.fromkeys(
        "view _unsafe_view reshape _reshape_alias permute t transpose movedim expand slice select split "
        "split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk unbind squeeze unsqueeze "
        "alias detach index index_select flip roll repeat constant_pad_nd unfold diagonal narrow "
        "pixel_shuffle pixel_unshuffle channel_shuffle reflection_pad1d reflection_pad2d "
        "replication_pad1d replication_pad2d".split(),
        _move,
    ),
    **dict.fromkeys(
        "_softmax _log_softmax _safe_softmax clone _to_copy contiguous tril triu cumsum cumprod "
        "native_dropout lift lift_fresh logcumsumexp hardswish log_sigmoid_forward rrelu_with_noise "
        "bernoulli".split(),
        _keep,
    ),
    **dict.fromkeys("_local_scalar_dense nonzero multinomial bincount equal zero fill".split(), _forget),
    **dict.fromkeys(["mm", "bmm", "mv", "dot"], _product),
    **dict.fromkeys(["addmm", "baddbmm", "addmv", "_addmm_activation"], _add_product),
    **dict.fromkeys(["convolution", "_convolution"], _convolution),
    **dict.fromkeys(["native_layer_norm", "_fused_rms_norm"], _row_norm),
    **dict.fromkeys(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
        "cudnn_batch_norm miopen_batch_norm native_group_norm".split(),
        _channel_norm,
    ),
    **dict.fromkeys(["_embedding_bag", "_embedding_bag_forward_only", "embedding"], _embedding),
    **dict.fromkeys(["topk", "sort", "kthvalue"], _order),
    **dict.fromkeys(["_prelu_kernel", "_weight_norm_interface"], _pointwise),
    "glu": _glu,
    "cat": _cat,
    "stack": _stack,
    "copy": _copy,
    "index_put": _index_put,
    "gather": _gather,
    **dict.fromkeys("index_add index_copy scatter scatter_add scatter_reduce".split(), _scatter),
}
