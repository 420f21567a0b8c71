import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.choosing.family import Size
from matta.choosing.measuring import Latency
from matta.errors import CheckpointError, MattaError, ServeError
from matta.serving.served_models import ServedModels, VersionWatch
from matta.serving.served_sizes import served_specs

EXAMPLE = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.ones(4)


def tower(width: int) -> nn.Module:
    layers = nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    return nn.Sequential(*layers)


def pair(seed: int = 0, **options: str) -> matta.Nested:
    torch.manual_seed(seed)
    return matta.nest(tower(4), tower(16), **options)  # type: ignore[arg-type]


def bytes_of(modules: dict[str, nn.Module]) -> int:
    tensors = [each for module in modules.values() for each in (*module.parameters(), *module.buffers())]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_each_size_computes_what_its_extraction_computes() -> None:
    nested = pair()
    models = ServedModels(nested, example=EXAMPLE)
    assert models.sizes == ("Student", "wide: 0", "TA")
    for size, spec in models.specs.items():
        outputs, version = models.run(size, {"input_0": EXAMPLE[0]})
        torch.testing.assert_close(outputs["logits"], matta.extract(nested, spec)(EXAMPLE[0]).detach())
        assert version == "1"


def test_all_sizes_share_one_copy_of_the_weights() -> None:
    nested = pair()
    models = ServedModels(nested, example=EXAMPLE)
    assert bytes_of(dict(models.current.modules)) == bytes_of({"TA": nested.ta})


