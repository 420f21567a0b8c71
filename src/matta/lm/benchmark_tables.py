"""What `matta evaluate` shows: one table in the layout of the paper's Table 2, with the paper's rows beside it.

The tables are made from what results.json holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from matta.lm.bits_per_byte import unknown_note
from matta.lm.judging import BENCHMARKS
from matta.training.reporting import markdown_table

if TYPE_CHECKING:
    from rich.table import Table

# Zero-shot accuracy in percent (Table 2), in the order of its columns.
PAPER_COLUMNS: Final = ("lambada", "arc_easy", "arc_challenge", "sat_math", "hellaswag", "boolq")
PAPER: Final[Mapping[str, tuple[float, ...]]] = {
    "paper: GPT-2 Medium": (27.56, 42.84, 23.72, 31.81, 31.61, 59.51),
    "paper: MatTA, no Shampoo": (30.50, 43.27, 24.15, 39.54, 32.24, 60.00),
    "paper: MatTA, Shampoo": (32.30, 42.34, 22.78, 53.63, 32.08, 61.34),
    "paper: its TA": (31.73, 43.73, 23.46, 60.45, 34.87, 60.00),
}
PAPER_NOTE: Final = (
    "The paper's rows are its Table 2: GPT-2 Medium (355M parameters in the Student) trained on 100B tokens of C4, "
    "scored by other code: no yardstick for models of another size, or trained on other data. Whether the paper gives "
    "acc or acc_norm is not known here; its figures stand under acc."
)
ERROR_NOTE: Final = "± is one standard error, over the items of a benchmark or the parts of the text."
_NONE: Final = "–"


class Rows(NamedTuple):
    """A table: a title, its columns with what stands below their heads, and the cells."""

    title: str
    columns: list[tuple[str, str]]
    cells: list[list[str]]


def tables(results: Mapping[str, Any]) -> list[Rows]:
    """The tables of an evaluation: Table 2, further figures, and changes against the baseline if there is one."""
    found = [_main(results)]
    if any(score["others"] for model in results["models"] for score in model["scores"].values()) or _has_text(results):
        found.append(_others(results))
    if results.get("changes"):
        found.append(_changes(results))
    return found


def notes(results: Mapping[str, Any]) -> list[str]:
    """What has to be known to read the tables."""
    found = [ERROR_NOTE]
    if results["benchmarks"]:
        found.append(PAPER_NOTE)
    for model in results["models"]:
        unfit = {name: score["num_unfit"] for name, score in model["scores"].items() if score["num_unfit"]}
        found += [
            f"{name} stays empty for {model['name']}: {num} of its answers are longer than the {model['context']} "
            f"tokens that this model reads, so that lm-eval cannot score them."
            for name, num in unfit.items()
        ]
    cuts: dict[str, list[str]] = {}
    for model in results["models"]:
        scores = {name: score for name, score in model["scores"].items() if score["num_cut"]}
        parts = ", ".join(f"{each['num_cut']} of {each['num_items']} items of {name}" for name, each in scores.items())
        if parts:
            cuts.setdefault(f"{model['context']} tokens: too few for the prompts of {parts}", []).append(model["name"])
    found += [f"{', '.join(names)} read {cut}; their beginnings were left out." for cut, names in cuts.items()]
    if _has_text(results):
        found.append(_text_note([model["text"] for model in results["models"]]))
    for model in results["models"]:
        text = model["text"]
        if text and (told := unknown_note(text["num_unknown"], text["num_tokens"])) is not None:
            found.append(f"{model['name']}: {told}.")
    return found


def _text_note(texts: Sequence[Mapping[str, Any]]) -> str:
    """How much text was read, and in what portions."""
    contexts = sorted({text["context"] for text in texts})
    note = f"The held-out text has {texts[0]['num_bytes']:,} bytes in UTF-8, read {contexts[-1]:,} tokens at a time"
    if len(contexts) == 1:
        return f"{note}."
    return f"{note} at most, {contexts[0]:,} by the model of the shortest context: --context {contexts[0]} is fairer."


def markdown(results: Mapping[str, Any]) -> str:
    """All tables and notes in markdown."""
    parts = [
        f"**{rows.title}**\n\n"
        + markdown_table([f"{head} ({below})" if below else head for head, below in rows.columns], rows.cells)
        for rows in tables(results)
    ]
    return "\n\n".join([*parts, *notes(results)]) + "\n"


def rich_tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables for the terminal."""
    return [_rich(rows) for rows in tables(results)]


