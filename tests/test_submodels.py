"""Sub-models: which layers there are, every choice of them, and the family from narrow to wide."""

from __future__ import annotations

from itertools import pairwise, product
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.errors import SubModelError
from matta.sizes.submodels import alike_layers, sizes_between

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, width), nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Residual(nn.Module):
    def __init__(self, width: int, depth: int, hidden: int = 5) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.stem, self.head = nn.Linear(3, hidden), nn.Linear(hidden, 2)
        self.blocks = nn.ModuleList(Block(hidden, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _tower(*widths: int) -> nn.Sequential:
    torch.manual_seed(widths[0])
    sizes = [3, *widths, 2]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in layer))


def _residual(rule: Any = "even", small: int = 3, large: int = 5) -> matta.Nested:
    return matta.nest(Residual(4, small), Residual(7, large), layers={"blocks": rule}).eval()


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


NESTINGS = {
    "blocks": lambda: _residual(),
    "tower": lambda: matta.nest(_tower(4, 5, 6), _tower(7, 8, 9)).eval(),
    "equal-tower": lambda: matta.nest(_tower(4, 4, 4), _tower(7, 7, 7)).eval(),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_the_family_grows_from_narrow_to_wide(name: str) -> None:
    nested = NESTINGS[name]()
    names = matta.layer_names(nested)
    specs = [matta.wide_narrow_wide(nested, k) for k in range(len(names) + 1)]
    sizes = [_size(matta.extract(nested, spec)) for spec in specs]
    assert sizes == sorted(set(sizes))
    assert specs[0] == matta.narrow(nested)
    assert specs[-1] == matta.wide(nested)
    assert sizes[-1] == _size(nested.ta)
    assert torch.equal(matta.live(nested, specs[-1]).eval()(X), nested.ta(X))


@pytest.mark.parametrize("name", NESTINGS)
def test_every_choice_runs_live_as_it_is_extracted(name: str) -> None:
    nested = NESTINGS[name]()
    names = matta.layer_names(nested)
    kinds = ("wide", "narrow", "skip") if name == "blocks" else ("wide", "narrow")
    for choice in list(product(kinds, repeat=len(names)))[::5]:
        spec = matta.SubModel(dict(zip(names, choice, strict=True)))
        live, extracted = matta.live(nested, spec).eval(), matta.extract(nested, spec).eval()
        assert torch.equal(live(X), extracted(X)), choice
        assert type(extracted) is type(nested.ta)


@pytest.mark.parametrize("rule", ["first", "last", "even", "ends"])
def test_the_students_blocks_narrow_and_the_others_skipped_are_the_student(rule: str) -> None:
    nested = _residual(rule)
    kept = {f"blocks.{index}" for index in nested.plan.layers[0].indices}
    spec = matta.SubModel({name: "narrow" if name in kept else "skip" for name in matta.layer_names(nested)})
    assert torch.equal(matta.extract(nested, spec).eval()(X), nested.student(X))


def test_a_narrow_tower_is_the_student() -> None:
    nested = NESTINGS["tower"]()
    assert torch.equal(matta.live(nested, matta.narrow(nested)).eval()(X), nested.student(X))


def test_a_mixed_tower_is_the_leading_block_of_each_matrix() -> None:
    nested = NESTINGS["tower"]()
    extracted = matta.extract(nested, matta.SubModel({"0": "wide", "2": "narrow", "4": "wide"}))
    assert isinstance(extracted, nn.Sequential)
    sizes = {0: (7, 3), 2: (5, 7), 4: (9, 5), 6: (2, 9)}
    for index, (outputs, inputs) in sizes.items():
        assert torch.equal(extracted[index].weight, nested.ta[index].weight[:outputs, :inputs])
        assert torch.equal(extracted[index].bias, nested.ta[index].bias[:outputs])
        assert (extracted[index].out_features, extracted[index].in_features) == (outputs, inputs)


def test_a_live_sub_model_sees_the_next_step_and_passes_gradients() -> None:
    nested = _residual()
    live = matta.live(nested, matta.wide_narrow_wide(nested, 2)).train()
    live(X).sum().backward()
    assert nested.ta.blocks[0].up.weight.grad.abs().sum() > 0
    assert torch.count_nonzero(nested.ta.blocks[2].up.weight.grad[4:]) == 0
    before = live.eval()(X)
    with torch.no_grad():
        nested.ta.head.weight.mul_(2)
        nested.ta.head.bias.mul_(2)
    torch.testing.assert_close(live(X), 2 * before)


def test_wide_narrow_wide_takes_both_ends() -> None:
    nested = _residual(small=3, large=5)
    found = [
        [spec.choices[f"blocks.{i}"][0] for i in range(5)]
        for spec in (matta.wide_narrow_wide(nested, k) for k in range(6))
    ]
    assert ["".join(each) for each in found] == ["nnnnn", "wnnnn", "wnnnw", "wwnnw", "wwnww", "wwwww"]


def test_a_random_sub_model_is_drawn_from_all() -> None:
    nested = _residual()
    draw = matta.random_sub_model(nested)
    drawn = {draw(Random(seed)) for seed in range(64)}
    assert len(drawn) > 16
    assert draw(Random(3)) == draw(Random(3))
    assert {choice for spec in drawn for choice in spec.choices.values()} == {"wide", "narrow"}


def test_layers_go_from_input_to_output() -> None:
    assert matta.layer_names(_residual()) == tuple(f"blocks.{i}" for i in range(5))
    assert matta.layer_names(NESTINGS["tower"]()) == ("0", "2", "4")
    assert matta.layer_names(NESTINGS["equal-tower"]()) == ("0", "2", "4")
    assert matta.layer_names(matta.nest(nn.Linear(3, 2), nn.Linear(3, 2))) == ()


def test_specs_are_values() -> None:
    one, other = matta.SubModel({"a": "wide", "b": "skip"}), matta.SubModel({"b": "skip", "a": "wide"})
    assert one == other
    assert len({one, other, matta.SubModel({"a": "wide"})}) == 2


def _hidden() -> matta.Nested:
    return matta.nest(Residual(4, 2), Residual(7, 3, hidden=6), layers={"blocks": "first"})


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: matta.SubModel({"a": "medium"}), r"received 'medium' for 'a'; expected 'wide', 'narrow' or 'skip'"),
        (lambda: matta.SubModel(default="skip"), r"received default='skip'; expected 'narrow' or 'wide'"),
        (lambda: matta.wide_narrow_wide(_residual(), 6), r"received k=6; expected 0 to 5, .*: blocks.0, blocks.1"),
        (lambda: matta.wide_narrow_wide(_residual(), -1), r"received k=-1; expected 0 to 5"),
        (lambda: matta.wide_narrow_wide(_residual(), 0.5), r"received k=0.5; expected 0 to 5"),  # type: ignore[arg-type]
        (
            lambda: matta.extract(_residual(), {"a": "wide"}),
            r"received dict as the sub-model; expected such as matta.SubModel",
        ),  # type: ignore[arg-type]
        (
            lambda: matta.live(_residual(), matta.SubModel({"blocks.5": "wide"})),
            r"there is no layer 'blocks.5'; the layers are: blocks.0",
        ),
        (
            lambda: matta.live(NESTINGS["tower"](), matta.SubModel({"2": "skip"})),
            r"'2' is a width, not a block of a module list: it can be 'wide' or 'narrow', not skipped",
        ),
        (
            lambda: matta.live(_hidden(), matta.SubModel({"blocks.0": "wide"})),
            r"received a mixture \(.*\), but the hidden width itself grows.*; expected all wide or all narrow; nest",
        ),
        (
            lambda: matta.live(
                matta.nest(Residual(4, 2), Residual(7, 2), private=["blocks.0.up.*"], layouts={"blocks.*": 1}),
                matta.SubModel({}),
            ),
            r"TA's block 0 of blocks cannot be narrow: no Student block shares all of its parameters.*take it wide",
        ),
    ],
)
def test_what_the_nesting_does_not_hold_is_refused(attempt: Any, message: str) -> None:
    with pytest.raises(SubModelError, match=message):
        attempt()


