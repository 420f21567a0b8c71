"""Run a module twice, at two widths, and have the wider run use the numbers that follow from the narrower's width.

A scale of attention, a mean over features, the base of a rotary table: models compute them from their widths. They
differ between a Student and its TA by design, and hide whether weights lie in the right places. So the Student's run
is recorded operator by operator, and the TA's run takes its numbers where the two run the same operators. Where the
flow of the data has shown which channels are the Student's, the others stay silent, though an operator makes ones of
zeros (a sigmoid, a bias over all), and what looks at all channels at once (a softmax over experts, a norm) sees the
Student's alone. Random numbers are replaced (`matta.nesting.draws`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from matta.nesting.channels import Moment, Place, Steps, name_of
from matta.nesting.draws import drawn, is_draw
from matta.nesting.higher_order import opened, takes_functions
from matta.nesting.layout import Axis
from matta.nesting.operator_kinds import is_whole, may_fill
from matta.nesting.operators import plain_kernels

Step = tuple[tuple[Any, ...], Any]
"""The numbers of an operator, and what it made that depends on numbers alone or averages over so many."""


@final
@dataclass(frozen=True)
class Spread:
    """The axes that grow, with where the Student's channels are, of each tensor that a step takes and makes."""

    taken: tuple[Mapping[int, Axis], ...]
    made: tuple[Mapping[int, Axis], ...]


Spreads = Callable[[Moment], Spread | None]
"""Gives the spread of a step."""


@final
class Recording:
    """The steps of a run, what leaf modules returned by module and by which of its calls it was, what was read."""

    def __init__(self) -> None:
        self.read: set[int] = set()
        self.steps: dict[Moment, Step] = {}
        self.outputs: dict[Place, Tensor] = {}


@final
class Lockstep(TorchDispatchMode):
    """While it is active, operators are recorded; those that a `model` recording has too take its numbers.

    `spreads` says where the channels of the model are.
    """

    supports_higher_order_operators = True

    def __init__(self, made: Recording, model: Recording | None, spreads: Spreads | None) -> None:
        super().__init__()
        self.made, self.model, self.spreads = made, model, spreads
        self.counted = Steps()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, with the other run's numbers if there are any."""
        if takes_functions(func):
            return opened(self, func, args, kwargs or {})[0]
        self.made.read.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter))
        moment = self.counted.next(name_of(func))
        step = self.made.steps[moment] = _step(func, args)
        other = None if self.model is None else self.model.steps.get(moment)
        spread = None
        if self.spreads is not None and (is_whole(func) or may_fill(func)):
            spread = self.spreads(moment)
        if spread is not None and is_whole(func) and other is not None:
            return _of_the_students(func, args, kwargs or {}, spread, other)
        out = drawn(func, args, kwargs or {}) if is_draw(func) else _with_numbers(func, args, kwargs or {}, step, other)
        if spread is not None and may_fill(func) and isinstance(out, Tensor):
            _silence(out, spread.made[0])
        return out


def _with_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], step: Step, other: Step | None) -> Any:
    """What an operator makes with the numbers of the other step."""
    if other is None or other == step or len(other[0]) != len(step[0]):
        return func(*args, **kwargs)
    numbers = iter(other[0])
    theirs = tuple(next(numbers) if other[0] and _is_number(each) else each for each in args)
    if func._schema.is_mutable:
        is_of_numbers = isinstance(args[0], Tensor) and args[0].is_floating_point()
        return func(*(theirs if is_of_numbers else args), **kwargs)
    out = func(*args, **kwargs)
    if not (isinstance(out, Tensor) and out.is_floating_point()):
        return out
    if name_of(func) == "lift_fresh":
        return out if other[1] is None else torch.full_like(out, other[1])
    if name_of(func) == "mean":
        return out * (step[1] / other[1])
    return func(*theirs, **kwargs)


