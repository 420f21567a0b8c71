"""Sub-models between Student and Teaching Assistant: any choice of wide and narrow layers (4.2.3).

A layer is one of two things. A *block* is an entry of a module list whose growth stays within it
(the FFN and heads of a Transformer block): it is taken wide (the TA's), narrow (of the Student's
width, from the same TA block), or skipped. A *dimension* is a width that runs between modules (a
hidden layer of an MLP, the embeddings): it is named by the first module that puts it out, and is
wide or narrow. Where a width runs through all blocks (d_model M-nesting), layers cannot be mixed:
the one layer is then called "hidden", and the blocks follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product, zip_longest
from random import Random
from typing import final

from torch import nn

from matta.errors import SubModelError
from matta.nesting.closures import OF_MODULES
from matta.nesting.copying import holds_same
from matta.nesting.nested import Nested, require_nested
from matta.nesting.slicing import skeleton, slices_of
from matta.sizes.assembly import assemble
from matta.sizes.units import Unit, find_units

NARROW, WIDE, SKIP = "narrow", "wide", "skip"
_MOST_LISTED = 64


@final
@dataclass(frozen=True)
class SubModel:
    """Which layers are wide, narrow or skipped, by name (see `layer_names`); the others are `default`.

    Raises:
        SubModelError: a choice that is none of the three.

    Example:
        >>> SubModel({"h.0": "wide"}) == SubModel({"h.0": "wide"}, default="narrow")
        True
    """

    choices: Mapping[str, str] = field(default_factory=dict)
    default: str = NARROW

    def __post_init__(self) -> None:
        if self.default not in (NARROW, WIDE):
            raise SubModelError(f"received default={self.default!r}; expected 'narrow' or 'wide'")
        if not isinstance(self.choices, Mapping):
            raise SubModelError(f"received choices={self.choices!r}; expected a mapping, such as {{'0': 'wide'}}")
        for name, choice in self.choices.items():
            if choice not in (NARROW, WIDE, SKIP):
                raise SubModelError(f"received {choice!r} for {name!r}; expected 'wide', 'narrow' or 'skip'")

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.choices.items())), self.default))


def layer_names(nested: Nested) -> tuple[str, ...]:
    """The layers that a sub-model of `nested` chooses, from the input to the output.

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> layer_names(matta.nest(tower(4), tower(8)))
        ('0',)
    """
    require_nested(nested)
    return tuple(unit.name for unit in find_units(nested.student, nested.ta, nested.plan))


def is_one_width(nested: Nested) -> bool:
    """Whether one hidden width runs through all layers, so that they are all wide or all narrow."""
    return any(unit.runs_through for unit in find_units(nested.student, nested.ta, nested.plan))


def narrow(nested: Nested) -> SubModel:
    """All layers at the Student's width; with depth M-nesting, all of the TA's layers (K = 0).

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8))
        >>> narrow(nested) == matta.SubModel({"0": "narrow"})
        True
    """
    return wide_narrow_wide(nested, 0)


def wide(nested: Nested) -> SubModel:
    """The Teaching Assistant itself (K = N).

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8))
        >>> wide(nested) == matta.SubModel({"0": "wide"})
        True
    """
    names = layer_names(nested)
    return wide_narrow_wide(nested, len(names)) if names else SubModel(default=WIDE)


def wide_narrow_wide(nested: Nested, k: int) -> SubModel:
    """The lowest k/2 and the highest k/2 layers wide, the others narrow (section 4.2.3).

    With an odd k the lower end has one more.

    Raises:
        SubModelError: k is not between 0 and the number of layers, or no layer is shared.

    Example:
        >>> import matta
        >>> def tower(width):
        ...     layers = nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        ...     return nn.Sequential(*layers)
        >>> wide_narrow_wide(matta.nest(tower(4), tower(8)), 1).choices
        {'0': 'wide', '2': 'narrow'}
    """
    names = layer_names(nested)
    if not names and nested.plan.private:
        raise SubModelError(
            "the Student shares no layer with the TA, so that there is nothing between them; expected a nesting with "
            "share='all' or patterns; matta.extract(nested) is the Student, nested.ta the TA"
        )
    if not hasattr(k, "__index__") or not 0 <= k <= len(names):
        raise SubModelError(f"received k={k}; expected 0 to {len(names)}, the number of layers: {', '.join(names)}")
    low, high = k - k // 2, k // 2
    chosen = [*names[:low], *names[len(names) - high :]]
    return SubModel({name: WIDE if name in chosen else NARROW for name in names})


def student_spec(nested: Nested) -> SubModel:
    """The Student: all narrow, and of a deeper TA the blocks alone that hold it."""
    choices = {}
    for unit in find_units(nested.student, nested.ta, nested.plan):
        is_skipped = unit.layers is not None and unit.index not in unit.layers.indices
        choices[unit.name] = SKIP if is_skipped else NARROW
    return SubModel(choices)


def same_size(nested: Nested, spec: SubModel, *others: SubModel) -> bool:
    """Whether a sub-model takes of each layer what one of the others takes.

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> same_size(matta.nest(tower(4), tower(8)), SubModel(), SubModel({"0": "narrow"}))
        True
    """
    return _choices(nested, spec)[1] in [_choices(nested, other)[1] for other in others]


def random_sub_model(nested: Nested, among: Sequence[SubModel] | None = None) -> Callable[[Random], SubModel]:
    """A draw for `CoTraining(sample=...)`: one of the sub-models you want, or each layer wide or narrow at random.

    Where one hidden width runs through all layers, they are all wide or all narrow.

    Args:
        nested: The pair.
        among: The sub-models to train along, with equal chance; None: any choice of wide and narrow layers.

    Raises:
        SubModelError: nothing to draw from, or a sub-model that `nested` does not have.

    Example:
        >>> import matta, random
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8))
        >>> random_sub_model(nested)(random.Random(0)).choices
        {'0': 'wide'}
    """
    if among is not None:
        specs = tuple(among)
        if not specs:
            raise SubModelError("received among=[]; expected at least one sub-model, or None for any")
        for spec in specs:
            _choices(nested, spec)
        return lambda random: random.choice(specs)
    names = layer_names(nested)
    if is_one_width(nested):
        return lambda random: SubModel(dict.fromkeys(names, random.choice((NARROW, WIDE))))
    return lambda random: SubModel({name: random.choice((NARROW, WIDE)) for name in names})


def alike_layers(nested: Nested) -> set[str]:
    """The blocks that are the same wide and narrow, since nothing in them grows: with depth M-nesting alone, all.

    Example:
        >>> import matta
        >>> def tower(depth): return nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth)))
        >>> sorted(alike_layers(matta.nest(tower(1), tower(2), layers={"": "first"})))
        ['0', '1']
    """
    units = [unit for unit in find_units(nested.student, nested.ta, nested.plan) if unit.layers is not None]
    if not units:
        return set()
    try:
        both = live(nested, SubModel(default=WIDE)), live(nested, SubModel())
    except SubModelError:  # some block cannot be narrow
        return set()
    found = set()
    for unit in units:
        assert unit.layers is not None, "only these are taken"
        paths = (f"{path}.{unit.index}" if path else f"{unit.index}" for path in (unit.layers.ta, unit.layers.student))
        wide_block, narrow_block = (module.get_submodule(path) for module, path in zip(both, paths, strict=True))
        if _is_alike(wide_block, narrow_block):
            found.add(unit.name)
    return found


def _is_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two live modules are of the same weights, buffers and settings, in parts of the same classes."""
    if [live.key for live in slices_of(one).values()] != [live.key for live in slices_of(other).values()]:
        return False
    parts = (skeleton(each, keep_own=True).named_modules() for each in (one, other))
    pairs = list(zip_longest(*parts, fillvalue=("", None)))
    return all(path == name and _has_same_settings(left, right) for (path, left), (name, right) in pairs)


