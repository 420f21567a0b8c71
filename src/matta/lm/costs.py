"""How many parameters and FLOPs the models of a nesting have, also on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from matta.errors import RunError
from matta.nesting import Nested
from matta.submodels import WIDE, live, narrow, wide_narrow_wide


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
    attention, masked positions included. Layers with experts are counted as if all experts ran.
    """
    flops = sum(2 * _linear_weights(part) for part in module.modules())
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


def _linear_weights(part: nn.Module) -> int:
    """The weights of a linear layer, of one of GPT-2's, which are called convolutions, or of a row of experts."""
    if "Experts" in type(part).__name__:
        return sum(each.numel() for each in part.parameters(recurse=False) if each.ndim == 3)
    weight = getattr(part, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(part, nn.Embedding):
        return 0
    return weight.numel()


def _attention_widths(module: nn.Module) -> list[int]:
    """Heads times the width of a head, of each attention."""
    found = []
    for part in module.modules():
        if "Attention" in type(part).__name__ and not any("Attention" in type(c).__name__ for c in part.children()):
            found.append(_attention_width(part))
    return found


def _attention_width(part: Any) -> int:
    config = getattr(part, "config", None)
    heads = getattr(config, "num_attention_heads", None) or getattr(part, "num_heads", None)
    head_dim = getattr(part, "head_dim", None) or getattr(config, "head_dim", None)
    if head_dim is None and heads is not None and config is not None:
        head_dim = config.hidden_size // heads
    if heads is None or head_dim is None:
        raise RunError(
            f"{type(part).__name__} does not tell its heads and their width; its FLOPs cannot be counted: expected "
            f"num_attention_heads in its configuration"
        )
    return int(heads) * int(head_dim)
