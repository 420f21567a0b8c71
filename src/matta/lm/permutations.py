"""Orders that are computed by their place, so that a resumed run needs no history."""

from __future__ import annotations

from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

_ROUNDS: Final = 8
_Words = NDArray[np.uint64]


@final
class Shuffled:
    """A permutation of 0 to `length` − 1 that depends on the seeds alone.

    A Feistel network over the least even power of two that holds `length`; what falls outside is permuted again
    until it falls inside (Black and Rogaway, 2002), four times at worst in the mean. The same on every machine and
    with every version of NumPy, so that a resumed run keeps its order even after an upgrade.

    Example:
        >>> order = Shuffled(5, 0, 1)
        >>> sorted(order.at(0, 5).tolist()), order.at(1, 3).tolist() == order.at(0, 5)[1:3].tolist()
        ([0, 1, 2, 3, 4], True)
    """

    def __init__(self, length: int, *seeds: int) -> None:
        self.length = length
        self._half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.SeedSequence(seeds).generate_state(_ROUNDS, np.uint64)

    def at(self, start: int, stop: int) -> NDArray[np.int64]:
        """What stands at the places from `start` up to `stop`."""
        assert 0 <= start <= stop <= self.length
        values = self._permute(np.arange(start, stop, dtype=np.uint64))
        while (outside := values >= np.uint64(self.length)).any():
            values[outside] = self._permute(values[outside])
        return values.astype(np.int64)

    def _permute(self, values: _Words) -> _Words:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._mask)
        return left << self._half | right


def _mixed(words: _Words) -> Any:
    """Each bit of the result depends on all bits of the word (the end of SplitMix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
