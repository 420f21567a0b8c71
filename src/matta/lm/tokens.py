"""Tokens: tokenizers by name, and documents as token ids."""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from matta.errors import RunError, first_line
from matta.lm.documents import Document

END: Final = "<|endoftext|>"
ENDS: Final = (END, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]", "<EOS>")
"""Names of the end of text, for files that do not say which of the special tokens it is."""

_SPECIAL: Final = ("bos_token", "eos_token", "unk_token")  # padding and masks are never trained on
_PROBE: Final = (
    "The quick brown fox can't jump over 3,141 lazy dogs' beds.\n\n\tdef f(x):  # naïve — 42% of “Łódź”\r\n"
    "\t\treturn {'a': x ** 2}  \n   Größe, 東京, привет, 🙂👩‍💻!? http://a.b/c?d=e&f=g  END"
)
_NUM_PROBED: Final = 2000

Encode = Callable[[Sequence[str]], list[NDArray[np.int64]]]


class Marks(NamedTuple):
    """The token after each document, and the one before it, if there is one."""

    end: int
    begin: int | None = None

    @property
    def before_text(self) -> int:
        """What the first token of a document follows."""
        return self.end if self.begin is None else self.begin


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The marks of documents: the tokenizer's end of text, and its beginning, if it puts that before each text.

    Llama's, Gemma's and Mistral's do, so that their models read no text without it. GPT-2's and Qwen's do not.

    Example:
        >>> marks_of(load_tokenizer("bytes"))
        Marks(end=256, begin=None)
    """
    end, begin = int(tokenizer.eos_token_id), tokenizer.bos_token_id
    is_put = begin is not None and begin != end and tokenizer("a")["input_ids"][:1] == [begin]
    return Marks(end, int(begin) if is_put else None)


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a name. One without a padding token pads with its end of text.

    Args:
        name: "bytes", whose ids 0 to 255 are the bytes of UTF-8 and 256 is `<|endoftext|>`; a folder that
            `save_pretrained` wrote, or one with nothing but GPT-2's vocab.json and merges.txt; a file that
            `tokenizers.Tokenizer.save` wrote, whose end of text is the special token with the usual name
            (`<|endoftext|>`, `</s>`, `<eos>`, ...); or a name on the Hugging Face hub, such as "gpt2".

    Raises:
        RunError: there is no such file or folder, or the hub does not have the name or cannot be reached.

    Example:
        >>> tokenizer = load_tokenizer("bytes")
        >>> tokenizer("né")["input_ids"], tokenizer.decode([110, 195, 169]), len(tokenizer), tokenizer.eos_token_id
        ([110, 195, 169], 'né', 257, 256)
    """
    name = os.fspath(name)
    if name == "bytes":
        return _byte_tokenizer()
    path = Path(name).expanduser()
    tokenizer = _from_folder(path) if path.is_dir() else _from_file(path) if path.is_file() else _from_hub(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE without merges, which AutoTokenizer loads again without code of ours."""
    backend = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(_letters())}, merges=[]))
    # One word to a document: cutting it into words has no effect without merges, and takes twice the time.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def _letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it can be seen, else one from 256 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte if byte in seen else 256 + hidden.index(byte)) for byte in range(256)]


def _from_file(file: Path) -> PreTrainedTokenizerBase:
    """A file of the tokenizers library. It has no end of text of its own, but special tokens."""
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)
    except Exception as error:  # the file is the user's, and what it makes tokenizers raise is anything
        raise RunError(
            f"{file} holds no tokenizer that can be loaded: {first_line(error)}; expected a file that "
            f"tokenizers.Tokenizer.save writes, or a tokenizer's folder"
        ) from error
    special = {each.content for each in tokenizer.added_tokens_decoder.values() if each.special}
    tokenizer.eos_token = next((end for end in ENDS if end in special), None)
    return tokenizer


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    names = {file.name for file in folder.iterdir()}
    try:
        if {"vocab.json", "merges.txt"} <= names and not names & {"tokenizer.json", "tokenizer_config.json"}:
            return GPT2Tokenizer.from_pretrained(folder)
        if "tokenizer.json" in names and not names & {"tokenizer_config.json", "config.json"}:
            return _from_file(folder / "tokenizer.json")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except RunError:
        raise
    except Exception as error:  # the files are the user's, and what they make Transformers raise is anything
        there = ", ".join(sorted(names))[:200]
        raise RunError(
            f"{folder} holds no tokenizer that can be loaded: {first_line(error)}; received a folder of {there}; "
            f"expected what save_pretrained writes, or GPT-2's vocab.json and merges.txt"
        ) from error


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name:
        raise RunError(f"there is no {name!r}; expected 'bytes', a tokenizer's folder or file, or a name on the hub")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of the network, of the hub and of Transformers: they have no common base
        raise RunError(
            f"the tokenizer {name!r} is not a folder here, and cannot be loaded from the hub: {first_line(error)}; "
            f"check the name and the network (HF_HUB_OFFLINE is {os.environ.get('HF_HUB_OFFLINE', 'not set')}), or "
            f"give the folder of a tokenizer, or 'bytes'"
        ) from error


@final
class TextEncoder:
    """Turns texts into ids, for training, held-out text and benchmarks alike: no text is a special token.

    Nothing is added, cut or padded. A document that says `<|endoftext|>` does not end there, unless the tokenizer's
    model has the name as an ordinary piece too (Unigram). The tokenizer itself is left as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._own: Tokenizer | None = None  # stays so for one that is written in Python
        if backend is not None:
            self._own = Tokenizer.from_str(backend.to_str())
            self._own.no_truncation()
            self._own.no_padding()
            self._own.encode_special_tokens = True

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """The ids of each text."""
        if self._own is None:
            found = self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
            return [np.array(ids, np.int64) for ids in found["input_ids"]]
        encoded = self._own.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int64) for each in encoded]

    def with_starts(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """The ids of a text, and the character at which each begins; None if the tokenizer does not tell."""
        if self._own is None:
            return self([text])[0], None
        found = self._own.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int64), np.array([start for start, _ in found.offsets], np.int64)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for what the tokenizer does: its vocabulary, its special tokens, and how it cuts text.

    The same for a tokenizer that was saved and loaded again, with whatever files and library version.
    """
    parts = [sorted(tokenizer.get_vocab().items()), _special(tokenizer), _probed(tokenizer)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def disagreement(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """What differs between two tokenizers, in words; None: they agree.

    They agree if they have the same tokens with the same ids, the same begin, end and unknown tokens, and cut
    text alike: then a Teacher's probabilities are of the Student's tokens.

    Example:
        >>> disagreement(load_tokenizer("bytes"), load_tokenizer("bytes")) is None
        True
    """
    first, second = one.get_vocab(), other.get_vocab()
    if len(first) != len(second):
        return f"{len(first)} tokens and {len(second)}"
    if first != second:
        token = min(first.items() - second.items(), key=lambda item: item[1])[0]
        return f"token {token!r} has id {first[token]}, and {second.get(token, 'none')}"
    for name, token in _special(one).items():
        if token != _special(other)[name]:
            return f"{name} is {token!r}, and {_special(other)[name]!r}"
    return None if _probed(one) == _probed(other) else "the same tokens, but text is cut into them differently"


def require_agreement(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, names: tuple[str, str]) -> None:
    """Refuse two tokenizers that do not agree; `names` say in the message whose they are.

    Raises:
        RunError: they differ.
    """
    if (found := disagreement(one, other)) is not None:
        raise RunError(f"the tokenizers of {names[0]} and {names[1]} differ: {found}; expected one and the same")


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    return {name: getattr(tokenizer, name, None) for name in _SPECIAL}


def _probed(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Ids of some text, and of many of the tokens after one another."""
    some = sorted(tokenizer.get_vocab().values())[:: max(1, len(tokenizer) // _NUM_PROBED)]
    texts = [_PROBE, tokenizer.decode(some, skip_special_tokens=True)]
    return [ids.tolist() for ids in TextEncoder(tokenizer)(texts)]


BLOCK_CHARS: Final = 1 << 19  # enough for the tokenizer's threads, which take some 200 bytes for each token


class Block(NamedTuple):
    """Tokens of some documents, and whether the last of them has ended."""

    tokens: NDArray[np.integer[Any]]
    has_ended: bool


def token_blocks(
    documents: Iterable[Document], encode: Encode, marks: Marks, *, has_ended: bool = True, chars: int = BLOCK_CHARS
) -> Iterator[Block]:
    """Tokens of documents between their marks; a block is of as many documents as have `chars` characters.

    Where nothing but ends of documents would follow each other, there is one.
    """
    for texts in document_groups(documents, chars):
        yield (block := joined(encode([each.text for each in texts]), texts, marks, has_ended=has_ended))
        has_ended = block.has_ended


def document_groups(documents: Iterable[Document], chars: int) -> Iterator[list[Document]]:
    """Groups of documents, each with at least `chars` characters in all, but for the last."""
    texts: list[Document] = []
    size = 0
    for document in documents:
        texts.append(document)
        size += len(document.text)
        if size >= chars:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def joined(encoded: Iterable[NDArray[np.int64]], texts: Iterable[Document], marks: Marks, *, has_ended: bool) -> Block:
    """The ids of documents one after another, between their marks."""
    before = [] if marks.begin is None else [np.array([marks.begin], np.int64)]
    parts = []
    for ids, document in zip(encoded, texts, strict=True):
        if len(ids):
            parts += [*before, ids] if has_ended else [ids]
            has_ended = False
        if document.ends and not has_ended:
            parts.append(np.array([marks.end], np.int64))
            has_ended = True
    return Block(np.concatenate(parts) if parts else np.zeros(0, np.int64), has_ended)
