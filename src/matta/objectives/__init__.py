"""Objectives: how logits and labels become the three losses of MatTA (section 3.1, Eq. 1 to 3).

Read in this order:

- `losses`: the three cross-entropies of one batch, in nats.
- `labels`: hard and soft labels, a Teacher's likeliest classes (`TopK`), and which positions are ignored.
- `objective`: the interface `Objective`, and `Binary`, `Classification` and `CausalLM`.
- `heads` and `fused_losses`: large linear heads, computed with their losses over chunks of rows.

Example:
    >>> import matta, torch
    >>> layer = torch.nn.Linear(4, 3)
    >>> cotrain = matta.CoTraining(matta.nest(layer, torch.nn.Linear(4, 3)), matta.objectives.Classification())
    >>> cotrain((torch.zeros(2, 4), torch.tensor([0, 2]))).loss.requires_grad
    True
"""

from matta.objectives.labels import Labels, TopK, top_k
from matta.objectives.objective import (
    Binary,
    CausalLM,
    Classification,
    Joint,
    Losses,
    Objective,
)

__all__ = ["Binary", "CausalLM", "Classification", "Joint", "Labels", "Losses", "Objective", "TopK", "top_k"]
