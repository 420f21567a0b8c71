"""The states of the random number generators that training draws from: taken, put back, kept apart."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def random_state() -> dict[str, Any]:
    """The global generators of Python, NumPy, torch and its current device, as plain types and tensors."""
    ours = numpy.random.get_state(legacy=False)
    inner = {**ours["state"], "key": torch.from_numpy(ours["state"]["key"].astype("int64"))}
    state = {
        "python": random.getstate(),
        "numpy": {**ours, "state": inner},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    numpy.random.set_state({**state["numpy"], "state": {**inner, "key": inner["key"].numpy().astype("uint32")}})
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn inside, what comes after draws as if it had not been."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def generators_of(data: Any) -> list[torch.Generator]:
    """The generators of a DataLoader and its samplers, each once, in a fixed order."""
    owners = [data, *(getattr(data, name, None) for name in ("sampler", "batch_sampler", "dataset"))]
    owners.append(getattr(owners[2], "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def set_generator_states(generators: Sequence[torch.Generator], states: Sequence[torch.Tensor]) -> None:
    """Put back the states of `generators_of`."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
