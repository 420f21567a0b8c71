"""What the user declares of a nesting, and whether each rule has matched something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import final

from torch import nn

from matta.errors import NestingError
from matta.layers import Layers
from matta.layout import Layout

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@final
class Rules:
    """What the user declared, and which of it has matched something."""

    def __init__(
        self,
        layers: Layers,
        layouts: Mapping[str, int | Layout],
        private: tuple[str, ...],
        share: str | Sequence[str],
    ) -> None:
        if isinstance(share, str) and share not in ("all", "embeddings", "none"):
            raise NestingError(
                f"share={share!r}; expected 'all', 'embeddings', 'none', or a list of patterns such as [{share!r}]"
            )
        _require_mappings(layers, layouts)
        self.layers, self.layouts, self.private, self.share = layers, layouts, private, share
        self._unused: dict[tuple[str, str], str] = {}
        for argument, patterns in self._patterns().items():
            for pattern in patterns:
                self._unused[argument, pattern] = ""

    def _patterns(self) -> dict[str, Iterable[str]]:
        share = () if isinstance(self.share, str) else self.share
        return {"layers": self.layers, "layouts": self.layouts, "private": self.private, "share": share}

    def match(self, argument: str, name: str, among: Iterable[str]) -> str | None:
        """The first pattern of an argument that matches `name`."""
        found = [pattern for pattern in among if fnmatchcase(name, pattern)]
        for pattern in found:
            self._unused.pop((argument, pattern), None)
        return found[0] if found else None

    def used(self, argument: str, pattern: str) -> None:
        """Note that a pattern has matched."""
        self._unused.pop((argument, pattern), None)

    def seen(self, argument: str, what: str) -> None:
        """Note what there was to match, for the message."""
        for key in self._unused:
            if key[0] == argument:
                self._unused[key] = what

    def require_all_used(self) -> None:
        """Refuse a rule that matches nothing."""
        for (argument, pattern), what in self._unused.items():
            raise NestingError(f"{argument}={pattern!r} matched nothing; the Student has: {what}")

    def is_private(self, name: str, owner: nn.Module) -> bool:
        """Whether the Student keeps a parameter for itself."""
        if self.match("private", name, self.private):
            return True
        if isinstance(self.share, str):
            return self.share == "none" or (self.share == "embeddings" and not isinstance(owner, EMBEDDINGS))
        return self.match("share", name, self.share) is None


def _require_mappings(layers: Layers, layouts: Mapping[str, int | Layout]) -> None:
    for argument, rules in (("layers", layers), ("layouts", layouts)):
        if not isinstance(rules, Mapping):
            raise NestingError(f"{argument}={rules!r}; expected a mapping from patterns, such as {{'blocks.*': ...}}")
    for pattern, layout in layouts.items():
        if not isinstance(layout, int | Layout) or (isinstance(layout, int) and layout < 1):
            raise NestingError(
                f"layouts={{{pattern!r}: {layout!r}}}; expected the number of equal segments, or a matta.Layout"
            )
