"""FSDP2 for a pair: parameters, gradients and optimizer state divided among processes (ZeRO stage 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from matta.errors import RunError
from matta.nesting.copying import is_unit
from matta.nesting.sharded_slices import refuse_sparse_tables
from matta.optim.shampoo import Shampoo

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from matta.training.cotraining import CoTraining


def shard(
    cotrain: CoTraining,
    *,
    by: Literal["block", "whole"] = "block",
    mesh: DeviceMesh | None = None,
    policy: MixedPrecisionPolicy | None = None,
) -> CoTraining:
    """Shard the parameters of a pair over the processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

    Make the optimizer after it, of `cotrain.nested.parameters()`. A process keeps its share of parameters, gradients
    and state. By block, it gathers one block of the TA at a time, for the TA's forward, for that of the Student's block
    that lives in it, and for each backward; what stands outside of blocks (embeddings, the head, a Student's private
    parameters) is there for the whole step. `fully_shard` called by yourself, on blocks of the TA and then on the pair,
    works as well; this does no more.

    `matta.extract` and `matta.save` gather what they need: call them on all processes.

    Args:
        cotrain: The pair; changed in place, and given back.
        by: "block": each entry of the TA's outermost module lists by itself; "whole": the pair as one.
        mesh: The processes; None: all of them.
        policy: Types of the gathered parameters and of the reduction. `MixedPrecisionPolicy(param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32)` computes in bfloat16 and keeps the weights as they are.

    Raises:
        RunError: `by` is neither, or the TA has no module list with parameters.
        NestingError: a table has sparse gradients.

    Example:
        >>> import matta, torch
        >>> nested = matta.nest(nn.Linear(4, 1), nn.Linear(4, 1))
        >>> shard(matta.CoTraining(nested, matta.objectives.Binary()))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        matta.errors.RunError: received by='block' for a TA without a module list of blocks; expected by='whole', ...
    """
    if by not in ("block", "whole"):
        raise RunError(f"received by={by!r}; expected 'block' or 'whole'")
    refuse_sparse_tables([cotrain.nested.ta, *cotrain.nested.students])
    blocks = blocks_of(cotrain.nested.ta) if by == "block" else []
    if by == "block" and not blocks:
        raise RunError(
            "received by='block' for a TA without a module list of blocks; expected by='whole', or fully_shard on the "
            "modules that you choose and then on the CoTraining"
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for module in (*blocks, cotrain):
        fully_shard(module, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    return cotrain


def blocks_of(ta: nn.Module) -> list[nn.Module]:
    """The entries of the outermost module lists, each once: what `shard(by="block")` gathers together.

    Example:
        >>> blocks_of(nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Identity()])))
        [Linear(in_features=2, out_features=2, bias=True)]
    """
    found: dict[int, nn.Module] = {}
    for part in ta.children():
        entries = part.children() if isinstance(part, nn.ModuleList) else blocks_of(part)
        found |= {id(each): each for each in entries if next(each.parameters(), None) is not None}
    return list(found.values())


@contextmanager
def _keeping_gradients(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def no_sync(model: nn.Module, accelerator: Accelerator) -> AbstractContextManager[Any]:
    """While a batch is not the last of its step, its gradients stay on this process."""
    return _keeping_gradients(model) if is_unit(model) else accelerator.no_sync(model)


def divided_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of one process as this process of a sharded run holds it; what is divided already stays as it is."""
    parameters: list[Any] = [each for group in optimizer.param_groups for each in group["params"]]
    if isinstance(optimizer, Shampoo) or not any(hasattr(each, "placements") for each in parameters):
        return state
    from torch.distributed.tensor import distribute_tensor

    def divided(value: Any, like: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != like.shape or hasattr(value, "placements"):
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    numbers = [number for group in state["param_groups"] for number in group["params"]]
    like = dict(zip(numbers, parameters, strict=True))
    found = {
        number: {name: divided(value, like[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": found}
