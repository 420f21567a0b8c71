"""How a recipe fits on several GPUs: the memory of one of them, and what it sends, for each way to divide a run.

What a process keeps (weights, gradients, optimizer state) is counted exactly, shard by shard. What comes and goes
(gathered blocks, activations) is counted as if all of it were there at once: an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, final

from torch import nn

from matta.lm.costs import BYTES, StepMemory, models_of_step, optimizer_bytes, shampoo_bytes, step_memory
from matta.lm.decoders import make_optimizer
from matta.lm.recipe import Recipe, TrainPart
from matta.nesting.nested import Nested
from matta.optim.exchange import owners_of
from matta.optim.grids import Grid
from matta.training.sharding import blocks_of

Sharding = Literal["none", "whole", "block"]
SHARDINGS: Final[tuple[Sharding, ...]] = ("none", "whole", "block")
_BFLOAT16: Final = 2
_IN_FLIGHT: Final = 2  # blocks that FSDP2 holds gathered, and blocks of gradients on their way


@final
@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Bytes on one GPU.

    `gathered` is what comes and goes beside activations: buckets of DDP, gathered weights and their gradients of FSDP2,
    messages of Shampoo.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    heads: int

    @property
    def total(self) -> int:
        """All of it at once."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.heads


@final
@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to divide a run: memory of a GPU, and bytes that it sends in a step (as many come in)."""

    sharding: Sharding
    activation_checkpointing: bool
    memory: GpuMemory
    sent: int


def choices(recipe: Recipe, nested: Nested, *, num_gpus: int) -> list[Choice]:
    """All ways, the fastest first: without computing blocks again, then without FSDP2, then with less communication.

    Raises:
        RunError: the batch cannot be shared out.
    """
    part, context = recipe.train, recipe.data.context
    micro_batch, num_forwards = part.shares(num_gpus)
    step = step_memory(nested, part, batch=micro_batch, context=context)
    found = []
    for is_checkpointed in (False, True):
        activations = _checkpointed(nested, part, step, rows=micro_batch * context) if is_checkpointed else None
        for sharding in SHARDINGS if num_gpus > 1 else SHARDINGS[:1]:
            memory = memory_of(nested, part, step, sharding=sharding, num_gpus=num_gpus, activations=activations)
            sent = sent_in_step(nested, part, sharding=sharding, num_gpus=num_gpus, num_forwards=num_forwards)
            choice = Choice(sharding=sharding, activation_checkpointing=is_checkpointed, memory=memory, sent=sent)
            found.append(choice)
    return found


def memory_of(
    nested: Nested,
    part: TrainPart,
    step: StepMemory,
    *,
    sharding: Sharding,
    num_gpus: int,
    activations: int | None = None,
) -> GpuMemory:
    """The memory of one of several GPUs, from that of a step on one; the first GPU, which has most."""
    size = num_gpus if sharding != "none" else 1
    weights = sum(_first_shard(each, size) for each in nested.parameters()) * BYTES
    optimizer = optimizer_bytes(nested, part) if size == 1 else sharded_optimizer_bytes(nested, part, num_gpus)
    return GpuMemory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        gathered=_gathered(nested, part, sharding, num_gpus),
        activations=step.activations if activations is None else activations,
        heads=step.heads,
    )


def sharded_optimizer_bytes(module: nn.Module, part: TrainPart, num_processes: int) -> int:
    """Bytes of an optimizer's state on the process that has most, where parameters are sharded."""
    if part.optimizer == "adamw":
        return sum(2 * _first_shard(each, num_processes) * BYTES for each in module.parameters())
    found = list(_grids(module, part))
    plain = sum(2 * _first_shard(each, num_processes) * BYTES for each, grid, _ in found if grid is None)
    strips = [strip for _, grid, _ in found if grid is not None for strip in grid.strips()]
    load = [0] * num_processes
    for strip, owner in zip(strips, owners_of(strips, num_processes), strict=True):
        load[owner] += shampoo_bytes(strip)
    return plain + max(load)


def _grids(module: nn.Module, part: TrainPart) -> Iterator[tuple[nn.Parameter, Grid | None, int]]:
    """The parameters, the blocks of those that Shampoo preconditions, and the steps between refreshes of a root."""
    for group in make_optimizer(part, module).param_groups:
        for each in group["params"]:
            rows = each.shape[0] if each.ndim else 1
            columns = each.numel() // rows
            is_matrix = group["precondition"] and each.ndim > 1 and max(rows, columns) <= group["max_dim"]
            grid = Grid.of(rows, columns, block_size=group["block_size"]) if is_matrix else None
            yield each, grid, group["refresh_every"]


