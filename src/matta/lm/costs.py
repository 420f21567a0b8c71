"""What the models of a nesting cost: parameters, FLOPs, and the memory of a step, without building or running them.

For the memory, models are run on fake tensors, which have shapes and no contents, and what autograd keeps for the
backward pass is added up. The figure is exact for the operations of a CPU, and the same on a GPU up to its choice of
kernels.
"""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, PreTrainedConfig

from matta.errors import RunError
from matta.lm.decoders import from_config, make_optimizer
from matta.lm.recipe import TrainPart
from matta.nesting.nested import Nested
from matta.objectives.fused_losses import _CHUNK_ELEMENTS
from matta.optim.grids import Grid
from matta.sizes.submodels import WIDE, live, narrow, wide_narrow_wide


@final
@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs: parameters, each once, and FLOPs of a forward for one token."""

    parameters: int
    flops_per_token: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            parameters=self.parameters + other.parameters, flops_per_token=self.flops_per_token + other.flops_per_token
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            parameters=self.parameters - other.parameters, flops_per_token=self.flops_per_token - other.flops_per_token
        )


def cost_of(module: nn.Module, context: int) -> Cost:
    """The cost of a decoder, or of a block of one, in sequences of `context` tokens.

    FLOPs are those of the matrix products, as `torch.utils.flop_counter` counts them: two for each weight of a
    linear layer (a head tied to the embedding included), and 4 x context x width for scores and values of each
    attention, masked positions included. Of experts those count that a token is sent to.
    """
    flops = sum(2 * _weights_of_token(part) for part in module.modules())
    flops += sum(4 * context * width for width in _attention_widths(module))
    return Cost(parameters=sum(each.numel() for each in module.parameters()), flops_per_token=flops)


def family_costs(nested: Nested, ks: Iterable[int], context: int) -> dict[int, Cost]:
    """The costs of the sub-models with the lowest and highest k/2 layers wide, by k.

    Where all layers are blocks, only two models are built: a block costs the same wherever it stands.

    Raises:
        SubModelError: there are not so many layers.
    """
    specs = {k: wide_narrow_wide(nested, k) for k in ks}
    if not specs:
        return {}
    narrow_model = live(nested, narrow(nested))
    names = [name for name in narrow(nested).choices if _is_block(narrow_model, name) and _is_block(nested.ta, name)]
    if len(names) < len(narrow(nested).choices):
        return {k: cost_of(live(nested, spec), context) for k, spec in specs.items()}
    blocks = {
        name: cost_of(nested.ta.get_submodule(name), context) - cost_of(narrow_model.get_submodule(name), context)
        for name in names
    }
    base = cost_of(narrow_model, context)
    found: dict[int, Cost] = {}
    for k, spec in specs.items():
        wide_blocks = [blocks[name] for name, choice in spec.choices.items() if choice == WIDE]
        found[k] = sum(wide_blocks, start=base)
    return found


def _is_block(model: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    try:
        return last.isdigit() and isinstance(model.get_submodule(path), nn.ModuleList)
    except AttributeError:
        return False


def _weights_of_token(part: Any) -> int:
    """The weights of a linear layer, of one of GPT-2's, which are called convolutions, or of the experts of a token."""
    if "Experts" in type(part).__name__:
        total = sum(each.numel() for each in part.parameters(recurse=False) if each.ndim == 3)
        config, count = getattr(part, "config", None), getattr(part, "num_experts", 1)
        return total * (getattr(config, "num_experts_per_tok", None) or count) // count
    weight = getattr(part, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(part, nn.Embedding):
        return 0
    return weight.numel()


def _attention_widths(module: nn.Module) -> list[int]:
    """Heads times the width of a head, of each attention; where values have another than keys, their mean."""
    found = []
    for part in module.modules():
        if "Attention" in type(part).__name__ and not any("Attention" in type(c).__name__ for c in part.children()):
            found.append(_attention_width(part))
    return found


def _attention_width(part: Any) -> int:
    config = getattr(part, "config", None)
    heads = getattr(config, "num_attention_heads", None) or getattr(part, "num_heads", None)
    of_keys, of_values = getattr(part, "qk_head_dim", None), getattr(part, "v_head_dim", None)
    if heads is not None and of_keys is not None and of_values is not None:  # DeepSeek's latent attention
        return int(heads) * int(of_keys + of_values) // 2
    head_dim = getattr(part, "head_dim", None) or getattr(config, "head_dim", None)
    if head_dim is None and heads is not None and config is not None:
        head_dim = config.hidden_size // heads
    if heads is None or head_dim is None:
        raise RunError(
            f"{type(part).__name__} does not tell its heads and their width; its FLOPs cannot be counted: expected "
            f"num_attention_heads in its configuration"
        )
    return int(heads) * int(head_dim)


BYTES: Final = 4  # of a number in float32, in which weights, gradients and optimizer state are kept


@final
@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on one process: what stays, and what a step takes beyond that.

    `activations` is what the bodies of both models keep for the backward pass, `heads` what the heads and losses
    need beyond the head's gradient: a chunk of logits of both, gradients of hidden states, and the head's once more.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    heads: int

    @property
    def total(self) -> int:
        """All of it at once: an upper bound, since gradients come while activations go."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.heads


def step_memory(nested: Nested, part: TrainPart, *, batch: int, context: int) -> StepMemory:
    """The memory of a step with `batch` sequences in a forward.

    With `sample` the random sub-model is counted as large as the TA. A Teacher is left out.
    """
    parameters = sum(each.numel() for each in nested.parameters()) * BYTES
    configs = [model.config for model in models_of_step(nested, part)]
    distinct = {id(config): config for config in configs}
    kept = {
        key: saved_bytes(config, batch=batch, context=context, precision=part.precision)
        for key, config in distinct.items()
    }
    return StepMemory(
        weights=parameters,
        gradients=parameters,
        optimizer=optimizer_bytes(nested, part),
        activations=sum(kept[id(config)] for config in configs),
        heads=_head_bytes(configs, rows=batch * context),
    )


def models_of_step(nested: Nested, part: TrainPart) -> list[Any]:
    """The models of the step that has most: in turns the sub-model stands in for the Student."""
    sampled = [nested.ta] if part.sample else []
    return [nested.student, nested.ta, *sampled] if part.turns is None or not sampled else [nested.ta, *sampled]


def saved_bytes(config: PreTrainedConfig, *, batch: int, context: int, precision: str) -> int:
    """Bytes that autograd keeps of the forward of a decoder without its head; its weights are not counted.

    Raises:
        RunError: the model cannot be run on fake tensors, as some with experts.
    """
    kept = _Kept()
    with FakeTensorMode(), torch.device("cpu"):
        model = from_config(config).train()
        kept.leave_out(model.parameters())
        tokens = torch.zeros(batch, context, dtype=torch.int64)
        hooks = torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            try:
                model.base_model(input_ids=tokens, use_cache=False, past_key_values=_PassedThrough())
            except Exception as error:  # of the model's code, or of operations that know no fake tensors
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                raise RunError(
                    f"{type(model).__name__} cannot be run on fake tensors, so that the memory of a step is not to be "
                    f"planned ({reason}); matta train runs it for real"
                ) from error
    return kept.bytes


@final
class _Kept:
    """Adds up the storages that autograd keeps, each once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: dict[int, Tensor] = {}  # holding the tensors keeps their storages' addresses from being used again

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        self._seen |= {tensor.untyped_storage()._cdata: tensor for tensor in tensors}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor
            self.bytes += storage.nbytes()
        return tensor


@final
class _PassedThrough(DynamicCache):
    """A cache that keeps nothing. With one, Transformers does not look into the positions, which are fake."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def optimizer_bytes(module: nn.Module, part: TrainPart) -> int:
    """Bytes of an optimizer's state: two averages; Shampoo has factors, roots and two working copies beside them."""
    if part.optimizer == "adamw":  # which refuses to be made on the meta device
        return sum(2 * each.numel() * BYTES for each in module.parameters())
    groups = make_optimizer(part, module).param_groups
    return sum(_state_bytes(each, group) for group in groups for each in group["params"])


def _state_bytes(parameter: Tensor, group: dict[str, Any]) -> int:
    rows = parameter.shape[0] if parameter.ndim else 1
    columns = parameter.numel() // rows
    if not group["precondition"] or parameter.ndim < 2 or max(rows, columns) > group["max_dim"]:
        return 2 * parameter.numel() * BYTES
    return shampoo_bytes(Grid.of(rows, columns, block_size=group["block_size"]))


def shampoo_bytes(grid: Grid) -> int:
    """Shampoo's state of a matrix, with the two working copies."""
    down, across = grid.block_shape
    return (grid.state_size + 2 * grid.num_blocks * down * across) * BYTES


def _head_bytes(configs: list[PreTrainedConfig], *, rows: int) -> int:
    vocabulary = configs[0].vocab_size
    chunk = min(rows, max(1, _CHUNK_ELEMENTS // vocabulary))
    hidden = sum(config.hidden_size for config in configs)
    students = sum(config.hidden_size for config in configs[1:]) * vocabulary
    return (2 * chunk * vocabulary + rows * hidden + students) * BYTES
