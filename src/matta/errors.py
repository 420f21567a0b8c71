"""The errors that matta raises for its users: one family under ValueError.

Each message says what was received, what was expected and what to do about it. The command
line prints it as one line and ends with exit code 2.
"""


class MattaError(ValueError):
    """Any error of matta's that the user can mend."""


class LayoutError(MattaError):
    """A declared layout does not fit the axis it is declared for."""


class NestingError(MattaError):
    """The Student cannot be nested into the Teaching Assistant as asked."""


class ProbeError(MattaError):
    """The Student's slices of the Teaching Assistant do not compute what the Student computes."""


class TracingError(MattaError):
    """The flow of dimensions through a module cannot be found, or is ambiguous."""


class GrowthError(MattaError):
    """A module cannot be grown as asked."""


class SubModelError(MattaError):
    """A sub-model is asked for that the nesting does not hold."""


class LabelError(MattaError):
    """Labels or logits do not fit the objective."""


class OptimizerError(MattaError):
    """An optimizer is constructed or loaded with settings that it cannot honour."""


class CheckpointError(MattaError):
    """A saved nesting is damaged, foreign, or does not fit the modules it is loaded into."""


class RunError(MattaError):
    """A run, study or recipe is asked for with settings that cannot work."""
