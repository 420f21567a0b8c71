"""The processes that train together: what a launcher started, and sums over all of them."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from matta.errors import RunError, first_line

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
PATIENCE: Final = timedelta(days=30)
"""How long a process waits for another that evaluates or writes, where torch's messages would end the run."""
_MISSING: Final = object()
_JOINING: Final = threading.Lock()  # Accelerate's state is half made while another thread makes it
_SIZES: Final = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def num_processes() -> int:
    """Processes of torch.distributed; 1 without it."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_rank() -> int:
    """The number of this process, from 0."""
    return 0 if num_processes() == 1 else distributed.get_rank()


def is_main_process() -> bool:
    """Whether this is the process that writes files."""
    return process_rank() == 0


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, which must all call this."""
    if num_processes() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def gathered(value: Any) -> list[Any]:
    """The value of each process, in the order of their ranks; all must call this."""
    values = [value] * num_processes()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def gathered_by_main(value: Any) -> list[Any]:
    """The value of each process, for the main process alone (elsewhere nothing); all must call this."""
    if num_processes() == 1:
        return [value]
    values = [None] * num_processes() if is_main_process() else None
    distributed.gather_object(value, values)
    return values or []


def of_main(value: T) -> T:
    """The value of the main process; all must call this."""
    values = [value]
    if num_processes() > 1:
        distributed.broadcast_object_list(values)
    return values[0]


@lru_cache(maxsize=1)
def _patient_group(_: Any) -> Any:
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def dealt(pieces: Iterable[T], *, together: bool = True) -> Iterator[tuple[T, bool]]:
    """The pieces of work that this process does, and whether each counts: one of as many as there are processes.

    All processes do equally many. Where the last ones are too few, some do one that another counts. Not `together`,
    this process does them all.

    Example:
        >>> list(dealt("ab"))
        [('a', True), ('b', True)]
    """
    rank, size = (process_rank(), num_processes()) if together else (0, 1)
    place = size - 1
    for index, piece in enumerate(pieces):
        place = index % size
        if place in (0, rank):
            mine = piece
        if place == size - 1:
            yield mine, True
    if place < size - 1:
        yield mine, rank <= place


def collected(values: Sequence[T], *, together: bool = True) -> list[T]:
    """What came of all pieces that were `dealt`, in their order, of what came of each process's own that count.

    All processes must call this, if `together`.

    Example:
        >>> collected([1, 2])
        [1, 2]
    """
    rounds = zip_longest(*(gathered(list(values)) if together else [values]), fillvalue=_MISSING)
    return [value for each in rounds for value in each if value is not _MISSING]


