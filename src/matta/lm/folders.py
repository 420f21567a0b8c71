"""Write extracted models as folders that Transformers loads.

A model that the stock class of its architecture builds from some configuration is loaded by that class. One whose
blocks have different sizes is loaded by the code that goes along in the folder (`modeling_matta.py`), which needs
Transformers alone. A folder is written under another name, loaded again, compared with the model by what both compute,
and only then moved into place. A model without weights is written from the file that has them, and is compared by its
operators.
"""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import copy
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.utils import GENERATION_CONFIG_NAME

from matta.errors import RunError, SubModelError
from matta.lm.cards import ModelCard, render
from matta.lm.configurations import Fit, build, fit_configuration, signature, without_weights
from matta.lm.decoders import without_progress_bars
from matta.lm.streamed_folders import require_same_operators, save_streamed
from matta.nesting.batches import eval_mode
from matta.nesting.slicing import is_live, materialize, user_class
from matta.sizes.storage import whole_folder
from matta.sizes.streamed_extraction import SavedWeights

CODE: Final = "modeling_matta.py"
_LENGTH: Final = 128  # tokens on which a folder is compared with its model
_ROUNDING: Final = 8  # of the largest output, in units of its precision
_CODE_OF: Final = {"config": "GPT2Config", "model": "GPT2LMHeadModel", "type": "matta_gpt2"}
"""The names in our copy of the code that are replaced by those of the architecture."""


def export(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: ModelCard | None = None,
    weights: SavedWeights | None = None,
) -> Path:
    """Write a model of Transformers as the new folder `path`, and give the path back.

    Args:
        module: What `matta.extract(nested, spec)` gives, or `nested.ta`; it stays as it is. A live model is
            copied first.
        path: Where nothing is yet.
        tokenizer: Goes along; its special tokens are those at which generation ends.
        card: What README.md says beyond the model itself.
        weights: Where those of a live model on the meta device are.

    Raises:
        RunError: there is something at `path`, or the tokenizer has more entries than the model.
        SubModelError: `module` is no model of Transformers, not built of its class's own modules, or computes
            something else than what was written.
    """
    target = Path(path)
    require_new(target)
    model = _plain(module)
    if tokenizer is not None:
        _require_vocabulary(model, tokenizer)
    made, code = _rebuilt(model, fit_configuration(model))
    _set_special_tokens(made, tokenizer)
    with whole_folder(target) as folder:
        with without_progress_bars():
            _add_to(folder, made, code, tokenizer, card or ModelCard(title=target.name), auto_class(model))
            if weights is None:
                made.save_pretrained(folder)
                _require_equal(model, _loaded(folder, type(made), model))
            else:
                _require_same_operators(model, made)
                save_streamed(made, folder, weights.tensors(module))
        for file in folder.iterdir():  # safetensors makes files that only their owner reads
            file.chmod(0o644)
        require_new(target)
    return target


def require_new(target: Path) -> None:
    """Refuse a path where something is.

    Raises:
        RunError: there is.
    """
    if target.exists() or target.is_symlink():
        raise RunError(f"{target} exists; expected a new path: remove it, or write to another")


def require_configuration(module: nn.Module) -> None:
    """Refuse a model that `export` could not write, at the cost of no file and no weight.

    Raises:
        SubModelError: it could not.
    """
    model = _plain(module)
    if not fit_configuration(model).is_uniform:
        shipped_code(model)


def auto_class(model: PreTrainedModel) -> str:
    """The name of the class that loads such a model by its configuration, such as "AutoModelForCausalLM".

    It is the model's own class where Transformers has none.
    """
    kind = user_class(model)
    names = [name for name in dir(modeling_auto) if name.startswith("AutoModel")]
    for name in sorted(names, key=_rank):
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", {})
        found = mapping.get(type(model.config), None)
        if kind in (found if isinstance(found, tuple) else (found,)):
            return name
    return kind.__name__


def _rank(name: str) -> tuple[int, str]:
    first = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")
    last = ("AutoModelForPreTraining", "AutoModelWithLMHead", "AutoModel")
    return (first.index(name) - len(first) if name in first else 1 + last.index(name) if name in last else 0), name


