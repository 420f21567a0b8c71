"""Which sizes to evaluate where there are too many for all: a front is found from few evaluations.

First Student, TA and wide-narrow-wide, then each layer wide for itself. Later ones are chosen by a model of what was
seen, in which each wide layer adds its share to the quality and neighbours add a little together: those that are
predicted to push the front of parameters and quality furthest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from random import Random

import torch
from torch import Tensor

Choice = tuple[bool, ...]
"""Whether each layer is wide."""

MOST_LISTED = 2**14
RIDGE = 1e-3  # of the least squares, relative to the mean square of an input
MOST_CHANGED = 12  # choices of which neighbours are candidates
AT_ONCE = 4  # sizes that are evaluated before the model is fitted again


def search(
    num_layers: int,
    cost: Callable[[Choice], float],
    evaluate: Callable[[Choice], float],
    *,
    max_evaluations: int,
    seed: int = 0,
) -> dict[Choice, float]:
    """The losses of the choices that were evaluated, at most `max_evaluations`; all of them if they are so few.

    Args:
        num_layers: Each is narrow or wide.
        cost: What a choice costs; it is cheap to ask.
        evaluate: The loss of a choice (less is better); it is costly to ask.
        max_evaluations: At least two, for Student and TA.
        seed: Of the candidates drawn, where there are too many to list.

    Example:
        >>> found = search(2, lambda choice: sum(choice), lambda choice: -sum(choice), max_evaluations=9)
        >>> sorted(found)
        [(False, False), (False, True), (True, False), (True, True)]
    """
    losses: dict[Choice, float] = {}
    for choice in _first(num_layers, max_evaluations):
        if len(losses) < max_evaluations and choice not in losses:
            losses[choice] = evaluate(choice)
    random = Random(seed)
    while len(losses) < max_evaluations:
        chosen = _promising(losses, num_layers, cost, random, min(AT_ONCE, max_evaluations - len(losses)))
        if not chosen:
            break
        losses |= {choice: evaluate(choice) for choice in chosen}
    return losses


def _first(num_layers: int, most: int) -> Iterator[Choice]:
    """All choices if they are few; else the ends, each layer for itself, and wide-narrow-wide."""
    if 2**num_layers <= most:
        yield from product((False, True), repeat=num_layers)
        return
    yield (False,) * num_layers
    yield (True,) * num_layers
    for layer in range(num_layers):
        yield tuple(index == layer for index in range(num_layers))
    for k in range(2, num_layers, 2):
        yield tuple(index < k - k // 2 or index >= num_layers - k // 2 for index in range(num_layers))


def _promising(
    losses: Mapping[Choice, float], num_layers: int, cost: Callable[[Choice], float], random: Random, count: int
) -> list[Choice]:
    """New choices that are predicted to enlarge the front most, one after the other."""
    candidates = [each for each in _candidates(losses, num_layers, random) if each not in losses]
    if not candidates:
        return []
    predicted = torch.tensor(_predict(losses, candidates), dtype=torch.float64)
    costs = torch.tensor([cost(each) for each in candidates], dtype=torch.float64)
    points = [(cost(each), loss) for each, loss in losses.items()]
    most = max(cost for cost, _ in points)
    chosen: list[Choice] = []
    for _ in range(min(count, len(candidates))):
        gains = gain(front(points), costs, predicted, most)
        gains[[candidates.index(each) for each in chosen]] = -1.0
        best = int(gains.argmax())
        chosen.append(candidates[best])
        points.append((float(costs[best]), float(predicted[best])))
    return chosen


def _candidates(losses: Mapping[Choice, float], num_layers: int, random: Random) -> list[Choice]:
    if 2**num_layers <= MOST_LISTED:
        return list(product((False, True), repeat=num_layers))
    shares = [i / 32 for i in range(33)] * 64
    found = {tuple(random.random() < share for _ in range(num_layers)) for share in shares}
    best = sorted(losses, key=lambda choice: losses[choice])[:MOST_CHANGED]
    for choice in best:
        for layer, other in product(range(num_layers), repeat=2):  # one changed, or two
            found.add(tuple(wide != (index in (layer, other)) for index, wide in enumerate(choice)))
    return sorted(found)


def _predict(losses: Mapping[Choice, float], candidates: Sequence[Choice]) -> list[float]:
    """Least squares with a small ridge, on each layer, pairs of neighbours, and the share of wide layers squared."""
    seen, asked = _inputs(list(losses)), _inputs(candidates)
    target = torch.tensor(list(losses.values()), dtype=torch.float64)
    mean = target.mean()
    gram = seen.T @ seen
    gram += RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=torch.float64)
    weights = torch.linalg.solve(gram, seen.T @ (target - mean))
    return (asked @ weights + mean).tolist()


def _inputs(choices: Sequence[Choice]) -> Tensor:
    wide = torch.tensor(choices, dtype=torch.float64)
    share = wide.mean(1, keepdim=True)
    both = 0.3 * wide[:, :-1] * wide[:, 1:]  # less trusted than a layer for itself
    return torch.cat([torch.ones_like(share), wide, both, share.square()], dim=1)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that nothing cheaper is as good as, from the cheapest.

    Example:
        >>> front([(3, 0.5), (1, 0.9), (2, 0.9), (2, 0.7)])
        [(1, 0.9), (2, 0.7), (3, 0.5)]
    """
    kept: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not kept or loss < kept[-1][1]:
            kept.append((cost, loss))
    return kept


def gain(steps: Sequence[tuple[float, float]], costs: Tensor, losses: Tensor, last: float) -> Tensor:
    """The area that each of some points adds below the steps of a front, up to the cost `last`.

    Example:
        >>> gain([(0.0, 1.0)], torch.tensor([1.0, 4.0]), torch.tensor([0.75, 0.0]), last=3.0)
        tensor([0.5000, 0.0000])
    """
    added = torch.zeros_like(losses)
    for (start, height), (end, _) in pairwise([*steps, (last, 0.0)]):
        added += (min(end, last) - costs.clamp(min=start)).clamp(min=0.0) * (height - losses).clamp(min=0.0)
    return added


def hypervolume(points: Sequence[tuple[float, float]], cost: float, loss: float) -> float:
    """The area that points dominate up to a cost and a loss.

    Example:
        >>> hypervolume([(1.0, 0.5), (2.0, 0.25)], cost=3.0, loss=1.0)
        1.25
    """
    steps = [each for each in front(points) if each[0] <= cost and each[1] <= loss]
    ends = [*(start for start, _ in steps[1:]), cost]
    return sum((end - start) * (loss - height) for (start, height), end in zip(steps, ends, strict=True))
