"""Running statistics (BatchNorm) of the sizes between Student and TA, which neither of the two has measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from matta.choosing.survey import STUDENT, TA
from matta.nesting.batches import Batch, map_tensors, split_labels
from matta.sizes.extraction import recalibrate

LOG: Final = logging.getLogger("matta.serve")


def has_running_statistics(module: nn.Module) -> bool:
    """Whether a norm of the module has such."""
    return any(isinstance(part, _NormBase) and part.running_mean is not None for part in module.modules())


def measure_mixed(modules: Mapping[str, nn.Module], batches: Sequence[Batch], device: torch.device) -> None:
    """Measure them on batches, in the modules of mixed sizes; their buffers are copies of their own.

    Raises:
        RunError: a batch with one value to a channel, or statistics that are not finite.
    """
    there = [(map_tensors(split_labels(batch)[0], lambda each: each.to(device)), None) for batch in batches]
    for name, module in modules.items():
        if name not in (STUDENT, TA) and has_running_statistics(module):
            recalibrate(module, there)


def tell_of_mixed(sizes: Sequence[str]) -> None:
    """Warn of sizes that are served with statistics of other widths than theirs."""
    if mixed := [name for name in sizes if name not in (STUDENT, TA)]:
        LOG.warning(
            "%s mix Student and TA, and are served with the running statistics (BatchNorm) of both, which do not fit "
            "them; expected batches to measure theirs on: Serving(recalibrate=batches)",
            "; ".join(mixed),
        )
