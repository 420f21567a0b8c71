"""The loop of a run: what happens in each step, and what is saved of it."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from matta.nesting.batches import Batch
from matta.nesting.sharded_slices import is_sharded
from matta.objectives.losses import divisor
from matta.optim.clipping import clip_gradients
from matta.optim.shampoo import Shampoo
from matta.training.cotraining import CoTraining
from matta.training.evaluation import Evaluate
from matta.training.factors import save_factors
from matta.training.feeding import Feed, full_groups
from matta.training.interrupts import Interrupt, ended_by
from matta.training.processes import gathered_by_main, raise_together, require_gradients, require_same_call, while_all
from matta.training.reporting import Bar, Losses, logged, rates_of, tensorboard
from matta.training.resuming import (
    PROLONG,
    arguments_of,
    load_optimizer,
    names_of,
    require_same_arguments,
    require_same_order,
    require_same_shape,
)
from matta.training.run_evaluation import RunEvaluation
from matta.training.run_folder import RunFolder, resuming
from matta.training.run_settings import FitResult, Observer, Settings, not_finite
from matta.training.sharding import divided_state, no_sync
from matta.training.spikes import SpikeWatch
from matta.training.step_output import CoTrainingOutput
from matta.training.step_times import StepTimes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker
    from torch.optim.lr_scheduler import LRScheduler


@final
class Training:
    """A run: its state, and what happens in each step."""

    def __init__(
        self,
        cotrain: CoTraining,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        feed: Feed,
        settings: Settings,
        evaluate: Evaluate | None,
        observers: Sequence[Observer],
        folder: RunFolder | None,
        accelerator: Accelerator,
    ) -> None:
        self.cotrain, self.optimizer, self.scheduler, self.feed = cotrain, optimizer, scheduler, feed
        self.settings, self.observers = settings, observers
        self.folder, self.accelerator = folder, accelerator
        self.evaluation = RunEvaluation(cotrain, evaluate, settings.best, settings.patience, folder and folder.path)
        self.is_sharded = is_sharded(cotrain)
        self.arguments = arguments_of(
            cotrain, optimizer, scheduler, clip_norm=settings.clip_norm, precision=settings.precision
        )
        self.parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self.step, self.num_skipped, self.nonfinite_in_row = 0, 0, 0
        self.losses, self.times = Losses(), StepTimes()
        self.norm: Tensor | None = None
        self.rates = rates_of(optimizer)
        self.spikes = None if settings.rollback is None else SpikeWatch(settings.rollback)
        self.interrupt = Interrupt(enabled=folder is not None, is_alone=accelerator.num_processes == 1)
        self.stopped_by: int | None = None
        self.saved: tuple[int, ...] | None = None
        self.bar: Bar | None = None
        self.trackers: list[GeneralTracker] = []
        self.own_tracker: GeneralTracker | None = None

    def run(self, *, progress: bool, has_tensorboard: bool) -> FitResult:
        """Train to the end."""
        told = {**self.settings.plain(), **self.evaluation.plain(), "batches": self.feed.num_whole}
        require_same_call({**self.arguments, **told, "run": getattr(self.folder, "given", None)}, self.cotrain)
        self._resume()
        accumulate_before = self.cotrain.accumulate
        modes = [(part, part.training) for part in self.cotrain.modules()]
        try:
            self.cotrain.count_by(self.settings.accumulate, is_counted=self.step > 0)  # what was resumed is
            self._open(progress=progress, has_tensorboard=has_tensorboard)
            with self.interrupt, self.interrupt.left_to_this_process(self.feed.data):
                self.cotrain.train()
                self._train()
                self._finish()
        finally:
            self.cotrain.count_by(accumulate_before)
            for part, mode in modes:
                part.training = mode
            if self.bar is not None:
                self.bar.close()
            if self.own_tracker is not None:
                self.own_tracker.finish()
            if self.folder is not None:
                self.folder.close()
        return FitResult(
            steps=self.step,
            losses=self.losses.read(),
            evaluations=tuple(self.evaluation.found),
            best=self.evaluation.best,
            num_skipped=self.num_skipped,
        )

    def _train(self) -> None:
        if self._is_complete():
            return
        model = self._distributed()
        try:
            self.optimizer.zero_grad(set_to_none=True)
            for index, batches in enumerate(self._groups()):
                self.times.add("data")
                outputs = self._forward_backward(model, batches)
                if index == 0:
                    require_gradients(model)
                self._move(outputs, batches)
                self.times.add("optimizer")
                self._after_step(outputs[-1])
                if self._is_complete():
                    break
            self.settings.require_step(self.step)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            if model is not self.cotrain:
                self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
                self.cotrain.__dict__.pop("forward", None)  # under mixed precision Accelerate leaves one behind

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of each step; a signal that has ended what reads them too ends the run as after a step."""
        groups = full_groups(iter(self.feed), self.settings.accumulate)
        try:
            yield from groups if self.feed.ends_together else while_all(groups, self.feed.device)
        except Exception:
            if self.interrupt.came is None:
                raise
            if self.accelerator.num_processes == 1 and self.settings.accumulate == 1 and self.feed.batch:
                self.stopped_by = self.interrupt.came
                self._stop_if_asked()
            raise ended_by(self.interrupt.came, "stopped within a step; continue with resume=True") from None

    def _distributed(self) -> torch.nn.Module:
        is_plain = self.accelerator.num_processes == 1 or self.is_sharded
        return self.cotrain if is_plain else self.accelerator.prepare_model(self.cotrain)

    def _forward_backward(self, model: torch.nn.Module, batches: Sequence[Batch]) -> list[CoTrainingOutput]:
        """The gradient of the mean over all labels of the step, of every batch and process."""
        is_shared = len(batches) > 1 or self.accelerator.num_processes > 1
        of_step = {"num_labels": self.cotrain.num_labels(batches)} if is_shared else {}
        outputs: list[CoTrainingOutput] = []
        for batch in batches:
            is_last = len(outputs) + 1 == len(batches)
            with nullcontext() if is_last else no_sync(model, self.accelerator):
                with self.settings.autocast(self.feed.device):
                    out: CoTrainingOutput = model(batch, **of_step)
                self.times.add("forward")
                out.loss.backward()
            self.times.add("backward")
            outputs.append(out)
            for observer in self.observers:
                observer.before_step(self.cotrain, batch, out)
            self.times.add("observers")
        return outputs

    def _move(self, outputs: Sequence[CoTrainingOutput], batches: Sequence[Batch]) -> None:
        """The optimizer step, unless something is not finite."""
        if self.settings.clip_norm is not None:
            self.norm = clip_gradients(self.parameters, self.settings.clip_norm)
        self.step += 1
        self.rates = rates_of(self.optimizer)  # of this step: the scheduler moves on to the next one's
        loss = 0.0 if self.settings.max_nonfinite is None else self._seen_loss(outputs)
        if self.settings.max_nonfinite is not None and not math.isfinite(loss):
            self._skip(self.settings.max_nonfinite, batches)
        elif self.spikes is not None and self.spikes.is_spike(loss) and self._roll_back(self.spikes, loss):
            return
        else:
            skipped = getattr(self.optimizer, "num_skipped", 0)
            self.optimizer.step()
            if getattr(self.optimizer, "num_skipped", 0) > skipped:  # Shampoo has seen a gradient that is not finite
                self._skip(self.settings.max_nonfinite, batches)
            else:
                self.nonfinite_in_row = 0
                self.losses.add(outputs)
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()

    def _seen_loss(self, outputs: Sequence[CoTrainingOutput]) -> float:
        """The weighted mean of the step's losses, not finite where the norm is not; the same on every process.

        They tell each other of signals too.
        """
        total = torch.stack([out.loss.detach() for out in outputs]).sum() / divisor(outputs[-1].total_weight)
        if self.norm is not None:
            total = total + 0 * self.norm.to(total.device)
        if self.accelerator.num_processes == 1:
            return float(total.item())
        seen = torch.stack([total.float(), torch.full_like(total, self.interrupt.came or 0, dtype=torch.float32)])
        sums = self.accelerator.reduce(seen, "sum").tolist()
        self._note_signals(sums[1])
        return float(sums[0]) / self.accelerator.num_processes

    def _roll_back(self, spikes: SpikeWatch, loss: float) -> bool:
        """Take up the newest checkpoint but for its place in the data; False where there is none."""
        assert self.folder is not None
        self.folder.wait_together()
        state = self.folder.load(self.cotrain, self.optimizer)
        if state is None:
            return False
        spikes.count(loss, self.step, back_at=state["step"])
        self._take_up({**state, "best": self.evaluation.state_dict()["best"]}, prolong=False)  # the folder holds it
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _note_signals(self, total: float) -> None:
        """Stop after this step if a process had a signal: all with their own, or as if by SIGTERM."""
        if total:
            self.stopped_by = self.interrupt.came or int(signal.SIGTERM)

    def _skip(self, most: int | None, batches: Sequence[Batch]) -> None:
        self.num_skipped += 1
        self.nonfinite_in_row += 1
        aside = None
        if self.folder is not None:
            aside = self.folder.put_aside(f"step-{self.step:08d}-process-{self.accelerator.process_index}", batches)
        if most is not None and self.nonfinite_in_row >= most:
            place = f"epoch {self.feed.epoch}, batch {self.feed.batch - 1}"
            raise not_finite(most, self.step, place, aside)

    def _after_step(self, out: CoTrainingOutput) -> None:
        settings = self.settings
        for observer in self.observers:
            observer.after_step(self.cotrain)
        self.times.add("observers")
        if self.step % settings.log_every == 0:
            self._log(out.distill_weight)
        if self.bar is not None and self.bar.is_due():
            self.bar.show(self.step, self.losses.latest)
        if settings.evaluate_every is not None and self.step % settings.evaluate_every == 0:
            self._evaluate()
            self.times.add("evaluation")
        self._stop_if_asked()
        if self.folder is not None and self.step % settings.checkpoint_every == 0 and not self._is_complete():
            self._save()
            self.times.add("checkpoint")

    def _stop_if_asked(self) -> None:
        """End the run with a checkpoint where a signal has come to any process."""
        if self.folder is None:
            return
        if self.accelerator.num_processes == 1:
            self.stopped_by = self.interrupt.came
        elif self.settings.max_nonfinite is None and self.step % self.settings.log_every == 0:
            came = torch.tensor(float(self.interrupt.came or 0), device=self.feed.device)
            self._note_signals(self.accelerator.reduce(came, "sum").item())
        if self.stopped_by is None:
            return
        self._save()
        self.folder.wait_together()  # a launcher ends all processes with the first
        raise ended_by(self.stopped_by, f"stopped after step {self.step}; continue with resume=True")

    def _is_complete(self) -> bool:
        steps = self.settings.steps
        is_over = self.feed.epoch >= (self.feed.num_passes or 0) if steps is None else self.step >= steps
        return is_over or self.evaluation.is_out_of_patience()

    def _finish(self) -> None:
        if self.evaluation.is_due(self.step):
            self._save()  # all steps are made: a run that ends in the evaluation has only that to do again
            self._evaluate()
            self.saved = None
        if self.bar is not None:
            self.bar.show(self.step, self.losses.latest)
        self.losses.read()
        self._save()
        if self.folder is not None:
            self.folder.wait_together()
            if self.accelerator.is_main_process:
                self.folder.save_nested(self.step, self.cotrain.nested)
                if isinstance(self.optimizer, Shampoo) and not self.is_sharded:
                    save_factors(self.optimizer, self.cotrain.nested, self.folder.path)
            self.folder.wait_together()
        self.accelerator.wait_for_everyone()

    def _evaluate(self) -> None:
        values = self.evaluation.judge(self.step)
        self._track({f"evaluation/{name}": value for name, value in values.items()})

    def _log(self, distill_weight: Tensor) -> None:
        losses = self.losses.read()
        if not self.trackers:  # reading the weight would wait for the device
            return
        shown = logged(losses, self.rates, self.norm, distill_weight, self.num_skipped)
        self._track({**shown, **self.times.read()})

    def _track(self, values: Mapping[str, float]) -> None:
        for tracker in self.trackers if values else ():
            tracker.log(dict(values), step=self.step)

    def _open(self, *, progress: bool, has_tensorboard: bool) -> None:
        """Begin to write and to show, on the main process; all end where it cannot."""
        failed: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                self._open_here(progress=progress, has_tensorboard=has_tensorboard)
            except Exception as error:
                failed = error
        raise_together(failed)

    def _open_here(self, *, progress: bool, has_tensorboard: bool) -> None:
        self.trackers += self.accelerator.trackers
        if self.folder is not None:
            self.folder.begin()
            if has_tensorboard:
                self.own_tracker = tensorboard(self.folder.path, self.step)
                self.trackers.append(self.own_tracker)
        if progress:
            self.bar = Bar(self.feed.num_steps(self.settings.steps, self.settings.accumulate), self.step)

    def _save(self) -> None:
        """Write a checkpoint, unless there is one of this step and place in the data."""
        place = self.step, self.feed.epoch, self.feed.batch
        if self.folder is None or self.saved == place:
            return
        own = self.feed.state()
        if self.is_sharded:
            self.folder.save_shares(self.step, self.cotrain, self.optimizer, self._state(), own)
        else:
            self.folder.wait_together()  # on a slow disk the main process waits for its last one
            feeds = gathered_by_main(own)
            if self.accelerator.is_main_process:
                whole = {**self._state(), "feeds": feeds, "optimizer": self.optimizer.state_dict()}
                self.folder.save(self.step, self.cotrain, whole)
        self.saved = place

    def _state(self) -> dict[str, Any]:
        """What is common to all processes, but for the optimizer's state."""
        return {
            "step": self.step,
            **self._shape(),
            "arguments": self.arguments,
            "parameters": names_of(self.cotrain, self.optimizer),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "num_skipped": self.num_skipped,
            "nonfinite_in_row": self.nonfinite_in_row,
            "losses": self.losses.means,
            "losses_unread": self.losses.unread(),
            **self.evaluation.state_dict(),
            "observers": [each.state_dict() for each in self.observers],
            "spikes": None if self.spikes is None else self.spikes.state_dict(),
        }

    def _shape(self) -> dict[str, int]:
        accumulate, num_processes, unit = self.settings.accumulate, self.accelerator.num_processes, self.feed.unit
        sizes = {"accumulate": accumulate, "num_processes": num_processes, "batch": unit}
        return {**sizes, "step_size": accumulate * num_processes * unit}

    def _resume(self) -> None:
        if self.folder is None:
            return
        prolong = self.settings.resume == PROLONG
        with resuming(self.folder.path):
            state = self.folder.load(self.cotrain, self.optimizer, converts=prolong)
            if state is None:
                return
            require_same_shape(state, {**self._shape(), "number of observers": len(self.observers)})
            if not prolong:
                require_same_arguments(state, self.arguments, self.scheduler)
            require_same_order(state, names_of(self.cotrain, self.optimizer))
            self.feed.resume(state["feeds"])
            self._take_up(state, prolong=prolong)
            self.saved = self.step, self.feed.epoch, self.feed.batch

    def _take_up(self, state: dict[str, Any], *, prolong: bool) -> None:
        """Continue as a checkpoint says, whose weights are loaded; not its place in the data."""
        state["optimizer"] = divided_state(self.optimizer, state["optimizer"])
        load_optimizer(self.optimizer, self.scheduler, state, prolong=prolong, steps=self.settings.steps)
        self.cotrain.step.mul_(self.settings.accumulate).div_(state["accumulate"], rounding_mode="floor")  # forwards
        self.step = state["step"]
        self.num_skipped, self.nonfinite_in_row = state["num_skipped"], state["nonfinite_in_row"]
        self.losses.load(state["losses"], state.get("losses_unread", []), self.feed.device)
        self.evaluation.load_state_dict(state)
        for observer, seen in zip(self.observers, state["observers"], strict=True):
            observer.load_state_dict(seen)
        if self.spikes is not None and state["spikes"] is not None:
            self.spikes.load_state_dict(state["spikes"])
