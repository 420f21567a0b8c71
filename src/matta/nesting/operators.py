"""Which channels meet: the channels of a module's parameters followed through one forward pass.

Every index of every axis of every parameter gets a number, its *channel*. A run of the module under
a `TorchDispatchMode` passes the channels along: an operator that moves data moves them, one that
works element by element *ties* those that meet (a residual add, a product, a bias), and a product of
matrices ties those that it sums over. Only ATen operators are known, no class of module, so a layer
that nobody has heard of is followed like any other. An operator that is not known, or that splits a
row of channels over two axes, leaves a *problem* at them; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matta.nesting.channels import Call, Known, Noted, Rows, name_of
from matta.nesting.convolutions import convolution, gathered, spatial, spread
from matta.nesting.higher_order import opened, takes_functions, uncompiled
from matta.nesting.moved_channels import as_complex, masked, move, packed, view
from matta.nesting.operator_kinds import is_pointwise, is_whole, may_fill
from matta.nesting.products import add_product, distances, grouped_product, product, solved, trilinear


@final
class Flow(TorchDispatchMode):
    """Passes rows of channels along while it is active, from what is known of its arguments to its results.

    Leave out the fused operators that torch takes for speed while this is active: `plain_kernels` switches them off.
    """

    supports_higher_order_operators = True

    def __init__(self, known: Known) -> None:
        super().__init__()
        self.known = known

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator, then its rule on the rows of its arguments."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if takes_functions(func):
            made, is_seen = opened(self, func, args, kwargs or {})
            if not is_seen:
                self.known.lose_all(tensors, made, _untold(func.name()))
            return made
        self.known.read.update(map(id, tensors))
        shape = tensors[0].shape if tensors else torch.Size()  # some operators change it in place
        step = self.known.steps.next(name_of(func))
        taken = tuple(map(self.known.rows, tensors))
        out = func(*args, **(kwargs or {}))
        if any(taken):
            call = Call(func, args, kwargs or {}, out, shape)
            try:
                _rule(func)(self.known, call)
            except (AssertionError, IndexError, KeyError, RuntimeError):  # a form of it that its rule does not know
                _unknown(self.known, call)
            if is_whole(func) or may_fill(func):
                made = tuple(self.known.rows(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
                self.known.noted[step] = Noted(taken, made)
            if all(map(self.known.is_weight, tensors)):
                self.known.mark_weights(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        elif name_of(func) in _RANGES:  # of which frequencies are made: their sines and cosines are the same channels
            self.known.label(out, is_input=True)
        return out


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Switch off fused kernels, which a dispatch mode cannot look into."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH), uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.enabled = onednn


_Rule = Callable[[Known, Call], None]


def _rule(func: Any) -> _Rule:
    """The rule of an operator: by its name, else by what torch says of its kind."""
    name = name_of(func)
    if name in _RULES:
        return _RULES[name]
    arguments = {argument.name for argument in func._schema.arguments}
    if is_pointwise(func):
        return _pointwise
    if {"dim", "keepdim"} <= arguments or (name in _SUMS and "dim" not in arguments):
        return _reduce
    if "pool" in name or name.startswith("upsample"):
        return spatial
    if name.endswith("_like") or name.startswith("new_"):
        return _forget
    return _unknown


def _pointwise(known: Known, call: Call) -> None:
    known.put(call.result, known.broadcast(call.tensors, call.result))


def _keep(known: Known, call: Call) -> None:
    known.put(call.result, known.rows(call.first))


def _forget(known: Known, call: Call) -> None:
    """Results that depend on sizes alone, or that no channel can be followed into."""


def _unknown(known: Known, call: Call) -> None:
    known.lose_all(call.tensors, call.out, _untold(call.name))


def _untold(name: str) -> str:
    return f"matta cannot follow them through the operator {name!r}"


def _axes(dim: Any, ndim: int) -> set[int]:
    if dim is None or dim == []:
        return set(range(ndim))
    return {axis % ndim for axis in ([dim] if isinstance(dim, int) else dim)}


def _reduce(known: Known, call: Call) -> None:
    """Axes that are summed (or averaged, or searched for a maximum) lose their rows."""
    ndim = call.first.ndim
    gone = _axes(call.bound.get("dim"), ndim)
    kept = [axis for axis in range(ndim) if axis not in gone]
    rows = known.rows(call.first)
    for out in (leaf for leaf in tree_leaves(call.out) if isinstance(leaf, Tensor)):
        place = {axis: axis if call.bound.get("keepdim") else i for i, axis in enumerate(kept)}
        known.put(out, {place[axis]: row for axis, row in rows.items() if axis in place})


def _order(known: Known, call: Call) -> None:
    """Sorting keeps the other axes; which channel ends where depends on the data."""
    dim = call["dim"] % call.first.ndim
    rows = known.rows(call.first)
    problem = f"they are reordered by {call.name!r}"
    known.blame([row for axis, row in rows.items() if axis == dim], problem, "reordered")
    for out in call.out:
        lost = {dim: known.lose(out.shape[dim], problem)} if dim in rows and out.ndim == call.first.ndim else {}
        known.put(out, {axis: row for axis, row in rows.items() if axis != dim} | lost)


def _restride(known: Known, call: Call) -> None:
    """A shape that stays, in another order of memory."""
    (_keep if call.result.shape == call.shape else _unknown)(known, call)


def _row_norm(known: Known, call: Call) -> None:
    """Layer norm and RMS norm: the weights belong to the last axes."""
    size = len(call["normalized_shape"])
    offset = call["input"].ndim - size
    found = [*known.rows(call["input"]).items()]
    for name in ("weight", "bias"):
        found += [(axis + offset, row) for axis, row in known.rows(call.bound.get(name)).items()]
    known.put(call.result, known.tie_all(found))


def _channel_norm(known: Known, call: Call) -> None:
    """Batch norm and group norm: weights and statistics belong to axis 1."""
    found = [*known.rows(call["input"]).items()]
    for name in ("weight", "bias", "running_mean", "running_var"):
        found += [(1, row) for row in known.rows(call.bound.get(name)).values()]
    known.put(call.result, known.tie_all(found))


def _embedding(known: Known, call: Call) -> None:
    rows = known.rows(call["weight"])
    known.put(call.result, {call.result.ndim - 1: rows[1]} if 1 in rows else {})


def _glu(known: Known, call: Call) -> None:
    rows = dict(known.rows(call["self"]))
    dim = call["dim"] % call["self"].ndim
    if dim in rows:
        first, second = rows[dim].chunk(2)
        rows[dim] = known.channels.tie(first, second)
    known.put(call.result, rows)


def _cat(known: Known, call: Call) -> None:
    dim = call["dim"] % call.result.ndim
    parts = [tensor for tensor in call["tensors"] if tensor.ndim == call.result.ndim]
    found = [(axis, row) for part in parts for axis, row in known.rows(part).items() if axis != dim]
    blank = [torch.zeros(part.shape[dim], dtype=torch.long) for part in parts]
    joined = torch.cat([known.rows(part).get(dim, zeros) for part, zeros in zip(parts, blank, strict=True)])
    known.put(call.result, {**known.tie_all(found), dim: joined})


def _stack(known: Known, call: Call) -> None:
    dim = call["dim"] % call.result.ndim
    found = [pair for tensor in call["tensors"] for pair in known.rows(tensor).items()]
    known.put(call.result, {axis + (axis >= dim): row for axis, row in known.tie_all(found).items()})


def _copy(known: Known, call: Call) -> None:
    """What is written into a tensor meets what is there, also where a view of it is written to: `x[:, 3] = y`."""
    view = call.result
    rows = known.broadcast([view, call["src"]], view)
    known.put(view, rows)
    whole = view._base
    if whole is not None:
        known.put(whole, _written_through(known, view, whole, rows))


def _written_through(known: Known, view: Tensor, whole: Tensor, rows: Rows) -> Rows:
    """The rows of a tensor whose view has been written to: a stretch of each axis that the view has as well."""
    found = dict(known.rows(whole))
    for axis, row in rows.items():
        alike = [i for i, stride in enumerate(whole.stride()) if stride == view.stride(axis)]
        alike = [i for i in alike if whole.shape[i] >= len(row)]
        if len(alike) == 1:
            length, stride = whole.shape[alike[0]], whole.stride(alike[0])
            start = (view.storage_offset() - whole.storage_offset()) // stride % length
            made = found.get(alike[0], torch.zeros(length, dtype=torch.long)).clone()
            made[start : start + len(row)] = known.channels.tie(made[start : start + len(row)], row)
            known.channels.cuts.append(row)
            found[alike[0]] = made
    return found


def _index_put(known: Known, call: Call) -> None:
    """`x[rows] = values`: the axes behind the indexed ones meet."""
    target, values = call["self"], call["values"]
    offset = target.ndim - values.ndim
    behind = range(len(call["indices"]), target.ndim)
    found = [pair for pair in known.rows(target).items() if pair[0] in behind]
    rows = ((axis + offset, row) for axis, row in known.rows(values).items())
    found += [pair for pair in rows if pair[0] in behind and len(pair[1]) == target.shape[pair[0]]]
    known.put(call.result, known.tie_all(found))


def _scatter(known: Known, call: Call) -> None:
    """What is added or written along `dim` meets what is there on the other axes."""
    dim = call["dim"] % call["self"].ndim
    sources = [call.bound.get(name) for name in ("self", "source", "src")]
    found = [pair for tensor in sources for pair in known.rows(tensor).items() if pair[0] != dim]
    known.put(call.result, known.tie_all(found))


def _transformed(known: Known, call: Call) -> None:
    """A Fourier transform mixes the channels of its own axes, and leaves the others."""
    rows, mixed = known.rows(call.first), _axes(call["dim"], call.first.ndim)
    lost = {axis: row for axis, row in rows.items() if axis in mixed and not known.channels.is_input(row)}
    problem = _untold(call.name)
    known.blame(lost.values(), problem)
    kept = {axis: row for axis, row in rows.items() if axis not in mixed}
    known.put(call.result, kept | {axis: known.lose(call.result.shape[axis], problem) for axis in lost})


def _gather(known: Known, call: Call) -> None:
    dim = call["dim"] % call["self"].ndim
    rows = known.rows(call["self"])
    problem, shape = "they are picked by data", call.result.shape
    known.blame([row for axis, row in rows.items() if axis == dim], problem, "reordered")
    lost = {dim: known.lose(shape[dim], problem)} if dim in rows else {}
    known.put(call.result, {axis: row[: shape[axis]] for axis, row in rows.items() if axis != dim} | lost)


_RANGES: Final = frozenset({"arange", "linspace", "logspace"})

_SUMS: Final = frozenset({"sum", "mean", "prod", "max", "min", "any", "all", "var", "std", "argmax", "norm"})

_RULES: Final[dict[str, _Rule]] = {
    **dict.fromkeys(
        "permute t transpose movedim expand slice select split "
        "split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk unbind squeeze unsqueeze "
        "alias detach index index_select flip roll repeat constant_pad_nd unfold diagonal narrow "
        "channel_shuffle reflection_pad1d reflection_pad2d "
        "replication_pad1d replication_pad2d".split(),
        move,
    ),
    **dict.fromkeys("view _unsafe_view reshape _reshape_alias".split(), view),
    **dict.fromkeys(["pixel_shuffle", "col2im"], spread),
    **dict.fromkeys(["pixel_unshuffle", "im2col"], gathered),
    **dict.fromkeys(
        "_softmax _log_softmax _safe_softmax clone _to_copy contiguous tril triu cumsum cumprod "
        "native_dropout lift lift_fresh logcumsumexp hardswish log_sigmoid_forward rrelu_with_noise "
        "bernoulli poisson _conj _neg_view".split(),
        _keep,
    ),
    **dict.fromkeys(
        "_local_scalar_dense nonzero multinomial bincount equal zero fill _is_all_true _is_any_true".split(), _forget
    ),
    **dict.fromkeys(["mm", "bmm", "mv", "dot"], product),
    **dict.fromkeys(["addmm", "baddbmm", "addmv", "_addmm_activation", "_sparse_addmm"], add_product),
    **dict.fromkeys(["convolution", "_convolution"], convolution),
    **dict.fromkeys(["native_layer_norm", "_fused_rms_norm"], _row_norm),
    **dict.fromkeys(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
        "cudnn_batch_norm miopen_batch_norm native_group_norm".split(),
        _channel_norm,
    ),
    **dict.fromkeys(["_embedding_bag", "_embedding_bag_forward_only", "embedding"], _embedding),
    **dict.fromkeys(["topk", "sort", "kthvalue"], _order),
    **dict.fromkeys(["_prelu_kernel", "_weight_norm_interface", "normal", "binomial", "polar", "complex"], _pointwise),
    **dict.fromkeys(["_fft_r2c", "_fft_c2r", "_fft_c2c"], _transformed),
    "masked_select": masked,
    **dict.fromkeys(["_pack_padded_sequence", "_pad_packed_sequence"], packed),
    "linalg_solve_triangular": solved,
    **dict.fromkeys(["_cdist_forward", "_euclidean_dist"], distances),
    "_trilinear": trilinear,
    "_grouped_mm": grouped_product,
    "as_strided": _restride,
    **dict.fromkeys(["view_as_complex", "view_as_real"], as_complex),
    "glu": _glu,
    "cat": _cat,
    "stack": _stack,
    "copy": _copy,
    "index_put": _index_put,
    "gather": _gather,
    **dict.fromkeys("index_add index_copy scatter scatter_add scatter_reduce".split(), _scatter),
}
