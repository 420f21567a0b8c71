"""Imported before the packages of the `lm` extra by each module that needs them: an error names the extra.

Not the package `matta.lm` itself says so, since `matta --help` and `matta runs` need no more than settings in it.
"""

from importlib.util import find_spec
from typing import Final

from matta.errors import RunError

EXTRA: Final = "lm"

for _package in ("transformers", "accelerate"):
    if find_spec(_package) is None:
        raise RunError(f"matta.lm needs {_package}, which is not installed; pip install 'matta[{EXTRA}]'")
