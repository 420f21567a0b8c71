"""Transformers folders: what loads from them is the live sub-model, exactly; elsewhere than here, without matta."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import ModelCard as HubCard
from safetensors.torch import save_file
from torch import Tensor, nn

import matta
from matta.choosing.family import Size
from matta.cli import main
from matta.errors import CheckpointError, RunError, SubModelError
from matta.lm import folders, streamed_folders
from matta.lm.cards import Score, card_of
from matta.lm.command_settings import ExtractSettings
from matta.lm.configurations import fit_configuration
from matta.lm.extracting import require_writable, run, spec_of, specs_of
from matta.lm.folders import CODE, auto_class, export
from matta.lm.recipe_files import NESTED, read_recipe
from matta.lm.streamed_folders import require_same_operators
from matta.lm.tokens import load_tokenizer
from matta.lm.trained_runs import RESULTS, write_run
from matta.sizes.saving import WEIGHTS, nest_saved
from matta.sizes.streamed_extraction import SavedWeights
from matta.training.reporting import tensorboard
from matta.training.run_folder import RunFolder

VOCABULARY = 300
IDS = torch.arange(5, 29).view(2, 12)
IDS_AND_MASK = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

Build = Callable[..., nn.Module]


def _build(model: str, config: str, **fixed: Any) -> Build:
    def build(**sizes: Any) -> nn.Module:
        ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
        made = getattr(transformers, model)(getattr(transformers, config)(**{**ids, **fixed, **sizes}))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return made

    return build


def _nest(build: Build, small: dict[str, Any], large: dict[str, Any], layers: str) -> matta.Nested:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return matta.nest(build(**small), build(**{**small, **large}), layers={layers: "ends"}).eval()


_SIZES = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
_GQA = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_LARGE = {"intermediate_size": 40, "num_hidden_layers": 4}
_MORE_HEADS = {**_LARGE, "num_attention_heads": 8, "num_key_value_heads": 4}

NESTINGS: dict[str, Callable[[], matta.Nested]] = {
    "gpt2": lambda: _nest(
        _build("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_head=4, n_positions=64),
        {"n_inner": 24, "n_layer": 3},
        {"n_inner": 40, "n_layer": 4},
        "transformer.h",
    ),
    "llama": lambda: _nest(_build("LlamaForCausalLM", "LlamaConfig"), _GQA, _MORE_HEADS, "model.layers"),
    "qwen3": lambda: _nest(
        _build("Qwen3ForCausalLM", "Qwen3Config", tie_word_embeddings=True), _GQA, _MORE_HEADS, "model.layers"
    ),
    "bert": lambda: _nest(
        _build("BertForSequenceClassification", "BertConfig", num_labels=3), _SIZES, _LARGE, "bert.encoder.layer"
    ),
}
DECODERS = ("gpt2", "llama", "qwen3")
UNIFORM = {"student": "student", "ta": "ta", "narrow": "k=0", "skip": "*.1=skip", "wide, skip": "*=wide,*.2=skip"}
MIXED = {"k=2": "k=2", "skip": "*.0=wide,*.2=skip"}
MIXED_OF = {"gpt2": ["k=2", "skip"], "llama": ["k=2", "skip"]}


@pytest.fixture(scope="module")
def nestings() -> dict[str, matta.Nested]:
    return {name: make() for name, make in NESTINGS.items()}


def _decoder(name: str) -> tuple[str, Callable[..., nn.Module], dict[str, Any], dict[str, Any]]:
    """The list of blocks of an architecture, how it is built, and the sizes of a Student and a TA."""
    small, large = {"num_hidden_layers": 2, "intermediate_size": 24}, {"num_hidden_layers": 4, "intermediate_size": 48}
    rotary = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    if name == "GPT2":
        kind, fixed = "GPT2LMHeadModel", {"n_embd": 16, "n_head": 4, "n_positions": 64}
        return "transformer.h", _build(kind, "GPT2Config", **fixed), {"n_layer": 2, "n_inner": 24}, {"n_layer": 4}
    if name == "Gemma2":
        rotary |= {"head_dim": 4, "query_pre_attn_scalar": 4}
    return "model.layers", _build(f"{name}ForCausalLM", f"{name}Config", **rotary), small, large


def _rope(kind: str, theta: float, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


DIFFERENT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Llama", _rope("default", 1e4), _rope("default", 5e5)),
    ("Llama", _rope("default", 1e4), _rope("linear", 1e4, factor=2.0)),
    ("Llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
    ("Llama", {"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-3}),
    ("Llama", {"hidden_act": "silu"}, {"hidden_act": "gelu"}),
    ("Mistral", {"sliding_window": 8}, {"sliding_window": 16}),
    ("Mistral", {"sliding_window": 8}, {"sliding_window": None}),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, {"use_sliding_window": False}),
    ("Gemma2", {"final_logit_softcapping": 30.0}, {"final_logit_softcapping": None}),
    ("Gemma2", {"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": 2.0}),
    ("Gemma2", {"query_pre_attn_scalar": 4}, {"query_pre_attn_scalar": 16}),
    ("Gemma2", {}, {"layer_types": ["full_attention"] * 4}),
    ("GPT2", {"layer_norm_epsilon": 1e-5}, {"layer_norm_epsilon": 1e-2}),
    ("GPT2", {"scale_attn_by_inverse_layer_idx": False}, {"scale_attn_by_inverse_layer_idx": True}),
]


@pytest.mark.parametrize(("name", "small", "large"), DIFFERENT, ids=lambda each: each if isinstance(each, str) else "")
def test_values_that_no_parameter_shows_are_those_of_each_block(
    name: str, small: dict[str, Any], large: dict[str, Any], tmp_path: Path
) -> None:
    blocks, build, *sizes = _decoder(name)
    torch.manual_seed(0)
    nested = matta.nest(
        build(**sizes[0], **small), build(**{**sizes[0], **sizes[1]}, **large), layers={blocks: "first"}
    ).eval()
    for text in ("student", "k=1", "ta"):
        folder = export(_extract(nested, text), tmp_path / text)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(_logits(loaded), _logits(_live(nested, text) if text != "ta" else nested.ta)), text


def test_a_folder_that_would_compute_something_else_is_not_written(tmp_path: Path) -> None:
    module = _plain_gpt2().eval()
    module.transformer.ln_f.register_forward_hook(lambda part, inputs, output: output * 1.5)
    with pytest.raises(SubModelError, match=r"would not hold the model: its outputs are .* apart from the model's"):
        export(module, tmp_path / "model")
    llama = _extract(NESTINGS["llama"](), "student")
    llama.model.rotary_emb.inv_freq.mul_(2)  # in no file: it follows from the configuration
    with pytest.raises(SubModelError, match=r"model.rotary_emb.inv_freq is another tensor when it is loaded"):
        export(llama, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def _logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(**IDS_AND_MASK).logits
    return logits


def _live(nested: matta.Nested, text: str) -> nn.Module:
    _, spec = spec_of(nested, text)
    return nested.student if spec is None else matta.live(nested, spec).eval()


def _extract(nested: matta.Nested, text: str) -> Any:
    return matta.extract(nested, spec_of(nested, text)[1]).eval()


# ------------------------------------------------------------------------ the stock class


@pytest.mark.parametrize("text", UNIFORM.values(), ids=UNIFORM)
@pytest.mark.parametrize("name", NESTINGS)
def test_the_stock_class_loads_a_uniform_model(
    name: str, text: str, nestings: dict[str, matta.Nested], tmp_path: Path
) -> None:
    nested = nestings[name]
    model = _extract(nested, text)
    before = copy.deepcopy(model.config.to_dict())
    folder = export(model, tmp_path / "model")
    assert model.config.to_dict() == before
    assert not (folder / CODE).exists()
    loaded = getattr(transformers, auto_class(model)).from_pretrained(folder)
    assert type(loaded) is type(nested.ta)
    assert torch.equal(_logits(loaded), _logits(_live(nested, text)))
    if name in DECODERS:
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (name != "llama")
        made = [loaded.generate(**IDS_AND_MASK, **GREEDY, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*made)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def test_a_live_model_is_copied_and_its_dtype_kept(tmp_path: Path) -> None:
    nested = NESTINGS["gpt2"]().bfloat16()
    folder = export(nested.student, tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert {each.dtype for each in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(_logits(loaded), _logits(nested.student))


def test_sizes_are_read_off_where_no_configuration_states_them(tmp_path: Path) -> None:
    widths = {"transformer.h.*.mlp.c_fc": 2.0}
    grown: Any = matta.grow(_plain_gpt2(), widths=widths, example={"input_ids": IDS}).eval()
    assert (grown.config.n_inner, grown.transformer.h[0].mlp.c_fc.nf) == (24, 48)  # as it is documented
    loaded = transformers.AutoModelForCausalLM.from_pretrained(export(grown, tmp_path / "model"))
    assert loaded.config.n_inner == 48
    assert torch.equal(_logits(loaded), _logits(grown))


def _plain_gpt2(**values: Any) -> nn.Module:
    return _build("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_head=4, n_positions=64, n_inner=24, n_layer=2)(**values)


def test_equal_shapes_do_not_make_a_uniform_model() -> None:
    """Blocks with as many weights in more heads are other blocks."""
    nested = matta.nest(_plain_gpt2(n_head=2), _plain_gpt2(), layouts={"*.attn.*": 1}).eval()
    mixed: Any = copy.deepcopy(nested.ta)
    mixed.transformer.h[1].attn = _plain_gpt2(n_head=2).transformer.h[1].attn  # type: ignore[union-attr, index]
    assert fit_configuration(mixed).blocks == {"transformer.h": [{}, {"n_head": 2}]}
    assert fit_configuration(nested.ta).is_uniform  # type: ignore[arg-type]


# ------------------------------------------------------------------------ elsewhere

ELSEWHERE = """
import copy, json, sys
sys.modules["matta"] = None  # what is imported from it fails
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file

