"""Model cards: the README.md of a Transformers folder, with the front matter that the hub reads."""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, final

from huggingface_hub import EvalResult, ModelCardData
from torch import nn
from transformers import PreTrainedModel

from matta.lm.recipe import Recipe
from matta.nesting.nested import Nested
from matta.sizes.submodels import SubModel, layer_names
from matta.training.reporting import markdown_table, millions, ranges

CITATION: Final = """\
@inproceedings{verma2025matta,
  title     = {Matryoshka Model Learning for Improved Elastic Student Models},
  author    = {Verma, Chetan and others},
  booktitle = {Proceedings of the ACM SIGKDD Conference on Knowledge Discovery and Data Mining (KDD)},
  year      = {2025},
  note      = {arXiv:2505.23337}
}"""


@final
@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a model is: parameters, and the values of its configuration in which Student and TA differ."""

    parameters: int
    values: Mapping[str, int | str] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class Score:
    """One measured figure: of which data set or benchmark, by which metric."""

    task: str
    metric: str
    value: float
    standard_error: float | None = None


@final
@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model card says beyond what can be read off the model.

    Args:
        title: Its heading.
        model: Which model of the nesting it is: "student", "ta", "k=8", or a mixture.
        student: The size of the Student.
        ta: The size of the Teaching Assistant.
        choices: Each layer of the TA: "wide", "narrow" or "skip".
        datasets: What it was trained on, by the hub's names where there are such.
        trained_on: The same in words, with the number of tokens.
        scores: What was measured.
    """

    title: str = ""
    model: str = ""
    student: Size | None = None
    ta: Size | None = None
    choices: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    trained_on: str = ""
    scores: tuple[Score, ...] = ()


def card_of(nested: Nested, name: str, spec: SubModel | None, *, title: str = "") -> ModelCard:
    """The card of one model of a nesting; `spec` None is the Student."""
    choices = {} if spec is None else {layer: spec.choices.get(layer, spec.default) for layer in layer_names(nested)}
    student, ta = (_whole_numbers(module) for module in (nested.student, nested.ta))
    differing = [key for key in student if key in ta and student[key] != ta[key]]
    return ModelCard(
        title=title or name,
        model=name,
        student=Size(parameters=_count(nested.student.parameters()), values={key: student[key] for key in differing}),
        ta=Size(parameters=_count(nested.ta.parameters()), values={key: ta[key] for key in differing}),
        choices=choices,
    )


def _whole_numbers(module: nn.Module) -> dict[str, int]:
    values = module.config.to_dict() if isinstance(module, PreTrainedModel) else {}
    return {key: value for key, value in values.items() if type(value) is int and not key.endswith("_id")}


def held_out_scores(bits_per_byte: float, standard_error: float | None, perplexity: float) -> tuple[Score, ...]:
    """What was measured on the held-out text of a run."""
    task = "held-out text"
    return (
        Score(task=task, metric="bits per byte", value=bits_per_byte, standard_error=standard_error),
        Score(task=task, metric="perplexity of a token", value=perplexity),
    )


