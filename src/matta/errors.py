"""The errors that matta raises for its users: one family under ValueError.

Each message says what was received, what was expected and what to do about it. The command
line prints it as one line and ends with exit code 2.

Example:
    >>> import matta
    >>> try:
    ...     matta.Ramp(start=-1)
    ... except matta.MattaError as error:
    ...     print(error)
    received Ramp(start=-1, steps=1000); expected start and steps of zero or more
"""

from __future__ import annotations

from typing import Any, Final

_LONGEST: Final = 4000  # characters of a message


class MattaError(ValueError):
    """Any error of matta's that the user can mend.

    Of a message that a value received has made very long the middle is left out.

    Example:
        >>> import matta
        >>> matta.Weights(distill=-1)
        Traceback (most recent call last):
        matta.errors.MattaError: received Weights(distill=-1); expected a finite number, zero or more
        >>> issubclass(matta.errors.RunError, matta.MattaError) and issubclass(matta.MattaError, ValueError)
        True
    """

    def __init__(self, message: str = "") -> None:
        half = _LONGEST // 2
        super().__init__(message if len(message) <= _LONGEST else f"{message[:half]} … {message[-half:]}")


class LayoutError(MattaError):
    """A declared layout does not fit the axis it is declared for.

    Example:
        >>> import matta
        >>> matta.Layout.concat([(3, 2)], axis=0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        matta.errors.LayoutError: the Student's factors (3,) do not fit into the TA's (2,): ...
    """


class NestingError(MattaError):
    """The Student cannot be nested into the Teaching Assistant as asked.

    Example:
        >>> import matta
        >>> from torch import nn
        >>> matta.nest(nn.Linear(8, 1), nn.Linear(4, 1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        matta.errors.NestingError: weight is 8 long on axis 1 and the TA's weight only 4; ...
    """


class ProbeError(MattaError):
    """The Student's slices of the Teaching Assistant do not compute what the Student computes.

    Example:
        >>> import matta, torch
        >>> from torch import nn
        >>> def gated(width): return nn.Sequential(nn.Linear(3, 2 * width), nn.GLU(), nn.Linear(width, 1))
        >>> nested = matta.nest(gated(2), gated(4), layouts={"0.*": 1, "2.*": 1})  # the two halves of the gate need 2
        >>> matta.probe(nested, (torch.ones(1, 3), torch.ones(1)))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        matta.errors.ProbeError: with all but the Student's slices zeroed, the TA differs from the Student from 2 on ...
    """


class TracingError(MattaError):
    """The flow of dimensions through a module cannot be found, or is ambiguous.

    Example:
        >>> import matta, torch
        >>> from torch import nn
        >>> batch = torch.ones(1, 5), torch.ones(1)
        >>> matta.trace_layouts(nn.Linear(3, 1), nn.Linear(3, 1), batch)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        matta.errors.TracingError: the module fails on the example with RuntimeError: ...
    """


class GrowthError(MattaError):
    """A module cannot be grown as asked.

    Example:
        >>> import matta
        >>> from torch import nn
        >>> matta.grow(nn.Linear(3, 1))
        Traceback (most recent call last):
        matta.errors.GrowthError: received nothing to grow; expected config=, widths= or layers= with an entry
    """


class OrderError(MattaError):
    """A module's channels cannot be put in order as asked.

    Example:
        >>> import matta, torch
        >>> from torch import nn
        >>> matta.order(nn.Linear(3, 1), example=torch.ones(1, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        matta.errors.OrderError: importance='activation' needs batches to measure on; ...
    """


class SubModelError(MattaError):
    """A sub-model is asked for that the nesting does not hold.

    Example:
        >>> import matta
        >>> matta.SubModel({"0": "broad"})
        Traceback (most recent call last):
        matta.errors.SubModelError: received 'broad' for '0'; expected 'wide', 'narrow' or 'skip'
    """


class ChoiceError(MattaError):
    """No size fits the budget, or the table of sizes cannot be made or read.

    Example:
        >>> import matta
        >>> matta.Family.load("nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        matta.errors.ChoiceError: there is no family in nowhere/family.json; make one: ...
    """


class ExportError(MattaError):
    """A module cannot be written in a format, or computes something else there.

    Example:
        >>> import matta
        >>> from torch import nn
        >>> matta.export(nn.Linear(3, 1), "ranker.bin", format="pickle")
        Traceback (most recent call last):
        matta.errors.ExportError: format='pickle'; expected one of: onnx, torch_export, safetensors, transformers
    """


class ServeError(MattaError):
    """Sizes cannot be served as asked.

    Example:
        >>> import matta
        >>> matta.ServeSettings(max_batch=0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        matta.errors.ServeError: received max_batch=0; expected a number over 0
    """


class AbError(MattaError):
    """A split, a log of answers or a comparison of arms cannot be made as asked.

    Example:
        >>> from matta.ab_testing import Split
        >>> Split(shares={"Student": 1, "TA": 0})
        Traceback (most recent call last):
        matta.errors.AbError: received shares {'TA': 0}; expected finite numbers over zero, or no such arm
    """


class LabelError(MattaError):
    """Labels or logits do not fit the objective.

    Example:
        >>> import matta, torch
        >>> matta.objectives.Binary().cross_entropy(torch.zeros(2), torch.tensor([0.0, 3.0]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        matta.errors.LabelError: the labels lie between 0 and 3; expected 0 or 1, or probabilities between them; ...
    """


class OptimizerError(MattaError):
    """An optimizer is constructed or loaded with settings that it cannot honour.

    Example:
        >>> import matta
        >>> from torch import nn
        >>> matta.Shampoo(nn.Linear(3, 1).parameters(), lr=-1.0)
        Traceback (most recent call last):
        matta.errors.OptimizerError: lr=-1.0 is out of range; expected a finite number from 0 up
    """


class CheckpointError(MattaError):
    """A saved nesting is damaged, foreign, or does not fit the modules it is loaded into.

    Example:
        >>> import matta
        >>> matta.load("nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        matta.errors.CheckpointError: nowhere holds no saved nesting: ...
    """


class RunError(MattaError):
    """A run, study or recipe is asked for with settings that cannot work.

    Example:
        >>> import matta
        >>> matta.Snapshots("published")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        matta.errors.RunError: received every_events=None, every_s=None and keep=3; ...
    """


class Terminated(SystemExit):
    """A run ended its step and wrote a checkpoint since a signal came; the exit code is 128 and the signal's number.

    It is no error of the user's: uncaught, the process ends with the code, and without a traceback.

    Example:
        >>> import signal
        >>> ended = Terminated(signal.SIGTERM, "stopped after step 12")
        >>> ended.code, str(ended)
        (143, 'stopped after step 12')
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(128 + signal_number)
        self.signal_number, self.message = int(signal_number), message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type[Terminated], tuple[int, str]]:
        return Terminated, (self.signal_number, self.message)


DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What Python raises where values that were read (JSON, TOML) are of another form than expected, whatever that is."""


def require_kind(name: str, found: object, kind: Any, expected: str) -> None:
    """Refuse an argument of another kind, as `isinstance` takes it: arguments in another order, a class for an object.

    Raises:
        MattaError: it is none of these kinds.
    """
    if not isinstance(found, kind):
        told = f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
        raise MattaError(f"received {told} as {name}; expected {expected}")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, for one of ours."""
    return str(error).strip().split("\n")[0][:200]
