"""What nest accepts, refuses and leaves alone; rules, sharing, privacy; odd models of users'."""

from __future__ import annotations

import copy
import inspect
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.errors import LayoutError, MattaError, NestingError

X, Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1, 1])


def _tower(width: int, outputs: int = 2) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, outputs))


def _train(nested: matta.Nested, x: Any = X, steps: int = 2) -> None:
    cotrain = matta.CoTraining(nested, matta.objectives.Classification()).train()
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        cotrain((x, Y)).loss.backward()
        optimizer.step()


class Embedded(nn.Module):
    """An embedding, blocks and a head that may be tied to it."""

    def __init__(self, width: int, depth: int = 2, tied: bool = False, **embedding: Any) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.embedding = nn.Embedding(7, width, **embedding)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 7)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


IDS = torch.tensor([0, 3, 6, 1, 1])


# ------------------------------------------------------------------------ identities


def test_the_whole_of_a_model_nests_in_itself() -> None:
    model = _tower(4)
    nested = matta.nest(model, model)
    assert torch.equal(nested.student(X), model(X))
    assert nested.ta is model
    assert nested.student is not model


def test_nesting_is_transitive() -> None:
    small, middle, large = _tower(2), _tower(4), _tower(6)
    outer = matta.nest(middle, large)
    direct, through = matta.nest(small, large), matta.nest(small, matta.extract(outer))
    assert torch.equal(direct.student(X), through.student(X))


def test_nestings_in_one_ta_see_each_others_steps() -> None:
    ta = _tower(6)
    one, other = matta.nest(_tower(4), ta), matta.nest(_tower(5), ta)
    _train(one)
    assert torch.equal(one.student[0].weight, other.student[0].weight[:4])


def test_the_state_is_the_tas_and_the_private_and_loads_again() -> None:
    one, other = (matta.nest(_tower(4), _tower(width), private=["2.bias"]) for width in (6, 6))
    _train(one)
    state = one.state_dict()
    assert list(state) == ["ta.0.weight", "ta.0.bias", "ta.2.weight", "ta.2.bias", "students.0.2.bias"]
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(one.student(X), other.student(X))
    wrapped = nn.ModuleDict({"x": one}).state_dict()
    assert list(wrapped) == [f"x.{name}" for name in state]


def test_the_live_students_state_is_all_of_its_weights() -> None:
    nested = matta.nest(_tower(4), _tower(6), private=["2.bias"])
    state, plain = nested.student.state_dict(), _tower(4)
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in plain.state_dict().items()}
    plain.load_state_dict(state)
    assert torch.equal(plain(X), nested.student(X))


def test_a_copy_shares_nothing_with_the_original() -> None:
    nested = matta.nest(Embedded(4, tied=True), Embedded(6, tied=True), private=["head.bias"])
    copied = copy.deepcopy(nested)
    before = nested.student(IDS), nested.ta(IDS)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.count_nonzero(copied.student(IDS)) == 0
    assert torch.equal(nested.student(IDS), before[0])
    assert torch.equal(nested.ta(IDS), before[1])
    assert matta.extract(copied).head.weight is not matta.extract(nested).head.weight
    assert str(copied) == str(nested)


def test_an_optimizer_gets_each_parameter_once() -> None:
    nested = matta.nest([Embedded(4, tied=True), Embedded(5, tied=True)], Embedded(6, tied=True), private=["head.bias"])
    found = list(nested.parameters())
    assert len({id(parameter) for parameter in found}) == len(found)
    assert len(found) == len(list(nested.ta.parameters())) + 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_pair_changes_type_together(dtype: torch.dtype) -> None:
    nested = matta.nest(_tower(4), _tower(6), private=["2.bias"]).to(dtype)
    assert {tensor.dtype for tensor in nested.student.state_dict().values()} == {dtype}
    _train(nested, X.to(dtype))
    assert torch.equal(matta.extract(nested).eval()(X.to(dtype)), nested.student.eval()(X.to(dtype)))


# ------------------------------------------------------------------------ the meta device


