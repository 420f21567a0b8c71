"""Where the gradients of slices go, and when."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


@final
class GivenAway:
    """A slice that was given away as one of `module.parameters()`, for as long as something has it.

    An adjoint, such as that of a neural ODE, collects `module.parameters()` in its forward, runs the module in its
    backward, and asks for gradients by what it collected. The module has to read these very tensors then.
    """

    def __init__(self) -> None:
        self._tensor: TensorWeakRef | None = None

    def note(self, value: Tensor) -> Tensor:
        """Note that a slice is given away, unless no gradient goes through it to its owner."""
        self._tensor = None if value.grad_fn is None else TensorWeakRef(value)
        return value

    def in_backward(self) -> Tensor | None:
        """The slice, in a backward pass that still has it."""
        if self._tensor is None or torch._C._current_graph_task_id() < 0:
            return None
        return self._tensor()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles know of none."""
        return GivenAway, ()


def adding_at_once(parameter: Tensor) -> Tensor:
    """The parameter as a leaf of its own, whose gradient is added to the parameter's as soon as it is there.

    Autograd would hold the gradients of all of the Student's blocks, whole, until the TA's blocks have theirs.
    """

    def add(leaf: Tensor) -> None:
        if parameter.grad is None:
            parameter.grad = leaf.grad
        elif leaf.grad is not None:
            parameter.grad += leaf.grad
        leaf.grad = None

    leaf = parameter.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(add)
    return leaf
