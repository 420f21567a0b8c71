"""What is extracted is a plain model of the user's classes; statistics are measured afresh."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.errors import SubModelError

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


def _net(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
    )


def _nested() -> matta.Nested:
    nested = matta.nest(_net(4), _net(6))
    for module in (nested.ta, nested.student):
        for _ in range(3):
            module.train()(X)
    return nested


@pytest.mark.parametrize("choice", ["student", "narrow", "wide"])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_extracted_equals_what_is_live_and_is_its_own(choice: str, training: bool) -> None:
    nested = _nested()
    spec = None if choice == "student" else getattr(matta, choice)(nested)
    live = nested.student if spec is None else matta.live(nested, spec)
    extracted = matta.extract(nested, spec)
    assert torch.equal(extracted.train(training)(X), live.train(training)(X)) or training
    torch.testing.assert_close(extracted(X), live(X))
    before = extracted.eval()(X)
    with torch.no_grad():
        for parameter in nested.parameters():
            parameter.zero_()
    assert torch.equal(extracted(X), before)
    assert {p.data_ptr() for p in extracted.parameters()}.isdisjoint(p.data_ptr() for p in nested.parameters())


def test_what_is_extracted_is_copied_pickled_and_trained_like_any_module() -> None:
    extracted = matta.extract(_nested())
    for made in (copy.deepcopy(extracted), pickle.loads(pickle.dumps(extracted))):
        assert torch.equal(made.eval()(X), extracted.eval()(X))
        made(X).sum().backward()
        assert all(parameter.grad is not None for parameter in made.parameters())
    plain = _net(4)
    plain.load_state_dict(extracted.state_dict())
    assert torch.equal(plain.eval()(X), extracted(X))
    assert repr(extracted) == repr(plain)


def test_the_mode_is_that_of_the_live_module() -> None:
    nested = _nested()
    nested.eval()
    assert not matta.extract(nested).training
    nested.student.train()
    assert matta.extract(nested).training


def test_extracting_takes_no_part_in_autograd() -> None:
    nested = _nested()
    matta.extract(nested).train()(X).sum().backward()
    assert all(parameter.grad is None for parameter in nested.parameters())


def test_a_sub_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SubModelError, match="there is no layer 'h.0'; the layers are: 0"):
        matta.extract(_nested(), matta.SubModel({"h.0": "wide"}))


# ------------------------------------------------------------------------ recalibration


def _inputs(module: nn.Sequential, index: int, batches: list[Tensor]) -> list[Tensor]:
    """What reaches a layer when the ones before it use the statistics of each batch."""
    return [copy.deepcopy(module[:index]).train()(batch).detach() for batch in batches]


@pytest.mark.parametrize("index", [1, 4])
def test_statistics_become_the_averages_over_the_batches(index: int) -> None:
    module = matta.extract(_nested(), matta.wide(_nested()))
    assert isinstance(module, nn.Sequential)
    batches = [X[:4], X[4:8], X[8:]]
    assert matta.recalibrate(module, [(batch, None) for batch in batches]) == 3
    inputs = _inputs(module, index, batches)
    norm = module[index]
    assert isinstance(norm, nn.BatchNorm1d)
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in inputs]).mean(0))


def test_recalibration_leaves_all_else_as_it_was() -> None:
    module = _net(4).train()
    module[3].eval()
    module[4].momentum = 0.37
    weights = {name: p.clone() for name, p in module.named_parameters()}
    matta.recalibrate(module, [{"input": X, "labels": None}])
    assert all(torch.equal(weights[name], p) for name, p in module.named_parameters())
    assert [part.training for part in module] == [True, True, True, False, True, True]
    assert [norm.momentum for norm in (module[1], module[4])] == [0.1, 0.37]
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_failure_on_the_way_leaves_modes_and_momenta() -> None:
    module = _net(4).train()
    with pytest.raises(RuntimeError, match="shape"):
        matta.recalibrate(module, [(X, None), (X[:, :2], None)])
    assert module.training
    assert module[1].training
    assert module[1].momentum == 0.1


def test_without_batch_norm_nothing_is_run() -> None:
    assert matta.recalibrate(nn.Linear(3, 2), [(X, None)] * 4) == 0
    assert matta.recalibrate(nn.BatchNorm1d(3, track_running_stats=False), [(X, None)]) == 0
