"""Grown modules: what grows with what, that it is the right map, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import matta
from matta.errors import GrowthError, TracingError
from matta.nesting.growing import grow
from matta.nesting.matching import trace_layouts


class Ranker(nn.Module):
    """Embeddings and dense features, one after the other, into an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(11, 4), nn.EmbeddingBag(7, 3)
        self.mlp = nn.Sequential(nn.Linear(4 + 3 + 5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, user: Tensor, items: Tensor, dense: Tensor) -> Tensor:
        return self.mlp(torch.cat([self.user(user), dense, self.item(items)], dim=-1)).squeeze(-1)


class TwoTowers(nn.Module):
    """A dot product of two towers, of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
        self.item = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 4))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        first, second = functional.normalize(self.user(user), dim=-1), functional.normalize(self.item(item), dim=-1)
        return (first * second).sum(-1)


class Block(nn.Module):
    def __init__(self, source: int, target: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(source, target, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(target), nn.BatchNorm2d(target)
        self.conv2 = nn.Conv2d(target, target, 3, 1, 1, bias=False)
        self.skip = nn.Identity() if source == target else nn.Conv2d(source, target, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.skip(x))


class ResNet(nn.Module):
    """Residual blocks with BatchNorm, flattened into a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 6, 2))
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


class FusedSwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(6), nn.Linear(6, 16), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * value)


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))


class Depthwise(nn.Module):
    def __init__(self, groups: int = 8) -> None:
        super().__init__()
        self.expand, self.project, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Linear(4, 2)
        self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.squeeze, self.excite = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.mix(functional.relu6(self.expand(x))))
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean((2, 3))))))
        x = self.project(x * gate[:, :, None, None])
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class CrossNet(nn.Module):
    """DCN-v2: x0 * (W x) + x."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.cross = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = first = self.embed(ids).flatten(1)
        for layer in self.cross:
            x = first * layer(x) + x
        return self.head(x)


class CrossNetOnInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.cross(x) + x)


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **settings)
        self.head = nn.Linear(4 * (2 if settings.get("bidirectional") else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


class GatedAttention(nn.Module):
    """Gated attention unit (Fig. 3), with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v, self.z = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 4)
        self.gamma, self.beta = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 4))
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        base = functional.silu(self.z(x))
        q, k = (base.unsqueeze(-2) * self.gamma + self.beta).unbind(-2)
        weights = functional.relu(torch.einsum("bnd,bmd->bnm", q, k) / x.shape[1]) ** 2
        return x + self.out(functional.silu(self.u(x)) * torch.einsum("bnm,bme->bne", weights, self.v(x)))


class Experts(nn.Module):
    """A mixture of experts: the token's best expert, on stacked raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(3, 8, 6))
        self.entry, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        share = self.router(x).softmax(-1)
        hidden = functional.gelu(torch.einsum("bd,edh->beh", x, self.up))
        return self.head(torch.einsum("beh,ehd,be->bd", hidden, self.down, share))


class RoutedExperts(nn.Module):
    """A mixture of experts that moves tokens about by index."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(6, 2), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weight, best = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (best == i).nonzero().flatten()
            out.index_add_(0, rows, expert(x[rows]) * weight[rows, None])
        return self.head(x + out)


