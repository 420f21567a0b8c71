"""What a run evaluates, in between and at its end, and the nesting that was the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal, final

from matta.errors import RunError
from matta.nesting.copying import is_unit
from matta.nesting.nested import Nested
from matta.nesting.sharded_slices import follow_shards, is_sharded, run_as_forward
from matta.sizes.saving import save
from matta.training.cotraining import CoTraining
from matta.training.evaluation import Evaluate, Evaluated, evaluating, whole_nested
from matta.training.processes import is_main_process, known_length, num_processes, of_main, raise_together
from matta.training.randomness import random_state, random_state_kept, set_random_state

BEST: Final = "best"  # the folder of the best nesting, in that of the run


@final
class RunEvaluation:
    """The evaluations of a run, and the best of them, whose nesting is kept in `best`, if there is such a folder."""

    def __init__(
        self,
        cotrain: CoTraining,
        evaluate: Evaluate | None,
        best: tuple[str, Literal["min", "max"]] | None,
        patience: int | None,
        folder: Path | None,
    ) -> None:
        self._cotrain, self._evaluate, self._criterion, self._folder = cotrain, evaluate, best, folder
        self._patience = patience
        self.found: list[Evaluated] = []
        self.best: Evaluated | None = None

    def is_due(self, step: int) -> bool:
        """Whether the weights of a step are still to be evaluated."""
        return self._evaluate is not None and not (self.found and self.found[-1].step == step)

    def plain(self) -> dict[str, Any]:
        """How it is called, in plain types: by the main process alone, or by all, over so many batches."""
        calls = None if self._evaluate is None else "all" if hasattr(self._evaluate, "together") else "the main one"
        return {"evaluate": calls, "evaluate.data": known_length(getattr(self._evaluate, "data", None))}

    def is_out_of_patience(self) -> bool:
        """Whether as many evaluations as that have passed since the best one."""
        if self._patience is None or self.best is None:
            return False
        return sum(each.step > self.best.step for each in self.found) >= self._patience

    def judge(self, step: int) -> dict[str, float]:
        """The values of the nesting as it is, none if nothing evaluates; all processes call this.

        Raises:
            RunError: the values lack the one that says which is the best.
        """
        if self._evaluate is None:
            return {}
        with random_state_kept():
            values = self._values(self._evaluate)
        self.found.append(Evaluated(step=step, values=values))
        self._keep_if_best(self.found[-1])
        return values

    def _values(self, evaluate: Evaluate) -> dict[str, float]:
        """Of the main process, or of all together, where `evaluate` can and FSDP2 gathers the pair as one."""
        nested, has_shards = self._cotrain.nested, is_sharded(self._cotrain)
        together = getattr(evaluate, "together", None) if num_processes() > 1 else None
        if together is not None and (is_unit(self._cotrain) or not has_shards):
            set_random_state(of_main(random_state()))  # data that is shuffled comes in one order
            if has_shards:
                follow_shards(list(nested.students), nested.ta)
                return run_as_forward(self._cotrain, lambda: _judged(together, nested))
            return _judged(together, nested)
        shown = whole_nested(nested) if has_shards else nested
        values: dict[str, float] = {}
        failed: Exception | None = None
        if shown is not None and is_main_process():
            try:
                values = _judged(evaluate, shown)
            except Exception as error:
                failed = error
        raise_together(failed)
        return of_main(values)

    def _keep_if_best(self, latest: Evaluated) -> None:
        if self._criterion is None:
            return
        name, way = self._criterion
        if name not in latest.values:
            raise RunError(f"best names {name!r}, and evaluate gave: {', '.join(latest.values)}; choose one of these")
        sign = 1 if way == "min" else -1
        before = math.nan if self.best is None else self.best.values.get(name, math.nan)  # another name where prolonged
        if not (math.isnan(before) or sign * latest.values[name] < sign * before):
            return
        self.best = latest
        if self._folder is not None and (is_main_process() or is_sharded(self._cotrain)):
            save(self._cotrain.nested, self._folder / BEST)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to continue."""
        return {
            "evaluations": [asdict(each) for each in self.found],
            "best": None if self.best is None else asdict(self.best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.found = [Evaluated(**each) for each in state["evaluations"]]
        self.best = None if state["best"] is None else Evaluated(**state["best"])


def _judged(evaluate: Callable[[Nested], Mapping[str, float]], nested: Nested) -> dict[str, float]:
    with evaluating(nested):
        return _as_numbers(evaluate(nested))


def _as_numbers(values: Any) -> dict[str, float]:
    """What `evaluate` gave, as numbers by name.

    Raises:
        RunError: it is no mapping, or a value is no number.
    """
    try:
        return {str(name): float(value) for name, value in values.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise RunError(f"evaluate gave {values!r:.100}; expected numbers by name, such as {{'loss': 0.3}}") from None
