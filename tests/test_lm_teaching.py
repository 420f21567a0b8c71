"""Teachers of language models: stored labels are those of just the samples they come with, and what does not fit."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import matta
from matta.errors import RunError
from matta.lm import teacher_labels, teaching
from matta.lm.command_settings import TeachSettings
from matta.lm.documents import TextSource
from matta.lm.folders import export
from matta.lm.packing import IGNORED, PackedTokens
from matta.lm.teacher_labels import MANIFEST, About, StoredTeacher, begin, with_teacher
from matta.lm.teaching import Teacher, load_teacher
from matta.lm.tokens import load_tokenizer
from matta.objectives.labels import TopK
from matta.sizes.storage import add_checksums

BYTES, CONTEXT, TOP = load_tokenizer("bytes"), 8, 5
TEXT = "\f".join(f"Document {index} is about {'cats' if index % 3 else 'dogs'} and {index**3}." for index in range(20))
RECIPE = """
[model]
architecture = "gpt2"
student = { n_layer = 1, n_embd = 8, n_head = 2, n_positions = 8 }
ta = { n_layer = 2 }
[data]
train = { path = "PATH", separator = "\\f" }
tokenizer = "bytes"
context = 8
mask_boundaries = true
[train]
steps = 10
batch = 4
learning_rate = 0.01
"""


def gpt2(seed: int = 0, **sizes: int) -> GPT2LMHeadModel:
    """A tiny decoder whose logits differ from one another, without dropout."""
    torch.manual_seed(seed)
    settings = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": CONTEXT, "vocab_size": len(BYTES), **sizes}
    config = GPT2Config(**settings, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=256, eos_token_id=256)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(40)
    return model


@functools.cache
def teacher_model() -> GPT2LMHeadModel:
    return gpt2()


def save(model: GPT2LMHeadModel, path: Path, tokenizer: Any = BYTES) -> str:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, a recipe, a Teacher, and its labels in several files."""
    path = tmp_path_factory.mktemp("teaching")
    (path / "text.txt").write_text(TEXT)
    (path / "recipe.toml").write_text(RECIPE.replace("PATH", str(path / "text.txt")))
    save(gpt2(), path / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_labels, "_SHARD_BYTES", 4 * 8 * (CONTEXT - 1) * TOP * 4)
        teaching.run(settings(path))
    return path


def settings(path: Path, **changes: Any) -> TeachSettings:
    values = {"recipe": path / "recipe", "teacher": str(path / "teacher"), "top": TOP, "out": path / "labels"}
    return TeachSettings(**{**values, **changes})


def packed(path: Path, *, batch: int = 3, context: int = CONTEXT, **options: Any) -> PackedTokens:
    source = TextSource(path=path / "text.txt", separator="\f")
    options = {"seed": 1, "mask_boundaries": True, "passes": 2, **options}
    return PackedTokens(source, BYTES, context=context, batch=batch, **options)


def taught(path: Path, **options: Any) -> teacher_labels.TaughtTokens:
    return with_teacher(packed(path, **options), StoredTeacher(path / "labels"))


def assert_in_step(batch: dict[str, Any]) -> None:
    """The labels are the Teacher's for just this text, worked out anew."""
    ids, labels = batch["input_ids"], batch["labels"]
    assert isinstance(labels, TopK)
    with torch.no_grad():
        log_probs = teacher_model()(ids).logits.log_softmax(-1)[:, :-1]
    expected = log_probs.topk(TOP)
    assert torch.equal(labels.indices[:, 1:], expected.indices)
    torch.testing.assert_close(labels.log_probs[:, 1:].float(), expected.values, rtol=1e-3, atol=1e-3)
    after_end = torch.cat([torch.ones(len(ids), 1, dtype=torch.bool), ids[:, :-1] == 256], 1)
    assert torch.equal(labels.observed, ids.masked_fill(after_end, -100))


# ------------------------------------------------------------------------ in step with the data


