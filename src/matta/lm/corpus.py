"""Text that is tokenised once: its tokens in a row, in memory or in a file that is mapped into it.

A sample is then a slice, so that any order, any share of it and any place in it cost nothing.

    <cache>/<key>/tokens.bin   the tokens, 2 bytes each for vocabularies of up to 65,536, else 4
    <cache>/<key>/corpus.json  what they are, and what was read and skipped
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from matta.errors import RunError
from matta.lm.blocks import token_blocks
from matta.lm.documents import Counts, Documents, TextSource, read_documents
from matta.lm.tokenizers import TextEncoder, tokenizer_fingerprint
from matta.storage import verify, whole_folder

Tokens = NDArray[np.integer[Any]]
_FORMAT: Final = "matta.tokens.1"


@final
@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens, a name for just these tokens, and what was read and skipped for them."""

    tokens: Tokens
    fingerprint: str
    counts: Counts


def load_corpus(source: TextSource, tokenizer: PreTrainedTokenizerBase, cache: Path | None) -> Corpus:
    """The tokens of local files.

    With `cache`, they are written there once, and found again while files, settings and tokenizer are the same
    (files by path, size and time of change). Of several processes one tokenises, and the others wait for it.

    Raises:
        RunError: no file, no document, or a cache that cannot be written.
    """
    documents = read_documents(source)
    if cache is None:
        return _in_memory(documents, tokenizer)
    from filelock import FileLock

    folder = cache / _key(source, tokenizer)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (found := _load(folder)) is None:
                _write(folder, documents, tokenizer)
                found = _load(folder)
    except OSError as error:
        raise RunError(f"{cache} cannot be written: {error}; expected a folder with room for the tokens") from error
    assert found is not None, "what has just been written"
    return found


def _key(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> str:
    settings = {name: value for name, value in asdict(source).items() if name != "path"}
    files = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in source.files()]
    parts = [_FORMAT, settings, files, tokenizer_fingerprint(tokenizer)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _narrow_blocks(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    kind = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    end = tokenizer.eos_token_id
    for block in token_blocks(documents, TextEncoder(tokenizer), end):
        yield block.tokens.astype(kind)


def _in_memory(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    tokens = np.concatenate(list(_narrow_blocks(documents, tokenizer)))
    return Corpus(tokens=tokens, fingerprint=_named([tokens]), counts=documents.counts)


def _named(blocks: Iterable[Tokens]) -> str:
    made = hashlib.blake2b(digest_size=8)
    for block in blocks:
        made.update(block.data)
    return made.hexdigest()


def _write(folder: Path, documents: Documents, tokenizer: PreTrainedTokenizerBase) -> None:
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed: this one has the lock
    with whole_folder(folder) as made:  # in place of one that is damaged
        with (made / "tokens.bin").open("wb") as file:
            kind = ""
            name = hashlib.blake2b(digest_size=8)
            for block in _narrow_blocks(documents, tokenizer):
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
    except (FileNotFoundError, ValueError):
        return None
    if about["size"]:
        tokens = np.asarray(np.memmap(folder / "tokens.bin", dtype=about["kind"], mode="r"))
    else:
        tokens = np.zeros(0, about["kind"])  # nothing cannot be mapped
    return Corpus(tokens=tokens, fingerprint=about["fingerprint"], counts=Counts.from_state(about["counts"]))