def test_a_nesting_is_planned_on_the_meta_device() -> None:
    import transformers

    sizes = {"n_embd": 1024, "n_head": 16, "vocab_size": 50257}
    with torch.device("meta"):
        student = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=24, n_inner=4096, **sizes))
        ta = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=36, n_inner=8192, **sizes))
    nested = matta.nest(student, ta, layers={"transformer.h": "ends"})
    plan = str(nested)
    assert re.search(r"transformer.h.23.mlp.c_fc.weight +1024x4096 +transformer.h.35.mlp.c_fc.weight\[:, :4096\]", plan)
    assert "Student: 354,823,168 parameters, 354,823,168 shared with the TA, 0 private" in plan
    assert "24 blocks in the TA's 36" in plan
    assert matta.extract(nested).num_parameters() == 354_823_168
    assert all(parameter.is_meta for parameter in nested.parameters())


def test_the_pair_goes_to_the_meta_device() -> None:
    nested = matta.nest(_tower(4), _tower(6), private=["2.bias"]).to("meta")
    assert {tensor.device.type for tensor in nested.student.state_dict().values()} == {"meta"}
    with pytest.raises(MattaError, match="meta device and cannot be run"):
        matta.probe(nested, (X, Y))


# ------------------------------------------------------------------------ sharing and privacy


SHARES: list[tuple[Any, set[str]]] = [
    ("all", {"embedding.weight", "blocks.0.weight", "blocks.0.bias", "head.weight", "head.bias"}),
    ("embeddings", {"embedding.weight"}),
    ("none", set()),
    ([], set()),
    (["embedding.*", "head.*"], {"embedding.weight", "head.weight", "head.bias"}),
    (["*.weight"], {"embedding.weight", "blocks.0.weight", "head.weight"}),
]


@pytest.mark.parametrize(("share", "expected"), SHARES)
def test_what_is_shared_is_what_was_asked_for(share: Any, expected: set[str]) -> None:
    student = Embedded(4, 1)
    before = copy.deepcopy(student.state_dict())
    nested = matta.nest(student, Embedded(6, 1), share=share, layouts={"*": 1})
    assert nested.plan.placements.keys() == expected
    assert set(nested.plan.private) == before.keys() - expected
    state = nested.student.state_dict()
    for name in nested.plan.private:
        assert torch.equal(state[name], before[name])
    num_own = sum(before[name].numel() for name in nested.plan.private)
    assert sum(p.numel() for p in nested.parameters()) == sum(p.numel() for p in nested.ta.parameters()) + num_own
    _train(nested, IDS)
    assert torch.equal(matta.extract(nested).eval()(IDS), nested.student.eval()(IDS))


def test_sharing_embeddings_shares_what_is_tied_to_them() -> None:
    nested = matta.nest(Embedded(4, tied=True), Embedded(6, tied=True), share="embeddings")
    assert nested.plan.placements.keys() == {"embedding.weight", "head.weight"}
    extracted = matta.extract(nested)
    assert extracted.head.weight is extracted.embedding.weight


def test_private_parameters_need_no_counterpart_and_no_fitting_size() -> None:
    student = Embedded(4)
    student.head = nn.Linear(4, 9)
    student.extra = nn.Parameter(torch.zeros(3))  # type: ignore[assignment]
    nested = matta.nest(student, Embedded(6), private=["head.*", "extra"])
    assert nested.student(IDS).shape == (5, 9)
    nested.student(IDS).sum().backward()
    assert nested.student.head.weight.grad is not None
    assert student.head.weight.grad is None


def test_one_pattern_need_not_be_a_list() -> None:
    student = Embedded(4)
    assert (
        matta.nest(student, Embedded(6), private="head.*").plan
        == matta.nest(student, Embedded(6), private=["head.*"]).plan
    )


def test_frozen_student_parameters_pass_no_gradient_but_the_ta_trains_them() -> None:
    student = _tower(4)
    student[0].requires_grad_(False)
    nested = matta.nest(student, _tower(6))
    nested.student(X).sum().backward()
    assert nested.ta[0].weight.grad is None
    assert nested.ta[2].weight.grad is not None
    assert [p.requires_grad for p in matta.extract(nested).parameters()] == [False, False, True, True]


