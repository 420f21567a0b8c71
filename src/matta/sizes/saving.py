"""Save a nesting and load it again: a folder with weights (safetensors) and a description (JSON).

Nothing is pickled. A folder is written under another name and then moved into place, so that a
reader never sees half of one, and has checksums of its files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import get_rank

from matta.errors import DAMAGE, CheckpointError, NestingError, require_kind
from matta.nesting.acceptance import require_nestable
from matta.nesting.declarations import LayerMap
from matta.nesting.layout import Axis, Segment
from matta.nesting.nested import Nested, nested_from_plans, require_nested
from matta.nesting.plan import Placement, Plan
from matta.nesting.sharded_slices import gathered, is_sharded, placed
from matta.sizes.storage import enter_checksum, has_checksums, verify, whole_folder
from matta.sizes.weight_files import WeightSource, write_weights

WEIGHTS: Final = "nested.safetensors"
DESCRIPTION: Final = "nested.json"
FORMAT: Final = "matta.nested"
VERSION: Final = 2
"""Version 1 has a digest in the description in place of checksums beside it."""


def save(nested: Nested, path: str | os.PathLike[str]) -> Path:
    """Write the TA, the Students' own parameters, all buffers and the plans into the folder `path`.

    An earlier nesting at `path` is replaced as a whole. Of a sharded nesting all processes must call this; the main
    one writes.

    Raises:
        CheckpointError: `path` is something else than a saved nesting, or a module keeps an extra state
            (`get_extra_state`) that JSON cannot hold.

    Example:
        >>> import matta, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(matta.nest(nn.Linear(3, 1), nn.Linear(3, 1)), f"{folder}/ranker")
        ...     sorted(file.name for file in path.iterdir())
        ['CRC32SUMS', 'nested.json', 'nested.safetensors']
    """
    require_nested(nested)
    require_kind("path", path, (str, os.PathLike), "the folder to write; the nesting comes before it")
    target = Path(path)
    if file := next((each for each in target.parents if each.is_file()), None):
        raise CheckpointError(f"{file} is a file, so that {target} cannot be made; expected a path in a folder")
    if target.exists() and not (target / DESCRIPTION).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and holds no saved nesting; expected a new path or an earlier nesting")
    tensors, extra = split_state(nested)
    _require_json(extra)
    if is_sharded(nested) and get_rank() != 0:
        return target
    with whole_folder(target) as made:
        save_file(apart(tensors), made / WEIGHTS)
        _write_description(made, nested, {"extra_state": extra} if extra else {})
    return target


def save_from(weights: WeightSource, prefix: str, nested: Nested, target: Path) -> None:
    """As `save`, with weights that are saved already under names with a prefix, piece by piece.

    One process does this, also of a sharded nesting.
    """
    names, extra = held_state(nested)
    _require_json(extra)
    with whole_folder(target) as made:
        tensors = {name: (weights.like(prefix + name), weights.pieces(prefix + name)) for name in names}
        enter_checksum(made / WEIGHTS, write_weights(made / WEIGHTS, tensors))
        _write_description(made, nested, {"extra_state": extra} if extra else {})


def save_plans(nested: Nested, target: Path) -> None:
    """Write the plans alone, without weights, for `nest_saved` and `saved_plans`."""
    with whole_folder(target) as made:
        _write_description(made, nested, {})


def _write_description(folder: Path, nested: Nested, more: Mapping[str, Any]) -> None:
    students = [_plan_to_json(plan) for plan in nested.plans]
    description = {"format": FORMAT, "version": VERSION, "students": students, **more}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def load(path: str | os.PathLike[str], *modules: nn.Module) -> Nested:
    """Load a saved nesting: `load(path, nested)`, or `load(path, student, ta)` with fresh modules.

    With a `Nested` its weights are overwritten; it must be nested as the saved one. With fresh
    modules, the Student (or all Students) and then the TA, the saved plan nests them: no layouts or
    layers need to be declared again. The TA given becomes `nested.ta` and takes the saved weights.

    Raises:
        CheckpointError: the folder is missing, damaged or something else, or does not fit the
            modules; they are then as they were.

    Example:
        >>> import matta, tempfile
        >>> nested = matta.nest(nn.Linear(3, 1), nn.Linear(5, 1), layouts={"weight": 1})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loaded = load(matta.save(nested, f"{folder}/ranker"), nn.Linear(3, 1), nn.Linear(5, 1))
        >>> bool((loaded.student.weight == nested.student.weight).all())
        True
    """
    require_kind("path", path, (str, os.PathLike), "the folder that matta.save wrote; the modules follow it")
    folder = Path(path)
    verify(folder)
    description = _read_description(folder)
    tensors = _read_weights(folder, description)
    nested = _nest(folder, _read_plans(folder, description), modules)
    require_fit(folder, tensors, held_state(nested)[0])
    state = placed(tensors, nested) if is_sharded(nested) else tensors
    nested.load_state_dict({**state, **description.get("extra_state", {})}, strict=False)
    return nested


def saved_plans(path: str | os.PathLike[str]) -> tuple[Plan, ...]:
    """The plans of a saved nesting, of each Student, without its weights.

    Raises:
        CheckpointError: the folder is missing, damaged or something else.
    """
    folder = Path(path)
    return _read_plans(folder, _read_description(folder))


def nest_saved(path: str | os.PathLike[str], *modules: nn.Module) -> Nested:
    """The modules, as `load` takes them, nested as the saved ones; their weights stay as they are.

    Raises:
        CheckpointError: the folder is missing, damaged or something else, or does not fit the modules.
    """
    return _nest(Path(path), saved_plans(path), modules)


def _nest(folder: Path, plans: tuple[Plan, ...], modules: tuple[nn.Module, ...]) -> Nested:
    if len(modules) == 1 and isinstance(modules[0], Nested):
        if modules[0].plans != plans:
            difference = _first_difference(modules[0], plans)
            raise CheckpointError(f"{folder} holds another nesting than the one given: {difference}")
        return modules[0]
    if len(modules) != len(plans) + 1:
        raise CheckpointError(
            f"received {len(modules)} modules for a nesting of {len(plans)} Student(s); expected load(path, nested) or "
            f"load(path, student, ..., ta)"
        )
    try:
        for index, module in enumerate(modules):
            require_nestable(module, "Student" if index < len(plans) else "TA")
        return nested_from_plans(modules[:-1], modules[-1], plans)
    except NestingError as error:
        raise CheckpointError(
            f"{folder} does not fit the modules: {error}; build them as they were saved, of the same class and sizes"
        ) from None


def split_state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state by name: tensors (of tied names the first), and what else modules keep in their state.

    Of a sharded module the main process has it whole; all must call this.
    """
    tensors, others = held_state(module)
    return {name: gathered(tensor) for name, tensor in tensors.items()}, others


