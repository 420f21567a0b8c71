"""Live modules: what they show, what they copy, and that a plain module comes out of them."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import matta
from matta.errors import NestingError, SubModelError, TracingError
from matta.nesting.copying import copy_module, deep_copy
from matta.nesting.layout import Axis, Layout
from matta.nesting.slicing import LiveSlice, bind, is_live, live_parameters, materialize, skeleton, slices_of

X = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))


def _live() -> tuple[nn.Linear, nn.Module, nn.Linear]:
    """An owner, a live `Linear(2, 3)` over its rows 0, 1 and 4, and the module it was copied from."""
    torch.manual_seed(0)
    owner, plain = nn.Linear(2, 6), nn.Linear(2, 3)
    axis = Layout.concat([(2, 4), (1, 2)]).resolve(0, 3, 6)
    made = copy_module(plain, {})
    slices = {"weight": (axis, Axis.plain(2, 2)), "bias": (axis,)}
    bind(made, {name: LiveSlice(owner, name, axes) for name, axes in slices.items()})
    return owner, made, plain


def test_a_live_module_shows_the_owners_present_weights() -> None:
    owner, live, _ = _live()
    for _ in range(2):
        assert torch.equal(live.weight, owner.weight[[0, 1, 4]])
        with torch.no_grad():
            owner.weight.add_(1)
    owner.weight = nn.Parameter(torch.zeros(6, 2))
    assert torch.count_nonzero(live.weight) == 0


def test_gradients_go_to_the_owner_alone() -> None:
    owner, live, plain = _live()
    live(X).sum().backward()
    assert owner.weight.grad is not None
    assert owner.weight.grad.abs().sum(1).nonzero().ravel().tolist() == [0, 1, 4]
    assert plain.weight.grad is None


@pytest.mark.parametrize(
    ("training", "grad", "is_copy"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_slices_are_views_in_training_and_contiguous_copies_outside(training: bool, grad: bool, is_copy: bool) -> None:
    owner, made = nn.Linear(4, 3), copy_module(nn.Linear(2, 3), {})
    bind(made, {"weight": LiveSlice(owner, "weight", (Axis.plain(3, 3), Axis.plain(2, 4)))})
    made.train(training)
    with torch.set_grad_enabled(grad):
        weight = made.weight
    assert (weight.data_ptr() != owner.weight.data_ptr()) is is_copy
    assert weight.is_contiguous() is is_copy
    assert torch.equal(weight, owner.weight[:, :2])


def test_a_detached_slice_passes_no_gradient() -> None:
    owner = nn.Linear(2, 3)
    live = LiveSlice(owner, "weight", (Axis.plain(2, 3), Axis.plain(2, 2)), detach=True)
    assert not live.read(contiguous=False).requires_grad
    assert not live.own().requires_grad
    assert owner.weight.requires_grad


def test_a_live_module_lists_its_weights_but_its_parents_do_not() -> None:
    _, live, plain = _live()
    assert [name for name, _ in live.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [tuple(p.shape) for p in live.parameters()] == [tuple(p.shape) for p in plain.parameters()]
    assert [name for name, _ in live.named_parameters(prefix="x")] == ["x.weight", "x.bias"]
    assert not list(nn.ModuleList([live]).parameters())
    assert live.state_dict().keys() == plain.state_dict().keys()
    assert is_live(live)
    assert not is_live(plain)


def test_a_plain_copy_has_weights_of_its_own() -> None:
    owner, live, _ = _live()
    made = materialize(live)
    assert type(made) is nn.Linear
    assert "_live_slices" not in made.__dict__
    assert torch.equal(made.eval()(X), live.eval()(X))
    with torch.no_grad():
        owner.weight.zero_()
    assert torch.count_nonzero(made.weight) == made.weight.numel()
    assert is_live(live)


def test_a_skeleton_is_the_structure_without_weights() -> None:
    _, live, _ = _live()
    made = skeleton(live)
    assert type(made) is nn.Linear
    assert dict(made._parameters) == {"weight": None, "bias": None}


def test_the_class_keeps_its_name_and_its_checks() -> None:
    _, live, plain = _live()
    assert type(live).__name__ == "Linear"
    assert type(live).__qualname__ == type(plain).__qualname__
    assert isinstance(live, nn.Linear)
    assert repr(live) == repr(plain)


def test_a_copied_module_shares_parameters_and_owns_buffers() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    own = nn.Parameter(torch.zeros(2))
    made = copy_module(module, {"0.bias": own})
    assert made[0].weight is module[0].weight
    assert made[0].bias is own
    assert made[1].running_mean is not module[1].running_mean
    assert type(made[0]) is nn.Linear


def test_recurrent_modules_read_their_flat_weights_afresh() -> None:
    torch.manual_seed(0)
    owner, plain = nn.LSTM(2, 5), nn.LSTM(2, 3)
    made = copy_module(plain, {})
    axes = {name: Layout.equal(4).resolve(0, 12, 20) for name, _ in plain.named_parameters()}
    bind(
        made,
        {
            name: LiveSlice(owner, name, (axes[name], *map(Axis.plain, p.shape[1:], o.shape[1:])))
            for (name, p), o in zip(plain.named_parameters(), owner.parameters(), strict=True)
        },
    )
    assert torch.equal(made._flat_weights[0], owner.weight_ih_l0.unflatten(0, (4, 5))[:, :3].flatten(0, 1))
    assert torch.equal(materialize(made).eval()(X)[0], made.eval()(X)[0])


def test_a_copy_of_owner_and_live_module_belong_together() -> None:
    owner, live, _ = _live()
    both = copy.deepcopy(nn.ModuleList([owner, live]))
    with torch.no_grad():
        both[0].weight.zero_()
    assert torch.count_nonzero(both[1].weight) == 0
    assert torch.count_nonzero(live.weight) == live.weight.numel()


def test_tied_names_are_listed_once_and_tied_again() -> None:
    owner = nn.Linear(2, 4)
    pair = copy_module(nn.ModuleList([nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)]), {})
    axes = (Axis.plain(3, 4), Axis.plain(2, 2))
    bind(pair, {f"{i}.weight": LiveSlice(owner, "weight", axes) for i in range(2)})
    assert [name for name, _ in live_parameters(pair)] == ["0.weight"]
    assert [name for name, _ in live_parameters(pair, once=False)] == ["0.weight", "1.weight"]
    assert set(slices_of(pair)) == {"0.weight", "1.weight"}
    made = materialize(pair)
    assert made[0].weight is made[1].weight


def test_what_the_slices_cannot_replace_is_refused() -> None:
    module = nn.Linear(2, 2)
    module.hidden = {"gain": nn.Parameter(torch.ones(2))}  # type: ignore[assignment]
    with pytest.raises(NestingError, match=r"Linear keeps parameters in its attribute 'hidden'.*ParameterList"):
        bind(module, {})


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    module, message = nn.Linear(2, 2), r"Linear cannot be copied by copy.deepcopy: .*lock.*__deepcopy__"
    module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(NestingError, match=message):
        copy_module(module, {})
    example = torch.ones(1, 2), None
    with pytest.raises(NestingError, match=message):
        matta.nest(module, nn.Linear(2, 2), example=example)
    with pytest.raises(TracingError, match=message):
        matta.trace_layouts(module, module, example)


def test_a_state_loaded_into_the_student_is_written_into_the_ta() -> None:
    torch.manual_seed(0)
    trained, ta = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    nested = matta.nest(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), ta)
    beyond = ta[0].weight[2:].detach().clone()
    nested.student.load_state_dict(trained.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(nested.student.eval()(x), trained(x))
    assert torch.equal(ta[0].weight[:2], trained[0].weight) and torch.equal(ta[0].weight[2:], beyond)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"0.weight": torch.zeros(9, 9)}, "size mismatch for 0.weight"),
        ({"0.weight": torch.zeros(2, 3)}, "Missing key.*0.bias"),
        ({"nothing": torch.zeros(1)}, "Unexpected key.*nothing"),
    ],
)
def test_a_state_that_does_not_fit_the_student_is_refused(state: dict[str, torch.Tensor], message: str) -> None:
    nested = matta.nest(nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(RuntimeError, match=message):
        nested.student.load_state_dict(state)


def test_a_nesting_is_pickled_whole() -> None:
    torch.manual_seed(0)
    nested = matta.nest(
        nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    )
    again = pickle.loads(pickle.dumps(nested))
    x = torch.randn(5, 3)
    assert torch.equal(again.student(x), nested.student(x))
    with torch.no_grad():
        again.ta[0].weight.zero_()
    assert not torch.equal(again.student(x), nested.student(x))


def test_a_functional_call_uses_the_weights_that_it_is_given() -> None:
    owner, live, plain = _live()
    given = {name: each.detach() for name, each in plain.named_parameters()}
    gradients = torch.func.grad(lambda each: torch.func.functional_call(live, each, (X,)).sum())(given)
    assert torch.equal(torch.func.functional_call(live, given, (X,)), plain(X))
    plain(X).sum().backward()
    assert torch.equal(gradients["weight"], plain.weight.grad)
    assert torch.equal(live.weight, owner.weight[[0, 1, 4]])


def test_a_functional_call_follows_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, width), nn.Linear(width, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(index))

    torch.manual_seed(0)
    nested, plain, index = matta.nest(Tied(2), Tied(4)), Tied(2), torch.arange(5)
    found = torch.func.functional_call(nested.student, dict(plain.named_parameters()), (index,))
    assert torch.equal(found, plain(index))


@pytest.mark.parametrize("name", ["half", "double", "bfloat16"])
def test_a_conversion_of_a_live_module_alone_is_refused(name: str) -> None:
    owner, live, _ = _live()
    with pytest.raises(NestingError, match=f"received {name}.*expected it for the nesting or the TA"):
        getattr(live, name)()
    getattr(owner, name)()
    assert getattr(live, name)() is live
    assert live.weight.dtype == owner.weight.dtype


def test_a_live_module_is_not_frozen_or_moved_alone() -> None:
    _, live, _ = _live()
    for call in (lambda: live.requires_grad_(False), lambda: live.to("meta"), lambda: live.to(torch.half)):
        with pytest.raises(NestingError, match="weights are slices of the TA's"):
            call()
    assert live.to("cpu").float().requires_grad_() is live


def test_a_parameter_in_the_place_of_a_slice_is_refused() -> None:
    _, live, plain = _live()
    with pytest.raises(NestingError, match="in the place of 'weight'"):
        live.weight = nn.Parameter(torch.zeros(3, 2))
    live.load_state_dict(plain.state_dict())
    assert torch.equal(live.weight, plain.weight)


@pytest.mark.parametrize("training", [True, False])
def test_a_moving_average_of_a_nesting_is_one_of_its_student(training: bool) -> None:
    torch.manual_seed(0)
    nested = matta.nest(nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 4)), layouts={"0.*": 1})
    average = AveragedModel(nested).train(training)
    average.update_parameters(nested)
    before = nested.student[0].weight.detach().clone()
    with torch.no_grad():
        nested.ta[0].weight.add_(1)
    average.update_parameters(nested)
    torch.testing.assert_close(average.module.student[0].weight, before + 0.5)


class _Partly(nn.Module):
    """Its middle parameter is private: what the Student owns and what it slices alternate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(width)) for _ in range(3))
        self.norm, self.tied = nn.BatchNorm1d(width), nn.Module()
        self.tied.a = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x[:, : len(self.a)] * self.a + self.b) * self.c + self.tied.a


