"""One step of a parameter group: stacks of blocks, what is not preconditioned, and what is divided among processes."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from matta.errors import OptimizerError
from matta.optim.divided_parameters import is_sharded, local, sharding_group
from matta.optim.exchange import Exchange, Strip, of_strip, strip_index, strips_of
from matta.optim.first_order import GRAFTS, Entry, FirstOrder, TouchedRows
from matta.optim.grids import Grid, Piece, Whole
from matta.optim.parameter_groups import is_preconditioned, matrix_shape
from matta.optim.preconditioner import EARLY_STEPS, Refresher, num_seen
from matta.optim.stacking import Stack


@final
class GroupStep:
    """What belongs to one parameter group: stacks of blocks, and parameters that are not preconditioned."""

    def __init__(self, group: Mapping[str, Any], state: MutableMapping[Tensor, dict[str, Tensor]]) -> None:
        self.graft = GRAFTS[group["graft"]]
        places: dict[Any, _Place] = {}
        pieces: dict[Any, dict[Any, list[Piece]]] = {}
        strips = _strips(group)
        self.strips = [strip for each in strips.values() for strip in each]
        for parameter in filter(torch.is_floating_point, group["params"]):  # others never have a gradient
            key = (parameter.device, _state_dtype(parameter))
            place = places.setdefault(key, _Place(state, self.graft, key[1]))
            if is_preconditioned(parameter, group):
                whole: list[Piece] = [Whole(parameter, _grid(parameter, group))]
                found = strips.get(parameter) or whole
                shape = (is_sharded(parameter), found[0].grid.block_shape)
                pieces.setdefault(key, {}).setdefault(shape, []).extend(found)
            elif parameter.numel():
                place.take(parameter)
        kept = _by_piece(state, strips)
        for key, by_shape in pieces.items():
            places[key].stacks = [Stack(each, kept, self.graft, key[1]) for each in by_shape.values()]
        self.kept = {strip: kept[strip] for strip in self.strips if strip.is_mine}
        self.places = list(places.values())
        self.stacks = [stack for place in self.places for stack in place.stacks]
        self.refresher = Refresher([factors for stack in self.stacks for factors in stack.factors])
        self.exchanges = _exchanges(self.strips)

    def step(self, group: dict[str, Any], process_group: dist.ProcessGroup | None) -> None:
        """One step of the group's parameters that have a gradient."""
        group["num_steps"] += 1
        for exchange in self.exchanges:
            exchange.take()
        for stack in self.stacks:
            stack.load_gradients()
        self._update_factors(group)
        step = group["num_steps"]

        def eps_of(own_steps: int) -> float:
            return max(group["root_eps"], group["young_eps"] / num_seen(step, group["statistics_every"], own_steps))

        self.refresher.refresh(step, every=group["refresh_every"], eps_of=eps_of, group=process_group)
        for place in self.places:
            place.move(group)
        for exchange in self.exchanges:
            exchange.give_back(weight_decay=group["lr"] * group["weight_decay"])

    def _update_factors(self, group: dict[str, Any]) -> None:
        step = group["num_steps"]
        if step not in EARLY_STEPS and step % group["statistics_every"]:
            return
        decay = group["betas"][1] ** (step - group["statistics_step"])
        weight = 1.0 - decay
        if not self.graft.decays:
            decay, weight = 1.0, 1.0
        group["statistics_step"] = step
        for stack in self.stacks:
            stack.update_factors(decay=decay, weight=weight)


