"""Exporting: a plain module as a file that other runtimes read, compared with the module after it was written.

Read in this order:

- `formats`: `export` and its formats. `deviation`: how far a file is from its module.
- `onnx_runtime`: an ONNX file as a module, to be compared, timed and evaluated like any other.
- `export_command`: `matta export`.
"""

from matta.exporting.formats import Exported, export
from matta.exporting.onnx_runtime import OnnxModule

__all__ = ["Exported", "OnnxModule", "export"]
