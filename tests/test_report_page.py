"""The report page: what is in its data, how it is shown as text, and the command that writes it."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import matta
from matta.choosing.family import Family, Size
from matta.choosing.measuring import Latency
from matta.choosing.report_page import MOST_PIXELS, MOST_POINTS, HeatMap
from matta.cli import main
from matta.errors import ChoiceError

LAYERS = ("first", "second")
CHOICES = {"w": "wide", "n": "narrow", "s": "skip"}


def size(name: str, parameters: int, quality: float, *, choices: str = "wn", batches: tuple[int, ...] = (1, 8)) -> Size:
    latencies = tuple(Latency(batch_size=each, median_ms=0.5 * each, p95_ms=float(each)) for each in batches)
    return Size(
        name=name,
        layers=dict(zip(LAYERS, (CHOICES[each] for each in choices), strict=True)),
        parameters=parameters,
        bytes=4 * parameters,
        flops=2.0 * parameters,
        activation_bytes=64.0,
        latencies=latencies,
        quality=quality,
    )


TWO = Family(sizes=(size("small", 100, 0.4, choices="nn"), size("large", 300, 0.2, choices="ws")), threads=2)


def page(family: Family, path: Path, **arguments: Any) -> tuple[str, dict[str, Any]]:
    """The text of a page, and its data."""
    text = family.report(path / "family.html", **arguments).read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return text, json.loads(found[0])


# what a page holds


def test_a_page_has_each_size_with_its_costs_and_the_first_letters_of_its_choices(tmp_path: Path) -> None:
    text, data = page(TWO, tmp_path, title="Ranker", metric="log loss")
    assert data["layers"] == [*LAYERS]
    assert [each["choices"] for each in data["sizes"]] == ["nn", "ws"]
    assert data["sizes"][1] == {
        "name": "large",
        "parameters": 300,
        "bytes": 1200,
        "flops": 600.0,
        "activation_bytes": 64.0,
        "quality": 0.2,
        "choices": "ws",
        "latencies": [[1, 0.5, 1.0], [8, 4.0, 8.0]],
    }
    assert "<title>Ranker</title>" in text and "<h1>Ranker</h1>" in text
    told = "2 sizes of 100 to 300 parameters, judged by log loss (lower is better). Latencies were measured on cpu, 2"
    assert told in text
    assert data["plan"] is None and data["run"] == ""
    assert data["curves"] == data["heat_maps"] == data["settings"] == []


def test_the_summary_is_of_the_family(tmp_path: Path) -> None:
    one = Family(sizes=(size("only", 100, 0.4, batches=()),), higher_is_better=True, is_complete=False)
    text, data = page(one, tmp_path)
    told = "1 size of 100 parameters, judged by quality (higher is better). Not every choice of layers was evaluated"
    assert told in text and "Latencies" not in text.split("</header>")[0]
    assert data["higher_is_better"] is True and data["sizes"][0]["latencies"] == []


def test_a_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    text, _ = page(TWO, tmp_path)
    assert "default-src 'none'" in text, "the browser is told to refuse it too"
    assert re.findall(r"""(?:src|href)=["'](?!data:)|@import|url\(|\beval\(|\bfetch\(|XMLHttpRequest""", text) == []
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert '<html lang="en">' in text


WRONG = "</script><img src=x onerror=alert(1)><!-- {{data}} \u2028 \"quoted\" 'single' & more"


def test_names_are_shown_as_text(tmp_path: Path) -> None:
    family = replace(TWO, sizes=(size(WRONG, 10, 0.1),))
    arguments = {"settings": {WRONG: {"inner": WRONG}}, "curves": {WRONG: {WRONG: [(1, 2.0)]}}, "metric": WRONG}
    text, data = page(family, tmp_path, title=WRONG, run=WRONG, **arguments)
    assert data["sizes"][0]["name"] == data["run"] == data["metric"] == data["curves"][0]["title"] == WRONG
    assert data["settings"] == [[f"{WRONG}.inner", WRONG]]
    assert "<img" not in text and text.count("</script>") == 2
    assert "<h1>&lt;/script&gt;&lt;img src=x" in text and text.count("{{data}}") > 1, "nothing is put in twice"


