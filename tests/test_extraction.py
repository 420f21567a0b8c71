"""What is extracted is a plain model of the user's classes; statistics are measured afresh."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.errors import RunError, SubModelError

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


class Remembering(nn.Module):
    """Keeps what it computed last, in several places, as recurrent models keep their state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
        self.state: Tensor | None = None
        self.cache: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.first(x).tanh()
        self.cache["hidden"] = [self.state * 2]
        return self.last(self.state)


def hooked(norm: Callable[[nn.Linear], nn.Module]) -> Callable[[int], nn.Module]:
    def build(width: int) -> nn.Module:
        torch.manual_seed(width)
        return nn.Sequential(norm(nn.Linear(3, width)), nn.ReLU(), nn.Linear(width, 1))

    return build


KEPT = {
    "state": Remembering,
    "spectral_norm": hooked(nn.utils.spectral_norm),
    "weight_norm": hooked(nn.utils.weight_norm),
    "pruned": hooked(lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.4)),
    "parametrized": hooked(nn.utils.parametrizations.spectral_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("build", KEPT.values(), ids=KEPT)
def test_what_forwards_leave_behind_does_not_stop_extraction(build: Callable[[int], nn.Module], tmp_path: Path) -> None:
    nested = matta.nest(build(4), build(6))
    cotrain = matta.CoTraining(nested, matta.objectives.Classification(), sample=matta.random_sub_model(nested))
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.1)
    if build is not Remembering:
        cotrain.objective = matta.objectives.Binary()
    for _ in range(3):
        cotrain((X, torch.ones(16).long() if build is Remembering else torch.ones(16))).loss.backward()
        optimizer.step()
    for spec in (None, matta.narrow(nested), matta.wide(nested)):
        live = nested.student if spec is None else matta.live(nested, spec)
        extracted = matta.extract(nested, spec)
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(extracted).eval()(X), live.eval()(X))
    again = matta.load(matta.save(nested, tmp_path / "nested"), build(4), build(6))
    assert torch.equal(again.student.eval()(X), nested.student.eval()(X))


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
    sizes = torch.tensor([4, 4, 8]) / 16  # each example weighs the same
    torch.testing.assert_close(norm.running_mean, sizes @ torch.stack([x.mean(0) for x in inputs]))
    torch.testing.assert_close(norm.running_var, sizes @ torch.stack([x.var(0) for x in inputs]))


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


class Pictures(nn.Module):
    """Norms of several kinds, one of which is only reached if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.batch, self.instance = nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)
        self.aside = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.instance(self.batch(x)) if x.mean() < 100 else self.aside(x)


def endless_fault() -> Iterator[tuple[Tensor, None]]:
    yield X, None
    raise KeyboardInterrupt


NANS = torch.where(torch.arange(16)[:, None] == 3, torch.nan, X)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (lambda: iter(()), RunError, "received no batches .* expected at least one"),
        (lambda: [(X, None), (X[:1], None)], RunError, "gives 1 1 value per channel.*drop_last=True"),
        (lambda: [(X, None), (NANS, None)], RunError, "give 1 statistics that are not finite"),
        (lambda: [(X * 1e30, None)], RunError, "give 1 statistics that are not finite"),
        (lambda: [(X, None), (X[:, :2], None)], RuntimeError, "shape"),
        (endless_fault, KeyboardInterrupt, None),
    ],
    ids=["nothing", "one", "nan", "infinite", "shape", "interrupt"],
)
def test_statistics_are_kept_unless_new_ones_are_known_to_be_good(
    batches: Callable[[], Iterable[tuple[Tensor, None]]], error: type[BaseException], message: str | None
) -> None:
    module = matta.extract(_nested(), matta.wide(_nested())).train()
    before = {name: each.clone() for name, each in module.state_dict().items()}
    with pytest.raises(error, match=message):
        matta.recalibrate(module, batches())
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    assert all(part.training for part in module.modules())
    assert not module[1]._forward_pre_hooks and module[1].momentum == 0.1


def test_norms_of_every_kind_are_measured_and_those_not_reached_are_left() -> None:
    module, x = Pictures(), torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)) + 7
    module.aside.running_mean.fill_(9.0)
    assert matta.recalibrate(module, [(x[:1], None), (x[1:], None)]) == 2
    torch.testing.assert_close(module.batch.running_mean, x.mean((0, 2, 3)))
    normed = torch.cat([nn.BatchNorm2d(3).train()(part) for part in (x[:1], x[1:])])
    torch.testing.assert_close(module.instance.running_var, normed.var((2, 3)).mean(0))
    assert module.aside.running_mean.tolist() == [9.0] * 3


def test_without_batch_norm_nothing_is_run() -> None:
    assert matta.recalibrate(nn.Linear(3, 2), [(X, None)] * 4) == 0
    assert matta.recalibrate(nn.BatchNorm1d(3, track_running_stats=False), [(X, None)]) == 0
