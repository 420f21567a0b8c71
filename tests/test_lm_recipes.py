"""Recipes of language models: read, planned, trained, stopped, resumed, and trained by two processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import matta
from matta.choosing.measuring import measure_cost
from matta.cli import main
from matta.errors import GrowthError, RunError
from matta.lm import extracting, recipe_training
from matta.lm.command_settings import ExtractSettings, TrainSettings
from matta.lm.continued_runs import require_same
from matta.lm.costs import cost_of, family_costs, optimizer_bytes, saved_bytes
from matta.lm.decoders import build_pair, make_optimizer, nest_pair, parameter_groups, rate_factor
from matta.lm.documents import held_out_documents, pydoc_topics, read_by_both, text_source
from matta.lm.gpu_memory import choices, fitting
from matta.lm.planning import nest_on_meta, plan_figures
from matta.lm.recipe import ModelPart, SourcePart, TrainPart, TurnsPart
from matta.lm.recipe_files import read_recipe, recipe_from_values, recipe_to_values
from matta.lm.recipe_training import Meter, run
from matta.lm.run_notes import notes_of
from matta.lm.trained_runs import load_run, read_run_recipe
from matta.training.cotraining import CoTraining
from matta.training.run_folder import RunFolder
from test_fitting import assert_equal

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 16}
GQA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 24}
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": ({**SMALL, "n_inner": 24}, {"n_layer": 4, "n_inner": 40}),
    "llama": (GQA, {"num_hidden_layers": 4, "intermediate_size": 40}),
    "qwen2": (GQA, {"num_hidden_layers": 4, "intermediate_size": 40}),
    "qwen3": ({**GQA, "head_dim": 8}, {"num_hidden_layers": 4, "intermediate_size": 40}),
}


def values(folder: Path, architecture: str = "gpt2", **train: Any) -> dict[str, Any]:
    """A tiny recipe over a made-up text."""
    file = folder / "text.txt"
    if not file.exists():
        random = Random(0)
        file.write_text("\n".join(" ".join(random.choices("one two three four".split(), k=9)) for _ in range(60)))
    student, ta = ARCHITECTURES[architecture]
    return {
        "name": "tiny",
        "model": {"architecture": architecture, "student": student, "ta": ta},
        "data": {
            "train": {"path": str(file), "separator": "\n"},
            "evaluate": str(file),
            "evaluate_bytes": 200,
            "tokenizer": "bytes",
            "context": 16,
        },
        "train": {"steps": 7, "batch": 4, "learning_rate": 0.01, "checkpoint_every": 2, "warmup": 2, **train},
        "family": {"k": [0, 2]},
    }


def write(folder: Path, recipe: dict[str, Any]) -> Path:
    """The recipe as a file of TOML."""
    lines = []
    for table, content in recipe.items():
        if isinstance(content, dict):
            lines += [f"[{table}]", *(f"{key} = {toml(value)}" for key, value in content.items())]
        else:
            lines.append(f"{table} = {toml(content)}")
    path = folder / "tiny.toml"
    path.write_text("\n".join(lines))
    return path


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)


def pair(architecture: str, **more: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    student, ta = ARCHITECTURES[architecture]
    return build_pair(ModelPart(architecture=architecture, student={**student, **more}, ta=ta), 257)


def nested_of(architecture: str) -> matta.Nested:
    return nest_pair(ModelPart(architecture=architecture, ta={"n_layer": 0}), *pair(architecture))


# --- recipes --------------------------------------------------------------------------------------


def test_the_paper_s_recipe_is_planned_without_weights() -> None:
    recipe = read_recipe(RECIPES / "gpt2_medium_c4")
    nested = nest_on_meta(recipe)
    assert {parameter.device.type for parameter in nested.parameters()} == {"meta"}
    figures = plan_figures(recipe, nested)
    models = {each["name"]: each for each in figures["models"]}
    assert models["student"]["parameters"] == 354_823_168
    assert models["ta"]["parameters"] == 808_115_200
    names = [f"k={k}" for k in range(0, 37, 4)]
    assert list(models) == ["student", *names, "ta"]
    # 36 layers of GPT-2 Medium, and twice 1024 x 4096 weights with 4096 biases for each that is wide
    assert models["k=0"]["parameters"] == 354_823_168 + 12 * 12_596_224
    for low, high in pairwise(names):
        assert models[high]["parameters"] - models[low]["parameters"] == 4 * (2 * 1024 * 4096 + 4096)
    assert models["k=36"] == {**models["ta"], "name": "k=36"}
    assert figures["tokens"] >= 100_000_000_000
    assert figures["steps"] == -(-100_000_000_000 // (512 * 1024))
    assert figures["nesting"]["blocks"] == [{"list": "transformer.h", "of": 36, "student": list(range(24))}]
    assert figures["nesting"]["shared"] == 354_823_168
    assert figures["memory_bytes"]["weights"] == 4 * 808_115_200
    assert recipe.data.train == SourcePart(hub="allenai/c4", config="en", split="train")


def test_the_small_recipe_is_planned_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPES / "gpt2_mini"), "--json", "train.steps=10"]) == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert figures["steps"] == 10
    assert figures["memory_bytes"]["total"] == sum(figures["memory_bytes"].values()) - figures["memory_bytes"]["total"]
    assert "Where the Student lives in the TA" in err


def test_a_way_that_fits_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(RECIPES / "gpt2_mini"), "--gpus", "8", "--json", "train.optimizer=adamw"]
    assert main([*command, "--memory-gb", "0.001"]) == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)["gpus"]
    totals = [each["memory"]["total"] for each in figures["choices"]]
    ways = [(each["sharding"], each["activation_checkpointing"]) for each in figures["choices"]]
    assert ways == [(each, again) for again in (False, True) for each in ("none", "whole", "block")]
    assert (figures["chosen"], figures["bytes_over"]) == (None, min(totals) - 10**6)
    assert "None fits 0.001 GB: the smallest is" in err
    recipe = read_recipe(RECIPES / "gpt2_mini", ["train.optimizer=adamw"])
    found = choices(recipe, nest_on_meta(recipe), num_gpus=8)
    for index, choice in enumerate(found):
        first = next(i for i, total in enumerate(totals) if total <= totals[index])
        assert fitting(found, totals[index]) is found[first], choice


def test_a_batch_that_cannot_be_trained_with_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPES / "gpt2_mini"), "train.micro_batch=3"]) == 2
    assert "train.batch = 8 cannot be shared out over 1 process(es) with 3 sequences" in capsys.readouterr().err


def test_a_recipe_survives_json(tmp_path: Path) -> None:
    recipe = recipe_from_values(values(tmp_path), "tiny")
    assert recipe_from_values(json.loads(json.dumps(recipe_to_values(recipe))), "json") == recipe


def test_overrides_replace_values_of_every_type(tmp_path: Path) -> None:
    path = write(tmp_path, values(tmp_path))
    recipe = read_recipe(
        path.with_suffix(""),
        [
            "train.tokens=1e6",
            "train.optimizer=shampoo",
            "train.betas=[0.8, 0.9]",
            "train.sample=true",
            "train.weights.distill=2",
            "train.turns.alone=0.25",
            "model.layers=[0, 3]",
            "model.ta.n_layer=8",
            "data.train=a b.txt",
            "data.evaluate.field=content",
            "family.k=[]",
        ],
    )
    train = recipe.train
    assert (train.steps, train.tokens, train.optimizer, train.betas) == (None, 1_000_000, "shampoo", (0.8, 0.9))
    assert (train.sample, train.weights.distill, recipe.model.layers) == (True, 2.0, (0, 3))
    assert train.turns == TurnsPart(alone=0.25) and read_recipe(path).train.turns is None
    assert (recipe.model.ta["n_layer"], recipe.family.k) == (8, ())
    assert recipe.data.train == SourcePart(path="a b.txt")
    assert recipe.data.evaluate == SourcePart(path=str(tmp_path / "text.txt"), field="content")
    recipe = read_recipe(path, ["data.train.hub=a/b", "data.train.config=en", "data.evaluate.hub=a/b"])
    assert recipe.data.train == SourcePart(hub="a/b", config="en", separator="\n")
    assert recipe.data.evaluate == SourcePart(hub="a/b")
    recipe = read_recipe(
        path, ["data.train.hub=a/b", "data.train.path=c.txt", "model.pretrained=d", "model.student={}"]
    )
    assert recipe.data.train == SourcePart(path="c.txt", separator="\n")
    assert (recipe.model.pretrained, recipe.model.architecture) == ("d", "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", "there is no train.lerning_rate; did you mean train.learning_rate?"),
        ("trian.steps=1", "there is no trian; did you mean train?"),
        ("train.steps=many", "train.steps = 'many': expected a whole number"),
        ("train.sample=1", "train.sample = 1: expected true or false"),
        ("train.turns.alone=2", "train.turns: alone = 2.0: expected a number from 0 to 1"),
        ("train.optimizer=adam", "train.optimizer = 'adam': expected 'adamw' or 'shampoo'"),
        ("train.betas=[1]", "train.betas = [1]: expected a list of 2, each a number"),
        ("train.learning_rate=nan", "train.learning_rate = nan: expected a number"),
        ("train.steps=0", "train: steps = 0: expected 1 or more"),
        ("model.pretrained=a", "model: received values in both student and ta beside pretrained"),
        ("model={pretrained = 'a'}", "model: received neither student nor ta beside pretrained"),
        ("model={pretrained = 'nowhere', student = {n_layer = 1}}", "model.pretrained = 'nowhere' cannot be loaded"),
        ("model.layers=best", "model: layers = 'best': expected first, last, even, ends, or a list of indices"),
        ("model.order=size", "model.order = 'size': expected 'activation' or 'taylor' or 'magnitude' or 'none'"),
        ("model.order_batches=0", "model: order_batches = 0: expected 1 or more"),
        ("model.layers=middle", "model: layers = 'middle': expected first, last, even, ends, or a list of indices"),
        ("family.k=[1, 1]", "family: k = [1, 1]: expected numbers of layers from 0 up, each once"),
        ("data=3", "data = 3: expected a table"),
        ("data.train={hub = 'a', path = 'b'}", "data.train: received path='b' and hub='a'; expected one of them"),
        ("train.steps", "received 'train.steps'; expected KEY=VALUE"),
        ("train.steps.x=1", "train.steps.x=1: steps is not a table, but 7"),
        ("model.student.n_layers=1", "there is no model.student.n_layers in gpt2; did you mean n_layer"),
        ("model.architecture=gpt3", "model.architecture = 'gpt3': Transformers has no such kind of model; did you"),
        ("model.ta.n_layer=1", "the Student has 2 blocks and the TA only 1"),
        ("model.ta.n_inner=8", "transformer.h.0.mlp.c_fc.weight is 24 long on axis 1 and the TA's"),
        ("data.context=17", "data.context = 17: GPT2LMHeadModel has 16 positions; expected at most as many"),
        ("family.k=[5]", "family.k: 5 layers are to be wide; expected at most 4"),
        ("model.ta={n_embd = 32, n_layer = 4}", "family.k: 2 layers are to be wide, but the hidden width itself grows"),
        ("model.share=none", "family.k: [0, 2], but the Student shares no layer with the TA"),
        ("model.student.vocab_size=256", "the Student's vocabulary has 256 entries and the tokenizer 257"),
        ("model.student.n_head=3", "change the values"),
        ("train.micro_batch=3", "train.batch = 4 cannot be shared out over 1 process(es) with 3 sequences"),
        ("data.train=nowhere.txt", "nowhere.txt leads to no text"),
        ("data.tokenizer=nowhere", "nowhere"),
        ("train.teacher=nowhere", "nowhere"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    override: str, message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path, values(tmp_path)), tmp_path / "out"
    assert main(["train", str(path), override, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("matta train: ")
    assert err.count("\n") == 1
    assert message is None or message in err
    assert not out.exists()


def test_the_recipe_of_the_guide_is_one() -> None:
    text = (RECIPES.parent / "docs" / "guide.md").read_text(encoding="utf-8")
    found = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    recipe = recipe_from_values({"name": "guide", **tomllib.loads(found[1])}, "guide")
    assert matta.layer_names(nest_on_meta(recipe)) == tuple(f"model.layers.{i}" for i in range(6))


def test_a_recipe_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no recipe .*gpt2_mni; .*recipes has: gpt2_medium_c4, gpt2_mini"):
        read_recipe(RECIPES / "gpt2_mni")
    (tmp_path / "broken.toml").write_text("[model")
    with pytest.raises(RunError, match=r"broken.toml is not TOML: "):
        read_recipe(tmp_path / "broken")
    with pytest.raises(RunError, match=r"tiny: model: ta: the table is empty; expected"):
        recipe_from_values({"name": "tiny", "model": {"architecture": "gpt2"}}, "tiny")


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_heads_that_an_architecture_adds_by_default_must_fit(device: str) -> None:
    part = ModelPart(architecture="qwen2", student={**SMALL, "intermediate_size": 24}, ta={"intermediate_size": 40})
    with (
        torch.device(device),
        pytest.raises(RunError, match=r"model.student: 4 heads of queries cannot share 32 .* set num_key_value_heads"),
    ):
        build_pair(part, 257)


@pytest.mark.parametrize("architecture", ["olmo", "phi3"])  # which pad with token 1, and with one beyond the bytes
def test_no_token_is_an_architecture_s_padding(architecture: str) -> None:
    part = ModelPart(architecture=architecture, student=GQA, ta={"intermediate_size": 40})
    for model in build_pair(part, 257, end_of_text=256):
        embedding: Any = model.get_input_embeddings()
        embedding(torch.arange(257)).sum().backward()
        assert embedding.weight.grad.all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flops_are_what_torch_counts_and_the_family_adds_up(architecture: str) -> None:
    student, ta = pair(architecture, attn_implementation="eager")  # torch counts no fused attention on a CPU
    nested = nest_pair(ModelPart(architecture=architecture, ta={"n": 0}), student, ta)
    costs = family_costs(nested, range(5), context=16)
    for k, cost in costs.items():
        spec = matta.wide_narrow_wide(nested, k)
        assert cost == cost_of(matta.live(nested, spec), 16)
        module = matta.extract(nested, spec)
        assert cost.parameters == sum(each.numel() for each in module.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(2, 16, dtype=torch.int64), use_cache=False)
        # Rotary angles are a product of two vectors, computed once for the whole model: no token pays for them.
        rotary = 2 * 2 * 16 * len(getattr(getattr(ta.base_model, "rotary_emb", None), "inv_freq", ()))
        assert abs(counter.get_total_flops() - 32 * cost.flops_per_token) <= rotary
    assert costs[4] == cost_of(ta, 16)


LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "intermediate_size": 24,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 3,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize(
    ("architecture", "sizes"), [("mixtral", {**GQA, "num_local_experts": 3}), ("deepseek_v3", LATENT)]
)
@pytest.mark.parametrize("per_token", [1, 2, 3])
def test_experts_are_counted_that_a_token_is_sent_to(architecture: str, sizes: dict[str, Any], per_token: int) -> None:
    torch.manual_seed(0)
    experts = {**sizes, "num_experts_per_tok": per_token, "attn_implementation": "eager"}
    model, _ = build_pair(ModelPart(architecture=architecture, student=experts, ta={"num_hidden_layers": 3}), 257)
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 16, dtype=torch.int64), use_cache=False)
    rotary = 2 * 2 * 16 * 2
    assert abs(counter.get_total_flops() - 32 * cost_of(model, 16).flops_per_token) <= rotary


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mixtral"])
def test_flops_planned_are_those_by_which_a_size_is_chosen(architecture: str) -> None:
    torch.manual_seed(0)
    sizes = ARCHITECTURES[architecture][0] if architecture in ARCHITECTURES else {**GQA, "num_local_experts": 3}
    part = ModelPart(architecture=architecture, student=sizes, ta={"num_hidden_layers": 3})
    model = build_pair(part, 257)[0].eval()
    measured = measure_cost(model, {"input_ids": torch.arange(32).view(2, 16)}).flops
    assert measured == 16 * cost_of(model, 16).flops_per_token


def test_a_model_that_runs_on_no_fake_tensors_has_no_planned_memory() -> None:
    sizes = {**GQA, "num_local_experts": 3, "num_experts_per_tok": 2}
    model, _ = build_pair(ModelPart(architecture="mixtral", student=sizes, ta={"intermediate_size": 40}), 257)
    model.set_experts_implementation("eager")
    with pytest.raises(RunError, match=r"^MixtralForCausalLM cannot be run on fake tensors.* \(\w+: [^\n]*$"):
        saved_bytes(model.config, batch=1, context=8, precision="no")


def test_flops_of_a_run_are_those_of_the_models_that_its_steps_train(tmp_path: Path) -> None:
    nested = nest_on_meta(recipe_from_values(values(tmp_path), "plan"))
    names, choices_of = matta.layer_names(nested), product(("wide", "narrow"), repeat=4)
    mixes = [matta.live(nested, matta.SubModel(dict(zip(names, each, strict=True)))) for each in choices_of]
    student, ta, *drawn = (cost_of(each, 16).flops_per_token for each in (nested.student, nested.ta, *mixes))
    between = sum(drawn) / len(drawn)
    turns = {"turns": {"alone": 0.25, "student_chance": 0.4}}
    expected = [
        ({}, student + ta),
        ({"sample": True}, student + ta + between),
        (turns, 0.25 * student + 0.75 * (student + ta)),
        ({**turns, "sample": True}, 0.25 * student + 0.75 * (ta + 0.4 * student + 0.6 * between)),
    ]
    for settings, flops in expected:
        figures = plan_figures(recipe_from_values(values(tmp_path, steps=8, **settings), "plan"), nested)
        assert figures["training_flops"] == pytest.approx(3 * 8 * 4 * 16 * flops, abs=0.5)


def test_a_family_of_hidden_widths_is_counted_model_by_model() -> None:
    student, ta = {**SMALL, "n_inner": 24}, {"n_embd": 32, "n_inner": 48}
    part = ModelPart(architecture="gpt2", student=student, ta=ta)
    nested = nest_pair(part, *build_pair(part, 257))
    for k, cost in family_costs(nested, range(len(matta.layer_names(nested)) + 1), context=16).items():
        module = matta.extract(nested, matta.wide_narrow_wide(nested, k))
        assert cost.parameters == sum(each.numel() for each in module.parameters())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_planned_activations_are_what_autograd_keeps(architecture: str, precision: str) -> None:
    model = pair(architecture)[1].train()
    model.config.use_cache = False
    seen = {parameter.untyped_storage()._cdata: parameter.detach() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        model.base_model(torch.zeros(3, 16, dtype=torch.int64))
    real = sum(each.untyped_storage().nbytes() for key, each in kept.items() if key not in seen)
    assert real == saved_bytes(model.config, batch=3, context=16, precision=precision)


@pytest.mark.parametrize("optimizer", ["adamw", "shampoo"])
def test_planned_optimizer_state_is_what_a_step_leaves(optimizer: Any) -> None:
    nested = nested_of("llama")
    part = TrainPart(steps=1, batch=1, learning_rate=0.1, optimizer=optimizer)
    made = make_optimizer(part, nested)
    for parameter in nested.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    tensors = {t.untyped_storage()._cdata: t for state in made.state.values() for t in state.values() if t.numel() > 1}
    if isinstance(made, matta.Shampoo):
        for part_ in made._parts.values():
            for stack in part_.stacks:
                tensors |= {t.untyped_storage()._cdata: t for t in (stack.gradient, stack.scratch)}
    assert sum(t.untyped_storage().nbytes() for t in tensors.values()) == optimizer_bytes(nested, part)


def test_decay_spares_embeddings_norms_and_biases() -> None:
    nested = nested_of("gpt2")
    names = {id(parameter): name for name, parameter in nested.ta.named_parameters()}
    optimizer = make_optimizer(TrainPart(steps=1, batch=1, learning_rate=0.1), nested)
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    matrices = {name for name, p in nested.ta.named_parameters() if p.ndim == 2 and ".h." in name}
    assert decayed == matrices
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, nested.parameters()))


def test_decay_spares_the_biases_of_experts_and_rates_of_states() -> None:
    experts = {**GQA, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}
    states = {"num_hidden_layers": 1, "hidden_size": 16, "state_size": 4}
    for architecture, sizes in (("gpt_oss", experts), ("mamba", states)):
        part = ModelPart(architecture=architecture, student=sizes, ta={"num_hidden_layers": 3})
        with torch.device("meta"):
            _, model = build_pair(part, 257)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = parameter_groups(model, 0.1)
        spared = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
        expected = {name for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(("bias", "A_log"))}
        assert any(dict(model.named_parameters())[name].ndim == 2 for name in expected)
        assert spared == expected | {name for name in names.values() if "embed" in name}


def test_the_rate_rises_and_falls_to_its_end() -> None:
    part = TrainPart(steps=10, batch=1, learning_rate=2.0, final_learning_rate=0.2, warmup=4, schedule="cosine")
    factor = rate_factor(part, 10)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(7) == pytest.approx((1 + 0.1) / 2)
    assert factor(10) == pytest.approx(0.1)
    assert rate_factor(TrainPart(steps=9, batch=1, learning_rate=2.0, schedule="constant"), 9)(8) == 1.0


# --- texts ----------------------------------------------------------------------------------------


def test_text_that_is_trained_on_and_evaluated_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = values(tmp_path, steps=1)
    recipe["data"]["train"] = {"path": str(tmp_path / "*.txt"), "separator": "\n"}
    recipe["family"] = {"k": []}
    told = f"data.evaluate reads what data.train reads: {tmp_path / 'text.txt'}; figures of it are no held-out ones"
    with pytest.warns(UserWarning, match=re.escape(told)):
        run(TrainSettings(recipe=write(tmp_path, recipe), out=tmp_path / "out"))
    assert told in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    other = SourcePart(path=str(shutil.copy(tmp_path / "text.txt", tmp_path / "other")))
    c4 = SourcePart(hub="allenai/c4", config="en")
    pairs = [("pydoc", "pydoc"), (str(tmp_path), str(tmp_path / "text.txt"))]
    assert [read_by_both(*(SourcePart(path=path) for path in pair)) is None for pair in pairs] == [True, False]
    assert read_by_both(SourcePart(path=str(tmp_path / "text.txt")), other) is None
    assert read_by_both(c4, dataclasses.replace(c4, split="validation")) is None
    assert "reads: allenai/c4, train; figures" in str(read_by_both(c4, c4))


def test_steps_too_few_for_the_warm_up_or_the_ramp_are_told(tmp_path: Path) -> None:
    student, _ = pair("gpt2")
    recipe = values(tmp_path, steps=50, warmup=50, ramp={"start": 49, "steps": 10})
    del recipe["data"]["evaluate"]
    assert [*notes_of(recipe_from_values(recipe, "r"), student, None)] == []
    recipe["data"]["passes"] = 1
    told = [*notes_of(recipe_from_values(recipe, "r"), student, num_samples=40)]
    assert [each.partition(":")[0] for each in told] == [
        "the text ends after 10 of 50 steps (data.passes = 1), before the learning rate has come to its end; expected "
        "train.steps=10, or more passes",
        "the learning rate rises over 50 steps, and the run has 10",
        "the distillation comes in at step 49, and the run has 10",
    ]
    recipe["train"]["weights"] = {"distill": 0.0}
    assert len([*notes_of(recipe_from_values(recipe, "r"), student, num_samples=40)]) == 2


def test_the_topics_of_cpython_are_split_by_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train, held_out = pydoc_topics()
    source = SourcePart(path="pydoc")
    assert held_out_documents(text_source(source), 10**9) == train
    assert held_out_documents(text_source(source, held_out=True), 10**9) == held_out
    assert 0.08 < sum(map(len, held_out)) / sum(map(len, [*train, *held_out])) < 0.12
    assert not set(train) & set(held_out)
    assert len("".join(held_out_documents(text_source(source, held_out=True), 5000)).encode()) == 5000


# --- training -------------------------------------------------------------------------------------


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a run by name."""
    nested = load_run(path).nested
    return {name: parameter.detach() for name, parameter in nested.named_parameters()}


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, stop: Callable[[], object]) -> None:
    """Do something in the middle of a run."""
    steps: list[int] = []

    def after_step(self: Meter, cotrain: CoTraining) -> None:
        steps.append(1)
        if len(steps) == step:
            stop()

    monkeypatch.setattr(Meter, "after_step", after_step)