def test_nothing_between_models_that_share_no_layer_is_refused() -> None:
    nested = matta.nest(nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2)), share="none")
    with pytest.raises(matta.MattaError, match="shares no layer with the TA.*expected a nesting with share='all'"):
        matta.narrow(nested)


def test_without_a_shared_layer_the_wide_one_is_still_the_ta() -> None:
    nested = matta.nest(Residual(4, 2), Residual(7, 3), layers={"blocks": "first"}, share="none").eval()
    assert torch.equal(matta.extract(nested, matta.wide(nested)).eval()(X), nested.ta(X))


def test_a_draw_is_among_the_sub_models_wanted() -> None:
    nested = _residual()
    wanted = [matta.wide_narrow_wide(nested, k) for k in (1, 3)]
    draw = matta.random_sub_model(nested, among=wanted)
    assert {draw(Random(seed)) for seed in range(20)} == {*wanted}
    for among, message in (
        ([], "expected at least one"),
        ([matta.SubModel({"none": "wide"})], "there is no layer 'none'"),
    ):
        with pytest.raises(SubModelError, match=message):
            matta.random_sub_model(nested, among=among)


def test_a_module_called_hidden_is_a_layer_like_any_other() -> None:
    class Tower(nn.Module):
        def __init__(self, *widths: int) -> None:
            super().__init__()
            self.hidden, self.second = nn.Linear(3, widths[0]), nn.Linear(*widths)
            self.last = nn.Linear(widths[1], 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.hidden(x).relu()).relu())

    nested = matta.nest(Tower(4, 5), Tower(8, 9))
    mixture = matta.SubModel({"hidden": "wide"})
    assert matta.layer_names(nested) == ("hidden", "second")
    assert matta.extract(nested, mixture).hidden.out_features == 8
    assert mixture.choices.items() <= sizes_between(nested)[1].choices.items()
    draws = {tuple(matta.random_sub_model(nested)(Random(seed)).choices.values()) for seed in range(20)}
    assert len(draws) == 4
    found = matta.family(nested, evaluate=lambda module: 0.0, example=(X, None), calls=0, progress=False)
    assert [size.name for size in found.sizes] == ["Student", "wide: second", "wide: hidden", "TA"]


