"""Which blocks of a trained module to keep: blocks cannot change places, so depth is a choice and not an order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from matta.errors import OrderError
from matta.nesting.batches import Batch, call, eval_mode, split_labels
from matta.nesting.declarations import is_module_list


def best_layers(
    ta: nn.Module, keep: Mapping[str, int], *, data: Iterable[Batch], num_batches: int = 32
) -> dict[str, list[int]]:
    """The blocks that matter most, as `matta.nest` takes them in `layers=`.

    A block matters as much as it turns its input: one less the cosine of what it takes and gives, averaged over
    examples and positions (block influence; Men et al. 2024, "ShortGPT: Layers in Large Language Models are More
    Redundant Than You Expect", section 2.2).

    Args:
        ta: The trained module. It is left as it was.
        keep: How many blocks to keep, by the path of the module list.
        data: Batches to measure on.
        num_batches: How many of them are read at most.

    Raises:
        OrderError: a path that is no module list, a number of blocks that it has not, no batch, or blocks that do not
            give what they take (of another shape).

    Example:
        >>> blocks = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        >>> with torch.no_grad():
        ...     for block, turn in zip(blocks, (0.0, 1.0, 0.5)):
        ...         _ = block.weight.copy_(torch.tensor([[1.0, -turn], [turn, 1.0]]))
        >>> best_layers(nn.Sequential(*blocks), {"": 2}, data=[(torch.ones(1, 2), None)])
        {'': [1, 2]}
    """
    lists = {path: _blocks(ta, path, count) for path, count in keep.items()}
    turned: dict[str, list[list[float]]] = {path: [[] for _ in blocks] for path, blocks in lists.items()}
    with eval_mode(ta), torch.no_grad(), _watched(lists, turned):
        for batch in islice(data, num_batches):
            call(ta, split_labels(batch)[0])
    chosen = {}
    for path, count in keep.items():
        if any(not found for found in turned[path]):
            raise OrderError(
                f"keep={{{path!r}: {count}}}: not every block of the list was seen to give a tensor of the shape that "
                f"it takes; expected residual blocks and at least one batch in data=; choose layers= by hand"
            )
        scores = torch.tensor([sum(found) / len(found) for found in turned[path]])
        chosen[path] = sorted(scores.argsort(descending=True, stable=True)[:count].tolist())
    return chosen


def _blocks(ta: nn.Module, path: str, count: int) -> list[nn.Module]:
    lists = {name: module for name, module in ta.named_modules() if is_module_list(module)}
    if path not in lists:
        known = ", ".join(f"{name!r} ({len(module)})" for name, module in lists.items()) or "none"
        raise OrderError(f"keep={{{path!r}: {count}}} names no module list; the module has: {known}")
    blocks = [block for _, block in lists[path]._modules.items() if block is not None]
    if not 1 <= count <= len(blocks):
        raise OrderError(f"keep={{{path!r}: {count}}}: the list has {len(blocks)} blocks; expected 1 to {len(blocks)}")
    return blocks


@contextmanager
def _watched(lists: Mapping[str, list[nn.Module]], turned: dict[str, list[list[float]]]) -> Iterator[None]:
    """Note by how much each block turns its input."""

    def hook(found: list[float]) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(given, Tensor) and isinstance(output, Tensor) and given.shape == output.shape:
                cosine = torch.cosine_similarity(given.float(), output.float(), dim=-1)
                found.append(float(1 - cosine.mean()))

        return note

    pairs = [
        (block, found) for path, blocks in lists.items() for block, found in zip(blocks, turned[path], strict=True)
    ]
    handles = [block.register_forward_hook(hook(found), with_kwargs=True) for block, found in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
