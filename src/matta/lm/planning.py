"""`matta plan`: what a recipe would train and what that would take, on the meta device, without weights."""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.markup import escape

from matta.lm.command_settings import PlanSettings
from matta.lm.costs import Cost, cost_of, family_costs, step_memory
from matta.lm.decoders import build_pair, nest_pair, require_context, require_family
from matta.lm.gpu_memory import Choice, choices, fitting, rows_of
from matta.lm.recipe import Recipe
from matta.lm.recipe_files import read_recipe
from matta.lm.tokens import load_tokenizer
from matta.nesting.nested import Nested
from matta.nesting.plan import kinds
from matta.sizes.submodels import layer_names
from matta.training.reporting import millions, ranges, rich_table

if TYPE_CHECKING:
    from rich.table import Table

GIB: Final = 2**30


def run(settings: PlanSettings) -> dict[str, Any]:
    """Plan a recipe, print it, and give its figures.

    Raises:
        MattaError: the recipe or its models cannot work.
    """
    recipe = read_recipe(settings.recipe, settings.overrides)
    nested = nest_on_meta(recipe)
    figures = plan_figures(recipe, nested)
    found: list[Choice] = []
    memory = None if settings.memory_gb is None else int(settings.memory_gb * 1e9)
    if settings.gpus is not None or memory is not None:
        num_gpus = settings.gpus or 1
        found = choices(recipe, nested, num_gpus=num_gpus)
        figures["gpus"] = gpu_figures(found, num_gpus, memory)
    _print(figures)
    if found:
        _print_choices(found, figures["gpus"], memory)
    return figures


def gpu_figures(found: list[Choice], num_gpus: int, memory: int | None) -> dict[str, Any]:
    """The choices, the one to take if there is one that fits, and how much the smallest has over the memory if not."""
    best = None if memory is None else fitting(found, memory)
    smallest = min(each.memory.total for each in found)
    return {
        "num_gpus": num_gpus,
        "memory_bytes": memory,
        "choices": [_choice_values(each) for each in found],
        "chosen": None if best is None else _choice_values(best),
        "bytes_over": None if memory is None or best is not None else smallest - memory,
    }


def _choice_values(choice: Choice) -> dict[str, Any]:
    values = asdict(choice)
    return {**values, "memory": {**values["memory"], "total": choice.memory.total}}


def nest_on_meta(recipe: Recipe) -> Nested:
    """The nesting of a recipe without weights. Its tokenizer is loaded only if the recipe gives no vocabulary.

    Raises:
        MattaError: the models cannot work.
    """
    is_known = bool(recipe.model.pretrained) or "vocab_size" in recipe.model.student
    tokenizer = None if is_known else load_tokenizer(recipe.data.tokenizer)
    size, end = (1, None) if tokenizer is None else (len(tokenizer), tokenizer.eos_token_id)
    with torch.device("meta"):
        student, ta = build_pair(recipe.model, size, end_of_text=end, context=recipe.data.context)
        for model in (student, ta):
            require_context(model, recipe.data.context)
        nested = nest_pair(recipe.model, student, ta)
    require_family(nested, recipe.family.k)
    return nested


def plan_figures(recipe: Recipe, nested: Nested) -> dict[str, Any]:
    """All figures of a plan: nesting, sizes, FLOPs, steps, and the bytes of a step on one process.

    Raises:
        RunError: the batch cannot be shared out, whatever the number of processes.
    """
    part, context = recipe.train, recipe.data.context
    steps, (micro_batch, _) = part.num_steps(context), part.shares(num_processes=1)
    models = list(_models(nested, recipe.family.k, context))
    flops = 3 * forward_flops(nested, recipe) * steps * part.batch * context
    memory = step_memory(nested, part, batch=micro_batch, context=context)
    return {
        "recipe": recipe.name,
        "nesting": nesting_figures(nested),
        "models": models,
        "context": context,
        "steps": steps,
        "tokens_per_step": part.batch * context,
        "tokens": steps * part.batch * context,
        "training_flops": round(flops),
        "optimizer": part.optimizer,
        "precision": part.precision,
        "micro_batch": micro_batch,
        "memory_bytes": {**asdict(memory), "total": memory.total},
    }


def forward_flops(nested: Nested, recipe: Recipe) -> float:
    """FLOPs of a token in the forwards of a step, in the mean of a run; those of a Teacher are left out.

    A sampled sub-model has half of its layers wide, in the mean.
    """
    part, context = recipe.train, recipe.data.context
    student, ta = (cost_of(model, context).flops_per_token for model in (nested.student, nested.ta))
    between = (family_costs(nested, [0], context)[0].flops_per_token + ta) / 2 if part.sample else 0.0
    if part.turns is None:
        return student + ta + between
    num_steps, chance = part.num_steps(context), part.turns.student_chance if part.sample else 1.0
    alone = part.steps_alone(num_steps) / num_steps
    return alone * student + (1 - alone) * (ta + chance * student + (1 - chance) * between)


