"""Which axes of a module's parameters must grow together, found by running it once.

`trace` runs a copy of the module on an example, follows every channel of every parameter
(`matta.nesting.operators`) and joins the channels that meet into dimensions (`matta.nesting.dimensions`). Two models
of one class can then be laid over each other part by part (`matta.nesting.matching`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from matta.errors import NestingError, TracingError
from matta.nesting.batches import Batch, call, outputs_of, split_labels, tensors_of
from matta.nesting.channels import Known, Row, Rows
from matta.nesting.copying import attribute_tensors, deep_copy
from matta.nesting.dimensions import Atlas, Trace
from matta.nesting.operators import Flow, plain_kernels


def trace(module: nn.Module, example: Batch) -> Trace:
    """The dimensions of a module, from one run of a copy of it on an example batch.

    The run is in evaluation mode, without gradients; the module is left as it was. Any operator
    that matta knows is followed, whichever module it stands in. Where channels are lost from sight
    (a sort, an unknown operator), or a width is a product (heads times head_dim), the dimension carries the `problem`.

    Raises:
        TracingError: the module fails on the example, or cannot be copied.
        NestingError: the module builds parameters in its forward.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [part] = trace(mlp, (torch.zeros(5, 3), None)).outputs["0"]
        >>> trace(mlp, (torch.zeros(5, 3), None)).describe(part.dimension)
        '0.weight (axis 0), 0.bias (axis 0), 2.weight (axis 1)'
    """
    module, known = _copied(module).eval(), Known()
    owners: dict[str, Rows] = {}
    kept = dict(attribute_tensors(module))
    for name, tensor in [*_state(module), *kept.items()]:
        owners[name] = known.label(tensor)
    known.mark_weights(module.parameters())
    seen: dict[str, Rows] = {}
    taken: dict[tuple[str, int], Rows] = {}
    _watch(module, known, seen, taken)
    before = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    result = _run(module, known, split_labels(example)[0])
    _refuse_built(module, before)
    unread = {name for name, tensor in _state(module) if id(tensor) not in known.read}
    unread -= _tied_to_outputs(known, owners, seen, unread)
    returned = outputs_of(result)
    outputs = [row for tensor in returned for row in known.rows(tensor).values()]
    rows = {(name, axis): row for name, found in owners.items() for axis, row in found.items()}
    atlas = Atlas(known.channels, rows, outputs)
    own = {name: _own_channels(layer, name, rows, seen) for name, layer in module.named_modules()}
    return Trace(
        dimensions=atlas.dimensions(),
        axes={key: atlas.parts(row) for key, row in rows.items()},
        buffers=frozenset([*(name for name, _ in module.named_buffers()), *kept]),
        outputs={name: atlas.parts(row) for name, row in atlas.own_axes(seen, own)},
        inputs=dict(atlas.whole_axes(taken)),
        output_shapes=tuple(tensor.shape for tensor in returned),
        summed=_summed(known, rows),
        unread=frozenset(unread),
        noted=known.noted,
        parts_of=atlas.parts_of,
        shaped=atlas.places(known.shaped),
        units=atlas.units(),
    )


def _refuse_built(module: nn.Module, before: set[str]) -> None:
    built = [name for name, _ in module.named_parameters(remove_duplicate=False) if name not in before]
    if built:
        raise NestingError(
            f"{type(module).__name__} builds {built[0]} in its forward ({len(built)} new parameters); expected "
            f"parameters that are there before it runs: run the Student and the TA on a batch once, then nest them"
        )


def _tied_to_outputs(known: Known, owners: dict[str, Rows], seen: dict[str, Rows], unread: set[str]) -> set[str]:
    """Vectors that the run did not read, tied to the output of their module: tokens that stand for what is masked."""
    tied = set()
    for name in unread:
        own, outputs = list(owners[name].values()), seen.get(name.rpartition(".")[0], {}).values()
        alike = [row for row in outputs if len(own) == 1 and len(row) == len(own[0])]
        if len(alike) == 1:
            known.channels.tie(own[0], alike[0])
            tied.add(name)
    return tied


def _summed(known: Known, rows: dict[tuple[str, int], Row]) -> frozenset[tuple[str, int]]:
    """The axes of parameters that products with data have summed over."""
    marked = torch.zeros(len(known.channels), dtype=torch.bool)
    for row in known.summed:
        marked[row[row != 0]] = True
    return frozenset(key for key, row in rows.items() if bool(marked[row].any()))


def _copied(module: nn.Module) -> nn.Module:
    try:
        return deep_copy(module)
    except NestingError as error:
        raise TracingError(str(error)) from error


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and those buffers that hold numbers; each once, by its first name."""
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point())


def _watch(module: nn.Module, known: Known, seen: dict[str, Rows], taken: dict[tuple[str, int], Rows]) -> None:
    """Note where the run is, and what each module receives and returns the first time that it is called."""

    def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            known.steps.leave()
            tensors = outputs_of(output)
            if tensors:
                seen.setdefault(name, known.rows(tensors[0]))

        return hook

    def enter(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            known.steps.enter(name)
            for argument, tensor in enumerate(tensors_of((args, kwargs))):
                taken.setdefault((name, argument), known.rows(tensor))

        return hook

    for name, layer in module.named_modules():
        layer.register_forward_pre_hook(enter(name), with_kwargs=True)
        layer.register_forward_hook(leave(name))


def _run(module: nn.Module, known: Known, inputs: Any) -> Any:
    floats = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    for tensor in floats:
        known.label(tensor, is_input=True, start=1)  # without the batch axis
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        stack.enter_context(plain_kernels())
        stack.enter_context(Flow(known))
        try:
            return call(module, inputs)
        except Exception as error:
            raise TracingError(
                f"the module fails on the example with {type(error).__name__}: {error}; "
                f"pass as `example` a batch such as it trains on"
            ) from error


def _own_channels(layer: nn.Module, name: str, rows: dict[tuple[str, int], Row], seen: dict[str, Rows]) -> list[Row]:
    """The rows of a layer's own parameters; a norm that has none notes its width all the same."""
    prefix = f"{name}." if name else ""
    own = {prefix + key for key, _ in layer.named_parameters(recurse=False)}
    if own or not isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return [row for (key, _), row in rows.items() if key in own]
    found = seen.get(name, {})
    return [found[max(found)]] if found else []
