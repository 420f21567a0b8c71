"""Text for language models: nothing lost, nothing twice, nothing that crashes; and the tokenizers."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, multiprocessing, nn
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import matta
from matta.errors import RunError
from matta.lm import corpora, packing, text_files, text_streaming
from matta.lm.documents import Counts, TextSource, held_out_documents, read_documents
from matta.lm.packing import PackedTokens
from matta.lm.permutations import Shuffled
from matta.lm.tokens import (
    TextEncoder,
    disagreement,
    load_tokenizer,
    require_agreement,
    tokenizer_fingerprint,
)
from matta.training import processes
from test_fitting import free_port

END = 256
BYTES = load_tokenizer("bytes")
ENCODE = TextEncoder(BYTES)
TEXTS = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=12
)
WORDS = [f"document {index} has {'word ' * (index % 7)}and an end" for index in range(40)]


# ------------------------------------------------------------------------------------------------------ tokenizers


@given(st.text(st.characters(codec="utf-8")))
def test_the_ids_of_bytes_are_the_bytes(text: str) -> None:
    assert ENCODE([text])[0].tolist() == list(text.encode())
    assert BYTES.decode(list(text.encode())) == text


@given(st.binary())
def test_any_bytes_have_a_text(data: bytes) -> None:
    assert BYTES.decode(list(data)) == data.decode(errors="replace")
    assert len(set(BYTES.convert_ids_to_tokens(list(data)))) == len(set(data))


def test_bytes_are_saved_without_code_of_ours(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(again), again.eos_token_id, again.bos_token_id, again.pad_token_id) == (257, END, END, END)
    assert again("né <|endoftext|>")["input_ids"] == [*"né ".encode(), END]
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(load_tokenizer(tmp_path))
    assert disagreement(BYTES, again) is None
    assert not list(tmp_path.glob("*.py"))


def gpt2_files(folder: Path, merges: list[tuple[str, str]]) -> Path:
    letters = sorted(BYTES.get_vocab(), key=BYTES.get_vocab().__getitem__)[:256]
    tokens = [*letters, *("".join(pair) for pair in merges), "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return folder


MERGES = [("h", "e"), ("t", "he"), ("Ġ", "the")]  # ids 256 to 258; Ġ is the space


def test_gpt2_files_alone_make_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gpt2_files(tmp_path, MERGES))
    assert len(tokenizer) == 260 and tokenizer.eos_token_id == tokenizer.pad_token_id == 259
    assert tokenizer("the the he")["input_ids"] == [257, 258, ord(" "), 256]
    assert TextEncoder(tokenizer)(["the<|endoftext|>"])[0].tolist() == [257, *b"<|endoftext|>"]
    assert tokenizer("a<|endoftext|>")["input_ids"] == [ord("a"), 259], "the tokenizer itself is left as it was"


def test_tokenizers_that_differ_say_how(tmp_path: Path) -> None:
    first = load_tokenizer(gpt2_files(tmp_path / "a", MERGES))
    fewer = load_tokenizer(gpt2_files(tmp_path / "b", MERGES[:2]))
    moved = load_tokenizer(gpt2_files(tmp_path / "c", [("t", "h"), ("h", "e"), ("Ġ", "t")]))
    (gpt2_files(tmp_path / "d", MERGES) / "merges.txt").write_text("#version: 0.2\nh e\nĠ the\n")
    other_merges = load_tokenizer(tmp_path / "d")
    other_end = load_tokenizer(tmp_path / "a")
    other_end.eos_token = "the"
    assert disagreement(first, load_tokenizer(tmp_path / "a")) is None
    found = {name: disagreement(first, each) for name, each in locals().items() if name in ("fewer", "moved")}
    assert found == {"fewer": "260 tokens and 259", "moved": "token 'he' has id 256, and 257"}
    assert disagreement(first, other_end) == "eos_token is '<|endoftext|>', and 'the'"
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(fewer)
    with pytest.raises(RunError, match="tokenizers of the Teacher and the Student differ: 260 tokens and 259"):
        require_agreement(first, fewer, names=("the Teacher", "the Student"))
    assert (disagreement(first, other_merges) or "").startswith("the same tokens, but")


def trained_file(path: Path, end: str) -> Path:
    """A file as the tokenizers library saves it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet)
    )
    path.parent.mkdir(exist_ok=True)
    made.save(str(path))
    return path


def test_a_file_of_the_tokenizers_library_is_loaded_with_its_usual_end(tmp_path: Path) -> None:
    file = trained_file(tmp_path / "own" / "tokenizer.json", "<eos>")
    for name in (file, file.parent):
        tokenizer = load_tokenizer(name)
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<eos>")
        expected = Tokenizer.from_file(str(file)).encode(WORDS[3]).ids
        assert TextEncoder(tokenizer)([WORDS[3]])[0].tolist() == expected
    unnamed = load_tokenizer(trained_file(tmp_path / "tokenizer.json", "<odd>"))
    assert unnamed.eos_token is None


