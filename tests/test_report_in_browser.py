"""The report page in a real browser: the budget moves the pick by the rule of `Family.choose`, and all can read it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

import matta
from matta.choosing.family import Family, Size
from matta.choosing.measuring import Latency
from matta.choosing.report_page import HeatMap
from matta.errors import ChoiceError

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
HAS_BROWSER = bool(CHROMIUM and DRIVER)

pytestmark = pytest.mark.skipif(
    not HAS_BROWSER and os.environ.get("CI") != "true", reason="no chromium, or no chromedriver"
)

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert HAS_BROWSER, "CI needs chromium and chromedriver; .ci/run installs them"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for each in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open the page of a family; in the end nothing may have been logged as an error."""

    def opened(family: Family, *, width: int = 1200, scheme: str = "light", **arguments: Any) -> Any:
        path = family.report(tmp_path / "family.html", **arguments)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(path.as_uri())
        return browser

    yield opened
    assert [each for each in browser.get_log("browser") if each["level"] == "SEVERE"] == []


def size(name: str, parameters: int, quality: float, latency_ms: float = 1.0, **fields: Any) -> Size:
    latencies = tuple(
        Latency(batch_size=each, median_ms=latency_ms * each, p95_ms=2 * latency_ms * each) for each in (1, 8)
    )
    costs = {"parameters": parameters, "bytes": 4 * parameters, "flops": 2.0 * parameters, "activation_bytes": 64.0}
    return Size(
        **{"name": name, "layers": {"0": "wide"}, "latencies": latencies, "quality": quality, **costs, **fields}
    )


FOUR = Family(
    sizes=(
        size("small", 2**18, 0.4, 1.0, layers={"0": "narrow", "2": "narrow"}),
        size("odd", 2**19, 0.45, 3.0, layers={"0": "narrow", "2": "wide"}),
        size("middle", 2**20, 0.3, 2.0, layers={"0": "wide", "2": "narrow"}),
        size("large", 2**21, 0.2, 4.0, layers={"0": "wide", "2": "wide"}),
    )
)
FULL = {
    "plan": matta.nest(nn.Linear(2, 1), nn.Linear(2, 1)).plan,
    "curves": {
        "loss, nats": {
            name: [(step, 1 / step + i) for step in range(1, 40)] for i, name in enumerate(("student", "ta"))
        }
    },
    "heat_maps": [HeatMap(title=name, values=torch.eye(6), num_student=2, means={"across": 0.1}) for name in "ab"],
    "settings": {"train": {"steps": 10, "teacher": "x" * 200}},
    "run": "runs/my mini",
}


def random_family(count: int, *, higher_is_better: bool = False, latency: bool = True) -> Family:
    """Sizes over four orders of magnitude, with equal qualities among them, and names as long as they get."""
    random = Random(count)
    names = [f"transformer.h.{index}" for index in range(24)]
    sizes = []
    for index in range(count):
        layers = {name: random.choice(("wide", "narrow", "skip")) for name in names}
        parameters = round(10 ** random.uniform(3, 7))
        name = f"{index} wide: {', '.join(each for each, choice in layers.items() if choice == 'wide')}"
        made = size(name, parameters, round(random.random(), 1), random.uniform(0.1, 9), layers=layers)
        sizes.append(made if latency else replace(made, latencies=()))
    return Family(sizes=tuple(sorted(sizes, key=lambda each: each.parameters)), higher_is_better=higher_is_better)


def text(page: Any, name: str) -> str:
    return page.execute_script("return document.getElementById(arguments[0]).textContent", name)


def slide(page: Any, position: float) -> None:
    """Put the slider somewhere between 0 and 1000."""
    page.execute_script(
        "const slider = document.getElementById('budget'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input'))",
        position,
    )


def select(page: Any, name: str, value: str) -> None:
    page.execute_script(
        "const found = document.getElementById(arguments[0]); found.value = arguments[1];"
        "found.dispatchEvent(new Event('change'))",
        name,
        value,
    )