def held_state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `split_state`, with the module's own memory: of a sharded one, the shards of this process."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            others[name] = value
        elif id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value.detach()
    return tensors, others


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, none of which shares memory with another, as safetensors wants them."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def _require_json(extra_state: Mapping[str, Any]) -> None:
    """Refuse what modules keep in their state beside tensors if JSON cannot hold it."""
    for name, value in extra_state.items():
        try:
            is_plain = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            is_plain = False
        if not is_plain:
            raise CheckpointError(
                f"{name} is {type(value).__name__}, and does not come back from JSON as it was; expected "
                f"get_extra_state to give a tensor, or numbers, text, lists and mappings from text"
            )


def _digest(weights: Path, description: Mapping[str, Any]) -> str:
    """What version 1 keeps as the digest of weights and plan."""
    plans = hashlib.blake2b(json.dumps(description["students"]).encode())
    if "extra_state" in description:
        plans.update(json.dumps(description["extra_state"]).encode())
    with weights.open("rb") as file:
        return hashlib.file_digest(file, lambda: plans).hexdigest()


def _read_description(folder: Path) -> dict[str, Any]:
    verify(folder, DESCRIPTION)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except OSError as error:
        below = sorted(file.parent for file in folder.glob(f"*/{DESCRIPTION}"))
        hint = f"; expected the folder of one, such as {below[-1]}" if below else ""
        raise CheckpointError(f"{folder} holds no saved nesting: {error.strerror} ({DESCRIPTION}){hint}") from None
    except DAMAGE as error:
        raise CheckpointError(f"{folder / DESCRIPTION} is damaged: {error}; take another copy of the folder") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{folder / DESCRIPTION} was not written by matta.save; expected format {FORMAT!r}")
    if description.get("version") not in (1, VERSION):
        raise CheckpointError(
            f"{folder} was saved in version {description.get('version')!r}; this matta reads versions 1 and {VERSION}"
        )
    return description


