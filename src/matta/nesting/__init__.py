"""Nesting: find where every Student parameter lives in the Teaching Assistant.

A nesting is a map. For each Student parameter it names one TA parameter and the indices of each axis; width,
depth and d_model M-nesting (section 3.2, Algorithm 2) are the same map with other sizes and names. No layer type
needs to be known, and no module is edited.

Read in this order:

- `layout`, `declarations`, `plan`: an axis and its segments, what the user declares, and the finished map.
- `copying`, `closures`: copies of modules, and of functions that hold them. `slicing`: live modules, whose weights are
  slices of another module's parameters. `sparse_tables`: those of embeddings with sparse gradients. `sharded_slices`:
  under FSDP2. `slice_gradients`: where gradients go, and when.
- `placing`, with `ambiguity` and `known_modules`: the map from names and sizes; what sizes leave open is refused.
- `channels`, `operators` with `operator_kinds`, `moved_channels`, `products` and `convolutions`, `dimensions`,
  `tracing`: channels followed through a run of a model. `higher_order`: operators that take functions, as `torch.cond`.
- `matching`: one traced model over another, which gives the layout of fused axes and of heads.
- `probing`, with `silencing`, `lockstep` and `draws`: both models run, and compared, with all but the Student's
  slices silenced.
- `nested`, with `acceptance`: `nest` puts these together. `live_check`: the live Student beside a plain one.
- `ordering`, with `channel_groups`, `importance` and `principal_axes`: a trained TA's channels in the order in which
  they matter; `block_ranking`: which of its blocks to keep; `ta_start`: a Student that starts as its slice.
- `warm_start`: the TA starts from a trained Student. `growing`, with `widening`: the TA is built from the Student.
- `batches`: how a batch is split and passed to a module.
"""

from matta.nesting.batches import Batch
from matta.nesting.block_ranking import best_layers
from matta.nesting.growing import grow
from matta.nesting.layout import Layout
from matta.nesting.matching import trace_layouts
from matta.nesting.nested import Nested, nest, probe
from matta.nesting.ordering import Ordering, find_order, order

__all__ = [
    "Batch",
    "Layout",
    "Nested",
    "Ordering",
    "best_layers",
    "find_order",
    "grow",
    "nest",
    "order",
    "probe",
    "trace_layouts",
]
