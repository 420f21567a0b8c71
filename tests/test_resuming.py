"""Runs that are resumed: every sample once an epoch, whatever deals them; other arguments are used or refused."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

import matta
from matta.errors import CheckpointError, RunError
from matta.training.cotraining import CoTraining, CoTrainingOutput
from matta.training.plain_state import PackedState, read_state
from matta.training.resuming import arguments_of, require_same_arguments
from test_fitting import Setup, Stopped, assert_equal, batches, examples, seed_all

COUNT, BATCH = 12, 3
DATA = TensorDataset(torch.arange(float(COUNT)).view(COUNT, 1), torch.zeros(COUNT))


class Shuffled(Sampler[list[int]]):
    """Batches in an order drawn by a generator that goes on from pass to pass."""

    def __init__(self, shuffle: Callable[[list[int]], None], keep: Any) -> None:
        self.shuffle, self.keep = shuffle, keep

    def __len__(self) -> int:
        return COUNT // BATCH

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(COUNT))
        self.shuffle(order)
        return (order[start : start + BATCH] for start in range(0, COUNT, BATCH))


def shuffled_by(generator: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_sampler=Shuffled(generator.shuffle, generator))


def weighted() -> DataLoader[Any]:
    """Two samplers, one in the other, that draw from one generator."""
    generator = torch.Generator().manual_seed(5)
    sampler = WeightedRandomSampler([1.0 + index for index in range(COUNT)], COUNT, generator=generator)
    return DataLoader(DATA, batch_sampler=BatchSampler(sampler, BATCH, drop_last=False), generator=generator)


def nested_samplers() -> DataLoader[Any]:
    sampler = RandomSampler(DATA, generator=torch.Generator().manual_seed(6))
    return DataLoader(DATA, sampler=BatchSampler(sampler, BATCH, drop_last=True), batch_size=None)


class Drawing(Dataset[Any]):
    """Examples with noise of a generator of the dataset's own."""

    def __init__(self) -> None:
        self.noise = numpy.random.default_rng(8)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([index + float(self.noise.random()) / 2]), torch.zeros(())


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "persistent workers": lambda: DataLoader(DATA, BATCH, shuffle=True, num_workers=1, persistent_workers=True),
    "persistent workers and a generator": lambda: DataLoader(
        DATA, BATCH, shuffle=True, num_workers=2, persistent_workers=True, generator=torch.Generator().manual_seed(2)
    ),
    "Python's generator": lambda: shuffled_by(random.Random(7)),
    "NumPy's generator": lambda: shuffled_by(numpy.random.default_rng(7)),
    "NumPy's older generator": lambda: shuffled_by(numpy.random.RandomState(7)),
    "NumPy's Philox": lambda: shuffled_by(numpy.random.Generator(numpy.random.Philox(7))),
    "one generator for two": weighted,
    "samplers in samplers": nested_samplers,
    "a dataset that draws": lambda: DataLoader(Drawing(), BATCH, shuffle=True),
    "StatefulDataLoader": lambda: StatefulDataLoader(DATA, BATCH, shuffle=True),
    "StatefulDataLoader with workers": lambda: StatefulDataLoader(DATA, BATCH, shuffle=True, num_workers=1),
}


class Watch:
    """Notes the samples of each batch, and stops a run after some steps."""

    def __init__(self, stop: int) -> None:
        self.stop, self.seen = stop, list[list[float]]()

    def before_step(self, cotrain: CoTraining, batch: Any, out: CoTrainingOutput) -> None:
        self.seen.append(batch[0].flatten().tolist())

    def after_step(self, cotrain: CoTraining) -> None:
        if len(self.seen) == self.stop:
            raise Stopped

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        pass


def seen_by(
    make: Callable[[], Any], run: Path | None = None, *, stop: int = 0, seed: int = 0, **settings: Any
) -> list[list[float]]:
    """The samples of each batch of a run, which is stopped after `stop` steps."""
    seed_all(seed)
    data = make()
    watch = Watch(stop)
    nested = matta.nest(nn.Linear(1, 1), nn.Linear(1, 1))
    cotrain = matta.CoTraining(nested, matta.objectives.Binary())
    settings = {"epochs": 3, "checkpoint_every": 1, "observers": [watch], "progress": False, **settings}
    with contextlib.suppress(Stopped):
        matta.fit(cotrain, data, torch.optim.SGD(nested.parameters(), 0.01), run=run, tensorboard=False, **settings)
    return watch.seen


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("stop", [2, 5, 6, 9])
def test_a_resumed_run_sees_what_one_that_never_stopped_sees(name: str, stop: int, tmp_path: Path) -> None:
    whole = seen_by(LOADERS[name])
    first = seen_by(LOADERS[name], tmp_path / "run", stop=stop)
    done = stop - 1  # the step in which it stopped was not saved
    assert first[:done] + seen_by(LOADERS[name], tmp_path / "run", resume=True, seed=1) == whole