def test_what_no_view_can_show_is_copied_once_for_all_sizes() -> None:
    class Gated(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 2 * width), nn.Linear(width, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(nn.functional.glu(self.up(x)))

    def blocks(width: int) -> nn.Module:
        return nn.Sequential(*(Gated(width) for _ in range(4)), nn.Linear(6, 1))

    nested = matta.nest(blocks(4), blocks(16), layouts={"*.up.*": 2})
    models = ServedModels(nested, example=EXAMPLE)
    narrow = [each for name, each in nested.student.named_parameters() if ".up." in name]
    copied = sum(each.numel() * each.element_size() for each in narrow)
    assert bytes_of(dict(models.current.modules)) == bytes_of({"TA": nested.ta}) + copied
    for size, spec in models.specs.items():
        torch.testing.assert_close(
            models.run(size, {"input_0": EXAMPLE[0]})[0]["logits"], matta.extract(nested, spec)(EXAMPLE[0])
        )


def test_the_front_of_a_family_is_served() -> None:
    nested = pair()
    quality = {45 + 4: 0.3, 113: 0.4}
    family = matta.family(
        nested,
        evaluate=lambda module: quality.get(sum(p.numel() for p in module.parameters()), 0.1),
        example=EXAMPLE,
        calls=0,
        progress=False,
    )
    assert [*served_specs(nested, family)] == [each.name for each in family.pareto()]


def test_the_student_is_served_although_chance_keeps_it_off_the_front_of_latencies() -> None:
    def size(name: str, parameters: int, ms: float, quality: float, **layers: str) -> Size:
        latencies = (Latency(batch_size=1, median_ms=ms, p95_ms=ms),)
        figures = {"bytes": 0, "flops": 1.0, "activation_bytes": 0.0, "latencies": latencies, "quality": quality}
        return Size(name=name, layers=layers, parameters=parameters, **figures)  # type: ignore[arg-type]

    sizes = [
        size("Student", 10, 0.11, 0.7, a="narrow", b="narrow"),
        size("wide: a", 20, 0.10, 0.8, a="wide", b="narrow"),
        size("wide: b", 30, 0.12, 0.75, a="narrow", b="wide"),
        size("TA", 40, 0.13, 0.9, a="wide", b="wide"),
    ]
    family = matta.Family(sizes=tuple(sizes), higher_is_better=True)
    assert [each.name for each in family.pareto("latency_ms")] == ["wide: a", "TA"]
    assert [*served_specs(pair(), family)] == ["Student", "wide: a", "TA"]


def test_student_and_deeper_ta_of_another_hidden_width_are_served_without_a_family() -> None:
    class Residual(nn.Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 1)
            self.h = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.h:
                x = x + block(x)
            return self.head(x)

    torch.manual_seed(0)
    nested = matta.nest(Residual(4, 2), Residual(8, 4), layers={"h": "even"}, example=EXAMPLE)
    models = ServedModels(nested, example=EXAMPLE)
    assert models.sizes == ("Student", "TA")
    for size, module in (("Student", matta.extract(nested)), ("TA", nested.ta)):
        torch.testing.assert_close(models.run(size, {"input_0": EXAMPLE[0]})[0]["logits"], module(EXAMPLE[0]).detach())


def test_a_plain_module_is_one_size() -> None:
    module = tower(4).train()
    models = ServedModels(module, example=EXAMPLE)
    assert models.sizes == ("model",)
    torch.testing.assert_close(models.run("model", {"input_0": EXAMPLE[0]})[0]["logits"], module(EXAMPLE[0]).detach())
    assert module.training


def test_onnx_runtime_gives_the_same() -> None:
    nested = pair()
    models = ServedModels(nested, example=EXAMPLE, runtime="onnx")
    for rows in (1, 3):
        logits = models.run("Student", {"input_0": EXAMPLE[0][:rows]})[0]["logits"]
        torch.testing.assert_close(logits, nested.student(EXAMPLE[0][:rows]).detach())


def test_inputs_are_named_as_the_model_takes_them() -> None:
    class Ranker(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.items, self.out = nn.Embedding(9, width), nn.Linear(width, 1)

        def forward(self, item: Tensor, weight: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": scale * weight[:, None] * self.out(self.items(item))}

    example = {"item": torch.arange(3), "weight": torch.ones(3), "scale": torch.tensor(2.0), "labels": torch.ones(3)}
    models = ServedModels(matta.nest(Ranker(2), Ranker(4)), example=example)
    assert [(each.name, each.datatype, each.shape) for each in models.inputs] == [
        ("item", "INT64", (-1,)),
        ("weight", "FP32", (-1,)),
    ]
    logits = models.run("TA", {"item": torch.arange(2), "weight": torch.ones(2)})[0]["logits"]
    assert logits.shape == (2, 1)


@pytest.mark.parametrize("rows", [1, 4])
def test_ids_of_bags_by_offsets_would_be_those_of_the_example_and_are_refused(rows: int) -> None:
    class Bags(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.bags, self.out = nn.EmbeddingBag(30, width), nn.Linear(width, 1)

        def forward(self, price: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
            return self.out(self.bags(ids, offsets)) + price[:, None]

    torch.manual_seed(0)
    offsets, price = torch.tensor([0, 2, 5, 6])[:rows], torch.ones(rows)
    example = {"price": price, "ids": torch.randint(30, (9,)), "offsets": offsets, "labels": None}
    with pytest.raises(ServeError, match=r"ids of shape \(9,\) of the example has no row for each .* ids padded to"):
        ServedModels(matta.nest(Bags(2), Bags(4), example=example), example=example)


class ByBatch(nn.Module):
    """A linear layer, and something of the whole batch."""

    def __init__(self, weight: float, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.norm, self.out = weight, norm or nn.Identity(), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x) - self.weight * x.mean(0))


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("alike", [False, True])
def test_a_model_whose_answers_depend_on_other_rows_is_refused(rows: int, alike: bool) -> None:
    """One client's rows would change the answer to another."""
    x = torch.ones(rows, 6) if alike else EXAMPLE[0][:rows]
    with pytest.raises(ServeError, match=r"changes with the other rows of its batch, requests are .* max_batch=1"):
        ServedModels(ByBatch(1.0), example=(x, None))
    models = ServedModels(ByBatch(1.0), example=(x, None), max_rows=1)  # a row alone has no others
    assert models.sizes == ("model",)


def test_scores_of_each_row_with_each_other_are_refused() -> None:
    """As of towers that are trained with the batch as negatives: a client would see the items of others."""

    class Towers(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ x.T

    with pytest.raises(
        ServeError, match="an answer changes with the other rows .* in its shape, or to NaN; expected rows"
    ):
        ServedModels(Towers(6, 6), example=EXAMPLE)


def test_statistics_of_the_batch_are_refused_and_running_ones_are_served() -> None:
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    with pytest.raises(
        ServeError, match=r"runs on the 4 rows of the example and fails on 1 of them with ValueError: E"
    ):
        ServedModels(ByBatch(0.0, norm), example=EXAMPLE)
    assert ServedModels(ByBatch(0.0, nn.BatchNorm1d(6)).train(), example=EXAMPLE).sizes == ("model",)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_model_that_loses_the_axis_of_one_row_is_refused(rows: int) -> None:
    """It would answer requests that come together, and fail on those that come alone."""

    class Squeezed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    with pytest.raises(
        ServeError, match=r"squeeze\(-1\) in place of squeeze\(\)|answers 1 examples with .* of shape \(\)"
    ):
        ServedModels(Squeezed(6, 1), example=(torch.randn(rows, 6), None))


def test_a_little_of_the_batch_and_answers_that_do_not_repeat_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Dropping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5))

    ServedModels(pair(), example=EXAMPLE)
    assert not caplog.messages
    ServedModels(ByBatch(0.01), example=EXAMPLE)
    assert re.match(
        r"an answer changes with the other rows .*, by \d% of the largest .layers that scale", caplog.messages[0]
    )
    torch.manual_seed(0)
    ServedModels(Dropping(6, 1), example=EXAMPLE)
    assert "apart from call to call; look for a dropout" in caplog.messages[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roundings_are_no_dependence_on_other_rows(dtype: torch.dtype) -> None:
    class Rounding(nn.Linear):
        """As kernels that add up in another order for another number of rows."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + torch.finfo(dtype).eps * (len(x) % 3))

    models = ServedModels(Rounding(6, 1).to(dtype), example=(EXAMPLE[0].to(dtype), None))
    assert models.outputs[0].dtype == dtype


def test_classes_without_numbers_are_served() -> None:
    class Best(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            best = super().forward(x).argmax(1)
            return {"best": best, "is_first": best == 0}

    models = ServedModels(Best(6, 3), example=EXAMPLE)
    assert [each.datatype for each in models.outputs] == ["INT64", "BOOL"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nested": "pair"}, "received str as nested; expected what matta.nest gives, or a plain module"),
        ({"family": "family.json"}, "received str as family; expected what matta.family gives"),
        ({"device": "abacus"}, "received device='abacus'"),
        ({"example": (EXAMPLE[0][:, :5], None)}, "the module does not run on the example: RuntimeError"),
        ({"example": {"input": EXAMPLE[0], "weight": EXAMPLE[1]}}, "does not run on the example: TypeError"),
        ({"example": (EXAMPLE[0][:0], None)}, "the example has no rows"),
    ],
)
def test_what_cannot_be_served_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(MattaError, match=message):
        ServedModels(**{"nested": pair(), "example": EXAMPLE, **wrong})


def test_a_model_whose_answers_have_no_rows_is_refused() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean()

    with pytest.raises(ServeError, match="a row for each example"):
        ServedModels(Mean(), example=EXAMPLE)


class Told:
    def __init__(self) -> None:
        self.swapped: list[str] = []
        self.refused: list[tuple[str, str]] = []

    def watch(self, models: ServedModels, folder: Path) -> VersionWatch:
        return VersionWatch(
            models, folder, swapped=self.swapped.append, refused=lambda name, why: self.refused.append((name, why))
        )


def published(folder: Path, nested: matta.Nested) -> matta.Snapshots:
    snapshots = matta.Snapshots(folder, every_s=1e9, models={"ta": matta.wide(nested), "student": None}, keep=9)
    snapshots.publish(nested)
    return snapshots


@pytest.mark.parametrize("share", ["all", "none"])
def test_a_new_version_takes_the_place_of_the_old_one(tmp_path: Path, share: str) -> None:
    nested, other = pair(0, share=share), pair(1, share=share)
    models, told = ServedModels(nested, example=EXAMPLE), Told()
    watch = told.watch(models, tmp_path)
    watch.look()
    assert told.swapped == []  # there is none yet
    snapshots = published(tmp_path, other)
    watch.look()
    watch.look()
    assert told.swapped == ["1"]
    for size, module in {"Student": other.student, "TA": other.ta}.items():
        outputs, version = models.run(size, {"input_0": EXAMPLE[0]})
        torch.testing.assert_close(outputs["logits"], module(EXAMPLE[0]).detach())
        assert version == "1"
    snapshots.publish(nested)
    watch.look()
    assert models.current.name == "2"
    torch.testing.assert_close(models.run("TA", {"input_0": EXAMPLE[0]})[0]["logits"], nested.ta(EXAMPLE[0]).detach())


def normed(seed: int, share: str | list[str]) -> matta.Nested:
    """A pair whose BatchNorms have seen other data."""

    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 1))

    torch.manual_seed(seed)
    nested = matta.nest(build(4), build(16), share=share)
    for module in (nested.student, nested.ta):
        module.train()(torch.randn(64, 6) * (seed + 1) + seed)
        module.eval()
    return nested


@pytest.mark.parametrize("share", ["all", "none", ["0.*", "1.*"]], ids=str)
def test_a_new_version_brings_what_the_student_has_of_its_own(tmp_path: Path, share: str | list[str]) -> None:
    """Running statistics, and parameters that it does not share: those of the version, not of the start."""
    old, new = normed(0, share), normed(1, share)
    models, told = ServedModels(old, example=EXAMPLE), Told()
    watch = told.watch(models, tmp_path)
    published(tmp_path, new)
    watch.look()
    assert (told.swapped, told.refused) == (["1"], [])
    for size, spec in models.specs.items():
        expected = matta.extract(new, spec).eval()(EXAMPLE[0]).detach()
        torch.testing.assert_close(models.run(size, {"input_0": EXAMPLE[0]})[0]["logits"], expected)
    matta.Snapshots(tmp_path, every_s=1e9, models={"ta": matta.wide(new)}).publish(normed(2, share))
    watch.look()
    assert "version 2 has the TA alone, and the Student has" in told.refused[0][1]
    assert models.current.name == "1"


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_running_statistics_of_sizes_between_are_measured_for_each_version(tmp_path: Path, runtime: str) -> None:
    def build(width: int) -> nn.Module:
        hidden = (nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width))
        return nn.Sequential(*hidden, nn.ReLU(), nn.Linear(width, 1))

    def trained(seed: int) -> matta.Nested:
        torch.manual_seed(seed)
        nested = matta.nest(build(4), build(16))
        for module in (nested.student, nested.ta):
            module.train()(torch.randn(64, 6) + seed)
            module.eval()
        return nested

    batches = [(torch.randn(32, 6, generator=torch.Generator().manual_seed(seed)), None) for seed in range(3)]
    old, new = trained(0), trained(1)
    models = ServedModels(old, example=EXAMPLE, recalibrate=iter(batches), runtime=runtime)
    assert models.sizes == ("Student", "wide: 0", "TA")
    published(tmp_path, new)
    for nested in (old, new):
        for size, spec in models.specs.items():
            expected = matta.extract(nested, spec).eval()
            if size not in ("Student", "TA"):
                assert matta.recalibrate(expected, batches) == 3
            logits = models.run(size, {"input_0": EXAMPLE[0]})[0]["logits"]
            torch.testing.assert_close(logits, expected(EXAMPLE[0]).detach())
        Told().watch(models, tmp_path).look()


def test_buffers_that_never_change_need_no_student(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(6, width), nn.Linear(width, 1)
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.out(self.hidden(x).relu())

    torch.manual_seed(0)
    models, told = ServedModels(matta.nest(Scaled(4), Scaled(16)), example=EXAMPLE), Told()
    new = matta.nest(Scaled(4), Scaled(16))
    matta.Snapshots(tmp_path, every_s=1e9, models={"ta": matta.wide(new)}).publish(new)
    told.watch(models, tmp_path).look()
    assert (told.swapped, told.refused) == (["1"], [])
    logits = models.run("Student", {"input_0": EXAMPLE[0]})[0]["logits"]
    torch.testing.assert_close(logits, new.student(EXAMPLE[0]).detach())


def spoil(version: Path, how: str) -> None:
    if how == "a bit":
        file = version / "ta.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    elif how == "a file":
        (version / "ta.safetensors").unlink()
    else:
        shutil.rmtree(version)


@pytest.mark.parametrize("how", ["a bit", "a file", "all", "NaN", "another nesting"])
def test_a_broken_version_is_refused_once_and_the_old_one_stays(tmp_path: Path, how: str) -> None:
    nested, told = pair(), Told()
    snapshots = published(tmp_path, nested)
    models = ServedModels(pair(), example=EXAMPLE)
    watch = told.watch(models, tmp_path)
    watch.look()
    before = models.current
    if how == "NaN":
        nested.ta[0].weight.data.fill_(float("nan"))  # type: ignore[index]
    if how == "another nesting":
        torch.manual_seed(0)
        nested = matta.nest(tower(4), tower(18))
    snapshots.publish(nested)
    if how not in ("NaN", "another nesting"):
        spoil(tmp_path / "00000002", how)
    watch.look()
    watch.look()
    assert models.current is before
    assert [name for name, _ in told.refused] == ["00000002"]
    assert told.refused[0][1]
    snapshots.publish(pair(2))
    watch.look()
    assert models.current.name == ("2" if how == "all" else "3")


def test_versions_can_be_pinned(tmp_path: Path) -> None:
    first, second = pair(1), pair(2)
    published(tmp_path, first).publish(second)
    models = ServedModels(pair(), example=EXAMPLE)
    models.pin(tmp_path, 1)
    Told().watch(models, tmp_path).look()
    outputs, version = models.run("TA", {"input_0": EXAMPLE[0]}, "1")
    torch.testing.assert_close(outputs["logits"], first.ta(EXAMPLE[0]).detach())
    assert version == "1"
    assert models.current.name == "2"
    with pytest.raises(CheckpointError, match="has no version 7; it has: 1, 2"):
        models.pin(tmp_path, 7)


def test_times_grow_with_rows_and_sizes() -> None:
    def wide_tower(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    models = ServedModels(matta.nest(wide_tower(8), wide_tower(1024)), example=EXAMPLE, max_rows=256)
    assert models.times["TA"].seconds(256) > models.times["TA"].seconds(1)
    assert models.times["TA"].seconds(256) > models.times["Student"].seconds(256)
