"""Exported files compute what the module does, for a batch of any size; what a format lacks is refused in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.errors import ExportError
from matta.nesting.batches import call, logits_of, split_labels
from zoo import CASES, case

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
load_model = pytest.importorskip("safetensors.torch").load_model


class Ranker(nn.Module):
    def __init__(self, head: Callable[[Tensor], Tensor] = lambda logit: logit) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user, self.head = nn.Embedding(50, 8), head
        self.mlp = nn.Sequential(nn.Linear(11, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))

    def forward(self, user: Tensor, context: Tensor) -> Tensor:
        return self.head(self.mlp(torch.cat([self.user(user), context], dim=-1)).squeeze(-1))


def batch(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    user = torch.randint(50, (size,), generator=generator)
    return {"user": user, "context": torch.randn(size, 3, generator=generator)}


EXAMPLE = {**batch(4), "labels": torch.zeros(4)}


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = matta.export(
        Ranker().train(), tmp_path_factory.mktemp("onnx") / "ranker.onnx", format="onnx", example=EXAMPLE
    )
    assert done.error < 1e-5 and done.bytes == done.path.stat().st_size and done.quality is None
    return done.path


@pytest.mark.parametrize("size", [1, 2, 7])
def test_onnx_runtime_computes_what_the_module_does(size: int, onnx_file: Path) -> None:
    module, read = Ranker().eval(), matta.OnnxModule(onnx_file)
    expected = module(**batch(size))
    torch.testing.assert_close(read(**batch(size)), expected)
    torch.testing.assert_close(read(*batch(size).values()), expected)
    assert read.names == ("user", "context")


def test_other_inputs_are_refused(onnx_file: Path) -> None:
    with pytest.raises(ExportError, match=r"received the inputs user; expected those of the file: user, context"):
        matta.OnnxModule(onnx_file)(batch(2)["user"])
    with pytest.raises(ExportError, match=r"received the inputs 3 by position; expected those of the file"):
        matta.OnnxModule(onnx_file)(*batch(2).values(), torch.zeros(2))
    wide = {**batch(2), "context": torch.zeros(2, 9)}
    with pytest.raises(ExportError, match=r"ONNX Runtime fails with .*; the file takes .*context tensor\(float\)"):
        matta.OnnxModule(onnx_file)(**wide)
    broken = onnx_file.with_name("broken.onnx")
    broken.write_bytes(onnx_file.read_bytes()[:500])
    with pytest.raises(ExportError, match="ONNX Runtime does not take .*broken.onnx"):
        matta.OnnxModule(broken)


class Watched(nn.Module):
    """Two heads; `wraps` puts them where `logits=` finds them."""

    def __init__(self, wraps: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.click, self.minutes, self.wraps = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 2), wraps

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).relu()
        heads = {"click": self.click(hidden).squeeze(-1), "minutes": self.minutes(hidden)}
        return (hidden, heads) if self.wraps else heads


@pytest.mark.parametrize(("format", "wraps"), [("onnx", False), ("onnx", True), ("torch_export", False)])
def test_several_heads_are_several_outputs(format: Any, wraps: bool, tmp_path: Path) -> None:
    module, x = Watched(wraps).eval(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    where = (lambda output: output[1]) if wraps else None
    done = matta.export(module, tmp_path / "heads.pt2", format=format, example=(x, None), logits=where)
    read = matta.OnnxModule(done.path) if format == "onnx" else torch.export.load(done.path).module()
    expected = module(x[:3])[1] if wraps else module(x[:3])
    torch.testing.assert_close(read(x[:3]), expected)


def test_the_module_keeps_its_mode_and_weights(tmp_path: Path) -> None:
    module = Ranker().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    matta.export(module, tmp_path / "ranker.pt2", format="torch_export", example=EXAMPLE)
    assert module.training and all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_torchs_own_format_is_read_by_torch_alone(tmp_path: Path) -> None:
    done = matta.export(Ranker(), tmp_path / "ranker.pt2", format="torch_export", example=EXAMPLE)
    read = torch.export.load(done.path).module()
    for size in (1, 6):
        torch.testing.assert_close(read(**batch(size)), Ranker().eval()(**batch(size)))


def test_weights_are_read_back_bit_for_bit_and_tied_again(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("steps", torch.tensor([torch.nan, -0.0]))
            self.register_buffer("count", torch.tensor(3))

    module, fresh = Tied().half(), Tied().half()
    done = matta.export(module, tmp_path / "tied.safetensors", format="safetensors")
    assert done.error == 0.0 and done.bytes < 2 * 9 * 4 * 2 + 400
    load_model(fresh, done.path)
    assert fresh.head.weight is fresh.embed.weight and torch.equal(fresh.embed.weight, module.embed.weight)


def test_weights_that_overlap_are_refused_in_a_line(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    module[1].weight = nn.Parameter(module[0].weight.detach()[:2])
    with pytest.raises(ExportError, match="cannot be exported as safetensors: RuntimeError") as told:
        matta.export(module, tmp_path / "m.safetensors", format="safetensors")
    assert "\n" not in str(told.value) and not [*tmp_path.iterdir()]


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8, use_cache=False)
    config.bos_token_id = config.eos_token_id = None
    done = matta.export(transformers.GPT2LMHeadModel(config), tmp_path / "gpt2", format="transformers")
    assert (done.path / "config.json").is_file() and done.bytes > 1000


def test_eight_bits_are_smaller_and_judged_by_the_users_own_function(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1))
    x = torch.randn(32, 64)
    sizes, errors = [], []
    for int8 in (False, True):
        judged: list[nn.Module] = []
        done = matta.export(
            module,
            tmp_path / f"{int8}.onnx",
            format="onnx",
            example=(x, torch.zeros(32)),
            int8=int8,
            evaluate=lambda read, judged=judged: judged.append(read) or float((read(x) - module(x)).abs().max()),
        )
        assert isinstance(judged[0], matta.OnnxModule)
        sizes.append(done.bytes)
        errors.append((done.error, done.quality))
    assert sizes[1] < 0.5 * sizes[0]
    assert errors[0][0] < 1e-5 < errors[1][0] < 0.3 and errors[0][1] < errors[1][1]


def test_the_length_of_tokens_may_be_open_too(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 20))
    ids = torch.randint(20, (2, 6))
    done = matta.export(module, tmp_path / "m.onnx", format="onnx", example=(ids, ids), open_axes=(0, 1))
    for shape in ((1, 3), (4, 9)):
        ids = torch.randint(20, shape)
        torch.testing.assert_close(matta.OnnxModule(done.path)(ids), module(ids))


class Bags(nn.Module):
    """Ids of several bags one after the other: only the offsets have a row for each example."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.bags, self.out = nn.EmbeddingBag(30, width, mode="mean", padding_idx=29), nn.Linear(width, 1)

    def forward(self, price: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.out(self.bags(ids, offsets)).squeeze(-1) + price


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.parametrize("rows", [1, 4])
def test_bags_by_offsets_may_have_any_lengths(format: Any, rows: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Bags().eval()
    offsets = torch.tensor([0, 2, 2, 5])[:rows]
    example = {"price": torch.randn(rows), "ids": torch.randint(29, (9,)), "offsets": offsets, "labels": None}
    file = matta.export(module, tmp_path / "m", format=format, example=example).path
    read = matta.OnnxModule(file) if format == "onnx" else torch.export.load(file.open("rb")).module()
    other = {"price": torch.randn(6), "ids": torch.randint(29, (13,)), "offsets": torch.tensor([0, 1, 4, 4, 9, 11])}
    torch.testing.assert_close(read(**other), module(**other), atol=1e-5, rtol=1e-5)


def test_a_mask_that_all_rows_share_is_exported(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2) + mask).sum((1, 2))

    example = {"x": torch.randn(4, 5, 3), "mask": torch.zeros(5, 5), "labels": None}
    assert matta.export(Masked(), tmp_path / "m.onnx", format="onnx", example=example).error < 1e-5


def test_an_input_whose_name_hides_one_of_torch_is_named(tmp_path: Path) -> None:
    class Ranker(nn.Module):
        def forward(self, device: Tensor) -> Tensor:
            return device + torch.arange(device.shape[0], device=device.device)

    with pytest.raises(ExportError, match="rename the input 'device', a name in torch's own code"):
        matta.export(Ranker(), tmp_path / "m.pt2", format="torch_export", example={"device": torch.ones(4)})


def by_sign(logit: Tensor) -> Tensor:
    return logit if logit.sum() > 0 else -logit


def by_four(logit: Tensor) -> Tensor:
    return logit.view(2, -1).repeat(1, 1).flatten()[:4] if len(logit) == 4 else logit.view(4, -1)


def alone(logit: Tensor) -> Tensor:
    return 2 * logit if logit.shape[0] == 1 else logit


def by_many(logit: Tensor) -> Tensor:
    return logit if logit.shape[0] <= 100 else 2 * logit


class Headed(nn.Linear):
    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        super().__init__(3, 1)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


ROWS = (torch.ones(4, 3), None)


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_another_branch_for_one_row_is_found(format: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"differ by 0\.\d+ of the largest one where an open axis has length 1, on"):
        matta.export(Headed(alone), tmp_path / "ranker", format=format, example=ROWS)
    assert not [*tmp_path.iterdir()]


def test_a_length_that_is_fixed_by_len_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"'x'.* to be a constant \(4\); write x.shape\[0\] for len\(x\), .*, leave that axis"
    ) as told:
        matta.export(Headed(lambda y: y / len(y)), tmp_path / "m.pt2", format="torch_export", example=ROWS)
    assert "\n" not in str(told.value)


