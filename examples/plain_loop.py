"""Co-train in a loop of your own, then take out models of three sizes: `python examples/plain_loop.py`.

With several batches to a step, or several processes, give each batch `num_labels=cotrain.num_labels(batches)`.
"""

from __future__ import annotations

import torch
from torch import nn

import matta


def tower(width: int) -> nn.Sequential:
    """The model to serve; the Teaching Assistant is the same, built wider."""
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def main() -> None:
    """Train on made events, then judge every size on fresh ones."""
    torch.manual_seed(0)
    rule = tower(64)  # what the models are to find out
    batches = [(x, (rule(x) > 0).float()) for x in torch.randn(300, 128, 16)]

    nested = matta.nest(tower(8), tower(32))
    cotrain = matta.CoTraining(nested, matta.objectives.Binary(), ramp=matta.Ramp(start=30, steps=100))
    optimizer = torch.optim.Adam(nested.parameters(), lr=0.01)
    for batch in batches:
        optimizer.zero_grad()
        out = cotrain(batch)
        out.loss.backward()
        optimizer.step()

    x = torch.randn(4000, 16)
    for k in range(len(matta.layer_names(nested)) + 1):
        module = matta.extract(nested, matta.wide_narrow_wide(nested, k)).eval()
        size = sum(parameter.numel() for parameter in module.parameters())
        right = ((module(x) > 0) == (rule(x) > 0)).float().mean().item()
        print(f"{k} wide layers: {size:5} parameters, {right:.1%} right")


if __name__ == "__main__":
    main()
