"""Operators that take functions (`flex_attention`, `torch.cond`), and compiled functions, opened for dispatch modes.

A dispatch mode sees ATen operators. One that takes functions is run step by step, so that the mode sees what it
consists of.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, final

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

_OPENED: Final = frozenset({"flex_attention"})
_COMPILERS: Final = frozenset({"torch._dynamo", "torch.nn.attention.flex_attention"})


def takes_functions(func: Any) -> bool:
    """Whether an operator takes functions, so that it has neither a schema nor tags."""
    return isinstance(func, HigherOrderOperator)


def opened(mode: TorchDispatchMode, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
    """What an operator that takes functions makes, and whether `mode` saw each step of it."""
    if func.name() == "cond":
        chosen, operands = args[1] if args[0] else args[2], args[3]
        with mode:
            return chosen(*operands), True
    if func.name() not in _OPENED:
        return func(*args, **kwargs), False
    with mode, _Decomposing():
        return func.py_kernels[DispatchKey.CompositeExplicitAutograd](*args, **kwargs), True


@final
class _Decomposing(TorchDispatchMode):
    """Below an operator torch has autograd off, and with it what takes `matmul` and the like apart: done here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What an operator makes, from its parts if it has any."""
        with self:
            made = func.decompose(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if made is NotImplemented else made


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it compiled functions run as they are written: torch.compile and dispatch modes exclude each other."""
    if _COMPILERS.isdisjoint(sys.modules):  # nothing can be compiled, and the compiler takes seconds to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
