"""Take sub-models out as plain modules of the user's own classes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from matta.batches import Batch, call, eval_mode, split_labels
from matta.nesting import Nested
from matta.slicing import materialize
from matta.submodels import SubModel, live


def extract(nested: Nested, spec: SubModel | None = None) -> nn.Module:
    """The sub-model as a plain module with weights of its own; by default the (first) Student.

    It equals the live sub-model bit for bit, consists of the user's classes, and holds nothing of
    matta's. The TA itself is `nested.ta`.

    Raises:
        SubModelError: `spec` does not fit the nesting.

    Example:
        >>> import matta
        >>> nested = matta.nest(nn.Linear(3, 1), nn.Linear(3, 1))
        >>> extract(nested)
        Linear(in_features=3, out_features=1, bias=True)
    """
    return materialize(nested.student if spec is None else live(nested, spec))


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Batch]) -> int:
    """Measure the BatchNorm statistics of a module afresh; the number of batches that were used.

    Student and TA have statistics of their own, but those of a mixed sub-model have never been
    seen in training. They become the plain averages over the batches. The module keeps its mode.

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8))
        >>> mixed = matta.extract(nested, matta.SubModel({"0": "wide"}))
        >>> recalibrate(mixed, [(torch.randn(16, 3), torch.ones(16))] * 5)
        5
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    count = 0
    with eval_mode(module):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        try:
            for batch in batches if norms else ():
                call(module, split_labels(batch)[0])
                count += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return count