def crash() -> None:
    raise ZeroDivisionError


SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"optimizer": "shampoo", "sample": True, "ramp": {"start": 1, "steps": 3}},
    "llama": {"micro_batch": 2, "schedule": "linear"},
    "qwen2": {"precision": "bf16"},
    "qwen3": {"evaluate_every": 3, "sample": True},
}


KILLED = [pytest.param(each, marks=() if each == "gpt2" else pytest.mark.stress) for each in ARCHITECTURES]


@pytest.mark.parametrize("architecture", KILLED)
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, values(tmp_path, architecture, **SETTINGS[architecture]))
    whole = run(TrainSettings(recipe=path, out=tmp_path / "whole"))
    assert whole is not None
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        stop_at(patch, 5, crash)
        with pytest.raises(ZeroDivisionError):
            run(TrainSettings(recipe=path, out=out))
    assert sorted(each.name for each in out.glob("checkpoint-*")) == ["checkpoint-00000002", "checkpoint-00000004"]
    with pytest.raises(RunError, match=r"has not ended; resume it: matta train RECIPE --resume --out"):
        load_run(out)
    assert main(["train", str(path), "--resume", "--out", str(out), "--json"]) == 0
    resumed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert_equal(weights(tmp_path / "whole"), weights(out))
    assert resumed["evaluations"] == whole["evaluations"]
    same = ("name", "parameters", "bits_per_byte", "perplexity", "standard_error")
    assert [[each[key] for key in same] for each in resumed["models"]] == [
        [each[key] for key in same] for each in whole["models"]
    ]
    assert whole["tokens"] == 7 * 4 * 16


