"""What a run was begun with, compared with the arguments of the call that resumes it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from matta.errors import RunError
from matta.training.cotraining import CoTraining

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

PROLONG: Final = "prolong"
_MOST_SHOWN: Final = 8  # differences in a message
_PLAIN = (bool, int, float, str, type(None))
_HOW = ("foreach", "fused", "capturable", "differentiable", "chunk")  # how something is computed, not what
_SHAPING = ("block_size", "graft")  # of Shampoo's state
_ALIKE = {"Adam", "AdamW"}  # optimizers that continue with each other's state
_CYCLED = ("momentum", "betas")  # moved by the schedules that leave a max_momentum in the group
_COUNTERS = ("last_epoch", "num_bad_epochs", "cooldown_counter", "best", "T_cur", "T_i")


def arguments_of(
    cotrain: CoTraining, optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None, **settings: object
) -> dict[str, Any]:
    """Each argument that changes the weights of a run, by name, as plain types; to be taken before its first step.

    What has no plain value (a Teacher's weights, a function's code) is left out, and what a scheduler moves.
    """
    found = {f"cotrain.{name}": value for name, value in _of_cotraining(cotrain).items()}
    found["optimizer"] = _name(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        for name, value in _plain(_constants(group, has_scheduler=scheduler is not None)).items():
            found[f"optimizer.param_groups[{index}].{name}"] = value
    if scheduler is not None:
        found["scheduler"] = _name(scheduler)
        found |= {f"scheduler.{name}": value for name, value in _of_scheduler(scheduler).items()}
    return found | _plain(settings)


def require_same_shape(state: Mapping[str, Any], present: Mapping[str, int]) -> None:
    """Refuse a resumption, prolonged or not, with another number of observers, or of batches to a step.

    The batches of a step are those of all processes: half as many may accumulate twice as many each. Where the data
    can share its samples out in batches of another size (`step_size`), the samples of a step are compared instead.

    Raises:
        RunError: one differs.
    """
    saved = {**state, "number of observers": len(state["observers"])}
    now = dict(present)
    if saved["step_size"] != now["step_size"]:
        difference = _differences(saved, now, ("accumulate", "num_processes")) or _differences(saved, now, ("batch",))
        raise RunError(
            f"the run was begun with {difference}; expected as many batches in a step of all processes together"
        )
    if difference := _differences(saved, now, ("number of observers",)):
        raise RunError(f"the run was begun with {difference}; expected the same")


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(_difference(saved, now, name) for name in names if saved[name] != now[name])


def _difference(begun: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    """In few words, whatever a damaged file holds."""
    shown = (f"{each[name]!r:.200}" if name in each else "not given" for each in (begun, now))
    return f"{name:.100}={', and now it is '.join(shown)}"


def require_same_arguments(state: Mapping[str, Any], now: Mapping[str, Any], scheduler: LRScheduler | None) -> None:
    """Refuse arguments that are not those that a run was begun with, and that the saved ones would override.

    An optimizer's value that is the saved `state`'s is that of the same optimizer, trained on.

    Raises:
        RunError: an argument differs, or there is a scheduler now and was none, or the reverse.
    """
    was_scheduled, is_scheduled = (each is not None for each in (state["scheduler"], scheduler))
    if was_scheduled != is_scheduled:
        raise RunError(
            f"the run was begun with scheduler={was_scheduled}, and now it is {is_scheduled}; expected the same, or "
            f"resume={PROLONG!r}"
        )
    begun = state.get("arguments", now)  # older checkpoints have none
    saved = {
        f"optimizer.param_groups[{index}].{name}": value
        for index, group in enumerate(state["optimizer"]["param_groups"])
        for name, value in _plain(group).items()
    }
    missing = object()  # None is as not given: a run of before there was a setting can be resumed
    differences = [
        _difference(begun, now, name)
        for name in sorted(begun.keys() | now.keys())
        if now.get(name) not in (begun.get(name), saved.get(name, missing))
    ]
    if differences:
        raise RunError(
            f"the run was begun with {'; '.join(differences[:_MOST_SHOWN])}. Expected the same, or resume={PROLONG!r}, "
            f"which continues with the new values from the weights and the optimizer state of the run"
        )


def names_of(cotrain: CoTraining, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters of an optimizer by name, in its order, by whose numbers it keeps their state."""
    names = {id(parameter): name for name, parameter in cotrain.named_parameters()}
    return [names.get(id(each), "another") for group in optimizer.param_groups for each in group["params"]]


def require_same_order(state: Mapping[str, Any], now: Sequence[str]) -> None:
    """Refuse an optimizer that has its parameters in another order: each would get the state of another.

    Raises:
        RunError: it has.
    """
    for number, (was, present) in enumerate(zip(state.get("parameters", now), now, strict=False)):
        if was != present:
            raise RunError(
                f"parameter {number} of the optimizer was {was} when the run was begun, and now it is {present}; "
                f"expected the same order, in which it keeps their state"
            )


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    state: Mapping[str, Any],
    *,
    prolong: bool,
    steps: int | None,
) -> None:
    """Take over the optimizer's state with the run's hyperparameters and schedule, or, prolonged, the new ones.

    Raises:
        RunError: it does not fit; or a new scheduler is past the step at which the run resumes.
    """
    was, now = state.get("arguments", {}).get("optimizer", _name(optimizer)), _name(optimizer)
    if prolong and was != now and not {was, now} <= _ALIKE:
        raise RunError(
            f"the run was begun with the optimizer {was}, whose state it keeps, and now it is {now}; expected the "
            f"same: for another begin a new run with the weights of this one (matta.load)"
        )
    saved = _with_new_values(optimizer, state["optimizer"]) if prolong else state["optimizer"]
    try:
        optimizer.load_state_dict(saved)
        if scheduler is not None and not prolong:
            scheduler.load_state_dict(state["scheduler"])
    except (ValueError, KeyError) as error:
        raise RunError(
            f"the run's optimizer state does not fit the optimizer given: {error}; expected the optimizer and "
            f"scheduler that the run was begun with"
        ) from None
    if prolong:
        _fast_forward(scheduler, state["step"])
    elif steps is not None and steps > state["step"] and all(group["lr"] == 0 for group in optimizer.param_groups):
        warnings.warn(
            f"the run resumes at step {state['step']} of {steps} with a learning rate of 0, to which its schedule has "
            f"come; a longer schedule is taken with resume='prolong'",
            stacklevel=2,
        )