def test_what_is_frozen_in_the_ta_stays_as_it_is() -> None:
    ta = _tower(6)
    ta[0].requires_grad_(False)
    nested = matta.nest(_tower(4), ta)
    before = nested.student[0].weight.clone()
    _train(nested)
    assert torch.equal(nested.student[0].weight, before)
    assert not matta.extract(nested)[0].weight.requires_grad


@pytest.mark.parametrize("share", ["embeddings", "none", ["embedding.*"]])
def test_sharing_less_needs_no_other_rules(share: Any) -> None:
    rules: dict[str, Any] = {"layouts": {"blocks.*.weight": 1}, "layers": {"blocks": "first"}}
    assert matta.nest(Embedded(4), Embedded(6, 3), share=share, **rules).student(IDS).shape == (5, 7)


# ------------------------------------------------------------------------ refusals


class Named(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def _tied(width: int, *, tied: bool) -> nn.Module:
    return Embedded(width, tied=tied)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "larger": (
        lambda: matta.nest(_tower(6), _tower(4)),
        r"0.weight is 6 long on axis 0 and the TA's 0.weight only 4; expected the TA to be at least as large.*build",
    ),
    "larger-input": (
        lambda: matta.nest(nn.Linear(5, 2), nn.Linear(3, 9)),
        r"weight is 5 long on axis 1 and the TA's weight only 3.*private=\['weight'\]",
    ),
    "no-match": (
        lambda: matta.nest(Named(net=nn.Linear(3, 2)), Named(tower=nn.Linear(3, 2))),
        r"Student's net.weight would live in the TA's net.weight, which does not exist; the TA has: tower.weight.*same",
    ),
    "other-rank": (
        lambda: matta.nest(Named(a=nn.Conv1d(3, 2, 1)), Named(a=nn.Linear(3, 2))),
        r"a.weight has shape \(2, 3, 1\) and the TA's a.weight \(2, 3\); expected the same number of axes.*private",
    ),
    "one-slice": (
        lambda: matta.nest(_tied(4, tied=False), _tied(6, tied=True)),
        r"embedding.weight and head.weight of the Student are two parameters, but would live on one slice.*tie them",
    ),
    "no-students": (lambda: matta.nest([], _tower(4)), r"empty list of Students; expected at least one module"),
    "no-module": (lambda: matta.nest("gpt2", _tower(4)), r"the Student is str; expected a torch.nn.Module"),
    "no-model": (lambda: matta.nest(_tower, _tower(4)), r"the Student is function; expected a torch.nn.Module"),
    "no-ta": (lambda: matta.nest(_tower(4), None), r"the TA is NoneType; expected a torch.nn.Module"),
    "share": (
        lambda: matta.nest(_tower(4), _tower(6), share="2.*"),
        r"share='2.\*'; expected 'all', 'embeddings', 'none', or a list of patterns such as \['2.\*'\]",
    ),
    "unused-share": (lambda: matta.nest(_tower(4), _tower(6), share=["x"]), r"share='x' matched nothing; .*0.weight"),
    "unused-private": (
        lambda: matta.nest(_tower(4), _tower(6), private=["head.*"]),
        r"private='head.\*' matched nothing; the Student has: 0.weight, 0.bias, 2.weight, 2.bias",
    ),
    "unused-layout": (
        lambda: matta.nest(_tower(4), _tower(6), layouts={"qkv.*": 3}),
        r"layouts='qkv.\*' matched nothing; the Student has: 0.weight",
    ),
    "unused-layers": (
        lambda: matta.nest(Embedded(4), Embedded(6), layers={"h": "first"}),
        r"layers='h' matched nothing; the Student has: blocks",
    ),
    "no-lists": (
        lambda: matta.nest(nn.Linear(3, 2), nn.Linear(3, 2), layers={"h": "first"}),
        r"layers='h' matched nothing; the Student has: no module lists",
    ),
    "depth-unsaid": (
        lambda: matta.nest(Embedded(4, 2), Embedded(6, 3)),
        r"blocks has 2 blocks in the Student and 3 in the TA; say which.*layers=\{'blocks': 'first'\}",
    ),
    "layers-no-mapping": (lambda: matta.nest(_tower(4), _tower(6), layers="first"), r"layers='first'; expected a map"),
    "layouts-no-mapping": (lambda: matta.nest(_tower(4), _tower(6), layouts=[1]), r"layouts=\[1\]; expected a mapping"),
    "layout-text": (
        lambda: matta.nest(_tower(4), _tower(6), layouts={"0.*": "3"}),
        r"layouts=\{'0.\*': '3'\}; expected the number of equal segments, or a matta.Layout",
    ),
    "layout-zero": (
        lambda: matta.nest(_tower(4), _tower(6), layouts={"0.*": 0}),
        r"\{'0.\*': 0\}; expected the number",
    ),
    "layout-uneven": (
        lambda: matta.nest(_tower(4), _tower(6), layouts={"0.*": 4}),
        r"0.weight: axis 0 is 4 long in the Student and 6 in the TA: not 4 equal segments in both; declare Layout.conc",
    ),
    "layout-sizes": (
        lambda: matta.nest(_tower(4), _tower(6), layouts={"0.*": matta.Layout.concat([(2, 3), (1, 3)])}),
        r"0.weight: axis 0 is laid out as 3 of 6, but is 4 long in the Student and 6 in the TA",
    ),
    "layout-axis": (
        lambda: matta.nest(_tower(4), _tower(6), layouts={"0.weight": matta.Layout.equal(2, axis=2)}),
        r"0.weight has 2 axes; its layout names axis 2",
    ),
    "lazy": (
        lambda: matta.nest(nn.Sequential(nn.LazyLinear(4)), nn.Sequential(nn.LazyLinear(6))),
        r"Student cannot be nested: 0.weight has no shape yet; expected sizes: run the lazy module on a batch once",
    ),
    "lazy-buffer": (
        lambda: matta.nest(nn.LazyBatchNorm1d(affine=False), nn.BatchNorm1d(3, affine=False)),
        r"Student cannot be nested: running_mean has no shape yet",
    ),
    "scripted": (
        lambda: matta.nest(_tower(4), torch.jit.script(_tower(6))),
        r"TA cannot be nested: it is a ScriptModule; expected plain modules: nest first, and script what is extracted",
    ),
    "compiled": (
        lambda: matta.nest(nn.Sequential(torch.compile(_tower(4))), nn.Sequential(_tower(6))),
        r"Student cannot be nested: its 0 is compiled; expected plain modules: nest first, then torch.compile the CoTr",
    ),
    "live": (
        lambda: matta.nest(matta.nest(_tower(4), _tower(6)).student, _tower(8)),
        r"Student cannot be nested: it is live, .*; expected a module of its own: matta.extract it first",
    ),
    "sparse": (
        lambda: matta.nest(Embedded(4, sparse=True, max_norm=1.0), Embedded(6, sparse=True, max_norm=1.0)),
        r"embedding.weight has sparse gradients and max_norm=1.0.*build the Student with sparse=False or .*private",
    ),
    "listed": (
        lambda: matta.nest(Listed(4), Listed(6)),
        r"Listed keeps parameters in its attribute 'gains', where they cannot be replaced.*ParameterList",
    ),
    "lock": (
        lambda: matta.nest(Keeping(threading.Lock()), Keeping(None)),
        r"the Student cannot be nested: Keeping cannot be copied by copy.deepcopy: .*lock.*__deepcopy__",
    ),
    "stream": (
        lambda: matta.nest(Keeping(None), Keeping({"log": (iter_of() for iter_of in [list])})),
        r"the TA cannot be nested: Keeping cannot be copied by copy.deepcopy: .*generator.*__deepcopy__",
    ),
    "graph": (
        lambda: matta.nest(Keeping([torch.ones(2, requires_grad=True) * 2]), Keeping(None)),
        r"the Student cannot be nested: Keeping keeps a tensor with a graph in 'kept', \(2,\), .*compute it in forward",
    ),
}