def test_a_run_at_a_constant_rate_is_prolonged_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {**values(tmp_path, schedule="constant", sample=True, ramp={"start": 2, "steps": 6}), "family": {"k": [2]}}
    path = write(tmp_path, recipe)
    assert run(TrainSettings(recipe=path, overrides=("train.steps=9",), out=tmp_path / "long")) is not None
    out = tmp_path / "prolonged"
    assert run(TrainSettings(recipe=path, overrides=("train.steps=4",), out=out)) is not None
    extracting.run(ExtractSettings(run=out, models=("k=1",)))
    (out / "family.json").write_text("{}")
    short = weights(out)
    resumed = TrainSettings(recipe=path, overrides=("train.steps=9",), out=out, resume=True)
    results = run(resumed)
    assert results is not None and results["steps"] == 9
    assert_equal(weights(out), weights(tmp_path / "long"))
    assert read_run_recipe(out).train.steps == 9
    assert sorted(each.name for each in (out / "models").iterdir()) == ["k-2", "student", "ta"]
    aside = out / "ended-4"
    assert sorted(each.name for each in aside.iterdir()) == ["family.json", "models", "nested", "results.json"]
    assert_equal(dict(matta.load(aside / "nested", *pair("gpt2")).named_parameters()), short)
    capsys.readouterr()
    assert main(["train", str(path), "train.steps=5", "--resume", "--out", str(out)]) == 2
    assert "was begun with 9 steps, and now it is to have 5; expected as many or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("train", "what"),
    [({}, "a cosine schedule"), ({"schedule": "constant", "turns": {"alone": 0.5}}, "turns")],
)
def test_a_run_whose_steps_hang_on_its_length_is_not_prolonged(
    train: dict[str, Any], what: str, tmp_path: Path
) -> None:
    recipe, longer = (recipe_from_values(values(tmp_path, **{**train, "steps": steps}), "r") for steps in (4, 9))
    message = rf"begun with 4 steps and {what} made for them, so that one of 9 would have gone otherwise; expected as"
    with pytest.raises(RunError, match=message):
        require_same(longer, recipe, tmp_path)
    with_tokens = values(tmp_path, **{**train, "tokens": 4 * 4 * 16 - 1})
    del with_tokens["train"]["steps"]
    require_same(recipe_from_values(with_tokens, "r"), recipe, tmp_path)


