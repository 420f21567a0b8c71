"""Files and folders that are whole or not there, and checksums that tell what a disk has changed since.

`SHA256SUMS` lists the files of a folder as `sha256sum -c SHA256SUMS` reads it; it is written last. Folders of earlier
versions have none, and their files are not checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from matta.errors import CheckpointError

SUMS: Final = "SHA256SUMS"


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
    found = set(names or (each.name for each in folder.iterdir() if each.is_file())) - {SUMS}
    write_checksums(folder, {**read_checksums(folder), **{name: checksum_of(folder / name) for name in found}})


def enter_checksum(file: Path, checksum: str) -> None:
    """Enter a checksum that was computed as the file was written."""
    write_checksums(file.parent, {**read_checksums(file.parent), file.name: checksum})


def has_checksums(folder: Path) -> bool:
    """Whether there is something to compare files with."""
    return (folder / SUMS).is_file()


def verify(folder: Path, *names: str) -> None:
    """Compare files with their checksums, where they have some; without names, all that are listed.

    Raises:
        CheckpointError: a file is missing, or is not the one written.
    """
    listed = read_checksums(folder)
    for name in names or listed:
        if name not in listed and not (listed and (folder / name).exists()):
            continue
        if name not in listed:
            raise CheckpointError(f"{folder / SUMS} is damaged: it lacks {name}; take another copy of the folder")
        try:
            found = checksum_of(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}; take another copy") from None
        if found != listed[name]:
            raise CheckpointError(
                f"{folder / name} is damaged: its checksum is not the one in {SUMS}; take another copy of the folder"
            )


def verify_weights(folder: Path) -> None:
    """Compare the weights in a folder with their checksums, whatever else in it has been edited since.

    Raises:
        CheckpointError: a file is not the one written.
    """
    listed = [name for name in read_checksums(folder) if name.endswith(".safetensors")]
    if listed:
        verify(folder, *listed)


def checksum_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_checksums(folder: Path) -> dict[str, str]:
    """The checksums of a folder by name; none without the file.

    Raises:
        CheckpointError: they are damaged.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        found = {name: checksum for checksum, name in (line.split("  ", 1) for line in lines)}
        if any(name != Path(name).name for name in found):
            raise ValueError("a name that leads out of the folder")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        raise CheckpointError(f"{folder / SUMS} is damaged; take another copy of the folder") from None


def write_checksums(folder: Path, checksums: Mapping[str, str]) -> None:
    """Write the checksums of a folder by name, in place of those that are there."""
    with whole_file(folder / SUMS) as made:
        made.write_text("".join(f"{each}  {name}\n" for name, each in sorted(checksums.items())), encoding="utf-8")


def _move(made: Path, target: Path) -> None:
    """Put a finished folder in place of an earlier one."""
    if not target.exists():
        made.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    target.rename(old / "old")
    try:
        made.rename(target)
    except OSError:
        (old / "old").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _put_on_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
