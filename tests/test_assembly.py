"""What a sub-model is put together from: structure, configs, numbers of layers, ties and buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.nesting.slicing import is_live, slices_of


def _gpt2(depth: int, inner: int) -> nn.Module:
    import transformers

    torch.manual_seed(depth)
    config = transformers.GPT2Config(n_embd=8, n_layer=depth, n_head=2, n_inner=inner, vocab_size=11, n_positions=8)
    return transformers.GPT2LMHeadModel(config).eval()


def _nested() -> matta.Nested:
    return matta.nest(_gpt2(2, 12), _gpt2(4, 20), layers={"transformer.h": "ends"}).eval()


def _spec(nested: matta.Nested, choices: str) -> matta.SubModel:
    kinds = {"w": "wide", "n": "narrow", "s": "skip"}
    return matta.SubModel(dict(zip(matta.layer_names(nested), (kinds[each] for each in choices), strict=True)))


@pytest.mark.parametrize("choices", ["wnnw", "wsnw", "nssn", "ssww", "wwww", "nnnn", "ssss"])
def test_configs_and_block_numbers_follow_the_blocks_that_are_there(choices: str) -> None:
    nested = _nested()
    made: Any = matta.extract(nested, _spec(nested, choices))
    kept = [each for each in choices if each != "s"]
    assert made.config.n_layer == len(made.transformer.h) == len(kept)
    assert [block.attn.layer_idx for block in made.transformer.h] == list(range(len(kept)))
    assert [block.mlp.c_fc.nf for block in made.transformer.h] == [{"w": 20, "n": 12}[each] for each in kept]
    assert made.lm_head.weight is made.transformer.wte.weight
    assert made.transformer.config is made.config
    assert nested.ta.config.n_layer == 4
    assert nested.student.config.n_layer == 2


@pytest.mark.parametrize("choices", ["wnnw", "wsnw", "nssn"])
def test_blocks_are_those_of_the_ta(choices: str) -> None:
    nested = _nested()
    live: Any = matta.live(nested, _spec(nested, choices))
    kept = [(index, each) for index, each in enumerate(choices) if each != "s"]
    for block, (index, each) in zip(live.transformer.h, kept, strict=True):
        whole = nested.ta.transformer.h[index].mlp.c_fc.weight
        assert torch.equal(block.mlp.c_fc.weight, whole if each == "w" else whole[:, :12])
    assert all(is_live(part) for part in live.modules())
    owners = {id(part) for part in nested.ta.modules()}
    assert {id(each.owner) for each in slices_of(live).values()} <= owners


@pytest.mark.parametrize("choices", ["wsww", "wwww", "nnnn", "nssn"])
def test_a_uniform_model_is_saved_and_loaded_by_its_stock_class(choices: str, tmp_path: Any) -> None:
    import transformers

    nested = _nested()
    made: Any = matta.extract(nested, _spec(nested, choices)).eval()
    made.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(input_ids=tokens).logits, made(input_ids=tokens).logits)


@pytest.mark.parametrize("choices", ["wwww", "nnnn", "wnnw"])
def test_parts_with_equal_configs_hold_one(choices: str) -> None:
    nested = _nested()
    made: Any = matta.extract(nested, _spec(nested, choices))
    held = [part.config for part in made.modules() if "config" in vars(part)]
    assert len({id(config) for config in held}) == len(set(choices))
    assert made.config.n_inner == (20 if "w" in choices else 12)
    assert all(config is not other for config in held for other in (nested.ta.config, nested.student.config))


class Alternating(nn.Module):
    """Every other block is of another kind: it scales, keeps a constant, and says its name."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.config = {"depth": depth}  # a plain mapping is left alone
        self.blocks = nn.ModuleList(Kind(width, ("local", "global")[i % 2]) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Kind(nn.Module):
    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.up, self.down, self.kind, self.reach = nn.Linear(4, width), nn.Linear(width, 4), kind, len(kind)
        self.register_buffer("mask", torch.full((4,), 0.5 if kind == "local" else 2.0))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu()) * self.mask * (1 if self.kind == "local" else -self.reach)