class Decoder(nn.Module):
    """Transposed convolutions and norms with groups, then a layer norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(3, 8, 2, 2), nn.GroupNorm(2, 8)
        self.instance, self.mix = nn.InstanceNorm2d(8, affine=True), nn.ConvTranspose2d(8, 4, 1)
        self.plain, self.head = nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.instance(self.norm(self.up(x))))
        return self.head(self.plain(x.mean((2, 3))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.PReLU(6), nn.Linear(6, 3))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


IDS = torch.tensor([[0, 1], [2, 3], [4, 5]])
RANKER = ((IDS[:, 0], IDS, floats(3, 5)), None)
GROWN: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, float], dict[str, tuple[int, ...]]]] = {
    "mlp": (mlp, floats(2, 5), {"0": 2.0, "2": 9}, {"2.weight": (9, 16), "3.weight": (9,), "4.weight": (3, 9)}),
    "ranker": (
        Ranker, RANKER[0], {"user": 2.0, "item": 5, "mlp.0": 3.0},
        {"user.weight": (11, 8), "item.weight": (7, 5), "mlp.0.weight": (24, 18), "mlp.2.weight": (6, 24)},
    ),
    "two towers": (
        TwoTowers, (floats(2, 5), floats(2, 3)), {"user.2": 6, "*.0": 2.0},
        {"user.2.weight": (6, 12), "item.2.weight": (6, 14)},
    ),
    "resnet": (
        ResNet, floats(2, 3, 8, 8), {"stem": 2.0, "blocks.1.conv2": 9, "blocks.0.conv1": 5},
        {"blocks.0.conv1.weight": (5, 8, 3, 3), "blocks.0.conv2.weight": (8, 5, 3, 3), "fc.weight": (5, 36),
         "blocks.1.skip.weight": (9, 8, 1, 1), "blocks.1.bn2.running_var": (9,)},
    ),
    "fused swiglu": (FusedSwiGLU, floats(2, 3, 6), {"up": 2.0}, {"up.weight": (32, 6), "down.weight": (6, 16)}),
    "fused swiglu, absolute": (FusedSwiGLU, floats(2, 3, 6), {"up": 24}, {"down.weight": (6, 12)}),
    "swiglu": (SwiGLU, floats(2, 6), {"gate": 1.5}, {"up.weight": (12, 6), "down.weight": (6, 12)}),
    "depthwise": (
        Depthwise, floats(2, 3, 4, 4), {"expand": 2.0},
        {"mix.weight": (16, 1, 3, 3), "excite.weight": (16, 2), "squeeze.weight": (2, 16)},
    ),
    "cross": (CrossNet, IDS, {"embed": 2.0}, {"cross.1.weight": (16, 16), "head.weight": (1, 16)}),
    "lstm": (lambda: Recurrent(nn.LSTM), floats(2, 3, 3), {"rnn": 6}, {"rnn.weight_hh_l0": (24, 6)}),
    "gru": (
        lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), floats(2, 3, 3), {"rnn": 2.0},
        {"rnn.weight_ih_l1_reverse": (24, 16), "head.weight": (2, 16)},
    ),
    "gau": (
        GatedAttention, floats(2, 3, 6), {"u": 2.0, "z": 5},
        {"v.weight": (16, 6), "gamma": (2, 5), "beta": (2, 5), "out.weight": (6, 16)},
    ),
    "experts": (
        Experts, floats(4, 5), {"entry": 7, "up:2": 2.0, "down:2": 9},
        {"up": (3, 7, 16), "down": (3, 16, 9), "router.weight": (3, 7), "head.weight": (2, 9)},
    ),
    "routed experts": (
        RoutedExperts, floats(9, 6), {"experts.*.0": 2.0}, {"experts.1.2.weight": (6, 16)},
    ),
    "decoder": (
        Decoder, floats(2, 3, 2, 2), {"up": 12}, {"up.weight": (3, 12, 2, 2), "mix.weight": (12, 4, 1, 1)},
    ),
    "encoder, ffn": (encoder, floats(2, 3, 8), {"linear1": 2.0}, {"linear2.weight": (8, 32)}),
}  # fmt: skip


def implant(student: nn.Module, ta: nn.Module, example: Any) -> nn.Module:
    """The TA with the Student's weights at their places and zeros about them; statistics stay."""
    layouts, ta = trace_layouts(student, ta, example), copy.deepcopy(ta)
    targets = dict(ta.named_parameters())
    with torch.no_grad():
        for name, source in student.named_parameters():
            spread = source
            for axis, (small, large) in enumerate(zip(source.shape, targets[name].shape, strict=True)):
                layout = layouts.get(name)
                positions = layout.resolve(axis, small, large).positions() if layout else list(range(small))
                wider = list(spread.shape)
                wider[axis] = large
                spread = torch.zeros(wider).index_copy(axis, torch.tensor(positions), spread)
            targets[name].copy_(spread)
    return ta


