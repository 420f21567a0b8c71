"""Slices of parameters that FSDP2 keeps sharded: a Student's block gathers those of the TA's block that holds it.

`fully_shard(block)` gathers the parameters of a TA block while that block runs. The Student's block reads slices of the
same parameters at another time. So it is made to run as if it were that block a second time: FSDP gathers before its
forward and before its backward, and reduces and frees after them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from torch import Tensor, nn
from torch.distributed import get_rank, is_available, is_initialized

from matta.errors import NestingError
from matta.nesting.copying import FOLLOWS, is_unit
from matta.nesting.slicing import slices_of
from matta.nesting.sparse_tables import is_sparse_table

T = TypeVar("T")
_RUN: Final = "_run_a_student_block"


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has sharded the module, a part of it, or something that it is a part of.

    Example:
        >>> is_sharded(nn.Linear(2, 1))
        False
    """
    return any("_is_fsdp_managed_module" in part.__dict__ for part in module.modules())


def gathered(tensor: Any) -> Tensor:
    """A tensor that may be sharded, whole: on the main process in memory, on the others without its contents.

    All processes must call this.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full: Tensor = tensor.detach().full_tensor()
    return full.to("cpu" if get_rank() == 0 else "meta")


def placed(values: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A state of whole tensors as the module holds it: where it is sharded, this process's shards."""
    from torch.distributed.tensor import distribute_tensor

    targets: dict[str, Any] = module.state_dict(keep_vars=True)
    found = dict(values)
    for name, target in targets.items():
        if name in found and hasattr(target, "placements"):
            found[name] = distribute_tensor(found[name], target.device_mesh, target.placements, src_data_rank=None)
    return found


def refuse_sparse_tables(models: Iterable[nn.Module]) -> None:
    """Refuse to shard tables whose gradient is sparse, which FSDP2 cannot reduce.

    Raises:
        NestingError: a model has one.
    """
    for name, part in (each for model in models for each in model.named_modules()):
        if is_sparse_table(part):
            raise NestingError(
                f"received {name}, a table with sparse gradients, to be sharded by FSDP2, which cannot reduce them; "
                f"expected sparse=False, or DistributedDataParallel: matta.fit without matta.shard"
            )


def run_as_forward(unit: nn.Module, function: Callable[[], T]) -> T:
    """Run a function as if it were the forward of what FSDP2 gathers together, and let that go again.

    All processes must call this.
    """
    found: list[T] = []
    try:
        _runner(unit)(lambda: found.append(function()))
    finally:
        unit.reshard()  # type: ignore[operator]
    return found[0]


def follow_shards(models: Sequence[nn.Module], ta: nn.Module) -> None:
    """Make blocks of live models gather what they read of the TA's sharded blocks; done once, it stays.

    Parameters that the whole pair gathers (`fully_shard(cotrain)`) are there while the pair runs.

    Raises:
        NestingError: a table with sparse gradients is sharded.
    """
    if not (is_available() and is_initialized()):
        return
    if is_sharded(ta):
        refuse_sparse_tables(models)
    units = {id(part): unit for unit in ta.modules() if is_unit(unit) for part in unit.modules()}  # innermost last
    by_id = {id(unit): unit for unit in units.values()}
    for model in models if units else ():
        readers: dict[int, list[str]] = {}
        for name, live in slices_of(model).items() if FOLLOWS not in model.__dict__ else ():
            if id(live.owner) in units:
                live.adds_at_once = True
                readers.setdefault(id(units[id(live.owner)]), []).append(name)
        for key, names in readers.items():
            _run_inside(_common_block(model, names), by_id[key])
        model.__dict__[FOLLOWS] = True


def _common_block(module: nn.Module, names: list[str]) -> nn.Module:
    """The smallest module with a forward that holds all of these parameters."""
    paths = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    found = module.get_submodule(".".join(common))
    while common and isinstance(found, nn.ModuleList | nn.ModuleDict):
        common.pop()
        found = module.get_submodule(".".join(common))
    return found


def _run_inside(block: nn.Module, unit: nn.Module) -> None:
    """Run a block's forward as one of the unit's, so that FSDP gathers the unit's parameters for it."""
    run, forward = _runner(unit), block.forward

    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        return run(forward, *args, **kwargs)

    setattr(inside, FOLLOWS, True)
    block.forward = inside


def _runner(unit: nn.Module) -> Callable[..., Any]:
    """What runs a function between FSDP's hooks of a forward and a backward."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    setattr(unit, _RUN, lambda function, *args, **kwargs: function(*args, **kwargs))
    register_fsdp_forward_method(unit, _RUN)
    return unit.__dict__.pop(_RUN)