def recipe_card(
    nested: Nested, name: str, spec: SubModel | None, recipe: Recipe, *, steps: int, scores: tuple[Score, ...] = ()
) -> ModelCard:
    """The card of a model that a recipe has trained for `steps` steps, less than it says where its text has ended."""
    data = recipe.data.train
    return replace(
        card_of(nested, name, spec, title=f"{recipe.name}, {name}"),
        datasets=(data.hub,) if data.hub else (),
        trained_on=f"{steps:,} steps on {data.hub or data.path} (matta's recipe {recipe.name}).",
        scores=scores,
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(each.numel() for each in parameters)


def render(card: ModelCard, model: PreTrainedModel, *, auto_class: str, own_code: bool, has_tokenizer: bool) -> str:
    """The text of README.md."""
    parts = [
        f"---\n{_front_matter(card, model)}\n# license: choose one before you publish\n---",
        f"# {card.title or type(model).__name__}",
        _summary(model, own_code),
        "## Load\n\n" + _code(loading_lines(".", auto_class, own_code=own_code, has_tokenizer=has_tokenizer)),
        _nesting(card, model),
        _quality(card.scores),
        f"## Trained on\n\n{card.trained_on}" if card.trained_on else "",
        "## Licence\n\nNot stated: name one (`license:` above) before you publish this folder.",
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def loading_lines(path: str, auto_class: str, *, own_code: bool, has_tokenizer: bool) -> list[str]:
    """The lines of Python that load a folder."""
    trust = ", trust_remote_code=True" if own_code else ""
    lines = [f'model = {auto_class}.from_pretrained("{path}"{trust})']
    if has_tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{path}"{trust})')
    names = ", ".join([auto_class, "AutoTokenizer"] if has_tokenizer else [auto_class])
    return [f"from transformers import {names}", *lines]


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", lines[0], "", *lines[1:], "```"])


def _front_matter(card: ModelCard, model: PreTrainedModel) -> str:
    """YAML in the hub's form, with what was measured as a model index."""
    is_generator = model.can_generate()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if is_generator else None,
        tags=["matta", "matryoshka", model.config.model_type.removeprefix("matta_")],
        datasets=list(card.datasets) or None,
        model_name=(card.title or type(model).__name__) if card.scores else None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=score.task,
                dataset_name=score.task,
                metric_type=score.metric,
                metric_value=score.value,
            )
            for score in card.scores
        ]
        or None,
    )
    return str(data.to_yaml()).rstrip()


def _summary(model: PreTrainedModel, own_code: bool) -> str:
    architecture = type(model).__name__.removeprefix("Matta")
    count = millions(model.num_parameters())
    code = (
        " Its blocks have different widths, so that the class that loads it comes with the folder "
        "(`modeling_matta.py`); matta need not be installed."
        if own_code
        else ""
    )
    return (
        f"A `{architecture}` with {count} parameters ({str(model.dtype).removeprefix('torch.')}), one of the models of "
        f"a nesting trained with [matta](https://arxiv.org/abs/2505.23337): a Student inside a larger Teaching "
        f"Assistant, and all sizes between.{code}"
    )


def _nesting(card: ModelCard, model: PreTrainedModel) -> str:
    if card.student is None or card.ta is None:
        return ""
    keys = list(card.student.values)
    mixed = {
        key for blocks in (getattr(model.config, "block_values", None) or {}).values() for b in blocks for key in b
    }
    here = {key: "mixed" if key in mixed else getattr(model.config, key, "") for key in keys}
    sizes = {
        "Student": card.student,
        "Teaching Assistant": card.ta,
        f"this model: {card.model}": Size(parameters=model.num_parameters(), values=here),
    }
    rows = [[name, millions(size.parameters), *map(str, size.values.values())] for name, size in sizes.items()]
    table = markdown_table(["", "parameters", *(f"`{key}`" for key in keys)], rows)
    choices = dict.fromkeys(card.choices.values())
    found = [f"- {each}: {_listed(name for name, made in card.choices.items() if made == each)}" for each in choices]
    layers = ["", "Layers of the Teaching Assistant:", "", *found] if found else []
    return "\n".join(["## Nesting", "", table, *layers])


def _listed(names: Iterable[str]) -> str:
    """Names that end in numbers, neighbours drawn together.

    Example:
        >>> _listed(["h.0", "h.1", "h.2", "h.5", "stem"])
        '`h` 0-2, 5; `stem`'
    """
    found: dict[str, list[int]] = {}
    for name in names:
        stem, _, last = name.rpartition(".")
        if stem and last.isdecimal():
            found.setdefault(stem, []).append(int(last))
        else:
            found[name] = []
    return "; ".join(f"`{stem}` {ranges(indices)}".rstrip() for stem, indices in found.items())


def _quality(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    rows = [[each.task, each.metric, _value(each)] for each in scores]
    return "## Measured\n\n" + markdown_table(["", "metric", "value"], rows)


def _value(score: Score) -> str:
    error = "" if score.standard_error is None else f" ± {score.standard_error:.4f}"
    return f"{score.value:.4f}{error}"