def _has_same_settings(left: nn.Module | None, right: nn.Module | None) -> bool:
    if left is None or type(left) is not type(right):
        return False
    if any(each is not None for part in (left, right) for each in part._parameters.values()):
        return False  # private ones
    buffers = [{name: each for name, each in part._buffers.items() if each is not None} for part in (left, right)]
    if buffers[0].keys() != buffers[1].keys():
        return False
    settings = [{name: each for name, each in vars(part).items() if name not in OF_MODULES} for part in (left, right)]
    try:
        return settings[0] == settings[1] and all(
            holds_same(each, buffers[1][name]) for name, each in buffers[0].items()
        )
    except (RuntimeError, ValueError):  # tensors and arrays among them
        return False


def sizes_between(nested: Nested) -> list[SubModel] | None:
    """All mixtures of wide and narrow layers but the two ends; None: too many to list (over 64).

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> sizes_between(matta.nest(tower(4), tower(8)))
        []
    """
    names = layer_names(nested)
    if is_one_width(nested):
        return []
    if 2 ** len(names) > _MOST_LISTED:
        return None
    mixtures = product((NARROW, WIDE), repeat=len(names))
    return without_ends(nested, [SubModel(dict(zip(names, each, strict=True))) for each in mixtures])


def without_ends(nested: Nested, specs: Sequence[SubModel]) -> list[SubModel]:
    """The sub-models that are neither all narrow nor all wide.

    Raises:
        SubModelError: one of them is not of this nesting.
    """
    ends = ({NARROW}, {WIDE})
    return [spec for spec in specs if set(_choices(nested, spec)[1].values()) not in ends]


def live(nested: Nested, spec: SubModel) -> nn.Module:
    """The sub-model as a live module: it reads the TA's present weights, which it does not copy.

    Its buffers (BatchNorm statistics) are copies of those of the blocks that it consists of.

    Raises:
        SubModelError: no `SubModel`, an unknown layer, a choice that the layer does not have, or a layer whose
            weights the Student does not share.

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8))
        >>> half = live(nested, matta.SubModel({"0": "wide"}))
        >>> half[0].weight.shape, bool((half[0].weight == nested.ta[0].weight).all())
        (torch.Size([8, 3]), True)
    """
    units, choices = _choices(nested, spec)
    return assemble(nested.ta, nested.student, nested.plan, units, choices)


def _choices(nested: Nested, spec: SubModel) -> tuple[tuple[Unit, ...], dict[str, str]]:
    """The layers of a nesting, and what a sub-model takes of each."""
    require_nested(nested)
    if not isinstance(spec, SubModel):
        raise SubModelError(
            f"received {type(spec).__name__} as the sub-model; expected such as matta.SubModel({{'0': 'wide'}}), "
            f"matta.wide(nested), or the spec of a size that was chosen: size.spec"
        )
    units = find_units(nested.student, nested.ta, nested.plan)
    names = [unit.name for unit in units]
    for name in spec.choices:
        if name not in names:
            raise SubModelError(f"there is no layer {name!r}; the layers are: {', '.join(names) or 'none'}")
    choices = {unit.name: spec.choices.get(unit.name, spec.default) for unit in units}
    _refuse_skipped_dimensions(units, choices)
    return units, choices


def _refuse_skipped_dimensions(units: tuple[Unit, ...], choices: Mapping[str, str]) -> None:
    for unit in units:
        if choices[unit.name] == SKIP and not unit.is_block:
            raise SubModelError(
                f"{unit.name!r} is a width, not a block of a module list: it can be 'wide' or 'narrow', not skipped"
            )
