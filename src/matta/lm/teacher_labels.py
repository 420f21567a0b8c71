"""A Teacher's top-k labels in files, and batches that carry them.

    teacher.json                  whose labels they are, and of which samples (`About`)
    labels-00000.safetensors ...  of some samples each:
        samples    (n)                 their ids, int64
        tokens     (n, context - 1, k) the likeliest tokens at each position but the first, in the smallest type
        log_probs  (n, context - 1, k) the logarithms of their probabilities, float16
        checks     (n)                 CRC-32 of each sample's id, tokens and log_probs, uint32

A file is written under another name and renamed when it is complete, so that each one that is there is whole. What a
disk has changed since is found by the check of each sample as it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, final
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from matta.errors import DAMAGE, RunError
from matta.lm.packing import IGNORED, PackedTokens
from matta.objectives.labels import TopK
from matta.sizes.storage import checked_file, verify, whole_file

MANIFEST: Final = "teacher.json"
FORMAT: Final = {"format": "matta.teacher", "format_version": 2}
_SHARD_BYTES: Final = 1 << 26


@final
@dataclass(frozen=True, kw_only=True)
class About:
    """What labels are, and what they belong to.

    Args:
        teacher: Its name.
        top: k.
        vocabulary: Tokens that the Teacher's distribution is over.
        tokenizer: `tokenizer_fingerprint` of the data's tokenizer.
        data: `PackedTokens.fingerprint(order=False)`.
        context: Tokens to a sample.
        num_samples: Samples in all files.
        samples_per_shard: Samples in each file but the last.
        precision: What the Teacher was run in: "no" (float32), or "bf16".
        matta: The version that wrote them.
    """

    teacher: str
    top: int
    vocabulary: int
    tokenizer: str
    data: str
    context: int
    num_samples: int
    samples_per_shard: int
    precision: str
    matta: str

    @property
    def num_shards(self) -> int:
        """Files in all."""
        return -(-self.num_samples // self.samples_per_shard)

    @property
    def token_type(self) -> np.dtype[Any]:
        """The smallest type that holds every token."""
        fitting = (each for each in ("u1", "u2", "i4") if self.vocabulary <= np.iinfo(each).max + 1)
        return np.dtype(next(fitting))

    def rows_of(self, shard: int) -> int:
        """Samples in one file."""
        return min(self.samples_per_shard, self.num_samples - shard * self.samples_per_shard)


def samples_per_shard(top: int, vocabulary: int, context: int, batch: int) -> int:
    """Whole batches of samples to a file of some 64 MB."""
    sizes = 2 + (1 if vocabulary <= 1 << 8 else 2 if vocabulary <= 1 << 16 else 4)
    return max(1, _SHARD_BYTES // (batch * (context - 1) * top * sizes)) * batch


def is_stored(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder of labels; an empty one, a recipe's word for no Teacher, is not the present folder."""
    return bool(os.fspath(path)) and (Path(path).expanduser() / MANIFEST).is_file()


def read_about(path: Path) -> About:
    """What the labels in a folder are.

    Raises:
        RunError: the folder holds none, or its manifest is damaged or of another version.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise RunError(f"{path} holds no labels: there is no {MANIFEST}; expected a folder that matta teach wrote")
    try:
        verify(path, MANIFEST)
        values = json.loads(file.read_text(encoding="utf-8"))
        found = {name: values.pop(name, None) for name in FORMAT}
        if found != FORMAT:
            raise RunError(
                f"{file} is of {found}; expected {FORMAT}: write the labels again with this version of matta"
            )
        return _checked_about(About(**values))
    except DAMAGE as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{file} is damaged: {error}; write the labels again: matta teach, into a new folder") from None


def _checked_about(about: About) -> About:
    for each in fields(about):
        value = getattr(about, each.name)
        if type(value).__name__ != each.type:
            raise TypeError(f"{each.name} is {value!r}")
    if min(about.top, about.vocabulary, about.context - 1, about.num_samples, about.samples_per_shard) < 1:
        raise ValueError("numbers below 1")
    if about.vocabulary > 1 << 31:
        raise ValueError(f"a vocabulary of {about.vocabulary:,}")
    return about


def begin(path: Path, about: About) -> None:
    """Make the folder, or find it begun with just these labels.

    Raises:
        RunError: it holds something else.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        path.mkdir(parents=True, exist_ok=True)
        with checked_file(path / MANIFEST) as made:
            made.write_text(json.dumps({**FORMAT, **asdict(about)}, indent=1) + "\n", encoding="utf-8")
        return
    if not is_stored(path):
        raise RunError(f"{path} exists and holds no labels; expected a new folder: choose another name for --out")
    before, now = asdict(read_about(path)), asdict(about)
    for name, value in now.items():
        if before[name] != value and name != "matta":
            raise RunError(
                f"{path} was begun with {name} = {before[name]!r}, and now it is {value!r}; expected the same, or a "
                f"new folder: choose another name for --out"
            )