def test_the_plan_is_that_of_the_nesting(tmp_path: Path) -> None:
    class Deep(nn.Module):
        def __init__(self, depth: int, width: int) -> None:
            super().__init__()
            self.h = nn.ModuleList(nn.Sequential(nn.Linear(6, width), nn.Linear(width, 6)) for _ in range(depth))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.h:
                x = x + block(x)
            return x

    nested = matta.nest(Deep(2, 4), Deep(3, 8), layers={"h": "ends"})
    _, data = page(TWO, tmp_path, plan=nested.plan)
    assert data["plan"]["rows"][0] == ["h.*.*.weight", "4x6", "h.*.*.weight[:4, :]", 2]
    assert data["plan"]["notes"] == ["116 parameters are shared.", "h: 2 blocks in the TA's 3: [0, 2]"]
    assert sum(row[3] for row in data["plan"]["rows"]) == len(nested.plan.placements)


def test_curves_are_thinned_by_means_and_lose_what_is_not_finite(tmp_path: Path) -> None:
    many = [(step, float(step)) for step in range(1, 4 * MOST_POINTS + 1)]
    curves = {"loss": {"many": many, "few": [(1, 0.5), (2, math.nan)]}, "none": {"empty": [(1, math.inf)]}}
    _, data = page(TWO, tmp_path, curves=curves)
    (drawn,) = data["curves"]
    assert [each["name"] for each in drawn["lines"]] == ["many", "few"]
    assert drawn["lines"][0]["mean_of"] == 4 and len(drawn["lines"][0]["points"]) == MOST_POINTS
    assert drawn["lines"][0]["points"][:2] == [[2.5, 2.5], [6.5, 6.5]]
    assert drawn["lines"][1] == {"name": "few", "points": [[1.0, 0.5]], "mean_of": 1}


def test_a_heat_map_is_a_byte_for_each_pixel(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    means = {"across": 0.5, "within": math.nan}
    maps = [
        HeatMap(title="small", values=values, num_student=1, means=means),
        HeatMap(title="large", values=torch.eye(3 * MOST_PIXELS), num_student=4, means={}),
    ]
    _, data = page(TWO, tmp_path, heat_maps=maps)
    small, large = data["heat_maps"]
    assert [*base64.b64decode(small["pixels"])] == [255, 128, 128, 255]
    assert small["means"] == [["across", "0.5000"]]
    assert large["side"] == MOST_PIXELS and large["channels"] == 3 * MOST_PIXELS
    assert len(base64.b64decode(large["pixels"])) == MOST_PIXELS**2


def test_settings_are_flat_and_in_words(tmp_path: Path) -> None:
    _, data = page(TWO, tmp_path, settings={"train": {"betas": (0.9, 0.95), "teacher": ""}, "family": {"k": []}})
    assert data["settings"] == [["train.betas", "0.9, 0.95"], ["train.teacher", "none"], ["family.k", "none"]]


@pytest.mark.parametrize("count", [1, 64, 300])
def test_a_page_stays_small(count: int, tmp_path: Path) -> None:
    layers = {f"transformer.h.{index}": "wide" for index in range(36)}
    name = "wide: " + ", ".join(layers)
    sizes = [replace(size(f"{name} {index}", 10**6 + index, 1.0 + index), layers=layers) for index in range(count)]
    text, data = page(Family(sizes=tuple(sizes)), tmp_path)
    assert len(data["sizes"]) == count
    assert len(text) < 45_000 + count * 1_000


def test_a_family_of_a_nesting_is_reported(tmp_path: Path) -> None:
    def tower(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))

    nested = matta.nest(tower(4), tower(8))
    example = torch.zeros(4, 3), torch.zeros(4)
    found = matta.family(nested, evaluate=lambda module: 0.0, example=example, calls=2, progress=False)
    text, data = page(found, tmp_path, plan=nested.plan)
    assert [(each["name"], each["parameters"]) for each in data["sizes"]] == [("Student", 21), ("TA", 41)]
    assert "2 sizes of 21 to 41 parameters" in text


