"""What the fused heads and losses save on a language model, in time and in memory.

Student 4 layers, TA 6 layers with FFN x2, d 256, vocabulary 50,257, 8 x 256 tokens, float32, one thread, forward and
backward. Four arms: the Student alone and the TA alone with plain cross-entropy (labels padded instead of logits cut,
so that no logits are copied), both together with the three losses written plainly, and both with them fused.

`time_ratio` is fused / (Student alone + TA alone), `time_ratio_plain` fused / plain joint. The arms run in turn in one
process, times are processor time, ratios are medians over rounds.

`memory_ratio` is the peak of the fused step / that of the TA alone, `memory_ratio_plain` / that of the plain joint
step. Each arm runs its first two steps in a process of its own; its peak is the largest resident size (ru_maxrss) less
what it was after the imports, before the models were built: weights, gradients, activations, everything of a step. The
`*_rss_gb` are the same with the imports. It is measured before anything large is in the parent, from which a child on
Linux takes the first value of ru_maxrss.

    python benchmarks/fused_loss.py [--quick] [--json]
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import matta
from figures import benchmark_parser, print_figures
from matta.objectives import CausalLM
from tiny_gpt import TinyGPT

VOCABULARY, CONTEXT, BATCH_SIZE = 50_257, 256, 8
Arm = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(
        "Time and memory of the fused heads and losses.",
        quick="one round, without the plain joint form: under a minute",
    )
    parser.add_argument("--peak-of", choices=ARMS, help="print the peak memory of one arm in kB, and before it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print(*peak(options.peak_of))
        return
    arms = [name for name in ARMS if name != "plain"] if options.quick else list(ARMS)
    figures = {**memory(arms), **times(arms, num_rounds=1 if options.quick else 7)}
    print_figures(figures, as_json=options.json)


def student() -> TinyGPT:
    return TinyGPT(vocabulary=VOCABULARY, context=CONTEXT)


def ta() -> TinyGPT:
    return TinyGPT(num_layers=6, hidden=2048, vocabulary=VOCABULARY, context=CONTEXT)


def alone(model: nn.Module) -> Arm:
    def loss(ids: Tensor) -> Tensor:
        following = functional.pad(ids[:, 1:], (0, 1), value=-100)
        return functional.cross_entropy(model(ids).flatten(0, 1), following.flatten())

    return loss


def joint(*, fused: bool | None) -> Arm:
    cotrain = matta.CoTraining(matta.nest(student(), ta(), layers={"h": "first"}), CausalLM(fused=fused))
    return lambda ids: cotrain((ids, ids)).loss


ARMS: dict[str, Callable[[], Arm]] = {
    "student": lambda: alone(student()),
    "ta": lambda: alone(ta()),
    "plain": lambda: joint(fused=False),
    "fused": lambda: joint(fused=None),
}


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (BATCH_SIZE, CONTEXT), generator=torch.Generator().manual_seed(0))


def peak(name: str) -> tuple[int, int]:
    """The largest resident size of this process in kB after two steps of an arm, and before them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    loss, ids = ARMS[name](), tokens()
    for _ in range(2):
        loss(ids).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, before


def memory(arms: list[str]) -> dict[str, float]:
    """Peak memory of each arm, in GB, and the ratios."""
    peaks, figures = {}, {}
    for name in arms:
        command = [sys.executable, __file__, "--peak-of", name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        most, before = map(int, printed.split())
        peaks[name] = most - before
        figures |= {f"{name}_peak_gb": peaks[name] / 2**20, f"{name}_rss_gb": most / 2**20}
    ratios = {
        "memory_ratio": peaks["fused"] / peaks["ta"],
        "memory_ratio_rss": figures["fused_rss_gb"] / figures["ta_rss_gb"],
    }
    if "plain" in arms:
        ratios["memory_ratio_plain"] = peaks["fused"] / peaks["plain"]
    return {**ratios, **figures}


def times(arms: list[str], *, num_rounds: int) -> dict[str, float]:
    """Seconds of a step of each arm, and the ratios; before them a step on one sequence."""
    torch.manual_seed(0)
    losses = {name: ARMS[name]() for name in arms}
    ids = tokens()
    for loss in losses.values():
        loss(ids[:1]).backward()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(num_rounds):
        for name, loss in losses.items():
            start = time.process_time()
            loss(ids).backward()
            seconds[name].append(time.process_time() - start)
    rounds = [dict(zip(seconds, each, strict=True)) for each in zip(*seconds.values(), strict=True)]
    figures = {
        "time_ratio": statistics.median(each["fused"] / (each["student"] + each["ta"]) for each in rounds),
    }
    if "plain" in arms:
        figures["time_ratio_plain"] = statistics.median(each["fused"] / each["plain"] for each in rounds)
    return figures | {f"{name}_seconds": statistics.median(each) for name, each in seconds.items()}


if __name__ == "__main__":
    main()
