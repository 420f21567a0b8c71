"""Student and Teaching Assistant of a recipe: decoders of Transformers, their nesting, and their optimizer.

Models can be built and nested on the meta device (`with torch.device("meta")`), where they take no memory.
"""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from matta.errors import NestingError, RunError
from matta.lm.recipe import ModelPart, TrainPart
from matta.nesting.batches import Batch
from matta.nesting.block_ranking import best_layers
from matta.nesting.growing import grow, reconfigured
from matta.nesting.nested import Nested, nest
from matta.nesting.ordering import order
from matta.objectives.classification import CausalLM
from matta.optim.parameter_groups import shampoo_groups
from matta.optim.shampoo import Shampoo
from matta.sizes.storage import verify_weights
from matta.sizes.submodels import is_one_width, layer_names

EXAMPLE_LENGTH: Final = 8  # tokens
POSITIONS: Final = "max_position_embeddings"  # Transformers' name; that of an architecture may be another


def build_pair(
    part: ModelPart, tokenizer_size: int, *, end_of_text: int | None = None, context: int | None = None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and TA in float32, with fresh weights, or with those of the one that is pretrained.

    Args:
        part: The recipe's.
        tokenizer_size: Entries of the tokenizer: the vocabulary, unless `student.vocab_size` asks for more.
        end_of_text: The token that ends a document.
        context: Tokens of a sequence: as many positions fresh models have, unless the recipe says how many. What reads
            a model up to its last position (benchmarks, generation) then meets none that was never trained.

    Raises:
        RunError: no such architecture or value, a vocabulary too small for the tokenizer, values that do not go
            together.
        GrowthError: the other one of a pretrained pair cannot be built as asked.
    """
    if part.pretrained:
        given = _pretrained(part.pretrained)
        _require_vocabulary(given.config, tokenizer_size)
        changed = reconfigured(given, part.student) if part.is_downwards else grow(given, config=part.ta)
        other = cast("PreTrainedModel", changed)
        other.generation_config = copy.deepcopy(given.generation_config)
        return (other, given) if part.is_downwards else (given, other)
    ends = {} if end_of_text is None else {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    values = _canonical(part.architecture, part.student, "model.student")
    changes = _canonical(part.architecture, part.ta, "model.ta")
    # An architecture's own padding would be some token of this tokenizer, whose embedding would then not be trained.
    positions = {} if context is None else _positions(part.architecture, context, {**values, **changes})
    values = {"vocab_size": tokenizer_size, "pad_token_id": None, **ends, **positions, **values}
    student = _fresh(part.architecture, values, "model.student")
    _require_vocabulary(student.config, tokenizer_size)
    return student, _fresh(part.architecture, {**values, **changes}, "model.ta")


def nest_pair(
    part: ModelPart,
    student: PreTrainedModel,
    ta: PreTrainedModel,
    data: Iterable[Batch] | None = None,
    *,
    warm_start: bool = False,
) -> Nested:
    """The nesting that the recipe asks for. The module list of the blocks is found by itself.

    Where sizes alone leave the layout of an axis open, both models are run on a few tokens to find it (not on
    the meta device). A pretrained TA is first put in order, by batches of `data`. With a pretrained Student, or
    `warm_start`, the TA starts as the Student.

    Raises:
        NestingError: the Student does not fit into the TA.
        OrderError: the channels of the TA cannot be put in order.
        RunError: the list of blocks is not to be found.
    """
    is_real = student.device.type != "meta"
    blocks, rule = block_list(student), part.layers if isinstance(part.layers, str) else list(part.layers)
    if rule == "best":  # without weights as many blocks as any others
        kept = {blocks: student.config.num_hidden_layers}
        measured = () if data is None else data
        rule = best_layers(ta, kept, data=measured, num_batches=part.order_batches)[blocks] if is_real else "first"
    if part.is_downwards and is_real:
        ta = _in_order(part, ta, data)
    options: dict[str, Any] = {
        "layers": {blocks: rule},
        "share": part.share if isinstance(part.share, str) else list(part.share),
        "warm_start": is_real and ("ta" if part.is_downwards else warm_start or bool(part.pretrained)),
    }
    try:
        return nest(student, ta, **options)
    except NestingError:
        if not is_real:
            raise
        return nest(student, ta, **options, example=_example(student))


def _in_order(part: ModelPart, ta: PreTrainedModel, data: Iterable[Batch] | None) -> PreTrainedModel:
    if part.order == "none":
        return ta
    ordered = order(
        ta,
        example=_example(ta),
        data=data,
        importance=part.order,
        loss=CausalLM(),
        num_batches=part.order_batches,
    )
    return cast("PreTrainedModel", ordered)


def block_list(model: PreTrainedModel) -> str:
    """The path of the module list that holds the blocks of a decoder, such as "transformer.h".

    Raises:
        RunError: there is no list as long as the configuration says.
    """
    wanted = model.config.num_hidden_layers
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [path for path, module in lists.items() if len(module) == wanted]
    if not found:
        names = ", ".join(f"{path} ({len(module)})" for path, module in lists.items()) or "none"
        raise RunError(f"{type(model).__name__} has no list of its {wanted} blocks; its module lists are: {names}")
    return max(found, key=lambda path: sum(parameter.numel() for parameter in lists[path].parameters()))


def require_context(model: PreTrainedModel, context: int) -> None:
    """Refuse sequences that are longer than a model's positions.

    Raises:
        RunError: they are.
    """
    longest = getattr(model.config, POSITIONS, None)
    if isinstance(longest, int) and context > longest:
        raise RunError(
            f"data.context = {context}: {type(model).__name__} has {longest} positions; expected at most as many, or "
            f"another configuration, such as model.student.n_positions or max_position_embeddings = {context}"
        )


def require_family(nested: Nested, ks: Sequence[int]) -> None:
    """Refuse sub-models that there are not.

    Raises:
        RunError: more wide layers than layers, some of them where the hidden width makes all alike, or any where
            Student and TA share no layer.
    """
    names = layer_names(nested)
    for k in ks:
        if not names and nested.plan.private:
            raise RunError(
                f"family.k: {list(ks)}, but the Student shares no layer with the TA, so that there is nothing between "
                f"them; expected family.k = []"
            )
        if k > len(names):
            raise RunError(f"family.k: {k} layers are to be wide; expected at most {len(names)}, those of the TA")
        if is_one_width(nested) and 0 < k < len(names):
            raise RunError(
                f"family.k: {k} layers are to be wide, but the hidden width itself grows from Student to TA, so that "
                f"wide and narrow layers do not fit together; expected 0 at most, or a TA of the Student's hidden width"
            )


def from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder with fresh weights, in float32.

    Raises:
        RunError: the configuration is not one of a decoder, or cannot be built.
    """
    for name, value in config.to_dict().items():
        if isinstance(value, int) and abs(value) >= 1 << 31:  # so many layers or tokens would take all memory
            raise RunError(f"{config.model_type} cannot be built: {name}={value}; expected a size below 2^31")
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ZeroDivisionError, AssertionError) as error:
        raise RunError(
            f"{config.model_type} cannot be built: {first_sentence(error)}; change the values, or name a decoder of "
            f"Transformers (AutoModelForCausalLM)"
        ) from None