def number(told: str) -> float:
    """A budget in the page's words, such as "at most 1.234M FLOPs"."""
    value = told.split()[2].replace(",", "")
    unit = {"k": 1e3, "M": 1e6, "G": 1e9}.get(value[-1])
    return float(value) if unit is None else round(float(value[:-1]) * unit, 3)


PICKS = """
const slider = document.getElementById("budget"), told = id => document.getElementById(id).textContent;
return arguments[0].map(position => {
  slider.value = position;
  slider.dispatchEvent(new Event("input"));
  return ["budget-text", "status", "pick"].map(told);
});
"""
ON_FRONT = """
return [...document.querySelectorAll("#sizes tbody tr")].filter(row => row.querySelector(".yes"))
  .map(row => row.querySelector("th").textContent)
"""


# the pick


def test_the_slider_moves_the_pick_and_the_code(opened: Open) -> None:
    page = opened(FOUR, run="runs/my mini")
    picks = []
    for position in (0, 300, 500, 1000):
        slide(page, position)
        picks.append(text(page, "pick"))
    assert picks == ["small", "small", "middle", "large"]
    assert text(page, "python-code") == 'matta.extract(nested, matta.SubModel({}, default="wide"))'
    assert text(page, "command-code") == "matta extract 'runs/my mini' 0=wide,2=wide --out DIR"
    assert text(page, "status") == "The best of 4 that fit:"
    assert text(page, "budget-text") == "at most 4 ms"
    slide(page, 0)
    assert text(page, "status") == "None of the 4 fits. The nearest is 9.9% over:"
    assert page.execute_script("return document.querySelector('tr.picked th').textContent") == "small"
    assert page.execute_script("return document.querySelector('[aria-live] #pick') !== null")


def test_the_slider_obeys_the_keyboard(opened: Open) -> None:
    page = opened(FOUR)
    slider = page.find_element("id", "budget")
    slider.send_keys(Keys.END)
    assert text(page, "pick") == "large"
    slider.send_keys(Keys.HOME)
    assert text(page, "pick") == "small" and slider.get_attribute("aria-valuetext") == "at most 0.91 ms"


@pytest.mark.parametrize(("count", "higher_is_better"), [(1, False), (64, True), (300, False)])
def test_the_pick_is_that_of_choose(count: int, higher_is_better: bool, opened: Open) -> None:
    family = random_family(count, higher_is_better=higher_is_better)
    page = opened(family, width=700)
    for cost, batch in (("latency_ms", 1), ("latency_ms", 8), ("memory_mb", 8), ("parameters", 1), ("flops", 1)):
        select(page, "cost", cost)
        select(page, "batch", str(batch))
        for told, status, pick in page.execute_script(PICKS, [0, 10, 250, 600, 990, 1000]):
            chosen = choice(family, {cost: number(told)}, batch)
            if status.startswith("The best of"):
                assert chosen == pick
            else:
                assert status.startswith(f"None of the {count} fits") and f"the nearest is {pick!r}" in chosen
        ordered = replace(family, sizes=tuple(each.of_batch(batch) for each in family.sizes))
        assert set(page.execute_script(ON_FRONT)) == {each.name for each in ordered.pareto(cost)}


def choice(family: Family, budget: dict[str, Any], batch_size: int) -> str:
    """The name of what is chosen, or why nothing is."""
    try:
        return family.choose(batch_size=batch_size, **budget).name
    except ChoiceError as error:
        return str(error)


