"""Make the table of a nesting's sizes: which are evaluated, by what, and on what they are timed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from matta.choosing.family import Family, Size
from matta.choosing.measuring import measure_cost, measure_latency, num_examples, resized, run_example, usable_device
from matta.choosing.searching import Choice, search
from matta.errors import ChoiceError, MattaError, first_line, require_kind
from matta.nesting.batches import Batch, map_tensors, split_labels
from matta.nesting.nested import Nested, require_nested
from matta.sizes.extraction import extract, running_statistics, unmeasured_norms
from matta.sizes.submodels import NARROW, WIDE, SubModel, alike_layers, is_one_width, layer_names, student_spec

STUDENT, TA = "Student", "TA"
TIMED_TOGETHER: Final = 8  # modules whose calls take turns; more would be in memory at once


def family(
    nested: Nested,
    *,
    evaluate: Callable[[nn.Module], float],
    example: Batch,
    higher_is_better: bool = False,
    batch_sizes: Sequence[int] = (1,),
    threads: int | None = 1,
    device: str | torch.device | None = None,
    calls: int = 50,
    max_evaluations: int = 64,
    progress: bool = True,
) -> Family:
    """The table of a nesting's sizes: what each costs, its latency here, and its quality by your own function.

    All choices of wide and narrow layers are evaluated if they are at most `max_evaluations` (blocks in which nothing
    grows are the same wide and narrow, and no choice). Of more the front of
    parameters and quality is searched: Student, TA, wide-narrow-wide (section 4.2.3), each layer wide for itself, then
    choices that a model of the effects of layers predicts to be best.

    Running statistics of norms (BatchNorm) are those of Student and TA, which no size between has: call
    `matta.recalibrate` in `evaluate`. A warning tells where that is forgotten.

    Args:
        nested: The pair, after training.
        evaluate: The quality of a plain module in eval mode, such as a held-out loss; one number. A
            `matta.Evaluation` gives several: `lambda module: evaluation(module)["loss"]`.
        example: A batch, as in training; its inputs are what costs are measured on.
        higher_is_better: Whether quality is to be high (an accuracy) and not low (a loss).
        batch_sizes: Of the latencies; the first is what `choose` compares with.
        threads: Of the latencies on a CPU; None: torch's present number.
        device: Where modules are measured and evaluated; None: where the nesting is.
        calls: Timed calls of each size and batch size; 0: no latency.
        max_evaluations: The most calls of `evaluate`; at least two.
        progress: Whether to show a bar (needs `rich`).

    Raises:
        ChoiceError: settings that cannot work, a quality that is not a finite number, or Student and TA share no
            layer.
        MattaError: no nesting, a device that is not there, or an example without rows or on which the modules fail.

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8))
        >>> x, y = torch.randn(16, 3), torch.rand(16)
        >>> def loss(module): return matta.objectives.Binary().cross_entropy(module(x), y)
        >>> len(family(nested, evaluate=loss, example=(x, y), progress=False).sizes)
        2
    """
    require_nested(nested)
    require_kind("evaluate", evaluate, Callable, "a function that takes a module and gives its quality, a number")
    require_kind("batch_sizes", batch_sizes, Sequence, "a tuple, such as (1, 64)")
    if max_evaluations < 2 or calls < 0 or not batch_sizes or min(batch_sizes) < 1 or threads == 0:
        raise ChoiceError(
            f"received max_evaluations={max_evaluations}, calls={calls}, batch_sizes={tuple(batch_sizes)}, "
            f"threads={threads}; expected at least 2 evaluations, no negative number of calls, and batch sizes and "
            f"threads from 1 up"
        )
    if not calls and tuple(batch_sizes) != (1,):
        raise ChoiceError(
            f"received batch_sizes={tuple(batch_sizes)} with calls=0, which times nothing, so that latency and memory "
            f"would not be of these; expected calls over 0, or no batch_sizes"
        )
    place = usable_device(device) if device is not None else next(nested.ta.parameters()).device
    inputs, labels = split_labels(example)
    judge = _Judge(nested, evaluate, map_tensors(inputs, lambda tensor: tensor.to(place)), labels, place)
    layers = _layers(nested)
    if calls:
        _require_batch_sizes(judge, batch_sizes)
    with _bar(progress, min(max_evaluations, 2 ** len(layers))) as advance:

        def loss(choice: Choice) -> float:
            size = judge.size(_spec(nested, layers, choice))
            advance()
            return -size.quality if higher_is_better else size.quality

        found = search(len(layers), _additive_cost(judge, layers), loss, max_evaluations=max_evaluations)
    student = student_spec(nested)
    specs = [_spec(nested, layers, choice) for choice in found]
    sizes = [judge.size(spec) for spec in (specs if student in specs else [student, *specs])]
    if judge.unmeasured:
        warnings.warn(
            f"sizes between Student and TA were judged with running statistics of norms that were never measured for "
            f"them ({', '.join([*judge.unmeasured][:4])}): call matta.recalibrate(module, batches) in evaluate, and on "
            f"what you extract, and give Serving(recalibrate=batches)",
            stacklevel=2,
        )
    timed = _timed(judge, sizes, batch_sizes, calls=calls, threads=threads)
    return Family(
        sizes=tuple(sorted(timed, key=lambda each: (each.parameters, each.name))),
        higher_is_better=higher_is_better,
        is_complete=len(found) == 2 ** len(layers),
        threads=threads,
        device=str(place),
    )


class _Judge:
    """Takes sizes out one by one, and remembers what was found of each."""

    def __init__(
        self, nested: Nested, evaluate: Callable[[nn.Module], float], inputs: Any, labels: Any, device: torch.device
    ) -> None:
        self.nested, self.evaluate, self.inputs, self.labels, self.device = nested, evaluate, inputs, labels, device
        self.found: dict[SubModel, Size] = {}
        self.unmeasured: dict[str, None] = {}  # norms of sizes that were judged with statistics of another's

    def module(self, spec: SubModel) -> nn.Module:
        """A plain module of a size, in eval mode."""
        return extract(self.nested, spec).to(self.device).eval()

    def size(self, spec: SubModel) -> Size:
        """A size without its latency."""
        if spec not in self.found:
            module = self.module(spec)
            before = [each.clone() for each in running_statistics(module)]
            with torch.no_grad():
                cost = measure_cost(module, self.inputs, self.labels)
                quality = quality_of(self.evaluate, module)
            if all(map(torch.equal, before, running_statistics(module))):
                self.unmeasured.update(dict.fromkeys(unmeasured_norms(self.nested, spec)))
            if not math.isfinite(quality):
                raise ChoiceError(
                    f"evaluate gave {quality} for {size_name(self.nested, spec)!r}; expected a finite number: such as "
                    f"a loss on held-out data"
                )
            self.found[spec] = Size(
                name=size_name(self.nested, spec),
                layers=dict(spec.choices),
                latencies=(),
                quality=quality,
                **asdict(cost),
            )
        return self.found[spec]


def quality_of(evaluate: Callable[[nn.Module], Any], module: nn.Module) -> float:
    """What `evaluate` gives for a module, as a number.

    Raises:
        ChoiceError: it is none.
    """
    with torch.no_grad():
        found = evaluate(module)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        told = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.100}"
        raise ChoiceError(f"evaluate gave {told}; expected one number, such as a mean loss on held-out data") from None


def _additive_cost(judge: _Judge, layers: Sequence[Sequence[str]]) -> Callable[[Choice], float]:
    """Parameters as the sum of what each wide layer adds: exact for blocks, near enough for widths to search by."""
    shares: list[float] = []
    base = 0.0

    def count(choice: Choice) -> float:
        return float(
            sum(each.numel() for each in extract(judge.nested, _spec(judge.nested, layers, choice)).parameters())
        )

    def cost(choice: Choice) -> float:
        nonlocal base
        if not shares:
            base = count((False,) * len(layers))
            singles = (tuple(i == layer for i in range(len(layers))) for layer in range(len(layers)))
            shares.extend(count(single) - base for single in singles)
        return base + sum(share for share, wide in zip(shares, choice, strict=True) if wide)

    return cost


def _require_batch_sizes(judge: _Judge, batch_sizes: Sequence[int]) -> None:
    """Refuse batch sizes that the modules do not take, before anything is evaluated.

    Raises:
        ChoiceError: there is one.
    """
    module = judge.module(student_spec(judge.nested))
    run_example(module, judge.inputs)
    for batch_size in batch_sizes:
        try:
            run_example(module, resized(judge.inputs, batch_size))
        except MattaError as error:
            raise ChoiceError(
                f"received batch_sizes={tuple(batch_sizes)}, but the example cut to batch size {batch_size} fails: "
                f"{first_line(error.__cause__ or error)}; expected modules that take it, and inputs with a row for "
                f"each example: pass batch_sizes=({num_examples(judge.inputs)},), or calls=0 for no latency"
            ) from error


def _timed(
    judge: _Judge, sizes: Sequence[Size], batch_sizes: Sequence[int], *, calls: int, threads: int | None
) -> list[Size]:
    """The sizes with their latencies; a few modules at a time, whose calls take turns."""
    if not calls:
        return list(sizes)
    found: list[Size] = []
    for start in range(0, len(sizes), TIMED_TOGETHER):
        group = sizes[start : start + TIMED_TOGETHER]
        modules = [judge.module(each.spec) for each in group]
        of_batches = [
            measure_latency(modules, resized(judge.inputs, batch_size), calls=calls, threads=threads)
            for batch_size in batch_sizes
        ]
        found += [replace(each, latencies=tuple(of_size)) for each, *of_size in zip(group, *of_batches, strict=True)]
    return found


def _layers(nested: Nested) -> list[tuple[str, ...]]:
    """What is chosen together: each layer for itself, or all where one hidden width runs through them.

    Raises:
        ChoiceError: Student and TA share no layer.
    """
    names = layer_names(nested)
    if not names:
        raise ChoiceError("the Student shares no layer with the TA, so there are no sizes between to choose from")
    alike = alike_layers(nested)
    return [names] if is_one_width(nested) else [(name,) for name in names if name not in alike]


def _spec(nested: Nested, layers: Sequence[Sequence[str]], choice: Choice) -> SubModel:
    """The sub-model of a choice; blocks that are the same wide and narrow are wide in the TA alone, by name."""
    chosen = {name: WIDE if wide else NARROW for names, wide in zip(layers, choice, strict=True) for name in names}
    rest = WIDE if all(choice) else NARROW
    return SubModel({name: chosen.get(name, rest) for name in layer_names(nested)})


def size_name(nested: Nested, spec: SubModel) -> str:
    """The layers that are wide; the ends have the names of the paper."""
    wide = [name for name, choice in spec.choices.items() if choice == WIDE]
    if len(wide) == len(spec.choices):
        return TA
    if not wide:
        return STUDENT if spec == student_spec(nested) else "narrow"
    return "wide: " + ", ".join(wide)


@contextmanager
def _bar(is_shown: bool, total: int) -> Iterator[Callable[[], None]]:
    """What is called after each evaluation."""
    if not is_shown:
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        raise ChoiceError("progress=True needs rich: pip install 'matta[fit]', or progress=False") from None
    columns = (TextColumn("sizes"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda: shown.advance(task)
