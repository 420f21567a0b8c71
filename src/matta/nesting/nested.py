"""`nest` finds where every Student parameter lives in the TA, `Nested` holds the pair, `probe` checks it by running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, final

from torch import nn

from matta.errors import MattaError, NestingError, require_kind
from matta.nesting.acceptance import require_copies, require_nestable, require_real_buffers
from matta.nesting.batches import Batch
from matta.nesting.closures import keepers
from matta.nesting.copying import copy_module
from matta.nesting.declarations import Layers, Rules
from matta.nesting.layout import Layout
from matta.nesting.live_check import require_live_computes_the_same
from matta.nesting.matching import Shown, shown_layouts
from matta.nesting.placing import plan_nesting, private_placements, ta_parameter
from matta.nesting.plan import Plan, describe, slices
from matta.nesting.probing import probe_pair, settle_pair
from matta.nesting.slicing import LiveSlice, bind
from matta.nesting.ta_start import start_from_ta
from matta.nesting.warm_start import warm_start_pair


@final
class Nested(nn.Module):
    """Students that live in a Teaching Assistant; made by `nest`.

    `ta` is the module that the user gave. `students` are live copies: they run as modules of the
    user's own classes and always show the TA's present weights. `parameters()` are the TA's and
    the private ones of the Students, each once: pass these to the optimizer.

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8))
        >>> nested.student[0], nested.ta[0]
        (Linear(in_features=3, out_features=4, bias=True), Linear(in_features=3, out_features=8, bias=True))
        >>> [tuple(parameter.shape) for parameter in nested.parameters()]
        [(8, 3), (8,), (1, 8), (1,)]
    """

    def __init__(self, ta: nn.Module, students: Sequence[nn.Module], plans: Sequence[Plan]) -> None:
        super().__init__()
        self.ta = ta
        self.students = nn.ModuleList(students)
        self.plans = tuple(plans)
        self.register_state_dict_post_hook(_drop_slices)
        self.register_load_state_dict_post_hook(_expect_no_slices)

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

    def forward(self, *_: Any, **__: Any) -> None:
        """Refused: a nesting is several models.

        Raises:
            MattaError: always.
        """
        raise MattaError("a nesting is not called; expected one of its models, nested.student(...) or nested.ta(...)")

    def __str__(self) -> str:
        plans = zip(self.students, self.plans, strict=True)
        return "\n\n".join(describe(self.ta, student, plan) for student, plan in plans)

    __repr__ = __str__


def require_nested(found: object) -> None:
    """Refuse what is no nesting.

    Raises:
        MattaError: it is something else.
    """
    require_kind("nested", found, Nested, "what matta.nest gives")


def probe(nested: Nested, example: Batch) -> None:
    """Check a nesting by running it: with all but a Student's slices silenced, the TA must be that Student.

    The Student's slices are left in a copy of the TA and everything else in it is set to zero; norms
    and attention are made to see the Student's widths. What that copy computes on the example must
    be what the Student computes. A wrong or missing layout shows as a difference.

    Raises:
        ProbeError: with the parameter at fault, and the layout that mends it where one is found.

    Example:
        >>> import matta, torch
        >>> def gated(width): return nn.Sequential(nn.Linear(3, 2 * width), nn.GLU(), nn.Linear(width, 1))
        >>> nested = matta.nest(gated(2), gated(4), layouts={"0.*": 2, "2.*": 1})
        >>> probe(nested, (torch.ones(1, 3), torch.ones(1)))  # no error: the two agree
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
    warm_start: bool | Literal["ta"] = False,
    example: Batch | None = None,
    probe: bool = True,
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
        warm_start: True: put the Student's present weights into the TA, and silence what the TA has
            beyond them, so that both start as good as that Student; refused where the TA cannot.
            "ta": the TA's weights stay, and the Student starts as its slice of them, private parameters
            and statistics of norms included; `matta.order` first puts what matters most into the
            leading slices.
        example: A batch. With it both modules are run: axes that shapes leave ambiguous (embeddings
            one after the other, flattened images, halves of a gate) are laid out as the flow of the
            data shows, and the whole nesting is probed.
        probe: False: lay both out as the run on the example shows, without comparing what they compute. For models
            that differ by design in what follows from their widths (a Fourier transform over the channels, say).

    Raises:
        NestingError: no match, a Student larger than the TA, two Student parameters on one slice,
            a rule that is none or matches nothing, an axis that shapes leave ambiguous, a warm start that
            is none, or a module that cannot be nested (lazy, compiled, scripted, live, not to be copied, reading its
            parameters other than as attributes).
        LayoutError: a layout does not fit the sizes of its axis.
        ProbeError: with `example`, the Student's part of the TA computes something else.

    Example:
        >>> student, ta = nn.Linear(4, 2), nn.Linear(8, 2)
        >>> nest(nn.Sequential(nn.Linear(3, 4), student), nn.Sequential(nn.Linear(3, 8), ta)).student[1].weight.shape
        torch.Size([2, 4])
    """
    students = [student] if isinstance(student, nn.Module) or not isinstance(student, Sequence) else list(student)
    if not students:
        raise NestingError("received an empty list of Students; expected at least one module")
    for module, role in [*((each, "Student") for each in students), (ta, "TA")]:
        require_nestable(module, role)
        require_copies(module, role)
    for each in students:
        require_real_buffers(each, ta)
    if warm_start not in (True, False, "ta"):
        raise NestingError(
            f'warm_start={warm_start!r}; expected True (from a trained Student), "ta" (from a trained TA), or False'
        )
    rules = Rules(layers or {}, layouts or {}, (private,) if isinstance(private, str) else tuple(private), share)
    shown = [None if example is None else shown_layouts(each, ta, example) for each in students]
    plans = [
        plan_nesting(each, ta, rules, seen and seen.parameters, probed=probe)
        for each, seen in zip(students, shown, strict=True)
    ]
    rules.require_all_used()
    for i, (each, seen) in enumerate(zip(students, shown, strict=True)):
        if example is not None and seen is not None:
            settled = settle_pair(each, ta, plans[i], example, seen, rules.declares) if probe else plans[i]
            plans[i] = replace(settled, products=seen.products, spanning=seen.spanning, met=seen.met)
    if warm_start is True:
        for each, plan, seen in zip(students, plans, shown, strict=True):
            warm_start_pair(each, ta, plan, example, seen or Shown())
    nested = Nested(ta, [_live(each, ta, plan) for each, plan in zip(students, plans, strict=True)], plans)
    for each, plan in zip(students, plans, strict=True):
        _require_reads(each, ta, plan, example)
    if warm_start == "ta":
        for i, (each, seen) in enumerate(zip(students, shown, strict=True)):
            own = private_placements(each, ta, plans[i], rules, seen and seen.parameters)
            start_from_ta(nested.students[i], ta, plans[i], own)
    return nested


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
            target = ta_parameter(name, placement.ta, ta)
            sizes = tuple(axis.student_size for axis in placement.axes), tuple(axis.ta_size for axis in placement.axes)
            if sizes != (tuple(named[name].shape), tuple(target.shape)):
                raise NestingError(
                    f"the plan does not fit: {name} is planned as {sizes[0]} of {sizes[1]}, and is "
                    f"{tuple(named[name].shape)} of {tuple(target.shape)}"
                )
    return Nested(ta, [_live(each, ta, plan) for each, plan in zip(students, plans, strict=True)], plans)


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


def _require_reads(student: nn.Module, ta: nn.Module, plan: Plan, example: Batch | None) -> None:
    """Refuse a Student that reads parameters from elsewhere than their modules; without an example, one that may."""
    live, named = _live(student, ta, plan), dict(student.named_parameters(remove_duplicate=False))
    names = {id(named[name]): name for name in plan.placements}
    kept = [(where, names[id(each)]) for where, each in keepers(live, [named[name] for name in plan.placements])]
    if example is not None:
        require_live_computes_the_same(live, student, example, kept=kept)
        if kept:  # a penalty is read in training alone
            require_live_computes_the_same(_live(student, ta, plan), student, example, training=True, kept=kept)
    elif kept:
        raise NestingError(
            f"the Student keeps {kept[0][1]} in {kept[0][0]!r} too, in an object, a container or a function, where it "
            f"cannot be replaced by a slice; expected it to be read as an attribute of the module that has it; if it "
            f"is, pass example=batch to have that seen"
        )


def _drop_slices(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Keep the Students' slices out of the state of a nesting: they are the TA's."""
    assert isinstance(module, Nested)
    for index, plan in enumerate(module.plans):
        for name in plan.placements:
            state.pop(f"{prefix}students.{index}.{name}", None)


def _expect_no_slices(module: nn.Module, incompatible: Any) -> None:
    """A state without the Students' slices is complete."""
    assert isinstance(module, Nested)
    slices = tuple(f"students.{i}.{name}" for i, plan in enumerate(module.plans) for name in plan.placements)
    if slices:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(slices)]
