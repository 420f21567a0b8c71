"""Shampoo: the preconditioned optimizer of section 3.3, as a `torch.optim.Optimizer`.

Read in this order:

- `preconditioner`: the Kronecker factors of a stack of equal blocks, their roots, and the direction of a step.
- `first_order`: AdamW or Adagrad for embeddings, vectors and whatever is too large; also the graft.
- `grids`: parameters cut into blocks. `stacking`: blocks of one shape stacked.
- `exchange`: blocks of sharded parameters, each with its owner. `group_step`: a step of a group of parameters.
- `shampoo`: the optimizer, which puts these together.
"""

from matta.optim.shampoo import Shampoo, shampoo_groups

__all__ = ["Shampoo", "shampoo_groups"]