class Keeping(nn.Module):
    def __init__(self, kept: object) -> None:
        super().__init__()
        self.tower, self.kept = _tower(4), kept


class Listed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower = _tower(width)
        self.gains = [nn.Parameter(torch.ones(width))]


@pytest.mark.filterwarnings("ignore:.*(Lazy|torch.jit|weight_norm).*")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_nested_is_refused_with_the_remedy(name: str) -> None:
    attempt, message = REFUSED[name]
    with pytest.raises((NestingError, LayoutError), match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value).splitlines()[0]


def test_the_suggestion_for_a_missing_depth_rule_works() -> None:
    for rule in ("first", "last", "even", "ends", [0, 2]):
        nested = matta.nest(Embedded(4, 2), Embedded(6, 3), layers={"blocks": rule})
        assert nested.student(IDS).shape == (5, 7)


def test_a_refusal_leaves_both_modules_alone() -> None:
    student, ta = Embedded(4, 2), Embedded(6, 3)
    before = copy.deepcopy(student.state_dict()), copy.deepcopy(ta.state_dict())
    with pytest.raises(MattaError):
        matta.nest(student, ta, layers={"blocks": "first"}, layouts={"x": 1}, warm_start=True)
    for module, state in zip((student, ta), before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


# ------------------------------------------------------------------------ odd models


class Odd(nn.Module):
    """A tower between two linear layers, with something odd in it that `twist` makes of a width."""

    def __init__(self, width: int, twist: Callable[[nn.Module, int], None], run: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
        twist(self, width)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self, self.first(x)))


