"""Models that `benchmarks/down.py` tries each tool on: does it give a smaller one that still runs?"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import matta
from down_arms import CannotError, package, silence
from down_tasks import ByteModel, DigitNetwork, FilmRanker, num_parameters

IDS = torch.arange(16).reshape(2, 8)
IMAGES = torch.rand(2, 1, 8, 8)
SMALL: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 16, "num_hidden_layers": 2}


class Recurrent(nn.Module):
    """An embedding, an LSTM and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens, self.rnn = nn.Embedding(64, width), nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.tokens(ids))[0][:, -1])


def _of_transformers(kind: str, size: int, **more: Any) -> nn.Module:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](
        **{**SMALL, "hidden_size": 8 * size, "num_attention_heads": size, "intermediate_size": 16 * size, **more}
    )
    auto = {
        "vit": transformers.AutoModelForImageClassification,
        "bert": transformers.AutoModelForSequenceClassification,
    }
    return auto.get(kind, transformers.AutoModelForCausalLM).from_config(config).eval()


def _encoder(size: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8 * size, size, 16 * size, batch_first=True)
    return nn.Sequential(nn.Embedding(64, 8 * size), nn.TransformerEncoder(layer, 2), nn.Linear(8 * size, 4)).eval()


MODELS: Mapping[str, tuple[Callable[[int], nn.Module], tuple[Any, ...]]] = {
    "ranker": (lambda s: FilmRanker(50, 60, (4 * s, 16 * s, 8 * s)), (IDS[0], IDS[0])),
    "cnn": (lambda s: DigitNetwork((4 * s, 8 * s, 8 * s)).eval(), (IMAGES,)),
    "byte_gpt": (lambda s: ByteModel((16 * s, s, 32 * s)), (IDS,)),
    "lstm": (lambda s: Recurrent(8 * s), (IDS,)),
    "torch_encoder": (_encoder, (IDS,)),
    "gpt2": (lambda s: _of_transformers("gpt2", s, n_inner=16 * s), (IDS,)),
    "llama_gqa": (lambda s: _of_transformers("llama", s, num_key_value_heads=s // 2, head_dim=8), (IDS,)),
    "qwen3": (lambda s: _of_transformers("qwen3", s, num_key_value_heads=s // 2, head_dim=8), (IDS,)),
    "gpt_neox": (lambda s: _of_transformers("gpt_neox", s), (IDS,)),
    "bert": (lambda s: _of_transformers("bert", s), (IDS,)),
    "vit": (lambda s: _of_transformers("vit", s, image_size=8, patch_size=4, num_channels=1), (IMAGES,)),
}
"""Each by its size (4, pruned to 2), with inputs."""


def handled(names: Sequence[str], limit_s: int) -> dict[str, Any]:
    """How many of the models each tool makes smaller in so many seconds each, and why not."""
    tools = {"matta": _by_matta, "torch_pruning": _by_torch_pruning, "model_optimizer": _by_model_optimizer}
    found: dict[str, Any] = {"models_tried": len(names)}
    for tool, prune in tools.items():
        refused = {}
        for name in names:
            build, inputs = MODELS[name]
            torch.manual_seed(0)
            module = build(4)
            try:
                with silence(), _limited(limit_s):
                    smaller = prune(module, build, inputs)
                    out, expected = _logits(smaller(*inputs)), _logits(build(4)(*inputs))
                if out.shape != expected.shape:
                    raise CannotError(f"it returns {tuple(out.shape)} in place of {tuple(expected.shape)}")
                if num_parameters(smaller) >= num_parameters(build(4)):
                    raise CannotError("nothing was pruned")
            except Exception as error:  # whatever a tool raises, it did not handle the model
                refused[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:160]
        found[f"models_handled.{tool}"] = len(names) - len(refused)
        found[f"models_refused.{tool}"] = refused
    return found


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """End what takes longer, as the search through some graphs does."""

    def stop(*_: object) -> None:
        raise CannotError(f"it took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _batch(inputs: tuple[Any, ...]) -> Any:
    return inputs, None


def _by_matta(module: nn.Module, build: Callable[[int], nn.Module], inputs: tuple[Any, ...]) -> nn.Module:
    ta = matta.order(module, example=_batch(inputs), importance="magnitude")
    return matta.extract(matta.nest(build(2), ta, example=_batch(inputs), warm_start="ta"))


def _by_torch_pruning(module: nn.Module, build: Callable[[int], nn.Module], inputs: tuple[Any, ...]) -> nn.Module:
    tp = package("torch_pruning", "torch-pruning")
    module = copy.deepcopy(module)
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        module,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[last],
        output_transform=_logits,
        root_module_types=[nn.Conv2d, nn.Linear, nn.Embedding, nn.LSTM],
    )
    pruner.step()
    return module


def _by_model_optimizer(module: nn.Module, build: Callable[[int], nn.Module], inputs: tuple[Any, ...]) -> nn.Module:
    prune = package("modelopt.torch.prune", "nvidia-modelopt")
    space = {
        "nn.Conv2d": {"*": {"channels_ratio": (0.5, 1.0), "kernel_size": (), "channel_divisor": 1}},
        "nn.Linear": {"*": {"features_ratio": (0.5, 1.0), "feature_divisor": 1}},
    }
    config = {"data_loader": [inputs], "score_func": lambda _: 0.0, "checkpoint": None, "num_iters": 20}
    found, _ = prune.prune(
        copy.deepcopy(module),
        mode=[("fastnas", space)],
        constraints={"params": "90%"},
        dummy_input=inputs if len(inputs) > 1 else inputs[0],
        config=config,
    )
    return found
