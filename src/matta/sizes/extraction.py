"""Take sub-models out as plain modules of the user's own classes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from matta.errors import RunError
from matta.nesting.batches import Batch, call, eval_mode, split_labels
from matta.nesting.declarations import translate
from matta.nesting.nested import Nested, require_nested
from matta.nesting.slicing import materialize, show
from matta.sizes.submodels import SubModel, live, same_size, student_spec, wide


def extract(nested: Nested, spec: SubModel | None = None) -> nn.Module:
    """The sub-model as a plain module with weights of its own; by default the (first) Student.

    It equals the live sub-model bit for bit, consists of the user's classes, and holds nothing of
    matta's. The TA itself is `nested.ta`. Between Student and TA the running statistics of norms (BatchNorm) are those
    of the one or the other: measure them with `matta.recalibrate`.

    Raises:
        SubModelError: `spec` does not fit the nesting.

    Example:
        >>> import matta
        >>> nested = matta.nest(nn.Linear(3, 1), nn.Linear(3, 1))
        >>> extract(nested)
        Linear(in_features=3, out_features=1, bias=True)
    """
    require_nested(nested)
    return materialize(nested.student if spec is None else live(nested, spec))


def share(nested: Nested, specs: Mapping[str, SubModel | None]) -> dict[str, nn.Module]:
    """Plain modules of several sizes over one copy of the TA's weights, in eval mode, for inference alone.

    Matrices are views of the TA's. What no view can show (fused projections whose pieces grow, kernels of
    convolutions, weights of recurrent layers) is copied, once for all sizes that have it in common. None is the
    (first) Student. Training the nesting afterwards changes the views and not the copies: share again then.

    Raises:
        SubModelError: a `spec` does not fit the nesting.

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8))
        >>> sizes = share(nested, {"Student": None, "TA": matta.wide(nested)})
        >>> sizes["Student"][0].weight.data_ptr() == sizes["TA"][0].weight.data_ptr()
        True
    """
    shown: dict[object, nn.Parameter] = {}
    sources = {name: nested.student if spec is None else live(nested, spec) for name, spec in specs.items()}
    return {name: show(module, shown).eval() for name, module in sources.items()}


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Batch]) -> int:
    """Measure the running statistics of norms (BatchNorm and others) afresh; the number of batches that were used.

    Student and TA have statistics of their own, but those of a mixed sub-model have never been
    seen in training. They become the averages over the batches, each weighed by its size. The module keeps its
    mode, and a norm that no batch reaches keeps its statistics; if anything fails, all of them do.

    Raises:
        RunError: no batch, a batch with one value to a channel, or statistics that are not finite.

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8))
        >>> mixed = matta.extract(nested, matta.SubModel({"0": "wide"}))
        >>> recalibrate(mixed, [(torch.randn(16, 3), torch.ones(16))] * 5)
        5
    """
    norms = [_Averaging(path, part) for path, part in _measuring_norms(module)]
    count = 0
    with eval_mode(module), ExitStack() as kept:
        for norm in norms:
            kept.enter_context(norm)
        for batch in batches if norms else ():
            call(module, split_labels(batch)[0])
            count += 1
        if norms and not count:
            raise RunError(
                "received no batches to measure statistics on; expected at least one (an iterator that has been read "
                "to its end gives none)"
            )
        for norm in norms:
            norm.check()
    return count


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The present means and variances of the norms that keep some."""
    both = [each for _, part in _measuring_norms(module) for each in (part.running_mean, part.running_var)]
    return [each for each in both if each is not None]


def unmeasured_norms(nested: Nested, spec: SubModel | None) -> list[str]:
    """Norms of a size between Student and TA whose running statistics are of other inputs, by the TA's name.

    Norms in which Student and TA have the same statistics see the same inputs in every size.

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8), private=["1.*"])
        >>> unmeasured_norms(nested, matta.wide(nested))
        []
    """
    norms = dict(_measuring_norms(nested.ta))
    if not norms or spec is None or same_size(nested, spec, student_spec(nested), wide(nested)):
        return []
    for path, part in _measuring_norms(nested.student):
        name = translate(path, nested.plan.layers)
        if name in norms and _is_one(part.running_mean, norms[name].running_mean):
            del norms[name]
    return list(norms)


def warn_of_statistics(nested: Nested, specs: Mapping[str, SubModel | None], remedy: str) -> None:
    """Tell of sizes whose norms have the running statistics of Student or TA, which are not theirs."""
    for name, spec in specs.items():
        if norms := unmeasured_norms(nested, spec):
            warnings.warn(
                f"the running statistics of {', '.join(norms[:4])} are those of Student and TA, and were never "
                f"measured for {name!r}: {remedy}",
                stacklevel=3,
            )


def _is_one(mean: Tensor | None, other: Tensor | None) -> bool:
    return mean is not None and other is not None and mean.shape == other.shape and torch.equal(mean, other)


def _measuring_norms(module: nn.Module) -> list[tuple[str, _NormBase]]:
    parts = ((path, part) for path, part in module.named_modules() if isinstance(part, _NormBase))
    return [(path, part) for path, part in parts if part.track_running_stats]


@final
class _Averaging:
    """A norm whose running statistics are averages over the batches meanwhile; the old ones return on an error."""

    def __init__(self, path: str, part: _NormBase) -> None:
        self.path, self.part, self.num_rows = path or type(part).__name__, part, 0
        self.old = {name: buffer.clone() for name, buffer in part._buffers.items() if buffer is not None}
        self.momentum = part.momentum

    def __enter__(self) -> None:
        self.hook = self.part.register_forward_pre_hook(self._weigh)
        self.part.train()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.hook.remove()
        self.part.momentum = self.momentum
        if kind is not None:
            for name, value in self.old.items():
                self.part._buffers[name].copy_(value)  # type: ignore[union-attr]

    def _weigh(self, part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].numel() // self.part.num_features
        if rows <= 1:
            raise RunError(
                f"received a batch that gives {self.path} {rows} value per channel, {tuple(inputs[0].shape)}; expected "
                f"larger batches: statistics need two values (drop_last=True leaves out a short last batch)"
            )
        if not self.num_rows:
            self.part.reset_running_stats()
        self.num_rows += rows
        self.part.momentum = rows / self.num_rows

    def check(self) -> None:
        found = [each for each in (self.part.running_mean, self.part.running_var) if each is not None]
        if self.num_rows and not all(bool(each.isfinite().all()) for each in found):
            raise RunError(
                f"the batches give {self.path} statistics that are not finite; expected finite inputs: look for NaN "
                f"and infinity in the data and in the weights"
            )
