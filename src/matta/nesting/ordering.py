"""Put a trained module's channels in the order in which they matter, so that leading slices are the best ones.

A Student reads leading slices of its Teaching Assistant. After `order` these hold the hidden units, channels and heads
that matter most, and `nest(student, ta, warm_start="ta")` starts from them: downwards from a trained larger model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn

from matta.errors import OrderError
from matta.nesting.acceptance import require_nestable
from matta.nesting.batches import Batch, call, map_tensors, outputs_of, relative_difference, split_labels
from matta.nesting.channel_groups import Group, Left, find_groups
from matta.nesting.copying import deep_copy
from matta.nesting.dimensions import named_axes
from matta.nesting.draws import SEED, without_chance
from matta.nesting.importance import Importance, Loss, channel_scores
from matta.nesting.principal_axes import principal_axes, turn

_ROUNDING = {torch.float16: 3e-2, torch.bfloat16: 3e-2}
_TOLERANCE = 1e-4


@final
@dataclass(frozen=True, kw_only=True)
class Ordering:
    """A module whose channels are in order, and what was ordered.

    Args:
        module: The new module.
        groups: What was ordered: channels that change places together, by the axes that have them.
        scores: The scores of each group's channels in the new order.
        left: What was left where it was, and why.
        rotated: For each group whether it was turned onto principal axes.

    Example:
        >>> import matta, torch
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> print(matta.find_order(mlp, example=torch.zeros(5, 3), importance="magnitude"))
        ordered: 4 channels of 0.weight (axis 0), 0.bias (axis 0), 2.weight (axis 1)
        left: 3 channels of 0.weight (axis 1): the module takes them in
        left: 2 channels of 2.weight (axis 0), 2.bias (axis 0): they are in its output
    """

    module: nn.Module
    groups: tuple[Group, ...]
    scores: tuple[Tensor, ...]
    left: tuple[Left, ...]
    rotated: tuple[bool, ...]

    def __str__(self) -> str:
        lines = [
            f"{'rotated' if turned else 'ordered'}: {each.size} channels of {named_axes([*each.members])}"
            for each, turned in zip(self.groups, self.rotated, strict=True)
        ]
        lines += [f"left: {each.size} channels of {named_axes(each.members)}: {each.reason}" for each in self.left]
        return "\n".join(lines)


def order(
    ta: nn.Module,
    *,
    example: Any,
    data: Iterable[Batch] | None = None,
    importance: Importance = "activation",
    loss: Loss | None = None,
    num_batches: int = 32,
    rotate: bool = False,
) -> nn.Module:
    """A module that computes the same, with the channels that matter most in front.

    Hidden units, channels of a residual stream (d_model) and of convolutions, gates, and heads (with grouped queries:
    keys and values with their queries) are put in order, along all axes that share them. What is inside of a head,
    and what an input, an output or an operator fixes, stays where it is; `matta.find_order` says what and why.
    Blocks cannot change places: `matta.best_layers` says which to keep.

    Args:
        ta: The trained module. It is left as it was.
        example: A batch, or inputs alone. The module is run on it to find the channels, and in the end to check that
            the function is unchanged.
        data: Batches to measure on, for "activation" and "taylor".
        importance: "activation" (mean absolute activations, as Minitron has it), "taylor" (first-order change of the
            loss), or "magnitude" (norms of weights; needs no data).
        loss: For "taylor": a function of a module and a batch, or an objective of `matta.objectives`.
        num_batches: How many batches of `data` are read at most.
        rotate: Turn channels onto principal axes where only linear maps touch them, such as embeddings that a linear
            layer reads: leading slices then hold far more than an order can put there. The function stays the same
            to rounding. The batches are kept in memory, and each group costs a run on the example or two.

    Raises:
        OrderError: a kind of importance that is none, no data or loss where it takes some, or a function that changed.
        TracingError: the module fails on the example, or cannot be copied.
        NestingError: the module cannot be nested (lazy, compiled, scripted, live).

    Example:
        >>> mlp = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = mlp[0].weight.copy_(torch.tensor([[1.0], [3.0], [2.0]])), mlp[2].weight.fill_(1.0)
        >>> order(mlp, example=torch.ones(2, 1), importance="magnitude")[0].weight.flatten().tolist()
        [3.0, 2.0, 1.0]
    """
    return find_order(
        ta, example=example, data=data, importance=importance, loss=loss, num_batches=num_batches, rotate=rotate
    ).module


def find_order(
    ta: nn.Module,
    *,
    example: Any,
    data: Iterable[Batch] | None = None,
    importance: Importance = "activation",
    loss: Loss | None = None,
    num_batches: int = 32,
    rotate: bool = False,
) -> Ordering:
    """What `matta.order` gives, with the groups of channels that were ordered and the reasons for those that were not.

    Arguments and errors are those of `matta.order`.

    Raises:
        OrderError: as `matta.order`.
        TracingError: as `matta.order`.
        NestingError: as `matta.order`.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = find_order(mlp, example=torch.zeros(5, 3), importance="magnitude")
        >>> [group.size for group in found.groups], [left.name for left in found.left]
        ([4], ['0.weight (axis 1)', '2.weight (axis 0)'])
    """
    require_nestable(ta, "TA")
    example = example if _is_batch(example) else (example, None)
    ordered = _without_gradients(deep_copy(ta))
    groups, left = find_groups(ordered, example)
    trial = _Trial(ordered, example)
    groups, changing = trial.sorted_out(groups, trial.allows_orders)
    left += [Left(size=g.size, members=tuple(g.members), reason=_CHANGES) for g in changing]
    turned, groups = trial.sorted_out(groups, trial.allows_turns) if rotate else ([], groups)
    batches = list(islice(data or (), max(num_batches, 0))) if turned else []
    data = batches if turned and data is not None else data
    measured = channel_scores(ordered, groups, importance, data=data, loss=loss, num_batches=num_batches)
    axes = principal_axes(ordered, turned, importance, batches=batches, loss=loss)
    before = _outputs(ordered, example)
    orders = [scores.argsort(descending=True, stable=True) for scores in measured]
    for group, new in zip(groups, orders, strict=True):
        permute(ordered, group, new)
    for group, (new, _) in zip(turned, axes, strict=True):
        turn(ordered, group, new)
    _require_same(before, _outputs(ordered, example))
    return Ordering(
        module=ordered,
        groups=(*groups, *turned),
        scores=(*(found[new] for found, new in zip(measured, orders, strict=True)), *(found for _, found in axes)),
        left=tuple(left),
        rotated=(False,) * len(groups) + (True,) * len(turned),
    )


_CHANGES = "the module computes something else with them in another order"


def _is_batch(example: Any) -> bool:
    return isinstance(example, Mapping) or (isinstance(example, tuple | list) and len(example) == 2)


def _without_gradients(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.grad = None
    return module


@torch.no_grad()
def permute(module: nn.Module, group: Group, new: Tensor) -> None:
    """Put the channels of a group in a new order, in place; `new` gives the old channel of each place."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for key in group.members:
        tensor = state[key[0]]
        index = group.index(key, tensor.shape[key[1]], new).to(tensor.device)
        tensor.copy_(tensor.index_select(key[1], index))


