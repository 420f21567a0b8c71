"""What a case of a bad input consists of, and how good inputs are made bad."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]
"""Makes a file or folder of the good inputs bad; it is given the folder of them all."""


@dataclass(frozen=True)
class Case:
    """An input and what must be said of it: one line that the pattern is found in, with exit code 2.

    `run` is the rest of a command line, with {w} for the folder of inputs, or a call of the library with that folder.
    """

    name: str
    damage: Damage
    run: str | Callable[[Path], object]
    line: str


def nothing(folder: Path) -> None:
    """Leave the good inputs as they are."""


def write(path: str, content: str | bytes) -> Damage:
    """A file of some content, in a folder that is made."""

    def damage(folder: Path) -> None:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def remove(path: str) -> Damage:
    """No such file."""
    return lambda folder: (folder / path).unlink()


def cut(path: str, share: float = 0.5) -> Damage:
    """The beginning of a file."""

    def damage(folder: Path) -> None:
        content = (folder / path).read_bytes()
        (folder / path).write_bytes(content[: int(len(content) * share)])

    return damage


def flip(path: str, share: float = 0.5) -> Damage:
    """A file with one bit changed."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / path).read_bytes())
        content[min(int(len(content) * share), len(content) - 1)] ^= 4
        (folder / path).write_bytes(content)

    return damage


def edit(path: str, **changes: Any) -> Damage:
    """A JSON file with other values; None takes one out, and "a__b" is within "a"."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / path).read_text())
        for keys, value in changes.items():
            *outer, key = keys.split("__")
            node = values
            for each in outer:
                node = node[each]
            node[key] = value
            if value is None:
                del node[key]
        (folder / path).write_text(json.dumps(values))

    return damage


def weights(path: str, header: bytes, length: int | None = None, data: bytes = b"") -> Damage:
    """A safetensors file of this header, said to be of this length."""
    said = len(header) if length is None else length
    return write(path, said.to_bytes(8, "little") + header + data)


def unlisted(path: str, damage: Damage) -> Damage:
    """The damage in a folder without checksums, as earlier versions wrote it."""

    def both(folder: Path) -> None:
        (folder / path / "CRC32SUMS").unlink()
        damage(folder)

    return both
