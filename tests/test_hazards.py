"""What was seen to go wrong when a model runs on slices of another one's weights: one test or more each."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import matta
from architectures import ConvolutionalNetwork, LanguageModel, SwiGlu, Transformer
from cases import Batch, Case, copy_back, images, logits, places, plain_student, tokens
from matta.errors import MattaError, NestingError, ProbeError
from matta.sizes.submodels import live
from zoo import CASES, case

QKV, OUT = "blocks.*.attention.qkv.*", "blocks.*.attention.out.weight"


def _cotraining(nested: matta.Nested) -> matta.CoTraining:
    weights = matta.Weights(student=0.7, ta=1.3, distill=0.5)
    return matta.CoTraining(nested, matta.objectives.Classification(), weights=weights).train()


def _gradients(cotrain: matta.CoTraining) -> dict[str, Tensor]:
    return {name: p.grad for name, p in cotrain.nested.ta.named_parameters() if p.grad is not None}


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda t, n=name: f"{n}: {t}", **tolerance)


# ------------------------------------------------------------------------ activation checkpointing


class Checkpointed(Transformer):
    """The same encoder, whose blocks are computed again in the backward pass."""

    reentrant: bool | None = None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found = []
    for setting in (None, reentrant):
        torch.manual_seed(0)
        student = Checkpointed(order="3 heads hd").double()
        ta = Checkpointed(order="3 heads hd", heads=4, width=12, depth=3).double()
        student.reentrant = ta.reentrant = setting
        cotrain = _cotraining(matta.nest(student, ta, layers={"blocks": "last"}, layouts={QKV: 3}))
        cotrain(case("transformer-width").batch()).loss.backward()
        found.append(_gradients(cotrain))
    _assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_by_transformers_gives_the_same_gradients(reentrant: bool) -> None:
    chosen = case("gpt2-width-depth-first")
    found = []
    for checkpointing in (False, True):
        student, ta = chosen.build()
        if checkpointing:
            for module in (student, ta):
                module.activation_checkpointing_enable({"use_reentrant": reentrant})
        cotrain = matta.CoTraining(chosen.nested(student, ta), matta.objectives.CausalLM()).train()
        cotrain(chosen.batch()).loss.backward()
        found.append(_gradients(cotrain))
    _assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------ fused projections


def _fused(order: str, **sizes: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    small, large = Transformer(order=order), Transformer(order=order, **{"heads": 4, "width": 12, **sizes})
    return small.double(), large.double()


def test_a_fused_projection_without_a_layout_is_refused_with_what_to_declare() -> None:
    with pytest.raises(NestingError, match=r"blocks\.0\.attention\.qkv\.weight.*layouts="):
        matta.nest(*_fused("3 heads hd"))


@pytest.mark.parametrize(("order", "wrong"), [("3 heads hd", 1), ("heads 3 hd", 3), ("3 heads hd", 6)])
def test_the_probe_names_a_wrong_layout(order: str, wrong: int) -> None:
    nested = matta.nest(*_fused(order), layouts={QKV: wrong, OUT: 1})
    with pytest.raises(ProbeError, match=r"declare layouts=.*blocks\.\*\.attention\.qkv"):
        matta.probe(nested, case("transformer-width").batch())


@pytest.mark.parametrize(("order", "right"), [("3 heads hd", 3), ("heads 3 hd", 1)])
def test_the_probe_accepts_the_right_layout_and_leaves_the_weights_alone(order: str, right: int) -> None:
    student, ta = _fused(order, depth=3)
    before = copy.deepcopy(ta.state_dict())
    nested = matta.nest(student, ta, layers={"blocks": "even"}, layouts={QKV: right, OUT: 1})
    matta.probe(nested, case("transformer-width").batch())
    assert all(torch.equal(before[name], tensor) for name, tensor in ta.state_dict().items())
    assert all(parameter.grad is None for parameter in nested.parameters())


@pytest.mark.parametrize("order", ["3 heads hd", "heads 3 hd"])
def test_an_example_shows_what_shapes_leave_open(order: str) -> None:
    batch = case("transformer-width").batch()
    student, ta = _fused(order)
    nested = matta.nest(student, ta, example=batch)
    declared = matta.nest(student, ta, layouts={QKV: 3 if order == "3 heads hd" else 1, OUT: 1})
    for name, placement in declared.plan.placements.items():
        found = nested.plan.placements[name].axes
        assert [axis.positions() for axis in found] == [axis.positions() for axis in placement.axes], name


DIFFERENT_BY_DESIGN = {
    "the router has more experts to choose from": ("moe-experts", "moe-experts-width-d_model"),
    "the TA's upper recurrent layer has no Student counterpart": ("lstm-embeddings-width-depth",),
    "rotary halves that are declared as one vector": ("llama_gqa-head_dim", "gpt_neox-d_model-head_dim-depth"),
}
PROBED = [each for each in CASES if not any(each.id in ids for ids in DIFFERENT_BY_DESIGN.values())]


@pytest.mark.parametrize("case", PROBED, ids=lambda case: case.id)
def test_the_probe_accepts_what_is_declared_or_known(case: Case) -> None:
    matta.probe(case.nest(), case.batch())


UNKNOWN = [each for each in PROBED if each.cuts and each.layouts != {} and not each.id.endswith("-declared")]


@pytest.mark.parametrize("case", UNKNOWN, ids=lambda case: case.id)
def test_without_its_declaration_a_nesting_is_refused(case: Case) -> None:
    with pytest.raises(NestingError, match="declare"):
        matta.nest(*case.build(), layers=case.layers, private=list(case.private))


@pytest.mark.parametrize("case", [each for each in CASES if each.cuts], ids=lambda case: case.id)
def test_with_an_example_instead_of_a_declaration_a_nesting_is_right_or_refused(case: Case) -> None:
    student, ta = case.build()
    batch = case.batch()
    try:
        nested = matta.nest(student, ta, layers=case.layers, private=list(case.private), example=batch)
    except (NestingError, ProbeError) as error:
        remedy = str(error)
        assert "layouts=" in remedy
    else:
        plain = plain_student(case, student, ta)
        assert torch.equal(logits(nested.student.eval(), batch), logits(plain.eval(), batch))


# ------------------------------------------------------------------------ tied weights


def _tied_pair() -> tuple[LanguageModel, LanguageModel]:
    torch.manual_seed(0)
    small = LanguageModel(4, [SwiGlu(4, 5, fused=False)])
    return small.double(), LanguageModel(6, [SwiGlu(6, 7, fused=False)]).double()


def _untie(model: LanguageModel) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def test_tied_weights_are_one_parameter_and_are_tied_again_on_extraction() -> None:
    nested = matta.nest(*_tied_pair())
    names = [name for name, _ in nested.student.named_parameters()]
    assert "embedding.weight" in names
    assert "head.weight" not in names
    extracted = matta.extract(nested)
    assert extracted.head.weight is extracted.embedding.weight
    assert matta.extract(nested, matta.wide(nested)).head.weight.shape == (11, 6)
    assert sum(p is extracted.head.weight for p in extracted.parameters()) == 1


def test_a_student_that_does_not_tie_what_the_ta_ties_is_refused() -> None:
    student, ta = _tied_pair()
    _untie(student)
    with pytest.raises(NestingError, match=r"head\.weight.*private"):
        matta.nest(student, ta)


def test_a_student_that_ties_what_the_ta_does_not_stays_tied() -> None:
    student, ta = _tied_pair()
    _untie(ta)
    nested, (inputs, labels) = matta.nest(student, ta), case("swiglu-width").batch()
    matta.CoTraining(nested, matta.objectives.CausalLM()).train()((inputs, labels)).loss.backward()
    extracted = matta.extract(nested).eval()
    assert extracted.head.weight is extracted.embedding.weight
    assert torch.equal(extracted(*inputs), nested.student.eval()(*inputs))


# ------------------------------------------------------------------------ buffers


def test_each_model_keeps_its_own_running_statistics() -> None:
    chosen = case("cnn-depth")
    student, ta = chosen.build()
    batch = chosen.batch()
    nested = chosen.nested(student, ta)
    alone = [plain_student(chosen, student, ta).train(), copy.deepcopy(ta).train()]
    for module in alone:
        module(*batch[0])
    _cotraining(nested)(batch)
    extracted = matta.extract(nested)
    buffers = [dict(module.named_buffers()) for module in (nested.student, nested.ta, extracted)]
    for found, plain in zip(buffers, [*alone, alone[0]], strict=True):
        for name, expected in plain.named_buffers():
            torch.testing.assert_close(found[name], expected)
    assert not {b.data_ptr() for b in buffers[0].values()} & {b.data_ptr() for b in buffers[1].values()}
    assert not {b.data_ptr() for b in buffers[0].values()} & {b.data_ptr() for b in student.buffers()}


def test_recalibration_gives_a_mixed_model_the_statistics_of_its_data() -> None:
    chosen = case("cnn-depth")
    nested = chosen.nest()
    mixed = matta.extract(nested, matta.wide_narrow_wide(nested, 2))
    batches = [images(torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert matta.recalibrate(mixed, [(batch, None) for batch in batches]) == 3
    inputs = []
    norm = mixed.blocks[0].body[1]
    hook = norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    stem, statistics = mixed.stem[0], mixed.stem[1]
    means = [stem(*batch).mean((0, 2, 3)) for batch in batches]
    torch.testing.assert_close(statistics.running_mean, torch.stack(means).mean(0))
    for batch in batches:
        copy.deepcopy(mixed).train()(*batch)
    hook.remove()
    expected = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected)


def test_a_student_built_on_the_meta_device_is_nested_or_refused_by_name() -> None:
    with torch.device("meta"):
        student = Transformer(width=4)
        with_buffers = ConvolutionalNetwork(4, 5, 1)
    nested = matta.nest(student, Transformer(width=8))
    ids = tokens(torch.Generator().manual_seed(0))
    assert torch.isfinite(nested.student.eval()(*ids)).all()
    with pytest.raises(MattaError, match=r"running_mean.*meta"):
        matta.nest(with_buffers, ConvolutionalNetwork(4, 9, 1))


# ------------------------------------------------------------------------ several processes


def _two_steps(run: Callable[[Any], Any], parameters: Any, batches: list[Batch]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        run(batch).loss.backward()
        optimizer.step()


def _halves(batches: list[Batch], rank: int) -> list[Batch]:
    return [((inputs[0][rank::2],), labels[rank::2]) for inputs, labels in batches]


def _batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [
        ((torch.randint(11, (4, 5), generator=generator),), torch.randint(4, (4,), generator=generator))
        for _ in range(2)
    ]


def _pair_for_processes() -> matta.CoTraining:
    return _cotraining(case("fused_qkv-d_model-depth").nest())


def _train_in_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for wrapper in ("ddp", "fsdp"):
        cotrain = _pair_for_processes()
        run = (
            DistributedDataParallel(cotrain)
            if wrapper == "ddp"
            else fully_shard(cotrain, mesh=init_device_mesh("cpu", (2,)))
        )
        _two_steps(run, list(run.parameters()), _halves(_batches(), rank))
        weights = {name: p.detach() for name, p in cotrain.nested.ta.named_parameters()}
        full = {name: w.full_tensor() if hasattr(w, "full_tensor") else w for name, w in weights.items()}
        torch.save(full, f"{folder}/{wrapper}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained_in_parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights after two steps of two processes, by wrapper and rank."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(_train_in_parallel, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes_with_one_forward_and_one_backward_equal_one(wrapper: str, trained_in_parallel: Path) -> None:
    cotrain = _pair_for_processes()
    _two_steps(cotrain, cotrain.nested.parameters(), _batches())
    expected = {name: p.detach() for name, p in cotrain.nested.ta.named_parameters()}
    for rank in range(2):
        found = torch.load(trained_in_parallel / f"{wrapper}-{rank}.pt")
        _assert_close(found, expected, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------ torch.compile


def _compile_and_compare(_: int, backend: str) -> None:
    torch.set_num_threads(1)
    eager, compiled = (_pair_for_processes() for _ in range(2))
    run = torch.compile(compiled, backend=backend, fullgraph=True)
    _two_steps(eager, eager.nested.parameters(), _batches())
    _two_steps(run, compiled.nested.parameters(), _batches())
    found, expected = (dict(each.nested.ta.named_parameters()) for each in (compiled, eager))
    _assert_close(found, expected, rtol=1e-6, atol=1e-8)
    _compile_with_samples()


def _compile_with_samples() -> None:
    """What draws a sub-model stays outside of the graph; each that was drawn has a graph of its own."""
    eager, compiled = (_pair_for_processes() for _ in range(2))
    for each in (eager, compiled):
        specs = iter([matta.narrow(each.nested), matta.wide(each.nested)])
        each.sample = lambda random, specs=specs: next(specs)
    torch.compiler.reset()
    _two_steps(eager, eager.nested.parameters(), _batches())
    _two_steps(torch.compile(compiled, backend="eager"), compiled.nested.parameters(), _batches())
    found, expected = (dict(each.nested.ta.named_parameters()) for each in (compiled, eager))
    _assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.stress)])
def test_the_whole_step_of_the_fixed_pair_compiles(backend: str) -> None:
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    # In a process of its own: the checks of shapes that the tests install cannot be compiled.
    torch.multiprocessing.spawn(_compile_and_compare, (backend,), nprocs=1)


# ------------------------------------------------------------------------ strided weights


def _tower(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(sizes)))


def test_the_live_model_equals_the_extracted_one_for_one_row_and_one_column() -> None:
    """With views instead of copies, many of these shapes differ in the last bit (float32, one row)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        a, b, more_a, more_b = (int(x) for x in torch.randint(4, 300, (4,), generator=generator))
        nested = matta.nest(_tower(8, a, b, 1), _tower(8, a + more_a, b + more_b, 1), layouts={"*": 1})
        extracted, live_student = matta.extract(nested).eval(), nested.student.eval()
        for rows in (1, 7):
            x = torch.randn(rows, 8, generator=generator)
            assert torch.equal(live_student(x), extracted(x)), (a, b, more_a, more_b, rows)
            with torch.no_grad():
                assert torch.equal(live_student(x), extracted(x)), (a, b, more_a, more_b, rows)