def test_the_code_extracts_the_pick(opened: Open) -> None:
    def tower(*widths: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, widths[0]), nn.ReLU(), nn.Linear(*widths), nn.ReLU(), nn.Linear(widths[1], 1))

    nested = matta.nest(tower(4, 5), tower(8, 9))
    sizes = []
    for index, choices in enumerate(product(("narrow", "wide"), repeat=2)):
        layers = dict(zip(matta.layer_names(nested), choices, strict=True))
        sizes.append(size(f"number {index}", 100 + index, -index, layers=layers, latencies=()))
    family = Family(sizes=tuple(sizes))
    page = opened(family, plan=nested.plan)
    assert page.find_element("id", "cost").get_attribute("value") == "parameters"
    for each in family.sizes:
        select(page, "cost", "parameters")
        page.execute_script(
            "[...document.querySelectorAll('.point')].find(each => each.ariaLabel.startsWith(arguments[0] + ','))"
            ".dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}))",
            each.name,
        )
        extracted = eval(text(page, "python-code"), {"matta": matta, "nested": nested})
        expected = matta.extract(nested, each.spec)
        for name, value in expected.state_dict().items():
            assert torch.equal(extracted.state_dict()[name], value)


# pictures and tables


def test_points_have_a_tooltip_for_mouse_and_keyboard(opened: Open) -> None:
    page = opened(FOUR)
    tip = page.find_element("css selector", "#picture .tip")
    assert not tip.is_displayed()
    ActionChains(page, duration=0).move_to_element(page.find_elements("css selector", ".on-front circle")[1]).perform()
    assert tip.is_displayed() and tip.text.split("\n") == ["middle", "Latency 2 ms", "quality 0.3", "on the front"]
    ActionChains(page, duration=0).move_to_element(page.find_element("tag name", "h1")).perform()
    assert not tip.is_displayed()
    page.find_element("id", "cost").send_keys(Keys.SHIFT, Keys.TAB)
    assert tip.is_displayed() and tip.text.startswith("small")
    ActionChains(page).send_keys(Keys.END).perform()
    assert tip.text.startswith("large")
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert text(page, "pick") == "large"
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not tip.is_displayed()


def test_the_table_is_sorted_by_any_column(opened: Open) -> None:
    page = opened(FOUR)
    names = "return [...document.querySelectorAll('#sizes tbody th')].map(each => each.textContent)"
    assert page.execute_script(names) == ["small", "odd", "middle", "large"]
    for key, expected in {
        "quality": ["large", "middle", "small", "odd"],
        "name": ["large", "middle", "odd", "small"],
        "latency_ms": ["small", "middle", "odd", "large"],
        "front": ["small", "middle", "large", "odd"],
    }.items():
        head = page.find_element("css selector", f"#sizes th[data-key={key}]")
        head.find_element("tag name", "button").click()
        assert page.execute_script(names) == expected and head.get_attribute("aria-sort") == "ascending"
    head.find_element("tag name", "button").click()
    assert page.execute_script(names)[0] == "odd" and head.get_attribute("aria-sort") == "descending"
    sorted_by = page.find_elements("css selector", "#sizes thead th:not([aria-sort=none])")
    assert [each.get_attribute("data-key") for each in sorted_by] == ["front"]


def test_the_other_sections_are_drawn_or_left_out(opened: Open) -> None:
    page = opened(FOUR, **FULL)
    assert [each.text for each in page.find_elements("tag name", "h2")] == [
        *("Choose a size", "Load it", "All sizes", "Training", "Where the Student lives in the TA"),
        *("Preconditioner", "Settings"),
    ]
    figure = page.find_element("css selector", ".curve")
    ActionChains(page, duration=0).move_to_element(figure).perform()
    tip = figure.find_element("css selector", ".tip").text.split("\n")
    assert tip == ["step 19", "student 0.052632", "ta 1.0526"]
    pixel = "return [...document.querySelector('canvas').getContext('2d').getImageData(arguments[0], 0, 1, 1).data]"
    assert page.execute_script(pixel, 0) == [252, 253, 191, 255] and page.execute_script(pixel, 1) == [0, 0, 4, 255]
    page = opened(replace(FOUR, sizes=FOUR.sizes[:1]))
    assert [each.text for each in page.find_elements("tag name", "h2")] == ["Choose a size", "Load it", "All sizes"]
    assert page.find_elements("css selector", "[data-needs]") == []