def raise_together(error: Exception | None) -> None:
    """Raise the error of one process on all of them, which must all call this, and wait as long as it takes.

    Raises:
        RunError: another process has one.
    """
    if num_processes() > 1:
        distributed.barrier(group=_patient_group(distributed.group.WORLD))
    messages = gathered(None if error is None else first_line(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RunError(f"process {rank} of {len(messages)} failed: {message}")


def require_same_call(values: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse a call of `fit` that is not the same in all processes, which must all call this.

    They would train apart, or wait for each other without end. The parameters of `module` are compared too.

    Raises:
        RunError: a value differs from that of the main process.
    """
    if num_processes() == 1:
        return
    trained = {name: (tuple(each.shape), each.requires_grad) for name, each in module.named_parameters()}
    here = {name: repr(value) for name, value in {**values, **trained}.items()}
    there = of_main(here)
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    told = [
        f"{name}={here.get(name, 'nothing'):.200}, and process 0 {there.get(name, 'nothing'):.200}"
        for name in differing[:1]
    ]
    for rank, each in enumerate(gathered(told)):
        if each:
            raise RunError(
                f"process {rank} of {num_processes()} was given {each[0]}; expected the same call of matta.fit in all "
                f"processes: it shares out the batches, and evaluates and writes on the main one, by itself"
            )


def while_all(items: Iterator[T], device: torch.device, *, alike: bool = False) -> Iterator[T]:
    """Items as long as every process has one; all must iterate together, and each step of that is a message.

    Raises:
        RunError: they are to be `alike`, and are fewer in some processes; else there is a warning.
    """
    while True:
        item = next(items, _MISSING)
        num_left = int(summed(torch.tensor(float(item is not _MISSING), device=device)).item())
        if num_left < num_processes():
            break
        yield item  # type: ignore[misc]
    told = (
        f"the data of {num_processes() - num_left} of {num_processes()} processes has ended, and the others have more"
    )
    if num_left and alike:
        raise RunError(f"{told}; expected the same data in all of them")
    if num_left and is_main_process():
        warnings.warn(f"{told}, which the run leaves out: give all of them equally many batches", stacklevel=2)


def is_shared_out(data: Any) -> bool:
    """Whether a DataLoader gives each of several processes its share: by its sampler, or prepared by Accelerate."""
    is_sampled = isinstance(getattr(data, "sampler", None), DistributedSampler) and data.sampler.num_replicas > 1
    return is_sampled or (num_processes() > 1 and type(data).__module__.startswith("accelerate."))


def known_length(data: Any) -> int | None:
    """Batches to a pass, of all processes together, where the data tells."""
    try:
        return len(data)
    except TypeError:
        return None


def num_launched() -> int:
    """Processes that a launcher started: torchrun, accelerate, mpirun or srun, or those of torch.distributed."""
    found = next((os.environ[name] for name in _SIZES if os.environ.get(name, "").isdigit()), "1")
    return max(int(found), num_processes())


def make_accelerator() -> Accelerator:
    """Accelerate for all processes launched, on the CPU (gloo) where the machine has nothing else.

    Raises:
        RunError: Accelerate does not use them all.
    """
    from accelerate import Accelerator

    _warn_of_one_process()
    _join_slurm()
    on_cpu = num_launched() > 1 and not torch.accelerator.is_available()
    try:
        _join_afresh("gloo" if on_cpu else "nccl")
        with _JOINING:
            accelerator = Accelerator(cpu=on_cpu)
    except (ValueError, RuntimeError) as error:
        if not on_cpu:
            raise
        raise RunError(
            f"the launcher started {num_launched()} processes, and they cannot be joined: {error}; expected torchrun, "
            f"which sets RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR, and no Accelerator(cpu=False) made before"
        ) from None
    require_all(accelerator)
    return accelerator


def require_all(accelerator: Accelerator) -> None:
    """Refuse to train in fewer processes than were launched: each would train alone, on all of the data.

    Raises:
        RunError: there are fewer.
    """
    launched = num_launched()
    if launched > 1 and accelerator.num_processes != launched:
        raise RunError(
            f"the launcher started {launched} processes, and Accelerate joins {accelerator.num_processes}, so that "
            f"each would train alone on all of the data; expected all of them: start torchrun (or under SLURM "
            f"srun --ntasks-per-node N), and without a GPU leave accelerator= out or make "
            f"it by Accelerator(cpu=True)"
        )


def require_one(what: str) -> None:
    """Refuse to do in several processes what each would do alone, with the same files.

    Raises:
        RunError: a launcher started several.
    """
    if num_launched() > 1:
        raise RunError(
            f"{what} works in one process, and the launcher started {num_launched()}; expected it without accelerate "
            f"launch, torchrun or srun -n"
        )


def require_gradients(model: nn.Module) -> None:
    """Refuse a step that left parameters out, whose gradients DDP waits for, so that it has averaged none.

    Raises:
        RunError: a parameter has no gradient.
    """
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
        return
    idle = [name for name, each in model.module.named_parameters() if each.requires_grad and each.grad is None]
    if idle:
        raise RunError(
            f"no loss depends on {', '.join(idle[:3])}{f' and {len(idle) - 3} more' if len(idle) > 3 else ''}, and "
            f"DistributedDataParallel waits for their gradients; expected a loss that does, requires_grad_(False), or "
            f"fit(accelerator=Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]))"
        )


def _join_slurm() -> None:
    """Say in torchrun's words what `srun` started: a process for each task, in a job step of several."""
    if "WORLD_SIZE" in os.environ or int(os.environ.get(_SIZES[-1], "1")) == 1 or "SLURM_PROCID" not in os.environ:
        return
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
    os.environ |= {
        "WORLD_SIZE": os.environ[_SIZES[-1]],
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(20_000 + job % 20_000)),
    }


def _join_afresh(backend: str) -> None:
    """Join the processes of torchrun's restart under a name of its own.

    Its store still holds the addresses of those that died (torch 2.13), and whoever reads one waits for nobody.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or num_launched() == 1 or distributed.is_initialized():
        return
    if backend == "nccl" and not torch.cuda.is_available():
        return
    store, rank, world = next(iter(rendezvous("env://")))
    named = PrefixStore(f"restart {restart}", store)
    distributed.init_process_group(backend, store=named, rank=rank, world_size=world)


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts.

    Example:
        >>> first_host("gpu[003-017,21],login"), first_host("alpha,beta")
        ('gpu003', 'alpha')
    """
    prefix, bracket, inside = nodes.split(",")[0].partition("[")
    return prefix + inside.replace("-", "]").partition("]")[0] if bracket else prefix


def _warn_of_one_process() -> None:
    """Warn of `accelerate launch --cpu --num_processes 2`: it names an address for its processes, and starts one."""
    asked = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if asked and num_launched() == 1:
        warnings.warn(
            "accelerate launch was asked for several processes and started one, as it does on a CPU; this run has one "
            "process: for more use torchrun --nproc-per-node N",
            stacklevel=3,
        )
