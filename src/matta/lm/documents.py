"""The documents that a recipe names, in a fixed order: from files, the hub, or CPython's help topics.

Documents that cannot be used are counted and skipped. Files are read here and not by `datasets`, whose readers raise
at the first line that is not JSON, the first text that is not UTF-8 and the first damaged file: hours into a run that
must not happen. The hub is read through it.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, final

from matta.errors import RunError
from matta.lm.recipe import SourcePart
from matta.lm.text_files import SUFFIXES, Bad, Item, reader_of

Paths = str | os.PathLike[str] | tuple[str | os.PathLike[str], ...]
_COUNTED: Final = ("documents", "bytes", "cut")


@final
@dataclass(frozen=True, kw_only=True)
class TextSource:
    r"""Where documents come from: files, or a data set on the hub.

    Args:
        path: A file, a folder, a pattern such as "texts/*.jsonl", or several of these. Files end in .txt, .json,
            .jsonl (one object a line; .json may be a list of objects) or .parquet, all but Parquet also in .gz. They
            are read in the order given, those of a folder or pattern in the order of their names.
        hub: In place of `path`, a data set's name, such as "allenai/c4", which is streamed.
        config: The configuration of that data set, such as "en".
        split: Its part.
        revision: Its version: a commit, tag or branch. A run notices changed files here, but not on the hub: name a
            commit where it must be the same again.
        field: The field, or column, that is the text.
        separator: What stands between two documents in a .txt file, such as "\n\n" for blank lines or "\f" for form
            feeds. By default the whole file is one document.
        piece_bytes: A longer document is read in pieces of at most this size, cut before a space where there is
            one. It remains one document. What is not UTF-8 is skipped by the piece.
        max_line_bytes: A longer line of JSON is skipped, since it would have to be held as a whole.

    Raises:
        RunError: not one of `path` and `hub` is given, or a size is too small.

    Example:
        >>> TextSource(hub="allenai/c4", config="en").split
        'train'
    """

    path: Paths | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    field: str = "text"
    separator: str | None = None
    piece_bytes: int = 1 << 20
    max_line_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        if (not self.path) == (not self.hub):
            raise RunError(f"received path={self.path!r} and hub={self.hub!r}; expected one of them")
        if self.separator == "":
            raise RunError("received separator=''; expected text such as a blank line, or None for whole files")
        if self.piece_bytes < 16 or self.max_line_bytes < 16:
            sizes = f"piece_bytes={self.piece_bytes} and max_line_bytes={self.max_line_bytes}"
            raise RunError(f"received {sizes}; expected at least 16 of each")

    def files(self) -> list[Path]:
        """The files, in the order in which they are read.

        Raises:
            RunError: a path leads to none, or to one of another kind.
        """
        paths = self.path if isinstance(self.path, tuple | list) else (self.path,)
        return [file for path in paths if path for file in _files_of(os.path.expanduser(path))]


def _files_of(path: str) -> list[Path]:
    if os.path.isfile(path):
        if not path.lower().endswith(SUFFIXES):
            raise RunError(f"received the file {path}; expected one that ends in {', '.join(SUFFIXES)}")
        return [Path(path)]
    pattern = os.path.join(glob.escape(path), "**") if os.path.isdir(path) else path
    matches = glob.glob(pattern, recursive=True)
    texts = [each for each in matches if each.lower().endswith(SUFFIXES) and os.path.isfile(each)]
    found = [each for each in texts if not _is_of_cache(each)]
    if not found:
        what = "no such file or folder" if not os.path.exists(path) else "a folder"
        raise RunError(f"{path} leads to no text ({what}); expected files that end in {', '.join(SUFFIXES)}")
    return [Path(each) for each in sorted(found)]


def _is_of_cache(file: str) -> bool:
    """Whether `matta.lm.tokens` wrote it, whose cache may be in the folder of the texts."""
    folder, name = os.path.split(file)
    return name == "corpus.json" and os.path.isfile(os.path.join(folder, "tokens.bin"))


class Document(NamedTuple):
    """A document, or a piece of one that is very long: whether it ends here."""

    text: str
    ends: bool = True


@final
@dataclass(kw_only=True)
class Counts:
    """What was read: documents, their bytes in UTF-8, those that were cut, and what was skipped by reason.

    `examples` has for each reason where it was first met.
    """

    documents: int = 0
    bytes: int = 0
    cut: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, bad: Bad, place: str) -> None:
        """Count something that is left out."""
        self.skipped[bad.reason] = self.skipped.get(bad.reason, 0) + bad.num
        self.examples.setdefault(bad.reason, f"{place}{bad.detail and ': ' + bad.detail}")

    def state_dict(self) -> dict[str, Any]:
        """The counts in JSON types."""
        own: dict[str, Any] = {name: getattr(self, name) for name in _COUNTED}
        return {**own, "skipped": dict(self.skipped), "examples": dict(self.examples)}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Counts:
        """The counts that `state_dict` gave."""
        return Counts(**{**state, "skipped": dict(state["skipped"]), "examples": dict(state["examples"])})

    @staticmethod
    def summed(parts: Iterable[Counts]) -> Counts:
        """What was read in all; the examples of the first part that has one."""
        total = Counts()
        for part in parts:
            for name in _COUNTED:
                setattr(total, name, getattr(total, name) + getattr(part, name))
            for reason, count in part.skipped.items():
                total.skipped[reason] = total.skipped.get(reason, 0) + count
            total.examples = {**part.examples, **total.examples}
        return total


class Shards(Protocol):
    """Parts of a source that can be read apart from each other, such as files."""

    names: list[str]

    def items(self, index: int) -> Iterator[Item]:
        """What a part holds, good and bad, always in the same order."""


@final
class Documents:
    """The documents of a source, and the counts of what has been read. See `read_documents`."""

    def __init__(self, source: TextSource, counts: Counts | None = None) -> None:
        self.counts = counts or Counts()
        self.shards: Shards = _Files(source) if source.hub is None else _hub_shards(source)

    def __iter__(self) -> Iterator[Document]:
        """All of them.

        Raises:
            RunError: there is none.
        """
        before = self.counts.bytes
        for index in range(len(self.shards.names)):
            yield from self.of_part(index)
        if self.counts.bytes == before:
            raise RunError(f"{self._names()} {describe_empty(self.counts)}")

    def of_part(self, index: int) -> Iterator[Document]:
        """The documents of one part, such as a file."""
        for item in self.shards.items(index):
            if (document := self.checked(item, index)) is not None:
                yield document

    def checked(self, item: Item, index: int) -> Document | None:
        """The document of an item of a part, counted; None: it is left out."""
        value = item.value
        if item.is_first and item.is_last and isinstance(value, str) and not value.strip():
            value = Bad("empty")
        if isinstance(value, Bad):
            self.counts.skip(value, f"{self.shards.names[index]}, document {item.row}")
            if item.is_first or not item.is_last:
                return None
            value = ""  # the end of a document of which pieces were read
        self.counts.cut += item.is_first and not item.is_last
        self.counts.documents += item.is_last
        self.counts.bytes += len(value.encode())
        return Document(value, item.is_last)

    def _names(self) -> str:
        first, *more = self.shards.names
        return f"{first} and {len(more)} more" if more else first


def describe_empty(counts: Counts) -> str:
    """What to say of a source without documents."""
    found = "; ".join(f"{count} skipped ({reason})" for reason, count in counts.skipped.items())
    where = f"; for example {next(iter(counts.examples.values()))}" if counts.examples else ""
    return f"gave no document: {found or 'nothing there'}{where}; expected at least one text"


def read_documents(source: TextSource) -> Documents:
    r"""The documents of a source, to be iterated over: always in the same order.

    Broken lines, texts that are not UTF-8, missing fields, empty documents and unreadable files are skipped and
    counted in `counts`, with the reason.

    Raises:
        RunError: a path leads to no file, or the hub does not have the data set or cannot be reached; while
            iterating, there is no document at all, or the network is lost for good.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "a.jsonl")
        ...     _ = file.write_text('{"text": "one"}\n{"text": 2}\n{"text": "three"}\n')
        ...     documents = read_documents(TextSource(path=file))
        ...     texts = [each.text for each in documents]
        >>> texts, documents.counts.skipped
        (['one', 'three'], {'text is no string': 1})
    """
    return Documents(source)


@final
class _Files:
    """The files of a source."""

    def __init__(self, source: TextSource) -> None:
        self._source, self._files = source, source.files()
        self.names = [str(file) for file in self._files]

    def items(self, index: int) -> Iterator[Item]:
        source = self._source
        return reader_of(
            self._files[index],
            field=source.field,
            separator=source.separator,
            piece_bytes=source.piece_bytes,
            max_line_bytes=source.max_line_bytes,
        )


def _hub_shards(source: TextSource) -> Shards:
    from matta.lm.text_files import HubShards

    assert source.hub is not None
    return HubShards(
        source.hub,
        config=source.config,
        split=source.split,
        revision=source.revision,
        field=source.field,
        piece_bytes=source.piece_bytes,
    )


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


def read_by_both(train: SourcePart, evaluate: SourcePart) -> str | None:
    """What to say of text that is trained on and evaluated; None: there is none (copies of a file are not noticed)."""
    if train.hub or evaluate.hub:
        parts = {(part.hub, part.config, part.split) for part in (train, evaluate)}
        common = [f"{train.hub}, {train.split}"] if len(parts) == 1 else []
    else:
        files = [
            [file.resolve() for file in text_source(part, held_out=held_out).files()]
            for part, held_out in ((train, False), (evaluate, True))
        ]
        common = [str(file) for file in files[1] if file in files[0]]
    if not common:
        return None
    more = f" and {len(common) - 1} more" if len(common) > 1 else ""
    return (
        f"data.evaluate reads what data.train reads: {common[0]}{more}; figures of it are no held-out ones: expected "
        f"text of its own, outside of data.train's folder or pattern"
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