@pytest.mark.parametrize("place", ["tokenizer.json", "folder/tokenizer.json"])
def test_a_file_that_is_no_tokenizer_is_told_in_a_line(place: str, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text('{"a": 1}')
    with pytest.raises(
        RunError, match=r"tokenizer.json holds no tokenizer that can be loaded: .*; expected a file that"
    ):
        load_tokenizer(tmp_path / place if "/" not in place else (tmp_path / place).parent)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no './nowhere'; expected 'bytes', a tokenizer's folder or file"),
        ("nobody/nothing", "cannot be loaded from the hub: .*; check the name and the network"),
    ],
)
def test_a_tokenizer_that_is_missing(name: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(RunError, match="holds no tokenizer .* received a folder of notes.md; expected what save_pre"):
        load_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------------------- documents


def texts_of(path: Any, **settings: Any) -> tuple[list[str], Counts]:
    """Whole documents, and the counts."""
    documents = read_documents(TextSource(path=path, **settings))
    found, text = [], ""
    for each in documents:
        text += each.text
        if each.ends:
            found.append(text)
            text = ""
    assert not text, "the last document has ended"
    return found, documents.counts


BROKEN = {
    "not JSON": [b"{broken", b'{"text": "cut of', b'{"text": NULL}', b"[" * 100_000],
    "not a JSON object": [b"[1, 2]", b'"text"', b"7"],
    "without text": [b"{}", b'{"text": null}', b'{"txt": "a"}'],
    "text is no string": [b'{"text": 7}', b'{"text": ["a"]}'],
    "not UTF-8": [b'{"text": "\xff\xfe"}', b"\x80", b'{"text": "\\ud800"}'],
    "empty": [b"", b"   ", b'{"text": ""}', b'{"text": " \\n\\t"}'],
    "line of more than 400 bytes": [b'{"text": "' + b"x" * 400 + b'"}', b"y" * 3000],
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_broken_lines_are_counted_by_reason(suffix: str, tmp_path: Path) -> None:
    lines = [b'\xef\xbb\xbf{"text": "first"}']
    for number, broken in enumerate(itertools.chain(*BROKEN.values())):
        lines += [broken, json.dumps({"text": f"good {number}"}).encode()]
    data = b"\n".join(lines)
    file = tmp_path / f"a{suffix}"
    file.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    found, counts = texts_of(file, max_line_bytes=400)
    count = sum(map(len, BROKEN.values()))
    assert found == ["first", *(f"good {number}" for number in range(count))]
    nested = {"not JSON": 3, "line of more than 400 bytes": 3}  # the deep list is too long before it is too deep
    assert counts.skipped == {**{reason: len(each) for reason, each in BROKEN.items()}, **nested}
    assert counts.documents == len(found) and counts.bytes == sum(map(len, found))
    assert counts.examples["not a JSON object"] == f"{file}, document 9: received a list"


def test_deep_json_is_counted_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"[" * 100_000 + b'\n{"text": "good"}\n')
    found, counts = texts_of(tmp_path)
    assert found == ["good"] and counts.skipped == {"not JSON": 1}


def test_a_list_of_objects_in_a_json_file(tmp_path: Path) -> None:
    rows = [{"body": "one"}, {"body": 2}, 3, {"body": "four"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json").write_text("[{")
    (tmp_path / "c.JSON").write_text(json.dumps([{"body": "five"}]))
    found, counts = texts_of(tmp_path, field="body")
    assert found == ["one", "four", "five"]
    assert counts.skipped == {"body is no string": 1, "not a JSON object": 1, "not JSON": 1}


def test_damaged_files_give_what_they_have(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{index} {os.urandom(20).hex()}"}) for index in range(2000)]
    whole = gzip.compress("\n".join(lines).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    (tmp_path / "d.jsonl").write_text('{"text": "last"}')
    (tmp_path / "e.jsonl").touch()
    found, counts = texts_of(tmp_path)
    assert 500 < len(found) < 1500 and found[-1] == "last"
    assert found[:-1] == [json.loads(line)["text"] for line in lines[: len(found) - 1]]
    assert counts.skipped == {"file that cannot be read to its end": 3}


def test_a_document_that_breaks_off_with_its_file_ends_there(tmp_path: Path) -> None:
    data = gzip.compress(os.urandom(4000).hex().encode())
    (tmp_path / "a.txt.gz").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.txt").write_text("next")
    found, counts = texts_of(tmp_path, piece_bytes=64)
    assert len(found) == 2 and len(found[0]) > 1000 and found[1] == "next"
    assert (counts.documents, counts.skipped) == (2, {"file that cannot be read to its end": 1})


def test_parquet(tmp_path: Path) -> None:
    bad = pa.array([b"good", b"\xff", None, b"", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": bad, "n": range(5)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": [1, None]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"other": ["a"] * 7}), tmp_path / "d.parquet")
    pq.write_table(
        pa.table({"text": [f"{index}" * 99 for index in range(4)]}), tmp_path / "e.parquet", row_group_size=2
    )
    data = bytearray((tmp_path / "e.parquet").read_bytes())
    start = pq.ParquetFile(tmp_path / "e.parquet").metadata.row_group(0).column(0).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    (tmp_path / "e.parquet").write_bytes(data)
    found, counts = texts_of(tmp_path)
    assert found == ["good", "fine", "x", "y", "x", "2" * 99, "3" * 99]
    assert counts.skipped == {
        "not UTF-8": 1,
        "without text": 1 + 1 + 7,
        "empty": 1,
        "text is no string": 1,
        "rows of Parquet that cannot be read": 2,
    }


@given(TEXTS, st.sampled_from([", ", "\f", "\n\n"]), st.integers(16, 40))
def test_separated_text_is_what_split_gives(texts: list[str], separator: str, piece_bytes: int) -> None:
    data = separator.join(texts).encode()
    with made_file(".txt", data) as file:
        found, counts = texts_of(file, separator=separator, piece_bytes=piece_bytes)
        whole, _ = texts_of(file, piece_bytes=piece_bytes)
    good = [each for each in data.decode().split(separator) if each.strip() or len(each.encode()) > piece_bytes]
    assert [each for each in found if each.strip()] == [each for each in good if each.strip()]
    assert whole == [data.decode().removeprefix("\ufeff")]
    assert counts.bytes == sum(len(each.encode()) for each in found)


@given(st.text(st.characters(codec="utf-8"), min_size=17, max_size=200).filter(str.strip), st.integers(16, 30))
def test_long_documents_are_read_in_pieces_and_remain_whole(text: str, piece_bytes: int) -> None:
    with made_file(".jsonl", json.dumps({"text": text}).encode()) as file:
        pieces = list(read_documents(TextSource(path=file, piece_bytes=piece_bytes)))
    assert "".join(each.text for each in pieces) == text
    assert [each.ends for each in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(each.text.encode()) for each in pieces) <= piece_bytes


class made_file:
    """A file for a while, since Hypothesis and `tmp_path` do not go together."""

    def __init__(self, suffix: str, data: bytes) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name, f"a{suffix}")
        self.file.write_bytes(data)

    def __enter__(self) -> Path:
        return self.file

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()


def test_short_documents_are_read_as_fast_in_large_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a sentence\n" * 80_000)
    seconds = {}
    for piece_bytes in (1 << 12, 1 << 20):
        start = time.thread_time()
        found, _ = texts_of(tmp_path, separator="\n", piece_bytes=piece_bytes)
        seconds[piece_bytes] = time.thread_time() - start
        assert found == ["a sentence"] * 80_000
    assert seconds[1 << 20] < 4 * seconds[1 << 12]


def test_cutting_before_spaces_leaves_the_tokens_as_they_were(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gpt2_files(tmp_path / "gpt2", MERGES))
    text = "the other, then he; " * 60 + "the end"
    (tmp_path / "a.txt").write_text(text)
    source = TextSource(path=tmp_path / "a.txt", piece_bytes=100)
    cut = corpora.load_corpus(source, tokenizer, None)
    assert cut.tokens.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert cut.counts.cut == cut.counts.documents == 1


def test_a_piece_that_is_not_utf8_is_left_out_and_the_document_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 20 + b"\xff" * 10 + b";next")
    found, counts = texts_of(tmp_path, separator=";", piece_bytes=20)
    assert found == ["a" * 20, "next"] and counts.skipped == {"not UTF-8": 1}


def test_a_document_without_a_good_piece_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff" * 50 + b";first;" + b"\xff" * 50 + b";" + b"\xff" * 9 + b";last")
    made = corpora.load_corpus(TextSource(path=tmp_path, separator=";", piece_bytes=20), BYTES, None)
    assert made.tokens.tolist() == [*b"first", END, *b"last", END]
    assert made.counts.skipped == {"not UTF-8": 3 + 3 + 1}


@pytest.mark.parametrize(
    ("most", "expected"),
    [(4, ["abcd"]), (5, ["abcd"]), (7, ["abcd€"]), (9, ["abcd€", "he"]), (99, ["abcd€", "hello"])],
)
def test_held_out_text_ends_where_a_document_is_cut(most: int, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcd€;hello", encoding="utf-8")
    assert held_out_documents(TextSource(path=tmp_path, separator=";"), most) == expected


def test_held_out_text_that_is_cut_in_a_character_goes_on_with_no_later_piece(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 15 + "€" + "z" * 40, encoding="utf-8")
    assert held_out_documents(TextSource(path=tmp_path, piece_bytes=18), 17) == ["a" * 15]


def test_files_are_read_in_their_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c/z.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path)[0] == ["a.txt", "b.txt", "c/z.txt"]
    assert texts_of(str(tmp_path / "*.txt"))[0] == ["a.txt", "b.txt"]
    assert texts_of((tmp_path / "c", str(tmp_path / "b*")))[0] == ["c/z.txt", "b.txt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "received path=None and hub=None; expected one of them"),
        ({"path": "a", "hub": "b"}, "expected one of them"),
        ({"path": "a", "separator": ""}, "received separator=''; expected text"),
        ({"path": "a", "piece_bytes": 3}, "received piece_bytes=3 .* expected at least 16"),
        ({"path": "nowhere.txt"}, "nowhere.txt leads to no text .no such file or folder.; expected files that end in"),
        ({"path": __file__}, "test_lm_data.py; expected one that ends in .txt"),
        ({"hub": "nobody/nothing"}, "the data set 'nobody/nothing' .* cannot be loaded: .* give local files"),
    ],
)
def test_sources_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        read_documents(TextSource(**settings))


def test_no_document_at_all_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"txt": "a"}\n' * 3)
    with pytest.raises(RunError, match=r"gave no document: 3 skipped \(without text\); for example .* it has txt"):
        PackedTokens(TextSource(path=tmp_path), BYTES, context=4, batch=1)


# --------------------------------------------------------------------------------------------------------- packing


def packed_reference(texts: list[str], context: int) -> list[list[int]]:
    row = [token for text in texts for token in (*text.encode(), END)]
    return [row[start : start + context] for start in range(0, len(row) - context + 1, context)]


def written(folder: Path, texts: list[str], num_files: int = 1, suffix: str = ".jsonl") -> Path:
    """The texts in files, in their order: in the layout of a data set on the hub."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for index in range(num_files):
        part = texts[index * len(texts) // num_files : (index + 1) * len(texts) // num_files]
        name = folder / "data" / f"train-{index:05}-of-{num_files:05}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.table({"text": part}), name)
        else:
            data = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
            name.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    return folder


def pack(path: Path, **settings: Any) -> PackedTokens:
    arguments = {"context": 16, "batch": 3, "passes": 1, **settings}
    tokenizer = arguments.pop("tokenizer", BYTES)
    source = arguments.pop("source", TextSource(path=path))
    return PackedTokens(source, tokenizer, **arguments)


def dealt(packed: Iterator[dict[str, Tensor]]) -> tuple[list[list[int]], list[int]]:
    """All samples and their ids."""
    rows, ids = [], []
    for batch in packed:
        assert isinstance(packed, PackedTokens)
        rows += batch["input_ids"].tolist()
        ids += packed.last_samples.tolist()
    return rows, ids


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("stream", [False, True])
def test_samples_in_order_are_the_documents_one_after_another(suffix: str, stream: bool, tmp_path: Path) -> None:
    path = written(tmp_path, WORDS, 3, suffix)
    rows, ids = dealt(pack(path, stream=stream))
    assert rows == packed_reference(WORDS, 16)
    assert ids == list(range(len(rows)))


def test_the_hubs_data_streamed_is_the_same(tmp_path: Path) -> None:
    path = written(tmp_path, WORDS, 3, ".parquet")
    source = TextSource(hub=str(path), piece_bytes=24)
    assert dealt(pack(path, source=source))[0] == packed_reference(WORDS, 16)


def with_beginning() -> PreTrainedTokenizerBase:
    """As Llama's, which puts a beginning before each text."""
    inner = Tokenizer.from_str(BYTES.backend_tokenizer.to_str())
    inner.add_special_tokens([AddedToken("<s>", special=True)])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|endoftext|>")


@pytest.mark.parametrize("stream", [False, True])
def test_a_beginning_stands_where_the_tokenizer_puts_it_before_texts(stream: bool, tmp_path: Path) -> None:
    tokenizer = with_beginning()
    source = TextSource(path=written(tmp_path, WORDS), piece_bytes=16)  # pieces of a document have one beginning
    packed = pack(tmp_path, source=source, tokenizer=tokenizer, stream=stream, mask_boundaries=True)
    batches = list(packed)
    tokens, labels = (torch.cat([batch[name].flatten() for batch in batches]) for name in ("input_ids", "labels"))
    expected = [token for text in WORDS for token in (*tokenizer(text)["input_ids"], END)]
    assert tokens.tolist() == expected[: len(tokens)]
    is_first = (tokens.roll(1) == 257) & (torch.arange(len(tokens)) % 16 != 0)
    assert torch.equal(labels, tokens.masked_fill(is_first, -100))
    plain = pack(tmp_path, source=source, tokenizer=BYTES, stream=stream)
    assert packed.state_dict()["data"] != plain.state_dict()["data"]
    tokenizer.backend_tokenizer.post_processor = None
    again = pack(tmp_path, source=source, tokenizer=tokenizer, stream=stream)
    assert dealt(again)[0] == packed_reference(WORDS, 16)
    assert packed.fingerprint(order=False) != again.fingerprint(order=False)


@given(TEXTS, st.integers(2, 9))
def test_masks_hide_the_first_token_of_each_document_and_nothing_else(texts: list[str], context: int) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*texts, "filling"]).encode()
    with made_file(".jsonl", lines) as file:
        batches = [list(pack(file, context=context, mask_boundaries=mask)) for mask in (False, True)]
    starts = np.cumsum([0, *(len(text.encode()) + 1 for text in texts)])
    for plain, masked, number in zip(*batches, itertools.count(), strict=False):
        assert torch.equal(plain["labels"], plain["input_ids"])
        places = torch.arange(plain["labels"].numel()).view_as(plain["labels"]) + number * 3 * context
        firsts = torch.isin(places, torch.from_numpy(starts))
        firsts[:, 0] = False  # no position of the sample predicts it
        assert torch.equal(masked["labels"], plain["labels"].masked_fill(firsts, -100))


