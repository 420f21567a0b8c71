"""The Student alone in a copy of the TA: all but its slices silenced, and both run on one example.

Weights are drawn at random for it, since a bias of zeros would hide its layout. What differs between the two models
by design is made the Student's: norms see its channels alone, buffers hold its values, and numbers that follow from a
width are its numbers (`matta.nesting.lockstep`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_map_only

from matta.errors import LabelError, LayoutError, NestingError, ProbeError
from matta.nesting.batches import call, has_logits, outputs_of, relative_difference
from matta.nesting.copying import attribute_tensors, deep_copy
from matta.nesting.declarations import LayerMap
from matta.nesting.draws import SEED
from matta.nesting.known_modules import axis_role, output_axis
from matta.nesting.layout import Axis, Layout
from matta.nesting.lockstep import Recording, Spreads, recorded
from matta.nesting.plan import Placement, Plan
from matta.nesting.slicing import is_live, materialize, write_slice

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, None: 2e-2}  # None: of its own types, bfloat16 say
_SILENT = {torch.float64: 1e-30, torch.float32: 1e-18, None: 1e-18}  # as good as zero, but a weight norm divides by it


@final
@dataclass(frozen=True)
class Difference:
    """The first module, in the order of execution, whose outputs differ, and by how much."""

    order: int
    module: str
    error: float


def silenced_pair(
    student: nn.Module, ta: nn.Module, plan: Plan, inputs: Any, layouts: Mapping[str, Layout], spreads: Spreads
) -> SilencedPair:
    """The pair in float64; in float32 or in its own types where the Student makes tensors of those itself.

    Raises:
        ProbeError: the Student does not run on the inputs.
    """
    for dtype in (torch.float64, torch.float32, None):
        try:
            return SilencedPair(student, ta, plan, inputs, layouts, spreads, dtype)
        except (LabelError, NestingError):
            raise
        except Exception as error:
            failure = error
    raise ProbeError(
        f"the Student does not run on the example: {type(failure).__name__}: {failure}; pass as `example` a batch such "
        f"as it trains on"
    ) from failure


@final
class SilencedPair:
    """Copies of both modules on random weights, ready to be compared under any placements."""

    def __init__(
        self,
        student: nn.Module,
        ta: nn.Module,
        plan: Plan,
        inputs: Any,
        layouts: Mapping[str, Layout],
        spreads: Spreads,
        dtype: torch.dtype | None,
    ) -> None:
        self.inputs, self.layouts, self.spreads = _in_type(inputs, dtype), layouts, spreads
        self.plan, self.dtype = plan, dtype
        self.student = _random(_cast(materialize(student) if is_live(student) else deep_copy(student), dtype))
        self.ta = _cast(deep_copy(ta), dtype)
        for layer_map in plan.layers:
            _keep_blocks(self.ta, layer_map)
        output, self.recording = _run(self.student, self.inputs)
        self.expected, self.has_logits = outputs_of(output), has_logits(output)
        self.has_own_modules = not all(_has_room(self.ta, self.student, name) for name in plan.private)

    def unread(self) -> list[str]:
        """The Student's parameters that the run did not read, such as those of experts that no token went to."""
        named = self.student.named_parameters(remove_duplicate=False)
        return [name for name, parameter in named if id(parameter) not in self.recording.read]

    def compare(self, placements: Mapping[str, Placement]) -> Difference | None:
        """The first difference under these placements; None if there is none.

        The zeros alone say it for most modules. Where they differ, or do not run, the Student's channels as the run
        has shown them are kept apart by operators that make ones of zeros, or that look at all channels. In the end so
        are those of buffers, such as codes to which distances are taken.
        """
        try:
            found = self._compare(placements, None)
        except CannotRunError:
            return self._compare(placements, self.spreads)
        if found is None:
            return None
        has_shown = any(name in self.layouts for name, _ in chain(self.ta.named_buffers(), attribute_tensors(self.ta)))
        for silences in (False, True) if has_shown else (False,):
            with suppress(CannotRunError):
                if self._compare(placements, self.spreads, silences_buffers=silences) is None:
                    return None
        return found

    def _compare(
        self, placements: Mapping[str, Placement], spreads: Spreads | None, *, silences_buffers: bool = False
    ) -> Difference | None:
        ta = deep_copy(self.ta)
        _plant(self.student, ta, placements, self.plan.private, _SILENT[self.dtype])
        _copy_numbers(self.student, ta, self.layouts, silences_buffers)
        _narrow_norms(self.student, ta, placements, self.layouts, self.recording)
        channels = _output_axes(self.student, placements)
        try:
            output, recording = _run(ta, self.inputs, self.recording, spreads)
        except Exception as error:  # also what code of the module asserts
            raise CannotRunError(str(error) or type(error).__name__) from error
        actual = outputs_of(output)
        shapes = [[tuple(each.shape) for each in side] for side in (self.expected, actual)]
        if self.has_logits and not self.has_own_modules and shapes[0] != shapes[1]:
            raise ProbeError(
                f"the Student's logits have shape {shapes[0][0]} on the example and the TA's {shapes[1][0]}; expected "
                f"the same classes (or vocabulary) and positions of both; build the TA with the Student's, or, if "
                f"these are features as wide as each model is, nest with probe=False"
            )
        for order, ((name, nth), expected) in enumerate(self.recording.outputs.items()):
            found = recording.outputs.get((name, nth))
            narrowed = None if found is None or name not in channels else _narrowed(found, expected, channels[name])
            if narrowed is not None and _error(expected, narrowed) > _TOLERANCE[self.dtype]:
                return Difference(order, name, _error(expected, narrowed))
        pairs = [pair for pair in zip(self.expected, actual, strict=False) if pair[0].shape == pair[1].shape]
        distance = 0.0 if self.has_own_modules else max([_error(*pair) for pair in pairs], default=0.0)
        where = "the logits" if self.has_logits else "what it returns"
        return Difference(len(self.recording.outputs), where, distance) if distance > _TOLERANCE[self.dtype] else None


