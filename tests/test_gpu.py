"""What must hold on a GPU; without one the same on the CPU, so that the tests themselves are known to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import matta

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def no_waits() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


@pytest.mark.parametrize("optimizer", ["adamw", "shampoo"])
def test_a_step_waits_for_nothing(optimizer: str) -> None:
    nested = pair()
    moves = matta.Shampoo(nested.parameters()) if optimizer == "shampoo" else torch.optim.AdamW(nested.parameters())
    cotrain = matta.CoTraining(nested, matta.objectives.Binary(), ramp=matta.Ramp(start=1, steps=9)).train()
    on_device = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(6)]
    for number, batch in enumerate(on_device):
        with no_waits() if number >= 3 else nullcontext():  # the first steps make the optimizer's state
            cotrain(batch).loss.backward()
            moves.step()
            moves.zero_grad(set_to_none=True)
    assert all(bool(torch.isfinite(each).all()) for each in nested.parameters())


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