@given(st.integers(1, 3000), st.integers(0, 9))
def test_a_shuffled_order_has_everything_once(length: int, seed: int) -> None:
    order = Shuffled(length, seed, 1)
    whole = order.at(0, length)
    assert sorted(whole.tolist()) == list(range(length))
    middle = length // 2
    assert order.at(middle, length).tolist() == whole[middle:].tolist()


def test_shuffled_orders_are_fair() -> None:
    where = np.array([Shuffled(20, seed, 0).at(0, 20) for seed in range(1000)])
    counts = np.array([np.bincount(column, minlength=20) for column in where.T])
    chi_square = ((counts - 50) ** 2 / 50).sum()
    assert abs(chi_square - 361) < 5 * (2 * 361) ** 0.5, "each of 20 at each of 20 places, 50 times in the mean"
    after = np.zeros((20, 20))
    np.add.at(after, (where[:, :-1].ravel(), where[:, 1:].ravel()), 1)
    pairs = after[~np.eye(20, dtype=bool)]
    assert abs(((pairs - 50) ** 2 / 50).sum() - 361) < 5 * (2 * 361) ** 0.5, "what follows what: 50 of each pair too"


def shares(path: Path, num_ranks: int, **settings: Any) -> list[list[list[int]]]:
    """For each process the sample ids of each batch."""
    found = []
    for rank in range(num_ranks):
        packed = pack(path, **settings)
        packed.shard(rank, num_ranks)
        found.append([packed.last_samples.tolist() for _ in packed])
        assert len(found[-1]) == len(packed)
    return found


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5), st.integers(1, 3), st.sampled_from([None, 0]))
def test_every_sample_once_a_pass_for_any_number_of_processes(
    num_samples: int, num_ranks: int, batch: int, passes: int, seed: int | None
) -> None:
    with made_file(".txt", b"x" * (4 * num_samples)) as file:
        settings = {"context": 4, "batch": batch, "passes": passes, "seed": seed}
        if num_samples * passes < num_ranks:
            with pytest.raises(RunError, match="samples for .* processes; expected more text"):
                shares(file, num_ranks, **settings)
            return
        ranks = shares(file, num_ranks, **settings)
    assert len({len(batches) for batches in ranks}) == 1, "all take equally many batches"
    in_order = [each for step in zip(*ranks, strict=True) for share in step for each in share]
    for number in range(passes):
        one = in_order[number * num_samples : (number + 1) * num_samples]
        assert sorted(one) == list(range(num_samples))
    sizes = {len(share) for batches in ranks for share in batches[:-1]}
    assert sizes <= {batch} and all(1 <= len(batches[-1]) <= batch + 1 for batches in ranks)


