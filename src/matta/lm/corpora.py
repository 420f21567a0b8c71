"""Text that is tokenised once and kept, by one process or by several together.

Tokens are kept in memory or in a file that is mapped into it. A sample is then a slice, so that any order, any share
and any place cost nothing.

    <cache>/<key>/tokens.bin   the tokens, 2 bytes each for vocabularies of up to 65,536, else 4
    <cache>/<key>/corpus.json  what they are, and what was read and skipped
"""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from matta.errors import DAMAGE, RunError
from matta.lm.documents import Counts, Document, Documents, TextSource, read_documents
from matta.lm.tokens import (
    BLOCK_CHARS,
    Marks,
    TextEncoder,
    document_groups,
    joined,
    marks_of,
    tokenizer_fingerprint,
)
from matta.sizes.storage import verify, whole_folder
from matta.training.processes import gathered, num_processes, process_rank, raise_together

Tokens = NDArray[np.integer[Any]]
_FORMAT: Final = "matta.tokens.1"
_KINDS: Final = {each: np.dtype(each) for each in ("<u2", "<u4")}  # of tokens


@final
@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens, a name for just these tokens, and what was read and skipped for them."""

    tokens: Tokens
    fingerprint: str
    counts: Counts


def load_corpus(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, cache: Path | None, *, together: bool = False
) -> Corpus:
    """The tokens of local files.

    With `cache`, they are written there once, and found again while files, settings and tokenizer are the same
    (files by path, size and time of change). Of several processes one tokenises, and the others wait for it, unless
    they work `together`.

    Args:
        source: The text.
        tokenizer: That of the models.
        cache: A folder for the tokens; None: memory.
        together: Whether all processes of torch.distributed call this with the same text. Each then tokenises its share
            and gives it to the others.

    Raises:
        RunError: no file, no document, a cache that cannot be written, or another process has failed in this.
    """
    documents = read_documents(source)
    if cache is None:
        return _in_memory(_blocks(documents, tokenizer, together=together), documents)
    from filelock import FileLock

    folder = cache / _key(source, tokenizer)
    try:
        if together and not all(gathered((folder / "corpus.json").is_file())):
            _fill(folder, documents, tokenizer)
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (found := _load(folder)) is None:
                _write(folder, _blocks(documents, tokenizer), documents)
                found = _load(folder)
    except OSError as error:
        raise RunError(f"{cache} cannot be written: {error}; expected a folder with room for the tokens") from error
    assert found is not None, "what has just been written"
    return found


def _fill(folder: Path, documents: Documents, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenise together. One process writes, on each machine that has a folder of its own.

    Raises:
        OSError: this process cannot write.
        RunError: another one cannot.
    """
    from filelock import FileLock, Timeout

    blocks, error = _blocks(documents, tokenizer, together=True), None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=0):
            _write(folder, blocks, documents)
    except Timeout:
        pass  # another process writes
    except OSError as failed:
        error = failed
    for _ in blocks:  # the part of a process that does not write
        pass
    raise_together(error)


def _key(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> str:
    settings = {name: value for name, value in asdict(source).items() if name != "path"}
    files = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in source.files()]
    parts: list[Any] = [_FORMAT, settings, files, tokenizer_fingerprint(tokenizer)]
    if (begin := marks_of(tokenizer).begin) is not None:
        parts.append(begin)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class _Part(NamedTuple):
    """Tokens of some documents, whatever was before them.

    Of each pair the first holds if that had not ended, the second if it had.
    """

    begins: tuple[Tokens, Tokens]  # an end, or a beginning
    tokens: Tokens
    has_ended: tuple[bool, bool]  # afterwards