@pytest.mark.parametrize("training", [True, False])
def test_a_moving_average_of_a_student_alone_is_that_of_its_weights(training: bool) -> None:
    torch.manual_seed(0)
    nested, x = matta.nest(_Partly(3), _Partly(5), private=["b"]).train(training), torch.randn(4, 5)
    average = AveragedModel(nested.student, use_buffers=True)
    average.update_parameters(nested.student)
    before = {name: each.detach().clone() for name, each in nested.student.state_dict().items()}
    with torch.no_grad():
        for number, parameter in enumerate(nested.parameters()):
            parameter.add_(number + 1)
        nested.student.norm.running_mean.add_(2)
    average.update_parameters(nested.student)
    assert type(average.module) is _Partly and average.module.tied.a is average.module.a
    assert list(average.module.state_dict()) == list(_Partly(3).state_dict())
    for name, each in nested.student.state_dict().items():
        torch.testing.assert_close(average.module.state_dict()[name], ((before[name] + each) / 2).to(each.dtype))
    torch.testing.assert_close(average.eval()(x), average.module(x))


def test_a_copy_of_a_live_module_alone_is_plain() -> None:
    owner, live, _ = _live()
    alone = copy.deepcopy(live)
    assert type(alone) is nn.Linear and torch.equal(alone.weight, live.weight)
    assert [type(each) for each in alone.parameters()] == [nn.Parameter, nn.Parameter]
    with torch.no_grad():
        owner.weight.zero_()
    assert torch.count_nonzero(alone.weight) == alone.weight.numel()


