"""What a process holds of parameters that are divided among several (DTensors of FSDP2)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from matta.errors import OptimizerError


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor that may be sharded: its own memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: object) -> bool:
    """Whether the tensor is divided among processes (a DTensor)."""
    return hasattr(tensor, "placements")


def sharding_group(parameter: Any) -> dist.ProcessGroup:
    """The processes that a parameter is divided among.

    Raises:
        OptimizerError: it is not sharded by rows, as FSDP2 does, or over more than one axis of the mesh.
    """
    dims = [dim for dim, each in enumerate(parameter.placements) if not each.is_replicate()]
    if [repr(parameter.placements[dim]) for dim in dims] == ["Shard(dim=0)"]:
        return parameter.device_mesh.get_group(dims[0])
    raise OptimizerError(
        f"received a parameter of shape {tuple(parameter.shape)} placed as {parameter.placements}; expected rows "
        f"divided along one axis of the mesh, Shard(dim=0), as fully_shard does by itself"
    )


def whole_on_first(value: Any) -> Tensor:
    """A part of a parameter's state, whole if it was sharded; then in memory on the first process alone."""
    if not is_sharded(value):
        return value
    full: Tensor = value.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else full.to("meta")


def placed(value: Tensor, parameter: Any) -> Tensor:
    """A part of a loaded state as a parameter's state holds it: whole, or as the parameter is sharded.

    What belongs to blocks stays where it is until each process has found out which are its own.
    """
    if not is_sharded(parameter):
        return value.to(parameter.device, copy=True)
    if is_sharded(value) or value.shape != parameter.shape:
        return value.clone() if value.ndim == 0 else value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