def test_labels_belong_to_their_samples_in_every_pass_of_a_shuffled_order(folder: Path) -> None:
    data = taught(folder)
    seen = []
    for batch in data:
        assert_in_step(batch)
        seen += data.packed.last_samples.tolist()
    num_samples = data.packed.num_samples
    assert num_samples is not None and num_samples > 60
    assert sorted(seen) == sorted([*range(num_samples)] * 2)
    assert seen[:num_samples] != seen[num_samples:]
    assert len(data) == -(-num_samples * 2 // 3)


def test_labels_stay_in_step_after_a_resume_and_in_two_processes(folder: Path) -> None:
    shares: list[list[int]] = []
    for rank in range(2):
        data = taught(folder)
        data.shard(rank, 2)
        shares.append([])
        for _ in range(4):
            next(data)
            shares[rank] += data.packed.last_samples.tolist()
        again = taught(folder)
        again.shard(rank, 2)
        again.load_state_dict(json.loads(json.dumps(data.state_dict())))
        for batch, same in zip(data, again, strict=True):
            assert_in_step(same)
            assert torch.equal(batch["input_ids"], same["input_ids"])
            assert torch.equal(batch["labels"].log_probs, same["labels"].log_probs)
    assert not {*shares[0]} & {*shares[1]}


def test_streamed_text_has_labels_by_the_ids_of_its_samples(folder: Path, tmp_path: Path) -> None:
    def stream(seed: int = 3) -> PackedTokens:
        return packed(folder, batch=4, seed=seed, passes=None, stream=True, buffer=16)

    teacher = load_teacher(str(folder / "teacher"), BYTES)
    about = About(**{**vars(StoredTeacher(folder / "labels").about), "num_samples": 40, "samples_per_shard": 16})
    about = About(**{**vars(about), "data": stream().fingerprint(order=False)})
    begin(tmp_path / "labels", about)
    labelled = stream()
    assert teaching._write(settings(folder, out=tmp_path / "labels"), about, labelled, teacher) == 3
    expected = stream()
    for _ in range(10):
        next(expected)
    assert torch.equal(labelled.last_samples, expected.last_samples), "no more text was labelled than is kept"
    data = with_teacher(stream(), StoredTeacher(tmp_path / "labels"))
    for _ in range(10):
        assert_in_step(next(data))
    with pytest.raises(RunError, match=r"has no labels of sample \d+, but of 40 others; expected .* matta teach with"):
        next(data)
    with pytest.raises(RunError, match="other text .*if it is streamed, another seed or number of lanes"):
        with_teacher(stream(seed=4), StoredTeacher(tmp_path / "labels"))


def test_a_run_trained_on_stored_labels_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    def pair() -> matta.CoTraining:
        nested = matta.nest(gpt2(1), gpt2(2, n_inner=64), layers={"transformer.h": "first"})
        return matta.CoTraining(nested, matta.objectives.CausalLM(), accumulate=2)

    def train(steps: int, data: teacher_labels.TaughtTokens, **options: Any) -> dict[str, Tensor]:
        cotrain = pair()
        optimizer = torch.optim.AdamW(cotrain.nested.parameters(), lr=1e-2)
        matta.fit(cotrain, data, optimizer, steps=steps, progress=False, tensorboard=False, **options)
        return dict(cotrain.nested.ta.named_parameters())

    whole = train(6, taught(folder))
    train(3, taught(folder), run=tmp_path / "run")
    again = train(6, taught(folder), run=tmp_path / "run", resume=True)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    other = StoredTeacher(folder / "labels")
    other.about = About(**{**vars(other.about), "teacher": "another"})
    with pytest.raises(RunError, match="begun with the labels of .*teacher, top 5, and now they are of another, top 5"):
        train(7, with_teacher(packed(folder), other), run=tmp_path / "run", resume=True)


def test_bf16_and_evaluation_take_stored_labels(folder: Path) -> None:
    nested = matta.nest(gpt2(1), gpt2(2, n_inner=64))
    cotrain = matta.CoTraining(nested, matta.objectives.CausalLM(fused=True))
    batches = list(taught(folder))[:3]
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.1)
    result = matta.fit(cotrain, batches, optimizer, steps=3, precision="bf16", progress=False)
    assert all(value > 0 for value in result.losses.values())
    nested.requires_grad_(False)
    judge = matta.Evaluation(data=batches, objective=matta.objectives.CausalLM())
    expected = [
        matta.objectives.CausalLM().cross_entropy(nested.ta(b["input_ids"]).logits, b["labels"]) for b in batches
    ]
    counts = [int((b["labels"].observed[:, 1:] != IGNORED).sum()) for b in batches]
    mean = sum(count * float(loss) for count, loss in zip(counts, expected, strict=True)) / sum(counts)
    assert judge(nested)["ta_loss"] == pytest.approx(mean, rel=1e-5)
    with pytest.raises(RunError, match="metrics, and data whose labels are a Teacher's top k"):
        matta.Evaluation(data=batches, metrics={"any": Metric()})(nested)


