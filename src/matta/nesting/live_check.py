"""A live Student must compute what its class computes with the same weights.

Its parameters are slices of the TA's wherever its modules read them as attributes. Code that reaches a parameter by
another way (kept in an object or a closure, read from `self._parameters`), or writes to its weights, would go past
the slices without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from matta.errors import NestingError
from matta.nesting.batches import Batch, call, outputs_of, relative_difference, split_labels
from matta.nesting.copying import deep_copy
from matta.nesting.draws import SEED
from matta.nesting.lockstep import recorded
from matta.nesting.slicing import LiveSlice, skeleton, slices_of

_TOLERANCE: Final = {True: 2e-2, False: 1e-4}  # of types of 16 bits, whose sums may be in another order, or not
_EXPECTED: Final = (
    "expected a forward that reads parameters as attributes of the modules that have them (self.weight, not "
    "self._parameters), and writes to none"
)


@torch.no_grad()
def require_live_computes_the_same(
    live: nn.Module,
    student: nn.Module,
    example: Batch,
    *,
    training: bool = False,
    kept: Sequence[tuple[str, str]] = (),
) -> None:
    """Refuse a Student whose live copy computes something else on the example than a plain one with its weights.

    `kept` are attributes that keep parameters, and these: an optimizer's, or a list for a penalty, which the forward
    does not read, or reads. The message names them.

    `live` is run, and what its modules remember of runs changes. Modules that draw random numbers from elsewhere than
    torch's generators, so that two plain copies differ, are let through.

    Raises:
        NestingError: with the parameters that are read from elsewhere, if there are such.
    """
    slices = slices_of(live)
    if any(getattr(each.owner, each.name).is_meta for each in slices.values()):
        return
    inputs = split_labels(example)[0]
    try:
        expected, _ = _run(_plain(student, slices), inputs, training=training)
    except Exception:  # the probe and the first step say so
        return
    try:
        found, read = _run(live, inputs, training=training)
    except Exception as error:
        raise NestingError(
            f"the live Student fails on the example with {type(error).__name__}: {error}, where a plain one with "
            f"its weights runs; {_EXPECTED}"
        ) from error
    try:
        skeleton(live)
    except Exception as error:
        raise NestingError(
            f"a live {type(student).__name__} cannot be copied, so that nothing could be extracted: "
            f"{type(error).__name__}: {error}; expected classes whose __getstate__ and __reduce__ take subclasses"
        ) from error
    most = _TOLERANCE[any(each.element_size() == 2 for each in expected)]
    again, _ = _run(_plain(student, slices), inputs, training=training)
    if _distance(expected, found) > most >= _distance(expected, again):
        placed = {id(each): name for name, each in student.named_parameters() if name in slices}
        raise NestingError(_message(_distance(expected, found), [placed[key] for key in placed.keys() & read], kept))


def _plain(student: nn.Module, slices: Mapping[str, LiveSlice]) -> nn.Module:
    """A copy of the Student with the present weights of its slices."""
    made = deep_copy(student)
    named = dict(made.named_parameters(remove_duplicate=False))
    for name, source in slices.items():
        named[name].copy_(source.read(contiguous=True))
    return made


def _run(module: nn.Module, inputs: Any, *, training: bool) -> tuple[list[Tensor], set[int]]:
    """What a copy of a module returns with random numbers of one seed, and the parameters that were read."""
    devices = {each.device for each in module.parameters() if each.device.type == "cuda"}
    module.train(training)
    with torch.random.fork_rng(devices=list(devices)), recorded(module) as run:
        torch.manual_seed(SEED)
        return outputs_of(call(module, inputs)), run.read


def _message(distance: float, read: Iterable[str], kept: Sequence[tuple[str, str]]) -> str:
    names = ", ".join(sorted(read))
    where = ", ".join(repr(place) for place, _ in kept[:3]) or "an object, a container or a function"
    why = f"{names} is kept elsewhere too (in {where}), and read from there; " if names else ""
    return (
        f"the live Student computes something else than a plain one with its weights (relative error {distance:.2g}); "
        f"{why}{_EXPECTED}"
    )


def _distance(expected: list[Tensor], found: list[Tensor]) -> float:
    if [each.shape for each in expected] != [each.shape for each in found]:
        return float("inf")
    return max(
        (relative_difference(_numbers(one), _numbers(other)) for one, other in zip(expected, found, strict=True)),
        default=0.0,
    )


def _numbers(values: Any) -> Tensor:
    """The values, with 0 for what is not a number in weights that nobody has drawn."""
    return torch.nan_to_num(values, nan=0.0, posinf=float("inf"), neginf=float("-inf"))
