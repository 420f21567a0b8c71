"""Check a nesting by running it.

Axes are matched by size, and a fused axis of the right size still runs when it is cut in the wrong
places. The probe leaves only the Student's slices in a copy of the TA, sets all else to zero, and
compares what that copy computes with what the Student computes on the same weights: they are equal
when every slice is the right one. Weights are drawn at random for it, since a bias of zeros would
hide its layout.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from matta.errors import LabelError, LayoutError, NestingError, ProbeError
from matta.nesting.batches import Batch, call, predictions_of, split_labels
from matta.nesting.declarations import LayerMap
from matta.nesting.known_modules import axis_role, output_axis
from matta.nesting.layout import Axis, Layout
from matta.nesting.plan import Placement, Plan
from matta.nesting.slicing import deep_copy, is_live, materialize, write_slice

_TOLERANCE = 1e-4
_SEED = 20250523
_ATTENTION = functional.scaled_dot_product_attention
_SILENT = {torch.float64: 1e-30, torch.float32: 1e-18}  # as good as zero, but a weight norm divides by it


def probe_pair(student: nn.Module, ta: nn.Module, plan: Plan, example: Batch) -> None:
    """Check the nesting of one Student; see `matta.probe`.

    Raises:
        ProbeError: the two computations differ, the Student does not run on the example, or the modules
            have no weights (meta device).
    """
    if any(parameter.is_meta for parameter in ta.parameters()):
        raise ProbeError("the TA is on the meta device and cannot be run; probe it once its weights are there")
    pair = _pair(student, ta, plan, split_labels(example)[0])
    found = pair.compare(plan.placements)
    if found is None:
        return
    mended, changes = _mend(pair, plan, found)
    raise ProbeError(_message(found, mended, changes))


@final
@dataclass(frozen=True)
class Difference:
    """The first module, in the order of execution, whose outputs differ, and by how much."""

    order: int
    module: str
    error: float


def _pair(student: nn.Module, ta: nn.Module, plan: Plan, inputs: Any) -> _Pair:
    """The pair in float64; in float32 where the Student makes tensors of that type itself."""
    try:
        return _Pair(student, ta, plan, inputs, torch.float64)
    except (LabelError, NestingError):
        raise
    except Exception:
        try:
            return _Pair(student, ta, plan, inputs, torch.float32)
        except Exception as error:
            raise ProbeError(
                f"the Student does not run on the example: {type(error).__name__}: {error}; pass as `example` a batch "
                f"such as it trains on"
            ) from error


@final
class _Pair:
    """Copies of both modules on random weights, ready to be compared under any placements."""

    def __init__(self, student: nn.Module, ta: nn.Module, plan: Plan, inputs: Any, dtype: torch.dtype) -> None:
        self.inputs = _in_type(inputs, dtype)
        self.plan, self.dtype = plan, dtype
        self.student = _random(_cast(materialize(student) if is_live(student) else deep_copy(student), dtype))
        self.ta = _cast(deep_copy(ta), dtype)
        for layer_map in plan.layers:
            _keep_blocks(self.ta, layer_map)
        self.expected, self.trace = _run(self.student, self.inputs)
        self.has_own_modules = not all(_has_room(self.ta, self.student, name) for name in plan.private)

    def compare(self, placements: Mapping[str, Placement]) -> Difference | None:
        """The first difference under these placements; None if there is none."""
        ta = copy.deepcopy(self.ta)
        _plant(self.student, ta, placements, self.plan.private, _SILENT[self.dtype])
        _copy_scales(self.student, ta)
        _narrow_norms(self.student, ta, placements)
        channels = _output_axes(self.student, placements)
        try:
            with _StudentScales(self.trace.scales):
                actual, trace = _run(ta, self.inputs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ProbeError(f"the TA does not run on the example: {error}") from error
        if not self.has_own_modules and actual.shape != self.expected.shape:
            raise ProbeError(
                f"the Student's logits have shape {tuple(self.expected.shape)} on the example and the TA's "
                f"{tuple(actual.shape)}; expected the same classes (or vocabulary) and positions of both; build the TA "
                f"with the Student's"
            )
        by_call = trace.by_call()
        for order, ((name, nth), expected) in enumerate(self.trace.by_call().items()):
            found = by_call.get((name, nth))
            narrowed = None if found is None or name not in channels else _narrowed(found, expected, channels[name])
            if narrowed is not None and _error(expected, narrowed) > _TOLERANCE:
                return Difference(order, name, _error(expected, narrowed))
        distance = 0.0 if self.has_own_modules else _error(self.expected, actual)
        return Difference(len(self.trace.outputs), "the logits", distance) if distance > _TOLERANCE else None


@final
class _Trace:
    """What leaf modules returned, in order, and the scales of attention that was called."""

    def __init__(self) -> None:
        self.outputs: list[tuple[str, Tensor]] = []
        self.scales: list[float] = []

    def by_call(self) -> dict[tuple[str, int], Tensor]:
        """The outputs by module and by which of its calls it was: cells and shared blocks are called again."""
        calls: Counter[str] = Counter()
        found = {}
        for name, output in self.outputs:
            found[name, calls[name]] = output
            calls[name] += 1
        return found


def _run(module: nn.Module, inputs: Any) -> tuple[Tensor, _Trace]:
    trace = _Trace()

    def hook(name: str) -> Any:
        def record(part: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.is_floating_point():
                trace.outputs.append((name, first.detach()))

        return record

    handles = [part.register_forward_hook(hook(name)) for name, part in module.named_modules() if _is_leaf(part)]
    try:
        with _StudentScales(trace.scales, record=True):
            return predictions_of(call(module, inputs)).detach(), trace
    finally:
        for handle in handles:
            handle.remove()


def _is_leaf(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _narrowed(found: Tensor, expected: Tensor, axis: Axis) -> Tensor | None:
    """The Student's channels of a TA module's output, on the last axis or the second; None where it has none."""
    for dim in {found.ndim - 1, min(1, found.ndim - 1)}:
        if found.ndim == expected.ndim and (expected.shape[dim], found.shape[dim]) == (axis.student_size, axis.ta_size):
            narrowed = found.index_select(dim, torch.tensor(axis.positions(), device=found.device))
            return narrowed if narrowed.shape == expected.shape else None
    return None


def _error(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    error = float((expected - found).abs().max()) if expected.numel() else 0.0
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    return error / max(scale, 1e-12) if error == error else float("inf")


def _in_type(inputs: Any, dtype: torch.dtype) -> Any:
    """The inputs of a batch with all tensors of numbers in one type."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return tree_map_only(Tensor, cast, dict(inputs) if isinstance(inputs, Mapping) else inputs)


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in a type, but for what is complex, and in eval mode."""
    return (module.double() if dtype == torch.float64 else module.float()).eval()


@torch.no_grad()
def _random(module: nn.Module) -> nn.Module:
    """The module, its weights moved at random about where they are."""
    generator = torch.Generator().manual_seed(_SEED)
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


def _copy_scales(student: nn.Module, ta: nn.Module) -> None:
    """Numbers that follow from a width, such as the scale of attention, become the Student's."""
    for name, part in student.named_modules():
        other = _submodule(ta, name)
        for attribute, value in vars(part).items() if other is not None else ():
            if isinstance(value, float) and isinstance(vars(other).get(attribute), float):
                setattr(other, attribute, value)


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _narrow_norms(student: nn.Module, ta: nn.Module, placements: Mapping[str, Placement]) -> None:
    """Norms of the TA see the Student's channels alone: statistics over a larger width are others."""
    for name, part in list(student.named_modules()):
        axis = _channels(name, part, ta, placements)
        if axis is not None and (axis.grows or isinstance(part, _BatchNorm)):
            ta.get_submodule(name).forward = _on_slice(part, axis)


