"""The page of a family: one HTML file with its data inside, which loads nothing from elsewhere.

`report_page.html` is the template: its script draws what is in the data, by the rules of `Family`.
"""

from __future__ import annotations

import html
import json
import math
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, final

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from matta.errors import ChoiceError
from matta.nesting.plan import Plan, blocks, kinds
from matta.sizes.storage import whole_file

TEMPLATE: Final = "report_page.html"
MOST_POINTS: Final = 400  # of a curve: more cannot be told apart on a screen
MOST_PIXELS: Final = 96  # on a side of a heat map
ABSENT: Final = "-"  # of a layer that a size does not name

Points = Sequence[tuple[float, float]]


@final
@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Correlations of a layer's channels between 0 and 1, those of the Student first, and the means to name."""

    title: str
    values: Float[Tensor, "channels channels"]
    num_student: int
    means: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """What the page draws: a byte for each pixel, rows of channels averaged where there are too many."""
        side = min(len(self.values), MOST_PIXELS)
        pooled = adaptive_avg_pool2d(self.values.float()[None], side)[0]
        pixels = bytes((pooled.clamp(0, 1) * 255).round().byte().flatten().tolist())
        return {
            "title": self.title,
            "side": side,
            "channels": len(self.values),
            "num_student": self.num_student,
            "pixels": b64encode(pixels).decode(),
            "means": [(name, f"{value:.4f}") for name, value in self.means.items() if math.isfinite(value)],
        }


@final
@dataclass(frozen=True, kw_only=True)
class ReportPage:
    """Everything on a page; what is empty is left out.

    `sizes` are the fields of each `Size`, `curves` lines of points by the title of their picture, and `run` the folder
    that `matta extract` takes a size from.
    """

    title: str
    summary: str
    metric: str
    higher_is_better: bool
    sizes: Sequence[Mapping[str, Any]]
    plan: Plan | None = None
    curves: Mapping[str, Mapping[str, Points]] = field(default_factory=dict)
    heat_maps: Sequence[HeatMap] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""

    def write(self, path: Path) -> Path:
        """Write the page; a reader never sees half of one.

        Raises:
            ChoiceError: there is no size, or the folder does not exist.
        """
        if not self.sizes:
            raise ChoiceError("the family has no sizes; expected at least one to report on: see matta.family")
        if path.is_dir() or not path.parent.is_dir():
            problem = "is a folder" if path.is_dir() else f"is to be in {path.parent}, which is no folder"
            raise ChoiceError(f"{path} {problem}; expected the name of a file in a folder, such as family.html")
        with whole_file(path) as made:
            made.write_text(self.text(), encoding="utf-8")
        return path

    def text(self) -> str:
        """The page as text."""
        data = json.dumps(self.to_json(), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        values = {"title": html.escape(self.title), "summary": html.escape(self.summary), "data": data}
        template = files("matta.choosing").joinpath(TEMPLATE).read_text(encoding="utf-8")
        return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)

    def to_json(self) -> dict[str, Any]:
        """The data that the script draws."""
        layers = list(dict.fromkeys(name for each in self.sizes for name in each["layers"]))
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "layers": layers,
            "sizes": [_size(each, layers) for each in self.sizes],
            "curves": list(_curves(self.curves)),
            "plan": None if self.plan is None else _plan(self.plan),
            "heat_maps": [each.to_json() for each in self.heat_maps],
            "settings": list(_settings(self.settings)),
            "run": self.run,
        }


def _size(values: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """A size with the first letter of each choice in place of the names."""
    if not math.isfinite(values["quality"]):
        raise ChoiceError(f"the quality of {values['name']!r} is {values['quality']}; expected a finite number")
    kept = ("name", "parameters", "bytes", "flops", "activation_bytes", "quality")
    return {
        **{name: _finite(values[name]) for name in kept},
        "choices": "".join(values["layers"].get(name, ABSENT)[0] for name in layers),
        "latencies": [(each["batch_size"], each["median_ms"], each["p95_ms"]) for each in values["latencies"]],
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _curves(curves: Mapping[str, Mapping[str, Points]]) -> Iterator[dict[str, Any]]:
    for title, lines in curves.items():
        found = [{"name": name, **_line(points)} for name, points in lines.items()]
        if kept := [each for each in found if each["points"]]:
            yield {"title": title, "lines": kept}


def _line(points: Points) -> dict[str, Any]:
    """The points of a line; of too many the means of as many at a time as it takes."""
    kept = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    size = max(1, math.ceil(len(kept) / MOST_POINTS))
    groups = [kept[start : start + size] for start in range(0, len(kept), size)]
    means = [(sum(x for x, _ in each) / len(each), sum(y for _, y in each) / len(each)) for each in groups]
    return {"points": [(round(x, 1), float(f"{y:.6g}")) for x, y in means], "mean_of": size}


def _plan(plan: Plan) -> dict[str, Any]:
    return {"rows": kinds(plan), "notes": [f"{plan.num_shared:,} parameters are shared.", *blocks(plan)]}


def _settings(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{path}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{path}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{path}{name}", str(value) or "none"
