"""The six zero-shot benchmarks of the paper's Table 2, run by lm-eval: every figure is the one its command line gives.

lm-eval's own tasks are used as they are. For local files, their configuration is included and only the data replaced,
so that prompts and metrics stay lm-eval's. The configurations are written into a folder, which lm-eval's command line
takes too: `lm_eval --include_path FOLDER`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from matta.errors import DAMAGE, RunError

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM


_OWN: Final = Path(__file__).parent / "tasks"


@final
@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a benchmark: a metric of a task of lm-eval."""

    task: str
    metric: str


@final
@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark: its tasks, and which of their figures are shown."""

    name: str  # on the command line, and of its local file
    title: str  # as in the paper's Table 2
    configurations: tuple[tuple[str, ...], ...]  # of each task, below lm-eval's tasks or, without a folder, ours
    fields: tuple[frozenset[str], ...]  # what an item of a local file has: one of these
    figure: Figure  # the one in the layout of Table 2
    others: tuple[Figure, ...]
    chance: float | None  # of guessing among the choices, for `figure`


def _choice(name: str, title: str, configuration: str, fields: str, chance: float, *more: str) -> Benchmark:
    """A benchmark of choices by likelihood, whose task has its own name."""
    return Benchmark(
        name=name,
        title=title,
        configurations=((configuration,),),
        fields=(frozenset(fields.split()),),
        figure=Figure(task=name, metric="acc"),
        others=tuple(Figure(task=name, metric=metric) for metric in more),
        chance=chance,
    )


_ARC_FIELDS: Final = "question choices answerKey"
_HELLASWAG_FIELDS: Final = "activity_label ctx_a ctx_b endings label"

BENCHMARKS: Final = (
    Benchmark(
        name="lambada",
        title="LAMBADA",
        configurations=(("lambada/lambada_openai.yaml",),),
        fields=(frozenset({"text"}),),
        figure=Figure(task="lambada_openai", metric="acc"),
        others=(Figure(task="lambada_openai", metric="perplexity"),),
        chance=None,
    ),
    _choice("arc_easy", "ARC-e", "arc/arc_easy.yaml", _ARC_FIELDS, 0.25, "acc_norm"),
    _choice("arc_challenge", "ARC-c", "arc/arc_challenge.yaml", _ARC_FIELDS, 0.25, "acc_norm"),
    Benchmark(
        name="sat_math",
        title="SAT Math",
        configurations=(("sat_math.yaml",), ("agieval/sat-math.yaml", "agieval_form.yaml")),
        fields=(frozenset({"question", "options", "label"}), frozenset({"query", "choices", "gold"})),
        figure=Figure(task="sat_math_inclusion", metric="inclusion"),
        others=(
            Figure(task="sat_math_inclusion", metric="inclusion_letter"),
            Figure(task="sat_math_inclusion", metric="inclusion_content"),
            Figure(task="agieval_sat_math", metric="acc"),
        ),
        chance=None,
    ),
    _choice("hellaswag", "HellaSwag", "hellaswag/hellaswag.yaml", _HELLASWAG_FIELDS, 0.25, "acc_norm"),
    _choice("boolq", "BoolQ", "super_glue/boolq/default.yaml", "passage question label", 0.5),
)


def choose(names: str) -> tuple[Benchmark, ...]:
    """The benchmarks that a command line names, in the order of the table; "none" for none.

    Raises:
        RunError: there is no such benchmark.

    Example:
        >>> [benchmark.title for benchmark in choose("boolq, arc_easy")]
        ['ARC-e', 'BoolQ']
    """
    wanted = {name.strip() for name in names.split(",")} - {"", "none"}
    known = [benchmark.name for benchmark in BENCHMARKS]
    for name in sorted(wanted - set(known)):
        close = get_close_matches(name, known, n=1, cutoff=0.4)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise RunError(f"tasks: there is no {name}; expected some of {', '.join(known)}{meant}")
    return tuple(benchmark for benchmark in BENCHMARKS if benchmark.name in wanted)


def write_tasks(benchmarks: Iterable[Benchmark], data: Path | None, folder: Path) -> list[str]:
    """Write the configurations of the benchmarks' tasks into a folder; their names for lm-eval.

    Args:
        benchmarks: What is to be run.
        data: A folder of `<benchmark>.jsonl` in the hub's format; None for the hub.
        folder: Where the configurations go.

    Raises:
        RunError: a file is missing, empty or not in the hub's format.
        ModuleNotFoundError: lm-eval is not installed.
    """
    names = []
    folder.mkdir(parents=True, exist_ok=True)
    for benchmark in benchmarks:
        local = {} if data is None else _local_data(benchmark, data)
        tasks = dict.fromkeys(figure.task for figure in (benchmark.figure, *benchmark.others))
        for name, configuration in zip(tasks, benchmark.configurations, strict=True):
            if data is None:  # the form of local files is of no concern then
                configuration = configuration[:1]
            values = {"include": [str(_find(each)) for each in configuration], "task": name, **local}
            lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]  # JSON is YAML
            (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
            names.append(name)
    return names


def _find(configuration: str) -> Path:
    """The file of a configuration, of lm-eval's or of ours."""
    if "/" not in configuration:
        return _OWN / configuration
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
    return Path(spec.origin).parent / "tasks" / configuration


