"""Objectives: how logits and labels become the three losses of MatTA (section 3.1, Eq. 1 to 3).

Read in this order:

- `losses`: the three cross-entropies of one batch, in nats.
- `labels`: hard and soft labels, a Teacher's likeliest classes (`TopK`), which are ignored, and what each weighs.
- `objective`: the interface `Objective`.
- `classification`: one of several classes: `Classification` and `CausalLM`.
- `elementwise`: what the next four share.
- `yes_or_no`: `Binary` and `MultiLabel`.
- `regression`: `SquaredError`, `Huber` and `Quantiles`.
- `ranked_lists`: `Listwise` and `Pairwise`. `transcription`: `CTC`.
- `custom` and `several_heads`: functions of your own, and several outputs.
- `heads` and `fused_losses`: large linear heads, computed with their losses over chunks of rows.

Example:
    >>> import matta, torch
    >>> layer = torch.nn.Linear(4, 3)
    >>> cotrain = matta.CoTraining(matta.nest(layer, torch.nn.Linear(4, 3)), matta.objectives.Classification())
    >>> cotrain((torch.zeros(2, 4), torch.tensor([0, 2]))).loss.requires_grad
    True
"""

from matta.objectives.classification import CausalLM, Classification
from matta.objectives.custom import Custom
from matta.objectives.labels import Labels, TopK, Weighted, top_k
from matta.objectives.objective import Joint, Losses, Objective
from matta.objectives.ranked_lists import Listwise, Pairwise
from matta.objectives.regression import Huber, Quantiles, SquaredError
from matta.objectives.several_heads import Heads
from matta.objectives.transcription import CTC
from matta.objectives.yes_or_no import Binary, MultiLabel

__all__ = [
    "CTC",
    "Binary",
    "CausalLM",
    "Classification",
    "Custom",
    "Heads",
    "Huber",
    "Joint",
    "Labels",
    "Listwise",
    "Losses",
    "MultiLabel",
    "Objective",
    "Pairwise",
    "Quantiles",
    "SquaredError",
    "TopK",
    "Weighted",
    "top_k",
]
