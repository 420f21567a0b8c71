"""Good bytes, changed by chance, and a reader that must read them, or refuse them in one line."""

from __future__ import annotations

import copy
import functools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from test_fuzzed_readers import PIECES, require_one_line

MOST = settings.default.max_examples if settings.default.max_examples < 1000 else 10_000  # type: ignore[union-attr]
"""Tries: the latter under `make stress`."""
_NONE, _MORE = object(), object()
_LONG = "long" * 10_000  # must not come back whole in a message
VALUES = (None, True, False, 0, -1, 1, 2**70, 1.5, 1e308, float("nan"), "", "a", "..", "\ud800", [], {}, [1], {"a": 1})


def mutated(good: bytes, random: Random) -> bytes:
    """The bytes with some cut off, taken out, put in, doubled, swapped, or flipped; JSON also with other values."""
    found = good
    for _ in range(random.randint(1, 3)):
        values = _json(found) if random.random() < 0.5 else None
        found = _changed_bytes(found, random) if values is None else _changed_values(values, random)
    return found


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _changed_values(values: Any, random: Random) -> bytes:
    """Another value in some place, or none, or one more."""
    outer: Any = {"": values}
    node, key = outer, ""
    while isinstance(node[key], dict | list) and node[key] and random.random() < 0.8:
        node = node[key]
        key = random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
    kind = random.choice(("other", "other", "none", "more"))
    if kind == "none" and node is not outer:
        del node[key]
    elif kind == "more" and isinstance(node[key], dict | list):
        more = random.choice(VALUES)
        node[key] = [*node[key], more] if isinstance(node[key], list) else {**node[key], random.choice("ab$"): more}
    else:
        node[key] = random.choice((*VALUES, copy.deepcopy(values)))
    return json.dumps(outer[""]).encode()


def _changed_bytes(data: bytes, random: Random) -> bytes:
    start = random.randint(0, len(data))
    end = min(len(data), start + random.choice((0, 1, 4, 40, len(data))))
    head, part, tail = data[:start], data[start:end], data[end:]
    kind = random.choice(("cut", "piece", "bytes", "double", "swap", "flip"))
    if kind == "cut":
        return head
    if kind == "piece":
        return head + random.choice(PIECES) + tail
    if kind == "bytes":
        return head + random.randbytes(random.randint(0, 8)) + tail
    if kind == "double":
        return head + part + part + tail
    if kind == "swap":
        return tail + part + head
    flipped = bytearray(data)
    if flipped:
        flipped[min(start, len(data) - 1)] ^= 1 << random.randrange(8)
    return bytes(flipped)


def every_change(good: bytes, most: int) -> Iterator[bytes]:
    """A JSON document, or lines of them, with each of the values above in each place, or none, or one more.

    Of all these so many at most, evenly.
    """
    lines = [good] if _json(good) is not None else good.splitlines()
    values = [{"": json.loads(line)} for line in lines]
    places = [(index, path) for index, outer in enumerate(values) for path in _places(outer[""])]
    changes = list(product(places, (*VALUES, _LONG, [_LONG], _NONE, _MORE)))
    for (index, path), value in changes[:: -(-len(changes) // most)]:
        changed = json.dumps(_with_value(values[index], path, value)).encode()
        yield b"\n".join([*lines[:index], changed, *lines[index + 1 :]])


def _places(values: Any, path: tuple[Any, ...] = ("",)) -> Iterator[tuple[Any, ...]]:
    """The paths to all values; of a list to the first few."""
    yield path
    few = list(enumerate(values))[:4] if isinstance(values, list) else []
    for key, each in values.items() if isinstance(values, dict) else few:
        yield from _places(each, (*path, key))


def _with_value(outer: dict[str, Any], path: tuple[Any, ...], value: Any) -> Any:
    *before, key = path
    found = copy.deepcopy(outer)
    node = functools.reduce(lambda node, each: node[each], before, found)
    if value is _MORE and isinstance(node[key], dict | list):
        node[key] = [*node[key], None] if isinstance(node[key], list) else {**node[key], "a$": 1}
    elif value is _NONE and before:
        del node[key]
    elif value is not _NONE and value is not _MORE:
        node[key] = value
    return found[""]


def refuses_or_reads(file: Path, read: Callable[[], object], *, tries: int = MOST) -> None:
    """Try what a file may hold; a checksum that is listed is that of what it holds, as if someone had edited it."""
    content = file.read_bytes()
    read()

    @settings(max_examples=min(tries, MOST))
    @given(seed=st.integers(0, 2**64 - 1))
    def refuses(seed: int) -> None:
        _try(file, mutated(content, Random(seed)), read)

    try:
        refuses()
    finally:
        write(file, content)


def require_all_read_or_refused(file: Path, read: Callable[[], object], changes: Iterable[bytes]) -> None:
    """Try each of these contents."""
    content = file.read_bytes()
    try:
        for bad in changes:
            _try(file, bad, read)
    finally:
        write(file, content)


def _try(file: Path, bad: bytes, read: Callable[[], object]) -> None:
    write(file, bad)
    try:
        require_one_line(read)
    except Exception as error:
        error.add_note(f"{file.name}: {bad[:2000]!r}")
        raise


def write(file: Path, content: bytes) -> None:
    """A file, with its checksum where one is listed."""
    file.write_bytes(content)
    sums = file.with_name("CRC32SUMS")
    if sums.is_file() and sums != file:
        lines = (line.split("  ", 1) for line in sums.read_text().splitlines())
        own = f"{zlib.crc32(content):08x}"
        sums.write_text("".join(f"{own if name == file.name else sum_}  {name}\n" for sum_, name in lines))
