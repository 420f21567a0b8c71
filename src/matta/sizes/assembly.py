"""Put a sub-model together from the structure of both modules and slices of the TA's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from matta.errors import SubModelError
from matta.nesting.closures import holders
from matta.nesting.copying import copy_module, holds_same
from matta.nesting.declarations import LayerMap, translate
from matta.nesting.known_modules import DEPTHS, LAYER_INDICES, size_attributes
from matta.nesting.layout import Axis, Segment
from matta.nesting.plan import Placement, Plan
from matta.nesting.slicing import LiveSlice, bind, skeleton, slices_of
from matta.sizes.units import Unit, block_lists

Choices = Mapping[str, str]


def assemble(ta: nn.Module, student: nn.Module, plan: Plan, units: Sequence[Unit], choices: Choices) -> nn.Module:
    """A live module in which each unit is as chosen.

    Raises:
        SubModelError: blocks cannot be mixed, or a narrow layer is not shared with the Student.
    """
    if any(unit.runs_through for unit in units):
        _refuse_mixture(choices)
    widths = [choices[unit.name] for unit in units if not unit.is_block]
    narrow = bool(widths) and set(widths) == {"narrow"}
    made, sources = _student_base(student) if narrow else _ta_base(ta)
    before = list(made.modules())
    for layers in block_lists(student, plan):
        blocks = [unit for unit in units if unit.layers == layers]
        kept = [(layers.indices[i], "narrow") for i in range(len(layers.indices))] if narrow and not blocks else None
        chosen = kept or [(unit.index, choices[unit.name]) for unit in blocks] or None
        if chosen is not None:
            path = layers.student if narrow else layers.ta
            _fill_blocks(made, sources, path, (ta, student, plan, layers), [c for c in chosen if c[1] != "skip"])
    if not narrow:
        _narrow_widths(made, sources, student, plan, units, choices)
    if {choices[unit.name] for unit in units} - {"skip"} == {"narrow"}:
        _take_sizes(made, student)
    _share_configs(made)
    _refuse_stale(made, before)
    bind(made, sources)
    return made


def _refuse_stale(made: nn.Module, before: Sequence[nn.Module]) -> None:
    """Blocks that were replaced must not be run from a function or a plain list that still holds them.

    Raises:
        SubModelError: with the attributes.
    """
    now = set(made.modules())
    names = holders(made, [each for each in before if each not in now])
    if names:
        raise SubModelError(
            f"{type(made).__name__} holds blocks in {', '.join(names[:4])} (a function or a plain list) as well as in "
            f"its nn.ModuleList, so that a sub-model would run the replaced ones; expected blocks that are read from "
            f"the nn.ModuleList in each forward; the Student and the TA (nested.ta) can be extracted as they are"
        )


def _refuse_mixture(choices: Choices) -> None:
    """Where one width runs through everything, blocks are as wide as it is, or skipped.

    Raises:
        SubModelError: some are wide and some narrow.
    """
    wanted = {choice for choice in choices.values() if choice != "skip"}
    if len(wanted) > 1:
        mixed = ", ".join(f"{name}: {choice}" for name, choice in list(choices.items())[:4])
        raise SubModelError(
            f"received a mixture ({mixed}, …), but the hidden width itself grows from Student to TA, so that wide and "
            f"narrow layers do not fit together; expected all wide or all narrow; nest with equal d_model to mix"
        )


def _ta_base(ta: nn.Module) -> tuple[nn.Module, dict[str, LiveSlice]]:
    made = copy_module(ta, {})
    return made, _whole(ta, "")


def _whole(ta: nn.Module, path: str) -> dict[str, LiveSlice]:
    """Slices that are all of the TA's parameters below a path."""
    found = {}
    module = ta.get_submodule(path)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        below, _, leaf = name.rpartition(".")
        found[name] = LiveSlice(module.get_submodule(below), leaf, tuple(Axis.plain(n, n) for n in parameter.shape))
    return found


def _student_base(student: nn.Module) -> tuple[nn.Module, dict[str, LiveSlice]]:
    return skeleton(student, keep_own=True), slices_of(student)


def _fill_blocks(
    made: nn.Module,
    sources: dict[str, LiveSlice],
    path: str,
    nesting: tuple[nn.Module, nn.Module, Plan, LayerMap],
    chosen: Sequence[tuple[int, str]],
) -> None:
    """Replace the entries of a module list by the chosen TA blocks, wide or narrow."""
    ta, student, plan, layers = nesting
    blocks = made.get_submodule(path)
    prefix = f"{path}." if path else ""
    for name in [name for name in sources if name.startswith(prefix)]:
        del sources[name]
    built: dict[tuple[int, str], tuple[nn.Module, dict[str, LiveSlice]]] = {}  # a repeated block stays one
    entries = []
    for position, (index, choice) in enumerate(chosen):
        ta_path = f"{layers.ta}.{index}" if layers.ta else str(index)
        key = id(ta.get_submodule(ta_path)), choice
        has_weights = next(ta.get_submodule(ta_path).parameters(), None) is not None
        if key not in built and (choice == "wide" or not has_weights):
            built[key] = copy_module(ta.get_submodule(ta_path), {}), _whole(ta, ta_path)
        elif key not in built:
            built[key] = _narrow_block(ta, student, plan, layers, index)
        block, found = built[key]
        _renumber(block, position)
        entries.append(block)
        sources.update({f"{prefix}{position}.{name}": live for name, live in found.items()})
    for position in reversed(range(len(blocks))):  # type: ignore[arg-type]
        del blocks[position]  # type: ignore[operator]
    blocks.extend(entries)  # type: ignore[operator]
    _set_depth(made, ta, layers, [index for index, _ in chosen])


