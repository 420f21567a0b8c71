"""Linear heads whose logits are put off: computed only if something reads their values.

Over a vocabulary of tens of thousands the logits are most of what a small language model costs. While
`deferring` is on, the linear layers that may be a module's head return `DeferredLogits`: tensors with
shape, type and gradient, and no values yet. If a module returns one of them untouched, its logits are that
layer's output and nothing else, and `fused_losses` never makes them whole. If the module computes further
with them (scales them, caps them, adds a LoRA), their values are made there and then, and all is as if
they had never been put off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from matta.errors import MattaError


@final
class LinearLogits:
    """Logits as what they are computed from: `hidden` (..., width), `weight` (classes, width) and `bias`.

    `dtype` is what the layer computes in, which under autocast is not that of its weights. `values` are
    the logits themselves, once something has read them.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.hidden, self.weight, self.bias, self.dtype = hidden, weight, bias, dtype
        self.shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))
        self.values: Tensor | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """The weight, and the bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def compute(self) -> Tensor:
        """The logits, with a graph where one is recorded."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            hidden, *parameters = (each.to(self.dtype) for each in (self.hidden, *self.parameters))
            return functional.linear(hidden, *parameters)

    def __getitem__(self, index: Any) -> LinearLogits:
        """The logits of some positions."""
        return LinearLogits(self.hidden[index], self.weight, self.bias, self.dtype)

    def rows(self) -> LinearLogits:
        """The logits as a matrix."""
        return LinearLogits(self.hidden.flatten(0, -2), self.weight, self.bias, self.dtype)

    def later(self) -> LaterLogits:
        """What reads the logits when they are asked for."""
        return LaterLogits(self)


@final
class LaterLogits:
    """Logits without gradient, computed each time they are read, while the weights are those of the forward."""

    def __init__(self, source: LinearLogits) -> None:
        hidden, weight, *bias = (each.detach() for each in (source.hidden, *source.parameters))
        self._source = LinearLogits(hidden, weight, bias[0] if bias else None, source.dtype)
        self._versions = self._present()

    def read(self) -> Tensor:
        """The logits.

        Raises:
            MattaError: the head's weights have moved, or were taken away, since the forward.
        """
        if self._present() != self._versions:
            raise MattaError(
                "the logits are asked for after the weights of the head have moved or were sharded; expected before: "
                "the fused losses keep no logits; read them before the backward pass, or give the objective fused=False"
            )
        with torch.no_grad():
            return self._source.compute()

    def _present(self) -> list[tuple[int, int]]:
        """The versions of the tensors, and their sizes: FSDP empties them after the backward pass."""
        tensors = (self._source.hidden, *self._source.parameters)
        return [(0 if each.is_inference() else each._version, each.untyped_storage().nbytes()) for each in tensors]


@final
class DeferredLogits(Tensor):
    """Logits whose values are computed when something reads them; see `LinearLogits`."""

    source: LinearLogits
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, source: LinearLogits) -> DeferredLogits:
        made = Tensor._make_wrapper_subclass(cls, source.shape, dtype=source.dtype, device=source.hidden.device)
        made.source = source
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, _values, (args, kwargs or {}))
        return func(*args, **kwargs)


def _values(logits: DeferredLogits) -> Tensor:
    source = logits.source
    if source.values is None:
        source.values = source.compute()
    return source.values


class _Defer(torch.autograd.Function):
    """The node in the graph of `DeferredLogits`: the gradient of a linear layer."""

    @staticmethod
    def forward(ctx: Any, source: LinearLogits, hidden: Tensor, weight: Tensor, *bias: Tensor) -> DeferredLogits:
        ctx.save_for_backward(hidden, weight)
        ctx.has_bias = bool(bias)
        return DeferredLogits(source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        d_hidden = (gradient @ weight.to(gradient.dtype)).to(hidden.dtype) if ctx.needs_input_grad[1] else None
        d_weight = None
        if ctx.needs_input_grad[2]:
            d_weight = (rows.t() @ hidden.flatten(0, -2).to(gradient.dtype)).to(weight.dtype)
        d_bias = (rows.sum(0).to(weight.dtype),) if ctx.has_bias else ()
        return None, d_hidden, d_weight, *d_bias


def deferred(logits: Tensor) -> LinearLogits | None:
    """What the logits are computed from, if nothing has read them yet."""
    if type(logits) is DeferredLogits and logits.source.values is None and not _is_watched(logits):
        return logits.source
    return None


def _is_watched(logits: Tensor) -> bool:
    """Whether something waits for the gradient of the logits, which the fused losses never make."""
    return bool(logits._backward_hooks) or logits.retains_grad


def undeferred(logits: Tensor) -> Tensor:
    """The logits as a plain tensor with the same gradient."""
    if type(logits) is not DeferredLogits:
        return logits
    if logits.source.values is not None or _is_watched(logits):
        return logits.view_as(logits)
    logits.source.values = logits.source.compute()
    return logits.source.values


@contextmanager
def deferring(modules: Iterable[nn.Module], least: int = 1) -> Iterator[None]:
    """Put off the outputs of the layers that may be the heads of `modules`, if they have `least` classes."""
    found = [head for module in modules for head in candidates(module)]
    heads = {id(head): head for head in found if head.out_features >= least}
    grad_enabled = torch.is_grad_enabled()
    for head in heads.values():
        head.__dict__["forward"] = _forward_of(head, grad_enabled)
    try:
        yield
    finally:
        for head in heads.values():
            del head.__dict__["forward"]


def candidates(module: nn.Module) -> list[nn.Linear]:
    """The linear layers whose output may be the logits of `module`.

    These are its last linear layer, those that are its direct children, and what Transformers calls its
    output embeddings. A layer is left alone if hooks surround it or it is compiled: FSDP's hooks, for one,
    take its weights away when it has run.
    """
    holders: dict[str, nn.Module] = dict(module.named_modules())
    linear = [path for path, each in holders.items() if isinstance(each, nn.Linear)]
    paths = {path for path in linear if path.count(".") == 0} | set(linear[-1:])
    output = getattr(module, "get_output_embeddings", lambda: None)()
    paths |= {path for path in linear if holders[path] is output}
    return [holders[path] for path in linear if path in paths and _may_defer(path, holders)]  # type: ignore[misc]


def _may_defer(path: str, holders: dict[str, nn.Module]) -> bool:
    parts = path.split(".") if path else []
    around = [holders[".".join(parts[:depth])] for depth in range(len(parts) + 1)]
    head = around[-1]
    if type(head).forward is not nn.Linear.forward or "forward" in head.__dict__:
        return False
    return not any(each._forward_hooks or each._forward_pre_hooks or each._compiled_call_impl for each in around)


def _forward_of(head: nn.Linear, grad_enabled: bool) -> Any:
    def forward(hidden: Tensor) -> Tensor:
        hidden, weight, bias = undeferred(hidden), head.weight, head.bias
        # Where activation checkpointing has turned gradients off, it makes a graph of its own later.
        dtype = _compute_dtype(hidden, weight) if torch.is_grad_enabled() == grad_enabled else None
        if dtype is None:
            return functional.linear(hidden, weight, bias)
        source = LinearLogits(hidden, weight, bias, dtype)
        return _Defer.apply(source, hidden, *source.parameters)

    return forward


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type that the product is computed in; None if it is not one of plain matrices."""
    if torch._C._functorch.is_functorch_wrapped_tensor(hidden) or hidden.is_nested:
        return None
    if hidden.ndim < 2 or type(hidden) is not Tensor or type(weight) not in (nn.Parameter, Tensor):
        return None
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype if hidden.dtype == weight.dtype else None
