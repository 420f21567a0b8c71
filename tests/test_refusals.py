"""Every refusal of `nest` in one table: what it says, and that what it says to do works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.errors import LayoutError, NestingError, ProbeError
from test_ambiguity import Attention, Fused, Grouped
from test_nesting import REFUSED, Embedded, Keeping, Named, _tied, _tower
from test_probing import Gated
from test_warmstart import Residual

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
BATCH = X, None
SEQUENCES = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), None


class Refusal(NamedTuple):
    """What is refused, the message, and what it says to do."""

    attempt: Callable[[], Any]
    message: str
    remedy: Callable[[], matta.Nested]


class InList(nn.Module):
    def __init__(self, width: int, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.layers = kind([nn.Linear(5, width), nn.Linear(width, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).relu())


class Turned(nn.Module):
    """The Fourier transform of a hidden vector mixes all of its channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.fft.fft(self.up(x)).real)


class Sorted(nn.Module):
    """The two halves of a gate, which a sort hides from the trace."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 2 * width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(self.up.out_features).unsqueeze(0).expand(len(x), -1)
        gate, value = self.up(x).gather(1, order).chunk(2, -1)
        return self.down(gate.sigmoid() * value)


class Idle(nn.Module):
    """A layer over two vectors that no run reaches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.idle, self.down = nn.Linear(5, width), nn.Linear(2 * width, 2), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Summed(nn.Module):
    """A sum over the width of what a bias was added to: the TA adds it more often, by design."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, width), nn.Conv1d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)[:, None]).sum(2)


class Fixed(nn.Module):
    """A number of classes of its own."""

    def __init__(self, width: int, classes: int = 2) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Features(nn.Module):
    """An encoder without a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class Builds(nn.Module):
    """A layer that the first forward builds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.down = width, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "up"):
            self.up = nn.Linear(x.shape[1], self.width)
        return self.down(self.up(x).relu())


class Failing(Fixed):
    """Channels in an order that the trace does not see, and a test that silenced weights fail."""

    def forward(self, x: Tensor) -> Tensor:
        if min(sum(map(abs, row)) for row in self.up.weight.tolist()) < 1e-12:
            raise ValueError("a channel is silent")
        order = torch.arange(self.up.out_features).unsqueeze(0).expand(len(x), -1)
        return self.down(self.up(x).gather(1, order))


class Deep(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        kind = [nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 5)) for _ in range(depth)]
        self.blocks, self.head = nn.ModuleList(kind), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Raw(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, width), nn.Parameter(torch.ones(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) @ self.down


class Normed(nn.Module):
    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(5, width), nn.LayerNorm(width) if norm else nn.Identity()
        self.down = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


def _residual() -> tuple[nn.Module, nn.Module]:
    return Residual(2, 4, "finish"), Residual(3, 4, "finish")


def _quantised(width: int) -> nn.Module:
    made: nn.Module = torch.ao.quantization.quantize_dynamic(_tower(width), {nn.Linear}, dtype=torch.qint8)
    return made


def _ready(width: int) -> nn.Module:
    module = nn.Sequential(nn.LazyLinear(width))
    module(torch.ones(1, 3))
    return module


def _nested() -> matta.Nested:
    return matta.nest(_tower(4), _tower(6))


def _alone(student: nn.Module, ta: nn.Module, **options: Any) -> matta.Nested:
    """The Student starts where it was, without a warm start of the TA."""
    nested = matta.nest(student, ta, **options)
    nested.student.load_state_dict(student.state_dict())
    torch.testing.assert_close(nested.student(X), student(X))
    return nested


REMEDIES: dict[str, Callable[[], matta.Nested]] = {
    "larger": lambda: matta.nest(_tower(6), _tower(8)),
    "larger-input": lambda: matta.nest(nn.Linear(5, 2), nn.Linear(3, 9), private=["weight"], layouts={"bias": 1}),
    "no-match": lambda: matta.nest(
        Named(net=nn.Linear(3, 2)), Named(tower=nn.Linear(3, 2)), private=["net.weight", "net.bias"]
    ),
    "other-rank": lambda: matta.nest(Named(a=nn.Conv1d(3, 2, 1)), Named(a=nn.Linear(3, 2)), private=["a.weight"]),
    "one-slice": lambda: matta.nest(_tied(4, tied=True), _tied(6, tied=True)),
    "no-students": lambda: matta.nest([_tower(4)], _tower(6)),
    "no-module": _nested,
    "no-model": _nested,
    "no-ta": _nested,
    "share": lambda: matta.nest(_tower(4), _tower(6), share=["2.*"]),
    "unused-share": lambda: matta.nest(_tower(4), _tower(6), share=["0.weight"]),
    "unused-private": lambda: matta.nest(_tower(4), _tower(6), private=["2.weight"]),
    "unused-layout": lambda: matta.nest(_tower(4), _tower(6), layouts={"0.weight": 1}),
    "unused-layers": lambda: matta.nest(Embedded(4), Embedded(6), layers={"blocks": "first"}),
    "no-lists": lambda: matta.nest(nn.Linear(3, 2), nn.Linear(3, 2)),
    "depth-unsaid": lambda: matta.nest(Embedded(4, 2), Embedded(6, 3), layers={"blocks": "last"}),
    "layers-no-mapping": lambda: matta.nest(Embedded(4, 2), Embedded(6, 3), layers={"blocks": "first"}),
    "layouts-no-mapping": lambda: matta.nest(_tower(4), _tower(6), layouts={"0.*": 1}),
    "layout-text": lambda: matta.nest(_tower(4), _tower(6), layouts={"0.*": 2, "2.weight": matta.Layout.equal(2, 1)}),
    "layout-zero": lambda: matta.nest(_tower(4), _tower(6), layouts={"0.*": 1}),
    "layout-uneven": lambda: matta.nest(
        _tower(4),
        _tower(6),
        layouts={
            "0.*": matta.Layout.concat([(1, 2), (3, 4)]),
            "2.weight": matta.Layout.concat([(1, 2), (3, 4)], axis=1),
        },
        example=(torch.ones(1, 3), None),
    ),
    "layout-sizes": lambda: matta.nest(
        _tower(4),
        _tower(6),
        layouts={"0.*": matta.Layout.concat([(3, 3), (1, 3)]), "2.weight": matta.Layout.concat([(3, 3), (1, 3)], 1)},
        example=(torch.ones(1, 3), None),
    ),
    "layout-axis": lambda: matta.nest(_tower(4), _tower(6), layouts={"0.weight": matta.Layout.equal(1, axis=1)}),
    "lazy": lambda: matta.nest(_ready(4), _ready(6), layouts={"*": 1}),
    "lazy-buffer": lambda: matta.nest(nn.BatchNorm1d(3), nn.BatchNorm1d(3)),
    "scripted": lambda: (torch.jit.script(matta.extract(nested := _nested())), nested)[1],
    "compiled": _nested,
    "live": lambda: matta.nest(matta.extract(_nested()), _tower(8)),
    "sparse": lambda: matta.nest(Embedded(4), Embedded(6)),
    "listed": lambda: matta.nest(
        nn.ParameterList([torch.ones(4)]), nn.ParameterList([torch.ones(6)]), layouts={"0": 1}
    ),
    "lock": lambda: matta.nest(Keeping(None), Keeping(None)),
    "stream": lambda: matta.nest(Keeping(None), Keeping({"log": []})),
    "graph": lambda: matta.nest(Keeping([torch.ones(2)]), Keeping(None)),
}


def _run(module: nn.Module) -> nn.Module:
    module(BATCH[0])
    return module


MORE: dict[str, Refusal] = {
    "list-of-layers": Refusal(
        lambda: matta.nest(InList(4, list), InList(6, list)),
        r"InList keeps layers in 'layers', a list, .*keep them in an nn.ModuleList",
        lambda: matta.nest(InList(4, nn.ModuleList), InList(6, nn.ModuleList), example=BATCH),
    ),
    "lists-of-lists": Refusal(
        lambda: matta.nest(InList(4, lambda layers: [list(layers)]), InList(6, lambda layers: [list(layers)])),
        r"InList keeps layers in 'layers', a list, .*keep them in an nn.ModuleList",
        lambda: matta.nest(InList(4, nn.ModuleList), InList(6, nn.ModuleList), example=BATCH),
    ),
    "quantised": Refusal(
        lambda: matta.nest(_quantised(4), _quantised(6)),
        r"is quantised, its weights are in '_packed_params' and do not train.*nest first, and quantise what is extr",
        _nested,
    ),
    "types": Refusal(
        lambda: matta.nest(_tower(4).double(), _tower(6)),
        r"0.weight is torch.float64 and the TA's 0.weight torch.float32; expected one type.*cast one of the modules",
        lambda: matta.nest(_tower(4).double(), _tower(6).double()),
    ),
    "fused": Refusal(
        lambda: matta.nest(Fused(4), Fused(6)),
        r"qkv.weight grows from 12 to 18 on its output axis 0.*declare .*layouts=\{'qkv.weight': 3\}.*example=batch",
        lambda: matta.nest(Fused(4), Fused(6), layouts={"qkv.weight": 3}, example=SEQUENCES),
    ),
    "joined": Refusal(
        lambda: matta.nest(nn.Linear(4, 1), nn.Linear(6, 1)),
        r"weight grows from 4 to 6 on its input axis 1.*layouts=\{'weight': matta.Layout.concat\(\[\(student, ta\)",
        lambda: matta.nest(
            nn.Linear(4, 1), nn.Linear(6, 1), layouts={"weight": matta.Layout.concat([(2, 3), (2, 3)], axis=1)}
        ),
    ),
    "heads": Refusal(
        lambda: matta.nest(Attention(2, 3), Attention(2, 5)),
        r"query.weight grows from 6 to 10 on axis 0, in a module with 2 heads .* declare .*factors.*if it is one plain",
        lambda: matta.nest(
            Attention(2, 3),
            Attention(2, 5),
            layouts={
                "out.weight": matta.Layout.factors([(2, 2), (3, 5)], axis=1),
                "out.bias": 1,
                "*": matta.Layout.factors([(2, 2), (3, 5)], axis=0),
            },
        ),
    ),
    "groups": Refusal(
        lambda: matta.nest(Grouped(4, 2), Grouped(8, 2)),
        r"second.weight is of a convolution of 2 groups, from 2 channels.*or pass example=batch",
        lambda: matta.nest(Grouped(4, 2), Grouped(8, 4)),
    ),
    "cut-wrongly": Refusal(
        lambda: matta.nest(Gated(2), Gated(4), layouts={"up.*": 1, "down.*": 1}, example=SEQUENCES),
        r"an axis is cut wrongly; declare layouts=\{'up.weight': 2\}, with which they agree",
        lambda: matta.nest(Gated(2), Gated(4), layouts={"up.weight": 2}, example=SEQUENCES),
    ),
    "mixed-channels": Refusal(
        lambda: matta.nest(Turned(4), Turned(6), example=BATCH),
        r"from down on .*'down.weight' \(axis 1: 4 of 6\); the run does not show how up.weight is cut on axis 0 "
        r"\(.*'_fft_r2c'\): declare .*nest with probe=False",
        lambda: matta.nest(Turned(4), Turned(6), example=BATCH, probe=False),
    ),
    "by-design": Refusal(
        lambda: matta.nest(Summed(4), Summed(6), example=BATCH),
        r"from the logits on .*; the run shows how each axis is cut, .* there by design .*, nest with probe=False",
        lambda: matta.nest(Summed(4), Summed(6), example=BATCH, probe=False),
    ),
    "not-reached": Refusal(
        lambda: matta.nest(Idle(4), Idle(6), example=BATCH),
        r"does not reach idle.weight, nor anything of their kind: .*; or keep them apart with private=\['idle.w",
        lambda: matta.nest(Idle(4), Idle(6), example=BATCH, private=["idle.weight"]),
    ),
    "classes": Refusal(
        lambda: matta.nest(Fixed(4), Fixed(6, 3), example=BATCH),
        r"logits have shape \(2, 2\) on the example and the TA's \(2, 3\).*build the TA with the Student's",
        lambda: matta.nest(Fixed(4), Fixed(6), example=BATCH),
    ),
    "features": Refusal(
        lambda: matta.nest(Features(4), Features(6), example=BATCH),
        r"logits have shape \(2, 4\) .*the TA's \(2, 6\).*features as wide as each model is, nest with probe=False",
        lambda: matta.nest(Features(4), Features(6), example=BATCH, probe=False),
    ),
    "built-in-the-forward": Refusal(
        lambda: matta.nest(Builds(4), Builds(6), example=BATCH),
        r"Builds builds up.weight in its forward \(2 new parameters\); .*: run the Student and the TA on a batch once",
        lambda: matta.nest(*map(_run, (Builds(4), Builds(6))), example=BATCH),
    ),
    "example-of-the-student": Refusal(
        lambda: matta.nest(Fixed(4), Fixed(6), example=(torch.ones(2, 3), None)),
        r"the Student does not run on the example: RuntimeError.*pass as `example` a batch such as it trains on",
        lambda: matta.nest(Fixed(4), Fixed(6), example=BATCH),
    ),
    "example-of-the-ta": Refusal(
        lambda: matta.nest(nn.Sequential(nn.Linear(5, 4)), nn.Sequential(nn.Linear(9, 4)), example=BATCH),
        r"the TA does not run on the example: .*pass as `example` a batch such as it trains on",
        lambda: matta.nest(nn.Sequential(nn.Linear(5, 4)), nn.Sequential(nn.Linear(5, 4)), example=BATCH),
    ),
    "not-to-be-probed": Refusal(
        lambda: matta.nest(Failing(4), Failing(6), example=BATCH),
        r"the TA cannot be probed: .*it fails with a channel is silent; declare the layouts .*probe=False",
        lambda: matta.nest(Failing(4), Failing(6), layouts={"*": 1}, example=BATCH),
    ),
    "meta": Refusal(
        lambda: matta.nest(Fixed(4).to("meta"), Fixed(6).to("meta"), example=BATCH),
        r"the TA is on the meta device and cannot be run; probe it once its weights are there",
        lambda: matta.nest(Fixed(4).to("meta"), Fixed(6).to("meta")),
    ),
    "meta-buffers": Refusal(
        lambda: matta.nest(nn.Sequential(nn.BatchNorm1d(4)).to("meta"), nn.Sequential(nn.BatchNorm1d(4))),
        r"the Student's buffer 0.running_mean is on the meta device .*build the Student on a real device",
        lambda: matta.nest(nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4))),
    ),
    "too-deep": Refusal(
        lambda: matta.nest(Deep(4, 3), Deep(6, 2), layers={"blocks": "first"}),
        r"layers=\{'blocks': 'first'\}: the Student has 3 blocks and the TA only 2; give the TA more",
        lambda: matta.nest(Deep(4, 3), Deep(6, 3), layers={"blocks": "first"}),
    ),
    "layer-rule": Refusal(
        lambda: matta.nest(Deep(4, 2), Deep(6, 3), layers={"blocks": "middle"}),
        r"received 'middle'; expected 'first', 'last', 'even', 'ends', or a list of indices",
        lambda: matta.nest(Deep(4, 2), Deep(6, 3), layers={"blocks": "even"}),
    ),
    "layer-indices": Refusal(
        lambda: matta.nest(Deep(4, 2), Deep(6, 3), layers={"blocks": [2, 1]}),
        r"received the indices \[2, 1\]; expected 2 of 0 to 2, each once, rising",
        lambda: matta.nest(Deep(4, 2), Deep(6, 3), layers={"blocks": [1, 2]}),
    ),
    "warm-start": Refusal(
        lambda: matta.nest(Normed(4, True), Normed(6, True), warm_start=True, example=BATCH),
        r"warm_start=True cannot start the TA as the Student: .*nested.student.load_state_dict\(student.state_dict",
        lambda: _alone(Normed(4, True), Normed(6, True), example=BATCH),
    ),
    "warm-start-norm": Refusal(
        lambda: matta.nest(Normed(4, True), Normed(6, True), warm_start=True),
        r"norm.weight is of a norm over a width that grows; let widths grow between norms alone, or pass example=batch",
        lambda: matta.nest(Normed(4, False), Normed(6, False), warm_start=True),
    ),
    "warm-start-inputs": Refusal(
        lambda: matta.nest(Raw(4), Raw(6), warm_start=True),
        r"does not know which axis of down .* its inputs are on.*pass example=batch to have them found",
        lambda: matta.nest(Raw(4), Raw(6), warm_start=True, example=BATCH),
    ),
    "warm-start-blocks": Refusal(
        lambda: matta.nest(*_residual(), layers={"blocks": "first"}, warm_start=True),
        r"cannot make the extra block blocks.2 \(Block\) an identity.*pass example=batch to find them",
        lambda: matta.nest(*_residual(), layers={"blocks": "first"}, warm_start=True, example=BATCH),
    ),
}

TABLE = {name: Refusal(*REFUSED[name], remedy) for name, remedy in REMEDIES.items()} | MORE


def test_every_refusal_is_in_the_table() -> None:
    assert REMEDIES.keys() == REFUSED.keys()


@pytest.mark.filterwarnings("ignore:.*(Lazy|torch.jit|quantiz|torch.ao).*")
@pytest.mark.parametrize("name", TABLE)
def test_a_refusal_says_what_to_do_and_that_works(name: str) -> None:
    refusal = TABLE[name]
    with pytest.raises((NestingError, LayoutError, ProbeError), match=refusal.message) as caught:
        refusal.attempt()
    assert ";" in str(caught.value) or "expected" in str(caught.value)
    nested = refusal.remedy()
    assert nested.plan.placements or nested.plan.private


def test_the_only_cut_that_agrees_is_taken_and_noted() -> None:
    nested = matta.nest(Sorted(2), Sorted(4), example=BATCH)
    assert nested.plan.placements["up.weight"].axes[0].positions() == [0, 1, 4, 5]
    assert nested.plan.placements["up.weight"].note == "found by the probe"
    assert "up.weight[(2x:2 of 4), :]  (found by the probe)" in str(nested)