def _narrow_block(
    ta: nn.Module, student: nn.Module, plan: Plan, layers: LayerMap, index: int
) -> tuple[nn.Module, dict[str, LiveSlice]]:
    """A TA block at the Student's width: the structure of a Student block over the TA block's weights."""
    ta_path = f"{layers.ta}.{index}" if layers.ta else str(index)
    names = {name for name, _ in ta.get_submodule(ta_path).named_parameters(remove_duplicate=False)}
    template = _template(ta, student, plan, layers, index, names)
    if template is None:
        _require_one_width(plan, layers, index)
        return copy_module(ta.get_submodule(ta_path), {}), _whole(ta, ta_path)
    path = f"{layers.student}.{template}" if layers.student else str(template)
    home = f"{layers.ta}.{layers.indices[template]}" if layers.ta else str(layers.indices[template])
    block = student.get_submodule(path)
    own = slices_of(block)
    found = dict(own)
    for name in own:
        placement = plan.placements[f"{path}.{name}"]
        ta_name = _below(placement, layers)
        if ta_name is not None:
            below, _, leaf = f"{ta_path}.{ta_name}".rpartition(".")
            found[name] = LiveSlice(ta.get_submodule(below), leaf, placement.axes, detach=own[name].detach)
    made = skeleton(block, keep_own=True)
    _take_kind(made, ta.get_submodule(ta_path), ta.get_submodule(home))
    return made, found


def _take_kind(block: nn.Module, own: nn.Module, home: nn.Module) -> None:
    """Give a narrow block what tells its TA block apart from the one that its structure was taken from.

    Blocks may alternate: sliding and full attention, with and without rotary positions. The two TA blocks have
    the same widths, so that what differs between them is of this sort, if it does not depend on the width.
    """
    if own is home:
        return
    parts, homes = dict(own.named_modules()), dict(home.named_modules())
    for path, part in block.named_modules():
        if path in parts and path in homes:
            mine, old, new = vars(part), vars(homes[path]), vars(parts[path])
            for name in [name for name, value in new.items() if _is_plain(name, value) and name in mine]:
                if mine[name] == old.get(name) != new[name]:
                    setattr(part, name, new[name])
            for name, buffer in part._buffers.items():
                if _is_same(buffer, homes[path]._buffers.get(name)) and buffer is not None:
                    other = parts[path]._buffers[name]
                    part._buffers[name] = None if other is None else other.clone()


def _is_plain(name: str, value: Any) -> bool:
    known = name.startswith("_") or name == "training" or name in LAYER_INDICES
    return not known and (value is None or isinstance(value, bool | int | float | str))


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two buffers hold the same constants."""
    if one is None or other is None or one.is_meta or other.is_meta:
        return False
    return one.shape == other.shape and holds_same(one, other)


def _below(placement: Placement, layers: LayerMap) -> str | None:
    """The name of a parameter within its TA block; None if it lives elsewhere (tied)."""
    prefix = f"{layers.ta}." if layers.ta else ""
    if not placement.ta.startswith(prefix):
        return None
    return placement.ta[len(prefix) :].partition(".")[2]


def _template(
    ta: nn.Module, student: nn.Module, plan: Plan, layers: LayerMap, index: int, names: set[str]
) -> int | None:
    """The Student block whose structure a TA block takes: its own, or the nearest with the same parameters."""
    prefix = f"{layers.ta}." if layers.ta else ""
    if index in layers.indices:
        candidates = [layers.indices.index(index)]
    else:
        candidates = sorted(range(len(layers.indices)), key=lambda i: abs(layers.indices[i] - index))
    for candidate in candidates:
        path = f"{layers.student}.{candidate}" if layers.student else str(candidate)
        block = student.get_submodule(path)
        live, own = slices_of(block), dict(block.named_parameters())
        fits = set(live) == names and _has_sizes(plan, path, ta.get_submodule(f"{prefix}{index}"), names)
        if live and set(live) == set(own) and (index in layers.indices or fits):
            return candidate
    return None


def _require_one_width(plan: Plan, layers: LayerMap, index: int) -> None:
    """Refuse a narrow block of another kind than all of the Student's, unless narrow and wide are the same."""
    prefix = f"{layers.student}." if layers.student else ""
    is_private = any(name.startswith(prefix) for name in plan.private)
    if is_private or any(each.grows for name, each in plan.placements.items() if name.startswith(prefix)):
        raise SubModelError(
            f"the TA's block {index} of {layers.ta or 'the module'} cannot be narrow: no Student block shares all of "
            f"its parameters with the TA; take it wide or skip it, or nest with share='all'"
        )