def _rich(rows: Rows) -> Table:
    """A table for the terminal, with standard errors below their figures, since it is wide."""
    from rich import box
    from rich.table import Table

    table = Table(title=rows.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, (head, below) in enumerate(rows.columns):
        table.add_column(f"{head}\n{below}", justify="left" if index == 0 else "right")
    for cells in rows.cells:
        table.add_row(*(cell.replace(" ± ", "\n±") for cell in cells))
    return table


def with_error(value: float | None, error: float | None, digits: int, *, sign: str = "") -> str:
    """A figure with its standard error.

    Example:
        >>> with_error(31.613, 0.4641, 2), with_error(0.5, None, 1, sign="+"), with_error(None, None, 1)
        ('31.61 ± 0.46', '+0.5', '–')
    """
    if value is None:
        return _NONE
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _main(results: Mapping[str, Any]) -> Rows:
    shown, models = results["benchmarks"], results["models"]
    columns = [("model", ""), ("size", ""), *((each["title"], each["metric"]) for each in shown)]
    cells = [
        [_marked(model["name"], results), _size(model["parameters"])]
        + [_percent(model["scores"][each["name"]]) for each in shown]
        for model in models
    ]
    if shown:
        chance = {benchmark.name: benchmark.chance for benchmark in BENCHMARKS}
        cells.append(["guessing", _NONE, *(_percent({"value": chance[each["name"]]}) for each in shown)])
        for title, figures in PAPER.items():
            paper = dict(zip(PAPER_COLUMNS, figures, strict=True))
            cells.append([title, _NONE, *(f"{paper[each['name']]:.2f}" for each in shown)])
    if _has_text(results):
        columns.append(("bits", "per byte"))
        bits = [with_error(model["text"]["bits_per_byte"], model["text"]["standard_error"], 4) for model in models]
        cells = [[*row, each] for row, each in zip(cells, bits + [_NONE] * (len(cells) - len(bits)), strict=True)]
    return Rows("Zero-shot benchmarks, in percent" if shown else "Held-out text", columns, cells)


def _others(results: Mapping[str, Any]) -> Rows:
    """What Table 2 has no column for."""
    columns = [("model", "")]
    cells = [[model["name"]] for model in results["models"]]
    for each in results["benchmarks"]:
        of_models = [model["scores"][each["name"]]["others"] for model in results["models"]]
        for index, other in enumerate(of_models[0]):
            columns.append((each["title"], other["metric"].replace("inclusion_", "by ")))
            for row, others in zip(cells, of_models, strict=True):
                row.append(_percent(others[index]) if others[index]["is_share"] else _number(others[index]["value"]))
    if _has_text(results):
        columns.append(("perplexity", "of a token"))
        for row, model in zip(cells, results["models"], strict=True):
            row.append(_number(model["text"]["perplexity"]))
    return Rows("Further figures", columns, cells)


def _changes(results: Mapping[str, Any]) -> Rows:
    shown = results["benchmarks"]
    columns = [("model", ""), *((each["title"], each["metric"]) for each in shown)]
    cells = [
        [name, *(_percent(changes["scores"][each["name"]], sign="+") for each in shown)]
        for name, changes in results["changes"].items()
    ]
    if _has_text(results):
        columns.append(("bits", "per byte"))
        for row, changes in zip(cells, results["changes"].values(), strict=True):
            row.append(with_error(changes["text"]["value"], changes["text"]["standard_error"], 4, sign="+"))
    return Rows(f"Change against {results['baseline']}, item by item, in points", columns, cells)


def _marked(name: str, results: Mapping[str, Any]) -> str:
    return f"{name} (baseline)" if name == results["baseline"] else name


def _percent(score: Mapping[str, Any], *, sign: str = "") -> str:
    value, error = (None if score.get(key) is None else 100 * score[key] for key in ("value", "standard_error"))
    return with_error(value, error, 2, sign=sign)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.2f}" if value < 1e6 else f"{value:.1e}"


def _size(parameters: int) -> str:
    """A number of parameters, to four digits or so.

    Example:
        >>> _size(354_823_168), _size(59_424), _size(900)
        ('354.8M', '59.4K', '900')
    """
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{letter}"
    return str(parameters)


def _has_text(results: Mapping[str, Any]) -> bool:
    return all(model["text"] is not None for model in results["models"])