def _plain(module: nn.Module) -> PreTrainedModel:
    plain = materialize(module) if is_live(module) else module
    if not isinstance(plain, PreTrainedModel):
        raise SubModelError(
            f"received a {type(plain).__name__}; expected a model of Transformers (PreTrainedModel), as "
            f"matta.extract gives it; save other modules with torch.save or matta.save"
        )
    return plain


def _require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if isinstance(size, int) and len(tokenizer) > size:
        raise RunError(
            f"the tokenizer has {len(tokenizer)} entries and the model's vocabulary {size}; expected the tokenizer "
            f"that the model was trained with"
        )


# --- the model as it will be loaded ---------------------------------------------------------------


def _rebuilt(model: PreTrainedModel, fit: Fit) -> tuple[PreTrainedModel, str | None]:
    """The model's weights in the class that will load them, and that class's code where it is not stock."""
    config = copy.deepcopy(fit.config)
    kind, code = type(model), None
    if not fit.is_uniform:
        code = shipped_code(model)
        shipped = _imported(code, type(model).__name__)
        kind = getattr(shipped, f"Matta{type(model).__name__}")
        values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        config = shipped.MattaConfig.from_dict({**values, "block_values": fit.blocks})
        name = CODE.removesuffix(".py")
        config.auto_map = {"AutoConfig": f"{name}.MattaConfig", auto_class(model): f"{name}.{kind.__name__}"}
    made = build(kind, config)
    given, wanted = ({key: v for key, v in signature(m).items() if key != ("", "class")} for m in (made, model))
    assert given == wanted, "the configuration has been fitted to the model"
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return made, code


def _require_same_operators(model: PreTrainedModel, made: PreTrainedModel) -> None:
    """Compare a model without weights with the one that its folder will be loaded as."""
    with without_weights():
        loaded = type(made)(copy.deepcopy(made.config))
    loaded.tie_weights()
    require_same_operators(model, loaded.to(model.dtype), _batch(model))


def _loaded(folder: Path, kind: type[PreTrainedModel], model: PreTrainedModel) -> PreTrainedModel:
    """What was written, as loaded by a user of the folder, on the device of `model`."""
    with without_progress_bars():
        loaded = kind.from_pretrained(
            folder, dtype=model.dtype, attn_implementation=getattr(model.config, "_attn_implementation", None)
        )
    return loaded.to(model.device)


def _require_equal(model: PreTrainedModel, loaded: PreTrainedModel) -> None:
    """Compare all tensors, also those that no file holds, and what both models compute on a batch.

    Raises:
        SubModelError: something differs, beyond the rounding of the outputs.
    """
    given, wanted = (dict(_tensors(each)) for each in (loaded, model))
    for name, tensor in wanted.items():
        if name not in given or not torch.equal(given[name].to(tensor.dtype), tensor):
            raise SubModelError(
                f"the folder of this {type(model).__name__} would not hold the model: {name} is another tensor when it "
                f"is loaded; expected a model whose tensors follow from its configuration and its weights"
            )
    batch = _batch(model)
    with eval_mode(model), eval_mode(loaded), torch.no_grad():
        expected, found = (_output(each(**batch)) if batch else None for each in (model, loaded))
    if expected is None or found is None:
        return
    gap, most = (each.abs().max().item() for each in (found - expected, expected))
    if not gap <= _ROUNDING * torch.finfo(model.dtype).eps * most:
        raise SubModelError(
            f"the folder of this {type(model).__name__} would not hold the model: its outputs are {gap:.3g} apart from "
            f"the model's when it is loaded; expected a model that its configuration and its weights describe"
        )


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for names in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        yield from names