def test_another_branch_for_many_rows_is_found(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="where an open axis has length 101, on which the module may branch"):
        matta.export(Headed(by_many), tmp_path / "m.onnx", format="onnx", example=ROWS)
    file = matta.export(Headed(by_many), tmp_path / "m.pt2", format="torch_export", example=ROWS).path
    with pytest.raises(AssertionError, match="<= 100"):  # torch's own format says so itself
        torch.export.load(file).module()(torch.ones(101, 3))


def test_another_branch_for_longer_ids_is_found(tmp_path: Path) -> None:
    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> Tensor:
            found = self.table(ids).cumsum(1)
            return found if ids.shape[1] <= 8 else torch.cat([found[:, :8], found[:, 8:] - found[:, :-8]], dim=1)

    ids = torch.arange(12).view(2, 6) % 9
    with pytest.raises(ExportError, match="where an open axis has length 9, on which the module may branch"):
        matta.export(Windowed(), tmp_path / "m", format="onnx", example=(ids, ids), open_axes=(0, 1))
    assert matta.export(Windowed(), tmp_path / "m", format="onnx", example=(ids, ids)).error < 1e-5


def test_a_length_without_a_finite_value_is_not_compared(tmp_path: Path) -> None:
    class Spread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(1, keepdim=True)).square().sum(1) / (x.shape[1] - 1)  # 0/0 for one number

    example = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), None
    assert matta.export(Spread(), tmp_path / "m", format="onnx", example=example, open_axes=(0, 1)).error < 1e-5


