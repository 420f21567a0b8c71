"""Sub-models written from files: the bytes that a model in memory would give, read by the slice."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

import matta
from matta.errors import CheckpointError, SubModelError
from matta.nesting.layout import Axis, Segment
from matta.sizes import weight_files
from matta.sizes.saving import WEIGHTS
from matta.sizes.streamed_extraction import SavedWeights
from matta.sizes.weight_files import WeightFile, write_weights
from test_checkpoints import Net, X
from test_checkpoints import _nested as net_nested


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# ------------------------------------------------------------------------ files


def _of_each_type() -> dict[str, Tensor]:
    made = {str(dtype): torch.ones(3, 2).to(dtype) for dtype in weight_files._NAMES}
    return {**made, "b": torch.rand(()), "a": torch.rand(0, 4), "größe": torch.rand(2, 3, 4)}


def _whole(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, list[Tensor]]]:
    return {name: (each, [each]) for name, each in tensors.items()}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_is_written_as_safetensors_writes_it(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = _of_each_type()
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    write_weights(tmp_path / "ours", _whole(tensors), metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    file = WeightFile(tmp_path / "ours")
    assert file.metadata == (metadata or {})
    for name, tensor in tensors.items():
        assert file.read(name).dtype == tensor.dtype
        assert torch.equal(file.read(name).view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


AXES = [Axis.plain(5, 7), Axis.plain(7, 7), Axis((Segment((2,), (3,)), Segment((2, 1), (2, 2)))), Axis.plain(0, 7)]


@pytest.mark.parametrize("piece", [1, 40, 1 << 20])
@pytest.mark.parametrize("rows", AXES)
@pytest.mark.parametrize("columns", AXES)
def test_pieces_are_the_slice(
    rows: Axis, columns: Axis, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "PIECE", piece)
    tensor = torch.rand(7, 7, 2)
    save_file({"x": torch.rand(3), "w": tensor}, tmp_path / "file")
    pieces = list(WeightFile(tmp_path / "file").pieces("w", (rows, columns, Axis.plain(2, 2))))
    expected = columns.take(rows.take(tensor, 0), 1)
    assert torch.equal(torch.cat(pieces) if pieces else expected[:0], expected)
    assert bool(pieces) == bool(len(expected))


# ------------------------------------------------------------------------ nestings


@pytest.mark.parametrize("spec", [None, 0, 1, 3, matta.SubModel({"blocks.1": "skip", "blocks.0": "wide"})])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_is_written_is_what_is_extracted(spec: matta.SubModel | int | None, device: str, tmp_path: Path) -> None:
    nested = net_nested()
    saved = matta.save(nested, tmp_path / "saved")
    with torch.device(device):
        modules = Net(), Net(width=6, depth=3)
    path = matta.extract_saved(saved, tmp_path / "folder" / "model.safetensors", *modules, spec=spec)
    chosen = matta.wide_narrow_wide(nested, spec) if isinstance(spec, int) else spec
    extracted = matta.extract(nested, chosen)
    loaded = copy.deepcopy(extracted)
    for tensor in loaded.state_dict().values():
        tensor.zero_()
    assert load_model(loaded, path) == (set(), [])
    for name, tensor in _state(extracted).items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded.eval()(X), extracted.eval()(X))
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_numbers_become_those_of_the_modules(tmp_path: Path) -> None:
    nested = matta.nest(nn.Linear(3, 1), nn.Linear(4, 1), layouts={"weight": 1}).bfloat16()
    saved = matta.save(nested, tmp_path / "saved")
    path = matta.extract_saved(saved, tmp_path / "w", nn.Linear(3, 1), nn.Linear(4, 1))
    assert torch.equal(load_file(path)["weight"], nested.student.weight.float())


def test_only_the_slices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nested = matta.nest(nn.Linear(64, 8), nn.Linear(64, 4096), layouts={"weight": 1})
    saved = matta.save(nested, tmp_path / "saved")
    with (saved / WEIGHTS).open("r+b") as file:  # what is behind the slices may even be gone
        end = file.seek(0, 2)
        file.seek(end - 4000 * 256)
        file.write(b"\xff" * 4000 * 256)
    path = matta.extract_saved(saved, tmp_path / "w", nn.Linear(64, 8), nn.Linear(64, 4096))
    assert torch.equal(load_file(path)["weight"], nested.student.weight)


def test_cancelled_half_way_it_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = matta.save(net_nested(), tmp_path / "saved")

    def cancelled(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(WeightFile, "pieces", cancelled)
    with pytest.raises(KeyboardInterrupt):
        matta.extract_saved(saved, tmp_path / "w", Net(), Net(width=6, depth=3))
    assert [each.name for each in tmp_path.iterdir()] == ["saved"]


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> object:
        return {"calls": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    saved = matta.save(net_nested(), tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"does not fit the modules: .*blocks.0.0.weight is planned as"):
        matta.extract_saved(saved, tmp_path / "w", Net(), Net(width=7, depth=3))
    with pytest.raises(CheckpointError, match=r"received 1 modules for a nesting of 1 Student"):
        matta.extract_saved(saved, tmp_path / "w", Net())
    with pytest.raises(CheckpointError, match=r"a folder, to write to; expected a file: .*/student.safetensors"):
        matta.extract_saved(saved, tmp_path, Net(), Net(width=6, depth=3))
    with pytest.raises(SubModelError, match=r"received k=9; expected 0 to 3"):
        matta.extract_saved(saved, tmp_path / "w", Net(), Net(width=6, depth=3), spec=9)
    with pytest.raises(CheckpointError, match=r"does not fit: .* is only in the modules"):
        SavedWeights(saved / WEIGHTS, net_nested(), "nested.")
    extra = matta.save(matta.nest(WithExtraState(3, 1), WithExtraState(3, 1)), tmp_path / "extra")
    with pytest.raises(CheckpointError, match=r"_extra_state is no tensor, and a file of weights holds only tensors"):
        matta.extract_saved(extra, tmp_path / "w", WithExtraState(3, 1), WithExtraState(3, 1))
    assert not (tmp_path / "w").exists()