# what is refused


def test_a_page_without_a_folder_or_a_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ChoiceError, match=r"elsewhere/family.html is to be in .*elsewhere, which is no folder; expected"
    ):
        TWO.report(tmp_path / "elsewhere" / "family.html")
    with pytest.raises(ChoiceError, match="is a folder; expected the name of a file"):
        TWO.report(tmp_path)
    with pytest.raises(ChoiceError, match="the family has no sizes; expected at least one"):
        Family(sizes=()).report(tmp_path / "family.html")
    with pytest.raises(ChoiceError, match="the quality of 'odd' is nan; expected a finite number"):
        Family(sizes=(size("odd", 1, math.nan),)).report(tmp_path / "family.html")
    assert not any(tmp_path.iterdir())


def test_an_earlier_page_is_replaced(tmp_path: Path) -> None:
    page(TWO, tmp_path, title="before")
    text, _ = page(TWO, tmp_path, title="after")
    assert "<h1>after</h1>" in text
    assert [each.name for each in tmp_path.iterdir()] == ["family.html"]


# the command


def trained(folder: Path) -> None:
    """A run of matta.fit with Shampoo, and a table of its sizes."""

    def tower(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    torch.manual_seed(0)
    batches = [(torch.randn(16, 5), torch.rand(16)) for _ in range(6)]
    nested = matta.nest(tower(4), tower(10))
    optimizer = matta.Shampoo(nested, lr=0.01, graft="adagrad", statistics_every=1)
    cotrain = matta.CoTraining(nested, matta.objectives.Binary())
    matta.fit(cotrain, batches, optimizer, run=folder, log_every=2, progress=False)
    TWO.save(folder)


def test_the_command_reports_what_a_run_of_fit_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "ranker"
    trained(run)
    assert main(["report", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    path = run / "report.html"
    assert told["report"] == str(path) and told["bytes"] == path.stat().st_size
    assert told["sizes"] == 2 and told["front"] == ["small", "large"]
    data = json.loads(re.findall(r'id="data">(.*?)</script>', path.read_text())[0])
    (losses,) = data["curves"]
    assert losses["title"] == "loss, nats"
    assert [each["name"] for each in losses["lines"]] == ["student", "ta", "distill"]
    assert [step for step, _ in losses["lines"][0]["points"]] == [2, 4, 6]
    assert [row[0] for row in data["plan"]["rows"]][:2] == ["0.weight", "0.bias"]
    assert len(data["heat_maps"]) == told["heat_maps"] == 4
    assert data["heat_maps"][0]["title"] == "0.weight, output channels"
    assert data["heat_maps"][0]["channels"] == 10 and data["heat_maps"][0]["num_student"] == 4
    assert data["run"] == "" and data["settings"] == []
    assert "<h1>Family of sizes: ranker</h1>" in path.read_text()


def test_the_command_reports_a_table_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TWO.save(tmp_path)
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "family.json"), "--out", str(out)]) == 0
    assert f"{out} (2 sizes)" in capsys.readouterr().out and out.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluations", "1"], "--evaluations 1; expected at least 2"),
        (["--out", "elsewhere/page.html"], "is to be in elsewhere, which is no folder"),
    ],
)
def test_the_command_tells_what_is_wrong_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TWO.save(tmp_path)
    assert main(["report", str(tmp_path), *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_a_folder_without_a_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "has no family.json and is no run of matta train" in capsys.readouterr().err
