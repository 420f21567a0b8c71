"""Put a trained Student's weights into the Teaching Assistant, so that both start as good as it.

The Student's weights, and the running statistics of its norms, go into their slices; what the TA has
beyond them is silenced where it would reach the Student's channels: the weights from extra inputs to
the Student's outputs, and the output projections of extra blocks, so that those are identities of a
residual stream. Everything else of the TA keeps its fresh weights, through which it learns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from matta.errors import NestingError
from matta.nesting.batches import Batch, call, eval_mode, outputs_of, relative_difference, split_labels
from matta.nesting.copying import holds_same
from matta.nesting.declarations import LayerMap, translate
from matta.nesting.draws import without_chance
from matta.nesting.known_modules import axis_role
from matta.nesting.matching import Shown
from matta.nesting.plan import Placement, Plan
from matta.nesting.slicing import write_slice
from matta.nesting.ta_start import norm_statistics

_OUTPUT_PROJECTIONS = ("c_proj", "o_proj", "out_proj", "down_proj", "wo", "w2", "fc2", "linear2", "fc_out", "proj")
_TOLERANCE = 1e-4


def warm_start_pair(student: nn.Module, ta: nn.Module, plan: Plan, example: Batch | None, shown: Shown) -> None:
    """Write the Student's weights into the TA and silence the TA's extra parts.

    With an example it is checked that the TA now computes what the Student computes.

    Raises:
        NestingError: the TA cannot start as the Student does (norms over a wider hidden state, blocks that are not
            residual), and has its weights of before again; or, without an example, it is not known what feeds a
            parameter, or what makes an extra block an identity.
    """
    if example is None:
        _refuse_unknown_inputs(student, plan)
        _refuse_other_buffers(student, ta, plan)
    before = None if example is None else [(each, each.detach().clone()) for each in (*ta.parameters(), *ta.buffers())]
    named = dict(student.named_parameters(remove_duplicate=False))
    for name, placement in plan.placements.items():
        target = ta.get_parameter(placement.ta)
        inputs = shown.input_axes(placement.ta) or _input_axes(student, name, len(placement.axes))
        _silence_extra_inputs(target, placement, inputs)
        write_slice(target, named[name], placement.axes)
    for own, statistics, axes in norm_statistics(student, ta, plan, {}):
        write_slice(statistics, own, axes)
    used = {id(ta.get_parameter(placement.ta)) for placement in plan.placements.values()}
    for layer_map in plan.layers:
        _silence_extra_blocks(ta, layer_map, example, used)
    if before is not None and example is not None:
        _require_same(student, ta, plan, example, before)


@torch.no_grad()
def _silence_extra_inputs(target: Tensor, placement: Placement, inputs: list[int]) -> None:
    """Zero the weights that lead from the TA's extra inputs to the Student's outputs."""
    if not any(placement.axes[axis].grows for axis in inputs):
        return
    fed = torch.ones(target.shape, dtype=torch.bool, device=target.device)
    outputs = fed.clone()
    for dim, axis in enumerate(placement.axes):
        inside = torch.zeros(target.shape[dim], dtype=torch.bool, device=target.device)
        inside[axis.positions()] = True
        mask = fed if dim in inputs else outputs
        mask &= inside.reshape([-1 if i == dim else 1 for i in range(target.ndim)])
    target[outputs & ~fed] = 0


def _input_axes(student: nn.Module, name: str, num_axes: int) -> list[int]:
    path, _, leaf = name.rpartition(".")
    owner = student.get_submodule(path)
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):  # weight_ih, weight_hh, weight_hr
        return [1] if num_axes > 1 else []
    return [axis for axis in range(num_axes) if axis_role(owner, leaf, axis) == "in"]


def _silence_extra_blocks(ta: nn.Module, layer_map: LayerMap, example: Batch | None, used: set[int]) -> None:
    blocks = ta.get_submodule(layer_map.ta)
    for index in range(layer_map.num_ta):
        if index in layer_map.indices:
            continue
        block = blocks[index]  # type: ignore[index]
        path = f"{layer_map.ta}.{index}" if layer_map.ta else str(index)
        if all(id(parameter) in used for parameter in block.parameters()):  # none, or a block that is repeated
            continue
        found = list(_known_projections(block)) if example is None else _search_projections(ta, block, example)
        if not found and example is None:
            raise NestingError(
                f"warm_start cannot make the extra block {path} ({type(block).__name__}) an identity: none of its "
                f"modules is a known output projection ({', '.join(_OUTPUT_PROJECTIONS)}); pass example=batch to "
                f"find them"
            )
        for parameter in found:
            torch.nn.init.zeros_(parameter)


def _known_projections(block: nn.Module) -> Iterator[nn.Parameter]:
    for name, module in block.named_modules():
        if name.rpartition(".")[2] in _OUTPUT_PROJECTIONS:
            yield from module.parameters(recurse=False)


def _search_projections(ta: nn.Module, block: nn.Module, example: Batch) -> list[nn.Parameter]:
    """The fewest modules of a block whose weights, set to zero, make it an identity; none if it cannot be."""
    captured = _capture(ta, block, example)
    leaves = [module for module in block.modules() if next(module.parameters(recurse=False), None) is not None]
    saved = {parameter: parameter.detach().clone() for parameter in block.parameters()}
    zeroed = [leaf for leaf in leaves if any(p.ndim > 1 for p in leaf.parameters(recurse=False))]
    try:
        _set_zero(zeroed, saved)
        if captured is None or not _is_identity(block, *captured):
            return []
        for leaf in list(zeroed):
            rest = [other for other in zeroed if other is not leaf]
            _set_zero(rest, saved)
            if _is_identity(block, *captured):
                zeroed = rest
        return [parameter for leaf in zeroed for parameter in leaf.parameters(recurse=False)]
    finally:
        _set_zero([], saved)


@torch.no_grad()
def _set_zero(modules: list[nn.Module], saved: dict[nn.Parameter, Tensor]) -> None:
    zero = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    for parameter, value in saved.items():
        parameter.copy_(torch.zeros_like(value) if id(parameter) in zero else value)


def _capture(ta: nn.Module, block: nn.Module, example: Batch) -> tuple[Any, Any] | None:
    """What the block is called with when the TA runs on the example."""
    seen: list[tuple[Any, Any]] = []
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        with eval_mode(ta), torch.no_grad(), without_chance():
            call(ta, split_labels(example)[0])
    finally:
        handle.remove()
    return seen[0] if seen else None


@torch.no_grad()
def _is_identity(block: nn.Module, args: Any, kwargs: Any) -> bool:
    with eval_mode(block), without_chance():
        found = block(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    found = found[0] if isinstance(found, tuple) else found
    given = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(given, Tensor):
        return False
    return isinstance(found, Tensor) and found.shape == given.shape and torch.allclose(found, given, atol=1e-5)


def _refuse_unknown_inputs(student: nn.Module, plan: Plan) -> None:
    for name, placement in plan.placements.items():
        path, _, leaf = name.rpartition(".")
        owner, grows = student.get_submodule(path), [axis for axis, each in enumerate(placement.axes) if each.grows]
        if grows and isinstance(owner, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            raise NestingError(
                f"the warm start does not know whether the TA can start as the Student: {name} is of a norm over a "
                f"width that grows; let widths grow between norms alone, or pass example=batch to have it checked"
            )
        is_vector = sum(axis.ta_size > 1 for axis in placement.axes) < 2
        if is_vector or _input_axes(student, name, len(placement.axes)):
            continue
        if any(axis_role(owner, leaf, axis) == "unknown" for axis in grows):
            raise NestingError(
                f"the warm start does not know which axis of {name} ({type(owner).__name__}, of shape "
                f"{tuple(student.get_parameter(name).shape)}) its inputs are on; expected a layer of torch; pass "
                f"example=batch to have them found"
            )


def _refuse_other_buffers(student: nn.Module, ta: nn.Module, plan: Plan) -> None:
    if others := _other_buffers(student, ta, plan):
        raise NestingError(
            f"the warm start does not know whether the TA can start as the Student: {_told(others)}, or pass "
            f"example=batch to have it checked"
        )


def _other_buffers(student: nn.Module, ta: nn.Module, plan: Plan) -> list[str]:
    """Buffers of one shape and other values, which a training may have set: the means of the inputs, say."""
    theirs = dict(ta.named_buffers())
    pairs = ((name, buffer, theirs.get(translate(name, plan.layers))) for name, buffer in student.named_buffers())
    norms = {id(own) for own, _, _ in norm_statistics(student, ta, plan, {})}
    return [
        name
        for name, own, other in pairs
        if id(own) not in norms and other is not None and own.shape == other.shape and not holds_same(own, other)
    ]


def _told(buffers: list[str]) -> str:
    return f"the TA's buffer {buffers[0]} has other values than the Student's; copy them if they were learnt"


@torch.no_grad()
def _require_same(
    student: nn.Module, ta: nn.Module, plan: Plan, example: Batch, before: list[tuple[Tensor, Tensor]]
) -> None:
    """Refuse a TA that does not compute what the Student does; it then has its weights of before."""
    inputs = split_labels(example)[0]
    with eval_mode(student, ta), without_chance():
        found = [outputs_of(call(module, inputs)) for module in (student, ta)]
    pairs = list(zip(*found, strict=False))
    alike = [pair for pair in pairs if pair[0].shape == pair[1].shape]  # others: hidden states beside the logits
    is_comparable = len(found[0]) == len(found[1]) and (alike or not pairs)
    error = max([relative_difference(*pair) for pair in alike], default=0.0) if is_comparable else float("inf")
    if error <= _TOLERANCE:
        return
    for each, value in before:
        each.copy_(value)
    others = _other_buffers(student, ta, plan)
    reason = (
        _told(others)
        if others
        else (
            "it has parts that cannot be silenced, such as norms over a wider hidden state, blocks that are not "
            "residual or a scale of their own width; let widths grow inside the blocks alone"
        )
    )
    raise NestingError(
        f"warm_start=True cannot start the TA as the Student: with the Student's weights its logits differ by "
        f"{error:.2g} (relative), since {reason}, or nest without it and start the Student alone: "
        f"nested.student.load_state_dict(student.state_dict())"
    )