greedy = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    given = load_file(folder / "given.safetensors")
    ids, mask = given["ids"], torch.ones_like(given["ids"])
    auto = getattr(transformers, (folder / "auto_class").read_text())
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    logits = lambda m: m(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        mine = found[folder.name] = {
            "class": [each.__name__ for each in type(model).__mro__[:2]],
            "nothing missing": not any(info.values()),
            "logits": torch.equal(logits(model), given["logits"]),
            "dtype": str(model.dtype),
            "copied": torch.equal(logits(copy.deepcopy(model)), given["logits"]),
        }
        again = Path(sys.argv[2]) / folder.name
        model.save_pretrained(again)
        mine["saved again"] = torch.equal(logits(auto.from_pretrained(again, trust_remote_code=True)), given["logits"])
        model.set_attn_implementation("eager")
        held = {part.config._attn_implementation for part in model.modules() if "config" in vars(part)}
        near = 1e-4 if model.dtype == torch.float32 else 0.2
        mine["eager"] = held == {"eager"} and torch.allclose(logits(model), given["logits"], rtol=near, atol=near)
        model.set_attn_implementation("sdpa")
        if auto is transformers.AutoModelForCausalLM:
            tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            mine["tied"] = tied
            kept = model.generate(ids, attention_mask=mask, **greedy)
            mine["cache"] = torch.equal(kept, model.generate(ids, attention_mask=mask, use_cache=False, **greedy))
            heads = [layer.keys.shape[1] for layer in model(ids, use_cache=True).past_key_values.layers]
            mine["key heads"] = heads
            mask[0, :5] = 0  # left padding
            one = model.generate(ids[:1, 5:], attention_mask=mask[:1, 5:], **greedy)
            batch = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, **greedy)
            mine["padding"] = torch.equal(batch[0, 5:], one[0]) and torch.equal(batch[1], kept[1])
    try:
        auto.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        mine["without trust"] = "trust_remote_code=True" in str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def elsewhere(nestings: dict[str, matta.Nested], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without matta finds in the folders of mixed models."""
    root = tmp_path_factory.mktemp("elsewhere")
    for name, nested in {**nestings, "gpt2 in bf16": NESTINGS["gpt2"]().bfloat16()}.items():
        for key in MIXED_OF.get(name, ["k=2"]):
            text = MIXED[key]
            model = _extract(nested, text)
            folder = export(model, root / "models" / f"{name}, {key}")
            logits = _logits(_live(nested, text))
            save_file({"ids": IDS.contiguous(), "logits": logits.contiguous()}, folder / "given.safetensors")
            (folder / "auto_class").write_text(auto_class(model))
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(root / "models"), str(root / "again")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in (*NESTINGS, "gpt2 in bf16") for key in MIXED_OF.get(name, ["k=2"])]
)
def test_mixed_models_load_where_matta_is_not(name: str, key: str, elsewhere: dict[str, Any]) -> None:
    found = elsewhere[f"{name}, {key}"]
    shipped, stock = found.pop("class")
    assert shipped == f"Matta{stock}"
    assert found.pop("dtype") == ("torch.bfloat16" if "bf16" in name else "torch.float32")
    if name != "bert":
        assert found.pop("tied") == (name != "llama")
        heads = {"llama": (4, 2), "qwen3": (4, 2)}.get(name, (4, 4))
        kinds = {"k=2": (0, 1, 1, 0), "skip": (0, 1, 1)}[key]
        assert found.pop("key heads") == [heads[kind] for kind in kinds]
    assert found == dict.fromkeys(found, True)
    assert len(found) == (6 if name == "bert" else 8)


# ------------------------------------------------------------------------ what goes along


def test_tokenizer_and_generation_config_go_along(nestings: dict[str, matta.Nested], tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    folder = export(_extract(nestings["gpt2"], "k=2"), tmp_path / "model", tokenizer=tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded("Ünïcode, 3 × 4")["input_ids"] == tokenizer("Ünïcode, 3 × 4")["input_ids"]
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == tokenizer.eos_token_id != 0
    assert settings.pad_token_id is not None
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["transformers_version"] == transformers.__version__


def test_the_card_says_what_the_model_is(nestings: dict[str, matta.Nested], tmp_path: Path) -> None:
    nested = nestings["llama"]
    name, spec = spec_of(nested, "k=2")
    card = card_of(nested, name, spec, title="A test")
    scores = (
        Score(task="lambada", metric="acc", value=0.25, standard_error=0.01),
        Score(task="a", metric="b", value=2),
    )
    model = _extract(nested, "k=2")
    folder = export(model, tmp_path / "model", card=replace(card, scores=scores, datasets=("allenai/c4",)))
    read = HubCard.load(folder / "README.md")
    assert (read.data.library_name, read.data.pipeline_tag) == ("transformers", "text-generation")
    assert read.data.license is None
    assert read.data.datasets == ["allenai/c4"]
    assert [(each.dataset_name, each.metric_value) for each in read.data.eval_results] == [("lambada", 0.25), ("a", 2)]
    text = read.text
    sizes = [sum(p.numel() for p in module.parameters()) for module in (nested.student, nested.ta, model)]
    assert f"| Student | {sizes[0]:,} | 24 | 3 | 4 | 2 |" in text
    assert f"| Teaching Assistant | {sizes[1]:,} | 40 | 4 | 8 | 4 |" in text
    assert f"| this model: k=2 | {sizes[2]:,} | mixed | 4 | mixed | mixed |" in text
    assert "- wide: `model.layers` 0, 3\n- narrow: `model.layers` 1-2" in text
    assert "| lambada | acc | 0.2500 ± 0.0100 |" in text
    assert "trust_remote_code=True" in text
    assert "2505.23337" in text


# ------------------------------------------------------------------------ what is refused


class Foreign(transformers.GPT2LMHeadModel):
    """A class that only this test has."""


def _odd() -> nn.Module:
    model: Any = _plain_gpt2()
    model.transformer.h[1].attn.scaling = 7.0
    return model


def _foreign() -> nn.Module:
    model: Any = Foreign(_plain_gpt2().config)
    model.transformer.h[1] = _plain_gpt2(n_inner=20).transformer.h[1]  # type: ignore[union-attr, index]
    return model


@pytest.mark.parametrize(
    ("module", "tokenizer", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), None, SubModelError, r"received a Linear; expected a model of Transformers"),
        (
            lambda: _plain_gpt2(vocab_size=99),
            "bytes",
            RunError,
            r"tokenizer has 257 entries .* vocabulary 99; expected",
        ),
        (_odd, None, SubModelError, r"no GPT2Config builds this GPT2LMHeadModel: transformer.h.1.attn.scaling is 7.0"),
        (_foreign, None, SubModelError, r"Foreign is none; expected a class of Transformers, or a uniform sub-model"),
    ],
)
def test_what_cannot_be_written_is_refused(
    module: Callable[[], nn.Module], tokenizer: str | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as raised:
        export(module(), tmp_path / "model", tokenizer=tokenizer and load_tokenizer(tokenizer))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_is_left_half_written(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(RunError, match=r"model exists; expected a new path"):
        export(_plain_gpt2(), tmp_path / "model")
    tokenizer = load_tokenizer("bytes")
    tokenizer.save_pretrained = lambda folder: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        export(_plain_gpt2(), tmp_path / "other", tokenizer=tokenizer)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


# ------------------------------------------------------------------------ the command


def test_models_are_named(nestings: dict[str, matta.Nested]) -> None:
    nested = nestings["gpt2"]
    assert spec_of(nested, "student") == ("student", None)
    assert spec_of(nested, "ta") == ("ta", matta.wide(nested))
    assert spec_of(nested, "k=3") == ("k=3", matta.wide_narrow_wide(nested, 3))
    name, spec = spec_of(nested, "transformer.h.[01]=wide, transformer.h.1=skip")
    assert name == "mix-wsnn"
    assert spec is not None
    assert list(spec.choices.values()) == ["wide", "skip", "narrow", "narrow"]
    assert list(specs_of(nested, ["family", "k=1", "k=2"], (2, 0))) == ["student", "k=0", "k=2", "ta", "k=1"]


@pytest.mark.parametrize("text", ["big", "k=x", "k=", "transformer.h.9=wide", "*=medium", "", "transformer.h.0"])
def test_a_text_that_names_no_model_is_refused(text: str, nestings: dict[str, matta.Nested]) -> None:
    with pytest.raises(
        RunError, match=r"received '.*; expected student, ta, family, k=NUMBER, or layers as in tr"
    ) as e:
        spec_of(nestings["gpt2"], text)
    assert "\n" not in str(e.value)
    with pytest.raises(SubModelError, match="received k=5; expected 0 to 4"):
        spec_of(nestings["gpt2"], "k=5")


@pytest.fixture
def a_run(nestings: dict[str, matta.Nested], tmp_path: Path) -> Path:
    """The folder of a run, without the training."""
    path, nested = tmp_path / "run", nestings["gpt2"]
    recipe = read_recipe(Path(__file__).parents[1] / "recipes" / "gpt2_mini", ["family.k=[2]"])
    path.mkdir()
    write_run(path, recipe, nested, load_tokenizer("bytes"))
    matta.save(nested, path / NESTED)
    row = {"name": "k=2", "bits_per_byte": 1.25, "standard_error": 0.5, "perplexity": 3.0}
    rows = [row, {**row, "name": "ta", "bits_per_byte": None}]
    (path / RESULTS).write_text(json.dumps({"steps": 12, "models": rows}))
    return path


def test_a_size_of_a_run_is_chosen_and_exported(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = json.loads((a_run / "recipe.json").read_text())
    positions = json.loads((a_run / "configs" / "ta" / "config.json").read_text())["n_positions"]
    changed["data"] |= {"evaluate_bytes": 500, "context": positions}
    (a_run / "recipe.json").write_text(json.dumps(changed))
    choose = ["choose", str(a_run), "--parameters", "1000000000", "--evaluations", "3", "--json"]
    assert main(choose) == 0
    first = json.loads(capsys.readouterr().out)
    assert (a_run / "family.json").is_file() and first["chosen"]["quality"] > 0
    assert main(choose) == 0
    assert json.loads(capsys.readouterr().out) == first, "read back, not measured again"
    pytest.importorskip("onnxruntime")
    out = a_run / "model.onnx"
    assert main(["export", str(a_run), "k=0", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert out.stat().st_size == found["bytes"] and found["error"] < 1e-4
    assert found["bits_per_byte"] == pytest.approx(found["bits_per_byte_before"], abs=1e-4)
    assert main(["export", str(a_run), "k=0", "--out", str(a_run / "model.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "safetensors", "by the name of the file"
    assert main(["export", str(a_run), "k=0", "--out", str(out), "--format", "pickle"]) == 2
    assert main(["export", str(a_run), "k=0", "--out", str(out), "--format", "safetensors", "--int8"]) == 2


def test_a_run_is_served_with_the_logits_of_the_last_position_alone(a_run: Path) -> None:
    pytest.importorskip("starlette")
    from matta.serving.served_models import ServedModels
    from matta.serving.serving_command import named_serving

    serving = named_serving(str(a_run), last=True)
    whole, last = (
        ServedModels(serving.nested, example={"input_ids": torch.ones(2, 5).long()}, open_axes=(0, 1), logits=logits)
        for logits in (None, serving.logits)
    )
    ids = {"input_ids": torch.arange(10).view(2, 5)}
    assert torch.equal(last.run("TA", ids)[0]["logits"], whole.run("TA", ids)[0]["logits"][:, -1])


def test_a_run_is_reported_with_its_recipe_losses_and_the_command(
    a_run: Path, nestings: dict[str, matta.Nested], capsys: pytest.CaptureFixture[str]
) -> None:
    nested = nestings["gpt2"]
    spec = dict.fromkeys(matta.layer_names(nested), "wide")
    costs = {"parameters": 10, "bytes": 40, "flops": 2.0, "activation_bytes": 4.0, "latencies": ()}
    matta.Family(sizes=(Size(name="TA", layers=spec, quality=1.0, **costs),)).save(a_run)
    tracker = tensorboard(a_run, 0)
    for step in (1, 2):
        tracker.log({"loss/student": 2.0 / step, "evaluation/ta": 3.0, "learning_rate": 0.1}, step=step)
    tracker.finish()
    assert main(["report", str(a_run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["curves"] == ["loss, nats", "evaluation"] and told["heat_maps"] == 0
    text = (a_run / "report.html").read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["run"] == str(a_run) and data["metric"] == "bits per byte"
    assert data["curves"][0]["lines"] == [{"name": "student", "points": [[1, 2], [2, 1]], "mean_of": 1}]
    assert ["train.optimizer", "shampoo"] in data["settings"] and ["family.k", "2"] in data["settings"]
    assert data["plan"]["notes"][1] == "transformer.h: 3 blocks in the TA's 4: [0, 1, 3]"
    assert "<h1>Family of sizes: gpt2_mini</h1>" in text


def test_models_of_a_run_are_extracted(
    a_run: Path, nestings: dict[str, matta.Nested], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(ExtractSettings(run=a_run, models=("family", "k=0")))["models"]
    assert [(each["name"], each["layers"], each["own_code"]) for each in found] == [
        ("student", 3, False),
        ("k=2", 4, True),
        ("ta", 4, False),
        ("k=0", 4, False),
    ]
    for each in found:
        sizes = sum(p.numel() for p in _extract(nestings["gpt2"], each["name"]).parameters())
        assert each["parameters"] == sizes
        card = (Path(each["folder"]) / "README.md").read_text()
        assert ("1.2500 ± 0.5000" in card) == (each["name"] == "k=2")
        assert "\n12 steps on pydoc" in card  # what was done, whatever the recipe says
    loaded = transformers.AutoModelForCausalLM.from_pretrained(found[2]["folder"])
    assert torch.equal(_logits(loaded), _logits(nestings["gpt2"].ta))
    printed = capsys.readouterr().out
    assert f'AutoModelForCausalLM.from_pretrained("{found[0]["folder"]}")' in printed
    assert f'from_pretrained("{found[1]["folder"]}", trust_remote_code=True)' in printed


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


QUICK = [("gpt2", "ta"), ("gpt2", "k=2"), ("llama", "*=wide,*.2=skip"), ("qwen3", "student")]
FROM_FILES = [
    pytest.param(name, text, id=f"{name}-{text}", marks=() if (name, text) in QUICK else pytest.mark.stress)
    for name in DECODERS
    for text in (*UNIFORM.values(), *MIXED.values())
]


@pytest.mark.parametrize(("name", "text"), FROM_FILES)
def test_a_folder_written_from_a_file_is_the_one_written_from_memory(
    name: str, text: str, nestings: dict[str, matta.Nested], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_folders, "_operators", None)  # what is built of the same needs no run
    nested = nestings[name]
    saved = matta.save(nested, tmp_path / "saved")
    with init_empty_weights(include_buffers=False):
        modules = [type(nested.ta)(each.config) for each in (nested.student, nested.ta)]
    for module in modules:
        module.tie_weights()
    mapped = nest_saved(saved, *modules).eval()
    weights = SavedWeights(saved / WEIGHTS, mapped)
    live = _live(mapped, text)
    tokenizer = load_tokenizer("bytes")
    expected = export(_extract(nested, text), tmp_path / "memory" / "model", tokenizer=tokenizer)
    found = export(live, tmp_path / "file" / "model", tokenizer=tokenizer, weights=weights)
    assert _files(found) == _files(expected)
    assert all(each.is_meta for each in mapped.parameters())


def test_models_are_compared_without_weights() -> None:
    made, same, other = (_plain_gpt2().to("meta") for _ in range(3))
    require_same_operators(made, same, {"input_ids": IDS})  # type: ignore[arg-type]
    other.transformer.h[1].attn.scaling = 7.0  # type: ignore[union-attr, index]
    with pytest.raises(
        SubModelError, match=r"operator \d+ is aten.mul.Scalar, and another, or of other values, when it"
    ):
        require_same_operators(made, other, {"input_ids": IDS})  # type: ignore[arg-type]
    llama, turned = (_extract(NESTINGS["llama"](), "student") for _ in range(2))
    turned.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(SubModelError, match=r"model.rotary_emb.inv_freq is another tensor when it is loaded"):
        require_same_operators(llama, turned, {})


def test_weights_that_transformers_stores_otherwise_are_written_too(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "hidden_size": 16, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    build = _build("MixtralForCausalLM", "MixtralConfig", **sizes)
    nested = matta.nest(build(), build(num_hidden_layers=2), layers={"model.layers": "first"}).eval()
    saved = matta.save(nested, tmp_path / "saved")
    weights = SavedWeights(saved / WEIGHTS, nested)
    expected = export(matta.extract(nested).eval(), tmp_path / "memory" / "model")
    assert _files(export(nested.student, tmp_path / "file" / "model", weights=weights)) == _files(expected)


def test_a_run_that_has_not_ended_is_extracted_from_its_checkpoint(
    a_run: Path, nestings: dict[str, matta.Nested], tmp_path: Path
) -> None:
    expected = _files(Path(run(ExtractSettings(run=a_run, models=("k=2",)))["models"][0]["folder"]))
    shutil.rmtree(a_run / NESTED)
    with pytest.raises(RunError, match=r"has not ended and has no checkpoint; resume it: matta train RECIPE --resume"):
        run(ExtractSettings(run=a_run))
    folder = RunFolder(tmp_path / "fit", resume=False)
    folder.begin()
    cotrain = matta.CoTraining(nestings["gpt2"], matta.objectives.CausalLM())
    folder.save(7, cotrain, {})
    folder.wait()
    for made in folder.path.iterdir():
        shutil.move(made, a_run)
    found = Path(run(ExtractSettings(run=a_run, models=("k=2",)))["models"][0]["folder"])
    assert found == a_run / "models-step-7" / "k-2"
    card, old = _files(found).pop("README.md").decode(), expected.pop("README.md").decode()
    assert "\n7 steps on pydoc" in card and "\n12 steps on pydoc" in old
    ignored = ("README.md", "CRC32SUMS")
    assert all(content == expected[name] for name, content in _files(found).items() if name not in ignored)


def test_damaged_weights_are_found_on_demand(a_run: Path, tmp_path: Path) -> None:
    file = a_run / NESTED / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run(ExtractSettings(run=a_run, out=tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"nested.safetensors is damaged: its checksum"):
        run(ExtractSettings(run=a_run, out=tmp_path / "again", check=True))
    assert not (tmp_path / "again").exists()


def test_models_that_a_run_has_written_are_told_again(a_run: Path) -> None:
    first = run(ExtractSettings(run=a_run))
    written = {file: file.stat().st_mtime_ns for file in (a_run / "models").rglob("*")}
    assert run(ExtractSettings(run=a_run)) == first
    assert {file: file.stat().st_mtime_ns for file in (a_run / "models").rglob("*")} == written


def test_a_model_that_cannot_be_written_stops_no_other(
    a_run: Path, nestings: dict[str, matta.Nested], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = folders.fit_configuration

    def refused(model: Any) -> Any:
        fit = real(model)
        if fit.is_uniform:
            return fit
        raise SubModelError("no configuration builds it")

    monkeypatch.setattr(folders, "fit_configuration", refused)
    with pytest.raises(RunError, match="1 of 3 models could not be written: k=2: no configuration builds it"):
        run(ExtractSettings(run=a_run, models=("family",)))
    assert sorted(file.name for file in (a_run / "models").iterdir()) == ["student", "ta"]
    with pytest.raises(SubModelError, match="k=2 of this family could not be written: no configuration builds it"):
        require_writable(nestings["gpt2"], (2,))


def test_all_folders_are_new_before_any_is_written(a_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "ta").mkdir(parents=True)
    with pytest.raises(RunError, match=r"ta exists; expected a new path"):
        run(ExtractSettings(run=a_run, models=("student", "ta"), out=out))
    assert [file.name for file in out.iterdir()] == ["ta"]
    (a_run / RESULTS).write_text('{"models": [{}]}')
    with pytest.raises(RunError, match=r"results.json is damaged: KeyError\('bits_per_byte'\); remove it to extract"):
        run(ExtractSettings(run=a_run, out=tmp_path / "new"))
