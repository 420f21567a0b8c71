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


def parts_of(data: Any) -> list[Any]:
    """A DataLoader with its dataset and its samplers, also those inside others, each once, in a fixed order."""
    found: list[Any] = []
    todo = [data]
    while todo:
        part = todo.pop(0)
        if part is not None and not any(part is each for each in found):
            found.append(part)
            inner = [getattr(part, name, None) for name in ("sampler", "batch_sampler", "dataset", "data_source")]
            several = getattr(part, "datasets", ())
            inner += several if isinstance(several, list | tuple) else ()
            todo += [each for each in inner if hasattr(each, "__dict__")]
    return found


def generators_of(data: Any) -> list[Any]:
    """The random generators that a DataLoader, its dataset and its samplers keep: of torch, Python or NumPy."""
    kinds = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)
    kept = [value for part in parts_of(data) for value in getattr(part, "__dict__", {}).values()]
    return list({id(each): each for each in kept if isinstance(each, kinds)}.values())


def generator_state(generator: Any) -> Any:
    """The state of one of `generators_of`, in plain types and tensors."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return _plain(_bits(generator).state)


def set_generator_states(generators: Sequence[Any], states: Sequence[Any]) -> None:
    """Put back what `generator_state` gave of each."""
    for generator, state in zip(generators, states, strict=True):
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        elif isinstance(generator, random.Random):
            generator.setstate(state)
        else:
            bits = _bits(generator)
            bits.state = _numpy(state, bits.state)


def _bits(generator: Any) -> Any:
    """What draws for a generator of NumPy's, of the new or the older kind."""
    return generator.bit_generator if isinstance(generator, numpy.random.Generator) else generator._bit_generator


def _plain(state: Any) -> Any:
    """A state of NumPy's with tensors for its arrays."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, numpy.ndarray):
        return torch.from_numpy(state.astype("float64" if state.dtype.kind == "f" else "int64"))
    return state


def _numpy(state: Any, like: Any) -> Any:
    if isinstance(like, dict):
        return {key: _numpy(state[key], value) for key, value in like.items()}
    return state.numpy().astype(like.dtype) if isinstance(state, torch.Tensor) else state
