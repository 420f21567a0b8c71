"""One call of an ATen operator, its arguments by name."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@final
class Call:
    """One call of an operator, its arguments by name."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, shape: torch.Size) -> None:
        self.func, self.args, self.kwargs, self.out, self.shape = func, args, kwargs, out, shape
        self.name = name_of(func)
        schema = func._schema.arguments
        self.bound = {argument.name: argument.default_value for argument in schema}
        self.bound |= {argument.name: value for argument, value in zip(schema, args, strict=False)}
        self.bound |= kwargs

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    @property
    def first(self) -> Tensor:
        """The first argument that is a tensor."""
        return next(leaf for leaf in tree_leaves(self.args) if isinstance(leaf, Tensor))

    @property
    def result(self) -> Tensor:
        """The first result."""
        return next(leaf for leaf in tree_leaves(self.out) if isinstance(leaf, Tensor))

    @property
    def tensors(self) -> list[Tensor]:
        """All arguments that are tensors."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


def name_of(func: Any) -> str:
    """The name of an operator, without its library, its overload and what marks it as in place."""
    return str(func._schema.name.split("::")[1]).removesuffix("_")