def test_a_narrow_block_is_of_the_kind_of_its_ta_block() -> None:
    nested = matta.nest(Alternating(3, 1), Alternating(5, 4), layers={"blocks": "first"}).eval()
    nested.ta.blocks[1].count.fill_(7)  # no constant of the kind: Student and TA have their own
    nested.student.blocks[0].count.fill_(3)
    made: Any = matta.extract(nested, matta.narrow(nested)).eval()
    assert [block.kind for block in made.blocks] == ["local", "global", "local", "global"]
    assert [block.reach for block in made.blocks] == [5, 6, 5, 6]
    assert [block.mask[0].item() for block in made.blocks] == [0.5, 2.0, 0.5, 2.0]
    assert [block.count.item() for block in made.blocks] == [3, 3, 3, 3]
    plain = Alternating(3, 4).eval()
    plain.load_state_dict(made.state_dict())
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made(x), plain(x))
    assert torch.equal(matta.live(nested, matta.narrow(nested)).eval()(x), plain(x))


class Normed(nn.Module):
    """Blocks with statistics, between a stem and a head with their own."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 4)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_block_unlike_the_students_is_narrow_as_it_is_where_blocks_do_not_grow() -> None:
    class Stage(nn.Module):
        def __init__(self, depth: int, width: int) -> None:
            super().__init__()
            down = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 4))
            self.blocks = nn.Sequential(down, *(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(depth - 1)))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)

    deeper = matta.nest(Stage(1, 5), Stage(3, 5), layers={"blocks": "first"})
    x = torch.randn(2, 3)
    with torch.no_grad():
        for spec in (matta.narrow(deeper), matta.SubModel({"blocks.1": "wide"})):
            assert torch.equal(matta.live(deeper, spec).eval()(x), deeper.ta.eval()(x))
            assert torch.equal(matta.extract(deeper, spec).eval()(x), deeper.ta(x))
    wider = matta.nest(Stage(1, 5), Stage(3, 7), layers={"blocks": "first"}, layouts={"*": 1})
    with pytest.raises(matta.MattaError, match=r"block 1 of blocks cannot be narrow: no Student block shares all"):
        matta.live(wider, matta.narrow(wider))


def test_buffers_are_copies_of_those_of_the_blocks_they_come_from() -> None:
    nested = matta.nest(Normed(4, 2), Normed(6, 2))
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    nested.student.train()(x)
    nested.ta.train()(2 * x)
    made: Any = matta.live(nested, matta.SubModel({"blocks.0": "wide"}))
    found, sources = [block[1].running_mean for block in made.blocks], (nested.ta, nested.student)
    for buffer, source, index in zip(found, sources, (0, 1), strict=True):
        original = source.get_submodule(f"blocks.{index}.1").running_mean
        assert torch.equal(buffer, original)
        assert buffer.data_ptr() != original.data_ptr()


def test_a_block_in_several_places_stays_one() -> None:
    class Looped(Normed):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__(width, 1)
            self.blocks = nn.ModuleList([self.blocks[0]] * depth)

    nested = matta.nest(Looped(4, 2), Looped(6, 3), layers={"blocks": "first"}).eval()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for spec, parts in ((matta.narrow(nested), 1), (matta.wide(nested), 1), (matta.wide_narrow_wide(nested, 1), 2)):
        made: Any = matta.extract(nested, spec).eval()
        assert len({id(block) for block in made.blocks}) == parts
        assert len(made.blocks) == 3
        assert torch.equal(made(x), matta.live(nested, spec).eval()(x))


def test_weights_tied_in_the_ta_are_tied_in_every_sub_model() -> None:
    class Tied(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(7, width), nn.Linear(width, width), nn.Linear(width, 7)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mix(self.table(ids)))

    nested, ids = matta.nest(Tied(4), Tied(6)).eval(), torch.tensor([1, 2])
    for k in range(len(matta.layer_names(nested)) + 1):
        made: Any = matta.extract(nested, matta.wide_narrow_wide(nested, k)).eval()
        assert made.head.weight is made.table.weight
        assert type(made.table) is nn.Embedding
    assert torch.equal(made(ids), nested.ta(ids))
    assert torch.equal(matta.extract(nested, matta.narrow(nested)).eval()(ids), nested.student(ids))


@pytest.mark.parametrize("choice", ["narrow", "wide"])
def test_a_live_sub_model_trains_the_private_parameters_that_it_has(choice: str) -> None:
    def tower(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

    nested = matta.nest(tower(4), tower(6), private=["2.bias"])
    live: Any = matta.live(nested, getattr(matta, choice)(nested)).train()
    live(torch.ones(1, 3)).sum().backward()
    trained = nested.student if choice == "narrow" else nested.ta
    assert live[2].bias is nested.student[2].bias or choice == "wide"
    assert trained[2].bias.grad is not None
    made = matta.extract(nested, getattr(matta, choice)(nested))
    assert made[2].bias is not trained[2].bias
    assert torch.equal(made[2].bias, trained[2].bias)