def test_ctrl_c_leaves_a_run_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path, values(tmp_path)), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert main(["train", str(path), "--out", str(out)]) == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == f"matta train: stopped after step 3; resume with the same command and --resume --out {out}"
    assert main(["train", str(path), "train.batch=8", "--resume", "--out", str(out)]) == 2
    assert "was begun with train.batch = 4, and now it is 8; expected the same" in capsys.readouterr().err
    assert main(["train", str(path), "--out", str(out)]) == 2
    assert f"{out} exists and holds a run; resume it with --resume" in capsys.readouterr().err
    assert main(["train", str(path), "--resume", "--out", str(out), "family.k=[1]"]) == 0
    assert read_run_recipe(out).family.k == (1,)
    run(TrainSettings(recipe=path, out=tmp_path / "whole"))
    assert_equal(weights(out), weights(tmp_path / "whole"))
    assert sorted(each.name for each in (out / "models").iterdir()) == ["k-1", "student", "ta"]


def test_a_run_killed_while_it_ends_can_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainSettings(recipe=write(tmp_path, values(tmp_path, steps=1)), out=tmp_path / "out", resume=True)
    run(settings)
    remove = shutil.rmtree

    def remove_half(path: Path, **options: bool) -> None:
        if "student" not in Path(path).name:
            remove(path, **options)
        else:
            (Path(path) / "config.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_half)
        with pytest.raises(KeyboardInterrupt, match=rf"by the same command with --resume --out {settings.out}$"):
            run(settings)
    (tmp_path / "out" / "models" / ".ta-half_written").mkdir()
    run(settings)
    assert sorted(each.name for each in (tmp_path / "out" / "models").iterdir()) == ["k-0", "k-2", "student", "ta"]


def test_a_run_that_fails_at_once_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path, values(tmp_path)), tmp_path / "out"
    stop_at(monkeypatch, 1, crash)
    with pytest.raises(ZeroDivisionError):
        run(TrainSettings(recipe=path, out=out))
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    for more in ([], ["--resume"]):
        assert main(["train", str(path), "--out", str(out), *more]) == 2
        message = f"{out} exists and holds no run; expected a new folder: name another with --out"
        assert message in capsys.readouterr().err
    assert [each.name for each in out.iterdir()] == ["mine.txt"]


