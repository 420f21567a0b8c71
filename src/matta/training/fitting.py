"""The training loop: `fit`, on Hugging Face Accelerate.

A thin loop around `CoTraining`: what it adds to ten lines of your own is in `fit`'s arguments. The ramp of
the distillation loss counts optimizer steps, as everything here does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Literal

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from matta.errors import RunError, require_kind
from matta.nesting.batches import Batch
from matta.training.cotraining import CoTraining
from matta.training.evaluation import Evaluate
from matta.training.feeding import Feed
from matta.training.loop import Training
from matta.training.processes import is_main_process, make_accelerator, require_all
from matta.training.reporting import require_installed
from matta.training.run_folder import RunFolder
from matta.training.run_settings import FitResult, Observer, Settings
from matta.training.spikes import Rollback

if TYPE_CHECKING:
    from accelerate import Accelerator


def fit(
    cotrain: CoTraining,
    data: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    scheduler: LRScheduler | None = None,
    clip_norm: float | None = None,
    accumulate: int | None = None,
    precision: Literal["no", "bf16"] | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    best: tuple[str, Literal["min", "max"]] | None = None,
    patience: int | None = None,
    observers: Sequence[Observer] = (),
    run: str | os.PathLike[str] | None = None,
    resume: bool | Literal["prolong"] = False,
    checkpoint_every: int = 1000,
    log_every: int = 50,
    max_nonfinite: int | None = 10,
    rollback: Rollback | None = None,
    tensorboard: bool = True,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> FitResult:
    """Co-train a nesting on `data`.

    It trains where Accelerate says: on the accelerator of the machine if it has one, and under `accelerate
    launch` on several processes, each of which takes its own batches. All of them make the same call.

    With `run` the run survives: killed at any moment, the same call with `resume=True` continues from the
    newest checkpoint and ends with the same weights, bit for bit, as if it had never stopped (where the device
    computes the same again, and the data is the same; random numbers that a dataset draws in DataLoader workers
    are not replayed). That call may also be the first one, and may be made in another number of processes: with
    as many batches to a step of all together, each step sees the same samples. A thread writes the checkpoints, of
    a copy in memory; of a sharded pair (`matta.shard`) each process writes what it holds. On Ctrl-C, SIGTERM or
    SIGUSR1 the step is ended and a checkpoint written before KeyboardInterrupt or `Terminated` (an exit with code
    143 or 138) is raised, in all processes; in one process a second signal does not wait. The folder ends with the
    nesting in `nested` and the best one in `best`, for `matta.load`.

    Args:
        cotrain: The pair with its objective. It is in training mode meanwhile.
        data: A DataLoader, or any iterable of batches, also one without end. A `matta.streams.Stream` continues
            after the last event trained on, also when the run had ended and files have come since.
        optimizer: Holds `nested.parameters()`; what it lacks stays as it is, with a warning.
        steps: Optimizer steps in all; the data is passed over as often as they need. An iterator that ends
            earlier ends the run.
        epochs: Passes over the data, in place of `steps`; by default one.
        scheduler: Of the optimizer; stepped after every optimizer step, so its lengths are in steps, not in epochs.
        clip_norm: Largest norm of all gradients together.
        accumulate: Batches to an optimizer step; by default what `CoTraining` was given. Batches left over at
            the end of a pass count for the next one, and at the end of the last one for none.
        precision: "bf16" runs the forward under autocast; by default what Accelerate is configured for.
        evaluate: Gives named values for the nesting, in eval mode and without gradient: an `Evaluation`, or a
            function, called after every `evaluate_every` steps and at the end. Of several processes the main one
            calls it; an object with a method `together`, as `Evaluation` has, all of them call by that. Random
            numbers that it draws do not change the run.
        evaluate_every: Steps between evaluations; by default there is only the one at the end.
        best: A name that `evaluate` gives, and "min" or "max": which evaluation is the best.
        patience: So many evaluations in a row that are no better than the best one end the run early.
        observers: What looks on at each batch (on every process); their state is saved with the run's.
        run: A new folder for checkpoints and TensorBoard.
        resume: Go on with a run that is there. Arguments that change its weights must be those that it was begun
            with; `steps` or `epochs` may have grown. With "prolong" they may differ: the run continues from its
            weights and the optimizer's state, with the hyperparameters of `optimizer` as given and a new
            `scheduler`, made for the whole run, at the rate that it has after the steps made.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps over which the losses are averaged for trackers and the result.
        max_nonfinite: A step whose loss, or whose gradients' norm with `clip_norm` or `Shampoo`, is not finite moves no
            weight (BatchNorm statistics have seen its batch, though); this many of them in a row are an error.
            The check makes the host wait for each step's loss; None leaves it out, and then nothing in the loop
            waits for the device.
        rollback: Return to the newest checkpoint when the loss leaps, and leave out the batches since; needs `run`.
        tensorboard: Write the values for TensorBoard into the run folder.
        progress: Show a progress bar with the losses of the present batch.
        accelerator: One of your own, for settings of Accelerate's; not for FSDP or DeepSpeed. Its trackers (W&B,
            MLflow and others: `Accelerator(log_with=...)`, then `init_trackers`) get the losses and evaluations.

    Raises:
        RunError: settings that cannot work, or differ between processes, a run folder that exists or was begun with
            other arguments or data, data without batches, losses that stay non-finite, or a package of the `fit` extra
            that is missing.
        CheckpointError: the checkpoint to resume from is damaged, or is that of other models.
        MattaError: arguments of other kinds.

    Example:
        >>> import matta
        >>> nested = matta.nest(torch.nn.Linear(2, 1), torch.nn.Linear(2, 1))
        >>> cotrain = matta.CoTraining(nested, matta.objectives.Binary())
        >>> data = [(torch.eye(2), torch.tensor([0.0, 1.0]))]
        >>> optimizer = torch.optim.SGD(nested.parameters(), lr=0.1)
        >>> matta.fit(cotrain, data, optimizer, steps=5, progress=False).steps
        5
    """
    _require_kinds(cotrain, optimizer, scheduler, evaluate, observers)
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise RunError(
            "fit was called where gradients are off, in torch.no_grad() or in what evaluate= calls; expected it outside"
        )
    require_installed("accelerate")
    accelerator = make_accelerator() if accelerator is None else accelerator
    require_all(accelerator)
    settings = Settings(
        steps=steps,
        epochs=epochs,
        clip_norm=clip_norm,
        accumulate=_accumulate(cotrain, accumulate),
        precision=_precision(accelerator, precision),
        evaluate_every=evaluate_every,
        best=best,
        patience=patience,
        checkpoint_every=checkpoint_every,
        max_nonfinite=max_nonfinite,
        log_every=log_every,
        rollback=rollback,
        resume=resume,
    )
    _check_arguments(cotrain, optimizer, scheduler, evaluate, settings, run)
    folder = None if run is None else RunFolder(run, resume=bool(resume))
    accelerator.wait_for_everyone()  # all processes look at the folder before one of them makes it
    cotrain.to(accelerator.device)
    feed = Feed(data, accelerator, settings.num_passes)
    _warn_of_epochs(scheduler, feed.num_steps(settings.steps, settings.accumulate))
    training = Training(cotrain, optimizer, scheduler, feed, settings, evaluate, observers, folder, accelerator)
    return training.run(progress=progress, has_tensorboard=tensorboard)


def _require_kinds(cotrain: object, optimizer: object, scheduler: object, evaluate: object, observers: object) -> None:
    """Refuse arguments in another order, classes in place of objects, and what needs more than the loop gives it."""
    require_kind("cotrain", cotrain, CoTraining, "matta.CoTraining(nested, objective)")
    require_kind("optimizer", optimizer, torch.optim.Optimizer, "an optimizer of nested.parameters()")
    require_kind("scheduler", scheduler, (LRScheduler, NoneType), "a torch.optim.lr_scheduler.LRScheduler")
    require_kind("evaluate", evaluate, (Callable, NoneType), "a matta.Evaluation, or a function of the nesting")
    require_kind("observers", observers, Sequence, "a list of observers, such as [validation]")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise RunError("received LBFGS, which needs the loss again and again; expected an optimizer without a closure")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise RunError(
            "received ReduceLROnPlateau, which needs a metric in each step; expected a schedule over the steps, such "
            "as torch.optim.lr_scheduler.CosineAnnealingLR"
        )


def _warn_of_epochs(scheduler: LRScheduler | None, num_steps: int | None) -> None:
    """Warn of a schedule that was made for epochs: after its last step this one climbs up again."""
    if type(scheduler) is not CosineAnnealingLR or num_steps is None or not is_main_process():
        return
    if scheduler.T_max < num_steps:
        warnings.warn(
            f"the scheduler's T_max is {scheduler.T_max}, and the run has {num_steps} steps, after each of which it is "
            f"stepped, so that the learning rate rises again; expected T_max={num_steps}",
            stacklevel=3,
        )


def _accumulate(cotrain: CoTraining, accumulate: int | None) -> int:
    if accumulate is not None and accumulate != cotrain.accumulate and cotrain.accumulate != 1:
        raise RunError(
            f"received accumulate={accumulate} for a CoTraining(accumulate={cotrain.accumulate}); expected the same, "
            f"since the ramp counts optimizer steps: leave it out of one of them"
        )
    return cotrain.accumulate if accumulate is None else accumulate


def _precision(accelerator: Accelerator, precision: str | None) -> str:
    configured = str(accelerator.mixed_precision)
    kind = str(accelerator.distributed_type.value)
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise RunError(f"Accelerate is configured for {kind}; expected one process or DistributedDataParallel")
    if precision is None or configured in ("no", precision):
        return precision or configured
    raise RunError(
        f"received precision={precision!r}, and Accelerate is configured for {configured!r}; leave precision out, or "
        f"launch with --mixed_precision {precision}"
    )


def _check_arguments(
    cotrain: CoTraining,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    evaluate: Evaluate | None,
    settings: Settings,
    run: object,
) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in cotrain.parameters()):
        raise RunError(
            "the optimizer holds no parameter of the nesting; expected nested.parameters() in it, made after sharding"
        )
    left = [name for name, each in cotrain.named_parameters() if each.requires_grad and id(each) not in held]
    if left and is_main_process():
        others = f" and {len(left) - 3} more" if len(left) > 3 else ""
        warnings.warn(
            f"the optimizer does not hold {', '.join(left[:3])}{others}, which stay as they are; pass "
            f"nested.parameters(), or say so by requires_grad_(False)",
            stacklevel=3,
        )
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise RunError("the scheduler belongs to another optimizer; expected one made with the optimizer given")
    if evaluate is None and (settings.evaluate_every is not None or settings.best is not None):
        raise RunError("received evaluate_every or best without evaluate; expected evaluate= too, what to call")
    if settings.rollback is not None and run is None:
        raise RunError("received rollback without run; expected run=, the folder whose checkpoints it returns to")
    if settings.resume and run is None:
        raise RunError(f"received resume={settings.resume!r} without run; expected run=, the folder to resume")
