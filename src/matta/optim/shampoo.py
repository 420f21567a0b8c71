"""Shampoo with grafting, for nested models and any other (section 3.3; Gupta et al. 2018)."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, final, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matta.errors import OptimizerError
from matta.optim.divided_parameters import is_sharded, local, placed, sharding_group, whole_on_first
from matta.optim.exchange import gathered, joined_strips, of_strip
from matta.optim.group_step import GroupStep, refuse_misfit
from matta.optim.parameter_groups import check_group, distinct, expand_modules, refuse_sparse_matrices

Graft = Literal["adam", "adagrad", "sgd"]


@final
class Shampoo(torch.optim.Optimizer):
    """Shampoo: matrices are moved along L^(-p) G R^(-p), by the length of a first-order optimizer's step.

    Section 3.3; Gupta et al. 2018, with the factors of equal blocks of at most `block_size` a side. A block's
    step is as long as that of the graft: AdamW (averaged statistics, Nesterov's momentum, p = 1/2), Adagrad
    (summed statistics, no momentum, p = 1/4: for streams) or SGD along the average of the gradients (p = 1/4; torch's
    momentum adds them up, and so takes a smaller rate). Embeddings, vectors and matrices with a side over `max_dim` get
    the graft's own step. A sparse gradient, of `nn.Embedding(sparse=True)`, moves the rows that it has and their state
    alone, weight decay included, at a cost without regard to the others.

    Give it the module: a list of parameters does not tell which of them are embeddings (see
    `shampoo_groups`). State is float32 at least. A step with a non-finite gradient, or one too large to be
    squared in float32, changes nothing and is counted in `num_skipped`. In an initialised process group (DDP)
    the processes share the refreshes of roots. Of sharded parameters (FSDP2) each process keeps the state of its share
    of the blocks, makes their steps, and sends them to those that hold the parameters; make Shampoo after
    `fully_shard`.

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
        refresh_every: steps between two refreshes of a root; earlier ones begin at 1, 4, 8, 16, 24, 32, 40, and are
            spread over the steps to the next; before its first one a block is moved along the gradient.
        root_eps: added to a factor's eigenvalues, relative to the largest of them.
        young_eps: the same while a factor is young: `young_eps` over the number of gradients that it has seen, if that
            is more than `root_eps`. Eigenvalues that few gradients support are rounding errors, which the root would
            amplify; 0 leaves it out.
        process_group: who shares the refreshes; None: each process does all of its own.

    Raises:
        OptimizerError: a setting is out of range, or a parameter is complex, an integer, or sharded otherwise than
            FSDP2 does by itself (by rows).

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
        self._parts: dict[int, GroupStep] = {}
        super().__init__(expand_modules(params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters or a module, with the settings that the group holds; a repeated parameter counts once.

        Raises:
            OptimizerError: as in the constructor.
        """
        before = len(self.param_groups)
        try:
            for group in expand_modules([param_group]):
                params = group["params"]
                params = params if isinstance(params, Tensor) else distinct(params)
                super().add_param_group({**group, "params": params})
                check_group(self.param_groups[-1])
        except OptimizerError:
            del self.param_groups[before:]
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient, or of none if any gradient is not finite.

        Raises:
            OptimizerError: a gradient of a matrix that is preconditioned is sparse; or, in several processes, none is
                there in the first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            refuse_sparse_matrices(group)
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not gradients and not self._parts and dist.is_available() and dist.is_initialized():
            raise OptimizerError(
                "received a first step in which no parameter has a gradient; expected the parameters that are trained: "
                "make the optimizer after fully_shard (or matta.shard), which puts others in their place"
            )
        if not _all_finite(gradients):
            self.num_skipped += 1
            return loss
        sharing = self._sharing_group()
        for index, group in enumerate(self.param_groups):
            if index not in self._parts:
                self._parts[index] = GroupStep(group, self.state)
            self._parts[index].step(group, sharing)
        return loss

    def state_bytes(self) -> int:
        """Bytes of the state that this process keeps: averages, factors and roots.

        Example:
            >>> parameter = nn.Parameter(torch.ones(2, 3))
            >>> optimizer = Shampoo([parameter])
            >>> parameter.sum().backward(); optimizer.step(); optimizer.state_bytes()  # averages, L, R, roots
            156
        """
        kept = [state for part in self._parts.values() for state in part.kept.values()]
        tensors = [local(each) for state in (*self.state.values(), *kept) for each in state.values()]
        return sum(each.numel() * each.element_size() for each in tensors)

    def state_dict(self) -> dict[str, Any]:
        """Flat tensors by parameter, settings by group, and `num_skipped`; loads with `weights_only=True`.

        With sharded parameters all processes must call this. The first gets the state of whole parameters, as one
        process would have it, in the memory of its CPU, and the others the settings alone.
        """
        found = {**super().state_dict(), "num_skipped": self.num_skipped}
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(map(is_sharded, parameters)):
            strips = [part for part in self._parts.values() if part.strips]
            whole = ChainMap({}, *(gathered(part.kept, part.strips) for part in strips))
            for number, parameter in enumerate(parameters):
                state = whole.get(parameter) or found["state"].get(number, {})
                found["state"][number] = {name: whole_on_first(value) for name, value in state.items()}
            found["state"] = {number: each for number, each in found["state"].items() if each}
            if dist.get_rank() != 0:
                found["state"] = {}
        return found

    def share_of_state(self) -> dict[str, Any]:
        """As `state_dict`, of what this process keeps: nothing is gathered.

        Of sharded matrices it has the strips of blocks that this process owns, each under its number ("left.3"); other
        state is sharded as its parameter is. The shares of all processes together are the state.

        Example:
            >>> parameter = nn.Parameter(torch.ones(2, 3))
            >>> optimizer = Shampoo([parameter])
            >>> parameter.sum().backward(); optimizer.step()
            >>> sorted(optimizer.share_of_state()["state"][0])
            ['exp_avg', 'exp_avg_sq', 'left', 'left_root', 'right', 'right_root', 'step']
        """
        found = {**super().state_dict(), "num_skipped": self.num_skipped}
        numbers = {
            parameter: n for n, parameter in enumerate(p for group in self.param_groups for p in group["params"])
        }
        for part in self._parts.values():
            for strip, kept in part.kept.items():
                own = {of_strip(name, strip.index): value for name, value in kept.items()}
                found["state"].setdefault(numbers[strip.parameter], {}).update(own)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state, on the parameters' devices and at full precision; training continues bit for bit.

        Every process of sharded parameters is given the whole state, of any number of processes, and keeps its part; or
        the strips that it owns, and shards of the rest (`share_of_state`, of any number of processes).

        Raises:
            OptimizerError: the state is another optimizer's, or of parameters of other shapes.
            ValueError: the groups differ from this optimizer's (as in every torch optimizer).
        """
        if not isinstance(state_dict, Mapping) or "param_groups" not in state_dict:
            keys = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise OptimizerError(f"received {keys} as the state; expected what Shampoo.state_dict() gave")
        # "differentiable" is torch's, which it adds whenever a state was loaded; older states have no "young_eps"
        ours = self.defaults.keys() - {"differentiable", "young_eps"}
        missing = sorted(ours - {name for group in state_dict["param_groups"] for name in group})
        if missing:
            raise OptimizerError(
                f"received a state without {', '.join(missing)}; expected one that Shampoo.state_dict() gave"
            )
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        for group, settings in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for number, parameter in zip(settings["params"], group["params"], strict=False):
                refuse_misfit(parameter, settings, state_dict["state"].get(number, {}))
        # torch would cast the state to the parameters' type, so it gets the groups alone
        super().load_state_dict({**state_dict, "state": {}})
        for number, parameter in zip(saved, params, strict=True):
            if number in state_dict["state"]:
                values = state_dict["state"][number]
                own = values if is_sharded(parameter) else joined_strips(values)
                self.state[parameter] = {name: placed(value, parameter) for name, value in own.items()}
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
        if any(part.strips for part in self._parts.values()):
            raise OptimizerError(
                "received a Shampoo to copy or to pickle whose state is divided among processes; expected "
                "state_dict(), called by all of them"
            )
        group = None if self.process_group is None else "default"  # a process group cannot be pickled
        return {**super().__getstate__(), "num_skipped": self.num_skipped, "process_group": group}

    def _sharing_group(self) -> dist.ProcessGroup | None:
        if self.process_group != "default":
            return self.process_group
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _all_finite(gradients: Sequence[Tensor]) -> bool:
    gradients = [each._values() if each.is_sparse else each for each in gradients]
    if not gradients:
        return True
    # float16 would overflow in its own norm
    divided = {sharding_group(each) for each in gradients if is_sharded(each)}
    wide = [each.float() if each.dtype == torch.float16 else each for each in map(local, gradients)]
    norms = list(torch._foreach_norm(wide))
    if any(norm.dtype != norms[0].dtype or norm.device != norms[0].device for norm in norms):
        norms = [norm.to(norms[0]) for norm in norms]
    total = torch.stack(norms).sum()
    for group in divided:
        dist.all_reduce(total, group=group)
    return math.isfinite(total)