def _local_data(benchmark: Benchmark, data: Path) -> dict[str, Any]:
    """What replaces the data in a task's configuration."""
    file = data / f"{benchmark.name}.jsonl"
    if not data.is_dir():
        raise RunError(f"--data {data} is not a folder; expected one with <task>.jsonl, such as {file.name}")
    if not file.is_file():
        there = ", ".join(sorted(each.name for each in data.glob("*.jsonl"))) or "none"
        raise RunError(f"--data {data} has no {file.name} (there: {there}); add it, or leave it out of --tasks")
    _check(file, benchmark.fields)
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }


def _check(file: Path, forms: Sequence[frozenset[str]]) -> None:
    """Refuse a file whose items are not in the hub's format."""
    number = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                item = json.loads(line)
            except DAMAGE as error:
                raise RunError(f"{file}, line {number} is not JSON: {error}; expected an item on each line") from None
            if not isinstance(item, dict) or not any(form <= item.keys() for form in forms):
                wanted = ", or ".join(" ".join(sorted(form)) for form in forms)
                raise RunError(f"{file}, line {number} lacks the fields of the hub's format; expected {wanted}")
    if not number:
        raise RunError(f"{file} is empty; expected an item on each line, in the hub's format")


Values = dict[Figure, list[float]]  # of each item


@final
class Suite:
    """Benchmarks as loaded tasks of lm-eval.

    Args:
        benchmarks: The benchmarks.
        data: A folder of `<benchmark>.jsonl`; None: the hub.
        folder: Where their configurations are written.
        limit: Items of each; None: all.

    Raises:
        RunError: data are missing, or not in the hub's format.
    """

    def __init__(
        self, benchmarks: Sequence[Benchmark], data: Path | None, folder: Path, *, limit: int | None = None
    ) -> None:
        self.benchmarks, self.folder, self.limit = tuple(benchmarks), folder, limit
        self.names = write_tasks(benchmarks, data, folder)
        self._manager: Any = None
        self._tasks: list[Any] = []
        if self.names:
            from lm_eval.tasks import TaskManager

            self._manager = TaskManager(include_path=str(folder), include_defaults=False)
            self._tasks = [_load(self._manager, name, data) for name in self.names]

    def evaluate(self, judge: HFLM, names: Sequence[str] | None = None) -> Mapping[str, Any]:
        """What lm-eval's `simple_evaluate` gives, samples included: for all tasks, or those named."""
        from lm_eval.evaluator import simple_evaluate

        tasks = [task for task in self._tasks if names is None or task.config.task in names]
        with _quiet():
            found = simple_evaluate(judge, tasks=tasks, task_manager=self._manager, limit=self.limit)
        assert found is not None, "this is the main process"
        return found

    def num_unfit(self, judge: HFLM) -> dict[str, int]:
        """Items whose answer alone is longer than what the model reads, by task: lm-eval cannot score these."""
        return {
            task.config.task: sum(_is_unfit(judge, task, item) for item in islice(task.eval_docs, self.limit))
            for task in self._tasks
        }


def load_judge(source: str, *, batch: int, trust: bool = False) -> HFLM:
    """A model in lm-eval's own class, on a GPU if there is one.

    As in training, a special token's name in a text is read as the characters that it consists of; lm-eval's command
    line reads it as the token.

    Raises:
        RunError: there is no such model, or it cannot be loaded.
    """
    import torch
    from lm_eval.models.huggingface import HFLM
    from safetensors import SafetensorError

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        judge = HFLM(pretrained=source, batch_size=batch, device=device, trust_remote_code=trust)
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(
            f"{source} cannot be loaded ({error}); expected a Transformers folder with a model and its tokenizer, a "
            f"run of matta train, or a name on the hub"
        ) from None
    judge.tokenizer.split_special_tokens = True
    return judge