def _models(nested: Nested, ks: Iterable[int], context: int) -> Iterator[dict[str, Any]]:
    """Student, sub-models and TA with parameters and FLOPs."""
    rows: list[tuple[str, int | None, Cost]] = [("student", None, cost_of(nested.student, context))]
    rows += [(f"k={k}", k, cost) for k, cost in family_costs(nested, ks, context).items()]
    rows.append(("ta", len(layer_names(nested)), cost_of(nested.ta, context)))
    for name, k, cost in rows:
        yield {"name": name, "k": k, **asdict(cost)}


def nesting_figures(nested: Nested) -> dict[str, Any]:
    """Where each kind of Student parameter lives, the blocks, and how much is shared."""
    plan = nested.plan
    shared, total = plan.num_shared, sum(each.numel() for each in nested.ta.parameters())
    private = dict(nested.student.named_parameters())
    return {
        "parameters": [dict(zip(("student", "shape", "ta", "count"), kind, strict=True)) for kind in kinds(plan)],
        "blocks": [
            {"list": each.ta, "of": each.num_ta, "student": list(each.indices)}
            for each in plan.layers
            if each.num_ta != len(each.indices)
        ],
        "shared": shared,
        "private": sum(private[name].numel() for name in plan.private if name in private),
        "extra": total - shared,
    }


def _print(figures: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    console.print(_nesting_table(figures["nesting"]))
    for line in _nesting_lines(figures["nesting"]):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_model_table(figures))
    for line in _lines(figures):
        console.print(line, highlight=False, soft_wrap=True)


def _print_choices(found: list[Choice], figures: Mapping[str, Any], memory: int | None) -> None:
    from rich.console import Console

    columns = ("sharding", "recompute", "state", "gathered", "activations", "total", "sent", "fits")
    title = f"GiB on each of {figures['num_gpus']} GPUs"
    console = Console()
    console.print(rich_table(title, columns, list(rows_of(found, memory)), left=columns[:2]))
    if memory is not None:
        console.print(_advice(figures), highlight=False, soft_wrap=True)


def _advice(figures: Mapping[str, Any]) -> str:
    chosen, memory = figures["chosen"], figures["memory_bytes"] / 1e9
    if chosen is None:
        return (
            f"None fits {memory:g} GB: the smallest is {figures['bytes_over'] / 1e9:.2f} GB over; take more GPUs, or a "
            f"smaller train.micro_batch"
        )
    recompute = str(chosen["activation_checkpointing"]).lower()
    return (
        f"The first that fits {memory:g} GB: train.sharding={chosen['sharding']} "
        f"train.activation_checkpointing={recompute}"
    )


def _nesting_table(nesting: Mapping[str, Any]) -> Table:
    columns = ("Student parameter", "shape", "its slice", "times")
    rows = [  # most have the same name in the TA
        (each["student"], each["shape"], escape(each["ta"].removeprefix(each["student"])), str(each["count"]))
        for each in nesting["parameters"]
    ]
    return rich_table("Where the Student lives in the TA", columns, rows, left=columns[:3])


def _nesting_lines(nesting: Mapping[str, Any]) -> Iterator[str]:
    for each in nesting["blocks"]:
        indices = ranges(each["student"])
        yield f"{each['list']}: the Student's {len(each['student'])} blocks are {indices} of the TA's {each['of']}"
    shared, private, extra = (nesting[name] for name in ("shared", "private", "extra"))
    yield f"{shared:,} parameters shared, {private:,} the Student's own, {extra:,} beyond them in the TA\n"


def _model_table(figures: Mapping[str, Any]) -> Table:
    rows = [
        (each["name"], millions(each["parameters"]), f"{each['flops_per_token'] / 1e6:,.3g}")
        for each in figures["models"]
    ]
    return rich_table("Models", ("model", "parameters", "MFLOP of a token"), rows)


def _lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """The figures of the run, and where each comes from."""
    yield (
        f"FLOPs: of a forward in sequences of {figures['context']:,}, matrix products alone, by formula (what "
        f"torch.utils.flop_counter counts)"
    )
    yield (
        f"Training: {figures['tokens']:,} tokens = {figures['steps']:,} steps x {figures['tokens_per_step']:,}; "
        f"{figures['training_flops']:.2e} FLOPs (three times the forwards of the models that a step trains)"
    )
    memory = {name: f"{size / GIB:.2f}" for name, size in figures["memory_bytes"].items()}
    yield (
        f"Memory of a step on one process, at most {memory['total']} GiB: weights {memory['weights']}, gradients "
        f"{memory['gradients']}, {figures['optimizer']} {memory['optimizer']}, activations {memory['activations']} "
        f"(what autograd keeps of a forward of {figures['micro_batch']} x {figures['context']:,} tokens, precision "
        f"{figures['precision']}, run on fake tensors), heads and losses {memory['heads']}"
    )