def test_a_run_that_another_has_begun_at_the_same_time_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both find no folder; the second, which comes to train later, does not remove that of the first."""
    path, out = write(tmp_path, values(tmp_path)), tmp_path / "out"
    first, wrote = RunFolder(out, resume=True), recipe_training.write_run

    def write_after_another(*arguments: Any) -> None:
        wrote(*arguments)
        first.begin()

    monkeypatch.setattr(recipe_training, "write_run", write_after_another)
    assert main(["train", str(path), "--out", str(out)]) == 2
    assert f"{out} is in use: another process trains there" in capsys.readouterr().err
    first.close()
    assert (out / "fit.json").is_file() and (out / "recipe.json").is_file()


def test_a_run_whose_text_ends_says_how_long_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = values(tmp_path, steps=1000, warmup=0, checkpoint_every=1000)
    recipe["data"] = {**recipe["data"], "passes": 1}
    recipe["family"] = {"k": []}
    with pytest.warns(UserWarning, match=r"the text ends after \d+ of 1,000 steps \(data.passes = 1\), before the"):
        results = run(TrainSettings(recipe=write(tmp_path, recipe), out=tmp_path / "out"))
    assert results is not None
    assert 0 < results["steps"] < 1000
    most = results["text"]["samples"] // 4
    shown = capsys.readouterr().out
    assert f"the text ends after {most} of 1,000 steps" in shown
    assert re.search(r"text: 60 documents, [\d,]+ bytes, [\d,]+ tokens, passed over 1.0\d times", shown)
    assert results["steps"] - most in (0, 1)
    card = (tmp_path / "out" / "models" / "student" / "README.md").read_text()
    assert f"\n{results['steps']} steps on " in card


def test_folders_pretrain_teach_and_are_what_was_trained(tmp_path: Path) -> None:
    first = values(tmp_path)
    results = run(TrainSettings(recipe=write(tmp_path, first), out=tmp_path / "first"))
    assert results is not None
    folders = {each["name"]: Path(each["folder"]) for each in results["models"]}
    loaded = load_run(str(tmp_path / "first"))
    ids = torch.arange(16)[None]
    for name, module in (("student", loaded.nested.student), ("ta", loaded.nested.ta)):
        stock = AutoModelForCausalLM.from_pretrained(folders[name])
        assert torch.equal(stock(ids).logits, module(ids).logits)

    second = {**first, "model": {"pretrained": str(folders["student"]), "ta": {"n_layer": 3, "n_inner": 40}}}
    second["train"] = {**first["train"], "steps": 1, "learning_rate": 1e-12, "warmup": 0, "teacher": str(folders["ta"])}
    second["family"] = {"k": []}
    assert run(TrainSettings(recipe=write(tmp_path, second), out=tmp_path / "second")) is not None
    again = load_run(tmp_path / "second")
    for module in (again.nested.student, again.nested.ta):  # the TA starts as good as the Student
        torch.testing.assert_close(module(ids).logits, loaded.nested.student(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_fresh_models_have_the_positions_that_are_trained(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = values(tmp_path, architecture, steps=1)
    given = recipe["model"]["student"]
    recipe["model"]["student"] = {key: value for key, value in given.items() if key != "max_position_embeddings"}
    recipe["family"] = {"k": []}
    for name, text, longest in (("free", "", 16), ("given", "max_position_embeddings=40", 40)):
        key, _, value = text.partition("=")
        recipe["model"]["student"] |= {key: int(value)} if key else {}
        results = run(TrainSettings(recipe=write(tmp_path, recipe), out=tmp_path / name))
        assert results is not None
        for row in results["models"]:
            assert AutoConfig.from_pretrained(row["folder"]).max_position_embeddings == longest
        told = "the models have 40 positions and are trained on 16: what reads more (benchmarks, matta evaluate --text"
        assert (told in capsys.readouterr().out) == (longest == 40)


def test_positions_that_other_values_hang_on_are_left_alone() -> None:
    rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    part = ModelPart(architecture="llama", student={**GQA, "rope_parameters": rope}, ta={"intermediate_size": 40})
    student = {key: value for key, value in part.student.items() if key != "max_position_embeddings"}
    made, _ = build_pair(dataclasses.replace(part, student=student), 257, context=16)
    assert made.config.max_position_embeddings == 2048


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize(
    "generation",
    [
        {"do_sample": True, "temperature": 0.6, "eos_token_id": [256, 257]},  # as of models that chat
        {"temperature": 0.6, "eos_token_id": 256},  # which Transformers writes only as it was read
    ],
)
def test_how_a_pretrained_model_generates_goes_along(way: str, generation: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    pair("llama", vocab_size=258, eos_token_id=generation["eos_token_id"])[way == "down"].save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps(generation))
    recipe = values(tmp_path, steps=1)
    sizes = {"ta": {"intermediate_size": 40}} if way == "up" else {"student": {"intermediate_size": 16}}
    recipe |= {"model": {"pretrained": str(base), **sizes}, "family": {"k": []}}
    assert run(TrainSettings(recipe=write(tmp_path, recipe), out=tmp_path / "out")) is not None
    extracting.run(ExtractSettings(run=tmp_path / "out", models=("student", "ta"), out=tmp_path / "again"))
    expected = {**generation, "pad_token_id": 256}
    for folder in (tmp_path / "out" / "models", tmp_path / "again"):
        for name in ("student", "ta"):
            found = json.loads((folder / name / "generation_config.json").read_text())
            assert {key: found.get(key) for key in expected} == expected
            assert "trust_remote_code" not in found
            config = json.loads((folder / name / "config.json").read_text())
            assert config["eos_token_id"] == generation["eos_token_id"]


@pytest.mark.parametrize("alone", [1.0, 0.5])
def test_in_turns_the_ta_is_the_student_while_that_is_alone(alone: float, tmp_path: Path) -> None:
    recipe = values(tmp_path, steps=4, warmup=1, sample=True, turns={"alone": alone, "student_chance": 0.5})
    recipe["family"] = {"k": []}
    assert run(TrainSettings(recipe=write(tmp_path, recipe), out=tmp_path / "out")) is not None
    nested = load_run(tmp_path / "out").nested
    student, ta = (module(torch.arange(16)[None]).logits for module in (nested.student, nested.ta))
    assert torch.allclose(student, ta, atol=1e-5) == (alone == 1.0)
    rates = [rate_factor(recipe_from_values(recipe, "turns").train, 4)(step) for step in range(4)]
    assert rates == ([1.0] * 4 if alone == 1.0 else [1.0, 1.0, 1.0, pytest.approx(0.5)])


@pytest.mark.parametrize(
    "importance", ["activation", *(pytest.param(each, marks=pytest.mark.stress) for each in ("taylor", "none"))]
)
def test_a_pretrained_ta_s_student_starts_as_its_slice(importance: str, tmp_path: Path) -> None:
    large = pair("gpt2")[1]
    large.save_pretrained(tmp_path / "large")
    recipe = values(tmp_path, steps=1, learning_rate=1e-12, warmup=0)
    smaller = {"n_layer": 2, "n_inner": 24, "n_embd": 12, "n_head": 3}
    recipe["model"] = {"pretrained": str(tmp_path / "large"), "student": smaller, "layers": "best", "order": importance}
    recipe["family"] = {"k": []}
    assert run(TrainSettings(recipe=write(tmp_path, recipe), out=tmp_path / "out")) is not None
    nested = load_run(tmp_path / "out").nested
    ids = torch.arange(16)[None]
    torch.testing.assert_close(nested.ta(ids).logits, large.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(nested.student.transformer.wte.weight, nested.ta.transformer.wte.weight[:, :12])
    moved = not torch.allclose(nested.ta.transformer.wte.weight, large.transformer.wte.weight)
    assert moved == (importance != "none")


def test_a_pretrained_ta_s_student_must_be_smaller_and_can_be_planned(tmp_path: Path) -> None:
    pair("llama")[1].save_pretrained(tmp_path / "large")
    part = ModelPart(pretrained=str(tmp_path / "large"), student={"intermediate_size": 20, "num_hidden_layers": 2})
    recipe = values(tmp_path, "llama")
    recipe["model"] = {"pretrained": part.pretrained, "student": dict(part.student), "layers": "best"}
    recipe["family"] = {"k": [0, 2]}
    nested = nest_on_meta(recipe_from_values(recipe, "plan"))
    assert nested.plan.layers[0].num_ta == 4
    larger = ModelPart(pretrained=part.pretrained, student={"intermediate_size": 80}, order="none")
    with pytest.raises(matta.MattaError, match=r"expected the TA to be at least as large on each axis"):
        nest_pair(larger, *build_pair(larger, 257))
    wrong = ModelPart(pretrained=part.pretrained, student={"intermediate_sise": 8})
    with pytest.raises(GrowthError, match=r"has no such value; did you mean intermediate_size"):
        build_pair(wrong, 257)


def test_a_pretrained_student_s_ta_must_be_larger(tmp_path: Path) -> None:
    pair("gpt2")[0].save_pretrained(tmp_path / "student")
    with pytest.raises(GrowthError, match="shrinks"):
        build_pair(ModelPart(pretrained=str(tmp_path / "student"), ta={"n_inner": 8}), 257)
    body = pair("llama")[0].base_model
    body.save_pretrained(tmp_path / "body")
    with pytest.raises(RunError, match=r"body' has no weights for lm_head.weight \(1 such\), and"):
        build_pair(ModelPart(pretrained=str(tmp_path / "body"), ta={"intermediate_size": 40}), 257)
    (tmp_path / "student" / "model.safetensors").write_bytes(b"cut")
    for name in ("nowhere", str(tmp_path / "student")):
        with pytest.raises(RunError, match=rf"model.pretrained = '{name}' cannot be loaded"):
            build_pair(ModelPart(pretrained=name, ta={"n_inner": 8}), 257)


def train_by_two(recipe: Path, out: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "matta", "train", str(recipe), *overrides, "--out", str(out), "--json"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, "--processes", "2"], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout)["processes"] == 2


def test_processes_and_micro_batches_train_as_one_whatever_labels_are_masked(tmp_path: Path) -> None:
    recipe = values(tmp_path, "llama", steps=4)  # which has no dropout
    recipe["data"]["mask_boundaries"] = True
    path = write(tmp_path, recipe)
    run(TrainSettings(recipe=path, out=tmp_path / "one"))
    run(TrainSettings(recipe=path, out=tmp_path / "small", overrides=("train.micro_batch=1",)))
    train_by_two(path, tmp_path / "two")
    begun_by_two = tmp_path / "two" / "checkpoint-00000002"
    assert begun_by_two.is_dir()
    shutil.copytree(tmp_path / "two", tmp_path / "changed", ignore=shutil.ignore_patterns("*00004", "nested", "models"))
    run(TrainSettings(recipe=path, out=tmp_path / "changed", resume=True))
    for other in ("two", "small", "changed"):
        torch.testing.assert_close(weights(tmp_path / other), weights(tmp_path / "one"), atol=1e-5, rtol=1e-4)


@pytest.mark.stress
@pytest.mark.parametrize("sharding", ["block", "whole"])
def test_a_sharded_run_is_that_of_one_process_extracted_and_resumed(sharding: str, tmp_path: Path) -> None:
    path = write(tmp_path, values(tmp_path, "llama", steps=4, optimizer="shampoo"))
    run(TrainSettings(recipe=path, out=tmp_path / "one"))
    recomputed = "train.activation_checkpointing=true"
    train_by_two(path, tmp_path / "two", f"train.sharding={sharding}", recomputed)
    begun_by_two = tmp_path / "two" / "checkpoint-00000002"
    assert len(list(begun_by_two.glob("shard-*.safetensors"))) == 2
    extract = partial(extracting.run, ExtractSettings(run=tmp_path / "two", models=("k=2",), check=True))
    at_end = load_file(Path(extract()["models"][0]["folder"]) / "model.safetensors")
    shutil.rmtree(tmp_path / "two" / "nested")
    unfinished = Path(extract()["models"][0]["folder"])
    assert unfinished == tmp_path / "two" / "models-step-4" / "k-2"
    assert_equal(load_file(unfinished / "model.safetensors"), at_end)
    shutil.rmtree(tmp_path / "two" / "checkpoint-00000004")
    run(TrainSettings(recipe=path, out=tmp_path / "two", resume=True))
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), atol=1e-5, rtol=1e-4)
