"""Saved nestings: what is saved is loaded, what is damaged or foreign is refused, nothing is half-written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import matta
from matta.errors import CheckpointError
from matta.sizes import saving, storage

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Blocks, a fused projection, BatchNorm, a tied and a scalar parameter, buffers of both kinds."""

    mask: Tensor

    def __init__(self, width: int = 4, depth: int = 2, hidden: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(3, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, 2 * width), nn.GLU(), nn.Linear(width, hidden)) for _ in range(depth)
        )
        self.logit = nn.Linear(hidden, 2)
        self.again = self.logit
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("mask", torch.ones(hidden), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)) * self.mask
        for block in self.blocks:
            x = x + block(x)
        return self.logit(x) * self.scale + self.again(x)


def _nested(seed: int = 0, **sizes: int) -> matta.Nested:
    torch.manual_seed(seed)
    nested = matta.nest(
        Net(),
        Net(**{"width": 6, "depth": 3, **sizes}),
        layers={"blocks": "ends"},
        layouts={"blocks.*.0.*": 2},
        private=["stem.*"],
    )
    nested.train().student(X)
    nested.ta(X)
    return nested


def _outputs(nested: matta.Nested) -> list[Tensor]:
    nested.eval()
    mixed = matta.live(nested, matta.wide_narrow_wide(nested, 2)).eval()
    return [nested.student(X), nested.ta(X), mixed(X)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a nesting."""
    return matta.save(_nested(), tmp_path / "nesting")


@pytest.mark.parametrize("fresh", [True, False])
def test_what_is_saved_is_loaded(saved: Path, fresh: bool) -> None:
    torch.manual_seed(1)
    loaded = matta.load(saved, Net(), Net(6, 3)) if fresh else matta.load(saved, _nested(1))
    assert loaded.plans == _nested().plans
    for found, expected in zip(_outputs(loaded), _outputs(_nested()), strict=True):
        assert torch.equal(found, expected)


def test_loading_into_a_nesting_changes_that_one(saved: Path) -> None:
    other = _nested(1)
    assert matta.load(saved, other) is other


def test_what_is_loaded_can_be_trained_and_saved_again(saved: Path, tmp_path: Path) -> None:
    loaded = matta.load(saved, Net(), Net(6, 3)).train()
    matta.CoTraining(loaded, matta.objectives.Classification())((X, torch.ones(5).long())).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    again = matta.save(matta.load(saved, Net(), Net(6, 3)), tmp_path / "again")
    for name in (saving.WEIGHTS, saving.DESCRIPTION):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_a_folder_holds_each_weight_once_and_nothing_pickled(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == ["CRC32SUMS", "nested.json", "nested.safetensors"]
    names = load_file(saved / saving.WEIGHTS).keys()
    assert not any(name.startswith("students.0.blocks") for name in names)
    assert {"students.0.stem.weight", "students.0.norm.running_mean", "ta.norm.running_mean"} <= names
    assert not any(name.endswith("mask") for name in names)


def test_several_students_are_saved_together(tmp_path: Path) -> None:
    def tower(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

    nested = matta.nest([tower(2), tower(4)], tower(6), private=["2.bias"])
    loaded = matta.load(matta.save(nested, tmp_path / "x"), tower(2), tower(4), tower(6))
    for found, expected in zip([*loaded.students, loaded.ta], [*nested.students, nested.ta], strict=True):
        assert torch.equal(found(X), expected(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_weights_of_any_type_and_layout(dtype: torch.dtype, tmp_path: Path) -> None:
    class Raw(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, 3).to(dtype).t())
            self.count = nn.Parameter(torch.arange(width), requires_grad=False)

    nested = matta.nest(Raw(4), Raw(6), layouts={"*": 1})
    loaded = matta.load(matta.save(nested, tmp_path / "x"), Raw(4), Raw(6))
    assert torch.equal(loaded.student.weight, nested.student.weight)
    assert torch.equal(loaded.student.count, nested.student.count)


class Counted(nn.Linear):
    """Keeps something in its state that is no tensor."""

    def __init__(self, width: int, seen: object) -> None:
        super().__init__(3, width)
        self.seen = seen

    def get_extra_state(self) -> object:
        return self.seen

    def set_extra_state(self, state: object) -> None:
        self.seen = state


def test_what_modules_keep_beside_tensors_is_saved_too(tmp_path: Path) -> None:
    nested = matta.nest(Counted(4, {"batches": [3, 4]}), Counted(6, "many"), layouts={"*": 1})
    path = matta.save(nested, tmp_path / "x")
    loaded = matta.load(path, Counted(4, None), Counted(6, None))
    assert (loaded.student.seen, loaded.ta.seen) == ({"batches": [3, 4]}, "many")
    file = path / saving.DESCRIPTION
    file.write_text(file.read_text().replace("many", "none"))
    with pytest.raises(CheckpointError, match=r"nested.json is damaged: its checksum"):
        matta.load(path, Counted(4, None), Counted(6, None))


def test_buffers_that_share_memory_are_saved_each_for_itself(tmp_path: Path) -> None:
    class Tabled(nn.Linear):
        def __init__(self, width: int) -> None:
            super().__init__(3, width)
            table = torch.randn(10)
            self.register_buffer("head", table[:5])
            self.register_buffer("middle", table[3:7])

    nested = matta.nest(Tabled(4), Tabled(6), layouts={"*": 1})
    loaded = matta.load(matta.save(nested, tmp_path / "x"), Tabled(4), Tabled(6))
    for name, buffer in nested.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer)


@pytest.mark.parametrize("seen", [{1: 2}, (1, 2), {"x": torch.zeros(2)}, {3, 4}])
def test_what_json_does_not_bring_back_is_not_saved(seen: object, tmp_path: Path) -> None:
    nested = matta.nest(Counted(4, 1), Counted(6, seen), layouts={"*": 1})
    with pytest.raises(CheckpointError, match=r"ta._extra_state is .*expected get_extra_state to give"):
        matta.save(nested, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------ replacing, failing in the middle


def test_an_earlier_nesting_is_replaced_as_a_whole(saved: Path) -> None:
    (saved / "left-over").touch()
    matta.save(_nested(1), saved)
    assert not (saved / "left-over").exists()
    assert torch.equal(_outputs(matta.load(saved, Net(), Net(6, 3)))[0], _outputs(_nested(1))[0])
    assert [each.name for each in saved.parent.iterdir()] == ["nesting"]


@pytest.mark.parametrize("step", ["save_file", "_plan_to_json", "checksum_of", "_move"])
@pytest.mark.parametrize("earlier", [True, False])
def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, earlier: bool) -> None:
    target = tmp_path / "nesting"
    before = {}
    if earlier:
        matta.save(_nested(), target)
        before = {file.name: file.read_bytes() for file in target.iterdir()}

    def fail(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(saving if hasattr(saving, step) else storage, step, fail)
    with pytest.raises(OSError, match="no space left"):
        matta.save(_nested(1), target)
    assert [each.name for each in tmp_path.iterdir()] == (["nesting"] if earlier else [])
    assert {file.name: file.read_bytes() for file in target.glob("*")} == before


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(CheckpointError, match="exists and holds no saved nesting; expected a new path"):
        matta.save(_nested(), tmp_path)
    with pytest.raises(CheckpointError, match="exists and holds no saved nesting"):
        matta.save(_nested(), tmp_path / "thesis.txt")
    with pytest.raises(CheckpointError, match="thesis.txt is a file, so that .* cannot be made"):
        matta.save(_nested(), tmp_path / "thesis.txt" / "nesting")
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_a_folder_above_that_of_a_nesting_names_it(tmp_path: Path) -> None:
    matta.save(_nested(), tmp_path / "run" / "nested")
    with pytest.raises(CheckpointError, match=r"expected the folder of one, such as .*run.nested$"):
        matta.load(tmp_path / "run", Net(), Net(6, 3))


def test_an_empty_folder_and_missing_parents_will_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", str(tmp_path / "a" / "b")):
        assert torch.equal(_outputs(matta.load(matta.save(_nested(), path), _nested(1)))[0], _outputs(_nested())[0])


# ------------------------------------------------------------------------ damage


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / saving.DESCRIPTION
        description = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in description.items() if value is not None}))
        storage.add_checksums(folder)

    return edit


def as_version_1(folder: Path, **changes: Any) -> None:
    """A folder as the first version wrote it."""
    (folder / storage.SUMS).unlink()
    file = folder / saving.DESCRIPTION
    description = json.loads(file.read_text())
    digest = saving._digest(folder / saving.WEIGHTS, description)
    file.write_text(json.dumps({**description, "version": 1, "digest": digest, **changes}))


def _flip(name: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return flip


def _with_earlier_sums(folder: Path) -> None:
    """Checksums as they were before, as `sha256sum` writes them."""
    (folder / storage.SUMS).unlink()
    files = (saving.DESCRIPTION, saving.WEIGHTS)
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def test_checksums_of_an_earlier_version_are_compared(saved: Path) -> None:
    _with_earlier_sums(saved)
    matta.load(saved, Net(), Net(6, 3))
    _flip("nested.safetensors")(saved)
    with pytest.raises(CheckpointError, match=r"safetensors is damaged: its checksum is not the one in SHA256SUMS"):
        matta.load(saved, Net(), Net(6, 3))
    _flip("nested.safetensors")(saved)
    storage.add_checksums(saved, saving.WEIGHTS)
    matta.load(saved, Net(), Net(6, 3))
    assert not (saved / "SHA256SUMS").exists()
    _flip("nested.json")(saved)
    with pytest.raises(CheckpointError, match=r"json is damaged: its checksum is not the one in CRC32SUMS"):
        matta.load(saved, Net(), Net(6, 3))


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9]) and None


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _json_list(folder: Path) -> None:
    (folder / saving.DESCRIPTION).write_text("[]")
    storage.add_checksums(folder)


PLACED = {"placements": [["a", "b", [[[[4], [3]]]]]], "private": [], "layers": []}
DAMAGE = {
    "weights-flipped": (_flip("nested.safetensors"), r"nested.safetensors is damaged: its checksum .*another copy"),
    "weights-truncated": (_truncate("nested.safetensors"), r"is damaged: its checksum"),
    "weights-empty": (_write("nested.safetensors", b""), r"is damaged: its checksum"),
    "weights-gone": (lambda folder: (folder / "nested.safetensors").unlink(), r"cannot be read: .*No such file"),
    "json-truncated": (_truncate("nested.json"), r"nested.json is damaged: .*another copy"),
    "json-binary": (_write("nested.json", b"\xff\xfe\x00"), r"nested.json is damaged"),
    "json-flipped": (_flip("nested.json"), r"nested.json is damaged: its checksum"),
    "json-gone": (lambda folder: (folder / "nested.json").unlink(), r"nested.json cannot be read: No such file"),
    "sums-flipped": (_flip("CRC32SUMS"), r"is damaged|cannot be read"),
    "sums-binary": (_write("CRC32SUMS", b"\xff"), r"CRC32SUMS is damaged"),
    "sums-gone": (lambda folder: (folder / "CRC32SUMS").unlink(), r"the digest .* is not the one saved"),
    "json-list": (_json_list, r"not written by matta.save; expected format 'matta.nested'"),
    "all-gone": (lambda folder: shutil.rmtree(folder), r"holds no saved nesting: No such file"),
    "foreign": (_edit(format="other"), r"not written by matta.save"),
    "newer": (_edit(version=3), r"saved in version 3; this matta reads versions 1 and 2"),
    "old-digest": (lambda folder: as_version_1(folder, digest="0"), r"the digest .* is not the one saved"),
    "old-plan": (lambda folder: as_version_1(folder, students=[]), r"the digest .* is not the one saved"),
    "no-students": (_edit(students=None), r"nested.json is damaged: KeyError\('students'\)"),
    "students-number": (_edit(students=3), r"nested.json is damaged: TypeError"),
    "students-string": (_edit(students=["x"]), r"nested.json is damaged: TypeError"),
    "plan-unfitting": (_edit(students=[PLACED]), r"nested.json is damaged: LayoutError.*at most as large"),
    "plan-no-numbers": (_edit(students=[{**PLACED, "placements": [["a", "b", [[[["x"], [3]]]]]]}]), r"is damaged"),
}


def test_a_folder_of_the_first_version_is_loaded(saved: Path) -> None:
    as_version_1(saved)
    for found, expected in zip(_outputs(matta.load(saved, Net(), Net(6, 3))), _outputs(_nested()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_damaged_or_foreign_folder_is_refused_and_changes_nothing(saved: Path, kind: str, fresh: bool) -> None:
    damage, message = DAMAGE[kind]
    damage(saved)
    nested = _nested(1)
    modules: list[nn.Module] = [Net(), Net(6, 3)] if fresh else [nested]
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    with pytest.raises(CheckpointError, match=message):
        matta.load(saved, *modules)
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("edit", ["other segments", "one left out", "other block"])
def test_an_edited_plan_is_refused_even_where_it_would_fit(saved: Path, edit: str) -> None:
    file = saved / saving.DESCRIPTION
    description = json.loads(file.read_text())
    plan = description["students"][0]
    fused = next(each for each in plan["placements"] if each[0] == "blocks.0.0.weight")
    if edit == "other segments":
        assert fused[2][0] == [[[2, 4], [2, 6]]]
        fused[2][0] = [[[8], [12]]]
    elif edit == "one left out":
        plan["placements"].remove(fused)
    else:
        fused[1] = "blocks.1.0.weight"
    file.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"nested.json is damaged: its checksum"):
        matta.load(saved, Net(), Net(6, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [Net(), Net(7, 3)], r"does not fit the modules: .*planned as .* of .*, and is .* of"),
        (lambda: [Net(5), Net(6, 3)], r"does not fit the modules: .*planned as"),
        (lambda: [Net(4, 3), Net(6, 3)], r"does not fit the modules: .*in only one of them"),
        (lambda: [Net(), Net(6, 2)], r"does not fit the modules: .*blocks.2.* does not exist"),
        (lambda: [Net(6, 3), Net()], r"does not fit the modules"),
        (lambda: [Net(), Net(6, 4)], r"does not fit: ta.blocks.3.* is only in the modules; build"),
        (lambda: [nn.Linear(3, 2), Net(6, 3)], r"does not fit the modules"),
        (lambda: [_nested().student, Net(6, 3)], r"does not fit the modules: the Student cannot be nested: it is live"),
        (lambda: [Net(), Net], r"does not fit the modules: the TA is type; expected a torch.nn.Module"),
        (lambda: [Net()], r"received 1 modules for a nesting of 1 Student\(s\); expected load\(path, nested\)"),
        (lambda: [Net(), Net(), Net()], r"received 3 modules"),
        (list, r"received 0 modules"),
        (lambda: [_nested(width=7)], r"another nesting than the one given: blocks.0.0.weight was saved in .*nested in"),
        (lambda: [matta.nest(nn.Linear(3, 2), nn.Linear(3, 2))], r"another nesting than the one given"),
        (lambda: [matta.nest([Net(), Net()], Net())], r"1 Student\(s\) against 2"),
    ],
)
def test_modules_that_the_nesting_does_not_fit_are_refused(saved: Path, make: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        matta.load(saved, *make())


def test_a_private_parameter_of_another_size_is_refused(tmp_path: Path) -> None:
    def pair(classes: int) -> list[nn.Module]:
        return [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, each)) for each in (classes, 2)]

    path = matta.save(matta.nest(*pair(5), private=["1.*"]), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"students.0.1.*saved with shape \(5.*and is \(7"):
        matta.load(path, *pair(7))
