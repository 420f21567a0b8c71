"""The optimizers that the benchmarks compare: ours, AdamW and the peers that are installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import matta

Optimizers = list[torch.optim.Optimizer]
Build = Callable[[nn.Module, float], Optimizers]
PEER_REFRESH = 10  # steps between the peers' refreshes


def matta_shampoo(model: nn.Module, lr: float) -> Optimizers:
    return [matta.Shampoo(model, lr=lr)]


def adamw(model: nn.Module, lr: float) -> Optimizers:
    return [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)]


def muon(model: nn.Module, lr: float) -> Optimizers:
    """Matrices by Muon, at a length comparable to AdamW's; the rest by AdamW."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=True),
    ]


def pytorch_optimizer_dash(model: nn.Module, lr: float) -> Optimizers:
    from pytorch_optimizer import DASH

    # its default, Newton iterations, is many times slower on a CPU
    return [
        DASH(
            model.parameters(),
            lr=lr,
            precondition_frequency=PEER_REFRESH,
            inverse_root_method="eigh",
            block_size=256,
        )
    ]


def pytorch_optimizer_soap(model: nn.Module, lr: float) -> Optimizers:
    from pytorch_optimizer import SOAP

    return [
        SOAP(
            model.parameters(),
            lr=lr,
            weight_decay=0.0,
            precondition_frequency=PEER_REFRESH,
            max_precondition_dim=1024,
        )
    ]


def heavyball_soap(model: nn.Module, lr: float) -> Optimizers:
    import heavyball

    heavyball.utils.compile_mode = None  # compiling for a CPU takes minutes
    return [
        heavyball.SOAP(
            model.parameters(),
            lr=lr,
            weight_decay=0.0,
            precondition_frequency=PEER_REFRESH,
            use_precond_schedule=False,
            max_precond_dim=1024,
        )
    ]


OURS: dict[str, Build] = {"matta": matta_shampoo, "adamw": adamw}
PEERS: dict[str, tuple[str, Build]] = {
    "muon": ("torch", muon),
    "pytorch_optimizer_dash": ("pytorch_optimizer", pytorch_optimizer_dash),
    "pytorch_optimizer_soap": ("pytorch_optimizer", pytorch_optimizer_soap),
    "heavyball_soap": ("heavyball", heavyball_soap),
}


def arms() -> dict[str, Build]:
    """AdamW, ours and the peers that are installed."""
    found = {name: build for name, (module, build) in PEERS.items() if importlib.util.find_spec(module)}
    return {**OURS, **found}


def missing_peers() -> list[str]:
    return sorted({module for module, _ in PEERS.values() if not importlib.util.find_spec(module)})


class Arm:
    """A model with an optimizer of its own, and the times of its steps."""

    def __init__(self, model: nn.Module, build: Build) -> None:
        self.model = model
        self.optimizers = build(model, 1e-4)
        self.seconds: list[float] = []

    def step(self, gradients: Iterable[Tensor]) -> None:
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        start = time.process_time()
        for optimizer in self.optimizers:
            optimizer.step()
        self.seconds.append(time.process_time() - start)
