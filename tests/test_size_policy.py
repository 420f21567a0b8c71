from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest

from matta.errors import ServeError
from matta.serving.size_policy import BatchTime, FittedTime, SizePolicy

TIMES = {"Student": BatchTime(0.002, 8e-6), "half": BatchTime(0.002, 4.5e-5), "TA": BatchTime(0.002, 3.6e-4)}
ROWS, TARGET_S = 32, 0.15
TA_RATE = 1 / (ROWS * TIMES["TA"].row_s)  # requests in a second that the TA can take


def simulate(rate: Callable[[float], float], seconds: float, slowness: float = 1.0) -> list[tuple[float, float, str]]:
    """Requests at random times through a queue under the policy: arrival, seconds to the answer, size."""
    random, policy = Random(0), SizePolicy(TIMES, TARGET_S, max_rows=256)
    arrivals, time = [], 0.0
    while (time := time + random.expovariate(rate(time))) < seconds:
        arrivals.append(time)
    answered, waiting, index, now = [], [], 0, 0.0
    while index < len(arrivals) or waiting:
        if not waiting:
            now = max(now, arrivals[index])
        while index < len(arrivals) and arrivals[index] <= now:
            policy.arrived(ROWS, arrivals[index])
            waiting.append(arrivals[index])
            index += 1
        size = policy.pick(ROWS * len(waiting), now - waiting[0], now)
        count = max(1, policy.rows_of(size, now) // ROWS)
        batch, waiting = waiting[:count], waiting[count:]
        took = slowness * TIMES[size].seconds(ROWS * len(batch)) * random.lognormvariate(0, 0.1)
        now += took
        policy.ran(size, ROWS * len(batch), took, now)
        answered += [(each, now - each, size) for each in batch]
    return answered


def p99(answered: list[tuple[float, float, str]]) -> float:
    return sorted(seconds for _, seconds, _ in answered)[int(0.99 * len(answered))]


@pytest.mark.parametrize("slowness", [1.0, 2.0])
def test_a_spike_of_four_times_the_tas_load_stays_within_the_target(slowness: float) -> None:
    answered = simulate(lambda time: TA_RATE * (4.0 if 5 <= time < 25 else 0.25), 35.0, slowness)
    assert p99(answered) <= TARGET_S
    spike = Counter(size for at, _, size in answered if 6 <= at < 25)
    assert spike["TA"] < 0.02 * spike.total()
    after = Counter(size for at, _, size in answered if at >= 30)
    assert after["TA"] > 0.5 * after.total()


def test_the_best_size_that_the_load_allows_answers_most() -> None:
    sizes = Counter(size for at, _, size in simulate(lambda _: 3 * TA_RATE, 15.0) if at >= 2)
    assert sizes["half"] > 0.9 * sizes.total()


def test_a_light_load_is_the_tas() -> None:
    assert {size for _, _, size in simulate(lambda _: 0.3 * TA_RATE, 10.0)} == {"TA"}


def test_sizes_do_not_flicker() -> None:
    answered = simulate(lambda _: 0.9 * TA_RATE, 20.0)
    changes = sum(left[2] != right[2] for left, right in pairwise(answered))
    assert changes <= 2 * 20  # at most down and up in a second


def test_a_batch_takes_at_most_half_of_the_target() -> None:
    policy = SizePolicy({"TA": BatchTime(0.01, 0.001)}, 0.1, max_rows=64)
    assert policy.rows_of("TA", 0.0) == 40


def test_times_follow_batches_and_return_to_those_of_the_start() -> None:
    start = BatchTime(0.001, 1e-4)
    fitted = FittedTime(start, 100)
    assert fitted.at(0.0).seconds(50) == pytest.approx(start.seconds(50))
    for step in range(200):
        fitted.learn(10 + step % 90, 0.003 + 2e-4 * (10 + step % 90), 0.01 * step)
    assert fitted.at(2.0).seconds(50) == pytest.approx(0.013, rel=0.02)
    assert fitted.at(1000.0).seconds(50) == pytest.approx(start.seconds(50), rel=0.01)


@pytest.mark.parametrize(("sizes", "target_s", "rows"), [({}, 0.1, 1), (TIMES, 0.0, 1), (TIMES, 0.1, 0)])
def test_settings_that_cannot_work_are_refused(sizes: dict[str, BatchTime], target_s: float, rows: int) -> None:
    with pytest.raises(ServeError, match="expected over 0"):
        SizePolicy(sizes, target_s, max_rows=rows)
