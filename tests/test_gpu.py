"""What must hold on a GPU; without one the same on the CPU, so that the tests themselves are known to run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import matta
from matta.objectives import classification, labels, objective

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Waits(TorchDispatchMode):
    """What would make the host wait for a device, counted on a CPU: values read, masks as indices, each `eigh`."""

    NAMES = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._linalg_eigh")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        masks = [each for each in tree_leaves(args[1:]) if isinstance(each, Tensor) and each.dtype == torch.bool]
        if name in self.NAMES or (name in ("aten.index", "aten.index_put", "aten.index_put_") and masks):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(found: list[str]) -> Iterator[None]:
    """Put what makes the host wait for the device into a list: each wait on a GPU, what would be one on a CPU."""
    if DEVICE.type != "cuda":
        with _Waits() as counting:
            yield
        found += counting.found
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield
        found += [str(each.message) for each in told if "synchronizing CUDA" in str(each.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _looks_into_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU labels are checked in every batch, which is no wait there; here only in the first, as on a GPU."""
    for module in (objective, classification, labels):
        monkeypatch.setattr(module, "is_here", lambda tensor: False)


def tower(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))


def pair() -> matta.Nested:
    torch.manual_seed(0)
    return matta.nest(tower(16), tower(32)).to(DEVICE)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(32, 8, generator=generator), torch.rand(32, generator=generator).round()) for _ in range(count)
    ]


def _soft_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(32, 8, generator=generator), torch.rand(32, 3, generator=generator).softmax(-1))
        for _ in range(count)
    ]


def _classifiers() -> matta.Nested:
    torch.manual_seed(0)
    towers = [nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 3)) for width in (16, 32)]
    return matta.nest(*towers).to(DEVICE)


def _sampled(nested: matta.Nested) -> matta.CoTraining:
    return matta.CoTraining(
        nested,
        matta.objectives.Classification(),
        ramp=matta.Ramp(start=1, steps=9),
        sample=lambda random: matta.wide_narrow_wide(nested, random.choice((0, 1))),
    )


def test_forward_and_backward_wait_for_nothing() -> None:
    nested, found = _classifiers(), list[str]()
    cotrain = _sampled(nested).train()
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.01, momentum=0.9)
    for number, (x, y) in enumerate([(x.to(DEVICE), y.to(DEVICE)) for x, y in _soft_batches(5)]):
        with waits(found) if number >= 2 else nullcontext():  # labels are looked at in the first batch
            cotrain((x, y)).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert not found


@pytest.mark.parametrize("graft", ["adam", "adagrad", "sgd"])
def test_a_step_of_shampoo_waits_once_and_for_each_decomposition(graft: Any) -> None:
    nested = _classifiers()
    cotrain, optimizer = _sampled(nested).train(), matta.Shampoo(nested, graft=graft, refresh_every=6)
    counts = []
    for x, y in [(x.to(DEVICE), y.to(DEVICE)) for x, y in _soft_batches(9)]:
        found: list[str] = []
        cotrain((x, y)).loss.backward()
        with waits(found):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counts.append(len(found))
    first = sum(counts[:3])  # three times whether all gradients are finite, and two stacks of two sides each
    assert first == 3 + 4 or DEVICE.type == "cuda"
    assert min(counts) == 1


@pytest.mark.parametrize(("max_nonfinite", "expected"), [(None, 1), (10, 2)])
def test_a_step_of_fit_waits_for_what_is_asked_for(max_nonfinite: int | None, expected: int) -> None:
    """One wait is Shampoo's, whose step changes nothing where a gradient is not finite; the other is for the loss."""
    nested, by_step = _classifiers(), list[list[str]]()

    class Watch:
        """From the end of one step to the end of the next."""

        running: Any = None

        def before_step(self, cotrain: matta.CoTraining, batch: Any, out: Any) -> None:
            pass

        def after_step(self, cotrain: matta.CoTraining) -> None:
            if self.running is not None:
                self.running.__exit__(None, None, None)
            by_step.append([])
            self.running = waits(by_step[-1])
            self.running.__enter__()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            pass

    watch = Watch()
    optimizer = matta.Shampoo(nested, refresh_every=1000)
    matta.fit(_sampled(nested), _soft_batches(8), optimizer, epochs=10, steps=None, clip_norm=1.0,
              max_nonfinite=max_nonfinite, log_every=1000, observers=[watch], progress=False)  # fmt: skip
    watch.running.__exit__(None, None, None)
    quiet = by_step[63:-1]  # without roots
    assert {len(found) for found in quiet} == {expected}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_resumes_where_it_was_stopped(precision: str, tmp_path: Path) -> None:
    def trained(run: Path | None, steps: int, *, resume: bool = False) -> dict[str, Tensor]:
        nested = pair()
        cotrain = matta.CoTraining(nested, matta.objectives.Binary())
        optimizer = torch.optim.AdamW(nested.parameters(), lr=0.01)
        matta.fit(cotrain, batches(8), optimizer, steps=steps, precision=precision, run=run, resume=resume,
                  progress=False, tensorboard=False)  # fmt: skip
        return {name: each.detach().cpu() for name, each in nested.named_parameters()}

    whole = trained(None, 8)
    trained(tmp_path / "run", 5)
    torch.testing.assert_close(trained(tmp_path / "run", 8, resume=True), whole, atol=0, rtol=0)


def test_sub_models_are_exact_on_the_device() -> None:
    nested = pair().eval()
    x = batches(1)[0][0].to(DEVICE)
    torch.testing.assert_close(matta.extract(nested)(x), nested.student(x), atol=0, rtol=0)


def test_the_device_agrees_with_the_cpu() -> None:
    on_device, on_cpu = pair(), pair().cpu()
    x, y = batches(1)[0]
    outs = []
    for nested, device in ((on_device, DEVICE), (on_cpu, torch.device("cpu"))):
        cotrain = matta.CoTraining(nested, matta.objectives.Binary())
        out = cotrain((x.to(device), y.to(device)))
        out.loss.backward()
        outs.append({"loss": out.loss.cpu(), **{name: p.grad.cpu() for name, p in nested.named_parameters()}})
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-4)
