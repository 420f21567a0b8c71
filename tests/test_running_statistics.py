"""Running statistics of sizes between Student and TA: told where they are forgotten, and served as they were judged."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import matta
from matta.serving.served_models import ServedModels
from matta.sizes.extraction import unmeasured_norms

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) + 1
EXAMPLE = (X[:4], torch.ones(4))
BATCHES = [(X[:32], None), (X[32:], None)]


def tower(width: int, *, tied: bool = False) -> nn.Sequential:
    last = nn.Linear(width, 1)
    hidden = nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width)
    model = nn.Sequential(*hidden, nn.ReLU(), last)
    if tied:
        model.append(nn.Linear(1, width, bias=False)).append(nn.Linear(width, 1, bias=False))
        model[-1].weight = last.weight
    return model


def trained(**options: bool) -> matta.Nested:
    """Both have run in training mode; no mixture has."""
    torch.manual_seed(0)
    nested = matta.nest(tower(4, **options), tower(16, **options), example=EXAMPLE)
    run(nested)
    return nested.eval()


def run(nested: matta.Nested) -> None:
    nested.train()
    with torch.no_grad():
        for module in (nested.student, nested.ta):
            for _ in range(20):
                module(X)
    nested.eval()


def loss(module: nn.Module) -> float:
    return float(module(X).square().mean())


def measured(module: nn.Module) -> float:
    matta.recalibrate(module, BATCHES)
    return loss(module)


def test_a_table_judged_with_statistics_of_others_is_told_of() -> None:
    nested = trained()
    with pytest.warns(UserWarning, match=r"never measured for them \(1, 4\): call matta.recalibrate"):
        matta.family(nested, evaluate=loss, example=EXAMPLE, calls=0, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matta.family(nested, evaluate=measured, example=EXAMPLE, calls=0, progress=False)


def test_a_norm_that_sees_the_same_in_every_size_needs_no_measuring() -> None:
    def ranker(width: int) -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

    torch.manual_seed(0)
    nested = matta.nest(*(nn.Sequential(ranker(n), nn.Linear(n, 1)) for n in (4, 8)), example=EXAMPLE)
    run(nested)
    mixed = matta.wide_narrow_wide(nested, 1)
    assert unmeasured_norms(nested, mixed) == []
    with torch.no_grad():
        nested.student[0][0].running_mean.add_(1)
    assert unmeasured_norms(nested, mixed) == ["0.0"]
    assert unmeasured_norms(nested, matta.SubModel()) == unmeasured_norms(nested, matta.SubModel(default="wide")) == []


def test_a_size_with_statistics_of_others_is_not_served(caplog: pytest.LogCaptureFixture) -> None:
    """And where a table has no others, Student and TA are."""
    nested = trained()
    family = matta.family(nested, evaluate=measured, example=EXAMPLE, calls=0, progress=False)
    between = replace(family, sizes=tuple(each for each in family.sizes if each.name not in ("Student", "TA")))
    for given, sizes in ((None, ("Student", "TA")), (family, ("Student",)), (between, ("Student", "TA"))):
        caplog.clear()
        assert ServedModels(nested, example=EXAMPLE, family=given).sizes == sizes
        assert "since the running statistics of 1, 4 are those of Student and TA; expected Serving" in caplog.text


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_each_size_is_served_as_it_was_judged(runtime: str) -> None:
    nested = trained()
    family = matta.family(nested, evaluate=measured, example=EXAMPLE, calls=0, progress=False)
    models = ServedModels(nested, example=EXAMPLE, family=family, recalibrate=BATCHES, runtime=runtime)
    judged = {size.name: size.quality for size in family.sizes}
    before = nested.student[1].running_mean.clone()
    for name in {*models.sizes} - {"Student", "TA"}:  # which keep their own
        outputs, _ = models.run(name, {"input_0": X})
        assert float(outputs["logits"].square().mean()) == pytest.approx(judged[name], rel=1e-4)
    assert torch.equal(nested.student[1].running_mean, before), "the nesting keeps its own"


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_version_brings_the_students_statistics(tied: bool, tmp_path: Path) -> None:
    models = ServedModels(trained(tied=tied), example=EXAMPLE, recalibrate=BATCHES)
    models._batches = []  # to see what the version itself brings
    trained_on = trained(tied=tied)
    with torch.no_grad():
        for parameter in trained_on.ta.parameters():
            parameter.mul_(1.5)
    run(trained_on)
    snapshots = matta.Snapshots(tmp_path, every_s=60, models={"ta": matta.wide(trained_on), "student": None})
    snapshots.publish(trained_on)
    served = models.load(tmp_path).modules
    for size, module in (("Student", matta.extract(trained_on)), ("TA", trained_on.ta)):
        torch.testing.assert_close(served[size](X), module(X), msg=size)


def test_a_watched_sub_model_is_judged_with_present_statistics() -> None:
    torch.manual_seed(0)
    nested = matta.nest(tower(4), tower(16), example=EXAMPLE)
    validation = matta.ProgressiveValidation(watch={"wide": matta.wide(nested)})
    cotrain = matta.CoTraining(nested, matta.objectives.Binary())
    for _ in range(3):
        out = cotrain((X, torch.ones(64)))
        found = validation._logits(cotrain, X, out)["wide"]
        torch.testing.assert_close(found, matta.extract(nested, matta.wide(nested)).eval()(X), atol=0.0, rtol=0.0)


def test_mixed_sub_models_are_published_and_judged_with_a_warning(tmp_path: Path) -> None:
    nested = trained()
    mixed = {"half": matta.SubModel({"0": "wide"})}
    with pytest.warns(UserWarning, match="of 1, 4 .* for 'half': call matta.recalibrate.* what read_snapshot gives"):
        matta.Snapshots(tmp_path, every_s=60, models=mixed).publish(nested)
    evaluation = matta.Evaluation(data=[(X, torch.ones(64))], objective=matta.objectives.Binary(), models=mixed)
    with pytest.warns(UserWarning, match="for 'half': it is evaluated with these"):
        evaluation(nested)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matta.Snapshots(tmp_path, every_s=60, models={"ta": matta.wide(nested), "student": None}).publish(nested)