def _of_the_students(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], spread: Spread, other: Step) -> Any:
    """What an operator makes of the Student's channels alone; zeros in the others, places among all of them."""
    axes, settings = iter(spread.taken), iter(other[0])
    first, narrowed = spread.taken[0], list[bool]()

    def narrow(tensor: Tensor) -> Tensor:
        for dim, axis in next(axes, {}).items():
            narrowed.append(tensor.shape[dim] == axis.ta_size)
            if narrowed[-1]:
                tensor = tensor.index_select(dim, _positions(axis, tensor))
        return tensor

    taken = [narrow(each) if isinstance(each, Tensor) else next(settings) for each in args]
    made = func(*taken, **kwargs)
    if not any(narrowed):  # in a norm that sees the Student's channels alone
        return made
    dim = _dim(func, args, kwargs)
    outs = iter(spread.made)

    def widen(tensor: Tensor) -> Tensor:
        grown = next(outs, {})
        if dim is not None and dim in first and tensor.dtype == torch.long:
            tensor = _positions(first[dim], tensor)[tensor]
        for axis, each in grown.items():
            if tensor.shape[axis] == each.student_size:
                shape = [each.ta_size if i == axis else size for i, size in enumerate(tensor.shape)]
                tensor = tensor.new_zeros(shape).index_copy(axis, _positions(each, tensor), tensor)
        return tensor

    return tree_map_only(Tensor, widen, made)


def _dim(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The axis along which an operator looks, if it is one."""
    bound = {argument.name: argument.default_value for argument in func._schema.arguments}
    bound |= {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    dim = {**bound, **kwargs}.get("dim")
    return dim % args[0].ndim if isinstance(dim, int) else None


def _positions(axis: Axis, like: Tensor) -> Tensor:
    return torch.tensor(axis.positions(), device=like.device)


def _silence(out: Tensor, axes: Mapping[int, Axis]) -> None:
    """Zeros in the channels that are not the Student's."""
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        return
    for dim, axis in axes.items():
        if out.shape[dim] == axis.ta_size:
            others = torch.ones(axis.ta_size, dtype=torch.bool)
            others[axis.positions()] = False
            out.index_fill_(dim, others.nonzero().flatten().to(out.device), 0)


def _step(func: Any, args: tuple[Any, ...]) -> Step:
    """What is noted of an operator: its numbers if it computes with them, the constant that it makes, its count."""
    name = name_of(func)
    if name == "lift_fresh":
        return (), args[0].item() if args[0].numel() == 1 and not args[0].is_complex() else None
    if name == "mean":
        dims = args[1] if len(args) > 1 and args[1] and args[0].ndim else range(args[0].ndim)
        return (), float(torch.Size(args[0].shape[dim] for dim in dims).numel())
    if is_whole(func):
        return tuple(each for each in args if not isinstance(each, Tensor)), None
    return tuple(each for each in args if _is_number(each)) if name in _COMPUTING else (), None


_COMPUTING = frozenset(
    "mul div add sub rsub pow floor_divide true_divide full full_like new_full scalar_tensor".split()
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_plain(tensor: Tensor) -> bool:
    """Whether numbers can be compared afterwards: not those within torch.vmap, nor rows of several lengths."""
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.is_floating_point() and not is_wrapped and not tensor.is_nested


@contextmanager
def recorded(module: nn.Module, model: Recording | None = None, spreads: Spreads | None = None) -> Iterator[Recording]:
    """What a module does while this is active; with a `model`, in lockstep with that run."""
    made = Recording()
    lockstep = Lockstep(made, model, spreads)

    def enter(name: str) -> Any:
        def hook(_: nn.Module, __: Any) -> None:
            lockstep.counted.enter(name)

        return hook

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        place = lockstep.counted.leave()
        first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if next(part.parameters(recurse=False), None) is not None and first is not None and _is_plain(first):
            made.outputs[place] = first.detach()

    handles = [part.register_forward_pre_hook(enter(name)) for name, part in module.named_modules()]
    handles += [part.register_forward_hook(leave) for part in module.modules()]
    try:
        with plain_kernels(), lockstep:
            yield made
    finally:
        for handle in handles:
            handle.remove()
