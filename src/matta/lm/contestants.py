"""The models that `matta evaluate` is asked for: Transformers folders, models of runs, names on the hub.

Code that comes with a model is run where it is matta's own, letter for letter, and else only if the user says so.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch
import transformers

from matta.errors import RunError
from matta.extraction import extract
from matta.lm.family import Member, members
from matta.lm.folders import CODE, export, shipped_code
from matta.lm.runs import MODELS, RESULTS, LanguageRun, folder_name, is_run, load_run

_HUB_NAME: Final = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@final
@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model to be judged."""

    name: str  # in the table
    given: str  # on the command line
    source: str | None = None  # what Transformers loads: an absolute path, or a name on the hub; None: `write` it
    trust: bool = False  # whether the code that comes with it may be run
    run: str | None = None  # the run that it is a model of
    write: Callable[[Path], Path] | None = None

    @contextmanager
    def at_hand(self) -> Iterator[str]:
        """What Transformers loads; a model of a run is written into a folder that is removed afterwards."""
        if self.source is not None:
            yield self.source
            return
        assert self.write is not None, "a model without a source is written"
        with tempfile.TemporaryDirectory(prefix="matta-") as scratch:
            yield str(self.write(Path(scratch).resolve() / "model"))


def contestants(given: Sequence[str], *, trust: bool = False) -> list[Contestant]:
    """The models, in the order given, those of a run from the smallest to the TA; each under a name of its own.

    Args:
        given: Runs of matta train, Transformers folders, or names on the hub.
        trust: Whether code that comes with foreign models may be run.

    Raises:
        RunError: one is none of these, or needs code of its own that may not be run.
    """
    found = [each for name in dict.fromkeys(given) for each in _of(name, trust)]
    counts = Counter(each.name for each in found)
    return [each if counts[each.name] == 1 else replace(each, name=_longer(each)) for each in found]


def _longer(contestant: Contestant) -> str:
    return contestant.given if contestant.run is None else f"{contestant.run} {contestant.name}"


def _of(given: str, trust: bool) -> list[Contestant]:
    path = Path(given).expanduser()
    if path.is_dir() and is_run(path):
        return _of_run(given, path.resolve(), trust)
    if path.is_dir():
        return [_of_folder(given, path.resolve(), trust)]
    if path.exists() or not _HUB_NAME.fullmatch(given):
        raise RunError(f"{given} is no folder; expected a Transformers folder, a run of matta train or a hub name")
    return [Contestant(name=given, given=given, source=given, trust=trust)]


def _of_run(given: str, path: Path, trust: bool) -> list[Contestant]:
    """The models in the folder of a run; those that are not there are written when their turn comes."""
    folders = [file.parent for file in sorted((path / MODELS).glob("*/config.json"))]
    there = {folder.name: folder for folder in folders if not folder.name.startswith(".")}  # those are half-written
    names = _names_of_run(path)
    if names and all(folder_name(name) in there for name in names):
        run, missing = None, {}
    else:
        run = load_run(path)
        missing = {member.name: member for member in members(run.nested, run.recipe.family.k)}
        names = list(missing)
    found = []
    for name in [*names, *sorted(there.keys() - {folder_name(name) for name in names})]:
        folder = there.get(folder_name(name))
        if folder is not None:
            found.append(replace(_of_folder(str(folder), folder, trust), name=name, run=given))
        else:
            assert run is not None, "it was loaded for what is missing"
            found.append(Contestant(name=name, given=given, run=given, write=_writer(run, missing[name]), trust=True))
    return found


def _names_of_run(path: Path) -> list[str]:
    """The models that the run says it has; none if it was stopped before."""
    if not (path / RESULTS).is_file():
        return []
    try:
        return [each["name"] for each in json.loads((path / RESULTS).read_text(encoding="utf-8"))["models"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path / RESULTS} is damaged: {error!r}; remove it to judge the models all the same") from None


def _writer(run: LanguageRun, member: Member) -> Callable[[Path], Path]:
    return lambda path: export(extract(run.nested, member.spec).eval(), path, tokenizer=run.tokenizer)


def _of_folder(given: str, path: Path, trust: bool) -> Contestant:
    file = path / "config.json"
    if not file.is_file():
        raise RunError(
            f"{given} holds no model: there is no config.json; expected a Transformers folder, such as matta extract "
            f"writes, or a run of matta train"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from None
    has_code = any(True for _ in path.rglob("*.py"))
    if has_code and not trust and not is_own_code(path, config):
        raise RunError(
            f"{given} comes with code of its own that is not matta's, which is not run unasked; look at its .py files, "
            f"then say --trust"
        )
    return Contestant(name=path.name, given=given, source=str(path), trust=trust or has_code)


def is_own_code(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether all code that would be run with the model in a folder is what this matta writes for its architecture."""
    kind: Any = getattr(transformers, str((config.get("architectures") or [""])[0]).removeprefix("Matta"), None)
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not is_model:
        return False
    names = config.get("auto_map", {}).values()  # "other/repository--module.Class" would be code from elsewhere
    if not all(re.fullmatch(rf"{CODE.removesuffix('.py')}\.\w+", str(name)) for name in names):
        return False
    tokenizer = path / "tokenizer_config.json"
    if tokenizer.is_file() and "auto_map" in json.loads(tokenizer.read_text(encoding="utf-8")):
        return False
    with torch.device("meta"):
        expected = shipped_code(kind(kind.config_class()))
    return {file: file.read_text(encoding="utf-8") for file in path.rglob("*.py")} == {path / CODE: expected}