class CannotRunError(Exception):
    """The silenced copy fails on the example."""


def _run(
    module: nn.Module, inputs: Any, model: Recording | None = None, spreads: Spreads | None = None
) -> tuple[Any, Recording]:
    with torch.no_grad(), recorded(module, model, spreads) as made:
        return call(module, inputs), made


def _narrowed(found: Tensor, expected: Tensor, axis: Axis) -> Tensor | None:
    """The Student's channels of a TA module's output, on the last axis or the second; None where it has none."""
    for dim in {found.ndim - 1, min(1, found.ndim - 1)} if found.ndim else ():
        if found.ndim == expected.ndim and (expected.shape[dim], found.shape[dim]) == (axis.student_size, axis.ta_size):
            narrowed = found.index_select(dim, torch.tensor(axis.positions(), device=found.device))
            return narrowed if narrowed.shape == expected.shape else None
    return None


def _error(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    return relative_difference(expected, found)


def _in_type(inputs: Any, dtype: torch.dtype | None) -> Any:
    """The inputs of a batch with all tensors of numbers in one type."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    return tree_map_only(Tensor, cast, dict(inputs) if isinstance(inputs, Mapping) else inputs)


def _cast(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The module in a type, but for what is complex, and in eval mode."""
    return (module if dtype is None else module.double() if dtype == torch.float64 else module.float()).eval()


@torch.no_grad()
def _random(module: nn.Module) -> nn.Module:
    """The module, its weights moved at random about where they are."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in filter(_is_random, module.parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
        width = parameter.shape[1:].numel() if parameter.ndim > 1 else 16
        parameter.add_(noise / max(width, 1) ** 0.5)
    return module


def _is_random(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _keep_blocks(ta: nn.Module, layer_map: LayerMap) -> None:
    """Leave the Student's blocks alone in a module list; lists further out were cut before."""
    blocks = ta.get_submodule(layer_map.student)
    for index in reversed(range(layer_map.num_ta)):
        if index not in layer_map.indices:
            del blocks[index]  # type: ignore[operator]


def _has_room(ta: nn.Module, student: nn.Module, name: str) -> bool:
    """Whether the TA has a parameter that a private one can be put into, so that logits can be compared."""
    try:
        target, value = ta.get_parameter(name), student.get_parameter(name)
    except AttributeError:
        return False
    return target.ndim == value.ndim and all(s <= t for s, t in zip(value.shape, target.shape, strict=True))


@torch.no_grad()
def _plant(
    student: nn.Module, ta: nn.Module, placements: Mapping[str, Placement], private: Sequence[str], silent: float
) -> None:
    """Silence all of the TA but the Student's slices, which get the Student's weights."""
    for parameter in ta.parameters():
        parameter.fill_(silent)
    named = dict(student.named_parameters(remove_duplicate=False))
    for name, placement in placements.items():
        write_slice(ta.get_parameter(name), named[name], placement.axes)
    for name in private:
        if _has_room(ta, student, name):
            target = ta.get_parameter(name)
            write_slice(target, named[name], tuple(map(Axis.plain, named[name].shape, target.shape)))


@torch.no_grad()
def _copy_numbers(student: nn.Module, ta: nn.Module, layouts: Mapping[str, Layout], silences: bool) -> None:
    """Numbers that follow from a width, such as the scale of attention, and buffers become the Student's.

    What buffers have beyond, where the run has shown it, is zero if it `silences`.
    """
    for name, part in student.named_modules():
        other = _submodule(ta, name)
        for attribute, value in vars(part).items() if other is not None else ():
            if isinstance(value, float) and isinstance(vars(other).get(attribute), float):
                setattr(other, attribute, value)
    targets = dict(chain(ta.named_buffers(), attribute_tensors(ta)))
    for name, buffer in chain(student.named_buffers(), attribute_tensors(student)):
        target = targets.get(name)
        if target is None or (target.ndim, target.dtype, target.layout) != (buffer.ndim, buffer.dtype, torch.strided):
            continue
        sizes = list(enumerate(zip(buffer.shape, target.shape, strict=True)))
        if all(size <= larger for _, (size, larger) in sizes):
            layout = layouts.get(name, Layout({}))
            try:
                if silences and name in layouts and target.is_floating_point():
                    target.zero_()
                write_slice(target, buffer, [layout.resolve(axis, *pair) for axis, pair in sizes])
            except LayoutError:  # traced on other blocks than the one it lives in
                continue


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _narrow_norms(
    student: nn.Module,
    ta: nn.Module,
    placements: Mapping[str, Placement],
    layouts: Mapping[str, Layout],
    recording: Recording,
) -> None:
    """Norms of the TA see the Student's channels alone: statistics over a larger width are others."""
    shapes = {name: made.shape for (name, nth), made in recording.outputs.items() if nth == 0}
    for name, part in list(student.named_modules()):
        axis = _channels(name, part, ta, placements, layouts)
        if axis is not None and (axis.grows or isinstance(part, _BatchNorm)):
            plain = ta.get_submodule(name).forward
            ta.get_submodule(name).forward = _on_slice(part, axis, plain, shapes.get(name))


def _channels(
    name: str,
    part: nn.Module,
    ta: nn.Module,
    placements: Mapping[str, Placement],
    layouts: Mapping[str, Layout],
) -> Axis | None:
    own = dict(part.named_parameters(recurse=False))
    is_norm = isinstance(part, _NormBase | nn.LayerNorm | nn.RMSNorm | nn.GroupNorm)  # perhaps with an activation
    if isinstance(part, nn.ParameterList | nn.ParameterDict) or (not is_norm and any(True for _ in part.children())):
        return None
    if any(parameter.ndim > 1 for parameter in own.values()):
        return None
    if isinstance(part, _BatchNorm) and not own:
        wider: Any = ta.get_submodule(name)
        return layouts.get(f"{name}.running_mean", Layout({})).resolve(0, part.num_features, wider.num_features)
    for leaf, parameter in own.items():
        if parameter.ndim == 1 and f"{name}.{leaf}" in placements:
            return placements[f"{name}.{leaf}"].axes[0]
    sizes = [getattr(module, "normalized_shape", None) for module in (part, _submodule(ta, name))]
    if not own and all(isinstance(size, tuple) and len(size) == 1 for size in sizes):
        return layouts.get(name, Layout({})).resolve(0, sizes[0][0], sizes[1][0])  # type: ignore[index]
    return None


def _on_slice(
    module: nn.Module, axis: Axis, plain: Callable[..., Tensor], shape: torch.Size | None
) -> Callable[..., Tensor]:
    """The Student's module on the Student's channels of a wider input; zeros in the others.

    Of axes that are as long by chance it is the one that is longer than in the Student's own output, of that shape.
    """
    is_second = isinstance(module, _NormBase | nn.GroupNorm | nn.PReLU)

    def place(wide: Tensor) -> int:
        own = shape if shape is not None and len(shape) == wide.ndim else wide.shape
        grown = [i for i, sizes in enumerate(zip(own, wide.shape, strict=True)) if sizes[0] != sizes[1]]
        if len(grown) == 1 and wide.shape[grown[0]] == axis.ta_size:
            return grown[0]
        return 1 if is_second or wide.shape[-1] != axis.ta_size else -1

    def forward(wide: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(wide, Tensor):  # no norm, but a token that is expanded to a shape
            return plain(wide, *args, **kwargs)
        dim = place(wide)
        positions = torch.tensor(axis.positions(), device=wide.device)

        def narrow(tensor: Tensor) -> Tensor:  # a gate beside the input is as wide
            fits = tensor.ndim == wide.ndim and tensor.shape[dim] == axis.ta_size
            return tensor.index_select(dim, positions) if fits else tensor

        narrowed = tree_map_only(Tensor, narrow, ((wide, *args), kwargs))
        try:
            made: Tensor = module(*narrowed[0], **narrowed[1])
            return torch.zeros_like(wide).index_copy(dim, positions, made.to(wide.dtype))
        except Exception:  # no norm, but a vector of weights that its module combines with others, as DoRA's
            return plain(wide, *args, **kwargs)

    return forward


def _holds_layers(part: nn.Module) -> bool:
    return any(True for child in part.children() for _ in child.parameters())


def _output_axes(student: nn.Module, placements: Mapping[str, Placement]) -> dict[str, Axis]:
    """The axis on which a module's outputs lie, by module name."""
    found: dict[str, Axis] = {}
    for name, placement in placements.items():
        path, _, leaf = name.rpartition(".")
        owner = student.get_submodule(path)
        if not placement.axes or isinstance(owner, nn.RNNBase) or path in found or _holds_layers(owner):
            continue
        roles = [axis_role(owner, leaf, axis) for axis in range(len(placement.axes))]
        if len(placement.axes) == 1 or "out" in roles or "embedding" in roles:
            found[path] = placement.axes[output_axis(owner, leaf, len(placement.axes))]
    return found