@pytest.mark.parametrize("case", GROWN)
def test_named_layers_widen_with_all_that_belongs_to_them(case: str) -> None:
    build, inputs, widths, shapes = GROWN[case]
    torch.manual_seed(0)
    student = build()
    before = copy.deepcopy(student.state_dict())
    ta = grow(student, widths=widths, example=(inputs, None))
    state = ta.state_dict()
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert type(ta) is type(student) and ta.training
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("case", GROWN)
def test_grown_module_holds_the_student_where_the_layouts_say(case: str) -> None:
    build, inputs, widths, _ = GROWN[case]
    torch.manual_seed(0)
    student = build().eval()
    ta = grow(student, widths=widths, example=(inputs, None)).eval()
    holding = implant(student, ta, (inputs, None))
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    expected, received = student(*arguments), holding(*arguments)
    torch.testing.assert_close(received, expected)
    assert not torch.allclose(ta(*arguments), expected)


@pytest.mark.parametrize(
    ("build", "inputs", "widths", "error", "message"),
    [
        (mlp, floats(2, 5), {"4": 2.0}, GrowthError, "'4' are in the module's output"),
        (mlp, floats(2, 5), {"nothing.*": 2.0}, GrowthError, "matched no layer with weights; the Student has: 0, 2, 4"),
        (mlp, floats(2, 5), {"1": 2.0}, GrowthError, "matched no layer with weights"),
        (mlp, floats(2, 5), {"0": 4}, GrowthError, "would shrink from 8 channels.*write 4.0 for a factor"),
        (mlp, floats(2, 5), {"0": 0.5}, GrowthError, "would shrink"),
        (mlp, floats(2, 5), {"0": "wide"}, GrowthError, "a factor .float. or a number"),
        (mlp, floats(2, 5), {"0": float("nan")}, GrowthError, "a factor .float. or a number"),
        (mlp, floats(2, 5), ["0"], GrowthError, "widths=.'0'.; expected a mapping from names"),
        (mlp, floats(2, 4), {"0": 2.0}, TracingError, "fails on the example with RuntimeError"),
        (SwiGLU, floats(2, 6), {"gate": 2.0, "up": 3.0}, GrowthError, "as wide as one another: gate.weight"),
        (FusedSwiGLU, floats(2, 6), {"up": 25}, GrowthError, "multiple of 16"),
        (SwiGLU, floats(2, 6), {"down": 2.0}, GrowthError, "in the module's output"),
        (CrossNetOnInputs, floats(2, 8), {"cross": 2.0}, GrowthError, "meet those of an input of the module"),
        (lambda: Depthwise(2), floats(2, 3, 4, 4), {"expand": 2.0}, TracingError, "of 2 groups"),
        (Ranker, RANKER[0], {"mlp.4": 2.0}, GrowthError, "'mlp.4' has no output channels to widen"),
    ],
)  # fmt: skip
def test_refuses(
    build: Callable[[], nn.Module], inputs: Any, widths: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        grow(build(), widths=widths, example=(inputs, None))


class Heads(nn.Module):
    """Attention with heads, of a width that is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.qkv, self.out = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(x + self.out(mixed.reshape(*x.shape[:2], 8)))


def test_refuses_heads_but_widens_the_stream_about_them() -> None:
    example = (floats(2, 3, 5), None)
    with pytest.raises(TracingError, match="ambiguous.*24.*'qkv'|splits 24 of them into 3 x 2 x 4"):
        grow(Heads(), widths={"qkv": 2.0}, example=example)
    ta = grow(Heads(), widths={"entry": 2.0}, example=example)
    assert {name: tuple(p.shape) for name, p in ta.named_parameters() if p.ndim == 2} == {
        "entry.weight": (16, 5), "qkv.weight": (24, 16), "out.weight": (16, 8), "head.weight": (3, 16),
    }  # fmt: skip


class Written(nn.Module):
    """A width written down in the code."""

    def __init__(self, shuffle: bool = False) -> None:
        super().__init__()
        self.conv, self.head, self.shuffle = nn.Conv2d(3, 4, 1), nn.Linear(4 * 4, 2), shuffle

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(functional.channel_shuffle(x, 2).flatten(1) if self.shuffle else x.view(-1, 16))


def test_refuses_a_width_that_is_written_in_the_code() -> None:
    with pytest.raises(GrowthError, match="does not run.*construct the TA by hand"):
        grow(Written(), widths={"conv": 2.0}, example=(floats(2, 3, 2, 2), None))
    with pytest.raises(TracingError, match="reordered one by one"):
        grow(Written(shuffle=True), widths={"conv": 2.0}, example=(floats(2, 3, 2, 2), None))


class Sliced(nn.Module):
    """Runs at any width, but with other channels in its second half."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        return self.head(torch.cat([x[:, :4], torch.tanh(x[:, 4:])], dim=-1))


def test_refuses_where_other_channels_would_meet() -> None:
    with pytest.raises(GrowthError, match="meet others than in the Student"):
        grow(Sliced(), widths={"entry": 2.0}, example=(floats(2, 3), None))


def test_refuses_a_call_without_anything_to_grow() -> None:
    with pytest.raises(GrowthError, match="nothing to grow"):
        grow(mlp())
    with pytest.raises(GrowthError, match="needs an example"):
        grow(mlp(), widths={"0": 2.0})
    with pytest.raises(GrowthError, match="Sequential has none; use widths="):
        grow(mlp(), {"n_layer": 3})


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entry, self.blocks = nn.Linear(3, 6), nn.ModuleList(SwiGLU() for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_stacks_of_blocks_deepen_and_widen_together() -> None:
    example = {"x": floats(2, 3), "labels": torch.tensor([0, 1])}
    ta = grow(Stack(), layers={"blocks": 4}, widths={"blocks.*.gate": 2.0}, example=example)
    assert [tuple(block.down.weight.shape) for block in ta.blocks] == [(6, 16)] * 4
    weights = [block.up.weight for block in ta.blocks]
    assert not torch.equal(weights[2], weights[3]) and not torch.equal(weights[1], weights[3])
    assert len(grow(Stack(), layers={"block*": 3}, example=example).blocks) == 3


def test_refuses_stacks_that_cannot_deepen() -> None:
    with pytest.raises(GrowthError, match="matched no ModuleList or Sequential.*has: blocks"):
        grow(Stack(), layers={"towers": 4})
    with pytest.raises(GrowthError, match="has 2 blocks; expected a whole number of at least as many"):
        grow(Stack(), layers={"blocks": 1})
    with pytest.raises(GrowthError, match="has: none"):
        grow(mlp(), layers={"blocks": 3})


def test_keeps_dtype_mode_ties_and_frozen_parameters() -> None:
    tied = Tied().double().eval()
    tied.norm.weight.requires_grad_(False)
    ta = grow(tied, widths={"embed": 2.0}, example=(IDS, None))
    assert ta.head.weight is ta.embed.weight and ta.embed.weight.shape == (9, 8)
    assert ta.norm.weight.dtype == torch.float64 and not ta.training and not ta.norm.weight.requires_grad


def test_norms_without_weights_follow_their_width() -> None:
    ta = grow(Decoder(), widths={"mix": 2.0}, example=(floats(2, 3, 2, 2), None))
    assert ta.plain.normalized_shape == (8,)
    assert ta.head.weight.shape == (2, 8)


def test_an_expert_without_tokens_is_no_trouble() -> None:
    ta = grow(RoutedExperts(), widths={"experts.0.0": 2.0, "experts.1.0": 2.0}, example=(floats(1, 6), None))
    assert [expert[2].weight.shape for expert in ta.experts] == [(6, 16)] * 2


def test_refuses_deeper_modules_that_do_not_run() -> None:
    with pytest.raises(GrowthError, match="does not run on the example: RuntimeError"):
        grow(Stack(), layers={"blocks": 3}, example=(floats(2, 4), None))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.position = nn.Parameter(torch.full((1, 2, 4), 0.5))
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids) + self.position))


