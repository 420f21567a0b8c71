"""Run a module twice, at two widths, and have the wider run use the numbers that follow from the narrower's width.

A scale of attention, a mean over features, the base of a rotary table: models compute them from their widths. They
differ between a Student and its TA by design, and hide whether weights lie in the right places. So the Student's run
is recorded operator by operator, and the TA's run takes its numbers where the two run the same operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matta.nesting.channels import name_of
from matta.nesting.operators import plain_kernels

Step = tuple[str, tuple[Any, ...], Any]
"""An operator, its numbers, and what it made that depends on numbers alone or averages over so many."""


@final
class Recording:
    """The steps of a run, by module and by which of its calls it was, what leaf modules returned, what was read."""

    def __init__(self) -> None:
        self.read: set[int] = set()
        self.steps: dict[tuple[str, int], list[Step]] = {}
        self.outputs: dict[tuple[str, int], Tensor] = {}


@final
class Lockstep(TorchDispatchMode):
    """While it is active, operators are recorded; those that a `model` recording has too take its numbers."""

    def __init__(self, made: Recording, model: Recording | None) -> None:
        super().__init__()
        self.made, self.model = made, model
        self.place: list[tuple[str, int]] = [("", 0)]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, with the other run's numbers if there are any."""
        self.made.read.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter))
        steps = self.made.steps.setdefault(self.place[-1], [])
        step = _step(func, args)
        steps.append(step)
        model = [] if self.model is None else self.model.steps.get(self.place[-1], [])
        other = model[len(steps) - 1] if len(model) >= len(steps) else None
        out = func(*args, **(kwargs or {}))
        if other is None or other == step or other[0] != step[0] or len(other[1]) != len(step[1]):
            return out
        if not (isinstance(out, Tensor) and out.is_floating_point()):
            return out
        if name_of(func) == "lift_fresh":
            return out if other[2] is None else torch.full_like(out, other[2])
        numbers = iter(other[1])
        args = tuple(next(numbers) if _is_number(each) else each for each in args)
        if name_of(func) == "mean":
            return out * (step[2] / other[2])
        return out if func._schema.is_mutable else func(*args, **(kwargs or {}))


def _step(func: Any, args: tuple[Any, ...]) -> Step:
    """What is noted of an operator: its numbers if it computes with them, the constant that it makes, its count."""
    name = name_of(func)
    if name == "lift_fresh":
        return name, (), args[0].item() if args[0].numel() == 1 and not args[0].is_complex() else None
    if name == "mean":
        dims = args[1] if len(args) > 1 and args[1] else range(args[0].ndim)
        return name, (), float(torch.Size(args[0].shape[dim] for dim in dims).numel())
    return name, tuple(each for each in args if _is_number(each)) if name in _COMPUTING else (), None


_COMPUTING = frozenset({"mul", "div", "add", "sub", "rsub", "pow", "floor_divide", "true_divide"})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def recorded(module: nn.Module, model: Recording | None = None) -> Iterator[Recording]:
    """What a module does while this is active; with a `model`, in lockstep with that run."""
    made, calls = Recording(), Counter[str]()
    lockstep = Lockstep(made, model)

    def enter(name: str) -> Any:
        def hook(_: nn.Module, __: Any) -> None:
            lockstep.place.append((name, calls[name]))
            calls[name] += 1

        return hook

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        place = lockstep.place.pop()
        first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if next(part.parameters(recurse=False), None) is not None and first is not None and first.is_floating_point():
            made.outputs[place] = first.detach()

    handles = [part.register_forward_pre_hook(enter(name)) for name, part in module.named_modules()]
    handles += [part.register_forward_hook(leave) for part in module.modules()]
    try:
        with plain_kernels(), lockstep:
            yield made
    finally:
        for handle in handles:
            handle.remove()