@final
class _Place:
    """A group's parameters on one device with state of one type: the graft moves them in one call."""

    def __init__(self, state: Mapping[Tensor, dict[str, Tensor]], graft: FirstOrder, dtype: torch.dtype) -> None:
        self.state, self.graft, self.dtype = state, graft, dtype
        self.stacks: list[Stack] = []
        self.plain: list[Tensor] = []

    def take(self, parameter: Tensor) -> None:
        """A parameter that is not preconditioned; a state of another type (loaded, say) becomes one of this place's."""
        self.plain.append(parameter)
        kept = self.state.get(parameter, {})
        for name in kept.keys() & set(self.graft.state_names):
            kept[name] = kept[name].to(self.dtype)

    def move(self, group: Mapping[str, Any]) -> None:
        """One step of the graft, along the preconditioned direction where there is one."""
        parameters = [each for each in self.plain if each.grad is not None]
        weight_decay = group["lr"] * group["weight_decay"]
        rows = [self._rows(each) for each in parameters if _is_sparse(each) and each.grad._nnz()]  # type: ignore[union-attr]
        parameters = [each for each in parameters if not _is_sparse(each)]
        ours = [local(each) for each in parameters]
        decayed = [*ours, *(each.target for each in rows)]
        if weight_decay and decayed:
            torch._foreach_mul_(decayed, 1.0 - weight_decay)
        plain = [self._plain_entry(each, mine) for each, mine in zip(parameters, ours, strict=True)]
        entries = [entry for stack in self.stacks for entry in stack.graft_entries()]
        entries += [entry for entry in plain if entry[0].numel()]  # of a short vector a process may hold nothing
        entries += [each.entry for each in rows]
        if not entries:
            return
        targets, gradients, states = (list(each) for each in zip(*entries, strict=True))
        torch._foreach_add_([state["step"] for state in states], 1.0)
        self.graft.move(targets, gradients, states, group["lr"], group)
        for mine, (target, _, _) in zip(ours, plain, strict=True):
            if target is not mine:
                mine.copy_(target)
        for each in rows:
            each.write()
        for stack in self.stacks:
            stack.move(momentum=group["betas"][0], weight_decay=weight_decay)

    def _plain_entry(self, parameter: Tensor, mine: Tensor) -> Entry:
        """This process's part of the parameter where it is contiguous and as precise as its state, else a copy."""
        assert parameter.grad is not None
        state = self._state_of(parameter)
        gradient = local(parameter.grad).to(self.dtype).contiguous()
        return mine.to(self.dtype).contiguous(), gradient, {name: local(value) for name, value in state.items()}

    def _rows(self, parameter: Tensor) -> TouchedRows:
        return TouchedRows(parameter, self._state_of(parameter), self.dtype)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in self.graft.state_names:
                state[name] = torch.zeros_like(parameter, dtype=self.dtype, memory_format=torch.contiguous_format)
        return state


def refuse_misfit(parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuse a state of a whole parameter of another shape, which would be broadcast, or fail in the next step.

    Raises:
        OptimizerError: with both shapes.
    """
    if is_sharded(parameter) or any(strip_index(name) is not None for name in state):
        return
    shapes = dict.fromkeys(state, tuple(parameter.shape)) | {"step": ()}
    if is_preconditioned(parameter, group):
        grid = _grid(parameter, group)
        rows, columns = grid.block_shape
        shapes = dict.fromkeys(state, (grid.num_blocks, rows, columns)) | {"step": ()}
        for side, name in ((rows, "left"), (columns, "right")):
            shapes |= dict.fromkeys((name, f"{name}_root"), (grid.num_blocks, side, side))
    for name, value in state.items():
        if tuple(value.shape) != shapes[name]:
            raise OptimizerError(
                f"received a state with {name} of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}, which needs {shapes[name]}; expected the parameters that it was saved of, "
                f"in the same order"
            )


def _is_sparse(parameter: Tensor) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse


def _grid(parameter: Tensor, group: Mapping[str, Any]) -> Grid:
    return Grid.of(*matrix_shape(parameter), block_size=group["block_size"])


def owned_strips(group: Mapping[str, Any]) -> dict[Tensor, set[int]]:
    """The strips that this process owns of each sharded matrix of a group, by number."""
    return {parameter: {each.index for each in own if each.is_mine} for parameter, own in _strips(group).items()}


def _strips(group: Mapping[str, Any]) -> dict[Tensor, list[Strip]]:
    """The strips of the group's sharded matrices."""
    divided = [p for p in group["params"] if is_sharded(p) and is_preconditioned(p, group)]
    found: dict[Tensor, list[Strip]] = {parameter: [] for parameter in divided}
    for strip in strips_of([(parameter, _grid(parameter, group)) for parameter in divided]):
        found[strip.parameter].append(strip)
    return found


def _by_piece(
    state: MutableMapping[Tensor, dict[str, Tensor]], strips: Mapping[Tensor, list[Strip]]
) -> Mapping[Any, dict[str, Tensor]]:
    """The state by piece: that of a strip is what was loaded for it, or its part of what was for the whole matrix."""
    kept: dict[Any, dict[str, Tensor]] = {}
    for parameter, own in strips.items():
        loaded = state.pop(parameter, {})
        for strip in own:
            found = _state_of_strip(strip, loaded) if strip.is_mine else {}
            kept[strip] = {name: value.to(parameter.device, copy=True) for name, value in found.items()}
    return ChainMap(kept, state)


def _state_of_strip(strip: Strip, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first, number = strip.index * strip.grid.counts[1], strip.grid.num_blocks
    found = {}
    for name, value in loaded.items():
        if strip_index(name) is None:
            found[name] = value[first : first + number] if value.ndim else value
        elif name == of_strip(own := name.partition(".")[0], strip.index):
            found[own] = value
    return found


def _exchanges(strips: Sequence[Strip]) -> list[Exchange]:
    """One for all strips that are divided among the same processes, of one type and device."""
    found: dict[Any, list[Strip]] = {}
    for strip in strips:
        key = (sharding_group(strip.parameter), _state_dtype(strip.parameter), strip.parameter.device)
        found.setdefault(key, []).append(strip)
    return [Exchange(each, group, dtype) for (group, dtype, _), each in found.items()]


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