class Metric:
    def update(self, logits: Tensor, labels: Tensor) -> None: ...
    def compute(self) -> float:
        return 0.0

    def reset(self) -> None: ...


def test_labels_of_all_tokens_are_the_teachers_distribution(folder: Path, tmp_path: Path) -> None:
    teaching.run(settings(folder, top=257, out=tmp_path / "labels"))
    batch = next(with_teacher(packed(folder), StoredTeacher(tmp_path / "labels")))
    objective, student = matta.objectives.CausalLM(), gpt2(5)(batch["input_ids"]).logits
    soft = objective.teach(gpt2()(batch["input_ids"]).logits, batch["labels"])
    found, expected = objective.cross_entropy(student, batch["labels"]), objective.cross_entropy(student, soft)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


# ------------------------------------------------------------------------ files


def test_a_killed_run_goes_on_with_the_files_that_are_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = folder / "labels", tmp_path / "labels"
    shutil.copytree(whole, out)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == StoredTeacher(whole).about.num_shards > 2
    for file in (files[1], files[-1]):
        file.unlink()
    (out / ".labels-00001.safetensors.part").write_bytes(b"half")
    monkeypatch.setattr(teacher_labels, "_SHARD_BYTES", 4 * 8 * (CONTEXT - 1) * TOP * 4)
    result = teaching.run(settings(folder, out=out))
    assert (result["files_written_now"], result["files"]) == (2, len(files))
    assert {each.name for each in out.iterdir()} == {each.name for each in whole.iterdir()}
    assert all(file.read_bytes() == (whole / file.name).read_bytes() for file in files)
    assert teaching.run(settings(folder, out=out))["files_written_now"] == 0


def test_the_manifest_says_what_the_labels_are(folder: Path) -> None:
    about = json.loads((folder / "labels" / MANIFEST).read_text())
    data = packed(folder)
    assert (about["top"], about["vocabulary"], about["context"]) == (TOP, 257, CONTEXT)
    assert (about["num_samples"], about["data"]) == (data.num_samples, data.fingerprint(order=False))
    assert (about["teacher"], about["matta"]) == (str(folder / "teacher"), matta.__version__)
    assert StoredTeacher(folder / "labels").about.token_type.itemsize == 2
    for vocabulary, size in ((256, 1), (65_536, 2), (65_537, 4)):
        assert (
            About(**{**vars(StoredTeacher(folder / "labels").about), "vocabulary": vocabulary}).token_type.itemsize
            == size
        )