class _RunByFunctions(nn.Module):
    """Two residual blocks whose forwards are functions that hold the layers: in a closure, a default, a list."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2)) for width in widths)
        first, both = self.blocks[0], [*self.blocks]
        self.first = lambda x: x + first(x).tanh()
        self.second = lambda x, *, last=both[1]: self.first(x) + last(self.first(x)) * len(both)
        self.register_forward_hook(lambda *called: called[-1] + both[0][1].bias.sum())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x)


def test_functions_that_hold_modules_hold_those_of_the_copy() -> None:
    torch.manual_seed(0)
    module = _RunByFunctions(3, 3)
    before = module(X)
    copied, shared = deep_copy(module), copy_module(module, {})
    assert torch.equal(copied(X), before)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(copied(X), before)
    assert torch.equal(module(X), X)
    assert torch.equal(shared(X), X)


class _RunsItself(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"first": nn.Linear(2, width), "last": nn.Linear(width, 2)})
        parts = self.parts
        self.run = lambda x: parts["last"](parts["first"](x).tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.run(x)


def test_a_model_run_by_functions_is_nested_and_extracted() -> None:
    torch.manual_seed(0)
    nested = matta.nest(*(nn.Sequential(_RunsItself(n), _RunsItself(n)) for n in (3, 5)), example=(X, None))
    mixed = matta.SubModel({"0": "wide"})
    for spec, widths in ((None, (3, 3)), (mixed, (5, 3)), (matta.wide(nested), (5, 5))):
        extracted, plain = matta.extract(nested, spec), nn.Sequential(*map(_RunsItself, widths))
        plain.load_state_dict(extracted.state_dict())
        assert torch.equal(extracted(X), plain(X))
    assert torch.equal(extracted(X), nested.ta(X))


def test_a_sub_model_that_would_run_replaced_blocks_is_refused() -> None:
    torch.manual_seed(0)
    nested = matta.nest(_RunByFunctions(3, 3), _RunByFunctions(5, 5), example=(X, None))
    assert torch.equal(matta.extract(nested)(X), nested.student(X))
    with pytest.raises(SubModelError, match=r"holds blocks in (_forward_hooks|first), .*read from the nn.ModuleList"):
        matta.extract(nested, matta.SubModel({matta.layer_names(nested)[0]: "wide"}))