def test_fresh_weights_follow_the_layers_own_reset_or_init() -> None:
    torch.manual_seed(0)
    ta = grow(Tied(), widths={"embed": 400}, example=(IDS, None))
    assert torch.equal(ta.norm.weight, torch.ones(400)) and torch.equal(ta.position, torch.full((1, 2, 400), 0.5))
    assert 0.9 < ta.embed.weight.std().item() < 1.1

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.constant_(module.weight, 0.25)

    student = Tied()
    nn.init.constant_(student.norm.bias, 3.0)
    ta = grow(student, widths={"embed": 400}, example=(IDS, None), init=init)
    assert torch.equal(ta.embed.weight, torch.full((9, 400), 0.25))
    assert torch.equal(ta.norm.bias, torch.zeros(400))


def test_leaves_the_random_state_to_the_initialisation_alone() -> None:
    torch.manual_seed(3)
    first = grow(mlp(), widths={"0": 2.0}, example=(floats(2, 5), None))
    torch.manual_seed(3)
    second = grow(mlp(), widths={"0": 2.0}, example=(floats(7, 5), None))
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entry, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.entry(x) * self.scale)


def test_refuses_a_buffer_whose_values_it_cannot_know() -> None:
    with pytest.raises(GrowthError, match="the buffer scale would grow"):
        grow(Buffered(), widths={"entry": 2.0}, example=(floats(2, 3), None))


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(2, 5), min_size=2, max_size=3),
    factors=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    pixels=st.integers(1, 3),
)
def test_flattened_and_joined_branches_nest(sizes: list[int], factors: list[int], pixels: int) -> None:
    """Any number of branches, of any width, of which each is flattened before they are joined."""
    branches = [nn.Sequential(nn.Conv1d(2, size, 1), nn.Flatten()) for size in sizes]
    student = Joined(branches, sum(sizes) * pixels).eval()
    example = (floats(2, 2, pixels), None)
    widths = {f"branches.{i}.0": float(factors[i]) for i in range(len(sizes))}
    ta = grow(student, widths=widths, example=example)
    torch.testing.assert_close(implant(student, ta, example)(example[0]), student(example[0]))