def test_a_loader_that_keeps_its_place_and_one_that_does_not_are_told_apart(tmp_path: Path) -> None:
    seen_by(lambda: DataLoader(DATA, BATCH), tmp_path / "run", stop=3)
    with pytest.raises(
        RunError, match="keeps no place of its own, and now it is StatefulDataLoader; expected the same"
    ):
        seen_by(lambda: StatefulDataLoader(DATA, BATCH), tmp_path / "run", resume=True)


class Told:
    """Notes the epochs that it is told."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class ToldDataset(Told, TensorDataset):
    pass


class ToldSampler(Told, RandomSampler):
    pass


class ToldBatches(Told, BatchSampler):
    pass


class ToldStream(Told, IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


def told_parts() -> list[tuple[Any, Any]]:
    dataset, sampler = ToldDataset(*DATA.tensors), ToldSampler(DATA)
    batched, stream = ToldBatches(range(COUNT), BATCH, drop_last=False), ToldStream()
    return [
        (dataset, DataLoader(dataset, BATCH)),
        (sampler, DataLoader(DATA, batch_sampler=BatchSampler(sampler, BATCH, drop_last=False))),
        (batched, DataLoader(DATA, batch_sampler=batched)),
        (stream, DataLoader(stream, BATCH)),
        (dataset, DataLoader(ConcatDataset([dataset]), BATCH)),
    ]


@pytest.mark.parametrize("index", range(5))
def test_whoever_has_set_epoch_is_told(index: int, tmp_path: Path) -> None:
    part, loader = told_parts()[index]
    seen_by(lambda: loader, tmp_path / "run", stop=6)
    assert part.epochs == [0, 1]
    part, loader = told_parts()[index]
    seen_by(lambda: loader, tmp_path / "run", resume=True)
    assert part.epochs == [1, 2]


def tower(width: int) -> nn.Module:
    """A model that draws nothing in training."""
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1))


def with_schedule(make: Callable[[Any], Any]) -> Setup:
    ours = Setup(make=tower)
    ours.scheduler = make(ours.optimizer)
    return ours


def linear(total: int) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=total)


def cosine(total: int) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, total)


def one_cycle(total: int) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total + 1)


def warm_up(total: int) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [linear(total)(optimizer), cosine(total)(optimizer)], milestones=[total // 2]
    )


def steps_down(total: int) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [total // 2, total - 1])


def _falling(step: int, *, total: int) -> float:
    return max(0.0, 1 - step / total)


def as_transformers_does(total: int) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.LambdaLR(optimizer, functools.partial(_falling, total=total))


def closed(total: int) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))


def restarts(total: int) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, total // 3, T_mult=2)


SCHEDULES = [linear, cosine, one_cycle, warm_up, steps_down, as_transformers_does, closed, restarts]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_another_schedule_is_refused_and_taken_when_the_run_is_prolonged(
    schedule: Callable[[int], Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with_schedule(schedule(6)).fit(batches(), steps=5, run=run)
    with pytest.raises(RunError, match=r"begun with scheduler\..*, and now it is .*resume='prolong'"):
        with_schedule(schedule(12)).fit(batches(), steps=10, run=run, resume=True)
    prolonged = with_schedule(schedule(12))
    prolonged.fit(batches(), steps=10, run=run, resume="prolong")
    assert_equal(prolonged.state(), by_hand(schedule).state())


def by_hand(schedule: Callable[[int], Any]) -> Setup:
    """Five steps of one schedule, then those of a longer one from its sixth on, with the same optimizer state."""
    ours = with_schedule(schedule(6))
    ours.fit(batches(), steps=5)
    longer = with_schedule(schedule(12))
    rates = []
    for _ in range(10):
        rates.append({name: longer.optimizer.param_groups[0][name] for name in ("lr", "betas")})
        longer.optimizer.step()
        longer.scheduler.step()
    ours.cotrain.train()
    for batch, values in zip(batches(), rates[5:], strict=True):
        ours.optimizer.param_groups[0].update(values)
        ours.optimizer.zero_grad(set_to_none=True)
        ours.cotrain(batch).loss.backward()
        ours.optimizer.step()
    return ours


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_schedule_goes_on_exactly(schedule: Callable[[int], Any], tmp_path: Path) -> None:
    whole, resumed = with_schedule(schedule(9)), with_schedule(schedule(9))
    whole.fit(batches(), steps=8)
    with_schedule(schedule(9)).fit(batches(), steps=4, run=tmp_path / "run")
    resumed.fit(batches(), steps=8, run=tmp_path / "run", resume=True)
    assert_equal(resumed.state(), whole.state())


def test_the_objects_of_the_run_itself_go_on(tmp_path: Path) -> None:
    whole, ours = with_schedule(cosine(9)), with_schedule(cosine(9))
    whole.fit(batches(), steps=8)
    ours.fit(batches(), steps=4, run=tmp_path / "run")
    ours.fit(batches(), steps=8, run=tmp_path / "run", resume=True)
    assert_equal(ours.state(), whole.state())


def test_a_schedule_that_has_come_to_zero_is_told(tmp_path: Path) -> None:
    with_schedule(linear(4)).fit(batches(), steps=4, run=tmp_path / "run")
    with pytest.warns(UserWarning, match=r"resumes at step 4 of 8 with a learning rate of 0.*resume='prolong'"):
        with_schedule(linear(4)).fit(batches(), steps=8, run=tmp_path / "run", resume=True)


def changed(**options: Any) -> Callable[[], Setup]:
    def make() -> Setup:
        ours = Setup(make=tower)
        ours.optimizer, ours.scheduler = torch.optim.AdamW(ours.nested.parameters(), **options), None
        return ours

    return make


def cotrained(**options: Any) -> Callable[[], Setup]:
    def make() -> Setup:
        ours = changed(lr=0.01)()
        options.setdefault("objective", matta.objectives.Binary())
        ours.cotrain = matta.CoTraining(ours.nested, **options)
        return ours

    return make


def shampooed(**options: Any) -> Callable[[], Setup]:
    def make() -> Setup:
        ours = Setup(make=tower)
        ours.optimizer, ours.scheduler = matta.Shampoo(ours.nested.parameters(), **options), None
        return ours

    return make


@pytest.mark.parametrize(
    ("begun", "now", "expected"),
    [
        (changed(lr=0.01), changed(lr=0.02), r"param_groups\[0\]\.lr=0.01, and now it is 0.02"),
        (changed(weight_decay=0.0), changed(weight_decay=0.1), r"weight_decay=0.0, and now it is 0.1"),
        (changed(), changed(betas=(0.8, 0.9)), r"betas=\[0.9, 0.999\], and now it is \[0.8, 0.9\]"),
        (shampooed(lr=0.01), shampooed(lr=0.01, root_eps=1e-3), r"root_eps=1e-06, and now it is 0.001"),
        (shampooed(lr=0.01), changed(lr=0.01), r"optimizer='Shampoo', and now it is 'AdamW'"),
        (cotrained(), cotrained(ramp=matta.Ramp(start=3)), r"ramp=None, and now it is 'Ramp'"),
        (
            cotrained(weights=matta.Weights(distill=0.5)),
            cotrained(weights=matta.Weights(distill=2.0)),
            r"cotrain\.weights\.distill=0.5, and now it is 2.0",
        ),
    ],
)
def test_other_arguments_are_refused_by_name(
    begun: Callable[[], Setup], now: Callable[[], Setup], expected: str, tmp_path: Path
) -> None:
    begun().fit(batches(), steps=3, run=tmp_path / "run")
    other = now()
    with pytest.raises(RunError, match=expected):
        other.fit(batches(), steps=5, run=tmp_path / "run", resume=True, scheduler=None)
    begun().fit(batches(), steps=5, run=tmp_path / "run", resume=True)


def test_clipping_and_precision_are_compared(tmp_path: Path) -> None:
    Setup().fit(batches(), steps=3, run=tmp_path / "run", clip_norm=1.0)
    with pytest.raises(RunError, match=r"clip_norm=1.0, and now it is None; precision='no', and now it is 'bf16'"):
        Setup().fit(batches(), steps=5, run=tmp_path / "run", resume=True, precision="bf16")


def test_a_run_resumes_whatever_its_schedule_holds(tmp_path: Path) -> None:
    """Arguments of kinds that a checkpoint does not hold do not make it one that cannot be read."""

    def held(optimizer: Any) -> Any:
        scheduler = linear(9)(optimizer)
        scheduler.modules = [nn.Linear(1, 1)]
        return scheduler

    ours = Setup()
    begun = arguments_of(ours.cotrain, ours.optimizer, held(ours.optimizer), clip_norm=numpy.float64(1.5))
    assert begun["clip_norm"] == 1.5 and begun["scheduler.total_iters"] == 9
    PackedState(begun).write(tmp_path, "arguments")
    assert read_state(tmp_path, "arguments") == begun


def test_a_prolonged_run_takes_new_hyperparameters(tmp_path: Path) -> None:
    changed(lr=0.01)().fit(batches(), steps=5, run=tmp_path / "run")
    prolonged, expected = changed(lr=0.002, weight_decay=0.3)(), changed(lr=0.01)()
    prolonged.fit(batches(), steps=10, run=tmp_path / "run", resume="prolong")
    expected.fit(batches(), steps=5)
    expected.optimizer.param_groups[0].update({"lr": 0.002, "weight_decay": 0.3})
    expected.fit(batches(), steps=5)
    assert_equal(prolonged.state(), expected.state())
    again = changed(lr=0.002, weight_decay=0.3)()  # the folder is now that of the new arguments
    assert again.fit(batches(), steps=12, run=tmp_path / "run", resume=True).steps == 12


def test_what_cannot_be_prolonged_is_refused(tmp_path: Path) -> None:
    with_schedule(linear(9)).fit(batches(), steps=4, run=tmp_path / "run")
    ahead = with_schedule(linear(9))
    ahead.fit(batches(), steps=5)
    with pytest.raises(RunError, match="made 5 steps, and the run resumes after step 4; expected a new scheduler"):
        ahead.fit(batches(), steps=9, run=tmp_path / "run", resume="prolong")
    grouped = Setup(make=tower)
    parameters = list(grouped.nested.parameters())
    grouped.optimizer = torch.optim.Adam([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)
    with pytest.raises(RunError, match=r"begun with 1 group\(s\) of parameters, and now there are 2"):
        grouped.fit(batches(), steps=9, run=tmp_path / "run", resume="prolong", scheduler=None)
    shampooed()().fit(batches(), steps=4, run=tmp_path / "blocks")
    with pytest.raises(RunError, match="begun with block_size=128, for which its state is made, and now it is 4"):
        shampooed(block_size=4)().fit(batches(), steps=9, run=tmp_path / "blocks", resume="prolong")
    with pytest.raises(RunError, match="begun with graft='adam', for which its state is made, and now it is 'sgd'"):
        shampooed(graft="sgd")().fit(batches(), steps=9, run=tmp_path / "blocks", resume="prolong")
    other = Setup(make=tower)
    other.optimizer = torch.optim.SGD(other.nested.parameters(), lr=0.1)
    with pytest.raises(RunError, match="the optimizer Adam, whose state it keeps, and now it is SGD; expected"):
        other.fit(batches(), steps=9, run=tmp_path / "run", resume="prolong", scheduler=None)
    with pytest.raises(RunError, match="resume='longer'; expected True, False or 'prolong'"):
        Setup().fit([(examples()[0], examples()[1])], run=tmp_path / "run", resume="longer")


def test_many_long_differences_are_told_in_few_words() -> None:
    begun, now = ({f"{name}{i}": name * 5000 for i in range(50)} for name in "ab")
    state = {"scheduler": None, "arguments": begun, "optimizer": {"param_groups": []}}
    with pytest.raises(RunError, match=r"the run was begun with a0='aaa.*Expected the same") as told:
        require_same_arguments(state, now, None)
    assert len(str(told.value)) < 3000


def ordered(count: int = COUNT, size: int = BATCH, **options: Any) -> Callable[[], DataLoader[Any]]:
    data = TensorDataset(torch.arange(float(count)).view(count, 1), torch.zeros(count))
    return lambda: DataLoader(data, size, **options)


class Apart(IterableDataset[Any]):
    """Examples that workers share out themselves."""

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter([DATA[index] for index in range(first, COUNT, step)])


@pytest.mark.parametrize(
    ("begun", "now", "told"),
    [
        (ordered(), ordered(size=2), "batches of a pass=4, and now it is 6"),
        (ordered(), ordered(count=9), "batches of a pass=4, and now it is 3"),
        (lambda: batches()[:4], lambda: batches()[:5], "batches of a pass=4, and now it is 5"),
        (ordered(), ordered(shuffle=True), "DataLoader='DataLoader, SequentialSampler, .*now it is '.*RandomSampler"),
        (
            ordered(shuffle=True, generator=torch.Generator()),
            ordered(shuffle=True),
            "generators=1, and now it is 0",
        ),
        (
            lambda: DataLoader(Apart(), BATCH),
            lambda: DataLoader(Apart(), BATCH, num_workers=2),
            "num_workers=0, and now it is 2",
        ),
        (
            lambda: StatefulDataLoader(DATA, BATCH),
            lambda: StatefulDataLoader(DATA, BATCH, num_workers=1),
            "num_workers=0, and now it is 1",
        ),
    ],
)
def test_other_data_within_a_pass_is_refused(
    begun: Callable[[], Any], now: Callable[[], Any], told: str, tmp_path: Path
) -> None:
    settings = {"epochs": 2, "checkpoint_every": 1, "tensorboard": False, "progress": False, "run": tmp_path / "run"}

    def fit(data: Any, **changes: Any) -> Any:
        width = next(iter(data))[0].shape[1]
        nested = matta.nest(nn.Linear(width, 1), nn.Linear(width, 1))
        cotrain = matta.CoTraining(nested, matta.objectives.Binary())
        optimizer = torch.optim.SGD(nested.parameters(), 0.01)
        return matta.fit(cotrain, data, optimizer, **{**settings, **changes})

    with pytest.raises(Stopped):
        fit(begun(), observers=[Watch(3)])
    for how in (True, "prolong"):
        with pytest.raises(RunError, match=f"stopped within a pass over data with {told}.*; expected the same data"):
            fit(now(), observers=[Watch(0)], resume=how)
    assert fit(begun(), observers=[Watch(0)], resume=True).steps == 8
    assert fit(now(), observers=[Watch(0)], resume=True, epochs=3).steps > 8, "between two passes none is lost"


def same_shapes(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), *(nn.Linear(width, each) for each in (width, width, 1)))


@pytest.mark.parametrize("how", [True, "prolong"])
def test_parameters_in_another_order_are_refused(how: Any, tmp_path: Path) -> None:
    """Two of one shape that change places would have the state of each other."""

    def ordered_by(*order: int) -> Setup:
        ours = Setup(make=same_shapes)
        parameters = list(ours.nested.parameters())
        ours.optimizer, ours.scheduler = torch.optim.Adam([parameters[index] for index in order], lr=0.01), None
        return ours

    ordered_by(0, 1, 2, 3, 4, 5, 6, 7).fit(batches(), steps=3, run=tmp_path / "run")
    told = (
        "parameter 2 of the optimizer was nested.ta.2.weight when the run was begun, and now it is nested.ta.3.weight"
    )
    with pytest.raises(RunError, match=f"{told}; expected the same order"):
        ordered_by(0, 1, 4, 3, 2, 5, 6, 7).fit(batches(), steps=5, run=tmp_path / "run", resume=how)
    assert ordered_by(0, 1, 2, 3, 4, 5, 6, 7).fit(batches(), steps=5, run=tmp_path / "run", resume=how).steps == 5


def test_other_types_are_refused_and_converted_when_the_run_is_prolonged(tmp_path: Path) -> None:
    def doubled() -> Setup:
        ours = Setup(make=tower)
        ours.cotrain.double()
        ours.optimizer, ours.scheduler = torch.optim.Adam(ours.nested.parameters(), lr=0.01), None
        return ours

    data = [(x.double(), y.double()) for x, y in batches()]
    Setup(make=tower).fit(batches(), steps=3, run=tmp_path / "run", scheduler=None)
    told = r"holds nested\..* as torch.float32, and the modules as torch.float64; .*resume='prolong'"
    with pytest.raises(CheckpointError, match=told):
        doubled().fit(data, steps=5, run=tmp_path / "run", resume=True)
    assert doubled().fit(data, steps=5, run=tmp_path / "run", resume="prolong").steps == 5
