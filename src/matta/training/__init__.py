"""Training: Student and Teaching Assistant together, in a loop that survives being killed.

Read in this order:

- `loss_schedule`: the weights of the losses, their ramp, and whose turn it is.
- `cotraining`: the forward of a step (section 3.1). `step_labels`: its labels, with weights, or from Teachers.
  `step_output`: what it gives. `known_step`: the step, without a wait for the device.
- `fitting`: `fit` and its arguments. `run_settings`: those that are plain values, and the result. `loop`: what
  happens in each step.
- `feeding` and `randomness`: the order of the data, and how a resumed run finds its place in it.
- `resuming`: what a resumed run must have in common with the first, and how a run is prolonged.
- `processes`: what a run on several processes shares. `launching`: several for one call. `sharding`: FSDP2, whole and
  by block.
- `run_folder`: checkpoints, of `plain_state` without pickle. `checkpoint_shares`: those of sharded runs, to which every
  process writes its share, and their `share_files`.
- `interrupts`: signals that let the step end. `spikes`: losses that leap, and the way back.
- `reporting`: progress bar, trackers, tables. `step_times`: where the time goes. `factors`: those of Shampoo.
- `evaluation`: losses on held-out batches. `metrics`: yours, and what they are given. `run_evaluation`: those of a run,
  and the best nesting. `progressive_validation`: metrics before each step of a stream.
- `snapshots`: extracted models, published while training continues.
"""

from matta.training.cotraining import CoTraining
from matta.training.evaluation import Evaluation
from matta.training.fitting import fit
from matta.training.loss_schedule import Ramp, Turns, Weights
from matta.training.progressive_validation import ProgressiveValidation
from matta.training.run_settings import FitResult, Observer
from matta.training.sharding import shard
from matta.training.snapshots import Snapshots, read_snapshot
from matta.training.spikes import Rollback
from matta.training.step_output import CoTrainingOutput

__all__ = [
    "CoTraining",
    "CoTrainingOutput",
    "Evaluation",
    "FitResult",
    "Observer",
    "ProgressiveValidation",
    "Ramp",
    "Rollback",
    "Snapshots",
    "Turns",
    "Weights",
    "fit",
    "read_snapshot",
    "shard",
]
