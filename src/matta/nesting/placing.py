"""Find where each Student parameter lives in the Teaching Assistant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import final

from torch import Tensor, nn

from matta.errors import LayoutError, NestingError
from matta.nesting.acceptance import refuse_renormalised_tables
from matta.nesting.ambiguity import refuse_ambiguous_axes
from matta.nesting.declarations import LayerMap, Rules, is_module_list, map_layers, translate
from matta.nesting.known_modules import known_layout, output_axis
from matta.nesting.layout import Axis, Layout
from matta.nesting.plan import Placement, Plan


@final
@dataclass(frozen=True)
class _Pair:
    """A Student's parameter and the TA's that it would live in, each by its name in its model."""

    student: nn.Module
    ta: nn.Module
    name: str
    ta_name: str


def plan_nesting(
    student: nn.Module, ta: nn.Module, rules: Rules, traced: Mapping[str, Layout] | None, *, probed: bool = True
) -> Plan:
    """The plan of one Student; `traced` are layouts that running both has shown, None if they were not run.

    What is not `probed` is refused here where neither the user, nor the run, nor the sizes tell how it grows.

    Raises:
        NestingError: see `matta.nest`.
        LayoutError: a layout does not fit the sizes of its axis.
    """
    named = dict(student.named_parameters(remove_duplicate=False))
    names = _abbreviated(named)
    for argument in ("layouts", "private", "share"):
        rules.seen(argument, names)
    private = _private_names(student, named, rules)
    shared = [name for name in named if name not in private]
    maps, found = map_layers(student, ta, rules.layers, shared)
    for pattern in found:
        rules.used("layers", pattern)
    rules.seen("layers", _abbreviated(_lists(student)) or "no module lists")
    for name in private:
        rules.match("layouts", name, rules.layouts)  # so that `share` can be changed alone
    placements = {}
    declared: set[str] = set()
    for name in shared:
        layout, by_user = _layout(student, name, rules)
        pair = _Pair(student, ta, name, translate(name, maps))
        placements[name] = _place(pair, layout, (traced or {}).get(name))
        refuse_renormalised_tables(student, placements[name])
        if by_user or _is_known(pair, placements[name]) or _is_traced(placements[name], traced):
            declared.add(name)
    placements = _tie(named, placements)
    _refuse_overlaps(named, ta, placements)
    if traced is None or not probed:
        refuse_ambiguous_axes(student, ta, placements.values(), declared, _namesakes(private, student, ta, maps))
    return Plan(placements, tuple(private), tuple(maps))


def _namesakes(
    private: Iterable[str], student: nn.Module, ta: nn.Module, maps: Sequence[LayerMap]
) -> Iterator[Placement]:
    """Where private parameters would live: they too tell what the TA's larger widths are for."""
    candidates = dict(ta.named_parameters(remove_duplicate=False))
    for name in private:
        parameter, target = student.get_parameter(name), candidates.get(translate(name, maps))
        if target is not None and parameter.ndim == target.ndim:
            sizes = list(zip(parameter.shape, target.shape, strict=True))
            if all(size <= ta_size for size, ta_size in sizes):
                yield Placement(name, translate(name, maps), tuple(Axis.plain(*pair) for pair in sizes))


def private_placements(
    student: nn.Module, ta: nn.Module, plan: Plan, rules: Rules, traced: Mapping[str, Layout] | None
) -> dict[str, Placement]:
    """Where private parameters would live if they were shared, of those for which the TA has room."""
    found = {}
    for name in plan.private:
        layout, _ = _layout(student, name, rules)
        with suppress(NestingError, LayoutError):
            pair = _Pair(student, ta, name, translate(name, plan.layers))
            found[name] = _place(pair, layout, (traced or {}).get(name))
    return found


def _lists(student: nn.Module) -> Iterator[str]:
    for path, module in student.named_modules():
        if is_module_list(module):
            yield path


def _abbreviated(names: Iterable[str], most: int = 12) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f", … ({len(listed)} in all)" if len(listed) > most else "")