def test_the_code_is_copied(opened: Open) -> None:
    page = opened(FOUR)
    button = page.find_element("css selector", "#load button")
    button.click()
    ends = time.monotonic() + 2
    while button.text == "Copy" and time.monotonic() < ends:
        time.sleep(0.02)
    assert button.text in ("Copied", "Press Ctrl+C")


def test_names_are_no_html(opened: Open) -> None:
    name = "</script><img src=x onerror=\"document.title='wrong'\"> & 'it'"
    wrong = size(name, 10, 0.5, layers={name: "wide"})
    arguments = {
        "title": name,
        "metric": name,
        "settings": {name: name},
        "run": name,
        "curves": {name: {name: [(1, 2)]}},
    }
    page = opened(Family(sizes=(wrong, *FOUR.sizes)), **arguments)
    slide(page, 0)
    assert page.title == text(page, "pick") == page.find_element("tag name", "h1").text == name
    assert page.find_elements("tag name", "img") == []
    assert eval(text(page, "python-code").removeprefix("matta.extract(nested, ")[:-1], {"matta": matta})


# reading it


CONTRAST = """
const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
  .getContext("2d", {willReadFrequently: true});
const rgb = (colour, below) => {
  canvas.fillStyle = `rgb(${below})`; canvas.fillRect(0, 0, 1, 1);
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = colour => colour.map(each => each / 255).map(each => each <= .04045 ? each / 12.92
  : ((each + .055) / 1.055) ** 2.4).reduce((sum, each, i) => sum + each * [.2126, .7152, .0722][i], 0);
const behind = node => node ? rgb(getComputedStyle(node).backgroundColor, behind(node.parentElement)) : [255, 255, 255];
const found = [];
for (const node of document.querySelectorAll("main *")) {
  const isText = [...node.childNodes].some(each => each.nodeType === 3 && each.data.trim());
  if (!isText || !node.getClientRects().length || node.tagName === "OPTION") continue;
  const style = getComputedStyle(node), ground = behind(node);
  const colour = node.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const [high, low] = [light(rgb(colour, ground)), light(ground)].sort((a, b) => b - a);
  found.push([(high + .05) / (low + .05), node.tagName + "." + node.className + " " + node.textContent.slice(0, 30)]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_either_scheme(scheme: str, opened: Open) -> None:
    page = opened(FOUR, scheme=scheme, **FULL)
    page.execute_script("document.querySelector('.point.on-front').focus()")
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    found = page.execute_script(CONTRAST)
    assert len(found) > 80
    assert [each for each in found if each[0] < 4.5] == []


@pytest.mark.parametrize(
    "family", [FOUR, random_family(64), random_family(1, latency=False)], ids=["four", "64", "one"]
)
def test_nothing_is_wider_than_a_phone(family: Family, opened: Open) -> None:
    page = opened(family, width=400, **FULL)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 400
    assert page.execute_script("return document.querySelector('#sizes').closest('.scroll').clientWidth") <= 400


def test_moving_the_slider_moves_nothing_else(opened: Open) -> None:
    page = opened(random_family(64), width=400, **FULL)
    height = "return document.documentElement.scrollHeight"
    heights = set()
    for position in range(0, 1001, 200):
        slide(page, position)
        heights.add(page.execute_script(height))
    assert len(heights) == 1


def test_every_control_has_a_name(opened: Open) -> None:
    page = opened(FOUR, **FULL)
    nodes = page.find_elements("css selector", "select, input, button, [tabindex='0']")
    assert len(nodes) > 10
    assert [each.tag_name for each in nodes if each.tag_name != "pre" and not each.accessible_name] == []


def test_axes_are_logarithmic_over_a_wide_range_alone(opened: Open) -> None:
    page = opened(random_family(64, latency=False))
    assert page.find_elements("css selector", "#picture .label")[1].get_attribute("textContent") == "parameters, log"
    page = opened(FOUR)
    assert [each.text for each in page.find_elements("css selector", "#picture .label")] == [
        "quality (lower is better)",
        "latency of a batch, ms",
    ]
