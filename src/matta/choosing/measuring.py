"""What modules cost: parameters, FLOPs, the memory of activations, and measured latency."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from matta.choosing.matrix_products import count_flops, in_counted_operators
from matta.errors import MattaError, first_line
from matta.nesting.batches import call, map_tensors, tensors_of

WARM_UP_CALLS = 5


@final
@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of a forward of so many examples.

    Example:
        >>> Latency(batch_size=8, median_ms=0.5, p95_ms=0.75)
        Latency(batch_size=8, median_ms=0.5, p95_ms=0.75)
    """

    batch_size: int
    median_ms: float
    p95_ms: float


@final
@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a module costs; FLOPs and activations are of one forward of the example, per example.

    `flops` are those of matrix products and convolutions, whichever kernels compute them. `activation_bytes` is the
    most that a forward without gradients holds at once beyond the parameters, in tensors between operators. What it
    holds for any number of examples, such as weights that are composed in it, is in `bytes`, with weights and buffers.
    """

    parameters: int
    bytes: int
    flops: float
    activation_bytes: float


@torch.no_grad()
def measure_cost(module: nn.Module, inputs: Any, labels: Any = None) -> Cost:
    """The cost of a module on the inputs of a batch. Labels tell its length where the first input has another.

    Raises:
        MattaError: it does not run on them, or they have no rows.

    Example:
        >>> measure_cost(nn.Linear(4, 2), torch.zeros(3, 4)).flops
        16.0
    """
    count = _num_labelled(inputs, labels)
    parameters = list(module.parameters())
    lasting, each_example = _held_bytes(module, inputs, count)
    flops = count_flops(module, lambda: run_example(module, inputs))
    return Cost(
        parameters=sum(each.numel() for each in parameters),
        bytes=sum(each.numel() * each.element_size() for each in (*parameters, *module.buffers())) + lasting,
        flops=flops / count,
        activation_bytes=each_example,
    )


def _num_labelled(inputs: Any, labels: Any) -> int:
    """The examples of a batch: ids of bags one after the other, as a first input, are more than these."""
    count = num_examples(inputs)
    told = next((len(each) for each in tensors_of(labels) if each.ndim and len(each)), count)
    return told if any(each.ndim and len(each) == told for each in tensors_of(inputs)) else count


def _held_bytes(module: nn.Module, inputs: Any, count: int) -> tuple[int, float]:
    """The most that a forward holds at once: whatever the batch, and for each example; by batches of one and of all."""
    most = _peak_bytes(module, inputs)
    try:
        one = _peak_bytes(module, resized(inputs, 1)) if count == num_examples(inputs) > 1 else most
    except Exception:  # of the user's module, which need not take one example: any kind
        one = most
    each = (most - one) / max(1, count - 1)
    lasting = int(one - each)
    return (lasting, each) if count > 1 and each > 0 and lasting > 0 else (0, most / count)


def _peak_bytes(module: nn.Module, inputs: Any) -> int:
    device = next((each.device for each in module.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(module, inputs)
        return torch.cuda.max_memory_allocated(device) - before
    with in_counted_operators(module), _Held() as held:
        call(module, inputs)
    return held.peak


class _Held(TorchDispatchMode):
    """Bytes of the storages that operations make while it is on, for as long as some tensor shows them."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._shown: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = {each.untyped_storage()._cdata for each in tensors_of((*args, *(kwargs or {}).values()))}
        made = func(*args, **(kwargs or {}))
        for tensor in tensors_of(made):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._shown:
                self._shown[key] += 1
            elif key in inside:  # a view of something that was there before
                continue
            else:
                self._shown[key] = 1
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
            weakref.finalize(tensor, self._leave, key, storage.nbytes())
        return made

    def _leave(self, key: int, size: int) -> None:
        self._shown[key] -= 1
        if not self._shown[key]:
            del self._shown[key]
            self.now -= size


def usable_device(device: str | torch.device) -> torch.device:
    """The device of a name.

    Raises:
        MattaError: this machine, or this PyTorch, has none.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    try:
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise MattaError(
            f"received device={device!r}: {first_line(error)}; expected a device of this machine, such as 'cpu'"
        ) from None


@torch.no_grad()
def run_example(module: nn.Module, inputs: Any) -> Any:
    """What a module returns on the inputs of an example.

    Raises:
        MattaError: it does not run on them, or they have no rows.
    """
    num_examples(inputs)
    try:
        return call(module, inputs)
    except MattaError:
        raise
    except Exception as error:  # of the user's module: any kind
        raise MattaError(
            f"the module does not run on the example: {type(error).__name__}: {first_line(error)}; expected a batch as "
            f"in training, on the module's device, with what its forward takes and nothing else (such as the weights "
            f"of events)"
        ) from error


def num_examples(inputs: Any) -> int:
    """The length of the first axis of the first tensor.

    Raises:
        MattaError: there is no tensor with an axis, or no row in it.

    Example:
        >>> num_examples({"flag": True, "x": torch.zeros(3, 2)})
        3
    """
    for each in tensors_of(inputs):
        if each.ndim and not len(each):
            raise MattaError("the example has no rows; expected at least one")
        if each.ndim:
            return len(each)
    raise MattaError("the example has no tensor with a batch axis; expected a batch of inputs")


def resized(inputs: Any, batch_size: int) -> Any:
    """The inputs with so many examples: the first ones, or all again and again.

    Tensors whose first axis is as long as the batch are taken to have a row for each example.

    Example:
        >>> resized((torch.arange(2), torch.ones(())), 5)
        (tensor([0, 1, 0, 1, 0]), tensor(1.))
    """
    count = num_examples(inputs)

    def change(tensor: Tensor) -> Tensor:
        if tensor.ndim and len(tensor) == count:
            return tensor[torch.arange(batch_size, device=tensor.device) % count]
        return tensor

    return map_tensors(inputs, change)


@torch.no_grad()
def measure_latency(modules: Sequence[nn.Module], inputs: Any, *, calls: int, threads: int | None) -> list[Latency]:
    """The latency of each module, by calls of all in turn, after a warm-up.

    Args:
        modules: They all take the inputs, and are where the inputs are.
        inputs: Of one batch.
        calls: Timed calls of each.
        threads: Of a CPU; None: as many as torch has now.
    """
    seconds: list[list[float]] = [[] for _ in modules]
    with _threads(threads):
        for index in range(WARM_UP_CALLS + calls):
            for module, found in zip(modules, seconds, strict=True):
                _synchronize(inputs)
                start = time.perf_counter()
                call(module, inputs)
                _synchronize(inputs)
                if index >= WARM_UP_CALLS:
                    found.append(time.perf_counter() - start)
    count = num_examples(inputs)
    return [Latency(batch_size=count, median_ms=1e3 * median(each), p95_ms=1e3 * _p95(each)) for each in seconds]


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def _synchronize(inputs: Any) -> None:
    first = tensors_of(inputs)[0]
    if first.device.type == "cuda":
        torch.cuda.synchronize(first.device)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