class Deep(nn.Module):
    """Residual blocks; in some the hidden layer, a number or a norm's statistics are the Student's."""

    def __init__(self, depth: int, hidden: int = 4, scale: float = 1.0, *, has_norm: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            norm = [nn.BatchNorm1d(hidden)] if has_norm else []
            self.blocks.append(nn.Sequential(nn.Linear(6, hidden), *norm, nn.Softplus(scale), nn.Linear(hidden, 6)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.filterwarnings("ignore:sizes between Student and TA were judged")
@pytest.mark.parametrize(
    ("of_student", "of_ta", "are_alike"),
    [
        ({}, {}, True),
        ({}, {"hidden": 8}, False),
        ({"scale": 2.0}, {}, False),
        ({"has_norm": True}, {"has_norm": True}, False),
    ],
)
def test_blocks_in_which_nothing_grows_are_no_sizes(
    of_student: dict[str, Any], of_ta: dict[str, Any], are_alike: bool
) -> None:
    torch.manual_seed(0)
    nested = matta.nest(Deep(2, **of_student), Deep(4, **of_ta), layers={"blocks": "even"})
    x = torch.randn(5, 6)
    nested.ta.train()(x)  # changes the statistics of its norms
    nested.eval()
    assert alike_layers(nested) == ({*matta.layer_names(nested)} if are_alike else set())
    models = [matta.extract(nested, spec) for spec in (matta.narrow(nested), matta.wide(nested))]
    assert are_alike == torch.equal(models[0](x), models[1](x))
    family = matta.family(
        nested, evaluate=lambda module: float(module(x).sum()), example=(x, None), calls=0, progress=False
    )
    assert len(family.sizes) == (2 if are_alike else 17) and family.is_complete
    if are_alike:
        assert [size.name for size in family.sizes] == ["Student", "TA"]
