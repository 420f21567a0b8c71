"""Text as batches for a language model: tokenised, packed to the context, shuffled, shared out, and resumed."""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from matta.errors import RunError
from matta.lm.corpora import Corpus, load_corpus
from matta.lm.documents import Documents, TextSource, read_documents
from matta.lm.permutations import Shuffled
from matta.lm.text_streaming import StreamedSamples, StreamSettings
from matta.lm.tokens import Marks, TextEncoder, marks_of, tokenizer_fingerprint

IGNORED: Final = -100
Samples = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Tokens of shape (samples, context), and the ids of the samples."""


class SampleSource(Protocol):
    """Samples in an order, this process's share of them, and the place reached."""

    num_samples: int | None
    data: str
    """A name for the text."""

    @property
    def fingerprint(self) -> str:
        """A name for the samples but for tokenizer and context."""

    @property
    def order(self) -> str:
        """What their order depends on."""

    def shard(self, rank: int, num_ranks: int) -> None:
        """Take this process's share from now on."""

    def take(self, most: int) -> Samples | None:
        """The next samples, for this process; None: there are no more."""

    def num_batches(self, batch: int) -> int | None:
        """How many times `take` gives samples in all."""

    def state_dict(self) -> dict[str, Any]:
        """The place reached."""

    def load_state_dicts(self, states: Sequence[dict[str, Any]], /) -> None:
        """Continue at the place that each of some processes has reached."""

    def report(self) -> dict[str, Any]:
        """What was read and skipped."""