def test_what_rounds_more_may_differ_more(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).bfloat16(), torch.randn(3, 5, 8).bfloat16()
    done = matta.export(module, tmp_path / "m.pt2", format="torch_export", example=(x, None))
    assert 1e-3 < done.error < done.tolerance == 4 * 2**-7, "kernels for a whole layer round otherwise"
    assert (
        matta.export(nn.Linear(8, 1), tmp_path / "n", format="torch_export", example=(x.float(), None)).tolerance
        == 1e-3
    )


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_a_file_is_judged_by_an_evaluation(format: Any, tmp_path: Path) -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    evaluation = matta.Evaluation(data=[(x, torch.ones(8))], objective=matta.objectives.Binary())
    module = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)).train()
    done = matta.export(
        module, tmp_path / "m.pt2", format=format, example=(x, None), evaluate=lambda each: evaluation(each)["loss"]
    )
    assert done.quality == pytest.approx(evaluation(module)["loss"], rel=1e-6)


@pytest.mark.parametrize("format", ["onnx", "torch_export", "safetensors"])
def test_a_live_module_is_exported_as_it_would_be_extracted(format: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    nested = matta.nest([nn.Linear(5, 2), nn.Linear(5, 3)], nn.Linear(5, 8), layouts={"*": 1})
    example = torch.randn(4, 5), None
    file = matta.export(nested.students[1], tmp_path / "m.pt2", format=format, example=example).path
    if format == "safetensors":
        read: Any = nn.Linear(5, 3)
        load_model(read, file)
    else:
        read = matta.OnnxModule(file) if format == "onnx" else torch.export.load(file).module()
    torch.testing.assert_close(read(example[0]).detach(), nested.students[1](example[0]).detach())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_of_any_length_are_exported_again_and_again(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    for seed in range(2):
        torch.manual_seed(seed)
        module, x = Recurrent().eval(), torch.randn(2, 6, 3)
        matta.export(module, tmp_path / "m.pt2", format="torch_export", example=(x, None))  # leaves its kernels behind
        file = matta.export(module, tmp_path / "m", format="onnx", example=(x, None), open_axes=(0, 1)).path
        for shape in ((5, 1, 3), (1, 9, 3)):
            other = torch.randn(shape)
            torch.testing.assert_close(matta.OnnxModule(file)(other), module(other).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.parametrize("is_double", [False, True])
def test_flags_among_the_inputs_stay_as_they_are(format: Any, is_double: bool, tmp_path: Path) -> None:
    class Flagged(Ranker):
        def forward(self, user: Tensor, context: Tensor, is_double: bool = False, spare: Any = None) -> Tensor:
            return super().forward(user, context) * (2 if is_double else 1)

    module = Flagged().eval()
    flags = {"is_double": is_double, "spare": None}
    file = matta.export(module, tmp_path / "m.pt2", format=format, example={**EXAMPLE, **flags}).path
    read = matta.OnnxModule(file) if format == "onnx" else torch.export.load(file).module()
    torch.testing.assert_close(read(**batch(7), **flags), module(**batch(7), **flags))


def test_an_output_with_the_name_of_an_input_is_refused(tmp_path: Path) -> None:
    example = {"input": torch.ones(4, 3), "labels": None}

    def outputs(output: Tensor) -> dict[str, Tensor]:
        return {"score": output, "input": output}

    with pytest.raises(ExportError, match="'input' is the name of an input and of an output, .*; rename the input"):
        matta.export(nn.Linear(3, 1), tmp_path / "m.onnx", format="onnx", example=example, logits=outputs)


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.parametrize("head", [by_sign, by_four])
def test_what_cannot_be_traced_is_refused_and_what_was_there_stays(
    head: Callable[[Tensor], Tensor], format: Any, tmp_path: Path
) -> None:
    file = tmp_path / "ranker"
    file.write_text("earlier")
    with pytest.raises(ExportError, match=r"cannot be exported as .*safetensors|taken a length for a constant") as told:
        matta.export(Ranker(head), file, format=format, example=EXAMPLE)
    assert "\n" not in str(told.value)
    assert file.read_text() == "earlier" and [*tmp_path.iterdir()] == [file]


def test_what_one_onnx_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    module = nn.Linear(2**15, 2**14 + 1, device="meta")
    with pytest.raises(ExportError, match="has 2,147,680,260 bytes of weights; expected at most 2,130,706,432"):
        matta.export(module, tmp_path / "m.onnx", format="onnx", example=(torch.zeros(1, 2**15), torch.zeros(1)))


def test_a_difference_beyond_the_tolerance_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"differ by .* of the largest one, more than the tolerance -1"):
        matta.export(Ranker(), tmp_path / "m.pt2", format="torch_export", example=EXAMPLE, tolerance=-1.0)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "pickle"}, "format='pickle'; expected one of: onnx, torch_export, safetensors, transformers"),
        ({"format": "onnx"}, "format='onnx' without an example"),
        ({"format": "safetensors", "int8": True}, "int8=True with format='safetensors'; expected 'onnx'"),
        ({"example": {**EXAMPLE, "weight": torch.ones(4)}}, "does not run on the example: TypeError: .*'weight'"),
        ({"example": {**batch(2), "context": torch.ones(2, 9)}}, "does not run on the example: RuntimeError"),
        ({"example": EXAMPLE, "open_axes": 0}, r"received open_axes=0; expected axes from 0 up, such as \(0, 1\)"),
        ({"example": EXAMPLE, "open_axes": (0, -1)}, r"received open_axes=\(0, -1\); expected axes from 0 up"),
        ({"path": "."}, r"\. is a folder; expected the name of a file in it, such as model.onnx"),
        ({"path": __file__ + "/m.onnx"}, "m.onnx cannot be written: .*; take another path"),
        ({"module": "m.onnx"}, "received str as module; expected a plain module"),
        ({"module": matta.nest(nn.Linear(3, 1), nn.Linear(3, 1))}, "received a nesting; expected one of its sizes"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(matta.MattaError, match=message):
        matta.export(**{"module": Ranker(), "path": tmp_path / "m", "format": "onnx", **arguments})


def test_inputs_that_numpy_lacks_are_refused_in_a_line(onnx_file: Path) -> None:
    with pytest.raises(ExportError, match="ONNX Runtime fails with .*BFloat16; the file takes user"):
        matta.OnnxModule(onnx_file)(user=torch.ones(2).bfloat16(), context=torch.ones(2, 3))


def test_the_folder_of_a_file_is_made(tmp_path: Path) -> None:
    done = matta.export(nn.Linear(3, 1), tmp_path / "new" / "m.safetensors", format="safetensors")
    assert done.path.is_file()


ARCHITECTURES = [each.id for each in CASES[:24]]  # of the others none was tried
QUICK = ARCHITECTURES[:1]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.stress) for name in ARCHITECTURES]
)
def test_architectures_run_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    """The first of the zoo, in float32."""
    module = matta.extract(case(name).nest()).float().eval()
    example = case(name).batch()
    inputs = split_labels(example)[0]
    done = matta.export(module, tmp_path / "m.onnx", format="onnx", example=to_float(example))
    expected = logits_of(call(module, to_float(inputs)))
    got = call(matta.OnnxModule(done.path), to_float(inputs))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def to_float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.float64 else value
    if isinstance(value, dict):
        return {name: to_float(each) for name, each in value.items()}
    return type(value)(to_float(each) for each in value)
