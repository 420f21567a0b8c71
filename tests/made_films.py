"""Made tuples for the tests of studies."""

from __future__ import annotations

import torch

from matta_studies.labelled_films import RelevanceData, Tuples


def made_tuples(count: int, seed: int) -> Tuples:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, (count, 3), generator=generator)
    return Tuples(ids=ids, label=torch.sigmoid(ids.sum(1) - 7.5 + 0.5 * torch.randn(count, generator=generator)))


def made_data() -> RelevanceData:
    parts = {name: made_tuples(300, seed) for seed, name in enumerate(("train", "validation", "test", "real"))}
    return RelevanceData(num_rows=(6, 6, 6), **parts)