class Joined(nn.Module):
    def __init__(self, branches: list[nn.Sequential], size: int) -> None:
        super().__init__()
        self.branches, self.head = nn.ModuleList(branches), nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([branch(x) for branch in self.branches], dim=1))


CONFIGS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8},
             {"n_layer": 3, "n_inner": 64}),
    "gpt2, width": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8},
                    {"hidden_size": 16}),
    "llama": ("LlamaForCausalLM", "LlamaConfig",
              {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2},
              {"hidden_size": 16, "num_hidden_layers": 2}),
    "bert": ("BertForSequenceClassification", "BertConfig",
             {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2},
             {"intermediate_size": 24}),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}, {"d_ff": 24, "num_layers": 2}),
    "vit": ("ViTForImageClassification", "ViTConfig",
            {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 4, "patch_size": 2}, {"intermediate_size": 24, "num_hidden_layers": 2}),
}  # fmt: skip
FFNS = {
    "gpt2": "*.c_fc", "gpt2, width": "*.c_fc", "llama": "*.up_proj", "bert": "*.intermediate.dense",
    "t5": "*.wi", "vit": "*.fc1",
}  # fmt: skip


def transformer(name: str) -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    model, config, settings, _ = CONFIGS[name]
    words = {} if name == "vit" else {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    student = getattr(transformers, model)(getattr(transformers, config)(**words, **settings))
    if name == "vit":
        return student, {"pixel_values": floats(2, 3, 4, 4)}
    return student, {"input_ids": IDS} | ({"decoder_input_ids": IDS} if name == "t5" else {})


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_models_grow_through_their_configuration(name: str) -> None:
    student, example = transformer(name)
    changes = CONFIGS[name][3]
    before = student.config.to_dict()
    ta = grow(student.double().eval(), changes, example=example)
    assert type(ta) is type(student) and ta.dtype == torch.float64 and not ta.training
    assert all(getattr(ta.config, key) == value for key, value in changes.items())
    assert student.config.to_dict() == before
    assert ta.config._attn_implementation == student.config._attn_implementation
    shapes = {key: parameter.shape for key, parameter in ta.named_parameters()}
    for key, parameter in student.named_parameters():
        assert all(new >= old for new, old in zip(shapes[key], parameter.shape, strict=True))
    assert ta.num_parameters() > student.num_parameters()


def test_values_that_the_configuration_derives_follow_the_changed_ones() -> None:
    ta = grow(transformer("llama")[0], {"hidden_size": 16})
    assert ta.config.head_dim == 8 and ta.model.layers[0].self_attn.q_proj.weight.shape == (16, 16)
    assert grow(transformer("gpt2")[0], {"n_embd": 16}).transformer.h[0].mlp.c_fc.weight.shape == (16, 64)
    assert len(grow(transformer("t5")[0], {"num_layers": 3}).decoder.block) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_feed_forward_layers_of_transformers_models_widen_by_name(name: str) -> None:
    student, example = transformer(name)
    ta = grow(student.eval(), widths={FFNS[name]: 2.0}, example=example)
    holding = implant(student, ta, example)
    torch.testing.assert_close(holding(**example).logits, student(**example).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3}, "GPT2Config has no such value; did you mean n_layer"),
        ({"n_layer": 1}, "holds all of the Student's layers"),
        ({"n_embd": 4}, "shrinks from .* only raise numbers"),
        ({"n_embd": 9}, "cannot be constructed with {'n_embd': 9}"),
    ],
)
def test_refuses_a_configuration(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GrowthError, match=message):
        grow(transformer("gpt2")[0], changes)


