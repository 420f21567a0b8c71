"""Random numbers without chance, while two runs are compared.

A latent code, noise on a router, dropout that stays on: a module may draw in eval mode too, and at two widths no seed
gives it the same numbers. So what is drawn is the middle of what could be: the expected value, of a normal
distribution half a standard deviation above it, since its scale is to be seen. What has no middle, such as the indices
of a sample, is drawn from one seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from matta.nesting.channels import name_of
from matta.nesting.higher_order import opened, takes_functions, uncompiled

SEED: Final = 20250523  # of all random numbers with which a nesting is checked
_DRAWS: Final = frozenset(
    "rand rand_like uniform randn randn_like normal bernoulli exponential poisson multinomial randint randint_like "
    "randperm random geometric binomial log_normal cauchy".split()
)


@final
class WithoutChance(TorchDispatchMode):
    """While it is active, nothing is drawn by chance."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, or what stands for it."""
        if takes_functions(func):
            return opened(self, func, args, kwargs or {})[0]
        return drawn(func, args, kwargs or {}) if is_draw(func) else func(*args, **(kwargs or {}))


@contextmanager
def without_chance() -> Iterator[None]:
    """Within it nothing is drawn by chance, compiled, or run on attention's fast path, which no mode can follow."""
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with uncompiled(), WithoutChance():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)


def is_draw(func: Any) -> bool:
    """Whether an operator returns random numbers, and nothing else."""
    return torch.Tag.nondeterministic_seeded in func.tags and name_of(func) in _DRAWS


def drawn(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What such an operator returns, without chance; no generator but a new one moves on."""
    device = kwargs.get("device") or next((each.device for each in args if isinstance(each, Tensor)), "cpu")
    middle = _middle(func, args, kwargs)  # before the draw, which may write into what it takes
    out: Tensor = func.overloadpacket(*args, **{**kwargs, "generator": torch.Generator(device).manual_seed(SEED)})
    return out if middle is None or not out.is_floating_point() else out.copy_(torch.as_tensor(middle))


def _middle(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    given = {argument.name: argument.default_value for argument in func._schema.arguments}
    given |= {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    given |= kwargs
    match name_of(func):
        case "rand" | "rand_like" | "randn" | "randn_like":
            return 0.5
        case "uniform":
            return (given["from"] + given["to"]) / 2
        case "normal":
            return given["mean"] + given["std"] / 2
        case "bernoulli":
            return given.get("p", given["self"])
        case "exponential":
            return 1 / given["lambd"]
        case "poisson":
            return given["self"]
    return None
