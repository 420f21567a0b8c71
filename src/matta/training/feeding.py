"""Batches for a run: pass after pass over the data, and the exact batch at which a run resumes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from matta.errors import RunError
from matta.nesting.batches import Batch
from matta.training.processes import is_shared_out, known_length
from matta.training.randomness import (
    generator_state,
    generators_of,
    parts_of,
    random_state,
    random_state_kept,
    set_generator_states,
    set_random_state,
)


@runtime_checkable
class StatefulIterator(Protocol):
    """An iterator of batches that keeps its own place, such as `matta.streams.Stream`.

    A resumed run gives it back its state, and nothing is replayed. States are of tensors and plain types.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Itself."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """The state after the batch last given out."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on after the batch at which the state was taken."""


@runtime_checkable
class StatefulLoader(Protocol):
    """A DataLoader that keeps its own place in a pass, such as torchdata's StatefulDataLoader."""

    def state_dict(self) -> dict[str, Any]:
        """The state after the batch last given out."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """The next pass begins after the batch at which the state was taken."""


@runtime_checkable
class ShardedIterator(StatefulIterator, Protocol):
    """One that can be shared by several processes, such as `matta.lm.packing.PackedTokens`."""

    def shard(self, rank: int, num_ranks: int, /) -> None:
        """Give out the batches of one process from now on, as many as those of every other."""


@runtime_checkable
class DividedIterator(ShardedIterator, Protocol):
    """One that every process knows a part of, so that each needs the states of all to continue."""

    def load_state_dicts(self, states: Sequence[dict[str, Any]], /) -> None:
        """Go on after the batch at which all processes took these states, in as many processes or others."""


@final
class Feed:
    """What a run has seen of its data, and what comes next.

    A pass is replayed by giving the random generators the states that they had at its beginning, so
    that a shuffled DataLoader deals the same order again, and leaving out the batches already seen.
    Of map-style data those are not even loaded, but for the last (with persistent workers all are). The random
    generators are the global ones, and those that the DataLoader, its dataset and its samplers keep as attributes;
    whichever of them has `set_epoch` is told the epoch before each pass. A `StatefulLoader` replays nothing, and an
    iterator that keeps its own place (`StatefulIterator`) resumes there instead, also when it had come to an end and
    now has more.

    Several processes share the batches: DataLoaders as Accelerate shards them; a `ShardedIterator` shares its
    data out itself; of any other iterable each process takes every n-th batch. For whole passes (`num_passes`) batches
    of a known number must divide among the processes, or come from a DataLoader with `drop_last`; elsewhere those left
    over at the end of a pass are left out of it. The last of a DataLoader without a length Accelerate fills up from
    its first samples.

    Raises:
        RunError: the data is no iterable of batches, or an iterator, which can be passed over once, is asked
            for several passes; batches do not divide among the processes, or a sampler shares them out already.
    """

    def __init__(self, data: Iterable[Batch], accelerator: Any, num_passes: int | None) -> None:
        if not isinstance(data, Iterable):
            raise RunError(
                f"received data of type {type(data).__name__}; expected batches: a DataLoader, a list, or any iterable "
                f"of them"
            )
        is_iterator = isinstance(data, Iterator)
        if is_iterator and num_passes is not None and num_passes > 1:
            raise RunError(
                f"received an iterator and epochs={num_passes}, and an iterator can be passed over once; "
                f"expected a DataLoader or a list, or steps= in place of epochs="
            )
        self.stateful = data if isinstance(data, StatefulIterator) else None
        self.device: torch.device = accelerator.device
        self.rank, self.num_processes = accelerator.process_index, accelerator.num_processes
        self.is_sharded = self.num_processes > 1 and isinstance(data, DataLoader | StatefulIterator)
        self._share: int | None = None  # batches of a pass that every process has, where some have one more
        if self.num_processes > 1 and self.stateful is None and not accelerator.split_batches:
            self._share = _even_share(data, self.num_processes, is_whole=num_passes is not None)
        self.data = self._shared(data, accelerator) if self.is_sharded else data
        self.generators = generators_of(data)
        self._name = type(data).__name__
        self._is_stateful_loader = isinstance(data, DataLoader) and isinstance(data, StatefulLoader)
        self.loader: Any = data if self._is_stateful_loader and self.num_processes == 1 else None
        self.has_persistent_workers = bool(getattr(data, "persistent_workers", False))
        self.num_passes = 1 if is_iterator else num_passes
        self.epoch, self.batch = 0, 0
        self.num_whole = known_length(data)
        self._about = _about(data)
        self.ends_together = self.num_processes == 1 or isinstance(data, DataLoader | Sized | DividedIterator)
        self._start: dict[str, Any] = {}
        self._resume_at: dict[str, Any] | None = None
        self._begun_with: Mapping[str, Any] = {}

    def _shared(self, data: Iterable[Batch], accelerator: Any) -> Iterable[Batch]:
        """The data, so that each process has batches of its own."""
        if isinstance(data, DataLoader):
            return _prepared(data, accelerator)
        if not isinstance(data, ShardedIterator):
            raise RunError(
                f"received {type(data).__name__}, which keeps its own place, in {self.num_processes} processes; "
                f"expected one process, or an iterator with shard(rank, num_ranks), which shares its data out"
            )
        data.shard(self.rank, self.num_processes)
        return data

    @property
    def unit(self) -> int:
        """Samples in a batch of an iterator that can share its samples out in other batches too; elsewhere 1."""
        return int(getattr(self.stateful, "batch", 1)) if isinstance(self.stateful, ShardedIterator) else 1

    def num_batches(self) -> int | None:
        """Batches of a pass for this process, where the data tells."""
        length = known_length(self.data)
        return length if length is None or self.is_sharded else length // self.num_processes

    def num_steps(self, steps: int | None, accumulate: int) -> int | None:
        """Optimizer steps of the run: those given, or of all passes, where the data tells."""
        num_batches = None if steps is not None or self.num_passes is None else self.num_batches()
        return steps if num_batches is None else num_batches * (self.num_passes or 0) // accumulate

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left, on the device.

        Raises:
            RunError: a pass has no batches, or not the ones to be left out after a resume.
        """
        was_resumed = self._resume_at is not None
        while self.num_passes is None or self.epoch < self.num_passes:
            for batch in self._resumed_pass() if self._resume_at else self._new_pass():
                self.batch += 1
                yield self._to_device(batch)
            if not self.batch and not (self.stateful is not None and was_resumed):
                raise RunError("the data gave no batch; expected at least one: is drop_last larger than the data?")
            self.epoch, self.batch = self.epoch + 1, 0

    def state(self) -> dict[str, Any]:
        """Where the run is; to be taken between two batches."""
        state = {"epoch": self.epoch, "batch": self.batch, "start": self._start, "now": self._random_states()}
        state["about"] = self._about
        if self.stateful is not None:
            state["data"] = self.stateful.state_dict()
        elif self.loader is not None and self.batch:
            state["data"] = self.loader.state_dict()
        return state

    def resume(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on after the batch at which the states of all processes were taken, by as many processes or others.

        Raises:
            RunError: it is other data, or what other numbers of processes would see differs.
        """
        same = len(states) == self.num_processes
        state = states[self.rank] if same else self._for_other_processes(states)
        self.epoch, self.batch, self._start = state["epoch"], state["batch"], state["start"]
        self._resume_at = state["now"]
        self._begun_with = state.get("about", {})  # older checkpoints have none
        if self.stateful is not None:
            if "data" not in state:
                raise RunError("the run was begun with data that keeps no place of its own; expected the same data")
            self.epoch = 0  # what had ended may have more now
            if isinstance(self.stateful, DividedIterator):
                self.stateful.load_state_dicts([each["data"] for each in states])
            else:
                self.stateful.load_state_dict(state["data"])
        elif self.loader is not None and self.batch:
            self._require_place(state)
            self.loader.load_state_dict(state["data"])
        elif self.has_persistent_workers and (self.epoch or self._start.get("had_workers")):
            iter(self.data)  # workers that continue draw no seed of their own: bring them to life before the pass

    def _require_same_data(self) -> None:
        """Within a pass, refuse other data, of which samples would be left out or dealt twice."""
        for name, now in self._about.items():
            if (was := self._begun_with.get(name)) != now and None not in (was, now):
                raise RunError(
                    f"the run stopped within a pass over data with {name}={was!r}, and now it is {now!r}; expected the "
                    f"same data: for other data begin a new run, with the weights of this one (matta.load)"
                )

    def _for_other_processes(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state of this process in a run that other processes have begun: the same batches follow.

        Every pass has to deal the same batches in the same order, however many processes share them. Processes that
        there were not have random numbers of their own.
        """
        was, first = len(states), states[0]
        begun = f"the run was begun in {was} process(es), and now there are {self.num_processes}"
        now = first["now"] if self.rank < was else _own_random_states(first["now"], self.rank)
        state = {**states[min(self.rank, was - 1)], "start": first["start"], "now": now}
        if self.stateful is not None:
            return {**state, "data": first["data"]} if "data" in first else state
        if self._is_stateful_loader or (isinstance(self.data, DataLoader) and not _is_map_style(self.data)):
            raise RunError(
                f"{begun}; expected as many, or a run that was begun with a DataLoader over a map-style dataset: a "
                f"{self._name} over {type(getattr(self.data, 'dataset', None)).__name__} gives them other batches"
            )
        if len(self.generators) != len(first["now"]["generators"]):
            raise RunError(
                f"{begun}; expected as many, or a DataLoader with a generator of its own, whose order does not depend "
                f"on their number: generator=torch.Generator().manual_seed(0)"
            )
        length = self.num_whole
        if length is not None and any(length % count for count in (was, self.num_processes)):
            raise RunError(f"{begun}, and a pass of {length} batches is not a multiple of both; expected as many")
        batch, left = divmod(first["batch"] * was, self.num_processes)
        if left:
            raise RunError(f"{begun}, and {first['batch'] * was} batches of a pass are done; expected as many")
        return {**state, "batch": batch}

    def _require_place(self, state: dict[str, Any]) -> None:
        if "data" not in state:
            raise RunError(
                f"the run was begun with data that keeps no place of its own, and now it is "
                f"{type(self.loader).__name__}; expected the same data"
            )

    def _random_states(self) -> dict[str, Any]:
        return {"global": random_state(), "generators": [generator_state(each) for each in self.generators]}

    def _set_random_states(self, states: dict[str, Any]) -> None:
        set_random_state(states["global"])
        if len(self.generators) == len(states["generators"]):  # else it is other data, from the next pass on
            set_generator_states(self.generators, states["generators"])

    def _new_pass(self) -> Iterator[Batch]:
        self._start = {**self._random_states(), "had_workers": getattr(self.data, "_iterator", None) is not None}
        return self._deal(0)

    def _resumed_pass(self) -> Iterator[Batch]:
        """The rest of a pass. The last batch seen is drawn again: drawing it seeds the samplers."""
        at, self._resume_at = self._resume_at, None
        assert at is not None
        if not self.batch or self.stateful is not None:
            self._set_random_states(at)
            return self._new_pass()
        self._require_same_data()
        if self.loader is not None:
            set_random_state(at["global"])
            return self._deal(0)
        self._set_random_states(self._start)
        batches = self._deal(self.batch - 1)
        if next(batches, None) is None:
            raise RunError(
                f"the data ended before batch {self.batch}, where the run had stopped in epoch {self.epoch}; "
                f"expected the data that the run was begun with"
            )
        if getattr(self.data, "num_workers", 0) == 0 and not self.is_sharded:
            self._set_random_states(at)  # nothing was drawn ahead, and a dataset may have drawn for what is left out
        else:
            set_random_state(at["global"])  # those of the samplers are where replaying the pass has brought them
        return batches

    def _deal(self, num_skipped: int) -> Iterator[Batch]:
        """This process's batches of a pass but the first few."""
        for part in parts_of(self.data):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(self.epoch)
        can_skip = isinstance(self.data, DataLoader) and _is_map_style(self.data) and not self.has_persistent_workers
        if num_skipped and can_skip:
            from accelerate import skip_first_batches

            return self._even(iter(skip_first_batches(self.data, num_skipped)), num_skipped)
        batches = iter(self.data)
        if self.num_processes > 1 and not self.is_sharded:
            batches = (group[self.rank] for group in full_groups(batches, self.num_processes))
        return islice(self._even(batches, 0), num_skipped, None)

    def _even(self, batches: Iterator[Batch], num_skipped: int) -> Iterator[Batch]:
        """As many batches as every process has; the others are read too: Accelerate counts the pass at its end."""
        for index, batch in enumerate(batches, num_skipped):
            if self._share is None or index < self._share:
                yield batch

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        from accelerate.utils import send_to_device

        return send_to_device(batch, self.device, non_blocking=True)


def _about(data: Any) -> dict[str, Any]:
    """What the place in a pass depends on, in plain types; nothing of data that keeps its place, or is shared out."""
    if isinstance(data, StatefulIterator) or is_shared_out(data):
        return {}
    found: dict[str, Any] = {"batches of a pass": known_length(data)}
    if isinstance(data, DataLoader):
        found["DataLoader"] = ", ".join(type(part).__name__ for part in parts_of(data))
        found["generators"] = len(generators_of(data))
        if isinstance(data.dataset, IterableDataset) or isinstance(data, StatefulLoader):
            found["num_workers"] = data.num_workers
    return found


def _own_random_states(states: dict[str, Any], rank: int) -> dict[str, Any]:
    """The random states of a process that there was not before: drawn from those of the first one."""
    from accelerate.utils import set_seed

    with random_state_kept():
        set_random_state(states["global"])
        set_seed(int(torch.randint(2**31, (rank + 1,))[-1]))
        return {**states, "global": random_state()}


def _is_map_style(data: DataLoader[Any]) -> bool:
    return not isinstance(data.dataset, IterableDataset) and data.batch_sampler is not None


def _prepared(data: DataLoader[Any], accelerator: Any) -> DataLoader[Any]:
    """A DataLoader of this process's batches, without samples dealt twice to fill the last ones up."""
    if is_shared_out(data):
        return data
    fills_up, accelerator.even_batches = accelerator.even_batches, accelerator.even_batches and not _is_map_style(data)
    try:
        return accelerator.prepare_data_loader(data)
    finally:
        accelerator.even_batches = fills_up


def full_groups(batches: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    """Each `count` batches together; what is left over at the end is left out."""
    while len(group := list(islice(batches, count))) == count:
        yield group


def _even_share(data: Iterable[Batch], num_processes: int, *, is_whole: bool) -> int | None:
    """Batches of a pass that every process has, where some would have one more; None elsewhere.

    Raises:
        RunError: whole passes are to be shared out, and some batches would be left over; or a DistributedSampler
            shares them out already.
    """
    if isinstance(getattr(data, "sampler", None), DistributedSampler):
        raise RunError(
            "received a DataLoader with a DistributedSampler, and fit shares the batches out itself; expected the "
            "DataLoader of one process: leave sampler= out"
        )
    sampler = getattr(data, "batch_sampler", None)
    if not (_is_map_style(data) if isinstance(data, DataLoader) else isinstance(data, Sized)):
        return None
    num_batches = getattr(sampler, "total_length", None) or len(data)  # type: ignore[arg-type]
    share, left = divmod(num_batches, num_processes)
    if not left or getattr(sampler, "drop_last", False):
        return None
    if is_whole:
        raise RunError(
            f"received {num_batches} batches for {num_processes} processes, which leave {left} over; expected a "
            f"multiple of {num_processes}: choose another batch size or number of processes, steps= in place of "
            f"epochs=, or a DataLoader with drop_last=True, which leaves them out"
        )
    return share if isinstance(data, DataLoader) else None