def test_each_pass_has_another_order(tmp_path: Path) -> None:
    path = written(tmp_path, WORDS)
    _, ids = dealt(pack(path, seed=0, passes=2))
    half = len(ids) // 2
    assert sorted(ids[:half]) == sorted(ids[half:]) == list(range(half))
    assert len({tuple(ids[:half]), tuple(ids[half:]), tuple(range(half)), tuple(dealt(pack(path, seed=1))[1])}) == 4


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


MAKERS: dict[str, Callable[[Path], PackedTokens]] = {
    "files": lambda path: pack(path, seed=3, passes=2),
    "files in order": lambda path: pack(path, passes=2),
    "stream": lambda path: pack(path, seed=3, passes=2, stream=True, buffer=5),
    "stream in order": lambda path: pack(path, passes=2, stream=True),
    "hub": lambda path: pack(path, source=TextSource(hub=str(path), piece_bytes=24), seed=3, passes=2, buffer=50),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few documents are many blocks."""
    monkeypatch.setattr(text_streaming, "BLOCK_CHARS", 100)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_resumed_at_any_batch_it_equals_the_uninterrupted_run(
    make: Callable[..., PackedTokens], tmp_path: Path
) -> None:
    path = written(tmp_path, WORDS, 3, ".parquet")
    packed, whole = make(path), []
    for batch in packed:
        whole.append((batch["input_ids"], batch["labels"], packed.last_samples))
    half = len(whole) // 2  # where a pass ends, before which the buffer is emptied
    for stop in (1, half - 1, half, half + 2, len(whole)):
        stopped = make(path)
        for _ in itertools.islice(stopped, stop):
            pass
        resumed = make(path)
        next(resumed)  # what it has done before does not matter
        resumed.load_state_dict(through_a_file(stopped.state_dict()))
        rest = [(batch["input_ids"], batch["labels"], resumed.last_samples) for batch in resumed]
        assert len(rest) == len(whole) - stop
        assert all(
            torch.equal(a, b)
            for ours, theirs in zip(rest, whole[stop:], strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )
        assert resumed.report() == packed.report()


def test_a_document_whose_end_is_broken_ends_also_after_a_resume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(text_streaming, "BLOCK_CHARS", 1)  # so that the end comes in a block of its own
    (tmp_path / "a.txt").write_bytes((b"a" * 20 + b"\xff;") * 8)
    settings = {"source": TextSource(path=tmp_path, separator=";", piece_bytes=20), "context": 3, "batch": 1}
    rows, _ = dealt(pack(tmp_path, **settings))
    assert rows == packed_reference(["a" * 20] * 8, 3)
    for stop in range(0, 50, 7):
        stopped, resumed = (pack(tmp_path, **settings, stream=True) for _ in range(2))
        for _ in itertools.islice(stopped, stop):
            pass
        resumed.load_state_dict(stopped.state_dict())
        assert dealt(resumed)[0] == rows[stop:]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("make", list(MAKERS.values())[2:], ids=list(MAKERS)[2:])
def test_streams_have_every_sample_once_and_all_that_files_have(
    make: Callable[..., PackedTokens], tmp_path: Path
) -> None:
    path = written(tmp_path, WORDS, 1, ".parquet")
    rows, ids = dealt(make(path))
    half = len(ids) // 2
    for part in (slice(0, half), slice(half, None)):
        assert sorted(rows[part]) == sorted(packed_reference(WORDS, 16)), "a pass has each sample once"
    in_order = make(path)._samples.order.startswith("seed None")
    assert sorted(ids) == (sorted([*range(half), *range(half)]) if in_order else list(range(2 * half)))


@pytest.mark.parametrize("num_files", [1, 2, 8])
def test_processes_stream_documents_of_their_own(num_files: int, tmp_path: Path) -> None:
    path = written(tmp_path, [f"{index:04}" for index in range(96)], num_files, ".parquet")
    seen, ids = [], []
    for rank in range(4):
        packed = pack(path, context=5, batch=1, passes=None, stream=True, seed=0, buffer=4)
        packed.shard(rank, 4)
        for batch in itertools.islice(packed, 24):
            seen.append(BYTES.decode(batch["input_ids"][0, :4]))
            ids += packed.last_samples.tolist()
        assert packed.report()["documents"] >= 24
    assert sorted(seen) == [f"{index:04}" for index in range(96)]
    assert sorted(ids) == list(range(96))


def in_processes(
    make: Callable[[], PackedTokens], states: list[dict[str, Any]], num_ranks: int, steps: int
) -> tuple[list[int], list[dict[str, Any]]]:
    """The samples of some steps of several processes in the order of the run, and the states after them."""
    ranks = [make() for _ in range(num_ranks)]
    found: list[list[int]] = []
    for rank, packed in enumerate(ranks):
        packed.shard(rank, num_ranks)
        if states:
            packed.load_state_dicts(states)
    for _ in range(steps):
        batches = [next(packed) and packed.last_samples.tolist() for packed in ranks]
        found += [[batch[place] for batch in batches] for place in range(ranks[0].batch)]
    return [each for row in found for each in row], [through_a_file(packed.state_dict()) for packed in ranks]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("num_files", [1, 6])
@pytest.mark.parametrize(("lanes", "chain"), [(None, [2, 1, 4]), (None, [4, 3, 1]), (3, [1, 2, 3]), (4, [1, 4, 2])])
def test_a_stream_is_one_sequence_for_any_numbers_of_processes(
    num_files: int, lanes: int | None, chain: list[int], tmp_path: Path
) -> None:
    path = written(tmp_path, WORDS, num_files, ".parquet")

    def make(batch: int, lanes: int | None = lanes) -> PackedTokens:
        return pack(path, batch=batch, passes=None, stream=True, seed=2, buffer=8, lanes=lanes)

    seen: list[int] = []
    states: list[dict[str, Any]] = []
    for count in chain:
        ids, states = in_processes(lambda size=12 // count: make(size), states, count, 3)  # type: ignore[misc]
        ranks = [sorted(ids[rank::count]) for rank in range(count)]
        assert sorted(each for rank in ranks for each in rank) == sorted(ids)
        seen += ids
    whole, _ = in_processes(lambda: make(12, lanes or chain[0]), [], 1, 3 * len(chain))
    assert {*seen} == {*whole} and len({*seen}) == len(seen), "none lost, none twice"
    steps = [{*ids} for ids in zip(*[iter(seen)] * 12, strict=True)]
    assert steps == [{*ids} for ids in zip(*[iter(whole)] * 12, strict=True)], "each step has the same samples"


def test_lanes_in_one_process_have_every_sample_once_a_pass(tmp_path: Path) -> None:
    path = written(tmp_path, [f"{index:04}" for index in range(50)], 3)
    packed = pack(path, context=5, passes=2, stream=True, seed=0, buffer=4, lanes=3)
    rows, ids = dealt(packed)
    assert Counter(BYTES.decode(row[:4]) for row in rows) == {f"{index:04}": 2 for index in range(50)}
    assert len({*ids}) == 100 and packed.report()["documents"] == 100 and packed.report()["tokens"] == 500


def test_a_tokenizer_written_in_python_will_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab</s>c", encoding="utf-8")
    tokenizer = ByT5Tokenizer()  # ids are bytes + 3, and its end of text is 1
    assert next(pack(tmp_path, tokenizer=tokenizer, context=8, batch=1))["input_ids"].tolist() == [
        [byte + 3 for byte in b"ab</s>c"] + [1]
    ]
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(ByT5Tokenizer())


@pytest.mark.stress
def test_an_interpreter_ends_while_text_is_being_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words and more " * 100_000)
    code = (
        "from matta.lm.tokens import load_tokenizer as load; from matta.lm.documents import TextSource;"
        "from matta.lm.packing import PackedTokens;"
        f"data = PackedTokens(TextSource(path={str(tmp_path)!r}), load('bytes'), context=16, batch=2, stream=True);"
        "print(next(data)['input_ids'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "torch.Size([2, 16])"), done.stderr


def test_what_cannot_be_resumed_or_shared_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, WORDS)
    state = pack(path, seed=0).state_dict()
    others = {
        "context": pack(path, seed=0, context=8),
        "order": pack(path, seed=1),
        "data": pack(written(tmp_path / "other", WORDS[1:]), seed=0),
        "tokenizer": pack(path, seed=0, tokenizer=load_tokenizer(gpt2_files(tmp_path / "gpt2", MERGES))),
    }
    for name, other in others.items():
        with pytest.raises(
            RunError, match=f"begun with other training text: {'data' if name == 'tokenizer' else name} was"
        ):
            other.load_state_dict(state)
    names = [each.fingerprint() for each in (pack(path, seed=0), *others.values())]
    assert len(set(names)) == 5
    assert pack(path, seed=0, batch=7, mask_boundaries=True).fingerprint() == names[0]
    assert pack(path, seed=1).fingerprint(order=False) == pack(path).fingerprint(order=False) != names[0]
    with pytest.raises(RunError, match="received passes=1 over streamed text in 2 processes"):
        pack(path, stream=True).shard(0, 2)
    begun = pack(path, stream=True)
    next(begun)
    with pytest.raises(RunError, match="text that has been read from; expected it before the first batch"):
        begun.shard(0, 1)
    with pytest.raises(RunError, match="received rank=2 of 2"):
        pack(path).shard(2, 2)
    endless = {"stream": True, "passes": None, "seed": 0}
    half = pack(path, **endless)
    half.shard(1, 2)
    with pytest.raises(RunError, match=r"the state of 1 process\(es\), without lane\(s\) \[0\]; expected those of all"):
        pack(path, **endless).load_state_dict(half.state_dict())
    with pytest.raises(RunError, match="begun with lanes=2, and now it is 3; expected the same"):
        pack(path, **endless, lanes=3).load_state_dict(half.state_dict())
    older = {**half.state_dict(), "order": "seed 0, buffer 2048, 2 processes"}
    with pytest.raises(
        RunError, match="order was 'seed 0, buffer 2048, 2 processes' and is 'seed 0, in windows of 2048'"
    ):
        pack(path, **endless).load_state_dict(older)


def without_end() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 1}, "received context=1; expected at least 2"),
        ({"batch": 0}, "received batch=0; expected at least 1"),
        ({"lanes": 0}, "received lanes=0; expected at least 1"),
        ({"passes": 0}, "received passes=0; expected at least 1, or None"),
        ({"seed": -1}, "received seed=-1; expected 0 or more, or None"),
        ({"context": 10_000}, "the text has 1[0-9]{3} tokens; expected at least context=10000"),
        (
            {"context": 10_000, "stream": True},
            "a pass over the data gave 1[0-9]{3} tokens; expected at least context=10000",
        ),
        ({"source": TextSource(hub="x"), "stream": False}, "received hub= and stream=False"),
        ({"tokenizer": without_end()}, "no end of text .eos_token., which separates documents; name a token"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = written(tmp_path, WORDS)
    with pytest.raises(RunError, match=message):
        next(pack(path, **settings))


def test_an_endless_stream_that_runs_dry_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{broken\n" * 4)
    with pytest.raises(RunError, match=r"a pass over the data gave no document: 4 skipped \(not JSON\)"):
        next(pack(tmp_path, stream=True, passes=None))


@pytest.mark.parametrize(("num_files", "what"), [(1, "documents of each file"), (2, "files")])
def test_a_process_without_text_of_its_own_says_what_its_share_is(num_files: int, what: str, tmp_path: Path) -> None:
    path = written(tmp_path, ["all that there is"], num_files)
    empty = 0 if num_files == 2 else 1  # the first of two files has no line
    packed = pack(path, stream=True, passes=None)
    packed.shard(empty, 2)
    with pytest.raises(RunError, match=f"lane {empty} of 2, one in 2 of the {what}, gave no document"):
        next(packed)


def test_the_report_counts_everything(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abcdefg"}\n{"text": 1}\n{"text": "hi"}\n')
    report = pack(tmp_path, context=4).report()
    sizes = {"documents": 2, "bytes": 9, "cut": 0, "tokens": 11, "samples": 2, "left_over": 3}
    example = {"text is no string": f"{tmp_path}/a.jsonl, document 1: received a int"}
    assert report == {**sizes, "skipped": {"text is no string": 1}, "examples": example}
    streamed = pack(tmp_path, context=4, stream=True)
    assert len(list(streamed)) == 1
    assert streamed.report() == {**report, "samples": None, "left_over": None}


def test_text_is_tokenised_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "text", WORDS)
    rows, _ = dealt(pack(path))
    calls = []
    write = corpora._write

    def counted(*arguments: Any) -> None:
        calls.append(1)
        write(*arguments)

    monkeypatch.setattr(corpora, "_write", counted)
    first = pack(path, cache=tmp_path / "cache")
    again = pack(path, cache=tmp_path / "cache", context=8, seed=4)
    assert len(calls) == 1 and again.report()["documents"] == 40
    assert dealt(first)[0] == rows
    kept = next((tmp_path / "cache").glob("*/tokens.bin"))
    kept.write_bytes(kept.read_bytes()[:-2])
    assert dealt(pack(path, cache=tmp_path / "cache"))[0] == rows and len(calls) == 2, (
        "one that is damaged is made anew"
    )
    written(tmp_path / "text", [*WORDS, "one more that fills a sample"])
    assert len(dealt(pack(path, cache=tmp_path / "cache"))[0]) > len(rows), "other text is tokenised"
    assert pack(path, cache=tmp_path / "cache").fingerprint() == pack(path).fingerprint() != first.fingerprint()


class Side:
    """Threads in the place of processes, which tell each other what `corpora` exchanges."""

    def __init__(self, count: int) -> None:
        self.count, self.own, self.values = count, threading.local(), [None] * count
        self.barrier = threading.Barrier(count, timeout=30)

    def gathered(self, value: Any) -> list[Any]:
        self.values[self.own.rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each gives, or the error that it raises."""

        def begin(rank: int) -> Any:
            self.own.rank = rank
            try:
                return work(rank)
            except RunError as error:
                return str(error)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(begin, range(self.count)))


