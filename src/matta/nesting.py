"""Nest Students into a Teaching Assistant: find, for every Student parameter, where it lives.

A nesting is a map (the paper's section 3.2, Algorithm 2): each Student parameter is a block of one
TA parameter, of which it takes some indices of each axis. Layer, depth and d_model M-nesting are
the same map with other sizes and other names; no layer type needs to be known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, final

from torch import Tensor, nn

from matta.acceptance import refuse_sparse_gradients, require_nestable, require_real_buffers
from matta.ambiguity import refuse_ambiguous_axes
from matta.batches import Batch
from matta.errors import LayoutError, NestingError, TracingError
from matta.layers import Layers, is_module_list, map_layers, translate
from matta.layout import Axis, Layout
from matta.plan import Placement, Plan, describe, slices
from matta.probing import probe_pair
from matta.slicing import LiveSlice, bind, copy_module
from matta.tables import known_layout, output_axis
from matta.tracing import trace_layouts
from matta.warmstart import warm_start_pair

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@final
class Nested(nn.Module):
    """Students that live in a Teaching Assistant; made by `nest`.

    `ta` is the module that the user gave. `students` are live copies: they run as modules of the
    user's own classes and always show the TA's present weights. `parameters()` are the TA's and
    the private ones of the Students, each once: they are what an optimizer gets.
    """

    def __init__(self, ta: nn.Module, students: Sequence[nn.Module], plans: Sequence[Plan]) -> None:
        super().__init__()
        self.ta = ta
        self.students = nn.ModuleList(students)
        self.plans = tuple(plans)
        self.register_state_dict_post_hook(_drop_slices)

    @property
    def student(self) -> nn.Module:
        """The live Student, the first of them if there are several."""
        return self.students[0]

    @property
    def plan(self) -> Plan:
        """The nesting of the first Student."""
        return self.plans[0]

    def sources(self, index: int = 0) -> dict[str, LiveSlice]:
        """What each shared parameter of a Student reads, by Student name."""
        return slices(self.ta, self.plans[index].placements)

    def __str__(self) -> str:
        plans = zip(self.students, self.plans, strict=True)
        return "\n\n".join(describe(self.ta, student, plan) for student, plan in plans)

    __repr__ = __str__


def probe(nested: Nested, example: Batch) -> None:
    """Check a nesting by running it: with all but a Student's slices silenced, the TA must be that Student.

    The Student's slices are left in a copy of the TA and everything else in it is set to zero; norms
    and attention are made to see the Student's widths. What that copy computes on the example must
    be what the Student computes. A wrong or missing layout shows as a difference.

    Raises:
        ProbeError: with the parameter at fault, and the layout that mends it where one is found.
    """
    for student, plan in zip(nested.students, nested.plans, strict=True):
        probe_pair(student, nested.ta, plan, example)


def nest(
    student: nn.Module | Sequence[nn.Module],
    ta: nn.Module,
    *,
    layers: Layers | None = None,
    layouts: Mapping[str, int | Layout] | None = None,
    private: Sequence[str] = (),
    share: str | Sequence[str] = "all",
    warm_start: bool = False,
    example: Batch | None = None,
) -> Nested:
    """Nest a Student, or several, into a larger Teaching Assistant (section 3.2).

    Parameters are matched by name; sizes give the indices. Neither module is edited: the Student is
    copied, and the TA is used as it is. With several Students, the rules hold for each, and a
    pattern must match in at least one of them.

    Args:
        student: The module to serve, or a list of them.
        ta: The Teaching Assistant, normally the Student's own class built larger.
        layers: Which blocks of the TA hold the Student's, by the path of the module list (patterns
            are welcome): "first", "last", "even", "ends", or indices in the TA (3.2.2).
        layouts: What fused axes consist of, by pattern over Student parameters: the number of equal
            segments of the output axis, or a `Layout`. 1 states that the axes are plain.
        private: Patterns of Student parameters that the Student keeps for itself.
        share: "all", "embeddings" (section 4.3.2), "none", or patterns of what is shared.
        warm_start: Put the Student's present weights into the TA, and silence what the TA has
            beyond them, so that both start as good as that Student.
        example: A batch. With it both modules are run: axes that shapes leave ambiguous (embeddings
            one after the other, flattened images, halves of a gate) are laid out as the flow of the
            data shows, and the whole nesting is probed.

    Raises:
        NestingError: no match, a Student larger than the TA, two Student parameters on one slice,
            a rule that is none or matches nothing, an axis that shapes leave ambiguous, or a module
            that cannot be nested (lazy, compiled, scripted, live, with sparse gradients).
        LayoutError: a layout does not fit the sizes of its axis.
        ProbeError: with `example`, the Student's part of the TA computes something else.

    Example:
        >>> student, ta = nn.Linear(4, 2), nn.Linear(8, 2)
        >>> nest(nn.Sequential(nn.Linear(3, 4), student), nn.Sequential(nn.Linear(3, 8), ta)).student[1].weight.shape
        torch.Size([2, 4])
    """
    students = [student] if isinstance(student, nn.Module) else list(student)
    if not students:
        raise NestingError("received an empty list of Students; expected at least one module")
    for module, role in [*((each, "Student") for each in students), (ta, "TA")]:
        require_nestable(module, role)
    for each in students:
        require_real_buffers(each, ta)
    rules = Rules(layers or {}, layouts or {}, (private,) if isinstance(private, str) else tuple(private), share)
    plans = [_plan(each, ta, rules, _trace(each, ta, example)) for each in students]
    rules.require_all_used()
    if example is not None:
        for each, plan in zip(students, plans, strict=True):
            probe_pair(each, ta, plan, example)
    if warm_start:
        for each, plan in zip(students, plans, strict=True):
            warm_start_pair(each, ta, plan, example)
    return Nested(ta, [_live(each, ta, plan) for each, plan in zip(students, plans, strict=True)], plans)


def nested_from_plans(students: Sequence[nn.Module], ta: nn.Module, plans: Sequence[Plan]) -> Nested:
    """Nest modules by plans that were made before, as a checkpoint does.

    Raises:
        NestingError: a plan does not fit the modules.
    """
    for student, plan in zip(students, plans, strict=True):
        named = dict(student.named_parameters(remove_duplicate=False))
        if set(named) != {*plan.placements, *plan.private}:
            wrong = min(set(named) ^ {*plan.placements, *plan.private})
            raise NestingError(f"the plan does not fit the Student: {wrong} is in only one of them")
        for name, placement in plan.placements.items():
            target = _ta_parameter(name, placement.ta, ta)
            sizes = tuple(axis.student_size for axis in placement.axes), tuple(axis.ta_size for axis in placement.axes)
            if sizes != (tuple(named[name].shape), tuple(target.shape)):
                raise NestingError(
                    f"the plan does not fit: {name} is planned as {sizes[0]} of {sizes[1]}, and is "
                    f"{tuple(named[name].shape)} of {tuple(target.shape)}"
                )
    return Nested(ta, [_live(each, ta, plan) for each, plan in zip(students, plans, strict=True)], plans)


@final
class Rules:
    """What the user declared, and which of it has matched something."""

    def __init__(
        self,
        layers: Layers,
        layouts: Mapping[str, int | Layout],
        private: tuple[str, ...],
        share: str | Sequence[str],
    ) -> None:
        if isinstance(share, str) and share not in ("all", "embeddings", "none"):
            raise NestingError(
                f"share={share!r}; expected 'all', 'embeddings', 'none', or a list of patterns such as [{share!r}]"
            )
        _require_mappings(layers, layouts)
        self.layers, self.layouts, self.private, self.share = layers, layouts, private, share
        self._unused: dict[tuple[str, str], str] = {}
        for argument, patterns in self._patterns().items():
            for pattern in patterns:
                self._unused[argument, pattern] = ""

    def _patterns(self) -> dict[str, Iterable[str]]:
        share = () if isinstance(self.share, str) else self.share
        return {"layers": self.layers, "layouts": self.layouts, "private": self.private, "share": share}

    def match(self, argument: str, name: str, among: Iterable[str]) -> str | None:
        """The first pattern of an argument that matches `name`."""
        found = [pattern for pattern in among if fnmatchcase(name, pattern)]
        for pattern in found:
            self._unused.pop((argument, pattern), None)
        return found[0] if found else None

    def used(self, argument: str, pattern: str) -> None:
        """Note that a pattern has matched."""
        self._unused.pop((argument, pattern), None)

    def seen(self, argument: str, what: str) -> None:
        """Note what there was to match, for the message."""
        for key in self._unused:
            if key[0] == argument:
                self._unused[key] = what

    def require_all_used(self) -> None:
        """Refuse a rule that matches nothing."""
        for (argument, pattern), what in self._unused.items():
            raise NestingError(f"{argument}={pattern!r} matched nothing; the Student has: {what}")

    def is_private(self, name: str, owner: nn.Module) -> bool:
        """Whether the Student keeps a parameter for itself."""
        if self.match("private", name, self.private):
            return True
        if isinstance(self.share, str):
            return self.share == "none" or (self.share == "embeddings" and not isinstance(owner, EMBEDDINGS))
        return self.match("share", name, self.share) is None


def _require_mappings(layers: Layers, layouts: Mapping[str, int | Layout]) -> None:
    for argument, rules in (("layers", layers), ("layouts", layouts)):
        if not isinstance(rules, Mapping):
            raise NestingError(f"{argument}={rules!r}; expected a mapping from patterns, such as {{'blocks.*': ...}}")
    for pattern, layout in layouts.items():
        if not isinstance(layout, int | Layout) or (isinstance(layout, int) and layout < 1):
            raise NestingError(
                f"layouts={{{pattern!r}: {layout!r}}}; expected the number of equal segments, or a matta.Layout"
            )


def _trace(student: nn.Module, ta: nn.Module, example: Batch | None) -> Mapping[str, Layout] | None:
    """The layouts that running both on an example shows; None without an example."""
    if example is None:
        return None
    try:
        return trace_layouts(student, ta, example)
    except TracingError:  # the probe has the last word
        return {}


def _plan(student: nn.Module, ta: nn.Module, rules: Rules, traced: Mapping[str, Layout] | None) -> Plan:
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
        placements[name] = _place(name, translate(name, maps), student, ta, layout, (traced or {}).get(name))
        refuse_sparse_gradients(student, placements[name])
        if by_user or _is_known(placements[name], student, ta):
            declared.add(name)
    placements = _tie(named, placements)
    _refuse_overlaps(named, ta, placements)
    if traced is None:
        refuse_ambiguous_axes(student, ta, placements.values(), declared)
    return Plan(placements, tuple(private), tuple(maps))


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


def _place(
    name: str, ta_name: str, student: nn.Module, ta: nn.Module, layout: Layout | None, traced: Layout | None
) -> Placement:
    parameter = student.get_parameter(name)
    target = _ta_parameter(name, ta_name, ta)
    if parameter.ndim != target.ndim:
        raise NestingError(
            f"{name} has shape {tuple(parameter.shape)} and the TA's {ta_name} {tuple(target.shape)}; expected the "
            f"same number of axes; keep it apart with private=[{name!r}]"
        )
    if layout is not None and any(not 0 <= axis < parameter.ndim for axis in layout.axes):
        raise LayoutError(f"{name} has {parameter.ndim} axes; its layout names axis {max(layout.axes)}")
    axes = []
    for axis, (size, ta_size) in enumerate(zip(parameter.shape, target.shape, strict=True)):
        if size > ta_size:
            raise NestingError(
                f"{name} is {size} long on axis {axis} and the TA's {ta_name} only {ta_size}; expected the TA to be "
                f"at least as large on each axis; build it larger, or keep it apart with private=[{name!r}]"
            )
        axes.append(_axis(name, ta_name, student, ta, axis, (size, ta_size), layout, traced))
    return Placement(name, ta_name, tuple(axes))


def _ta_parameter(name: str, ta_name: str, ta: nn.Module) -> nn.Parameter:
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


def _axis(
    name: str,
    ta_name: str,
    student: nn.Module,
    ta: nn.Module,
    axis: int,
    sizes: tuple[int, int],
    declared: Layout | None,
    traced: Layout | None,
) -> Axis:
    if declared is not None:
        try:
            return declared.resolve(axis, *sizes)
        except LayoutError as error:
            raise LayoutError(f"{name}: {error}") from None
    if sizes[0] == sizes[1]:
        return Axis.plain(*sizes)
    known = _from_table(name, ta_name, student, ta, axis, sizes) or traced
    try:
        return Axis.plain(*sizes) if known is None else known.resolve(axis, *sizes)
    except LayoutError:  # traced on other blocks than the one it lives in
        return Axis.plain(*sizes)


def _from_table(
    name: str, ta_name: str, student: nn.Module, ta: nn.Module, axis: int, sizes: tuple[int, int]
) -> Layout | None:
    """The layout of an axis in the table of known classes, looking upwards from the parameter."""
    parts, ta_parts = name.split("."), ta_name.split(".")
    for depth in range(1, min(len(parts), len(ta_parts), 4) + 1):
        owner = student.get_submodule(".".join(parts[:-depth]))
        ta_owner = ta.get_submodule(".".join(ta_parts[:-depth]))
        layout = known_layout(owner, ta_owner, ".".join(parts[-depth:]), axis, sizes)
        if layout is not None:
            return layout
    return None


def _is_known(placement: Placement, student: nn.Module, ta: nn.Module) -> bool:
    """Whether the table of known classes speaks of a parameter, be it to say that it is plain."""
    sizes = [(axis.student_size, axis.ta_size) for axis in placement.axes]
    names = placement.student, placement.ta
    return any(
        _from_table(*names, student, ta, i, size) is not None for i, size in enumerate(sizes) if size[0] < size[1]
    )


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


def _live(student: nn.Module, ta: nn.Module, plan: Plan) -> nn.Module:
    """A live copy of the Student over the TA's parameters, with private ones of its own."""
    own: dict[int, nn.Parameter] = {}
    named = dict(student.named_parameters(remove_duplicate=False))
    for name in plan.private:
        old = named[name]
        own.setdefault(id(old), nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    made = copy_module(student, {name: own[id(named[name])] for name in plan.private})
    frozen = [name for name in plan.placements if not named[name].requires_grad]
    bind(made, slices(ta, plan.placements, frozen))
    return made


def _drop_slices(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Keep the Students' slices out of the state of a nesting: they are the TA's."""
    assert isinstance(module, Nested)
    for index, plan in enumerate(module.plans):
        for name in plan.placements:
            state.pop(f"{prefix}students.{index}.{name}", None)
