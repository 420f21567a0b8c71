"""How much each channel of a group matters: by its weights, its activations, or the loss's slope along them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from matta.errors import OrderError
from matta.nesting.batches import Batch, call, eval_mode, logits_of, split_labels, tensors_of
from matta.nesting.channel_groups import AxisKey, Group

Importance = Literal["activation", "taylor", "magnitude"]
KINDS: Final = ("activation", "taylor", "magnitude")


class _Objective(Protocol):
    """What `matta.objectives` have: the loss of one model."""

    def cross_entropy(self, logits: Tensor, labels: Any) -> Tensor: ...


Loss = Callable[[nn.Module, Batch], Tensor] | _Objective
"""A function of a module and a batch, or an objective of `matta.objectives`."""

Place = tuple[str, int, int]
"""A module, which of the tensors that it receives, and an axis of it."""


def channel_scores(
    module: nn.Module,
    groups: Sequence[Group],
    importance: Importance,
    *,
    data: Iterable[Batch] | None,
    loss: Loss | None,
    num_batches: int,
) -> list[Tensor]:
    """A score for each channel of each group, larger where it matters more; comparable inside a group alone.

    - "magnitude": the product, over the matrices that have the channel, of the norms of its slices.
    - "activation": the mean absolute value that the modules which sum over the channel are fed (Muralidharan et al.
      2024, "Compact Language Models via Pruning and Knowledge Distillation", section 2.2); by magnitude where no
      module shows it.
    - "taylor": the first-order change of the loss when the slices go to zero, |sum of weight times gradient|, over
      all axes that have the channel (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning").

    Raises:
        OrderError: a kind that is none, no data or no loss where it takes some, or data without a batch.
    """
    _require(importance, data, loss, num_batches)
    if importance == "magnitude":
        return _magnitudes(module, groups)
    assert data is not None
    found = (
        _activations(module, groups, islice(data, num_batches))
        if importance == "activation"
        else _slopes(module, groups, islice(data, num_batches), cast("Loss", loss))
    )
    if found is None:
        raise OrderError("data= gave no batch; expected an iterable of batches such as the module trains on")
    if any(not bool(torch.isfinite(scores).all()) for scores in found):
        raise OrderError(
            f"the {importance} scores are not finite; expected data and weights that give finite numbers; look for "
            f"NaN in the module or its inputs"
        )
    return found


def _require(importance: str, data: object, loss: object, num_batches: int) -> None:
    if importance not in KINDS:
        raise OrderError(f"importance={importance!r}; expected one of: {', '.join(KINDS)}")
    if importance != "magnitude" and data is None:
        raise OrderError(
            f'importance={importance!r} needs batches to measure on; pass data=, or importance="magnitude", which '
            f"needs none"
        )
    if importance == "taylor" and not (callable(loss) or hasattr(loss, "cross_entropy")):
        raise OrderError(
            f"importance='taylor' needs the loss whose slope it takes, and received loss={loss!r}; expected a function "
            f"of a module and a batch, or an objective such as matta.objectives.CausalLM()"
        )
    if num_batches < 1:
        raise OrderError(f"num_batches={num_batches}; expected 1 or more")


def _magnitudes(module: nn.Module, groups: Sequence[Group]) -> list[Tensor]:
    """Logarithms of products of norms."""
    found = []
    for group in groups:
        matrices = [key for key in group.members if is_parameter(module, key[0]) and tensor_of(module, key).ndim > 1]
        keys = matrices or [key for key in group.members if is_parameter(module, key[0])]
        norms = [_summed(tensor_of(module, key).detach().abs().float().square(), key, group) for key in keys]
        found.append(sum((norm.clamp(min=1e-30).log() for norm in norms), torch.zeros(group.size)))
    return found


def is_parameter(module: nn.Module, name: str) -> bool:
    """Whether a name is that of a parameter, and not of a buffer."""
    path, _, leaf = name.rpartition(".")
    return leaf in module.get_submodule(path)._parameters


def tensor_of(module: nn.Module, key: AxisKey) -> Tensor:
    """The parameter or buffer that has an axis."""
    path, _, leaf = key[0].rpartition(".")
    return cast("Tensor", getattr(module.get_submodule(path), leaf))


def _summed(values: Tensor, key: AxisKey, group: Group) -> Tensor:
    """The sum of a tensor's values over each channel's slices."""
    others = [axis for axis in range(values.ndim) if axis != key[1]]
    along = (values.sum(others) if others else values).cpu()
    return along[group.members[key]].sum(1)


# --- activations ------------------------------------------------------------------------------------


def _activations(module: nn.Module, groups: Sequence[Group], batches: Iterable[Batch]) -> list[Tensor] | None:
    totals: dict[Place, Tensor] = {}
    num_seen = 0

    def add(place: Place, values: Tensor) -> None:
        values = values.detach().abs().float()
        others = [i for i in range(values.ndim) if i != place[2]]
        mean = values.mean(others).cpu() if others else values.cpu()
        totals[place] = totals.get(place, torch.zeros(())) + mean

    places = {each[:3] for group in groups for each in group.seen}
    with eval_mode(module), torch.no_grad(), watched(module, places, add):
        for batch in batches:
            num_seen += 1
            call(module, split_labels(batch)[0])
    if not num_seen:
        return None
    magnitudes = _magnitudes(module, groups)
    return [_fed(group, totals, other) for group, other in zip(groups, magnitudes, strict=True)]


@contextmanager
def watched(module: nn.Module, places: Iterable[Place], note: Callable[[Place, Tensor], None]) -> Iterator[None]:
    """Note the tensors that modules are fed, at each of the places, while it is active."""
    wanted: dict[str, list[Place]] = {}
    for place in places:
        wanted.setdefault(place[0], []).append(place)

    def hook(own: list[Place]) -> Any:
        def take(_: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = tensors_of((args, kwargs))
            for place in own:
                note(place, tensors[place[1]])

        return take

    handles = [
        module.get_submodule(path).register_forward_pre_hook(hook(own), with_kwargs=True)
        for path, own in wanted.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fed(group: Group, totals: Mapping[Place, Tensor], otherwise: Tensor) -> Tensor:
    """The mean over the modules that are fed a group's channels, each on the scale of its own mean."""
    found = []
    for path, argument, axis, positions in group.seen:
        total = totals.get((path, argument, axis))
        if total is not None and len(total) > int(positions.max()):
            fed = total[positions].mean(1)
            found.append(fed / fed.mean().clamp(min=1e-30))
    return torch.stack(found).mean(0) if found else otherwise


# --- slopes ----------------------------------------------------------------------------------------


def _slopes(module: nn.Module, groups: Sequence[Group], batches: Iterable[Batch], loss: Loss) -> list[Tensor] | None:
    found = [torch.zeros(group.size) for group in groups]
    num_seen = 0
    with eval_mode(module):
        for gradients in gradients_of(module, batches, loss):
            num_seen += 1
            for group, scores in zip(groups, found, strict=True):
                for key in group.members:
                    gradient = gradients.get(key[0])
                    if gradient is not None:
                        product = tensor_of(module, key).detach().float() * gradient.float()
                        scores += _summed(product, key, group).abs()
    return found if num_seen else None


def gradients_of(module: nn.Module, batches: Iterable[Batch], loss: Loss) -> Iterator[dict[str, Tensor | None]]:
    """The gradients of the loss on each batch, by parameter; the module's own `.grad` stays as it is."""
    trained = {
        name: each for name, each in module.named_parameters() if each.requires_grad and each.is_floating_point()
    }
    for batch in batches:
        with torch.enable_grad():
            value = _loss(loss, module, batch)
        yield dict(zip(trained, torch.autograd.grad(value, list(trained.values()), allow_unused=True), strict=True))


def _loss(loss: Loss, module: nn.Module, batch: Batch) -> Tensor:
    if callable(loss):
        value = loss(module, batch)
    else:
        inputs, labels = split_labels(batch)
        value = loss.cross_entropy(logits_of(call(module, inputs)), labels)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise OrderError(f"the loss returned {shown}; expected one number with a graph to the module's weights")
    return value.reshape(())