def _with_new_values(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state of an optimizer with the hyperparameters of the optimizer given.

    Raises:
        RunError: it has other groups of parameters, or factors of another shape.
    """
    groups = state["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        raise RunError(
            f"the run was begun with {len(groups)} group(s) of parameters, and now there are "
            f"{len(optimizer.param_groups)}; expected as many"
        )
    for new, saved in zip(optimizer.param_groups, groups, strict=True):
        for name in _SHAPING:
            was, now = (each.get(name) for each in (saved, new))
            if was != now:
                raise RunError(
                    f"the run was begun with {name}={was!r}, for which its state is made, and now it is {now!r}; "
                    f"expected the same"
                )
    kept = [{**new, "params": saved["params"]} for new, saved in zip(optimizer.param_groups, groups, strict=True)]
    return {**state, "param_groups": kept}


def _fast_forward(scheduler: LRScheduler | None, step: int) -> None:
    """Bring a new schedule to a step of the run, with the rates that it would have there had it begun with the run.

    Raises:
        RunError: it is past that step.
    """
    if scheduler is None:
        return
    done = getattr(scheduler, "last_epoch", 0)
    if done > step:
        raise RunError(
            f"the scheduler has made {done} steps, and the run resumes after step {step}; expected a new scheduler, "
            f"made for the whole run"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\).*optimizer\.step\(\)")
        for _ in range(step - done):
            scheduler.step()


def _of_cotraining(cotrain: CoTraining) -> dict[str, Any]:
    parts = {
        "weights": cotrain.weights,
        "ramp": cotrain.ramp,
        "objective": cotrain.objective,
        **({"turns": cotrain.turns} if cotrain.turns else {}),  # a run of before there were turns can be resumed
    }
    found: dict[str, Any] = {"teacher": cotrain.has_teacher, "sample": cotrain.sample is not None}
    teachers = cotrain.teachers  # those settings alone that are not as they always were before there were any
    if (len(teachers.modules), teachers.temperature, teachers.labels) not in ((0, 1.0, 0.0), (1, 1.0, 0.0)):
        found |= {"num_teachers": len(teachers.modules), "temperature": teachers.temperature, "labels": teachers.labels}
    if cotrain.logits is not None:
        found["logits"] = cotrain.logits if isinstance(cotrain.logits, str) else _name(cotrain.logits)
    for name, part in parts.items():
        found[name] = None if part is None else _name(part)
        found |= {f"{name}.{inner}": value for inner, value in _plain(getattr(part, "__dict__", {})).items()}
    return found


def _of_scheduler(scheduler: LRScheduler) -> dict[str, Any]:
    found = {name: value for name, value in vars(scheduler).items() if name not in ("optimizer", *_COUNTERS)}
    for index, function in enumerate(found.pop("lr_lambdas", ())):
        found |= {f"lr_lambdas[{index}].{name}": value for name, value in _of_function(function).items()}
    found["milestones"] = found.pop("_milestones", found.get("milestones"))
    for index, inner in enumerate(found.pop("_schedulers", ())):
        found[f"schedulers[{index}]"] = _name(inner)
        found |= {f"schedulers[{index}].{name}": value for name, value in _of_scheduler(inner).items()}
    return _plain(found)


def _of_function(function: Any) -> dict[str, Any]:
    """What can be compared of a schedule's function: its name, and the plain values that it was given."""
    if isinstance(function, functools.partial):
        values = {f"arguments[{index}]": value for index, value in enumerate(function.args)}
        return {**_of_function(function.func), **values, **function.keywords}
    if not hasattr(function, "__code__"):
        return {"": _name(function), **getattr(function, "__dict__", {})}
    closed = inspect.getclosurevars(function).nonlocals
    defaults = {name: each.default for name, each in inspect.signature(function).parameters.items()}
    return {"": function.__qualname__, **{f"default {k}": v for k, v in defaults.items()}, **closed}


def _constants(group: Mapping[str, Any], *, has_scheduler: bool) -> dict[str, Any]:
    moved = {"params"}
    if has_scheduler:
        moved |= {"lr", *(_CYCLED if "max_momentum" in group else ())}
    return {name: value for name, value in group.items() if name not in moved}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under public names that are plain, lists or mappings of those, or tensors of one number."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        elif isinstance(value, Mapping):
            value = sorted(f"{key}: {inner}" for key, inner in value.items())
        if name.startswith("_") or name in _HOW:
            continue
        if isinstance(value, list | tuple) and all(isinstance(each, _PLAIN) for each in value):
            found[name] = [_builtin(each) for each in value]
        elif isinstance(value, _PLAIN):
            found[name] = _builtin(value)
    return found


def _builtin(value: Any) -> Any:
    """A checkpoint holds nothing but Python's own types: NumPy's float64 is a float, and is none of them.

    NaN, which is not equal to itself, becomes its name.
    """
    if not isinstance(value, float):
        return value
    return float(value) if value == value else "nan"


def _name(value: object) -> str:
    return type(value).__qualname__
