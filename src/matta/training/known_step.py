"""A counter on a device that the host reads without waiting for the device."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor


@final
class KnownStep:
    """What a counter is, as far as the host knows: its value at some version of the tensor.

    Torch counts how often a tensor is written to. As long as nothing but `advance` does, the value is known; after
    anything else (a state that is loaded, a move to another device, a compiled step) it is read once.

    Example:
        >>> counter, known = torch.zeros((), dtype=torch.int64), KnownStep()
        >>> known.read(counter)  # waits
        0
        >>> known.advance(counter)
        >>> known.read(counter)  # does not
        1
    """

    def __init__(self) -> None:
        self._seen: tuple[Tensor, int, int] | None = None

    def read(self, counter: Tensor) -> int:
        """The value of the counter."""
        value = self._value(counter)
        if value is None:
            value = int(counter)
            self._seen = counter, counter._version, value
        return value

    def advance(self, counter: Tensor) -> None:
        """Add 1 to the counter; inside a compiled function, to it alone."""
        if torch.compiler.is_compiling():
            counter += 1
            return
        value = self._value(counter)
        counter += 1
        self._seen = None if value is None else (counter, counter._version, value + 1)

    def _value(self, counter: Tensor) -> int | None:
        if self._seen is None or self._seen[0] is not counter or self._seen[1] != counter._version:
            return None
        return self._seen[2]

    def __reduce__(self) -> tuple[Any, ...]:
        return KnownStep, ()  # a copy has another counter