def damaged(folder: Path, tmp_path: Path, kind: str) -> Path:
    out = tmp_path / "labels"
    shutil.copytree(folder / "labels", out)
    file, manifest = sorted(out.glob("*.safetensors"))[1], out / MANIFEST
    values = json.loads(manifest.read_text())
    if kind == "missing":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif kind == "other":
        shutil.copy(sorted(out.glob("*.safetensors"))[-1], file)
    elif kind == "empty":
        shutil.rmtree(out)
    else:
        values |= {"format_version": 9} if kind == "version" else {"speed": 1}
        values |= {"teacher": "another"} if kind == "flipped" else {}
        manifest.write_text("{" if kind == "no JSON" else json.dumps(values))
        if kind != "flipped":
            add_checksums(out, MANIFEST)
    return out


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "labels-00001.safetensors is missing, of .* files; expected all: run the same matta teach again"),
        ("cut", "labels-00001.safetensors is damaged: .*; delete it"),
        ("other", "labels-00001.safetensors holds .*, and teacher.json says .*; delete it"),
        ("empty", "holds no labels: there is no teacher.json; expected a folder that matta teach wrote"),
        ("version", "is of .*'format_version': 9.*; expected"),
        ("unknown", "teacher.json is damaged: .*speed.*; write the labels again"),
        ("flipped", "teacher.json is damaged: .*checksum.*; write the labels again"),
        ("no JSON", "teacher.json is damaged: .*; write the labels again"),
    ],
)
def test_what_is_missing_or_damaged_is_said_in_a_line(folder: Path, tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(RunError, match=message) as raised:
        StoredTeacher(damaged(folder, tmp_path, kind))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["tokens", "log_probs", "checks"])
