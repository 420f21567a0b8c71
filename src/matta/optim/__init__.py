"""Shampoo: the preconditioned optimizer of section 3.3, as a `torch.optim.Optimizer`.

Read in this order:

- `preconditioner`: the Kronecker factors of a stack of equal blocks, their roots, and the direction of a step.
- `first_order`: AdamW or Adagrad for embeddings, vectors and whatever is too large; also the graft.
- `grids`: parameters cut into blocks. `stacking`: blocks of one shape stacked.
- `parameter_groups`: which parameters are preconditioned.
- `divided_parameters`: what a process holds of sharded ones. `exchange`: strips of their blocks, each with its owner.
- `group_step`: a step of a group of parameters.
- `shampoo`: the optimizer, which puts these together. `clipping`: the norm of all gradients, sparse ones too.
"""

from matta.optim.parameter_groups import shampoo_groups
from matta.optim.shampoo import Shampoo

__all__ = ["Shampoo", "shampoo_groups"]