def _channels(name: str, part: nn.Module, ta: nn.Module, placements: Mapping[str, Placement]) -> Axis | None:
    own = dict(part.named_parameters(recurse=False))
    if isinstance(part, nn.ParameterList | nn.ParameterDict) or any(True for _ in part.children()):
        return None
    if any(parameter.ndim > 1 for parameter in own.values()):
        return None
    if isinstance(part, _BatchNorm) and not own:
        return Axis.plain(part.num_features, ta.get_submodule(name).num_features)  # type: ignore[arg-type]
    for leaf, parameter in own.items():
        if parameter.ndim == 1 and f"{name}.{leaf}" in placements:
            return placements[f"{name}.{leaf}"].axes[0]
    sizes = [getattr(module, "normalized_shape", None) for module in (part, _submodule(ta, name))]
    if not own and all(isinstance(size, tuple) and len(size) == 1 for size in sizes):
        return Axis.plain(sizes[0][0], sizes[1][0])  # type: ignore[index]
    return None


def _on_slice(module: nn.Module, axis: Axis) -> Callable[..., Tensor]:
    """The Student's module on the Student's channels of a wider input; zeros in the others."""
    is_second = isinstance(module, _NormBase | nn.GroupNorm | nn.PReLU)  # the last axis may be as long by chance

    def forward(wide: Tensor, *args: Any) -> Tensor:
        dim = 1 if is_second or wide.shape[-1] != axis.ta_size else -1
        positions = torch.tensor(axis.positions(), device=wide.device)
        narrow: Tensor = module(wide.index_select(dim, positions), *args)
        return torch.zeros_like(wide).index_copy(dim, positions, narrow.to(wide.dtype))

    return forward


