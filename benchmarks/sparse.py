"""A co-training step with a sparse embedding: its cost does not depend on the number of rows.

The same step (forward of Student and TA, three losses, backward, Shampoo, which moves the table by its graft, Adagrad)
with tables of 5 thousand and of 5 million rows, in turn in one process on one thread: batch 512, 8 ids each, 16 columns
in the TA and 8 in the Student, MLP 64-32 in the Student and 4x in the TA, for `nn.Embedding(sparse=True)` and
`nn.EmbeddingBag(sparse=True)`. Times are processor time.

`step_ratio_5m_to_5k_rows` is the largest ratio of medians to that of 5 thousand rows: on the same batch, and on one of
as many different ids, spread over all rows of the large table, which no cache holds (`spread`). To compare:
`dense_ratio_500k_to_5k_rows`, with dense gradients and a tenth of the rows.

    python benchmarks/sparse.py [--quick] [--json]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import matta
from figures import benchmark_parser, print_figures

SMALL, LARGE, DENSE = 5_000, 5_000_000, 500_000
BATCH, IDS = 512, 8


class Ranker(nn.Module):
    """The ids of an example, looked up and averaged, and a tower."""

    def __init__(self, rows: int, width: int, hidden: int, *, bags: bool, sparse: bool) -> None:
        super().__init__()
        kind = nn.EmbeddingBag if bags else nn.Embedding
        self.table = kind(rows, width, sparse=sparse, _weight=torch.zeros(rows, width))
        self.bags = bags
        layers = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in ((width, 2 * hidden), (2 * hidden, hidden))]
        self.tower = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of shape (batch, 1)."""
        found = self.table(ids)
        return self.tower(found if self.bags else found.mean(1))


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(
        "Cost of a step with a sparse embedding, by its rows.", quick="fewer rounds, under a minute"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(num_rounds=40 if options.quick else 200)
    print_figures(figures, as_json=options.json)


def measure(*, num_rounds: int) -> dict[str, float]:
    """Milliseconds of a step in each arm, and the ratios."""
    times: dict[str, float] = {}
    for kind in ("lookups", "bags"):
        small = Trained(SMALL, bags=kind == "bags", sparse=True)
        large = Trained(LARGE, bags=kind == "bags", sparse=True)
        ids = torch.randperm(SMALL)[: BATCH * IDS].view(BATCH, IDS)
        spread = ids * (LARGE // SMALL)
        arms = {"5k": partial(small, ids), "5m": partial(large, ids), "5m_spread": partial(large, spread)}
        times |= {f"{kind}_{name}_rows_step_ms": value for name, value in in_turn(arms, num_rounds).items()}
        del small, large, arms
    sizes = {"5k": SMALL, "500k": DENSE}
    dense = {name: partial(Trained(rows, bags=False, sparse=False), ids) for name, rows in sizes.items()}
    times |= {f"dense_{name}_rows_step_ms": value for name, value in in_turn(dense, max(5, num_rounds // 10)).items()}

    def ratio(kind: str, rows: str) -> float:
        return times[f"{kind}_{rows}_rows_step_ms"] / times[f"{kind}_5k_rows_step_ms"]

    ratios = [ratio(kind, rows) for kind in ("lookups", "bags") for rows in ("5m", "5m_spread")]
    return {
        **times,
        "step_ratio_5m_to_5k_rows": max(ratios),
        "dense_ratio_500k_to_5k_rows": ratio("dense", "500k"),
    }


class Trained:
    """A pair and its optimizer; calling it is a step on some ids."""

    def __init__(self, rows: int, *, bags: bool, sparse: bool) -> None:
        torch.manual_seed(0)
        student, ta = (Ranker(rows, *sizes, bags=bags, sparse=sparse) for sizes in ((8, 32), (16, 128)))
        nested = matta.nest(student, ta)
        self.cotrain = matta.CoTraining(nested, matta.objectives.Binary())
        self.optimizer = matta.Shampoo(nested, lr=1e-3, graft="adagrad")
        self.labels = (torch.arange(BATCH) % 2).float()

    def __call__(self, ids: Tensor) -> None:
        self.optimizer.zero_grad()
        self.cotrain((ids, self.labels)).loss.backward()
        self.optimizer.step()


def in_turn(steps: dict[str, Callable[[], None]], num_rounds: int) -> dict[str, float]:
    """The median milliseconds of each step; three rounds go before, in which states are made."""
    rounds = [{name: timed(step) for name, step in steps.items()} for _ in range(num_rounds + 3)][3:]
    return {name: statistics.median(each[name] for each in rounds) for name in steps}


def timed(step: Callable[[], None]) -> float:
    """Processor milliseconds of a step."""
    start = time.process_time()
    step()
    return (time.process_time() - start) * 1e3


if __name__ == "__main__":
    main()
