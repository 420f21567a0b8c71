"""Channels that only linear maps touch, turned onto principal axes: an order cannot do as much for leading slices.

Between an embedding and the layer that reads it, or two layers without a non-linearity, any rotation of the channels is
undone by the next layer. Of all rotations the principal axes put the most of what matters into the fewest channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from matta.nesting.batches import Batch, call, eval_mode, split_labels
from matta.nesting.channel_groups import Group
from matta.nesting.importance import Importance, Loss, Place, gradients_of, is_parameter, tensor_of, watched

_FLOOR = 1e-10  # of the largest eigenvalue: directions that have less are as good as empty


def principal_axes(
    module: nn.Module,
    groups: Sequence[Group],
    importance: Importance,
    *,
    batches: Iterable[Batch],
    loss: Loss | None,
) -> list[tuple[Tensor, Tensor]]:
    """The axes onto which to turn each group, as columns from the most important one, and their scores.

    The axes are the eigenvectors of a sum of logarithms of second moments, the scores its eigenvalues. Along the
    channels' own axes this is the logarithm of the product that `channel_scores` takes, squared.

    - "magnitude": of the weights, over the matrices that have the channels.
    - "activation": of what the modules that sum over the channels are fed, by magnitude where none shows it: principal
      components, not centred.
    - "taylor": of that, and of the loss's gradients along it. This minimises the first-order change as the truncated
      decomposition of a weighted layer does (Hsu et al. 2022, "Language model compression with weighted low-rank
      factorization").
    """
    moments = {} if importance == "magnitude" else _moments(module, groups, importance, batches, loss)
    found = []
    for index, group in enumerate(groups):
        logarithms = [_logarithm(each) for each in moments.get(index) or _of_weights(module, group)]
        scores, axes = torch.linalg.eigh(torch.stack(logarithms).sum(0))
        found.append((axes.flip(1), scores.flip(0).float()))
    return found


def _logarithm(moment: Tensor) -> Tensor:
    values, axes = torch.linalg.eigh(moment)
    return axes * values.clamp(min=max(_FLOOR * float(values[-1]), 1e-30)).log() @ axes.T


def _of_weights(module: nn.Module, group: Group) -> list[Tensor]:
    tensors = {key: tensor_of(module, key).detach() for key in group.members if is_parameter(module, key[0])}
    matrices = {key: each for key, each in tensors.items() if each.ndim > 1} or tensors
    return [_moment(_rows(each, key[1], group.members[key])) for key, each in matrices.items()]


def _moments(
    module: nn.Module, groups: Sequence[Group], importance: Importance, batches: Iterable[Batch], loss: Loss | None
) -> dict[int, list[Tensor]]:
    """By the number of a group, the second moments of its channels and, for "taylor", of the gradients along them."""
    fed: dict[int, Tensor] = {}
    slopes: dict[int, Tensor] = {}
    places: dict[Place, list[tuple[int, Tensor]]] = {}
    for index, group in enumerate(groups):
        for path, argument, axis, positions in group.seen:
            places.setdefault((path, argument, axis), []).append((index, positions))

    def note(place: Place, values: Tensor) -> None:
        for index, positions in places[place]:
            _add(fed, index, _rows(values.detach(), place[2], positions))
            if values.requires_grad:
                values.register_hook(_adder(slopes, index, place[2], positions))

    with eval_mode(module), watched(module, places, note):
        if importance == "taylor":
            assert loss is not None
            for _ in gradients_of(module, batches, loss):
                pass
        else:
            with torch.no_grad():
                for batch in batches:
                    call(module, split_labels(batch)[0])
    return {index: [each[index] for each in (fed, slopes) if index in each] for index in fed}


def _adder(totals: dict[int, Tensor], index: int, axis: int, positions: Tensor) -> Callable[[Tensor], None]:
    return lambda gradient: _add(totals, index, _rows(gradient, axis, positions))


def _add(totals: dict[int, Tensor], index: int, rows: Tensor) -> None:
    moment = _moment(rows)
    totals[index] = totals[index] + moment if index in totals else moment


def _moment(rows: Tensor) -> Tensor:
    return (rows.T @ rows).double().cpu()


def _rows(values: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Every value of the channels, as (rows, channels)."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    taken = values.movedim(axis, -1)[..., positions.to(values.device)]
    return taken.movedim(-2, -1).reshape(-1, len(positions))


@torch.no_grad()
def turn(module: nn.Module, group: Group, axes: Tensor) -> None:
    """Turn the channels of a group onto new axes, in place: the columns of `axes`, which are orthonormal."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for key, positions in group.members.items():
        tensor = state[key[0]]
        channels = tensor.movedim(key[1], -1)
        taken = channels[..., positions].to(torch.promote_types(tensor.dtype, torch.float32))
        turned = (taken.movedim(-2, -1) @ axes.to(taken)).movedim(-1, -2)
        channels[..., positions] = turned.to(tensor.dtype)
