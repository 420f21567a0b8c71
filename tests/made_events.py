"""Made streams of events for the tests of studies."""

from __future__ import annotations

import torch

from matta_studies.event_streams import EventStream


def made_stream(count: int = 640) -> EventStream:
    """Events of three weeks whose label hangs on a category and a number."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, (count, 2), generator=generator)
    numbers = torch.randn(count, 3, generator=generator)
    chance = torch.sigmoid(2.0 * (ids[:, 0] - 2.0) + numbers[:, 0])
    return EventStream(
        ids=ids + torch.tensor([0, 5]),
        numbers=numbers,
        label=torch.bernoulli(chance, generator=generator),
        period=torch.arange(count) * 3 // count,
        num_rows=10,
    )