def _read_plans(folder: Path, description: Mapping[str, Any]) -> tuple[Plan, ...]:
    try:
        return tuple(_plan_from_json(plan) for plan in description["students"])
    except DAMAGE as error:
        raise CheckpointError(
            f"{folder / DESCRIPTION} is damaged: {error!r}; take another copy of the folder"
        ) from None


def _read_weights(folder: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        if not has_checksums(folder) and _digest(path, description) != description.get("digest"):
            raise CheckpointError(
                f"{folder} is damaged: the digest of weights and plan is not the one saved; take another copy of it"
            )
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; take another copy of the folder") from None


def require_fit(folder: Path, saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    """Refuse saved tensors that are not those of the modules.

    Raises:
        CheckpointError: names or shapes differ.
    """
    for name in sorted(saved.keys() | present.keys()):
        if name not in saved or name not in present:
            where = "what was saved" if name in saved else "the modules"
            raise CheckpointError(f"{folder} does not fit: {name} is only in {where}; build the modules as they were")
        was, now = (tuple(each[name].shape) for each in (saved, present))
        if was != now:
            raise CheckpointError(
                f"{folder} does not fit: {name} was saved with shape {was} and is {now} in the modules; build them "
                f"with the sizes they were saved with"
            )


def _first_difference(nested: Nested, plans: tuple[Plan, ...]) -> str:
    if len(plans) != len(nested.plans):
        return f"{len(plans)} Student(s) against {len(nested.plans)}"
    for saved, present in zip(plans, nested.plans, strict=True):
        for name in [*saved.placements, *present.placements]:
            pair = saved.placements.get(name), present.placements.get(name)
            if pair[0] != pair[1]:
                return f"{name} was saved in {pair[0]} and is nested in {pair[1]}"
    return "private parameters or module lists differ"


def _plan_to_json(plan: Plan) -> dict[str, Any]:
    return {
        "placements": [
            [each.student, each.ta, [[[s.student, s.ta] for s in axis.segments] for axis in each.axes]]
            for each in plan.placements.values()
        ],
        "private": list(plan.private),
        "layers": [[each.student, each.ta, each.indices, each.num_ta] for each in plan.layers],
        "products": sorted(plan.products),
        "spanning": sorted(plan.spanning),
        "met": sorted(sorted(each) for each in plan.met),
    }


def _plan_from_json(saved: Mapping[str, Any]) -> Plan:
    placements = {}
    for student, ta, axes in saved["placements"]:
        found = tuple(Axis(tuple(Segment(tuple(s), tuple(t)) for s, t in axis)) for axis in axes)
        placements[student] = Placement(_name(student), _name(ta), found)
    layers = tuple(
        LayerMap(_name(student), _name(ta), tuple(indices), num) for student, ta, indices, num in saved["layers"]
    )
    products, spanning = (frozenset(map(_name, saved.get(key, ()))) for key in ("products", "spanning"))
    met = tuple(frozenset((_name(name), int(axis)) for name, axis in each) for each in saved.get("met", ()))
    return Plan(placements, tuple(map(_name, saved["private"])), layers, products, spanning, met)


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value