def _blocks(documents: Documents, tokenizer: PreTrainedTokenizerBase, *, together: bool = False) -> Iterator[Tokens]:
    """Tokens in the order of the data. Of several processes each reads everything, and tokenises every n-th block.

    Raises:
        RunError: there is no document, or another process has failed, or has read something else.
    """
    rank, count = (process_rank(), num_processes()) if together else (0, 1)
    groups = document_groups(documents, BLOCK_CHARS)
    encode, marks = TextEncoder(tokenizer), marks_of(tokenizer)
    kind = _KINDS["<u2" if len(tokenizer) <= 1 << 16 else "<u4"]
    has_ended, num_read = True, count
    while num_read == count:
        part, error, num_read = None, None, 0
        try:
            for texts in islice(groups, count):
                part = _part(texts, encode, marks, kind) if num_read == rank else part
                num_read += 1
        except Exception as failed:  # of one process; it is raised on all of them
            error = failed
        for each in _exchanged(part, (num_read, documents.counts.documents, documents.counts.bytes), error, count):
            yield np.concatenate([each.begins[has_ended], each.tokens])
            has_ended = each.has_ended[has_ended]


def _exchanged(part: _Part | None, read: tuple[int, ...], error: Exception | None, count: int) -> list[_Part]:
    """The parts of all processes, which have all read as much.

    Raises:
        RunError: they have not, or one has failed.
    """
    if count == 1 and error is not None:
        raise error
    if count > 1:
        raise_together(error)
    found = gathered((part, read)) if count > 1 else [(part, read)]
    if len({each for _, each in found}) > 1:
        shown = ", ".join(f"{documents} ({num_bytes} bytes)" for _, (_, documents, num_bytes) in found)
        raise RunError(f"the processes read different text: documents so far {shown}; expected the same files for all")
    return [each for each, _ in found if each is not None]


def _part(texts: list[Document], encode: TextEncoder, marks: Marks, kind: np.dtype[Any]) -> _Part:
    ids = encode([each.text for each in texts])
    within, after = (joined(ids, texts, marks, has_ended=ended) for ended in (False, True))
    common = min(len(within.tokens), len(after.tokens))
    begins = [each.tokens[: len(each.tokens) - common].astype(kind) for each in (within, after)]
    tokens = within.tokens[len(within.tokens) - common :].astype(kind)
    return _Part((begins[0], begins[1]), tokens, (within.has_ended, after.has_ended))


def _in_memory(blocks: Iterable[Tokens], documents: Documents) -> Corpus:
    tokens = np.concatenate(list(blocks))
    return Corpus(tokens=tokens, fingerprint=_named([tokens]), counts=documents.counts)


def _named(blocks: Iterable[Tokens]) -> str:
    made = hashlib.blake2b(digest_size=8)
    for block in blocks:
        made.update(block.data)
    return made.hexdigest()


def _write(folder: Path, blocks: Iterable[Tokens], documents: Documents) -> None:
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed: this one has the lock
    with whole_folder(folder) as made:  # in place of one that is damaged
        with (made / "tokens.bin").open("wb") as file:
            kind = ""
            name = hashlib.blake2b(digest_size=8)
            for block in blocks:
                kind = block.dtype.str
                name.update(block.data)
                file.write(block.data)
            size = file.tell()
        about = {"format": _FORMAT, "kind": kind, "size": size, "fingerprint": name.hexdigest()}
        text = json.dumps({**about, "counts": documents.counts.state_dict()}, indent=1)
        (made / "corpus.json").write_text(text, encoding="utf-8")


def _load(folder: Path) -> Corpus | None:
    """What is in the cache, if it is whole."""
    try:
        verify(folder)
        about = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        if (folder / "tokens.bin").stat().st_size != about["size"]:
            return None
        kind = _KINDS[about["kind"]]
        if about["size"]:
            tokens = np.asarray(np.memmap(folder / "tokens.bin", dtype=kind, mode="r"))
        else:
            tokens = np.zeros(0, kind)  # nothing cannot be mapped
        return Corpus(tokens=tokens, fingerprint=about["fingerprint"], counts=Counts.from_state(about["counts"]))
    except (FileNotFoundError, *DAMAGE):
        return None
