"""Sizes: every model between Student and Teaching Assistant, as live or plain modules, and on disk.

Read in this order:

- `units`: the layers that can be wide or narrow, each for itself.
- `submodels`: a choice for each layer (`SubModel`), such as wide-narrow-wide (section 4.2.3), and its live module.
- `assembly`: how a live sub-model is put together from the blocks of Student and TA.
- `extraction`: plain modules of the user's own classes, equal to the live ones bit for bit.
- `weight_files`: safetensors files in pieces. `streamed_extraction`: sub-models from the file of a nesting.
- `storage`: files that are whole or not there, with checksums. `saving`: nestings on disk, as safetensors and JSON.
"""

from matta.sizes.extraction import extract, recalibrate
from matta.sizes.saving import load, save
from matta.sizes.streamed_extraction import extract_saved
from matta.sizes.submodels import SubModel, layer_names, live, narrow, random_sub_model, wide, wide_narrow_wide

__all__ = [
    "SubModel",
    "extract",
    "extract_saved",
    "layer_names",
    "live",
    "load",
    "narrow",
    "random_sub_model",
    "recalibrate",
    "save",
    "wide",
    "wide_narrow_wide",
]