def test_refuses_to_deepen_a_transformers_model_past_its_configuration() -> None:
    with pytest.raises(GrowthError, match="number of layers with config="):
        grow(transformer("gpt2")[0], layers={"transformer.h": 3})


@pytest.mark.parametrize("case", GROWN)
def test_grown_module_nests_and_extracts_to_the_student(case: str) -> None:
    build, inputs, widths, _ = GROWN[case]
    torch.manual_seed(0)
    student = build()
    ta = grow(student, widths=widths, example=(inputs, None))
    nested = matta.nest(student, ta, layouts=trace_layouts(student, ta, (inputs, None)))
    with torch.no_grad():
        held = implant(student, ta, (inputs, None)).parameters()
        for parameter, value in zip(ta.parameters(), held, strict=True):
            parameter.copy_(value)
    module = matta.extract(nested)
    assert type(module) is type(student)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name)), name


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_models_nest_in_what_they_grow_to(name: str) -> None:
    student, example = transformer(name)
    ta = grow(student, CONFIGS[name][3])
    layouts = trace_layouts(student, ta, example)
    nested = matta.nest(student, ta, layers=DEEPER.get(name, {}), layouts=layouts)
    assert type(matta.extract(nested)) is type(student)


DEEPER = {
    "gpt2": {"transformer.h": "first"},
    "llama": {"model.layers": "last"},
    "t5": {"encoder.block": "first", "decoder.block": "first"},
    "vit": {"vit.layers": "last"},
}