def sent_in_step(nested: Nested, part: TrainPart, *, sharding: Sharding, num_gpus: int, num_forwards: int) -> int:
    """Bytes that a GPU sends in a step, in rings: a reduction or a gathering of n bytes sends n (gpus - 1) / gpus.

    DDP reduces all gradients once. FSDP2 gathers all weights in each forward; by block it gathers the blocks again for
    the backward, and the Student's blocks are gathered beside the TA's; their gradients are reduced apart.
    """
    total = _numel(nested.parameters())
    width = _gathered_width(part)
    blocks = _numel(p for block in blocks_of(nested.ta) for p in block.parameters())
    of_student = _student_share(nested)
    reduced, gathered = total * BYTES, 0
    if sharding == "none":
        reduced *= 2
    else:
        gathered = total * width
    if part.optimizer == "shampoo" and sharding == "none":  # the roots, each of which one process computes
        grids = [(grid, every) for _, grid, every in _grids(nested, part) if grid is not None]
        reduced += sum(BYTES * grid.num_blocks * sum(n * n for n in grid.block_shape) // every for grid, every in grids)
    if sharding == "block":
        gathered += blocks * width + 2 * of_student * width
        reduced += of_student * BYTES
    if part.optimizer == "shampoo" and sharding != "none":
        reduced += 2 * total * BYTES // num_gpus  # the exchange with the owners
    return (gathered * num_forwards + reduced) * (num_gpus - 1) // num_gpus


def fitting(found: Iterable[Choice], memory: int) -> Choice | None:
    """The first choice that fits."""
    return next((choice for choice in found if choice.memory.total <= memory), None)


def _first_shard(parameter: nn.Parameter, size: int) -> int:
    """Elements of the first of `size` shards by rows."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // size) * (parameter.numel() // rows)


def _gathered(nested: Nested, part: TrainPart, sharding: Sharding, num_gpus: int) -> int:
    total, width = _numel(nested.parameters()), _gathered_width(part)
    if num_gpus == 1:
        return 0
    if sharding == "none":
        return total * BYTES  # DDP's buckets
    exchanged = 4 * total * BYTES // num_gpus if part.optimizer == "shampoo" else 0
    if sharding == "whole":
        return 2 * total * width + total * BYTES + exchanged  # weights, gradients, and these as they are reduced
    sizes = [_numel(block.parameters()) for block in blocks_of(nested.ta)]
    outside = total - sum(sizes)
    in_flight = _IN_FLIGHT * max(sizes, default=0)
    return 2 * (outside + in_flight) * width + max(in_flight, outside) * BYTES + exchanged


def _gathered_width(part: TrainPart) -> int:
    return _BFLOAT16 if part.precision == "bf16" else BYTES


def _student_share(nested: Nested) -> int:
    """Parameters of the TA's blocks in which the Student lives: gathered once more for its blocks."""
    shared = {placement.ta for placement in nested.plan.placements.values()}
    named = dict(nested.ta.named_parameters())
    inside = {id(p) for block in blocks_of(nested.ta) for p in block.parameters()}
    return _numel(named[name] for name in shared if name in named and id(named[name]) in inside)


def _checkpointed(nested: Nested, part: TrainPart, step: StepMemory, *, rows: int) -> int:
    """Activations where blocks are computed again: the input of each, and what is in the largest of them."""
    models = models_of_step(nested, part)
    inputs = sum(_depth(model) * model.config.hidden_size for model in models) * rows * BYTES
    return int(inputs) + step.activations // min(_depth(model) for model in models)


def _depth(model: nn.Module) -> int:
    return max(1, len(blocks_of(model)))


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(each.numel() for each in parameters)


def rows_of(found: Iterable[Choice], memory: int | None) -> Iterator[tuple[str, ...]]:
    """The table of choices, in GiB; narrow enough for a terminal: the parts of each are in the JSON."""
    for choice in found:
        each = choice.memory
        state = each.weights + each.gradients + each.optimizer
        parts = (state, each.gathered, each.activations + each.heads, each.total, choice.sent)
        fits = "" if memory is None else ("yes" if each.total <= memory else "no")
        checkpointing = "yes" if choice.activation_checkpointing else "no"
        sizes = (f"{size / 2**30:.2f}" for size in parts)
        yield choice.sharding, checkpointing, *sizes, fits
