"""FLOPs of a forward: those of its matrix products and convolutions, whichever kernels compute them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def count_flops(module: nn.Module, run: Callable[[], Any]) -> int:
    """FLOPs of what `run` does with a module, two for each multiplication with an addition.

    They are those of `torch.utils.flop_counter`, which leaves out products with vectors, bilinear forms, products by
    groups of rows, and the attention of CPUs: these are counted too. Attention counts its masked positions.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> count_flops(layer, lambda: layer(torch.zeros(3, 4)))
        48
    """
    with in_counted_operators(module), FlopCounterMode(display=False, custom_mapping=_uncounted()) as counter:
        run()
    return int(counter.get_total_flops())


@contextmanager
def in_counted_operators(module: nn.Module) -> Iterator[None]:
    """Within it the module's products, and what they hold, are operators that can be seen.

    Kernels for a whole encoder layer, an attention with its projections, or a whole LSTM, hide them.
    """
    was_fast = torch.backends.mha.get_fastpath_enabled()
    was_onednn = torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags warns on machines without Intel's GPUs
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if not any(isinstance(part, nn.RNNBase) for part in module.modules()):
            yield
            return
        torch._C._set_mkldnn_enabled(False)
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(was_onednn)
        torch.backends.mha.set_fastpath_enabled(was_fast)


def _uncounted() -> dict[Any, Callable[..., int]]:
    """What torch's counter leaves out, by operator; not every release of torch has all of them."""
    return {getattr(torch.ops.aten, name): count for name, count in _COUNTS.items() if hasattr(torch.ops.aten, name)}


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and sums of values, of each head of the queries: several may share one of the keys."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _vectors(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left)


def _added_vectors(start: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left)


def _added_batches(start: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _bilinear(left: Shape, weight: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """Of each row and output: the one input times the weight, and that times the other."""
    outputs, num_left, num_right = weight
    return 2 * math.prod(left[:-1]) * outputs * num_right * (num_left + 1)


def _grouped(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """Each row, or column, meets the matrix of its group alone."""
    one = left if len(left) <= len(right) else left[1:]
    return 2 * math.prod(one) * right[-1]


_COUNTS: Final[dict[str, Callable[..., int]]] = {
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
            "_scaled_dot_product_attention_math_for_mps",
        ),
        _attention,
    ),
    **dict.fromkeys(("mv", "dot", "vdot"), _vectors),
    "addmv": _added_vectors,
    "addbmm": _added_batches,
    "_trilinear": _bilinear,
    "_grouped_mm": _grouped,
}