def shard_file(path: Path, shard: int) -> Path:
    """Where a shard is."""
    return path / f"labels-{shard:05d}.safetensors"


def write_shard(path: Path, shard: int, about: About, samples: NDArray[np.int64], labels: TopK) -> None:
    """Write a file that is whole or not there; the labels are of all positions but the first.

    Raises:
        RunError: it cannot be written.
    """
    file = shard_file(path, shard)
    arrays = {
        "samples": samples,
        "tokens": labels.indices.numpy().astype(about.token_type),
        "log_probs": labels.log_probs.numpy().astype(np.float16),
    }
    checks = [_check(*each) for each in zip(*arrays.values(), strict=True)]
    arrays["checks"] = np.array(checks, dtype=np.uint32)
    try:
        with whole_file(file) as made:
            save_file({name: np.ascontiguousarray(each) for name, each in arrays.items()}, made)
    except SafetensorError as error:  # also of a disk that is full
        raise RunError(
            f"{file} cannot be written: {error}; make room for it, and run the same matta teach again, which continues "
            f"with the files that are missing"
        ) from None


def _check(sample: np.int64, tokens: NDArray[Any], log_probs: NDArray[Any]) -> int:
    """CRC-32 of a sample's id, tokens and log-probabilities."""
    found = 0
    for part in (sample, tokens, log_probs):
        found = crc32(part.tobytes(), found)
    return found


@final
class StoredTeacher:
    """A Teacher's labels in a folder of `matta teach`. The files are mapped into memory, not read.

    Raises:
        RunError: the folder holds no labels, or a file of them is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.about = read_about(self.path)
        self._files = [self._open(shard) for shard in range(self.about.num_shards)]
        ids = [file.get_tensor("samples") for file in self._files]
        joined = np.concatenate(ids)
        self._order = np.argsort(joined, kind="stable")
        self._sorted = joined[self._order]

    def labels(self, samples: Int[Tensor, " batch"], observed: Int[Tensor, "batch context"] | None = None) -> TopK:
        """The labels of samples, for `matta.objectives.CausalLM`.

        Args:
            samples: Their ids, as in `PackedTokens.last_samples`.
            observed: Hard labels, which say what comes next in the text and what is ignored.

        Raises:
            RunError: a sample has no labels.
        """
        read = [self._read(row) for row in self._rows(samples.numpy())]
        about, shape = self.about, (len(read), 1, self.about.top)
        tokens = torch.from_numpy(np.stack([each[0] for each in read]).astype(np.int64))
        log_probs = torch.from_numpy(np.stack([each[1] for each in read]))
        # The Teacher says nothing of the first token, for which nothing is predicted either.
        tokens = torch.cat([torch.arange(about.top).expand(shape), tokens], 1)
        log_probs = torch.cat([torch.full(shape, -np.inf, dtype=log_probs.dtype), log_probs], 1)
        observed = tokens[..., 0].clone() if observed is None else observed.clone()
        observed[:, 0] = IGNORED
        return TopK(tokens, log_probs, observed)

    def _open(self, shard: int) -> Any:
        file = shard_file(self.path, shard)
        if not file.is_file():
            raise RunError(
                f"{file} is missing, of {self.about.num_shards} files; expected all: run the same matta teach again, "
                f"which writes those that are missing"
            )
        rows, positions = self.about.rows_of(shard), self.about.context - 1
        shape = [rows, positions, self.about.top]
        expected = {"samples": [rows], "tokens": shape, "log_probs": shape, "checks": [rows]}
        try:
            opened = ExitStack().enter_context(safe_open(file, framework="np"))
            found = {name: opened.get_slice(name).get_shape() for name in expected}
            kinds = [opened.get_slice(name).get_dtype() for name in expected]
        except (SafetensorError, OSError) as error:
            raise RunError(f"{file} is damaged: {error}; delete it, and run the same matta teach again") from None
        token_type = {"u1": "U8", "u2": "U16", "i4": "I32"}[self.about.token_type.str[1:]]
        if found != expected or kinds != ["I64", token_type, "F16", "U32"]:
            raise RunError(
                f"{file} holds {found} of {', '.join(kinds)}, and {MANIFEST} says {expected}; delete it, and run matta "
                f"teach again"
            )
        return opened

    def _rows(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        places = np.searchsorted(self._sorted, samples).clip(max=len(self._sorted) - 1)
        if (strange := samples[self._sorted[places] != samples]).size:
            raise RunError(
                f"{self.path} has no labels of sample {strange[0]}, but of {len(self._sorted)} others; expected those "
                f"of all samples trained on: run matta teach with the recipe as it is now, into a new folder"
            )
        return self._order[places]

    def _read(self, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The tokens and log-probabilities of the sample at a place in all files.

        Raises:
            RunError: they are not what was written.
        """
        shard, place = divmod(int(row), self.about.samples_per_shard)
        names = ("samples", "tokens", "log_probs", "checks")
        sample, tokens, log_probs, check = (self._files[shard].get_slice(name)[place] for name in names)
        if _check(sample, tokens, log_probs) != int(check):
            file = shard_file(self.path, shard)
            raise RunError(
                f"{file} is damaged: the labels of sample {int(sample)} are not those that were written; delete it, "
                f"and run the same matta teach again"
            )
        return tokens, log_probs