@pytest.fixture
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Side:
    made = Side(request.param)
    for module in (corpora, processes):
        monkeypatch.setattr(module, "gathered", made.gathered)
    monkeypatch.setattr(corpora, "num_processes", lambda: made.count)
    monkeypatch.setattr(corpora, "process_rank", lambda: made.own.rank)
    return made


@pytest.mark.parametrize("side", [2, 3], indirect=True)
@pytest.mark.parametrize("chars", [1, 40, 300, 10_000])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("begins", [False, True])
def test_processes_together_have_the_tokens_of_one(
    side: Side, chars: int, cached: bool, begins: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vocabulary = {"a": 0, "b": 1, "[END]": 2, "[BEGIN]": 3}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))  # of other letters it knows nothing
    if begins:
        inner.post_processor = TemplateProcessing(single="[BEGIN] $A", special_tokens=[("[BEGIN]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="[BEGIN]", eos_token="[END]")
    texts = ["xxx", "aab", "ab" * 40, "zz", "yyyy" * 20, "b", "a" * 25 + "x" * 30, "z", "xyz", "ba"]
    (tmp_path / "a.txt").write_text(";".join(texts))
    source = TextSource(path=tmp_path / "a.txt", separator=";", piece_bytes=16)
    alone = corpora.load_corpus(source, tokenizer, None)
    assert "".join("ab]["[token] for token in alone.tokens).count("[") == 5 * begins
    writes, write = [], corpora._write
    monkeypatch.setattr(corpora, "_write", lambda *arguments: writes.append(write(*arguments)))
    monkeypatch.setattr(corpora, "BLOCK_CHARS", chars)
    cache = tmp_path / "cache" if cached else None
    for found in side.run(lambda rank: corpora.load_corpus(source, tokenizer, cache, together=True)):
        assert found.tokens.tolist() == alone.tokens.tolist() and found.tokens.dtype == alone.tokens.dtype
        assert (found.fingerprint, found.counts) == (alone.fingerprint, alone.counts)
    assert len(writes) == cached


@pytest.mark.parametrize("side", [2], indirect=True)
def test_an_error_of_one_process_reaches_all(side: Side, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = written(tmp_path / "text", WORDS)
    monkeypatch.setattr(corpora, "BLOCK_CHARS", 100)

    def load(rank: int, **changes: Any) -> Any:
        settings = {"source": TextSource(path=path), "tokenizer": BYTES, "cache": None, **changes}
        return corpora.load_corpus(**settings, together=True)

    other = written(tmp_path / "other", WORDS[1:])
    for found in side.run(lambda rank: load(rank, source=TextSource(path=other if rank else path))):
        assert found.startswith("the processes read different text: documents so far ")
    (tmp_path / "file").touch()
    own, others = side.run(lambda rank: load(rank, cache=tmp_path / ("cache" if rank else "file")))
    assert "file cannot be written: " in own and "process 0 of 2 failed: " in others
    part = corpora._part

    def failing(*arguments: Any) -> Any:
        if side.own.rank == 1:
            raise RunError("no such letter")
        return part(*arguments)

    monkeypatch.setattr(corpora, "_part", failing)
    for cache in (None, tmp_path / "fresh"):
        first, second = side.run(lambda rank, cache=cache: load(rank, cache=cache))  # type: ignore[misc]
        assert (first, second) == ("process 1 of 2 failed: no such letter", "no such letter")


def test_a_cache_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "text", WORDS)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pack(path, cache="~/cache")
    assert list(tmp_path.glob("cache/*/tokens.bin")) and not (tmp_path / "~").exists()


def test_a_cache_in_the_folder_of_the_texts_is_no_text(tmp_path: Path) -> None:
    path = written(tmp_path, WORDS)
    made = [pack(path, cache=path / "cache").report() for _ in range(2)]
    assert made[0] == made[1] and not made[1]["skipped"]
    assert len(list(path.glob("cache/*/tokens.bin"))) == 1
    (path / "corpus.json").write_text('{"text": "one of the user\'s"}')
    assert pack(path, cache=path / "cache").report()["documents"] == len(WORDS) + 1


def test_large_vocabularies_are_kept_in_four_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "text", WORDS)
    words = {f"w{index}": index for index in range(65_600)} | {"[UNK]": 65_600, "[END]": 65_601}
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), eos_token="[END]"
    )
    batch = next(pack(path, tokenizer=plain, cache=tmp_path / "cache", context=4))
    assert batch["input_ids"][0].tolist() == [65_600, 65_601] * 2