def _share(module: nn.Module, width: int) -> None:
    layer = nn.Linear(width, width)
    module.one, module.two = layer, layer  # type: ignore[assignment]


def _dicts(module: nn.Module, width: int) -> None:
    module.parts = nn.ModuleDict({"in": nn.Linear(width, width)})
    module.gains = nn.ParameterDict({"gain": nn.Parameter(torch.rand(width))})
    module.shifts = nn.ParameterList([nn.Parameter(torch.rand(width))])


def _complex(module: nn.Module, width: int) -> None:
    module.phase = nn.Parameter(torch.randn(width, dtype=torch.complex64))


def _integers(module: nn.Module, width: int) -> None:
    module.count = nn.Parameter(torch.arange(width), requires_grad=False)


def _scalar(module: nn.Module, width: int) -> None:
    module.gain, module.none = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(0, width))


def _buffers(module: nn.Module, width: int) -> None:
    module.register_buffer("scale", torch.arange(width) / 3, persistent=False)
    module.register_buffer("absent", None)
    module.register_parameter("nothing", None)


def _cell(module: nn.Module, width: int) -> None:
    module.cell = nn.GRUCell(width, width)


def _strided(module: nn.Module, width: int) -> None:
    module.raw = nn.Linear(width, width)
    module.raw.weight = nn.Parameter(torch.randn(width, width).t())


def _twice(module: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(module.cell(x, module.cell(x)))


ODD: dict[str, tuple[Callable[[nn.Module, int], None], Callable[..., Tensor]]] = {
    "one module twice": (_share, lambda m, x: m.two(m.one(x).relu())),
    "dictionaries": (_dicts, lambda m, x: m.parts["in"](x) * m.gains["gain"] + m.shifts[0]),
    "complex": (_complex, lambda m, x: (x * m.phase).abs().to(x.dtype)),
    "integers": (_integers, lambda m, x: x * m.count),
    "scalar and empty": (_scalar, lambda m, x: x * m.gain),
    "buffers": (_buffers, lambda m, x: x * m.scale),
    "a cell in a loop": (_cell, _twice),
    "strided": (_strided, lambda m, x: m.raw(x)),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("example", [None, (X, Y)], ids=["unprobed", "probed"])
def test_odd_models_nest_train_extract_save_and_load(name: str, example: Any, tmp_path: Any) -> None:
    twist, run = ODD[name]
    nested = matta.nest(Odd(4, twist, run), Odd(6, twist, run), example=example)
    _train(nested)
    extracted = matta.extract(nested).eval()
    assert torch.equal(extracted(X), nested.student.eval()(X))
    for spec in (matta.narrow(nested), matta.wide(nested)):
        assert torch.equal(matta.extract(nested, spec).eval()(X), matta.live(nested, spec).eval()(X))
    torch.testing.assert_close(matta.extract(nested, matta.wide(nested)).eval()(X), nested.ta.eval()(X))
    assert torch.equal(matta.extract(nested, matta.narrow(nested)).eval()(X), extracted(X))
    loaded = matta.load(matta.save(nested, tmp_path / "x"), Odd(4, twist, run), Odd(6, twist, run))
    assert torch.equal(loaded.student.eval()(X), extracted(X))
    assert len(list(extracted.parameters())) == len(list(Odd(4, twist, run).parameters()))


def test_models_without_layers() -> None:
    class Raw(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, width)), nn.Parameter(torch.randn(width, 2))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.up).relu() @ self.down

    nested = matta.nest(Raw(4), Raw(6))
    _train(nested)
    assert torch.equal(nested.student.up, nested.ta.up[:, :4])
    assert len(matta.layer_names(nested)) == 1
    assert "Student: 0 parameters" in str(matta.nest(nn.ReLU(), nn.ReLU()))


