"""What the user declares of a nesting: layouts, shares, and which TA blocks hold the Student's (section 3.2.2).

A declaration that matches nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeGuard, final

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from matta.errors import NestingError
from matta.nesting.layout import Layout

Layers = Mapping[str, str | Sequence[int]]


@final
@dataclass(frozen=True)
class LayerMap:
    """A module list of the Student: its path in both modules, and the TA's index of each block."""

    student: str
    ta: str
    indices: tuple[int, ...]
    num_ta: int


def place_layers(rule: str | Sequence[int], num_student: int, num_ta: int) -> tuple[int, ...]:
    """The TA's indices of the Student's blocks.

    "first" and "last" take blocks from one end, "ends" half from each, "even" spreads them over
    the whole; an explicit list names them.

    Raises:
        NestingError: the Student has more blocks, or the list does not fit.

    Example:
        >>> [place_layers(rule, 3, 5) for rule in ("first", "last", "even", "ends")]
        [(0, 1, 2), (2, 3, 4), (0, 2, 4), (0, 1, 4)]
    """
    if num_student > num_ta:
        raise NestingError(f"the Student has {num_student} blocks and the TA only {num_ta}; give the TA more")
    if isinstance(rule, Sequence) and not isinstance(rule, str):
        return _explicit(tuple(rule), num_student, num_ta)
    head = num_student - num_student // 2
    rules = {
        "first": range(num_student),
        "last": range(num_ta - num_student, num_ta),
        "ends": [*range(head), *range(num_ta - num_student // 2, num_ta)],
        "even": [round(i * (num_ta - 1) / max(num_student - 1, 1)) for i in range(num_student)],
    }
    if rule not in rules:
        raise NestingError(f"received {rule!r}; expected 'first', 'last', 'even', 'ends', or a list of indices")
    return tuple(rules[rule])


def _explicit(indices: tuple[int, ...], num_student: int, num_ta: int) -> tuple[int, ...]:
    wanted = len(indices) == num_student and all(0 <= i < num_ta for i in indices)
    if not wanted or list(indices) != sorted(set(indices)):
        raise NestingError(
            f"received the indices {list(indices)}; expected {num_student} of 0 to {num_ta - 1}, each once, rising"
        )
    return indices


def translate(name: str, maps: Sequence[LayerMap]) -> str:
    """The TA's name of a Student's module or parameter.

    Example:
        >>> translate("h.1.weight", [LayerMap("h", "h", (0, 3), 4)])
        'h.3.weight'
    """
    by_path = {each.student: each.indices for each in maps}
    seen: list[str] = []
    translated: list[str] = []
    for part in name.split(".") if name else []:
        indices = by_path.get(".".join(seen))
        translated.append(part if indices is None or not part.isdigit() else str(indices[int(part)]))
        seen.append(part)
    return ".".join(translated)


def map_layers(
    student: nn.Module, ta: nn.Module, layers: Layers, shared: Iterable[str]
) -> tuple[list[LayerMap], set[str]]:
    """The maps of all module lists that hold shared parameters, and the patterns that matched.

    Raises:
        NestingError: lists of different lengths without a rule, or a rule that does not fit.
    """
    prefixes = {".".join(name.split(".")[:i]) for name in shared for i in range(name.count(".") + 1)}
    maps: list[LayerMap] = []
    matched: set[str] = set()
    open_lists: dict[str, tuple[int, int]] = {}
    for path, module in student.named_modules():
        if not is_module_list(module):
            continue
        patterns = [pattern for pattern in layers if fnmatchcase(path, pattern)]
        matched.update(patterns)
        other = _counterpart(ta, translate(path, maps))
        if other is None or (path not in prefixes and not patterns):
            continue
        rule = layers[patterns[0]] if patterns else None
        num_student, num_ta = len(module), len(other)
        if rule is None and num_student < num_ta:
            open_lists.setdefault(_with_stars(path), (num_student, num_ta))
        indices = _indices(path, "first" if rule is None else rule, num_student, num_ta)
        maps.append(LayerMap(path, translate(path, maps), indices, num_ta))
    if open_lists:
        raise NestingError(_which_blocks(open_lists))
    return maps, matched


def _with_stars(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _which_blocks(open_lists: Mapping[str, tuple[int, int]]) -> str:
    """What to declare for all lists that the TA has more blocks of."""
    counts = ", ".join(
        f"{path or 'the module'} has {student} blocks in the Student and {ta} in the TA"
        for path, (student, ta) in open_lists.items()
    )
    remedy = ", ".join(f"{path!r}: 'first'" for path in open_lists)
    return (
        f"{counts}; say which of the TA's hold the Student's: layers={{{remedy}}}, or 'last', 'even', 'ends' or indices"
    )


def is_module_list(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    """Whether a module is a list of blocks: a ModuleList or Sequential with numbers for names."""
    if not isinstance(module, nn.ModuleList | nn.Sequential) or isinstance(module, ParametrizationList):
        return False
    return list(module._modules) == [str(i) for i in range(len(module))]  # children() leaves repeated ones out


def _counterpart(ta: nn.Module, path: str) -> nn.ModuleList | nn.Sequential | None:
    try:
        other = ta.get_submodule(path)
    except AttributeError:
        return None
    return other if is_module_list(other) else None


def _indices(path: str, rule: str | Sequence[int], num_student: int, num_ta: int) -> tuple[int, ...]:
    try:
        return place_layers(rule, num_student, num_ta)
    except NestingError as error:
        raise NestingError(f"layers={{{path!r}: {rule!r}}}: {error}") from None


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

    def declares(self, name: str) -> bool:
        """Whether there is a layout for a parameter, or for the weight that it is the bias of."""
        names = (name, f"{name.removesuffix('bias')}weight") if name.endswith("bias") else (name,)
        return any(self.match("layouts", each, self.layouts) for each in names)

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