def test_text_of_which_the_tokenizer_knows_nothing_is_too_little(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("zzz")
    inner = Tokenizer(models.BPE(vocab={"a": 0, "[END]": 1}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[END]")
    for cache in (None, tmp_path / "fresh"):
        with pytest.raises(RunError, match="the text has 0 tokens; expected at least context=16 of them"):
            pack(tmp_path, tokenizer=tokenizer, cache=cache)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    path = written(tmp_path / "text", WORDS)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file cannot be written: .*; expected a folder with room"):
        pack(path, cache=tmp_path / "file")


# ------------------------------------------------------------------------------------------------------------- hub


def test_a_damaged_file_of_the_hub_is_left_out_from_there(tmp_path: Path) -> None:
    path = written(tmp_path, WORDS, 3, ".jsonl.gz")
    (path / "data" / "train-00001-of-00003.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{broken\n'))
    documents = read_documents(TextSource(hub=str(path)))
    assert [each.text for each in documents] == [*WORDS[:13], *WORDS[26:]]
    assert documents.counts.skipped == {"file that cannot be read to its end": 1}
    assert "file 1 of 3, document 0: ArrowInvalid" in documents.counts.examples["file that cannot be read to its end"]


def test_a_column_that_the_hub_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no column 'body'; expected one of text: say which by field"):
        read_documents(TextSource(hub=str(written(tmp_path, WORDS)), field="body"))


def test_a_lost_connection_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(text_files.time, "sleep", waits.append)
    rows = text_files.HubShards._rows
    lost = iter([5, 2, 0, 0])

    def shaky(self: text_files.HubShards, index: int, skip: int) -> Iterator[Any]:
        last = next(lost, None)
        yield from itertools.islice(rows(self, index, skip), last)
        if last is not None:
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(text_files.HubShards, "_rows", shaky)
    path = written(tmp_path, WORDS)
    assert [each.text for each in read_documents(TextSource(hub=str(path)))] == WORDS
    assert waits == [1.0, 1.0, 4.0, 15.0], "waits grow until a row is read"
    lost = itertools.repeat(0)
    with pytest.raises(RunError, match="cannot be read from row 0 on: ConnectionError: reset by peer; check the net"):
        next(pack(path, source=TextSource(hub=str(path))))


# ------------------------------------------------------------------------------------------------------- matta.fit


class Guess(nn.Module):
    """The next token from the last one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(257, width), nn.Linear(width, 257, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.tokens(input_ids))


class Seen:
    """An observer that notes the samples of each step of a call."""

    def __init__(self, packed: PackedTokens) -> None:
        self.packed, self.ids = packed, []

    def before_step(self, *_: object) -> None:
        self.ids.append(self.packed.last_samples.tolist())

    def after_step(self, *_: object) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def trained(packed: PackedTokens, *, fail_at: int | None = None, **settings: Any) -> tuple[Tensor, list[list[int]]]:
    """Weights, and the samples of each step; with `fail_at` the run breaks off in that step."""
    torch.manual_seed(0)
    nested = matta.nest(Guess(2), Guess(4)).double()
    optimizer = torch.optim.Adam(nested.parameters(), lr=0.01)
    step, count = optimizer.step, itertools.count(1)

    def failing() -> None:
        if next(count) == fail_at:
            raise InterruptedError
        step()

    optimizer.step = failing  # type: ignore[method-assign]
    seen = Seen(packed)
    quiet = {"progress": False, "tensorboard": False, "max_nonfinite": None}
    matta.fit(
        matta.CoTraining(nested, matta.objectives.CausalLM()), packed, optimizer, observers=[seen], **quiet, **settings
    )
    return torch.cat([each.detach().flatten() for each in nested.ta.parameters()]), seen.ids


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("make", list(MAKERS.values())[::2], ids=list(MAKERS)[::2])
def test_a_run_that_breaks_off_sees_every_sample_once(make: Callable[..., PackedTokens], tmp_path: Path) -> None:
    path = written(tmp_path / "text", WORDS, 2, ".parquet")
    weights, ids = trained(make(path))
    flat = list(itertools.chain(*ids))
    assert len(flat) == 2 * len(packed_reference(WORDS, 16)), "two passes"
    assert set(Counter(flat).values()) == ({2} if isinstance(make(path)._samples, packing._Slices) else {1})
    settings = {"run": tmp_path / "run", "checkpoint_every": 3, "resume": True}
    with pytest.raises(InterruptedError):
        trained(make(path), fail_at=8, **settings)
    again, seen = trained(make(path), **settings)
    assert seen == ids[6:], "on from the checkpoint of step 6"
    assert torch.equal(again, weights)


def test_a_run_does_not_go_on_with_other_text(tmp_path: Path) -> None:
    path = written(tmp_path / "text", WORDS)
    trained(pack(path), run=tmp_path / "run")
    with pytest.raises(RunError, match="begun with other training text: data was"):
        trained(pack(written(tmp_path / "text", WORDS[1:])), run=tmp_path / "run", resume=True)


def stream_of(folder: Path, **settings: Any) -> PackedTokens:
    return pack(folder, source=TextSource(hub=str(folder / "text")), seed=3, passes=None, buffer=4, **settings)


def join(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def work(rank: int, port: int, folder: Path) -> None:
    """A process of two."""
    join(rank, 2, port)
    files = pack(folder / "text", seed=3, batch=2, cache=folder / "cache", together=True)
    assert pack(folder / "text", together=True).fingerprint(order=False) == files.fingerprint(order=False)
    weights, ids = trained(files)
    settings = {"run": folder / "run", "checkpoint_every": 3, "resume": True}
    with pytest.raises(InterruptedError):
        trained(pack(folder / "text", seed=3, batch=2), fail_at=5, **settings)
    again, seen = trained(pack(folder / "text", seed=3, batch=2), **settings)
    assert seen == ids[3:] and torch.equal(again, weights)
    streamed, streamed_ids = trained(stream_of(folder, batch=2), steps=6)
    with pytest.raises(InterruptedError):
        trained(stream_of(folder, batch=2), steps=6, fail_at=4, run=folder / "stream", checkpoint_every=1)
    torch.save(
        {"weights": weights, "ids": ids, "streamed": streamed, "streamed_ids": streamed_ids}, folder / f"{rank}.pt"
    )
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_samples(tmp_path: Path) -> None:
    path = written(tmp_path / "text", WORDS, 2, ".parquet")
    multiprocessing.spawn(work, (free_port(), tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in ("weights", "streamed"):
        assert torch.equal(first[name], second[name])
    weights, ids = trained(pack(path, seed=3, batch=4))
    steps = [[*one, *other] for one, other in zip(first["ids"], second["ids"], strict=True)]
    assert steps == ids, "the batches of two are halves of one's"
    torch.testing.assert_close(first["weights"], weights, atol=1e-9, rtol=0)
    streamed = [set(itertools.chain(*each["streamed_ids"])) for each in (first, second)]
    assert not streamed[0] & streamed[1] and len(streamed[0] | streamed[1]) == 2 * 2 * 6
    weights, ids = trained(stream_of(tmp_path, batch=4), steps=6, run=tmp_path / "stream", resume=True)
    assert [{*step} for step in ids] == [
        {*one, *other} for one, other in zip(first["streamed_ids"][3:], second["streamed_ids"][3:], strict=True)
    ], "resumed in one process"
    torch.testing.assert_close(weights, first["streamed"], atol=1e-9, rtol=0)


def go_on(rank: int, world: int, port: int, folder: Path, fail_at: int | None) -> None:
    """A process of a run over streamed text that breaks off, or ends."""
    join(rank, world, port)
    settings = {"run": folder / "chain", "checkpoint_every": 1, "resume": True, "steps": 9}
    with contextlib.nullcontext() if fail_at is None else pytest.raises(InterruptedError):
        weights, _ = trained(stream_of(folder, batch=4 // world), fail_at=fail_at, **settings)
        torch.save(weights, folder / f"chain-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.stress
def test_a_stream_in_two_then_one_then_four_processes_is_one_run(tmp_path: Path) -> None:
    written(tmp_path / "text", WORDS, 2, ".parquet")
    multiprocessing.spawn(go_on, (2, free_port(), tmp_path, 4), nprocs=2)
    with pytest.raises(InterruptedError):
        trained(
            stream_of(tmp_path, batch=4), fail_at=4, run=tmp_path / "chain", checkpoint_every=1, resume=True, steps=9
        )
    multiprocessing.spawn(go_on, (4, free_port(), tmp_path, None), nprocs=4)
    whole, _ = trained(stream_of(tmp_path, batch=4, lanes=2), steps=9)
    for rank in range(4):
        weights = torch.load(tmp_path / f"chain-{rank}.pt", weights_only=True)
        torch.testing.assert_close(weights, whole, atol=1e-9, rtol=0)