def _has_sizes(plan: Plan, path: str, block: nn.Module, names: set[str]) -> bool:
    """Whether a TA block has the sizes of the one in which the Student's block at `path` lives."""
    return all(
        tuple(axis.ta_size for axis in plan.placements[f"{path}.{name}"].axes) == block.get_parameter(name).shape
        for name in names
    )


def _renumber(block: nn.Module, position: int) -> None:
    """Blocks that know their place (for the cache of keys and values) learn the new one."""
    for part in block.modules():
        for name in LAYER_INDICES:
            if isinstance(vars(part).get(name), int):
                setattr(part, name, position)


def _set_depth(made: nn.Module, ta: nn.Module, layers: LayerMap, kept: Sequence[int]) -> None:
    """A config that states the number of layers states the new one."""
    ta_values = {id(config): vars(config) for config in _configs(ta)}
    lists = {name: value for values in ta_values.values() for name, value in values.items() if isinstance(value, list)}
    for config in _configs(made):
        for name, value in list(vars(config).items()):
            if name in DEPTHS and value in (layers.num_ta, len(layers.indices)):
                setattr(config, name, len(kept))
            elif isinstance(value, list) and "layer" in name and len(lists.get(name, ())) == layers.num_ta:
                setattr(config, name, [lists[name][i] for i in kept])


def _configs(module: nn.Module) -> list[Any]:
    """The distinct configs that the modules hold, if they have attributes."""
    held = (vars(part).get("config") for part in module.modules())
    return list({id(config): config for config in held if hasattr(config, "__dict__")}.values())


def _take_sizes(made: nn.Module, student: nn.Module) -> None:
    """The config of a model whose layers are all narrow states the Student's sizes, apart from its depth."""
    config, other = vars(made).get("config"), vars(student).get("config")
    if not hasattr(config, "to_dict") or type(config) is not type(other):
        return
    for name, value in vars(other).items():
        before = vars(config).get(name)
        is_size = type(before) is int and (value is None or type(value) is int) and not name.endswith("_id")
        if is_size and name not in DEPTHS and before != value:
            setattr(config, name, value)


def _share_configs(made: nn.Module) -> None:
    """Parts whose configs are equal hold one, so that what is set in it (the kind of attention) holds for all."""
    seen: list[Any] = []
    for part in made.modules():
        config = vars(part).get("config")
        if hasattr(config, "to_dict"):  # of Transformers; others may not be comparable
            same = next((each for each in seen if type(each) is type(config) and each == config), None)
            if same is None:
                seen.append(config)
            elif same is not config:
                part.config = same


def _narrow_widths(
    made: nn.Module,
    sources: dict[str, LiveSlice],
    student: nn.Module,
    plan: Plan,
    units: Sequence[Unit],
    choices: Choices,
) -> None:
    """Cut the modules that a narrow width runs through."""
    narrow = {spot for unit in units if choices[unit.name] == "narrow" for spot in unit.spots}
    touched = {spot[0].rpartition(".")[0] for unit in units for spot in unit.spots if spot in narrow}
    own = slices_of(student)
    cut: dict[int, nn.Module] = {}
    for path in sorted(touched):
        part, ta_path = student.get_submodule(path), translate(path, plan.layers)
        if id(part) in cut:  # one module under two names
            _replace(made, ta_path, cut[id(part)])
            continue
        module = cut[id(part)] = skeleton(part, keep_own=True)
        _replace(made, ta_path, module)
        names = [name for name in own if name.rpartition(".")[0] == path]
        all_narrow = all(_chosen(plan.placements[name], narrow) == plan.placements[name].axes for name in names)
        for name in names:
            axes, live, leaf = _chosen(plan.placements[name], narrow), own[name], name.rpartition(".")[2]
            sources[f"{ta_path}.{leaf}" if ta_path else leaf] = LiveSlice(
                live.owner, live.name, axes, detach=live.detach
            )
            if leaf == "weight" and not all_narrow:
                _set_sizes(module, [axis.student_size for axis in axes])


def _chosen(placement: Placement, narrow: set[tuple[str, int, int]]) -> tuple[Axis, ...]:
    axes = []
    for dim, axis in enumerate(placement.axes):
        segments: list[Segment] = []
        for index, segment in enumerate(axis.segments):
            keep = (placement.student, dim, index) in narrow
            segments.append(segment if keep else segment.widened())
        axes.append(replace(axis, segments=tuple(segments)))
    return tuple(axes)


def _replace(made: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(made.get_submodule(parent), leaf, module)


def _set_sizes(module: nn.Module, sizes: Sequence[int]) -> None:
    for attribute, axis in (size_attributes(module) or {}).items():
        old = getattr(module, attribute)
        setattr(module, attribute, (sizes[axis],) if isinstance(old, tuple) else sizes[axis])
