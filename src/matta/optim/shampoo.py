"""Shampoo with grafting, for nested models and any other (section 3.3; Gupta et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, final, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matta.errors import OptimizerError
from matta.optim.first_order import GRAFTS, Entry, FirstOrder, TouchedRows
from matta.optim.parameter_groups import (
    check_group,
    distinct,
    expand_modules,
    is_preconditioned,
    matrix_shape,
    refuse_sparse_matrices,
)
from matta.optim.preconditioner import EARLY_STEPS, Refresher, num_statistics
from matta.optim.stacking import Grid, Stack

Graft = Literal["adam", "adagrad", "sgd"]


@final
class Shampoo(torch.optim.Optimizer):
    """Shampoo: matrices are moved along L^(-p) G R^(-p), by the length of a first-order optimizer's step.

    Section 3.3; Gupta et al. 2018, with the factors of equal blocks of at most `block_size` a side. A block's
    step is as long as that of the graft: AdamW (averaged statistics, Nesterov's momentum, p = 1/2), Adagrad
    (summed statistics, no momentum, p = 1/4: for streams) or SGD with momentum (p = 1/4). Embeddings, vectors
    and matrices with a side over `max_dim` get the graft's own step. A sparse gradient, of `nn.Embedding(sparse=True)`,
    moves the rows that it has and their state alone, weight decay included, at a cost without regard to the others.

    Give it the module: a list of parameters does not tell which of them are embeddings (see
    `shampoo_groups`). State is float32 at least. A step with a non-finite gradient, or one too large to be
    squared in float32, changes nothing and is counted in `num_skipped`. In an initialised process group (DDP)
    the processes share the refreshes of roots.

    Args:
        params: a module, parameters, or groups of either.
        lr: step size of the graft.
        betas: averages of gradients and of their squares; the second is the factors' too.
        eps: added to the graft's denominator (Adam, Adagrad).
        weight_decay: decoupled, as in AdamW.
        graft: whose lengths the steps have: "adam", "adagrad" or "sgd".
        block_size: largest side of a block. Larger blocks see more correlations and cost more.
        max_dim: matrices with a longer side are not preconditioned.
        statistics_every: steps between updates of the factors.
        refresh_every: steps between two refreshes of a root; earlier ones are at 1, 2, 4, 8, 16, 24, 32, 40.
        root_eps: added to a factor's eigenvalues, relative to the largest of them.
        young_eps: the same while a factor is young: `young_eps` over the number of gradients that it has seen, if that
            is more than `root_eps`. Eigenvalues that few gradients support are rounding errors, which the root would
            amplify; 0 leaves it out.
        process_group: who shares the refreshes; None: each process does all of its own.

    Raises:
        OptimizerError: a setting is out of range, or a parameter is sharded (FSDP2), complex or an integer.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> optimizer = Shampoo(model, lr=0.1)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.num_skipped
        0
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        graft: Graft = "adam",
        block_size: int = 128,
        max_dim: int = 8192,
        statistics_every: int = 10,
        refresh_every: int = 50,
        root_eps: float = 1e-6,
        young_eps: float = 1e-3,
        process_group: dist.ProcessGroup | Literal["default"] | None = "default",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "graft": graft,
            "block_size": block_size,
            "max_dim": max_dim,
            "statistics_every": statistics_every,
            "refresh_every": refresh_every,
            "root_eps": root_eps,
            "young_eps": young_eps,
            "precondition": True,
            "num_steps": 0,
            "statistics_step": 0,
        }
        self.num_skipped = 0
        self.process_group = process_group
        self._parts: dict[int, _Part] = {}
        super().__init__(expand_modules(params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, with settings of their own where the group holds any; a repeated one counts once.

        Raises:
            OptimizerError: as in the constructor.
        """
        params = param_group["params"]
        if not isinstance(params, Tensor):
            params = distinct(params)
        super().add_param_group({**param_group, "params": params})
        try:
            check_group(self.param_groups[-1])
        except OptimizerError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient, or of none if any gradient is not finite.

        Raises:
            OptimizerError: a gradient of a matrix that is preconditioned is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            refuse_sparse_matrices(group)
        if not _all_finite([p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]):
            self.num_skipped += 1
            return loss
        sharing = self._sharing_group()
        for index, group in enumerate(self.param_groups):
            if index not in self._parts:
                self._parts[index] = _Part(group, self.state)
            self._parts[index].step(group, sharing)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Flat tensors by parameter, settings by group, and `num_skipped`; loads with `weights_only=True`."""
        return {**super().state_dict(), "num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state, on the parameters' devices and at full precision; training continues bit for bit.

        Raises:
            OptimizerError: the state is another optimizer's.
            ValueError: the groups differ from this optimizer's (as in every torch optimizer).
        """
        # "differentiable" is torch's, which it adds whenever a state was loaded; older states have no "young_eps"
        ours = self.defaults.keys() - {"differentiable", "young_eps"}
        missing = sorted(ours - {name for group in state_dict["param_groups"] for name in group})
        if missing:
            raise OptimizerError(
                f"received a state without {', '.join(missing)}; expected one that Shampoo.state_dict() gave"
            )
        # torch would cast the state to the parameters' type, so it gets the groups alone
        super().load_state_dict({**state_dict, "state": {}})
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, params, strict=True):
            if number in state_dict["state"]:
                values = state_dict["state"][number]
                self.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in values.items()}
        self.num_skipped = state_dict.get("num_skipped", 0)
        self._parts = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickles, copies and loads; how the parameters are stacked is found anew."""
        self.__dict__.setdefault("num_skipped", 0)
        self.__dict__.setdefault("process_group", "default")
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("young_eps", 0.0)  # an older state continues as it began
        self._parts = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy holds."""
        group = None if self.process_group is None else "default"  # a process group cannot be pickled
        return {**super().__getstate__(), "num_skipped": self.num_skipped, "process_group": group}

    def _sharing_group(self) -> dist.ProcessGroup | None:
        if self.process_group != "default":
            return self.process_group
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


class _Part:
    """What belongs to one parameter group: stacks of blocks, and parameters that are not preconditioned."""

    def __init__(self, group: Mapping[str, Any], state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        self.graft = GRAFTS[group["graft"]]
        places: dict[Any, _Place] = {}
        grids: dict[Any, dict[Any, list[tuple[Tensor, Grid]]]] = {}
        for parameter in group["params"]:
            key = (parameter.device, _state_dtype(parameter))
            place = places.setdefault(key, _Place(state, self.graft, key[1]))
            if is_preconditioned(parameter, group):
                grid = Grid.of(*matrix_shape(parameter), block_size=group["block_size"])
                grids.setdefault(key, {}).setdefault(grid.block_shape, []).append((parameter, grid))
            elif parameter.numel():
                place.plain.append(parameter)
        for key, by_shape in grids.items():
            places[key].stacks = [Stack(each, state, self.graft, key[1]) for each in by_shape.values()]
        self.places = list(places.values())
        self.stacks = [stack for place in self.places for stack in place.stacks]
        self.refresher = Refresher([factors for stack in self.stacks for factors in stack.factors])

    def step(self, group: dict[str, Any], process_group: dist.ProcessGroup | None) -> None:
        """One step of the group's parameters that have a gradient."""
        group["num_steps"] += 1
        for stack in self.stacks:
            stack.load_gradients()
        self._update_factors(group)
        seen = num_statistics(group["num_steps"], group["statistics_every"])
        eps = max(group["root_eps"], group["young_eps"] / seen)
        self.refresher.refresh(group["num_steps"], every=group["refresh_every"], eps=eps, group=process_group)
        for place in self.places:
            place.move(group)

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


class _Place:
    """A group's parameters on one device with state of one type: the graft moves them in one call."""

    def __init__(self, state: Mapping[Tensor, dict[str, Tensor]], graft: FirstOrder, dtype: torch.dtype) -> None:
        self.state, self.graft, self.dtype = state, graft, dtype
        self.stacks: list[Stack] = []
        self.plain: list[Tensor] = []

    def move(self, group: Mapping[str, Any]) -> None:
        """One step of the graft, along the preconditioned direction where there is one."""
        parameters = [each for each in self.plain if each.grad is not None]
        weight_decay = group["lr"] * group["weight_decay"]
        sparse = [self._rows(each) for each in parameters if each.grad.is_sparse and each.grad._nnz()]  # type: ignore[union-attr]
        parameters = [each for each in parameters if not each.grad.is_sparse]  # type: ignore[union-attr]
        decayed = [*parameters, *(rows.target for rows in sparse)]
        if weight_decay and decayed:
            torch._foreach_mul_(decayed, 1.0 - weight_decay)
        plain = [self._plain_entry(each) for each in parameters]
        entries = [entry for stack in self.stacks for entry in stack.graft_entries()] + plain
        entries += [rows.entry for rows in sparse]
        if not entries:
            return
        targets, gradients, states = (list(each) for each in zip(*entries, strict=True))
        torch._foreach_add_([state["step"] for state in states], 1.0)
        self.graft.move(targets, gradients, states, group["lr"], group)
        for parameter, (target, _, _) in zip(parameters, plain, strict=True):
            if target is not parameter:
                parameter.copy_(target)
        for rows in sparse:
            rows.write()
        for stack in self.stacks:
            stack.move(momentum=group["betas"][0], weight_decay=weight_decay)

    def _plain_entry(self, parameter: Tensor) -> Entry:
        """The parameter itself where it is contiguous and as precise as its state, else a copy."""
        assert parameter.grad is not None
        gradient = parameter.grad.to(self.dtype).contiguous()
        return parameter.to(self.dtype).contiguous(), gradient, self._state_of(parameter)

    def _rows(self, parameter: Tensor) -> TouchedRows:
        return TouchedRows(parameter, self._state_of(parameter), self.dtype)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in self.graft.state_names:
                state[name] = torch.zeros(parameter.shape, dtype=self.dtype, device=parameter.device)
        return state


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _all_finite(gradients: Sequence[Tensor]) -> bool:
    gradients = [each._values() if each.is_sparse else each for each in gradients]
    if not gradients:
        return True
    # float16 would overflow in its own norm
    wide = [each.float() if each.dtype == torch.float16 else each for each in gradients]
    norms = list(torch._foreach_norm(wide))
    if any(norm.dtype != norms[0].dtype or norm.device != norms[0].device for norm in norms):
        norms = [norm.to(norms[0]) for norm in norms]
    return math.isfinite(torch.stack(norms).sum())