# ------------------------------------------------------------------------ bf16 autocast


@pytest.mark.parametrize("case_id", ["fused_qkv-heads", "lstm-width-declared", "cnn-width"])
def test_bf16_autocast_gives_the_gradients_of_separate_models(case_id: str) -> None:
    chosen = case(case_id)
    student, ta = (module.float() for module in chosen.build())
    inputs, labels = chosen.batch()
    inputs = tuple(x.float() if x.is_floating_point() else x for x in inputs)
    plain, plain_ta = plain_student(chosen, student, ta), copy.deepcopy(ta)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            student_logits, ta_logits = plain(*inputs).float(), plain_ta(*inputs).float()
    except RuntimeError as error:  # oneDNN has no bf16 LSTM for processors without AVX-512
        if "primitive descriptor" not in str(error):
            raise
        pytest.skip(f"torch cannot run this module in bf16 here: {error}")
    soft = ta_logits.detach().softmax(-1)
    loss = 0.7 * nn.functional.cross_entropy(student_logits, labels)
    loss = loss + 0.5 * nn.functional.cross_entropy(student_logits, soft)
    (loss + 1.3 * nn.functional.cross_entropy(ta_logits, labels)).backward()
    expected = {name: p.grad for name, p in plain_ta.named_parameters() if p.grad is not None}
    for name, (ta_name, _) in (where := places(chosen, student, ta)).items():
        expected[ta_name][where[name].index] += plain.get_parameter(name).grad

    cotrain = _cotraining(chosen.nested(student, ta))
    with torch.autocast("cpu", torch.bfloat16):
        out = cotrain((inputs, labels))
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    # Autocast converts a weight that both models use whole just once, and adds its gradients in bf16.
    for name, gradient in _gradients(cotrain).items():
        assert (gradient - expected[name]).norm() <= 0.01 * expected[name].norm(), name


