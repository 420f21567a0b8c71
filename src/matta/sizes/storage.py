"""Files and folders that are whole or not there, and checksums that tell what a disk has changed since.

`CRC32SUMS` lists the files of a folder; it is written last. A CRC finds what a disk damages, at more than twice the
speed of SHA-256. Folders of earlier versions have `SHA256SUMS`, which counts as long as there is no other, or none, and
then their files are not checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

from safetensors import SafetensorError

from matta.errors import CheckpointError

SUMS: Final = "CRC32SUMS"
_EARLIER: Final = "SHA256SUMS"
_LENGTH: Final = 8  # of a CRC in hexadecimal
_OLD: Final = "-old-"
_READ_AT_ONCE: Final = 1 << 20


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write to. In the end it is put on disk with checksums and takes the place of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield made
        entered = read_checksums(made)
        if missing := [each.name for each in made.iterdir() if each.is_file() and each.name not in entered]:
            add_checksums(made, *missing)
        put_in_place(made, target)
    except SafetensorError as error:  # of a full disk too
        raise CheckpointError(f"{target} could not be written: {error}; mend that, and write it again") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def put_in_place(made: Path, target: Path) -> None:
    """Put a finished folder on disk, and then in the place of `target`."""
    for file in (*made.iterdir(), made):
        _put_on_disk(file)
    made.chmod(0o755)
    _move(made, target)
    _put_on_disk(target.parent)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write a file to. In the end the file is put on disk and takes the place of `target`."""
    made = target.with_name(f".{target.name}.part")
    try:
        yield made
        made.chmod(0o644)
        _put_on_disk(made)
        made.replace(target)
    finally:
        made.unlink(missing_ok=True)


@contextmanager
def checked_file(target: Path) -> Iterator[Path]:
    """As `whole_file`, with the file in the checksums of its folder. Killed in between, it is left out of them."""
    listed = read_checksums(target.parent)
    if listed.pop(target.name, None) is not None:
        write_checksums(target.parent, listed)
    with whole_file(target) as made:
        yield made
    add_checksums(target.parent, target.name)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file that is whole or not there."""
    with whole_file(path) as made:
        made.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def add_checksums(folder: Path, *names: str) -> None:
    """Enter files into the checksums of their folder; without names, all that are there."""
    found = set(names or (each.name for each in folder.iterdir() if each.is_file())) - {SUMS, _EARLIER}
    write_checksums(folder, {**read_checksums(folder), **{name: checksum_of(folder / name) for name in found}})


def enter_checksum(file: Path, checksum: str) -> None:
    """Enter a checksum that was computed as the file was written."""
    write_checksums(file.parent, {**read_checksums(file.parent), file.name: checksum})


def has_checksums(folder: Path) -> bool:
    """Whether there is something to compare files with."""
    return _sums(folder).is_file()


def verify(folder: Path, *names: str) -> None:
    """Compare files with their checksums, where they have some; without names, all that are listed.

    Raises:
        CheckpointError: a file is missing, or is not the one written.
    """
    listed, sums = read_checksums(folder), _sums(folder)
    for name in names or listed:
        if name not in listed and not (listed and (folder / name).exists()):
            continue
        if name not in listed:
            raise CheckpointError(f"{sums} is damaged: it lacks {name}; take another copy of the folder")
        try:
            found = checksum_of(folder / name, Checksum if len(listed[name]) == _LENGTH else hashlib.sha256)
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}; take another copy") from None
        if found != listed[name]:
            raise CheckpointError(
                f"{folder / name} is damaged: its checksum is not the one in {sums.name}; take another copy of the "
                f"folder"
            )


def verify_weights(folder: Path) -> None:
    """Compare the weights in a folder with their checksums, whatever else in it has been edited since.

    Raises:
        CheckpointError: a file is not the one written.
    """
    listed = [name for name in read_checksums(folder) if name.endswith(".safetensors")]
    if listed:
        verify(folder, *listed)


@final
class Checksum:
    """A checksum of bytes that come one after another.

    Example:
        >>> checksum = Checksum()
        >>> checksum.update(b"1234"); checksum.update(b"56789"); checksum.hexdigest()
        'cbf43926'
    """

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | memoryview) -> None:
        """Count more bytes in."""
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        """The checksum of the bytes so far, in hexadecimal digits."""
        return f"{self._value:08x}"


def checksum_of(file: Path, kind: Callable[[], Any] = Checksum) -> str:
    """The checksum of a file, in hexadecimal digits."""
    checksum = kind()
    with file.open("rb", buffering=0) as opened:
        while data := opened.read(_READ_AT_ONCE):
            checksum.update(data)
    found: str = checksum.hexdigest()
    return found


def _sums(folder: Path) -> Path:
    """Where the checksums of a folder are, or would be written."""
    return folder / (_EARLIER if (folder / _EARLIER).is_file() and not (folder / SUMS).exists() else SUMS)


def read_checksums(folder: Path) -> dict[str, str]:
    """The checksums of a folder by name; none without the file.

    Raises:
        CheckpointError: they are damaged.
    """
    try:
        *lines, end = _sums(folder).read_bytes().decode().split("\n")
        found = {name: checksum for checksum, name in (line.split("  ", 1) for line in lines)}
        if end or any(name != Path(name).name or "\0" in name for name in found):
            raise ValueError("a line without an end, or a name that leads out of the folder")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        raise CheckpointError(f"{_sums(folder)} is damaged; take another copy of the folder") from None


def write_checksums(folder: Path, checksums: Mapping[str, str]) -> None:
    """Write the checksums of a folder by name, in place of those that are there."""
    with whole_file(folder / SUMS) as made:
        made.write_text("".join(f"{each}  {name}\n" for name, each in sorted(checksums.items())), encoding="utf-8")
    (folder / _EARLIER).unlink(missing_ok=True)  # its entries are in the new file


def _move(made: Path, target: Path) -> None:
    """Put a finished folder in place of an earlier one."""
    if not target.exists():
        made.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}{_OLD}", dir=target.parent))
    target.rename(old / "old")
    try:
        made.rename(target)
    except OSError:
        (old / "old").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Put earlier folders back that a killed process had moved aside for new ones, and not replaced."""
    for aside in folder.glob(f".*{_OLD}*"):
        target = folder / aside.name[1:].rpartition(_OLD)[0]
        if (aside / "old").exists() and not target.exists():
            (aside / "old").rename(target)


def _put_on_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