def test_hooks_of_the_users_run_in_both_models_and_in_the_extracted_one() -> None:
    seen: list[tuple[int, ...]] = []
    pair = _tower(4), _tower(6)
    for module in pair:
        module[0].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    nested = matta.nest(*pair)
    for module in (nested.ta, nested.student, matta.extract(nested)):
        module(X)
    assert seen == [(5, 6), (5, 4), (5, 4)]


def test_wrapped_models_keep_their_wrapper() -> None:
    nested = matta.nest(nn.DataParallel(_tower(4)), nn.DataParallel(_tower(6)))
    _train(nested)
    assert type(matta.extract(nested)) is nn.DataParallel
    assert torch.equal(matta.extract(nested).eval()(X), nested.student.eval()(X))


def test_outputs_may_be_objects_and_inputs_keywords() -> None:
    @dataclass
    class Output:
        logits: Tensor

    class Wrapped(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.tower = _tower(width)

        def forward(self, *, x: Tensor) -> Output:
            return Output(self.tower(x))

    nested = matta.nest(Wrapped(4), Wrapped(6), example={"x": X, "labels": Y}, warm_start=True)
    out = matta.CoTraining(nested, matta.objectives.Classification())({"x": X, "labels": Y})
    assert torch.equal(out.student_logits, nested.student(x=X).logits)


class InTuple(nn.Module):
    """Layers that are registered, and in a tuple besides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
        self.layers = self.first, self.last

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_registered_layers_may_be_in_a_tuple_besides() -> None:
    nested = matta.nest(InTuple(4), InTuple(6), example=(torch.ones(2, 3), None))
    extracted = matta.extract(nested)
    assert extracted.layers[1] is extracted.last
    assert torch.equal(extracted(torch.ones(2, 3)), nested.student.eval()(torch.ones(2, 3)))


def test_a_lazy_model_that_has_run_nests() -> None:
    pair = [nn.Sequential(nn.LazyLinear(width), nn.ReLU(), nn.LazyLinear(2)) for width in (4, 6)]
    for module in pair:
        module(X)
    assert type(matta.extract(matta.nest(*pair))[0]) is nn.Linear


def test_sparse_embeddings_that_do_not_grow_train() -> None:
    nested = matta.nest(Embedded(4, sparse=True), Embedded(4, 3, sparse=True), layers={"blocks": "first"})
    _train(nested, IDS)
    assert nested.ta.embedding.weight.grad is not None


def test_an_embedding_with_a_norm_and_a_padding_row_extracts_exactly() -> None:
    options = {"max_norm": 0.5, "padding_idx": 1}
    nested = matta.nest(Embedded(4, **options), Embedded(6, **options))
    _train(nested, IDS)
    assert torch.equal(matta.extract(nested).eval()(IDS), nested.student.eval()(IDS))


def test_every_public_argument_is_in_the_docstring() -> None:
    docstring = inspect.getdoc(matta.nest) or ""  # from Python 3.13 on, __doc__ has no indentation either
    documented = re.findall(r"^    (\w+): [A-Z\"]", docstring.partition("Raises:")[0], re.MULTILINE)
    assert documented == list(inspect.signature(matta.nest).parameters)


def test_models_of_different_types_are_refused() -> None:
    with pytest.raises(NestingError, match=r"weight is torch.float32 and the TA's weight torch.bfloat16; expected one"):
        matta.nest(nn.Linear(3, 2), nn.Linear(3, 2).bfloat16())