def load_decoder(name: str, who: str, dtype: torch.dtype = torch.float32, *, trust: bool = False) -> PreTrainedModel:
    """A decoder of Transformers with all of its weights.

    Args:
        name: A folder, or a name on the hub.
        who: Stands for it in messages.
        dtype: Of its weights.
        trust: Whether code that comes with it is run.

    Raises:
        RunError: there is no such model, or not all of its weights.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        verify_weights(path)
    try:
        with without_progress_bars():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                os.path.expanduser(name), dtype=dtype, output_loading_info=True, trust_remote_code=trust
            )
    except Exception as error:  # the files are the user's, and what they make Transformers raise is anything
        raise RunError(
            f"{who} cannot be loaded: {first_sentence(error)}; expected a decoder: a folder of Transformers, or a "
            f"name on the hub"
        ) from None
    if missing := sorted(loaded["missing_keys"]):
        raise RunError(
            f"{who} has no weights for {missing[0]} ({len(missing)} such), and Transformers would draw them at random; "
            f"expected a decoder that was saved whole, with the head that gives its logits"
        )
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Transformers reads and writes weights without showing how far it is."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _pretrained(name: str) -> PreTrainedModel:
    who = f"model.pretrained = {name!r}"
    if torch.get_default_device().type != "meta":
        return load_decoder(name, who)
    try:
        config = AutoConfig.from_pretrained(os.path.expanduser(name), trust_remote_code=False)
    except Exception as error:  # see above
        raise RunError(
            f"{who} cannot be loaded: {first_sentence(error)}; expected a decoder: a folder of Transformers, or a "
            f"name on the hub"
        ) from None
    return from_config(config)


def _fresh(architecture: str, values: Mapping[str, Any], table: str) -> PreTrainedModel:
    try:
        config = CONFIG_MAPPING[architecture](**values)
    except Exception as error:  # configurations check themselves with errors of many kinds
        raise RunError(f"{table}: {first_sentence(error)}; change the values") from None
    _require_shared_heads(config, table)
    return from_config(config)


def _require_shared_heads(config: PreTrainedConfig, table: str) -> None:
    """Refuse heads of keys and values (often an architecture's default) that those of queries cannot share."""
    keys = config.to_dict().get("num_key_value_heads")
    if not isinstance(keys, int):
        return
    queries = config.num_attention_heads
    if isinstance(queries, int) and (keys < 1 or queries % keys):
        raise RunError(
            f"{table}: {queries} heads of queries cannot share {keys} of keys and values; expected as many, or a part "
            f"of them: set num_key_value_heads too"
        )


def _canonical(architecture: str, values: Mapping[str, Any], table: str) -> dict[str, Any]:
    """The values by the architecture's own names, each checked to be one.

    Transformers takes whatever name it is given, and ignores those that it does not know.
    """
    if architecture not in CONFIG_MAPPING:
        near = get_close_matches(architecture, list(CONFIG_MAPPING), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "expected a model_type, such as gpt2, llama or qwen3"
        raise RunError(f"model.architecture = {architecture!r}: Transformers has no such kind of model; {hint}")
    default = CONFIG_MAPPING[architecture]()
    aliases = default.attribute_map
    known = sorted({*default.to_dict(), *aliases, "attn_implementation"})
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, n=3, cutoff=0.5) or known
            raise RunError(f"there is no {table}.{key} in {architecture}; did you mean {', '.join(near)}?")
    return {aliases.get(key, key): value for key, value in values.items()}


def _positions(architecture: str, context: int, given: Mapping[str, Any]) -> dict[str, int]:
    """The value of the configuration that is the number of positions; nothing where others of the recipe hang on it."""
    default = CONFIG_MAPPING[architecture]()
    key = default.attribute_map.get(POSITIONS, POSITIONS)
    is_free = key in default.to_dict() and not given.keys() & {key, "rope_parameters", "rope_scaling"}
    return {key: context} if is_free else {}


def untrained_positions(model: PreTrainedModel, context: int) -> str | None:
    """What to say of a model with more positions than sequences are long; None: it has no more."""
    longest = getattr(model.config, POSITIONS, None)
    if not isinstance(longest, int) or longest <= context:
        return None
    name = model.config.attribute_map.get(POSITIONS, POSITIONS)
    return (
        f"the models have {longest:,} positions and are trained on {context:,}: what reads more (benchmarks, matta "
        f"evaluate --text without --context {context}) meets untrained ones; leave model.student.{name} out, or raise "
        f"data.context"
    )


def _require_vocabulary(config: PreTrainedConfig, tokenizer_size: int) -> None:
    if config.vocab_size < tokenizer_size:
        raise RunError(
            f"the Student's vocabulary has {config.vocab_size} entries and the tokenizer {tokenizer_size}; expected at "
            f"least as many: leave model.student.vocab_size out, or take the model's own tokenizer"
        )


def _example(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.arange(EXAMPLE_LENGTH, device=model.device).remainder(model.config.vocab_size)
    return {"input_ids": ids[None]}


def first_sentence(error: BaseException) -> str:
    """An error of others in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" ".join(lines[:2]) or type(error).__name__).rstrip(".")


def make_optimizer(part: TrainPart, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW or Shampoo over the parameters of a module, such as a nesting."""
    groups = parameter_groups(module, part.weight_decay)
    if part.optimizer == "shampoo":
        return Shampoo(groups, lr=part.learning_rate, betas=part.betas)
    for group in groups:
        del group["precondition"]
    return torch.optim.AdamW(groups, lr=part.learning_rate, betas=part.betas, fused=True)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for `Shampoo`. Matrices decay; embeddings (with heads tied to them), norms and biases do not.

    Biases of experts are rows of one tensor, and the `A_log` of Mamba is a table of rates: neither is a matrix.

    Example:
        >>> module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
        >>> [(len(group["params"]), group["weight_decay"]) for group in parameter_groups(module, 0.1)]
        [(1, 0.1), (1, 0.0), (1, 0.0)]
    """
    groups: list[dict[str, Any]] = []
    spared = {id(each) for name, each in module.named_parameters() if name.endswith(("bias", "A_log")) or each.ndim < 2}
    for group in shampoo_groups(module):
        matrices = [each for each in group["params"] if group["precondition"] and id(each) not in spared]
        others = [each for each in group["params"] if not group["precondition"] or id(each) in spared]
        groups.append({**group, "params": matrices, "weight_decay": weight_decay})
        groups.append({**group, "params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def make_scheduler(part: TrainPart, optimizer: torch.optim.Optimizer, num_steps: int) -> LambdaLR:
    """The recipe's learning rate over `num_steps` steps."""
    return LambdaLR(optimizer, rate_factor(part, num_steps))


def rate_factor(part: TrainPart, num_steps: int) -> Callable[[int], float]:
    """The learning rate of each step (counted from 0) as a share of the largest one; it falls after the Student alone.

    Example:
        >>> factor = rate_factor(TrainPart(steps=8, batch=1, learning_rate=1.0, warmup=2, schedule="linear"), 8)
        >>> [round(factor(step), 2) for step in range(8)]
        [0.5, 1.0, 1.0, 0.83, 0.67, 0.5, 0.33, 0.17]
    """
    least = part.final_learning_rate / part.learning_rate
    first = max(part.warmup, part.steps_alone(num_steps))

    def factor(step: int) -> float:
        if step < part.warmup:
            return (step + 1) / part.warmup
        if part.schedule == "constant" or step < first:
            return 1.0
        done = min((step - first) / max(num_steps - first, 1), 1.0)
        left = 1 - done if part.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return least + (1 - least) * left

    return factor