# --- the function stays the same ------------------------------------------------------------------


def _outputs(module: nn.Module, example: Batch) -> list[Tensor]:
    modes = [(part, part.training) for part in module.modules()]
    with torch.no_grad(), without_chance():
        try:
            found = outputs_of(call(module.eval(), split_labels(example)[0]))
        finally:
            for part, mode in modes:
                part.training = mode
    return [each.detach().clone() for each in found]


def _distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value of each tensor."""
    if [each.shape for each in before] != [each.shape for each in after]:
        return float("inf")
    return max(map(relative_difference, before, after), default=0.0)


def _require_same(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    allowed = max((_ROUNDING.get(each.dtype, _TOLERANCE) for each in before), default=0.0)
    if not _distance(before, after) <= allowed:
        raise OrderError(
            f"with its channels in order the module computes something else on the example (relative difference "
            f"{_distance(before, after):.2g}, expected at most {allowed:g}); the run on the example does not show all "
            f"that ties its channels: pass a larger example, or use the module as it is"
        )


@final
class _Trial:
    """A copy on random weights, on which groups are permuted to see that nothing changes.

    Zeros and ones, which trained modules too have (fresh biases, silent branches), would hide a wrong group.
    """

    def __init__(self, module: nn.Module, example: Batch) -> None:
        for dtype in (torch.float64, torch.float32):
            self.module = _shaken(deep_copy(module)).to(dtype)
            self.example = _cast(example, dtype)
            try:
                self.before = _outputs(self.module, self.example)
            except Exception:  # the module makes tensors of another type, or is told one
                if dtype == torch.float32:
                    self.module, self.example = _shaken(deep_copy(module)), example
                    self.before = _outputs(self.module, example)
            else:
                break

    def sorted_out(
        self, groups: Sequence[Group], allows: Callable[[Sequence[Group]], bool]
    ) -> tuple[list[Group], list[Group]]:
        """The groups that can be changed so, and those with which the module computes something else."""
        if not groups or allows(groups):
            return list(groups), []
        if len(groups) == 1:
            return [], list(groups)
        middle = len(groups) // 2
        halves = self.sorted_out(groups[:middle], allows), self.sorted_out(groups[middle:], allows)
        return halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]

    def allows_orders(self, groups: Sequence[Group]) -> bool:
        """Whether a shift of all channels and an exchange of two change nothing: these generate every other order.

        Shifts are of the groups with one bit in their number, so that of each pair one is shifted without the other:
        channels that are tied out of sight of the trace do not go unnoticed.
        """
        numbered = list(enumerate(groups, start=1))
        some = [[group for i, group in numbered if i >> bit & 1] for bit in range(len(groups).bit_length())]
        return all(self._is_same_under(each, permute, _shift) for each in some) and self._is_same_under(
            groups, permute, _exchange
        )

    def allows_turns(self, groups: Sequence[Group]) -> bool:
        """Whether a turn by chance of all channels changes nothing."""
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        are_real = all(state[name].is_floating_point() for group in groups for name, _ in group.members)
        return are_real and self._is_same_under(groups, turn, _turned)

    def _is_same_under(
        self,
        groups: Sequence[Group],
        change: Callable[[nn.Module, Group, Tensor], None],
        generator: Callable[[int], Tensor],
    ) -> bool:
        changes = [generator(group.size) for group in groups]
        for group, new in zip(groups, changes, strict=True):
            change(self.module, group, new)
        try:
            after = _outputs(self.module, self.example)
        except Exception:
            return False
        finally:
            for group, new in zip(groups, changes, strict=True):
                change(self.module, group, new.T if new.ndim == 2 else new.argsort())
        return _distance(self.before, after) <= _TOLERANCE


def _shift(size: int) -> Tensor:
    return torch.arange(size).roll(1)


def _exchange(size: int) -> Tensor:
    return torch.tensor([1, 0, *range(2, size)])


def _turned(size: int) -> Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return torch.linalg.qr(matrix)[0]


def _cast(example: Batch, dtype: torch.dtype) -> Batch:
    return map_tensors(example, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


@torch.no_grad()
def _shaken(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(SEED)
    for parameter in module.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
            width = parameter.shape[1:].numel() if parameter.ndim > 1 else 16
            parameter.add_(noise / max(width, 1) ** 0.5)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._NormBase) and norm.running_mean is not None:
            assert norm.running_var is not None
            norm.running_mean.add_(torch.randn(norm.running_mean.shape, generator=generator).to(norm.running_mean))
            norm.running_var.mul_(torch.rand(norm.running_var.shape, generator=generator).to(norm.running_var) + 0.5)
    return module