@final
class _StudentScales(TorchFunctionMode):
    """Attention without a scale takes it from its width: record the Student's, or impose them."""

    def __init__(self, scales: list[float], *, record: bool = False) -> None:
        super().__init__()
        self.scales, self.record, self.calls = scales, record, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward:  # what it calls itself is not seen by a mode
            with patch.object(functional, "scaled_dot_product_attention", self._attend):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("scale") is None and self.record:
            self.scales.append(query.shape[-1] ** -0.5)
        elif kwargs.get("scale") is None and self.calls < len(self.scales):
            kwargs["scale"] = self.scales[self.calls]
        self.calls += 1
        return _ATTENTION(query, *args, **kwargs)


def _output_axes(student: nn.Module, placements: Mapping[str, Placement]) -> dict[str, Axis]:
    """The axis on which a module's outputs lie, by module name."""
    found: dict[str, Axis] = {}
    for name, placement in placements.items():
        path, _, leaf = name.rpartition(".")
        owner = student.get_submodule(path)
        if not placement.axes or isinstance(owner, nn.RNNBase) or path in found:
            continue
        roles = [axis_role(owner, leaf, axis) for axis in range(len(placement.axes))]
        if len(placement.axes) == 1 or "out" in roles or "embedding" in roles:
            found[path] = placement.axes[output_axis(owner, leaf, len(placement.axes))]
    return found


def _mend(pair: _Pair, plan: Plan, first: Difference) -> tuple[bool, dict[str, str]]:
    """Layouts of equal segments that make the probe pass, or at least get further; found by trying."""
    placements, changes, at = dict(plan.placements), dict[str, str](), first
    for _ in range(4):
        best: tuple[Difference | None, dict[str, Placement], str, str] | None = None
        for pattern, what, tried in _candidates(pair.student, placements):
            found = pair.compare(tried)
            if found is None:
                return True, {**changes, pattern: what}
            if found.order > (at if best is None or best[0] is None else best[0]).order:
                best = (found, tried, pattern, what)
        if best is None or best[0] is None:
            return False, changes
        at, placements = best[0], best[1]
        changes[best[2]] = best[3]
    return False, changes


def _candidates(
    student: nn.Module, placements: Mapping[str, Placement]
) -> Iterator[tuple[str, str, dict[str, Placement]]]:
    """Other placements: a family of parameters (the same in every block) cut in 2, 3, 4 segments."""
    families: dict[str, list[str]] = {}
    for name, placement in placements.items():
        if placement.grows and len(placement.axes) > 1:
            families.setdefault(_pattern(name), []).append(name)
    for pattern, names in families.items():
        first = placements[names[0]]
        for axis, shape in enumerate(first.axes):
            if not shape.grows:
                continue
            owner, leaf = student.get_submodule(names[0].rpartition(".")[0]), names[0].rpartition(".")[2]
            is_output = axis == output_axis(owner, leaf, len(first.axes))
            for count in (1, 2, 3, 4, 6, 8):
                tried = _recut(student, placements, names, axis, count, is_output)
                if tried is not None:
                    yield pattern, str(count) if is_output else f"matta.Layout.equal({count}, axis={axis})", tried


def _recut(
    student: nn.Module,
    placements: Mapping[str, Placement],
    names: Sequence[str],
    axis: int,
    count: int,
    is_output: bool,
) -> dict[str, Placement] | None:
    tried = dict(placements)
    for name in names:
        targets = [(name, axis)]
        bias = f"{name.rpartition('.')[0]}.bias"
        if is_output and bias in placements:
            targets.append((bias, 0))
        for target, dim in targets:
            axes = list(placements[target].axes)
            try:
                axes[dim] = Layout.equal(count, dim).resolve(dim, axes[dim].student_size, axes[dim].ta_size)
            except LayoutError:
                return None
            tried[target] = replace(placements[target], axes=tuple(axes))
    return None if tried == placements else tried


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _message(found: Difference, mended: bool, changes: Mapping[str, str]) -> str:
    what = (
        f"with all but the Student's slices zeroed, the TA differs from the Student from {found.module} on "
        f"(relative error {found.error:.2g})"
    )
    if changes:
        remedy = ", ".join(f"{pattern!r}: {layout}" for pattern, layout in changes.items())
        return f"{what}; an axis is cut wrongly; declare layouts={{{remedy}}}" + (
            ", with which they agree" if mended else ", which gets further but does not suffice alone"
        )
    return (
        f"{what}; an axis that feeds it is fused or in another order: declare it with layouts={{...}} (matta.Layout), "
        f"take matta.trace_layouts(student, ta, example), or nest without example if the two models differ by design "
        f"(a scale or norm of their own width, a router over more experts)"
    )
