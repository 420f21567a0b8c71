"""Nest a PyTorch model in a larger teaching assistant, co-train both, extract a family of sizes.

The paper: Verma et al., "Matryoshka Model Learning for Improved Elastic Student Models", KDD 2025,
arXiv 2505.23337 (MatTA). Sections, equations and algorithms named in this package are the paper's.

Names are imported when first used, so that the command line answers without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC_MODULES = ("ab_testing", "errors", "objectives", "streams")
_PUBLIC_NAMES = {
    "nesting": (
        *("Layout", "Nested", "Ordering", "best_layers", "find_order", "grow", "nest", "order", "probe"),
        "trace_layouts",
    ),
    "training": (
        "CoTraining",
        "Evaluation",
        "ProgressiveValidation",
        "Ramp",
        "Rollback",
        "Snapshots",
        "Turns",
        "Weights",
        "fit",
        "read_snapshot",
        "shard",
    ),
    "sizes": (
        *("SubModel", "extract", "extract_saved", "layer_names", "live", "load", "narrow", "random_sub_model"),
        *("recalibrate", "save", "wide", "wide_narrow_wide"),
    ),
    "choosing": ("Family", "family"),
    "exporting": ("OnnxModule", "export"),
    "serving": ("ServeSettings",),
    "serving.serving_command": ("Serving", "serve"),
    "optim": ("Shampoo", "shampoo_groups"),
    "errors": ("MattaError",),
}
_DEFINED_IN = {name: package for package, names in _PUBLIC_NAMES.items() for name in names}

__all__ = sorted((*_PUBLIC_MODULES, *_DEFINED_IN))

if TYPE_CHECKING:
    from matta import ab_testing as ab_testing
    from matta import errors as errors
    from matta import objectives as objectives
    from matta import streams as streams
    from matta.choosing import Family as Family
    from matta.choosing import family as family
    from matta.errors import MattaError as MattaError
    from matta.exporting import OnnxModule as OnnxModule
    from matta.exporting import export as export
    from matta.nesting import Layout as Layout
    from matta.nesting import Nested as Nested
    from matta.nesting import Ordering as Ordering
    from matta.nesting import best_layers as best_layers
    from matta.nesting import find_order as find_order
    from matta.nesting import grow as grow
    from matta.nesting import nest as nest
    from matta.nesting import order as order
    from matta.nesting import probe as probe
    from matta.nesting import trace_layouts as trace_layouts
    from matta.optim import Shampoo as Shampoo
    from matta.optim import shampoo_groups as shampoo_groups
    from matta.serving import ServeSettings as ServeSettings
    from matta.serving.serving_command import Serving as Serving
    from matta.serving.serving_command import serve as serve
    from matta.sizes import SubModel as SubModel
    from matta.sizes import extract as extract
    from matta.sizes import extract_saved as extract_saved
    from matta.sizes import layer_names as layer_names
    from matta.sizes import live as live
    from matta.sizes import load as load
    from matta.sizes import narrow as narrow
    from matta.sizes import random_sub_model as random_sub_model
    from matta.sizes import recalibrate as recalibrate
    from matta.sizes import save as save
    from matta.sizes import wide as wide
    from matta.sizes import wide_narrow_wide as wide_narrow_wide
    from matta.training import CoTraining as CoTraining
    from matta.training import Evaluation as Evaluation
    from matta.training import ProgressiveValidation as ProgressiveValidation
    from matta.training import Ramp as Ramp
    from matta.training import Rollback as Rollback
    from matta.training import Snapshots as Snapshots
    from matta.training import Turns as Turns
    from matta.training import Weights as Weights
    from matta.training import fit as fit
    from matta.training import read_snapshot as read_snapshot
    from matta.training import shard as shard
else:

    def __getattr__(name):
        """Import a public name on first use (PEP 562)."""
        if name in _PUBLIC_MODULES:
            value = import_module(f"matta.{name}")
        elif name in _DEFINED_IN:
            value = getattr(import_module(f"matta.{_DEFINED_IN[name]}"), name)
        else:
            raise AttributeError(f"module 'matta' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