def _private_names(student: nn.Module, named: Mapping[str, Tensor], rules: Rules) -> list[str]:
    """The private parameters; of tied ones all are, unless one is an embedding or so that is shared."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in named.items():
        by_identity.setdefault(id(parameter), []).append(name)
    private: list[str] = []
    for names in by_identity.values():
        decisions = [rules.is_private(name, student.get_submodule(name.rpartition(".")[0])) for name in names]
        if all(decisions) or any(rules.match("private", name, rules.private) for name in names):
            private += names
    return private


def _layout(student: nn.Module, name: str, rules: Rules) -> tuple[Layout | None, bool]:
    """The layout the user declared for a parameter, and whether there is one."""
    pattern = rules.match("layouts", name, rules.layouts)
    owner = student.get_submodule(name.rpartition(".")[0])
    parameter = student.get_parameter(name)
    if pattern is None:
        return _layout_of_weight(owner, name, rules) if parameter.ndim == 1 else None, False
    declared = rules.layouts[pattern]
    if isinstance(declared, Layout):
        return declared, True
    return Layout.equal(declared, output_axis(owner, name.rpartition(".")[2], parameter.ndim)), True


def _layout_of_weight(owner: nn.Module, name: str, rules: Rules) -> Layout | None:
    """What was declared for the outputs of the weight that a bias belongs to."""
    path, _, leaf = name.rpartition(".")
    weight = getattr(owner, "weight", None)
    if leaf != "bias" or not isinstance(weight, Tensor) or weight.ndim < 2:
        return None
    sibling = f"{path}.weight" if path else "weight"
    pattern = rules.match("layouts", sibling, rules.layouts)
    if pattern is None:
        return None
    declared, axis = rules.layouts[pattern], output_axis(owner, "weight", weight.ndim)
    parts = declared if isinstance(declared, int) else declared.axes.get(axis, 1)
    return Layout({0: parts})


def _place(pair: _Pair, layout: Layout | None, traced: Layout | None) -> Placement:
    name, ta_name = pair.name, pair.ta_name
    parameter = pair.student.get_parameter(name)
    target = ta_parameter(name, ta_name, pair.ta)
    if parameter.ndim != target.ndim:
        raise NestingError(
            f"{name} has shape {tuple(parameter.shape)} and the TA's {ta_name} {tuple(target.shape)}; expected the "
            f"same number of axes; keep it apart with private=[{name!r}]"
        )
    if layout is not None and any(not 0 <= axis < parameter.ndim for axis in layout.axes):
        raise LayoutError(
            f"{name} has {parameter.ndim} axes; its layout names axis {max(layout.axes)}; expected axis=0 to "
            f"{parameter.ndim - 1}"
        )
    if parameter.dtype != target.dtype:
        raise NestingError(
            f"{name} is {parameter.dtype} and the TA's {ta_name} {target.dtype}; expected one type, since they are the "
            f"same weights; cast one of the modules"
        )
    axes = []
    for axis, (size, ta_size) in enumerate(zip(parameter.shape, target.shape, strict=True)):
        if size > ta_size:
            raise NestingError(
                f"{name} is {size} long on axis {axis} and the TA's {ta_name} only {ta_size}; expected the TA to be "
                f"at least as large on each axis; build it larger, or keep it apart with private=[{name!r}]"
            )
        axes.append(_axis(pair, axis, (size, ta_size), layout, traced))
    return Placement(name, ta_name, tuple(axes))


def ta_parameter(name: str, ta_name: str, ta: nn.Module) -> nn.Parameter:
    """The TA's parameter that a Student's would live in.

    Raises:
        NestingError: there is none.
    """
    try:
        return ta.get_parameter(ta_name)
    except AttributeError:
        others = dict(ta.named_parameters(remove_duplicate=False))
        raise NestingError(
            f"the Student's {name} would live in the TA's {ta_name}, which does not exist; the TA has: "
            f"{_nearest(ta_name, others)}; build the TA from the same class, "
            f"or keep the parameter apart with private=[{name!r}]"
        ) from None


def _nearest(name: str, among: Iterable[str]) -> str:
    listed = list(among)
    return _abbreviated(get_close_matches(name, listed, n=3) or listed, most=4) or "no parameters"


def _axis(pair: _Pair, axis: int, sizes: tuple[int, int], declared: Layout | None, traced: Layout | None) -> Axis:
    if declared is not None:
        try:
            return declared.resolve(axis, *sizes)
        except LayoutError as error:
            raise LayoutError(f"{pair.name}: {error}") from None
    if sizes[0] == sizes[1]:
        return Axis.plain(*sizes)
    seen = traced if traced is not None and axis in traced.axes else None
    known = seen or _from_table(pair, axis, sizes)
    try:
        return Axis.plain(*sizes) if known is None else known.resolve(axis, *sizes)
    except LayoutError:  # traced on other blocks than the one it lives in
        return Axis.plain(*sizes)


def _from_table(pair: _Pair, axis: int, sizes: tuple[int, int]) -> Layout | None:
    """The layout of an axis in the table of known classes, looking upwards from the parameter."""
    parts, ta_parts = pair.name.split("."), pair.ta_name.split(".")
    for depth in range(1, min(len(parts), len(ta_parts), 4) + 1):
        owner = pair.student.get_submodule(".".join(parts[:-depth]))
        ta_owner = pair.ta.get_submodule(".".join(ta_parts[:-depth]))
        layout = known_layout(owner, ta_owner, ".".join(parts[-depth:]), axis, sizes)
        if layout is not None:
            return layout
    return None


def _is_known(pair: _Pair, placement: Placement) -> bool:
    """Whether the table of known classes speaks of a parameter, be it to say that it is plain."""
    sizes = [(axis.student_size, axis.ta_size) for axis in placement.axes]
    return any(_from_table(pair, i, size) is not None for i, size in enumerate(sizes) if size[0] < size[1])


def _is_traced(placement: Placement, traced: Mapping[str, Layout] | None) -> bool:
    """Whether a run has shown how each axis of a parameter grows."""
    layout = (traced or {}).get(placement.ta)
    return layout is not None and {i for i, axis in enumerate(placement.axes) if axis.grows} <= set(layout.axes)


def _tie(named: Mapping[str, Tensor], placements: Mapping[str, Placement]) -> dict[str, Placement]:
    """Names of one tied Student parameter all live where the first of them does."""
    first: dict[int, str] = {}
    tied = {}
    for name, placement in placements.items():
        canonical = first.setdefault(id(named[name]), name)
        home = placements[canonical]
        tied[name] = placement if canonical == name else Placement(name, home.ta, home.axes)
    return tied


def _refuse_overlaps(named: Mapping[str, Tensor], ta: nn.Module, placements: Mapping[str, Placement]) -> None:
    """Refuse two Student parameters on one slice: training one would move the other."""
    home: dict[int, list[Placement]] = {}
    for name, placement in placements.items():
        others = home.setdefault(id(ta.get_parameter(placement.ta)), [])
        for other in others:
            if named[other.student] is not named[name] and _overlap(other, placement):
                raise NestingError(
                    f"{other.student} and {name} of the Student are two parameters, but would live on one slice "
                    f"of the TA's {placement.ta} (tied there); tie them in the Student too, or keep one apart "
                    f"with private=[{name!r}]"
                )
        others.append(placement)


def _overlap(one: Placement, other: Placement) -> bool:
    return all(set(a.positions()) & set(b.positions()) for a, b in zip(one.axes, other.axes, strict=True))
