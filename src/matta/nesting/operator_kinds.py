"""Kinds of ATen operators: element by element, of all channels at once, such that make something of zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from matta.nesting.channels import name_of

_KEEPING_ZEROS: Final = frozenset("mul neg relu silu gelu tanh abs sqrt sin clone".split())

_WHOLE: Final = frozenset(
    "_softmax _log_softmax _safe_softmax logsumexp topk sort kthvalue max min amax amin argmax argmin var std var_mean "
    "std_mean native_layer_norm _fused_rms_norm native_group_norm native_batch_norm".split()
)


def is_pointwise(func: Any) -> bool:
    """Whether an operator works element by element."""
    return torch.Tag.pointwise in {*func.tags, *_tags_out_of_place(func)}


def may_fill(func: Any) -> bool:
    """Whether an operator makes something of zeros, element by element."""
    return is_pointwise(func) and name_of(func) not in _KEEPING_ZEROS


def is_whole(func: Any) -> bool:
    """Whether what an operator makes of one channel depends on the others, other than by a sum."""
    return name_of(func) in _WHOLE


def _tags_out_of_place(func: Any) -> Sequence[torch.Tag]:
    """What torch says of the kind of an operator that it has not marked where it works in place."""
    overload = getattr(getattr(torch.ops.aten, name_of(func), None), func._overloadname, None)
    return () if overload is None else tuple(overload.tags)