# ------------------------------------------------------------------------ Transformers


def test_an_extracted_student_is_saved_and_loaded_by_the_stock_class(tmp_path: Path) -> None:
    import transformers

    chosen = case("gpt2-width-depth-first")
    batch = chosen.batch()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    extracted = matta.extract(chosen.nest()).float().eval()
    extracted.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, extracted(**inputs).logits)


@pytest.mark.parametrize("name", ["gpt2-width-depth-ends", "llama_gqa-width-heads", "qwen3-width-depth"])
def test_sub_models_generate_with_a_cache_what_they_generate_without(name: str) -> None:
    chosen = case(name)
    nested = chosen.nest()
    spec = matta.wide_narrow_wide(nested, 2)
    ids = {"input_ids": tokens(torch.Generator().manual_seed(0))[0][:, :2], "pad_token_id": 2}
    for module in (nested.student, matta.extract(nested), live(nested, spec), matta.extract(nested, spec)):
        module.eval()
        cached, plain = (
            module.generate(**ids, max_new_tokens=3, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, plain)


def test_copying_back_needs_no_library() -> None:
    """The reference of these tests agrees with itself: what is copied in is read out."""
    chosen: Case = case("fused_qkv-heads_and_head_dim")
    student, ta = chosen.build()
    where = places(chosen, student, ta)
    plain = plain_student(chosen, student, ta)
    copy_back(plain, ta, where)
    weight = dict(plain.named_parameters())["blocks.0.attention.qkv.weight"]
    by_hand = dict(ta.named_parameters())["blocks.0.attention.qkv.weight"].unflatten(0, (3, 3, 5))
    assert torch.equal(weight, by_hand[:, :2, :3].flatten(0, 2))
