"""Which sizes of a nesting are served."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from matta.choosing.family import Family
from matta.choosing.survey import STUDENT, TA, size_name
from matta.nesting.nested import Nested
from matta.sizes.extraction import unmeasured_norms
from matta.sizes.submodels import (
    SubModel,
    alike_layers,
    is_one_width,
    layer_names,
    student_spec,
    wide,
    wide_narrow_wide,
)

LOG: Final = logging.getLogger("matta.serve")
MOST_BETWEEN: Final = 3  # sizes between Student and TA, where no family says which


def served_specs(nested: Nested, family: Family | None) -> dict[str, SubModel | None]:
    """The sizes to serve, from the worst: the fronts of a family, else Student, TA, and a few between.

    Latencies of small models are close together, so that chance keeps the Student off the front of latencies. It is
    first on that of parameters.
    """
    if family is not None:
        costs = ("latency_ms", "parameters") if family.sizes[0].latencies else ("parameters",)
        served = {size.name for by in costs for size in family.pareto(by)}
        order = sorted(family.sizes, key=lambda size: size.quality, reverse=not family.higher_is_better)
        return {size.name: size.spec for size in order if size.name in served}
    names = layer_names(nested)
    if not names:
        return {STUDENT: None, TA: wide(nested)}
    has_between = not is_one_width(nested) and alike_layers(nested) != {*names}
    steps = min(len(names), MOST_BETWEEN + 1) if has_between else 1
    between = [wide_narrow_wide(nested, len(names) * k // steps) for k in range(1, steps)]
    return {STUDENT: student_spec(nested), **{size_name(nested, spec): spec for spec in between}, TA: wide(nested)}


def measured_specs(nested: Nested, specs: Mapping[str, SubModel | None]) -> dict[str, SubModel | None]:
    """The sizes but for those between Student and TA whose norms would have running statistics of other inputs."""
    norms = {name: unmeasured_norms(nested, spec) for name, spec in specs.items()}
    left_out = [name for name in specs if norms[name]]
    if left_out:
        LOG.warning(
            "not served: %s, since the running statistics of %s are those of Student and TA; expected "
            "Serving(recalibrate=batches), a list of some batches as in training",
            ", ".join(left_out),
            ", ".join(norms[left_out[0]][:4]),
        )
    kept = {name: spec for name, spec in specs.items() if not norms[name]}
    return kept or {STUDENT: student_spec(nested), TA: wide(nested)}
