"""Start a Student as its slice of a trained Teaching Assistant: the part of it that is not shared is copied.

What a Student shares it reads from the TA in any case. Its private parameters, and the statistics of its norms, are
its own: here they become the TA's slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from matta.nesting.declarations import translate
from matta.nesting.layout import Axis
from matta.nesting.plan import Placement, Plan


@torch.no_grad()
def start_from_ta(student: nn.Module, ta: nn.Module, plan: Plan, private: Mapping[str, Placement]) -> None:
    """Copy the TA's slices into a live Student's private parameters and into the statistics of its norms.

    `private` says where private parameters would live; those that it leaves out keep their own values.
    """
    for name, placement in private.items():
        student.get_parameter(name).copy_(_taken(ta.get_parameter(placement.ta), placement.axes))
    for own, source, axes in norm_statistics(student, ta, plan, private):
        own.copy_(_taken(source, axes))


def norm_statistics(
    student: nn.Module, ta: nn.Module, plan: Plan, private: Mapping[str, Placement]
) -> Iterator[tuple[Tensor, Tensor, tuple[Axis, ...]]]:
    """The running statistics of the Student's norms, those of the TA, and where the former lie in the latter."""
    theirs = dict(ta.named_buffers(remove_duplicate=False))
    for path, part in student.named_modules():
        if not isinstance(part, _NormBase) or part.running_mean is None:
            continue
        prefix = f"{path}." if path else ""
        weight = plan.placements.get(f"{prefix}weight", private.get(f"{prefix}weight"))
        for key, buffer in part.named_buffers(recurse=False):
            source = theirs.get(translate(f"{prefix}{key}", plan.layers))
            if source is not None:
                yield buffer, source, weight.axes if weight is not None and buffer.ndim else _leading(buffer, source)


def _leading(buffer: Tensor, source: Tensor) -> tuple[Axis, ...]:
    return tuple(map(Axis.plain, buffer.shape, source.shape))


def _taken(tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    for dim, axis in enumerate(axes):
        tensor = axis.take(tensor, dim)
    return tensor
