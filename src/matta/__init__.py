"""Nest a PyTorch model in a larger teaching assistant, co-train both, extract a family of sizes.

The paper: Verma et al., "Matryoshka Model Learning for Improved Elastic Student Models", KDD 2025,
arXiv 2505.23337 (MatTA). Sections, equations and algorithms named in this package are the paper's.

Names are imported when first used, so that the command line answers without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Where each public name is defined; None: the name is a module of its own.
_DEFINED_IN: dict[str, str | None] = {
    "CoTraining": "cotraining",
    "Evaluation": "evaluation",
    "Layout": "layout",
    "MattaError": "errors",
    "Nested": "nesting",
    "ProgressiveValidation": "progressive",
    "Ramp": "schedule",
    "Shampoo": "shampoo",
    "Snapshots": "snapshots",
    "SubModel": "submodels",
    "Weights": "schedule",
    "errors": None,
    "extract": "extraction",
    "fit": "fitting",
    "grow": "growing",
    "layer_names": "submodels",
    "live": "submodels",
    "load": "checkpoints",
    "narrow": "submodels",
    "nest": "nesting",
    "objectives": None,
    "probe": "nesting",
    "random_sub_model": "submodels",
    "read_snapshot": "snapshots",
    "recalibrate": "extraction",
    "save": "checkpoints",
    "shampoo_groups": "shampoo",
    "streams": None,
    "trace_layouts": "tracing",
    "wide": "submodels",
    "wide_narrow_wide": "submodels",
}

__all__ = sorted(_DEFINED_IN)

if TYPE_CHECKING:
    from matta import errors as errors
    from matta import objectives as objectives
    from matta import streams as streams
    from matta.checkpoints import load as load
    from matta.checkpoints import save as save
    from matta.cotraining import CoTraining as CoTraining
    from matta.errors import MattaError as MattaError
    from matta.evaluation import Evaluation as Evaluation
    from matta.extraction import extract as extract
    from matta.extraction import recalibrate as recalibrate
    from matta.fitting import fit as fit
    from matta.growing import grow as grow
    from matta.layout import Layout as Layout
    from matta.nesting import Nested as Nested
    from matta.nesting import nest as nest
    from matta.nesting import probe as probe
    from matta.progressive import ProgressiveValidation as ProgressiveValidation
    from matta.schedule import Ramp as Ramp
    from matta.schedule import Weights as Weights
    from matta.shampoo import Shampoo as Shampoo
    from matta.shampoo import shampoo_groups as shampoo_groups
    from matta.snapshots import Snapshots as Snapshots
    from matta.snapshots import read_snapshot as read_snapshot
    from matta.submodels import SubModel as SubModel
    from matta.submodels import layer_names as layer_names
    from matta.submodels import live as live
    from matta.submodels import narrow as narrow
    from matta.submodels import random_sub_model as random_sub_model
    from matta.submodels import wide as wide
    from matta.submodels import wide_narrow_wide as wide_narrow_wide
    from matta.tracing import trace_layouts as trace_layouts
else:

    def __getattr__(name):
        """Import a public name on first use (PEP 562)."""
        if name not in _DEFINED_IN:
            raise AttributeError(f"module 'matta' has no attribute {name!r}")
        module = import_module(f"matta.{_DEFINED_IN[name] or name}")
        value = getattr(module, name) if _DEFINED_IN[name] else module
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