def test_a_bit_that_a_disk_has_changed_is_found(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "labels"
    shutil.copytree(folder / "labels", out)
    file = sorted(out.glob("*.safetensors"))[1]
    arrays = load_file(file)
    arrays[name].view(np.uint8).reshape(-1)[-3] ^= 4  # of the last sample
    save_file(arrays, file)
    labels = StoredTeacher(out)
    labels.labels(torch.from_numpy(arrays["samples"][:-1]))
    with pytest.raises(RunError, match=r"labels-00001.safetensors is damaged: the labels of sample \d+ are not"):
        labels.labels(torch.from_numpy(arrays["samples"][-1:]))


def test_labels_that_cannot_be_written_are_said_in_a_line(folder: Path, tmp_path: Path) -> None:
    about = StoredTeacher(folder / "labels").about
    labels = TopK(*(torch.zeros(1, CONTEXT - 1, TOP) for _ in range(3)))
    with pytest.raises(RunError, match="labels-00000.safetensors cannot be written: .*; make room for it, and run"):
        teacher_labels.write_shard(tmp_path / "gone", 0, about, np.zeros(1, np.int64), labels)


def test_labels_of_other_data_are_refused(folder: Path, tmp_path: Path) -> None:
    labels = StoredTeacher(folder / "labels")
    (tmp_path / "text.txt").write_text(TEXT.upper())
    with pytest.raises(RunError, match="written for other text.*write labels for this recipe"):
        with_teacher(packed(tmp_path), labels)
    with pytest.raises(RunError, match=r"written with data.context 8, and the data has 4; expected the same"):
        with_teacher(packed(folder, context=4), labels)
    source = TextSource(path=folder / "text.txt")
    with pytest.raises(RunError, match="written with a tokenizer named .*, and the data has"):
        with_teacher(PackedTokens(source, other_tokenizer(), context=CONTEXT, batch=2), labels)


def test_a_folder_that_holds_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="was begun with top = 5, and now it is 3; expected the same, or a new folder"):
        teaching.run(settings(folder, top=3))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "thesis.tex").touch()
    with pytest.raises(
        RunError, match="exists and holds no labels; expected a new folder: choose another name for --o"
    ):
        teaching.run(settings(folder, out=tmp_path / "labels"))
    with pytest.raises(RunError, match="--top 258: the tokenizer has 257 tokens; expected at most as many"):
        teaching.run(settings(folder, top=258, out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------ online


def other_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and one token more."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens(["extra"])
    return tokenizer


@pytest.mark.parametrize("sizes", [(257, 257), (264, 257), (264, 260), (257, 260)])
def test_a_teacher_at_hand_gives_the_students_logits(tmp_path: Path, sizes: tuple[int, int]) -> None:
    ours, theirs = sizes[1], sizes[0]
    teacher = load_teacher(save(gpt2(vocab_size=theirs), tmp_path / "teacher"), BYTES, num_classes=ours)
    assert isinstance(teacher, Teacher)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    nested = matta.nest(gpt2(1, vocab_size=ours), gpt2(2, n_inner=64, vocab_size=ours))
    ids = torch.randint(256, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    out = matta.CoTraining(nested, matta.objectives.CausalLM(), teacher=teacher)({"input_ids": ids, "labels": ids})
    probs = gpt2(vocab_size=theirs)(ids).logits[:, :-1, : len(BYTES)].softmax(-1)  # as those that are stored
    log_probs = nested.ta(ids).logits[:, :-1].log_softmax(-1)[..., : probs.shape[-1]]
    torch.testing.assert_close(out.ta_loss, -(probs * log_probs).sum(-1).mean())


def test_a_build_for_gpus_labels_on_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def current_accelerator(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert teaching._device() == torch.device("cpu")


def test_a_teacher_whose_weights_are_cut_off_is_refused(tmp_path: Path) -> None:
    name = save(gpt2(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(RunError, match="the Teacher .* cannot be loaded: .*incomplete.*; expected a decoder"):
        load_teacher(name, BYTES)


def test_a_teacher_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    name = save(gpt2(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"has no weights for transformer.h.0.mlp.c_fc.weight \(1 such\), and"):
        load_teacher(name, BYTES)


def test_a_teacher_or_its_labels_may_be_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert load_teacher("~/teacher", BYTES).num_classes == 257
    assert teacher_labels.is_stored("~/labels") and StoredTeacher("~/labels").path == folder / "labels"


def test_a_teacher_that_gives_nan_writes_no_labels(folder: Path, tmp_path: Path) -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight[3] = torch.nan
    teacher = settings(folder, teacher=save(model, tmp_path / "teacher"), out=tmp_path / "labels")
    with pytest.raises(RunError, match=r"gives logits that are not finite \(precision no\); expected numbers"):
        teaching.run(teacher)
    assert [each.name for each in (tmp_path / "labels").glob("*[!S]")] == [MANIFEST]


def test_no_teacher_is_not_the_labels_of_the_present_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "labels")
    assert teacher_labels.is_stored(".") and not teacher_labels.is_stored("")


def test_teachers_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match="the tokenizers of .*other and the data differ: 258 tokens and 257; expected one"
    ):
        load_teacher(save(gpt2(vocab_size=258), tmp_path / "other", other_tokenizer()), BYTES)
    with pytest.raises(RunError, match="the tokenizers of .*other and the data differ"):
        teaching.run(settings(folder, teacher=str(tmp_path / "other"), out=tmp_path / "labels"))
    with pytest.raises(
        RunError, match="has logits of 200 tokens, and the tokenizer has 257; expected at least as many"
    ):
        load_teacher(save(gpt2(vocab_size=200), tmp_path / "small"), BYTES)
    BYTES.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(
        RunError, match="cannot be loaded: .*; expected a decoder: a folder of Transformers, or a name on"
    ):
        load_teacher(str(tmp_path / "tokenizer"), BYTES)
    save(gpt2(n_positions=4), tmp_path / "short")
    with pytest.raises(RunError, match="4 positions"):
        teaching.run(settings(folder, teacher=str(tmp_path / "short"), out=tmp_path / "labels"))
    assert not (tmp_path / "labels").exists()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_teacher_whose_blocks_differ_is_loaded_by_the_code_that_matta_wrote(tmp_path: Path) -> None:
    ta = gpt2(n_layer=3, n_inner=32)
    mixed = matta.extract(
        matta.nest(gpt2(n_layer=3, n_inner=8), ta), matta.SubModel({"transformer.h.1": "wide"})
    ).eval()
    folder = export(mixed, tmp_path / "mixed", tokenizer=BYTES)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(load_teacher(str(folder), BYTES)(ids), mixed(input_ids=ids).logits)
    (code,) = folder.glob("*.py")
    code.write_text(code.read_text() + "\n# changed\n")
    add_checksums(folder)
    with pytest.raises(RunError, match="the Teacher .* cannot be loaded: .*custom code"):
        load_teacher(str(folder), BYTES)


def test_a_missing_teacher_is_named_as_one() -> None:
    with pytest.raises(RunError, match=r"the Teacher './nowhere': there is no './nowhere'"):
        load_teacher("./nowhere", BYTES)
