"""The language study: its text, one run, and the whole of it on a few kilobytes."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from rich.console import Console

import matta
from matta.cli import main
from matta.errors import RunError
from matta.sizes.submodels import wide_narrow_wide
from matta_studies import language
from matta_studies.experiment import Job, Measured, RunJobs, Training
from matta_studies.intervals import difference
from matta_studies.language import (
    Text,
    batches,
    bits_per_byte,
    build,
    cut,
    judge_family,
    load_text,
    make_model,
    nest_gpts,
    read_topics,
    run_job,
    run_study,
    sampler,
    train,
)
from matta_studies.language_plan import (
    ARMS,
    FIRST_FRESH_SEED,
    PLACES,
    GptSize,
    GptTrial,
    LanguagePlan,
    Setting,
    plan_of,
)
from matta_studies.study_settings import LanguageSettings
from matta_studies.tuning import Search

TINY = Setting(
    student=GptSize(layers=3, width=8, ffn=8, heads=2),
    ta=GptSize(layers=5, width=8, ffn=16, heads=2),
    context=16,
    batch=4,
    steps=4,
    warm_up=2,
)
LINE = b"the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n"
MADE = LINE * (10 * 4096 // len(LINE) + 1)
PAIR = GptTrial(method="matta", optimizer="shampoo", lr=0.01)


def job_of(trial: GptTrial, seed: int = 0, setting: Setting = TINY) -> Job:
    return Job(training=Training(trial=trial, setting=setting), seed=seed, whole=True)


@pytest.fixture(scope="module")
def text() -> Text:
    return cut(MADE[:2560], block=256)


def here(text: Text) -> RunJobs:
    """Runs jobs in this process."""

    def run_jobs(jobs: Iterable[Job]) -> Iterator[tuple[Job, Measured]]:
        return ((job, run_job(job, text)) for job in jobs)

    return run_jobs


def test_the_parts_of_a_text_are_its_blocks_each_once() -> None:
    data = bytes(range(200)) + b"left over"
    text = cut(data, block=10)
    parts = torch.cat([text.train, text.validation, text.test])
    assert sorted(parts.flatten().tolist()) == list(range(200))
    assert [len(part) for part in (text.train, text.validation, text.test)] == [16, 2, 2]
    assert "209 bytes, SHA-256 " in text.source and ", Python 3." in text.source


def test_other_bytes_have_another_hash() -> None:
    assert cut(bytes(100), block=10).source != cut(bytes(99) + b"1", block=10).source


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(RunError, match="99 bytes; expected at least 100"):
        cut(bytes(99), block=10)


def test_the_topics_of_python_are_enough_prose() -> None:
    data = read_topics()
    assert len(cut(data).train) >= 80
    assert data.count(b" the ") > 3000


def test_windows_are_pieces_of_the_text_and_repeat_with_the_seed(text: Text) -> None:
    def drawn(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        found = batches(text.train, steps=3, batch=2, context=16, generator=generator)
        return [row for each in found for row in each.tolist()]

    whole = bytes(text.train.flatten().tolist())
    assert all(bytes(row) in whole for row in drawn(0))
    assert drawn(0) == drawn(0) != drawn(1)


def test_bits_per_byte_are_those_of_a_plain_sum(text: Text) -> None:
    torch.manual_seed(0)
    model, part = build(TINY.student, TINY.context, 0.08), text.test[:, :64]
    expected = []
    for window in part.reshape(-1, TINY.context):
        logits = model(input_ids=window[None]).logits[0].detach().double()
        chances = logits.softmax(-1)
        expected += [-math.log2(chances[at - 1, window[at]]) for at in range(1, TINY.context)]
    assert bits_per_byte(model, part, TINY.context) == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_blocks_that_are_no_whole_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the context, 3"):
        bits_per_byte(torch.nn.Identity(), torch.zeros(1, 8, dtype=torch.int64), context=3)


def test_the_activation_is_that_of_gpt2() -> None:
    from transformers.activations import ACT2FN

    values = torch.linspace(-4, 4, 101)
    torch.testing.assert_close(ACT2FN["gelu_pytorch_tanh"](values), ACT2FN["gelu_new"](values))


def test_four_places_are_four_nestings() -> None:
    indices = {}
    for place in PLACES:
        plan = nest_gpts(build(TINY.student, 16, 0.08), build(TINY.ta, 16, 0.08), place).plan
        names = (plan.placements[f"transformer.h.{block}.ln_1.weight"].ta for block in range(3))
        indices[place] = tuple(name.split(".")[2] for name in names)
    assert len(set(indices.values())) == 4


@pytest.mark.parametrize("place", PLACES)
def test_with_one_seed_both_students_start_at_the_same_weights(place) -> None:
    models = []
    for method in ("baseline", "matta"):
        torch.manual_seed(5)
        models.append(make_model(dataclasses.replace(PAIR, method=method, place=place), TINY).eval())
    ids = torch.arange(16)[None]
    alone, nested = models[0](input_ids=ids).logits, models[1].student(input_ids=ids).logits
    torch.testing.assert_close(nested, alone, rtol=1e-5, atol=1e-6)


def test_arms_have_as_many_trials_and_trials_of_their_own() -> None:
    assert {arm.name: len(arm.trials) for arm in ARMS} == dict.fromkeys((arm.name for arm in ARMS), len(ARMS[0].trials))
    trials = [trial for arm in ARMS for trial in arm.trials]
    assert len(set(trials)) == len(trials)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_learns(arm, text: Text) -> None:
    setting = dataclasses.replace(TINY, steps=15)
    still, moved = (
        run_job(job_of(dataclasses.replace(arm.trials[0], lr=lr), setting=setting), text)["models"]
        for lr in (0.0, 0.01)
    )
    assert moved.keys() == still.keys() == set(arm.trials[0].models)
    assert ("TA" not in moved) == (arm.trials[0].method == "baseline")
    assert all(moved[model]["test"] < still[model]["test"] for model in moved)


def test_a_longer_run_makes_more_steps(text: Text) -> None:
    setting = dataclasses.replace(TINY, steps=10)
    trial = GptTrial(method="baseline", optimizer="adamw", lr=0.01)
    once, longer = (
        run_job(job_of(dataclasses.replace(trial, longer=times), setting=setting), text)["models"] for times in (1, 4)
    )
    assert longer["Student"]["validation"] < once["Student"]["validation"]


def test_runs_repeat_and_seeds_differ(text: Text) -> None:
    job = job_of(dataclasses.replace(PAIR, sampled=True), seed=3)
    found = run_job(job, text)
    assert found == run_job(job, text)
    assert found != run_job(dataclasses.replace(job, seed=4), text)


def test_the_family_goes_from_all_narrow_to_the_ta(text: Text) -> None:
    nested = train(PAIR, text, TINY, seed=0)
    family = judge_family(nested, text, TINY)
    models = run_job(job_of(PAIR), text)["models"]
    assert [each["k"] for each in family] == list(range(6))
    assert family[-1]["bpb"] == models["TA"]["test"] and "family" not in models["Student"]
    assert family[-1]["parameters"] == models["TA"]["parameters"] == sum(p.numel() for p in nested.ta.parameters())
    per_block = 2 * 8 * 8 + 8  # eight more units of one FFN
    assert [b["parameters"] - a["parameters"] for a, b in pairwise(family)] == [per_block] * 5


def test_sub_models_smaller_than_the_ta_are_trained_along() -> None:
    nested = nest_gpts(build(TINY.student, 16, 0.08), build(TINY.ta, 16, 0.08), "even")
    draw = sampler(nested)
    drawn = {draw(Random(seed)) for seed in range(60)}
    assert drawn == {wide_narrow_wide(nested, k) for k in range(5)}


def test_differences_are_those_of_the_paired_t_test() -> None:
    values, references = [0.9, 0.8, 1.0, 0.7, 0.95], [1.0, 1.0, 1.1, 0.9, 1.0]
    found = difference(values, references)
    changes = torch.tensor(values, dtype=torch.float64) - torch.tensor(references, dtype=torch.float64)
    reach = 2.7764451 * float(changes.std()) / math.sqrt(5)  # t of four degrees, from the tables
    mean = float(changes.mean())
    assert found.mean == pytest.approx(mean)
    assert found.interval == pytest.approx([mean - reach, mean + reach], rel=1e-6)
    with pytest.raises(ValueError, match="expected at least 2"):
        difference([1.0], [1.0])


TINY_PLAN = LanguagePlan(
    num_seeds=2,
    num_family=2,
    num_further=2,
    search=Search(seeds=(100,), num_trials=2, num_finalists=1),
    setting=TINY,
)


@pytest.mark.stress  # that a study resumes is tested in test_study_journal
def test_a_stopped_study_goes_on_and_finds_the_same(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Job] = []
    stops_after = [20]

    @contextmanager
    def in_this_process(run_job: object, load: object, path: Path) -> Iterator[RunJobs]:
        def run_jobs(jobs: Iterable[Job]) -> Iterator[tuple[Job, Measured]]:
            for job, scores in here(text)(jobs):
                if len(ran) in stops_after:
                    raise KeyboardInterrupt
                ran.append(job)
                yield job, scores

        yield run_jobs

    monkeypatch.setattr("matta_studies.experiment.worker_processes", in_this_process)
    monkeypatch.setattr(language, "plan_of", lambda settings: TINY_PLAN)
    stopped, whole = LanguageSettings(out=tmp_path / "stopped"), LanguageSettings(out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        language.run(stopped)
    assert "Kept: 20 training runs" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["stopped.journal"]
    stops_after.clear()
    found = language.run(stopped)
    assert len(ran) == TINY_PLAN.num_runs
    assert found == language.run(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"stopped", "whole"}


def test_whole_study_on_a_made_text(text: Text, tmp_path: Path) -> None:
    plan = TINY_PLAN
    ran: list[Job] = []

    def run_jobs(jobs: Iterable[Job]) -> Iterator[tuple[Job, Measured]]:
        for job, scores in here(text)(jobs):
            ran.append(job)
            yield job, scores

    console = Console(record=True, width=200)
    results = run_study(plan, text.source, run_jobs, tmp_path, console)
    assert len(ran) == plan.num_runs
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "language.png"}
    for name in ("student_vs_baseline", "ta_vs_baseline", "shampoo_student_vs_shampoo_baseline"):
        low, high = results[f"{name}_interval"]
        assert low <= results[f"{name}_bpb"] <= high
    alone, pair = (results["arms"][name]["models"] for name in ("shampoo_baseline", "shampoo_matta"))
    changes = [a - b for a, b in zip(pair["Student"]["seeds"], alone["Student"]["seeds"], strict=True)]
    assert results["shampoo_student_vs_shampoo_baseline_bpb"] == pytest.approx(sum(changes) / 2)
    assert alone["Student"]["parameters"] == pair["Student"]["parameters"] < pair["TA"]["parameters"]
    assert [each["k"] for each in results["family"]] == list(range(6))
    assert set(results["places"]) == set(PLACES)
    assert results["places"]["even"]["Student"]["mean"] == pytest.approx(sum(pair["Student"]["seeds"]) / 2)
    told = console.export_text()
    written = (tmp_path / "results.md").read_text()
    for shown in ("MatTA, Shampoo", f"{results['family'][0]['mean']:.4f}", "K = 5 (TA)", "first", "ends"):
        assert shown in told and shown in written


def test_fresh_seeds_are_none_of_those_for_tuning() -> None:
    for settings in (LanguageSettings(), LanguageSettings(quick=True)):
        plan = plan_of(settings)
        assert max(plan.search.seeds) < FIRST_FRESH_SEED
        assert plan.num_further <= plan.num_family <= plan.num_seeds
    assert plan_of(LanguageSettings(quick=True)).num_runs < plan_of(LanguageSettings()).num_runs


def test_jobs_and_scores_can_go_to_another_process_and_back(text: Text) -> None:
    job = job_of(dataclasses.replace(PAIR, sampled=True), seed=1)
    sent, function = pickle.loads(pickle.dumps((job, run_job)))
    scores = function(sent, text)
    assert sent == job and len(scores["models"]["Student"]["family"]) == 6
    assert pickle.loads(pickle.dumps(scores)) == scores == json.loads(json.dumps(scores))


def test_a_text_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(MADE)
    loaded, text = load_text(tmp_path), cut(MADE)
    assert loaded.source == text.source
    assert torch.equal(loaded.train, text.train)


def test_an_existing_run_folder_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "language", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert f"{tmp_path} exists; expected a new folder" in captured.err


def test_one_seed_is_refused() -> None:
    with pytest.raises(RunError, match="seeds=1: expected at least 2"):
        LanguageSettings(seeds=1)


def test_extracted_students_are_stock_gpt2(text: Text) -> None:
    student = matta.extract(train(PAIR, text, TINY, seed=0))
    again = build(TINY.student, TINY.context, 0.08).eval()
    again.load_state_dict(student.state_dict())
    assert bits_per_byte(again, text.test, TINY.context) == bits_per_byte(student, text.test, TINY.context)
