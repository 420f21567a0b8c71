"""Check a nesting by running it.

Axes are matched by size, and a fused axis of the right size still runs when it is cut in the wrong
places. The probe leaves only the Student's slices in a copy of the TA, sets all else to zero, and
compares what that copy computes with what the Student computes on the same weights: they are equal
when every slice is the right one (`matta.nesting.silencing`). Where they are not, other cuts of one axis at a time
are tried; the only one with which the two agree is taken, and noted in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import nn

from matta.errors import LayoutError, NestingError, ProbeError
from matta.nesting.ambiguity import refuse_ambiguous_axes
from matta.nesting.batches import Batch, call, eval_mode, split_labels
from matta.nesting.known_modules import output_axis
from matta.nesting.layout import Layout
from matta.nesting.matching import Shown, family, shown_layouts
from matta.nesting.plan import Placement, Plan
from matta.nesting.silencing import CannotRunError, Difference, SilencedPair, silenced_pair
from matta.nesting.slicing import is_live, materialize

FOUND = "found by the probe"
_MOST_CHANGES = 4


def probe_pair(student: nn.Module, ta: nn.Module, plan: Plan, example: Batch) -> None:
    """Check the nesting of one Student; see `matta.probe`.

    Raises:
        ProbeError: the two computations differ, a module does not run on the example, or the modules have no weights
            (meta device).
    """
    own = materialize(student) if is_live(student) else student
    shown = shown_layouts(own, ta, example) if _has_weights(ta) else Shown()
    pair = _pair(own, ta, plan, example, shown)
    try:
        found = pair.compare(plan.placements)
    except CannotRunError as error:
        raise ProbeError(_cannot_run(ta, example, str(error))) from error
    if found is not None:
        raise ProbeError(_message(plan, found, _mend(pair, plan, found, ()), _hidden(plan, shown)))


def settle_pair(
    student: nn.Module, ta: nn.Module, plan: Plan, example: Batch, shown: Shown, declares: Callable[[str], bool]
) -> Plan:
    """The plan with which the Student's part of the TA computes what the Student computes.

    That is the given one, or one in which axes that nobody declared are cut in the only way that agrees. Parameters
    that the example does not reach are cut as those of other blocks are. Where the silenced TA cannot be run, it is
    the given plan if `shown` or a declaration says how everything grows.

    Raises:
        ProbeError: there is no such plan or more than one, a module does not run on the example, or the modules
            have no weights (meta device).
        NestingError: it is ambiguous how a parameter that the example does not reach is cut.
    """
    pair = _pair(student, ta, plan, example, shown)
    try:
        found = pair.compare(plan.placements)
    except CannotRunError as error:
        unknown = [each for each in plan.placements.values() if each.grows and not _is_told(each, shown, declares)]
        message = _cannot_run(ta, example, str(error))
        if unknown or not message.startswith("the TA cannot be probed"):
            raise ProbeError(message) from error
        return _noted(plan, dict(plan.placements), "not probed")
    if found is not None:
        told = [name for name in shown.parameters if not declares(name) and name not in shown.reordered]
        mend = _mend(pair, plan, found, told)
        taken = {name: each for name, each in mend.placements.items() if each != plan.placements[name]}
        if not mend.is_only or any(map(declares, taken)):
            raise ProbeError(_message(plan, found, mend, _hidden(plan, shown)))
        plan = _noted(plan, taken, FOUND)
    return _with_unread(student, ta, plan, pair.unread(), lambda name: _is_told(plan.placements[name], shown, declares))


def _pair(student: nn.Module, ta: nn.Module, plan: Plan, example: Batch, shown: Shown) -> SilencedPair:
    if not _has_weights(ta):
        raise ProbeError("the TA is on the meta device and cannot be run; probe it once its weights are there")
    return silenced_pair(student, ta, plan, split_labels(example)[0], {**shown.buffers, **shown.norms}, shown.spread)


def _has_weights(ta: nn.Module) -> bool:
    return not any(parameter.is_meta for parameter in ta.parameters())


def _is_told(placement: Placement, shown: Shown, declares: Callable[[str], bool]) -> bool:
    """Whether each axis that grows is declared, or was followed and is not in an order that data give it."""
    grown = {axis for axis, each in enumerate(placement.axes) if each.grows}
    layout = None if placement.ta in shown.reordered else shown.parameters.get(placement.ta)
    return declares(placement.student) or (layout is not None and grown <= set(layout.axes))


def _hidden(plan: Plan, shown: Shown) -> list[tuple[str, int, str]]:
    """The growing axes that the run lost from sight, and where; those of outputs, whose cut decides, first."""
    found = [
        (name, axis, shown.lost[each.ta, axis])
        for name, each in plan.placements.items()
        for axis in range(len(each.axes))
        if each.axes[axis].grows and (each.ta, axis) in shown.lost
    ]
    return sorted(found, key=lambda each: (each[0], each[1]) in shown.inputs)


def _noted(plan: Plan, placements: Mapping[str, Placement], note: str) -> Plan:
    noted = {name: replace(each, note=note) for name, each in placements.items()}
    return replace(plan, placements={**plan.placements, **noted})


def _with_unread(
    student: nn.Module, ta: nn.Module, plan: Plan, unread: Sequence[str], is_told: Callable[[str], bool]
) -> Plan:
    """The plan with parameters that the example does not reach cut as those of their kind that it does reach.

    Of their kind are those of other blocks, else those of the same name in other modules, such as other attention.
    """
    hidden = {name for name in unread if name in plan.placements and plan.placements[name].grows}
    reached: dict[tuple[str, tuple[tuple[int, int], ...]], Placement] = {}
    for kind in (family, _last_names):
        for name, each in plan.placements.items():
            if name not in hidden:
                reached.setdefault((kind(name), _sizes(each)), each)
    cut, alone = {}, set()
    for name in hidden:
        each = plan.placements[name]
        like = reached.get((family(name), _sizes(each))) or reached.get((_last_names(name), _sizes(each)))
        if like is None:
            alone.add(name)
        elif not is_told(name) and each.axes != like.axes:
            cut[name] = replace(each, axes=like.axes)
    known = {name for name in plan.placements if name not in alone or is_told(name)}
    try:
        refuse_ambiguous_axes(student, ta, plan.placements.values() if alone - known else (), known)
    except NestingError as error:
        names = [name for name in plan.placements if name in alone - known]
        raise NestingError(
            f"the run on the example does not reach {', '.join(names)}, nor anything of their kind: {error}; or keep "
            f"them apart with private={names}"
        ) from error
    return _noted(plan, cut, "as in other blocks")


def _last_names(name: str) -> str:
    """The names of a parameter and of its module, without where the module is."""
    return f"*.{'.'.join(name.split('.')[-2:])}"


def _sizes(placement: Placement) -> tuple[tuple[int, int], ...]:
    return tuple((axis.student_size, axis.ta_size) for axis in placement.axes)


def _cannot_run(ta: nn.Module, example: Batch, error: str) -> str:
    """Why the silenced TA cannot be run: the TA itself cannot, or its copy cannot."""
    try:
        with torch.no_grad(), eval_mode(ta):
            call(ta, split_labels(example)[0])
    except Exception as own:
        return f"the TA does not run on the example: {own}; pass as `example` a batch such as it trains on"
    return (
        f"the TA cannot be probed: with all but the Student's slices silenced it fails with {error}; declare the "
        f"layouts of what grows, layouts={{...}}, or lay it out as the run of the TA itself shows: probe=False"
    )


@final
@dataclass(frozen=True, kw_only=True)
class Mend:
    """Other cuts that make the two agree, or at least get further: the placements, and each reading as layouts.

    `agrees` says whether the two agree with them; `is_only` that they do with no others that were tried.
    """

    placements: Mapping[str, Placement]
    readings: tuple[Mapping[str, str], ...]
    agrees: bool = False
    is_only: bool = False


def _mend(pair: SilencedPair, plan: Plan, first: Difference, told: Collection[str]) -> Mend:
    """Layouts of equal segments that make the probe pass, or at least get further; `told` are cut rightly."""
    placements, changes, at, is_only = dict(plan.placements), dict[str, str](), first, True
    for _ in range(_MOST_CHANGES):
        agreeing: list[tuple[dict[str, Placement], dict[str, str]]] = []
        further: list[tuple[int, dict[str, Placement], dict[str, str], Difference]] = []
        for pattern, what, tried in _candidates(pair.student, placements, told):
            try:
                found = pair.compare(tried)
            except CannotRunError:
                continue
            if found is None and not any(_is_same(tried, other) for other, _ in agreeing):
                agreeing.append((tried, {**changes, pattern: what}))
            elif found is not None and found.order > at.order:
                further.append((found.order, tried, {**changes, pattern: what}, found))
        if agreeing:
            readings = tuple(change for _, change in agreeing)
            return Mend(
                placements=agreeing[0][0], readings=readings, agrees=True, is_only=is_only and len(readings) == 1
            )
        if not further:
            break
        best = max(further, key=lambda each: each[0])
        rivals = [each for each in further if each[0] == best[0] and not _is_same(each[1], best[1])]
        is_only = is_only and not rivals
        placements, changes, at = best[1], best[2], best[3]
    return Mend(placements=placements, readings=(changes,) if changes else ())


def _is_same(one: Mapping[str, Placement], other: Mapping[str, Placement]) -> bool:
    return all(
        axis.positions() == second.positions()
        for name, each in one.items()
        for axis, second in zip(each.axes, other[name].axes, strict=True)
    )


def _candidates(
    student: nn.Module, placements: Mapping[str, Placement], told: Collection[str]
) -> Iterator[tuple[str, str, dict[str, Placement]]]:
    """Other placements: a family of parameters (the same in every block) cut in 2, 3, 4 segments."""
    families: dict[str, list[str]] = {}
    for name, placement in placements.items():
        if placement.grows and len(placement.axes) > 1 and placement.ta not in told:
            families.setdefault(family(name), []).append(name)
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


def _message(plan: Plan, found: Difference, mend: Mend, hidden: Sequence[tuple[str, int, str]]) -> str:
    what = (
        f"with all but the Student's slices zeroed, the TA differs from the Student from {found.module} on "
        f"(relative error {found.error:.2g})"
    )
    readings = [
        f"layouts={{{', '.join(f'{pattern!r}: {layout}' for pattern, layout in reading.items())}}}"
        for reading in mend.readings
    ]
    if len(readings) > 1:
        either = " or ".join(readings)
        return f"{what}; it is ambiguous how an axis is cut; declare {either}, with each of which they agree"
    if readings:
        return f"{what}; an axis is cut wrongly; declare {readings[0]}" + (
            ", with which they agree" if mend.agrees else ", which gets further but does not suffice alone"
        )
    at = [
        f"{name!r} (axis {axis}: {each.student_size} of {each.ta_size})"
        for name, placement in plan.placements.items()
        for axis, each in enumerate(placement.axes)
        if name.rpartition(".")[0] == found.module and each.grows
    ]
    what += f", which has {', '.join(at)}" if at else ""
    if hidden:
        name, axis, problem = hidden[0]
        what += (
            f"; the run does not show how {name} is cut on axis {axis} ({problem}): declare its parts in order, "
            f"layouts={{{name!r}: matta.Layout.concat([(student, ta), ...], axis={axis})}} (equal, factors)"
        )
    else:
        what += "; the run shows how each axis is cut, so that one declared in layouts= may be wrong"
    return (
        f"{what}, or, if the two models differ there by design (a scale or norm of their own width, a router over more "
        f"experts), nest with probe=False"
    )