def with_teacher(packed: PackedTokens, stored: StoredTeacher) -> TaughtTokens:
    """The batches of `packed`, whose labels are the Teacher's for just these samples; what they ignore stays ignored.

    Raises:
        RunError: the labels were written for other text, another tokenizer or another context.
    """
    return TaughtTokens(packed, stored)


@final
class TaughtTokens:
    """An iterator of batches with a Teacher's labels, for `matta.fit`; see `with_teacher`.

    It keeps no place of its own: labels are found by the ids of the samples, in whatever order, process or pass.
    """

    def __init__(self, packed: PackedTokens, stored: StoredTeacher) -> None:
        self.packed, self.stored = packed, stored
        self._require_fit()
        self._is_checked = True

    def __iter__(self) -> TaughtTokens:
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch.

        Raises:
            RunError: the text is streamed, and has other samples in as many lanes.
        """
        if not self._is_checked:
            self._require_fit()
            self._is_checked = True
        batch = next(self.packed)
        return {**batch, "labels": self.stored.labels(self.packed.last_samples, batch["labels"])}

    def __len__(self) -> int:
        """Batches of this process in all passes.

        Raises:
            TypeError: they are without end, or it is not known.
        """
        return len(self.packed)

    def shard(self, rank: int, num_ranks: int) -> None:
        """Take the share of one of several processes.

        Raises:
            RunError: as `PackedTokens.shard`.
        """
        self.packed.shard(rank, num_ranks)
        self._is_checked = False

    def state_dict(self) -> dict[str, Any]:
        """The place after the batch last given out."""
        return {**self.packed.state_dict(), "teacher": self._name()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch at which the state was taken.

        Raises:
            RunError: it is a state of other text, or of other labels.
        """
        self.load_state_dicts([state])

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on after the batch at which all processes took these states, in as many processes or others.

        Raises:
            RunError: they are states of other text, or of other labels.
        """
        if (begun := states[0].get("teacher", "no Teacher")) != self._name():
            raise RunError(
                f"the run was begun with the labels of {begun}, and now they are of {self._name()}; expected the same"
            )
        self.packed.load_state_dicts(
            [{name: value for name, value in state.items() if name != "teacher"} for state in states]
        )

    def _name(self) -> str:
        about = self.stored.about
        return f"{about.teacher}, top {about.top}"

    def _require_fit(self) -> None:
        about, stored = self.stored.about, self.stored.path
        state = self.packed.state_dict()
        for name, what in (("context", "data.context"), ("tokenizer", "a tokenizer named")):
            if state[name] != getattr(about, name):
                raise RunError(
                    f"the labels in {stored} were written with {what} {getattr(about, name)}, and the data has "
                    f"{state[name]}; expected the same: write labels for this recipe with matta teach"
                )
        if self.packed.fingerprint(order=False) != about.data:
            raise RunError(
                f"the labels in {stored} were written for other text (or, if it is streamed, another seed or number of "
                f"lanes); expected the same: write labels for this recipe, with data.lanes set, with matta teach"
            )