@final
class PackedTokens:
    """An iterator of batches of text for `matta.fit`: `input_ids` and `labels`, int64 of shape (batch, context).

    Documents stand one after another, the tokenizer's end of text after each, and are cut into samples of `context`
    tokens; fewer that are left at the end of the data are not used. Where the tokenizer puts a beginning before each
    text (Llama's, Gemma's), it stands before each document too. Labels are the tokens themselves, as
    `matta.objectives.CausalLM` and Transformers take them.

    Local files are tokenised once, when this is made. A pass takes every sample once; where a pass ends within a
    batch, the next one fills it. Several processes (`shard`; `matta.fit` calls it) have equally many batches and
    share each out between them. Place and order take no memory, and resuming costs nothing.

    With `stream`, and from the hub, documents are tokenised while training continues, on threads of their own. The
    order of the files is shuffled, and so are samples, in windows. The text is read in lanes, from which the samples
    come in turn: one lane a process, unless you set their number. Each lane has files of its own, or, of fewer files
    than lanes, documents of its own. Samples do not depend on the number of processes, but on that of lanes, which a
    resumed run keeps. Continuing reads the files in use up to where they were, and tokenises a window again.

    Args:
        source: The text.
        tokenizer: Of the models that are trained.
        context: Tokens to a sample.
        batch: Samples to a batch, for each process. The last one may be smaller, or, with several processes, by
            one larger.
        seed: For the shuffled order, another one in each pass; None: the order of the data.
        mask_boundaries: Whether the first token of a document, which those before it cannot tell, is no label.
            (What is before it is still seen.)
        passes: Passes over the data, after which there are no more batches; None: without end, as streamed text in
            several processes must be.
        cache: A folder for the tokens of local files, so that they are tokenised once for all runs and processes;
            None: they are kept in memory, 2 bytes each (4 from 65,537 tokens on).
        stream: Whether to tokenise while training continues; by default what is on the hub, and not local files.
        buffer: Samples that are shuffled together in streamed text: a window of a lane. Each lane holds three of them,
            4 bytes a token.
        lanes: Of streamed text; None: as many as the processes in which a run begins. Choose a multiple of the numbers
            of processes that will share them: what does not divide among them is tokenised by several.
        together: Whether all processes of torch.distributed make this at the same place, so that each tokenises its
            share of local text; else each tokenises all of it, or finds it in the cache.

    Raises:
        RunError: settings that cannot work, a tokenizer without an end of text, no file, or too little text.

    Example:
        >>> import tempfile, pathlib
        >>> from matta.lm.tokens import load_tokenizer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "a.txt")
        ...     _ = file.write_text("ab,c,defgh")
        ...     source, tokenizer = TextSource(path=file, separator=","), load_tokenizer("bytes")
        ...     packed = PackedTokens(source, tokenizer, context=4, batch=2, mask_boundaries=True)
        >>> batch = next(packed)
        >>> batch["input_ids"].tolist()
        [[97, 98, 256, 99], [256, 100, 101, 102]]
        >>> batch["labels"].tolist()
        [[97, 98, 256, -100], [256, -100, 101, 102]]
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int,
        batch: int,
        seed: int | None = None,
        mask_boundaries: bool = False,
        passes: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        stream: bool | None = None,
        buffer: int = 2048,
        lanes: int | None = None,
        together: bool = False,
    ) -> None:
        sizes = {"context": context, "batch": batch, "buffer": buffer, "lanes": 1 if lanes is None else lanes}
        _check(tokenizer, passes=passes, seed=seed, **sizes)
        if source.hub is not None and stream is False:
            raise RunError("received hub= and stream=False; a data set of the hub is streamed: leave stream out")
        self.context, self.batch = context, batch
        self.last_samples: Tensor = torch.zeros(0, dtype=torch.int64)
        self._marks, self._mask_boundaries = marks_of(tokenizer), mask_boundaries
        self._tokenizer = tokenizer_fingerprint(tokenizer)
        self._samples: SampleSource
        if stream or source.hub is not None:
            settings = StreamSettings(
                encode=TextEncoder(tokenizer), marks=self._marks, context=context, seed=seed, window=buffer
            )
            documents = read_documents(source)
            about = _about_source(source, documents, self._marks)
            self._samples = StreamedSamples(documents, about, settings, passes=passes, num_lanes=lanes)
        else:
            folder = None if cache is None else Path(cache).expanduser()
            self._samples = _Slices(load_corpus(source, tokenizer, folder, together=together), context, seed, passes)

    @property
    def num_samples(self) -> int | None:
        """Samples to a pass, of all processes, where that is known."""
        return self._samples.num_samples

    def __len__(self) -> int:
        """Batches of this process in all passes.

        Raises:
            TypeError: they are without end, or it is not known.
        """
        if (num_batches := self._samples.num_batches(self.batch)) is None:
            raise TypeError("the number of batches is not known")
        return num_batches

    def __iter__(self) -> PackedTokens:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next batch."""
        taken = self._samples.take(self.batch)
        if taken is None:
            raise StopIteration
        tokens, ids = torch.from_numpy(taken[0]), torch.from_numpy(taken[1])
        self.last_samples = ids
        labels = tokens.clone()
        if self._mask_boundaries:
            labels[:, 1:][tokens[:, :-1] == self._marks.before_text] = IGNORED
        return {"input_ids": tokens, "labels": labels}

    def shard(self, rank: int, num_ranks: int) -> None:
        """Take the share of one of several processes, from 0; all must do so at the same place.

        Raises:
            RunError: there is no such process, or fewer samples than processes.
        """
        if not 0 <= rank < num_ranks:
            raise RunError(f"received rank={rank} of {num_ranks}; expected 0 to {num_ranks - 1}")
        self._samples.shard(rank, num_ranks)

    def fingerprint(self, *, order: bool = True) -> str:
        """A name for the samples: data, tokenizer and context, and with `order` also the order in which they come.

        What is stored of each sample by its id (`last_samples`) fits whenever `fingerprint(order=False)` is the same.
        """
        parts = [self._samples.fingerprint, self._tokenizer, str(self.context), *([self._samples.order] * order)]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """The place after the batch last given out."""
        return {**self._about(), "samples": self._samples.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which the state was taken.

        Raises:
            RunError: it is a state of other data, another tokenizer, context or order, or of one of several processes.
        """
        self.load_state_dicts([state])

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on after the batch at which all processes took these states, in as many processes or others.

        Raises:
            RunError: they are states of other data, another tokenizer, context, order or number of lanes.
        """
        for name, value in self._about().items():
            if (begun := states[0].get(name)) != value:
                raise RunError(
                    f"the run was begun with other training text: {name} was {begun!r} and is {value!r}; "
                    f"expected the same files, tokenizer, context and seed"
                )
        self._samples.load_state_dicts([each["samples"] for each in states])

    def _about(self) -> dict[str, Any]:
        own = self._samples
        return {"order": own.order, "data": own.data, "tokenizer": self._tokenizer, "context": self.context}

    def report(self) -> dict[str, Any]:
        """What was read, and what was skipped and why.

        `documents`, `bytes`, those `cut` into pieces, `tokens`, `samples` to a pass, tokens `left_over`; `skipped`
        by reason, with `examples` of where.
        """
        return self._samples.report()


def _check(tokenizer: PreTrainedTokenizerBase, *, seed: int | None, passes: int | None, **sizes: int) -> None:
    if tokenizer.eos_token_id is None:
        raise RunError(
            "the tokenizer has no end of text (eos_token), which separates documents; name a token of its vocabulary: "
            "tokenizer.eos_token = '...', or \"eos_token\" in its tokenizer_config.json"
        )
    least = {"context": 2, "batch": 1, "buffer": 1, "lanes": 1}
    for name, value in sizes.items():
        if value < least[name]:
            raise RunError(f"received {name}={value}; expected at least {least[name]}")
    if passes is not None and passes < 1:
        raise RunError(f"received passes={passes}; expected at least 1, or None for no end")
    if seed is not None and seed < 0:
        raise RunError(f"received seed={seed}; expected 0 or more, or None for the order of the data")


def _about_source(source: TextSource, documents: Documents, marks: Marks) -> str:
    """What identifies streamed text: names and sizes of local files; of the hub its name and the number of files."""
    files = [] if source.hub is not None else [(file.name, file.stat().st_size) for file in source.files()]
    begin = {} if marks.begin is None else {"begin": marks.begin}
    return json.dumps({**asdict(source), "path": files, "parts": len(documents.shards.names), **begin})


@final
class _Slices:
    """Samples of a corpus that is tokenised. The place is the number of samples that all processes have taken."""

    def __init__(self, corpus: Corpus, context: int, seed: int | None, passes: int | None) -> None:
        self.data, self.fingerprint, self.order = corpus.fingerprint, corpus.fingerprint, f"seed {seed}"
        self.num_samples: int | None = len(corpus.tokens) // context
        if not self.num_samples:
            raise RunError(f"the text has {len(corpus.tokens)} tokens; expected at least context={context} of them")
        self._rows = corpus.tokens[: self.num_samples * context].reshape(-1, context)
        self._num_tokens, self._counts = len(corpus.tokens), corpus.counts
        self._seed, self._passes, self._place = seed, passes, 0
        self._rank, self._num_ranks = 0, 1

    @property
    def _end(self) -> int | None:
        return None if self._passes is None else self._passes * len(self._rows)

    def shard(self, rank: int, num_ranks: int) -> None:
        if self._end is not None and self._end < num_ranks:
            raise RunError(f"the text has {self._end} samples for {num_ranks} processes; expected more text")
        self._rank, self._num_ranks = rank, num_ranks

    def take(self, most: int) -> Samples | None:
        total = self._step(self._place, most)
        if not total:
            return None
        share, more = divmod(total, self._num_ranks)
        start = self._place + self._rank * share + min(self._rank, more)
        ids = self._ids(start, start + share + (self._rank < more))
        self._place += total
        return self._rows[ids].astype(np.int64), ids

    def _step(self, place: int, most: int) -> int:
        """Samples that all processes take together: at the end what is left, if that is one for each."""
        full = most * self._num_ranks
        if self._end is None or (left := self._end - place) >= full + self._num_ranks or left == full:
            return full
        return left if left >= self._num_ranks else 0

    def _ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at places in the row of passes."""
        parts, length = [], len(self._rows)
        while start < stop:
            number, offset = divmod(start, length)
            end = min(offset + stop - start, length)
            if self._seed is None:
                parts.append(np.arange(offset, end, dtype=np.int64))
            else:
                parts.append(Shuffled(length, self._seed, number).at(offset, end))
            start += end - offset
        return np.concatenate(parts)

    def num_batches(self, batch: int) -> int | None:
        if self._end is None:
            return None
        steps, left = divmod(self._end, batch * self._num_ranks)
        return steps + (left >= self._num_ranks)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self._place}

    def load_state_dicts(self, states: Sequence[dict[str, Any]], /) -> None:
        self._place = states[0]["place"]

    def report(self) -> dict[str, Any]:
        left_over = self._num_tokens - self._rows.size
        sizes = {"tokens": self._num_tokens, "samples": len(self._rows), "left_over": left_over}
        return {**self._counts.state_dict(), **sizes}
