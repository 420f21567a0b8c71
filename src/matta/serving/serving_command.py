"""`matta.serve` and `matta serve`: a server for a nesting, or for what a name stands for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from matta.choosing.family import FILE, Family
from matta.errors import MattaError, ServeError, first_line
from matta.nesting.batches import Batch
from matta.serving.serve_settings import ServeCommandSettings, ServeSettings


@final
@dataclass(frozen=True, kw_only=True)
class Serving:
    """What `matta serve module:name` serves: a nesting with its weights, or a plain module, and an example.

    Args:
        nested: The pair, after training; a plain module is served as the one size "model".
        example: A batch as in training; its inputs tell names, dtypes and shapes.
        family: The table of sizes: those on its fronts of latency and of parameters are served, the Student among
            them. None: Student, TA, and some between.
        open_axes: Axes of the inputs that may have any length; the first, that of the batch, always may.
        logits: Where the logits are in what the modules return, as in `CoTraining`. A mapping of tensors (several
            heads) is answered with an output for each.

    Example:
        >>> import matta, torch
        >>> serving = Serving(nested=matta.nest(nn.Linear(3, 1), nn.Linear(3, 1)), example=(torch.ones(2, 3), None))
    """

    nested: nn.Module
    example: Batch
    family: Family | None = None
    open_axes: tuple[int, ...] = (0,)
    logits: str | Callable[[Any], Any] | None = None


def serve(serving: Serving, settings: ServeSettings | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, by the Open Inference Protocol (V2 over HTTP), as KServe and Triton speak it.

    Addresses: `/v2/models/{name}/infer`, `/v2/models/{name}`, `/v2/health/ready` and `live`, `/metrics` (Prometheus),
    `/v2/models/{name}/outcomes`. A request names its size in `parameters` (`{"size": "Student"}`); the answer tells in
    its own which size gave it. After the signal the server is not ready, works off its requests, and returns.

    Raises:
        ServeError: it cannot be served as asked, the port is taken, or a package of the extra `serve` is missing.

    Example:
        >>> matta.serve(serving, matta.ServeSettings(port=8000))  # doctest: +SKIP
    """
    settings = ServeSettings() if settings is None else settings
    try:
        from matta.serving.application import Application
        from matta.serving.http_server import run_server
        from matta.serving.served_models import ServedModels
    except ModuleNotFoundError as error:
        raise ServeError(f"{error}; serving needs: pip install 'matta[serve]'") from None
    models = ServedModels(
        serving.nested,
        example=serving.example,
        family=serving.family,
        open_axes=serving.open_axes,
        logits=serving.logits,
        max_rows=settings.max_batch,
        threads=settings.threads,
        device=settings.device,
        runtime=settings.runtime,
    )
    run_server(Application(models, settings))


def run(settings: ServeCommandSettings) -> None:
    """Serve what the command line names.

    Raises:
        ServeError: the source is neither a run nor the name of something to serve.
    """
    serving = named_serving(settings.source, last=settings.last)
    if settings.family is not None:
        serving = replace(serving, family=Family.load(settings.family))
    serve(serving, settings)


def named_serving(source: str, *, last: bool = False) -> Serving:
    """What a run of `matta train` or "module:name" gives to serve; of a run perhaps the last position's logits alone.

    Raises:
        ServeError: there is no such run, module or name, or it gives something else.
    """
    if Path(source).is_dir():
        return replace(_of_run(Path(source)), logits=_last_logits if last else None)
    if last:
        raise ServeError(
            f"received --last for {source!r}, no run of matta train; expected a run, or Serving(logits=...)"
        )
    module, _, name = source.partition(":")
    if not module or not name:
        raise ServeError(
            f"received {source!r}; expected a folder of a run of matta train, or module:name, such as "
            f"my_ranker:serving for a matta.Serving in my_ranker.py"
        )
    sys.path.insert(0, "")  # as `python -m` does: modules of the present folder
    try:
        found = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0] and error.name != module:
            raise
        raise ServeError(f"there is no module {module!r} here or installed; expected module:name") from None
    except AttributeError:
        raise ServeError(f"{module} has no {name!r}; expected a matta.Serving, or a function that gives one") from None
    except Exception as error:  # of the user's module: any kind
        raise _failed(source, error) from error
    finally:
        sys.path.remove("")
    try:
        made = found() if callable(found) else found
    except MattaError:
        raise
    except Exception as error:  # of the user's function: any kind
        raise _failed(source, error) from error
    if not isinstance(made, Serving):
        raise ServeError(f"{source} is of type {type(made).__name__}; expected a matta.Serving, or a function for one")
    return made


def _failed(source: str, error: Exception) -> ServeError:
    told = f"{type(error).__name__}: {first_line(error)}"
    return ServeError(f"{source} fails with {told}; expected module:name of a matta.Serving, or of a function for one")


def _last_logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits[:, -1]


def _of_run(folder: Path) -> Serving:
    try:
        from matta.lm.trained_runs import load_run
    except ModuleNotFoundError as error:
        raise ServeError(f"{error}; a run of matta train needs: pip install 'matta[lm]'") from None
    trained = load_run(folder)
    ids = torch.zeros(2, trained.recipe.data.context, dtype=torch.int64)
    family = Family.load(folder) if (folder / FILE).is_file() else None
    example = {"input_ids": ids, "labels": ids}
    return Serving(nested=trained.nested, example=example, family=family, open_axes=(0, 1))
