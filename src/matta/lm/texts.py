"""The texts that a recipe names: CPython's own help on topics, files, and the hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from matta.errors import RunError
from matta.lm.documents import TextSource, read_documents
from matta.lm.recipe import SourcePart

PYDOC: Final = "pydoc"
HELD_OUT: Final = 0.1
_SEPARATOR: Final = "\f"


def text_source(part: SourcePart, *, held_out: bool = False) -> TextSource:
    """What a part of a recipe names, to be read.

    Args:
        part: The recipe's.
        held_out: Of "pydoc" the last tenth, in place of all before it.

    Raises:
        RunError: "pydoc" with a Python that has none.
    """
    if part.path == PYDOC:
        return TextSource(path=_pydoc_file(held_out=held_out), separator=_SEPARATOR)
    return TextSource(
        path=part.path or None,
        hub=part.hub or None,
        config=part.config or None,
        split=part.split,
        field=part.field,
        separator=part.separator or None,
    )


def held_out_documents(source: TextSource, most_bytes: int) -> list[str]:
    """The first documents of a text, of `most_bytes` in UTF-8 at most (the last one is cut).

    Raises:
        RunError: there is none.
    """
    documents: list[str] = []
    left, ended = most_bytes, True
    for document in read_documents(source):
        data = document.text.encode()
        text = data[:left].decode(errors="ignore")
        if ended:
            documents.append(text)
        else:
            documents[-1] += text
        left, ended = left - len(data), document.ends
        if left <= 0:
            break
    return [document for document in documents if document]


def pydoc_topics() -> tuple[list[str], list[str]]:
    """CPython's help on topics, by name: those before the last tenth, and those in it.

    Raises:
        RunError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RunError(f"{sys.executable} comes without pydoc_data; name a text file: data.train=FILE") from None
    texts = [topics[name].strip() + "\n" for name in sorted(topics)]
    total = sum(map(len, texts))
    so_far, first = 0, 0
    while so_far + len(texts[first]) <= (1 - HELD_OUT) * total:
        so_far += len(texts[first])
        first += 1
    return texts[:first], texts[first:]


def _pydoc_file(*, held_out: bool) -> Path:
    """The topics as a text file in the user's cache, written there first if need be."""
    train, rest = pydoc_topics()
    text = _SEPARATOR.join(rest if held_out else train)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "matta"
    version = ".".join(map(str, sys.version_info[:3]))
    file = cache / f"pydoc-{version}-{'held-out' if held_out else 'train'}.txt"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        cache.mkdir(parents=True, exist_ok=True)
        made = file.with_name(f".{file.name}-{os.getpid()}")
        made.write_text(text, encoding="utf-8")
        made.replace(file)
    return file