def scores_of(judge: HFLM, suite: Suite) -> tuple[dict[str, dict[str, Any]], Values]:
    """Each benchmark's figures, and the values of its items.

    A task with an answer that is longer than what the model reads is left out, and its figures are None.
    """
    num_unfit = suite.num_unfit(judge)
    names = [name for name, num in num_unfit.items() if not num]
    found = suite.evaluate(judge, names) if names else {"results": {}, "samples": {}}
    scores: dict[str, dict[str, Any]] = {}
    values: Values = {}
    for benchmark in suite.benchmarks:
        figures = (benchmark.figure, *benchmark.others)
        rows = [_figure(found, figure) for figure in figures]
        for figure, row in zip(figures, rows, strict=True):
            if row["is_share"] and figure.task in names:
                values[figure] = _values(found, figure)
        samples = found["samples"].get(benchmark.figure.task, ())
        scores[benchmark.name] = {
            **rows[0],
            "num_items": len(samples),
            "num_cut": sum(_is_cut(judge, sample["arguments"]) for sample in samples),
            "num_unfit": max(num_unfit[figure.task] for figure in figures),
            "others": rows[1:],
        }
    return scores, values


def _is_unfit(judge: HFLM, task: Any, item: Mapping[str, Any]) -> bool:
    """Whether an answer takes up more than all that the model reads."""
    config = task.config
    if config.output_type == "generate_until":
        return bool(judge.max_length <= config.generation_kwargs["max_gen_toks"])
    if config.output_type == "multiple_choice":
        answers = [f"{config.target_delimiter}{choice}" for choice in task.doc_to_choice(item)]
    else:
        answers = [task.doc_to_target(item)]
    return any(len(judge.tok_encode(answer)) > judge.max_length for answer in answers)


def _figure(found: Mapping[str, Any], figure: Figure) -> dict[str, Any]:
    """A figure and its standard error; None for one that is not finite or that lm-eval does not give."""
    row = found["results"].get(figure.task, {})
    value, error = (row.get(f"{figure.metric}{kind},none") for kind in ("", "_stderr"))
    flags = {"is_share": figure.metric != "perplexity", "is_judged": bool(row)}
    return {**asdict(figure), **flags, "value": _finite(value), "standard_error": _finite(error)}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _values(found: Mapping[str, Any], figure: Figure) -> list[float]:
    samples = sorted(found["samples"][figure.task], key=lambda sample: sample["doc_id"])
    return [float(sample[figure.metric]) for sample in samples]


def _is_cut(judge: HFLM, requests: Sequence[tuple[str, Any]]) -> bool:
    """Whether the beginning of a prompt had to be left out for want of context."""
    for prompt, rest in requests:
        if isinstance(rest, str):
            num_tokens, room = len(judge.tok_encode(prompt + rest)), judge.max_length + 1
        else:
            num_tokens, room = len(judge.tok_encode(prompt)), judge.max_length - rest["max_gen_toks"]
        if num_tokens > room:
            return True
    return False


def _load(manager: Any, name: str, data: Path | None) -> Any:
    """A task with its data, each item of which gives a prompt and an answer."""
    try:
        task = manager.load([name])["tasks"][name]
    except Exception as error:  # the hub, the reader of files and the first item's template may raise anything
        if data is None:
            raise RunError(
                f"{name}: the hub does not give its data ({error}); expected --data DIR instead, or --tasks none"
            ) from None
        raise RunError(f"{name}: its file in {data} cannot be read ({error}); expected the hub's format") from None
    if data is not None:
        for number, item in enumerate(task.eval_docs, 1):
            _check_item(task, item, f"{name}, item {number} in {data}")
    return task


def _check_item(task: Any, item: Mapping[str, Any], place: str) -> None:
    """Refuse an item that the task cannot ask, or whose answer is none of its choices."""
    try:
        task.doc_to_text(item)
        answer = task.doc_to_target(item)
        choices = task.doc_to_choice(item) if task.config.doc_to_choice is not None else None
    except Exception as error:  # a template may raise anything
        raise RunError(f"{place} cannot be asked ({error!r}); expected the hub's format") from None
    if choices is not None and isinstance(answer, int) and not 0 <= answer < len(choices):
        raise RunError(f"{place} has the answer {answer} among {len(choices)} choices; expected the index of one")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard output is the caller's; prompts that do not fit are counted, not told one by one.

    Tokenizers work in one thread, since lm-eval forks to find the standard error of a perplexity.
    """
    logger = logging.getLogger("lm_eval.models.huggingface")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logger.addFilter(_tells_no_cut)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.removeFilter(_tells_no_cut)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _tells_no_cut(record: logging.LogRecord) -> bool:
    told = record.getMessage()
    return "exceeds model's maximum length" not in told and "Left truncation applied" not in told
