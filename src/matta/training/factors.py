"""Shampoo's factors of nested layers, kept beside a run so that they can be looked at (Fig. 4).

A factor of a TA matrix holds the second moments of its gradient between the channels of one axis:
within the Student's block, within what the TA has beyond it, and across the two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from matta.errors import DAMAGE, RunError
from matta.nesting.nested import Nested
from matta.nesting.plan import Placement
from matta.optim.shampoo import Shampoo
from matta.sizes.storage import checked_file, verify

FILE: Final = "preconditioner.safetensors"
SIDES: Final = ("output", "input")


@final
@dataclass(frozen=True, kw_only=True)
class Factor:
    """The second moments of a layer's gradient between channels of one axis, and which the Student holds.

    Channels that never had a gradient are left out; those of the Student come first.
    """

    layer: str
    side: str
    moments: Float[Tensor, "channels channels"]
    num_student: int

    def correlations(self) -> Float[Tensor, "channels channels"]:
        """|L_ij| / sqrt(L_ii L_jj), between 0 and 1."""
        scales = self.moments.diagonal().clamp(min=0).sqrt()
        return (self.moments.abs() / scales[:, None] / scales).clamp(max=1)

    def means(self) -> dict[str, float]:
        """Mean correlation of two different channels: both the Student's, both the TA's alone, one of each.

        NaN where there are no such two channels.

        Example:
            >>> moments = torch.eye(4, dtype=torch.float64) + 1
            >>> factor = Factor(layer="w", side="output", moments=moments, num_student=2)
            >>> {name: round(value, 3) for name, value in factor.means().items()}
            {'within_student': 0.5, 'within_ta_only': 0.5, 'across': 0.5}
        """
        table, edge = self.correlations(), self.num_student
        return {
            "within_student": _mean_off_diagonal(table[:edge, :edge]),
            "within_ta_only": _mean_off_diagonal(table[edge:, edge:]),
            "across": float(table[:edge, edge:].mean()),
        }


def _mean_off_diagonal(table: Tensor) -> float:
    count = len(table) * (len(table) - 1)
    return float((table.sum() - table.diagonal().sum()) / count) if count else float("nan")


def save_factors(optimizer: Shampoo, nested: Nested, folder: str | os.PathLike[str]) -> Path:
    """Write the factors of all nested matrices into `folder`, for `matta figure preconditioner`."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    named = dict(nested.ta.named_parameters())
    for placement in nested.plan.placements.values():
        parameter = named.get(placement.ta)
        state = optimizer.state.get(parameter, {}) if parameter is not None else {}
        if placement.ta in layers or not placement.grows or not ("left" in state or "right" in state):
            continue
        layers[placement.ta] = _describe(placement, parameter)  # type: ignore[arg-type]
        for side, name in zip(SIDES, ("left", "right"), strict=True):
            if name in state:
                tensors[f"{placement.ta}/{side}"] = state[name].detach().cpu().clone()
    path = Path(folder) / FILE
    with checked_file(path) as made:
        save_file(tensors, made, metadata={"layers": json.dumps(layers)})
    return path


def _describe(placement: Placement, parameter: Tensor) -> dict[str, Any]:
    """The layer's shape, and the Student's channels on each side; other axes of a convolution are folded."""
    inputs = placement.axes[1].positions()
    folded = parameter[0, 0].numel()
    return {
        "shape": [parameter.shape[0], parameter[0].numel()],
        "output": placement.axes[0].positions(),
        "input": [position * folded + offset for position in inputs for offset in range(folded)],
    }


def load_factor(run: str | os.PathLike[str], layer: str, side: str = "output") -> Factor:
    """The factor of a layer out of the folder of a run, or of a folder below it.

    A matrix larger than Shampoo's blocks has several; the one that holds the Student's edge is taken,
    averaged over the blocks along the other axis.

    Raises:
        RunError: the folder holds no factors, or none of that layer, or no block with both kinds of channels.
    """
    if side not in SIDES:
        raise RunError(f"received side={side!r}; expected 'output' or 'input'")
    path = _find(Path(run))
    with _opened(path) as (layers, file):
        names = set(file.keys())
        name = next((each for each in (layer, f"{layer}.weight") if f"{each}/{side}" in names), None)
        found = None if name is None else _best(name, side, file.get_tensor(f"{name}/{side}"), layers[name])
    if name is None:
        raise RunError(f"{path} has no {side} factor of {layer!r}; it has: {', '.join(layers) or 'none'}")
    if found is None:
        raise RunError(
            f"no block of {name} holds {side} channels both of the Student and of the TA alone; expected an axis that "
            f"grows, and a block_size of Shampoo that spans the Student's edge"
        )
    return found


def load_factors(run: str | os.PathLike[str]) -> list[Factor]:
    """All factors in the folder of a run that hold channels both of the Student and of the TA alone; none without any.

    Raises:
        RunError: the file is damaged.
    """
    path = Path(run) / FILE
    if not path.is_file():
        return []
    with _opened(path) as (layers, file):
        names = set(file.keys())
        pairs = [(name, side) for name in layers for side in SIDES if f"{name}/{side}" in names]
        found = [_best(name, side, file.get_tensor(f"{name}/{side}"), layers[name]) for name, side in pairs]
    return [each for each in found if each is not None]


def _find(run: Path) -> Path:
    found = [run / FILE] if (run / FILE).is_file() else sorted(run.glob(f"*/{FILE}"))
    if not found:
        raise RunError(
            f"{run} holds no {FILE}; expected the folder of a run with matta.Shampoo: matta.fit(..., run=...) or "
            f"matta study relevance"
        )
    return found[0]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """What a file says of its layers, and the file, of which only the tensors asked for are read."""
    try:
        verify(path.parent, FILE)
        with safe_open(path, framework="pt") as file:
            yield json.loads(file.metadata()["layers"]), file
    except (OSError, SafetensorError, RuntimeError, *DAMAGE) as error:  # of a file, or of a shape that does not fit
        raise RunError(f"{path} cannot be read: {error}; run the training again") from None


def _best(name: str, side: str, blocks: Tensor, layer: Mapping[str, Any]) -> Factor | None:
    """The factor of the block in which channels of the Student and of the TA alone are most even; None without both."""
    best: Factor | None = None
    for factor in _factors(name, side, blocks.double(), layer):
        balance = min(factor.num_student, len(factor.moments) - factor.num_student)
        if balance and (best is None or balance > min(best.num_student, len(best.moments) - best.num_student)):
            best = factor
    return best


def _factors(name: str, side: str, blocks: Tensor, layer: Mapping[str, Any]) -> Iterator[Factor]:
    """The factor of each stretch of the axis; `blocks` are those of the matrix, row after row."""
    length, student = layer["shape"][SIDES.index(side)], set(layer[side])
    size = blocks.shape[-1]
    num_stretches = -(-length // size)
    grid = blocks.view(num_stretches, -1, size, size) if side == "output" else None
    if grid is None:
        grid = blocks.view(-1, num_stretches, size, size).transpose(0, 1)
    for stretch, moments in enumerate(grid.mean(1)):
        channels = range(stretch * size, min((stretch + 1) * size, length))
        seen = [channel for channel in channels if moments[channel % size, channel % size] > 0]
        ordered = sorted(seen, key=lambda channel: channel not in student)
        index = torch.tensor([channel % size for channel in ordered], dtype=torch.long)
        count = sum(channel in student for channel in seen)
        yield Factor(layer=name, side=side, moments=moments[index][:, index], num_student=count)
