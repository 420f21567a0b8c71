"""The table of sizes: what each costs, which are evaluated, and the pick for a budget."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.choosing.family import FILE, Family, Size
from matta.choosing.measuring import Latency, measure_cost, measure_latency, resized
from matta.choosing.searching import front, gain, hypervolume, search
from matta.cli import main
from matta.errors import ChoiceError

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
EXAMPLE = (X, torch.zeros(12))


def tower(*widths: int) -> nn.Sequential:
    sizes = (6, *widths)
    torch.manual_seed(sum(widths))
    hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], 1))


@pytest.fixture(scope="module")
def nested() -> matta.Nested:
    return matta.nest(tower(4, 5, 4), tower(8, 16, 8))


def distance(nested: matta.Nested) -> Any:
    return lambda module: (module(X) - nested.ta(X)).square().mean()


def made(nested: matta.Nested, **arguments: Any) -> Family:
    settings = {"evaluate": distance(nested), "example": EXAMPLE, "progress": False, "calls": 3, **arguments}
    return matta.family(nested, **settings)


def size(name: str, parameters: int, quality: float, latency_ms: float = 1.0) -> Size:
    latencies = (
        Latency(batch_size=1, median_ms=latency_ms, p95_ms=2 * latency_ms),
        Latency(batch_size=8, median_ms=5 * latency_ms, p95_ms=9 * latency_ms),
    )
    costs = {"parameters": parameters, "bytes": 4 * parameters, "flops": 2.0 * parameters, "activation_bytes": 64.0}
    return Size(name=name, layers={"0": "wide"}, latencies=latencies, quality=quality, **costs)


FOUR = Family(
    sizes=(
        size("small", 2**18, 0.4, 1.0),
        size("odd", 2**19, 0.45, 3.0),
        size("middle", 2**20, 0.3, 2.0),
        size("large", 2**21, 0.2, 4.0),
    )
)


# the table


def test_few_layers_are_all_evaluated(nested: matta.Nested) -> None:
    family = made(nested)
    names = matta.layer_names(nested)
    assert family.is_complete and len(family.sizes) == 8
    assert {tuple(each.layers.values()) for each in family.sizes} == {*product(("narrow", "wide"), repeat=3)}
    assert [family.sizes[0].name, family.sizes[-1].name] == ["Student", "TA"]
    assert family.sizes[0].parameters < family.sizes[-1].parameters
    for each in family.sizes:
        module = matta.extract(nested, each.spec).eval()
        assert each.layers.keys() == {*names}
        assert each.parameters == sum(parameter.numel() for parameter in module.parameters())
        assert each.bytes == 4 * each.parameters
        assert each.flops == sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
        assert each.quality == pytest.approx(distance(nested)(module).item())
        assert 0 < each.latency_ms <= each.latencies[0].p95_ms
    assert family.sizes[-1].quality == 0.0


def test_modules_are_evaluated_plain_in_eval_mode_and_once(nested: matta.Nested) -> None:
    seen: list[nn.Module] = []

    def evaluate(module: nn.Module) -> Tensor:
        assert type(module) is nn.Sequential and not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
        seen.append(module)
        return module(X).sum()

    nested.train()
    assert len(made(nested, evaluate=evaluate).sizes) == len(seen) == 8
    assert nested.ta.training


def test_many_layers_are_searched_within_the_evaluations(nested: matta.Nested) -> None:
    calls: list[None] = []

    def evaluate(module: nn.Module) -> float:
        calls.append(None)
        return float(distance(nested)(module))

    family = made(nested, evaluate=evaluate, max_evaluations=5)
    assert len(calls) == len(family.sizes) == 5 and not family.is_complete
    assert {"Student", "TA"} <= {each.name for each in family.sizes}


def test_a_deeper_ta_has_its_student_in_the_table() -> None:
    class Deep(nn.Module):
        def __init__(self, depth: int, width: int) -> None:
            super().__init__()
            torch.manual_seed(depth)
            blocks = (nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6)) for _ in range(depth))
            self.h, self.head = nn.ModuleList(blocks), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.h:
                x = x + block(x)
            return self.head(x)

    nested = matta.nest(Deep(2, 4), Deep(3, 8), layers={"h": "even"})
    family = made(nested)
    student = family.sizes[0]
    assert len(family.sizes) == 9 and student.name == "Student"
    assert student.parameters == sum(each.numel() for each in matta.extract(nested).parameters())
    expected = matta.extract(nested)(X)
    assert torch.equal(matta.extract(nested, student.spec)(X), expected)
    assert "narrow" in {each.name for each in family.sizes}


def test_one_width_through_all_layers_has_two_sizes() -> None:
    class Norm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed, self.norm = nn.Linear(6, width), nn.LayerNorm(width)
            self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
            self.head = nn.Linear(width, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = x + block(self.norm(x))
            return self.head(x)

    family = made(matta.nest(Norm(4), Norm(8)))
    assert [each.name for each in family.sizes] == ["Student", "TA"]


def test_latencies_come_by_batch_size_or_not_at_all(nested: matta.Nested) -> None:
    family = made(nested, batch_sizes=(2, 30), max_evaluations=3)
    assert all([each.batch_size for each in size.latencies] == [2, 30] for size in family.sizes)
    without = made(nested, calls=0, max_evaluations=2)
    assert math.isnan(without.sizes[0].latency_ms)
    assert "–" in str(without)
    with pytest.raises(ChoiceError, match="no latency was measured"):
        without.choose(latency_ms=1)
    with pytest.raises(ChoiceError, match="no latency was measured"):
        without.pareto("latency_ms")
    assert without.choose(quality=0.0).name == "TA"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_evaluations": 1}, "max_evaluations=1"),
        ({"calls": -1}, "calls=-1"),
        ({"batch_sizes": ()}, r"batch_sizes=\(\)"),
        ({"batch_sizes": (0,)}, r"batch_sizes=\(0,\)"),
        ({"batch_sizes": (8,), "calls": 0}, r"received batch_sizes=\(8,\) with calls=0, .*expected calls over 0"),
        ({"evaluate": lambda module: math.nan}, "evaluate gave nan for 'Student'"),
        ({"evaluate": 0.5}, "received float as evaluate; expected a function that takes a module"),
        ({"evaluate": lambda module: module(X)}, r"evaluate gave a tensor of shape \(12, 1\); expected one number"),
        ({"evaluate": lambda module: {"loss": 0.5}}, r"evaluate gave \{'loss': 0.5\}; expected one number"),
        ({"batch_sizes": 8}, r"received int as batch_sizes; expected a tuple, such as \(1, 64\)"),
        ({"threads": 0}, "threads=0; expected"),
        ({"device": "abacus"}, "received device='abacus': .*; expected a device of this machine"),
        ({"nested": tower(4)}, "received Sequential as nested; expected what matta.nest gives"),
        ({"example": ("text", torch.zeros(1))}, "no tensor with a batch axis"),
        ({"example": (X[:0], torch.zeros(0))}, "the example has no rows"),
        (
            {"example": {"input": X, "weight": X}},
            "does not run on the example: TypeError: .*'weight'; expected a batch",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(nested: matta.Nested, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(matta.MattaError, match=message):
        made(**{"nested": nested, **wrong})


def test_a_batch_size_that_the_modules_do_not_take_is_refused_first_and_others_are_timed() -> None:
    class Squeezing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([super().forward(x).squeeze(), x[:, 0]], dim=1)

    def never(module: nn.Module) -> float:
        raise AssertionError

    pair = matta.nest(Squeezing(*tower(4)), Squeezing(*tower(8)))
    refusal = r"batch size 1 fails: .*pass batch_sizes=\(12,\), or calls=0 for no latency"
    with pytest.raises(ChoiceError, match=refusal):
        matta.family(pair, evaluate=never, example=EXAMPLE, progress=False)
    for settings in ({"batch_sizes": (12,)}, {"calls": 0}):
        matta.family(pair, evaluate=lambda module: 1.0, example=EXAMPLE, progress=False, **settings)


def test_without_a_shared_layer_there_is_nothing_to_choose() -> None:
    with pytest.raises(ChoiceError, match="shares no layer"):
        made(matta.nest(tower(4), tower(8), share="none"))


# the pick


def test_the_best_within_a_budget_is_chosen() -> None:
    assert FOUR.choose(latency_ms=2.5).name == "middle"
    assert FOUR.choose(parameters=2**19).name == "small", "the larger one is worse"
    assert FOUR.choose(memory_mb=4.1).name == "middle"
    assert FOUR.choose(flops=1e9, latency_ms=1.0).name == "small"
    assert FOUR.choose(latency_ms=10.0, batch_size=8).name == "middle"
    assert FOUR.choose(latency_ms=100.0).name == "large"


def test_the_cheapest_that_is_good_enough_is_chosen() -> None:
    assert FOUR.choose(quality=0.35).name == "middle"
    assert FOUR.choose(quality=0.35, latency_ms=3).name == "middle"
    accuracy = Family(sizes=tuple(size(f"{q}", int(1e6 * q), q, q) for q in (0.7, 0.8, 0.9)), higher_is_better=True)
    assert accuracy.choose(quality=0.75).name == "0.8"
    assert accuracy.choose(parameters=850_000).name == "0.8"
    assert [each.name for each in accuracy.pareto()] == ["0.7", "0.8", "0.9"]


def test_where_nothing_fits_the_nearest_is_named_and_by_how_much_it_misses() -> None:
    with pytest.raises(ChoiceError, match=r"none of the 4 sizes has latency_ms=0.8; the nearest is 'small': .*\+25.0%"):
        FOUR.choose(latency_ms=0.8)
    with pytest.raises(ChoiceError, match=r"the nearest is 'large': quality 0.2 in place of 0.1 \(\+100.0%\)"):
        FOUR.choose(quality=0.1)
    with pytest.raises(ChoiceError, match=r"the nearest is 'middle': quality 0.3 in place of 0.25 \(\+20.0%\)$"):
        FOUR.choose(quality=0.25, latency_ms=2.0)


def test_a_choice_without_a_budget_is_refused() -> None:
    with pytest.raises(ChoiceError, match="received no budget"):
        FOUR.choose()
    with pytest.raises(ChoiceError, match="batch_size=3 was not measured; expected one of: 1, 8"):
        FOUR.choose(latency_ms=1, batch_size=3)
    with pytest.raises(ChoiceError, match="by='price'; expected one of: parameters"):
        FOUR.pareto(by="price")


@pytest.mark.parametrize(
    "budget",
    [
        {"parameters": -1},
        {"flops": 0},
        {"memory_mb": math.nan},
        {"latency_ms": "2"},
        {"parameters": True},
        {"quality": math.nan},
        {"quality": "good"},
    ],
)
def test_a_budget_that_is_no_number_over_zero_is_refused(budget: dict[str, Any]) -> None:
    (name, value), *_ = budget.items()
    with pytest.raises(ChoiceError, match=f"received {name}={value!r}; expected a"):
        FOUR.choose(**budget)


def test_a_larger_and_worse_size_is_not_taken_for_a_latency_that_is_noise() -> None:
    noisy = Family(sizes=(size("small", 2**18, 0.2, 1.01), size("large", 2**20, 0.3, 1.0)))
    assert noisy.choose(quality=0.4).name == "small"
    assert [each.name for each in noisy.pareto(by="latency_ms")] == ["small"]
    assert noisy.choose(latency_ms=1.0).name == "large", "it has been measured to fit"


def test_a_size_of_fewer_layers_may_be_faster_than_a_smaller_one() -> None:
    deep = replace(size("deep", 2**18, 0.2, 2.0), layers={"0": "narrow", "1": "narrow"})
    shallow = replace(size("shallow", 2**20, 0.3, 1.0), layers={"0": "wide", "1": "skip"})
    both = Family(sizes=(deep, shallow))
    assert both.choose(quality=0.4).name == "shallow"
    assert [each.name for each in both.pareto(by="latency_ms")] == ["shallow", "deep"]


def test_the_front_leaves_out_what_is_dearer_and_no_better() -> None:
    assert [each.name for each in FOUR.pareto()] == ["small", "middle", "large"]
    assert [each.name for each in FOUR.pareto(by="latency_ms")] == ["small", "middle", "large"]


# on disk


def test_a_table_is_kept_beside_the_nesting(nested: matta.Nested, tmp_path: Path) -> None:
    family = made(nested, max_evaluations=4)
    folder = matta.save(nested, tmp_path / "ranker")
    assert family.save(folder) == folder / FILE
    assert Family.load(folder) == Family.load(folder / FILE) == family
    with pytest.raises(ChoiceError, match=r"there is no folder .*matta.save comes first"):
        family.save(tmp_path / "elsewhere")
    loaded = matta.load(folder, tower(4, 5, 4), tower(8, 16, 8))
    assert torch.equal(loaded.ta(X), nested.ta(X)), "the nesting is still whole"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": "other", "version": 1}', '{"format": "matta.family"}'])
def test_a_damaged_table_is_refused(damage: str, tmp_path: Path) -> None:
    FOUR.save(tmp_path)
    (tmp_path / FILE).write_text(damage)
    with pytest.raises(ChoiceError, match="is no family of matta's, or is damaged"):
        Family.load(tmp_path)
    with pytest.raises(ChoiceError, match="there is no family in"):
        Family.load(tmp_path / "elsewhere")


# the command


def test_the_command_prints_the_pick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FOUR.save(tmp_path)
    assert main(["choose", str(tmp_path), "--latency-ms", "2.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["name"] == "middle"
    assert main(["choose", str(tmp_path), "--parameters", "300000"]) == 0
    assert "chosen: small" in capsys.readouterr().out


def test_a_size_is_printed_with_its_costs() -> None:
    told = str(FOUR.choose(parameters=300_000))
    assert told.startswith("small: 262,144 parameters, ") and " ms, quality 0.4" in told


def test_long_names_of_sizes_are_not_wrapped_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "wide: " + ", ".join(f"tower.blocks.{index}" for index in range(4))
    matta.Family(sizes=tuple(replace(each, name=long) for each in FOUR.sizes[:1])).save(tmp_path)
    assert main(["choose", str(tmp_path), "--parameters", "300000"]) == 0
    assert any(line.strip().startswith(f"{long} *") for line in capsys.readouterr().out.splitlines())


def test_the_table_beside_the_best_nesting_of_a_run_is_found(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    FOUR.save(tmp_path / "best")
    assert main(["choose", str(tmp_path), "--parameters", "300000", "--json"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latency-ms", "0.1"], "none of the 4 sizes has latency_ms=0.1"),
        ([], "no budget"),
        (["--parameters", "-3"], "not over zero"),
        (["--quality", "0.1", "--evaluations", "1"], "--evaluations 1; expected at least 2"),
    ],
)
def test_the_command_tells_what_is_wrong_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FOUR.save(tmp_path)
    assert main(["choose", str(tmp_path), *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_a_folder_without_a_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["choose", str(tmp_path), "--parameters", "5"]) == 2
    assert "has no family.json and is no run of matta train" in capsys.readouterr().err


# what is measured


def test_activations_are_those_held_at_once() -> None:
    module = nn.Sequential(nn.Linear(6, 1000), nn.ReLU(), nn.Linear(1000, 10), nn.Linear(10, 1))
    assert measure_cost(module, X).activation_bytes == 2 * 1000 * 4, "the two wide ones, each of four bytes"
    assert measure_cost(nn.Sequential(nn.Linear(6, 100), nn.ReLU(inplace=True)), X).activation_bytes == 100 * 4


def test_inputs_are_resized_row_by_row() -> None:
    inputs = {"x": torch.arange(6).view(3, 2), "flags": (torch.tensor([1, 2, 3]), True), "scale": torch.ones(2)}
    larger = resized(inputs, 7)
    assert larger["x"][:, 0].tolist() == [0, 2, 4, 0, 2, 4, 0] and larger["flags"][0].tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert larger["flags"][1] is True and larger["scale"] is inputs["scale"]
    assert resized(inputs, 1)["x"].tolist() == [[0, 1]]


def test_latency_takes_turns_and_leaves_threads_alone() -> None:
    order: list[int] = []

    class Noted(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def forward(self, x: Tensor) -> Tensor:
            order.append(self.index)
            assert torch.get_num_threads() == 1
            return x

    before = torch.get_num_threads()
    found = measure_latency([Noted(0), Noted(1)], X, calls=4, threads=1)
    assert order == [0, 1] * (len(order) // 2) and len(order) > 8
    assert torch.get_num_threads() == before
    assert all(each.batch_size == 12 and 0 < each.median_ms <= each.p95_ms for each in found)


# the search


def synthetic(num_layers: int, seed: int) -> Any:
    """Losses in which layers add up, and neighbours help or hinder each other a little."""
    random = Random(seed)
    effects = [random.uniform(0.2, 1.0) ** 3 for _ in range(num_layers)]
    together = [random.uniform(-0.1, 0.1) for _ in range(num_layers - 1)]

    def loss(choice: tuple[bool, ...]) -> float:
        alone = sum(effect for effect, wide in zip(effects, choice, strict=True) if wide)
        pairs = sum(each for each, (a, b) in zip(together, pairwise(choice), strict=True) if a and b)
        return math.exp(-0.5 * (alone + pairs))

    return loss


@pytest.mark.parametrize("seed", range(4))
def test_the_front_of_twelve_layers_is_found_in_sixty_evaluations(seed: int) -> None:
    loss, cost = synthetic(12, seed), lambda choice: 100.0 + 10.0 * sum(choice)
    found = search(12, cost, loss, max_evaluations=60)
    assert len(found) == 60
    every = [(cost(each), loss(each)) for each in product((False, True), repeat=12)]
    worst = loss((False,) * 12)
    volume = hypervolume([(cost(each), value) for each, value in found.items()], 220.0, worst)
    assert volume / hypervolume(every, 220.0, worst) > 0.98


def test_a_search_of_many_layers_keeps_its_bound_and_repeats() -> None:
    loss, cost = synthetic(36, 0), lambda choice: float(sum(choice))
    first, second = (search(36, cost, loss, max_evaluations=70) for _ in range(2))
    assert first == second and len(first) == 70
    few = search(36, cost, loss, max_evaluations=5)
    assert len(few) == 5 and {(False,) * 36, (True,) * 36} <= few.keys()


def test_the_gain_of_a_point_is_what_the_hypervolume_grows_by() -> None:
    random = Random(0)
    for _ in range(200):
        points = [(0.0, 1.0), (1.0, random.random() * 0.2), *((random.random(), random.random()) for _ in range(5))]
        cost, loss = random.random(), random.random()
        grown = hypervolume([*points, (cost, loss)], 1.0, 1.0) - hypervolume(points, 1.0, 1.0)
        found = gain(front(points), torch.tensor([cost]), torch.tensor([loss]), 1.0)
        assert found.item() == pytest.approx(grown, abs=1e-6)


class Attends(nn.Module):
    """Attention of 4 heads, and a product by groups: what torch's counter knows no formula for on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(3, 32, 8, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(len(x), -1, 4, 8).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads[:, :2], heads[:, :2], enable_gqa=True)
        rows = mixed.transpose(1, 2).reshape(-1, 32).to(torch.bfloat16)
        ends = torch.tensor([8, 16, len(rows)], dtype=torch.int32)
        return torch.nn.functional.grouped_mm(rows, self.experts, offs=ends).view(len(x), -1)


def test_flops_of_attention_and_of_experts_are_counted() -> None:
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    scores_and_values, by_groups = 2 * 4 * 16 * 16 * (8 + 8), 2 * 16 * 32 * 8
    assert measure_cost(Attends(), x).flops == scores_and_values + by_groups
