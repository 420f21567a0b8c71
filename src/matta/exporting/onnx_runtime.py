"""An ONNX file as a module: ONNX Runtime computes, and what measures or evaluates modules takes it."""

from __future__ import annotations

import os
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from matta.errors import ExportError
from matta.nesting.batches import LOGITS, tensors_of


@final
class OnnxModule(nn.Module):
    """What ONNX Runtime computes from an exported file, on a CPU: `OnnxModule(path)(inputs)` gives the logits.

    Inputs are taken as the exported module took them: by position, or by the names that they had. A file with several
    outputs gives a mapping of them.

    Args:
        path: A file that `matta.export` has written.
        threads: Of an operation; 0: ONNX Runtime's own choice.

    Raises:
        ExportError: ONNX Runtime is not installed, or does not take the file.

    Example:
        >>> import tempfile
        >>> import matta
        >>> ranker, x = nn.Linear(3, 1), torch.ones(5, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = matta.export(ranker, f"{folder}/ranker.onnx", format="onnx", example=(x, torch.ones(5)))
        ...     torch.testing.assert_close(OnnxModule(done.path)(x), ranker(x).detach())
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise ExportError("onnxruntime is not installed; pip install 'matta[export]'") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common type
            raise ExportError(
                f"ONNX Runtime does not take {path}: {_first_line(error)}; expected a file of matta.export, of a "
                f"module with inputs and weights in one type that its operators have: float32"
            ) from None
        self.names = tuple(each.name for each in self.session.get_inputs())
        self.output_names = tuple(each.name for each in self.session.get_outputs())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        """The logits, or several outputs by name.

        Raises:
            ExportError: the inputs are others than those of the file.
        """
        given = tensors_of(args)
        named = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        feed = named or dict(zip(self.names, given, strict=False))
        if feed.keys() != set(self.names) or len(given) not in (0, len(self.names)):
            is_over = len(given) > len(self.names)
            told = f"{len(given)} by position" if is_over else ", ".join(feed) or "none, or no tensors"
            raise ExportError(f"received the inputs {told}; expected those of the file: {', '.join(self.names)}")
        try:
            values = {name: np.ascontiguousarray(value.detach().cpu().numpy()) for name, value in feed.items()}
            found = [torch.from_numpy(each) for each in self.session.run(None, values)]
        except Exception as error:  # its errors have no common type
            expected = "; ".join(f"{each.name} {each.type} {each.shape}" for each in self.session.get_inputs())
            raise ExportError(f"ONNX Runtime fails with {_first_line(error)}; the file takes {expected}") from None
        return found[0] if self.output_names == (LOGITS,) else dict(zip(self.output_names, found, strict=True))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
