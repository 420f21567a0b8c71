"""One bit that a disk has changed, in any file of a nesting, a snapshot, labels or an exported folder, is found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from matta.errors import MattaError
from matta.lm.decoders import load_decoder

sys.path.insert(0, str(Path(__file__).parent))
from bad_weights import VERSION, labels, load, snapshot
from good_inputs import make_inputs

Reader = Callable[[Path], object]
FOLDERS: dict[str, tuple[str, Reader]] = {
    "nesting": ("nesting", load),
    "snapshot": (VERSION, snapshot),
    "latest": ("snapshots", snapshot),
    "labels": ("labels", labels),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_inputs(folder)
    (folder / "nesting" / "family.json").unlink()  # is no part of the nesting
    return folder


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_flipped_bit_in_any_file_is_found(kind: str, good: Path) -> None:
    name, read = FOLDERS[kind]
    files = [each for each in (good / name).iterdir() if each.is_file()]
    assert files
    read(good)
    for file in files:
        content = file.read_bytes()
        for bit in _bits(len(content), 1 if kind == "latest" else 12):
            _flip(file, content, bit)
            with pytest.raises(MattaError):
                read(good)
        file.write_bytes(content)
    read(good)


def _bits(size: int, count: int) -> list[int]:
    return [8 * size - 1, *Random(0).sample(range(8 * size), count)]


def _flip(file: Path, content: bytes, bit: int) -> None:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    file.write_bytes(changed)


def test_a_flipped_bit_in_the_weights_of_an_exported_folder_is_found(good: Path) -> None:
    file = good / "model" / "model.safetensors"
    content = file.read_bytes()
    load_decoder(str(good / "model"), "the Teacher")
    _flip(file, content, 8 * len(content) - 20)
    with pytest.raises(MattaError, match=r"model.safetensors is damaged: its checksum"):
        load_decoder(str(good / "model"), "the Teacher")
    file.write_bytes(content)
    (good / "model" / "README.md").write_text("# A card of the user's\n")
    load_decoder(str(good / "model"), "the Teacher")