def _batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """Token ids to compare two models on, of some sequence longer than usual windows; nothing if it takes others."""
    config = model.config.get_text_config()
    size = getattr(config, "vocab_size", None)
    if model.main_input_name != "input_ids" or not isinstance(size, int):
        return {}
    longest = getattr(config, "max_position_embeddings", None)
    length = min(_LENGTH, longest) if isinstance(longest, int) and longest > 0 else _LENGTH
    ids = torch.randint(size, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def _output(output: Any) -> Tensor:
    """The first tensor of a model's output, the logits where it has any."""
    first: Tensor = output.logits if isinstance(getattr(output, "logits", None), Tensor) else output[0]
    return first.float()


def shipped_code(model: PreTrainedModel) -> str:
    """The code that loads a model whose blocks differ, for the architecture of `model`.

    Raises:
        SubModelError: the class is none of Transformers' own, so that the code could not import it.
    """
    kind, config = type(model), type(model.config)
    for each in (kind, config):
        if getattr(transformers, each.__name__, None) is not each:
            raise SubModelError(
                f"blocks of different sizes need code in the folder, which imports the stock class from Transformers, "
                f"and {each.__name__} is none; expected a class of Transformers, or a uniform sub-model"
            )
    text = Path(__file__).with_name(CODE).read_text(encoding="utf-8")
    text = text.replace(_CODE_OF["type"], f"matta_{config.model_type}")
    return text.replace(_CODE_OF["config"], config.__name__).replace(_CODE_OF["model"], kind.__name__)


def is_own_code(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether all code that would be run with the model in a folder is what this matta writes for its architecture."""
    kind: Any = getattr(transformers, str((config.get("architectures") or [""])[0]).removeprefix("Matta"), None)
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not is_model:
        return False
    names = config.get("auto_map", {}).values()  # "other/repository--module.Class" would be code from elsewhere
    if not all(re.fullmatch(rf"{CODE.removesuffix('.py')}\.\w+", str(name)) for name in names):
        return False
    tokenizer = path / "tokenizer_config.json"
    if tokenizer.is_file() and "auto_map" in json.loads(tokenizer.read_text(encoding="utf-8")):
        return False
    with torch.device("meta"):
        expected = shipped_code(kind(kind.config_class()))
    return {file: file.read_text(encoding="utf-8") for file in path.rglob("*.py")} == {path / CODE: expected}


def _imported(code: str, kind: str) -> Any:
    """The code as a module, among the loaded ones, where Transformers looks for the source of a class."""
    name = f"matta_folder_of_{kind}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__file__ = str(Path(__file__).with_name(CODE))
        exec(compile(code, module.__file__, "exec"), module.__dict__)
        sys.modules[name] = module
    return sys.modules[name]


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Where generation starts and ends is the tokenizer's to say; padding is the end where there is none.

    A model with several ends, such as one that chats and ends each turn, keeps them all.
    """
    if tokenizer is None:
        return
    ids = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
    pad = getattr(tokenizer, "pad_token_id", None)
    _set_ids(model.config, ids)
    if getattr(model, "generation_config", None) is not None:
        _set_ids(model.generation_config, {**ids, "pad_token_id": ids["eos_token_id"] if pad is None else pad})
        model.generation_config = _as_loaded(model.generation_config)


def _set_ids(config: Any, ids: Mapping[str, int | None]) -> None:
    for name, value in ids.items():
        before = getattr(config, name, None)
        if value is not None and not (isinstance(before, list) and value in before):
            setattr(config, name, value)


def _as_loaded(config: GenerationConfig) -> GenerationConfig:
    """The same, to be written whatever it says.

    Published ones contradict themselves (a temperature without sampling). Transformers writes these again unless they
    were changed since they were loaded.
    """
    with tempfile.TemporaryDirectory(prefix="matta-") as folder:
        config.to_json_file(Path(folder) / GENERATION_CONFIG_NAME)
        return GenerationConfig.from_pretrained(folder)


def _add_to(
    folder: Path,
    model: PreTrainedModel,
    code: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    card: ModelCard,
    auto: str,
) -> None:
    """Put everything but the weights into a folder."""
    if code is not None:
        (folder / CODE).write_text(code, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    text = render(card, model, auto_class=auto, own_code=code is not None, has_tokenizer=tokenizer is not None)
    (folder / "README.md").write_text(text, encoding="utf-8")
