"""The ablations: every variant on a few hundred made tuples and events, the arithmetic, and the whole command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn import functional

from made_events import made_stream
from made_films import made_data
from matta.cli import main
from matta.errors import RunError
from matta_studies import ablations
from matta_studies.ablation_variants import BASELINE, BOTH, MATTA, PLACES, QUALITY, RELEVANCE, SHAMPOO, Study
from matta_studies.ablations import (
    CLAIMS,
    Bench,
    blend,
    ensemble_size,
    load_bench,
    plan_of,
    run_ablations,
    run_job,
    together,
    tune_variants,
    verdict,
)
from matta_studies.ablations_report import claim_rows, sentences, tally, told, variant_rows
from matta_studies.event_streams import save_stream
from matta_studies.experiment import Job, Lesson, Measured, Training, run_seeds
from matta_studies.intervals import Change
from matta_studies.labelled_films import save_data
from matta_studies.presentation import markdown
from matta_studies.quality import make_model, predict_and_learn
from matta_studies.quality_plan import StreamSetting
from matta_studies.rankers import Ranker, RankerSize, nest_rankers
from matta_studies.relevance import train
from matta_studies.relevance_plan import Setting
from matta_studies.study_settings import AblationsSettings
from matta_studies.tuning import Search
from matta_studies.worker_pool import worker_processes

DEEP = RankerSize(embedding=2, hidden=(3, 4), blocks=3)
SECOND = RankerSize(embedding=2, hidden=(6, 5))
TINY_RELEVANCE = dataclasses.replace(
    RELEVANCE,
    setting=Setting(size=RankerSize(embedding=2, hidden=(4, 3)), batch=100),
    second=SECOND,
    deep=DEEP,
    num_seeds=2,
)
TINY_QUALITY = dataclasses.replace(
    QUALITY, setting=StreamSetting(embedding=2, hidden=(4, 3), batch=64, ramp=3), second=SECOND, deep=DEEP, num_seeds=2
)
STUDIES = (TINY_RELEVANCE, TINY_QUALITY)
EVERY = [
    pytest.param(study, variant, id=f"{study.name}-{variant.name}") for study in STUDIES for variant in study.variants()
]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(tuples=made_data(), stream=made_stream(512))


def training_of(study: Study, variant) -> Training:
    by_name = {each.name: each for each in study.variants()}
    lesson = None
    if variant.teacher is not None:
        of = by_name[variant.teacher.of]
        lesson = Lesson(kind=variant.teacher.kind, trial=of.trial, setting=of.setting)
    return Training(trial=variant.trial, setting=variant.setting, lesson=lesson)


@pytest.mark.parametrize(("study", "variant"), EVERY)
def test_every_variant_trains_what_it_says(study: Study, variant, bench: Bench) -> None:
    measured = run_job(Job(training=training_of(study, variant), seed=3, whole=True), bench)
    assert len(measured["models"]) == len(variant.models)
    assert all(0 <= each[study.figure] < 1 and each["parameters"] > 0 for each in measured["models"].values())


@pytest.mark.parametrize("name", ["separate", "depth_ends", "two_students", "ensemble"])
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_runs_repeat(study: Study, name: str, bench: Bench) -> None:
    variant = next(each for each in study.variants() if each.name == name)
    job = Job(training=training_of(study, variant), seed=3, whole=True)
    first = run_job(job, bench)
    bench.taught.clear()
    assert run_job(job, bench) == first


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_variants_differ_from_each_other_and_have_what_they_are_compared_with(study: Study) -> None:
    variants = study.variants()
    names = [each.name for each in variants]
    assert len(set(names)) == len(names)
    trainings = [(each.trial, each.setting, each.teacher) for each in variants]
    assert len(set(trainings)) == len(trainings)
    assert {each.alone for each in variants} | {each.reference for each in variants} <= set(names)
    assert {claim.variant for claim in CLAIMS} <= set(names)
    assert all(len(set(each.trials())) == 3 and each.trial in each.trials() for each in variants)


@pytest.mark.parametrize("study", [RELEVANCE, QUALITY], ids=lambda study: study.name)
def test_published_sizes_of_the_ta(study: Study) -> None:
    sizes = {each.name: each.setting.ta_size.hidden for each in study.variants() if each.name.startswith("ta_")}
    factors = {name: hidden[0] / study.setting.size.hidden[0] for name, hidden in sizes.items() if name != "ta_alone"}
    assert factors == {"ta_1.5": 1.5, "ta_2": 2.0, "ta_8": 8.0}
    by_name = {each.name: each for each in study.variants()}
    assert by_name["ta_alone"].setting.size == study.setting.ta_size
    blocks = {name: each.setting.ta_size.blocks for name, each in by_name.items() if name.startswith("depth_")}
    assert blocks == {"depth_alone": 3, "depth_wider": 3} | {f"depth_{place}": 5 for place in PLACES}


@pytest.mark.parametrize(
    ("place", "expected"), [("first", (0, 1, 2)), ("last", (2, 3, 4)), ("even", (0, 2, 4)), ("ends", (0, 1, 4))]
)
def test_the_students_blocks_are_those_of_the_ta(place: str, expected: tuple[int, ...]) -> None:
    student, ta = Ranker((5, 6), DEEP), Ranker((5, 6), DEEP.grown(blocks=2))
    nested = nest_rankers([student], ta, place=place)
    for own, index in enumerate(expected):
        wide = ta.mlp.blocks[index].widen.weight
        torch.testing.assert_close(nested.student.mlp.blocks[own].widen.weight, wide[:4], rtol=0, atol=0)
    columns = torch.tensor([0, 1, 4, 5])
    entrance = ta.mlp.entrance.weight[:, columns]
    torch.testing.assert_close(nested.student.mlp.entrance.weight, entrance, rtol=0, atol=0)


def test_wider_embeddings_of_a_stream_are_nested_one_by_one(bench: Bench) -> None:
    variant = next(each for each in TINY_QUALITY.variants() if each.name == "nested_embeddings")
    nested = make_model(variant.trial, bench.stream, variant.setting)
    columns = torch.tensor([0, 1, 4, 5, 8, 9, 10])
    found, expected = nested.student.mlp[0].weight, nested.ta.mlp[0].weight[:, columns]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_blended_labels_give_both_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, label, taught = (torch.rand(3, 50, generator=generator, dtype=torch.float64)).unbind()
    both = functional.binary_cross_entropy_with_logits(logits, blend(label, taught, 0.6, 1.5))
    each = [functional.binary_cross_entropy_with_logits(logits, target) for target in (label, taught)]
    torch.testing.assert_close(2.1 * both, 0.6 * each[0] + 1.5 * each[1])


def test_an_ensemble_costs_what_the_ta_costs() -> None:
    sizes = [RELEVANCE.setting.size, RELEVANCE.setting.ta_size]
    student, ta = (Ranker((5, 6, 7), size) for size in sizes)
    assert ensemble_size(student, ta) == round((48 * 128 + 128 * 64 + 64) / (24 * 32 + 32 * 16 + 16)) == 11


def test_a_student_of_an_ensemble_learns_from_its_mean(bench: Bench) -> None:
    variant = next(each for each in TINY_RELEVANCE.variants() if each.name == "ensemble")
    training = training_of(TINY_RELEVANCE, variant)
    found = run_job(Job(training=training, seed=8, whole=True), bench)
    (taught,) = bench.taught.values()
    count = ensemble_size(*(Ranker((6, 6, 6), size) for size in (variant.setting.size, variant.setting.ta_size)))
    members = [train(training.lesson.trial, bench.tuples, training.lesson.setting, 8000 + i) for i in range(count)]
    votes = torch.stack([member(bench.tuples.train.ids).sigmoid() for member in members])
    torch.testing.assert_close(taught, votes.mean(0).detach())
    plain = Job(training=dataclasses.replace(training, lesson=None), seed=8, whole=True)
    assert run_job(plain, bench)["models"] != found["models"]


def test_a_frozen_ta_teaches_after_its_quarter_alone(bench: Bench) -> None:
    variant = next(each for each in TINY_QUALITY.variants() if each.name == "offline")
    training = training_of(TINY_QUALITY, variant)
    plain = dataclasses.replace(training, lesson=None)
    quarters = [run_job(Job(training=each, seed=1, whole=False), bench) for each in (training, plain)]
    wholes = [run_job(Job(training=each, seed=1, whole=True), bench) for each in (training, plain)]
    assert quarters[0] == quarters[1] and quarters[0]["models"]["Student"]["rest"] is None
    assert wholes[0]["models"]["Student"]["rest"] != wholes[1]["models"]["Student"]["rest"]


def test_what_is_not_learned_from_changes_no_prediction() -> None:
    stream = made_stream(512)
    trial, setting = TINY_QUALITY.trials[BASELINE], TINY_QUALITY.setting
    turned = dataclasses.replace(stream, label=torch.cat([stream.label[:128], 1 - stream.label[128:]]))
    found, other, online = (
        predict_and_learn(trial, events, setting, seed=0, learned=learned).logits["Student"]
        for events, learned in ((stream, 128), (turned, 128), (stream, None))
    )
    assert torch.equal(found, other)
    assert torch.equal(found[:192], online[:192]) and not torch.equal(found[192:], online[192:])


def test_what_goes_beyond_the_sum() -> None:
    losses = {
        BASELINE: {"Student": [1.0, 2.0]},
        SHAMPOO: {"Student": [0.9, 1.8]},
        MATTA: {"Student": [0.8, 1.6], "TA": [0.7, 1.4]},
        BOTH: {"Student": [0.65, 1.3], "TA": [0.7, 1.4]},
    }
    assert together(losses, "Student").mean == pytest.approx(-35.0 + 10.0 + 20.0)
    assert together(losses, "TA").mean == pytest.approx(-30.0 + 10.0 + 30.0)


def test_the_papers_figures_follow_from_its_tables() -> None:
    tables = {"relevance": ((-3.89, -4.63, -8.05), (-5.92, -9.47)), "quality": ((-0.28, -0.25, -0.60), (-0.32, -0.81))}
    claims = {
        (claim.variant, claim.model, claim.reference): dict(
            zip(("relevance", "quality"), claim.paper or (), strict=False)
        )
        for claim in CLAIMS
    }
    for study, ((shampoo, matta, both), (ta, both_ta)) in tables.items():
        assert claims[BOTH, "Student", None][study] == pytest.approx(both - shampoo - matta)
        assert claims[BOTH, "TA", None][study] == pytest.approx(both_ta - shampoo - ta)
        for reference, change, value in (
            ((SHAMPOO, "Student"), shampoo, ("Student", both)),
            ((BOTH, "Student"), both, ("TA", both_ta)),
        ):
            relative = 100 * ((1 + value[1] / 100) / (1 + change / 100) - 1)
            assert claims[BOTH, value[0], reference][study] == pytest.approx(relative, abs=0.005)
    shared = {"relevance": ((-8.03, -8.27), (-8.76, -9.16)), "quality": ((-0.53, -0.67), (-0.74, -0.99))}
    for study, rows in shared.items():
        for model, (with_all, without) in zip(("Student", "TA"), rows, strict=True):
            relative = 100 * ((1 + without / 100) / (1 + with_all / 100) - 1)
            assert claims["unshared", model, (BOTH, model)][study] == pytest.approx(relative, abs=0.005)


def test_a_claim_is_seen_only_by_the_whole_interval() -> None:
    told = [verdict(Change(mean=p, low=p - 1, high=p + 1), 1) for p in (2.0, 1.0, -2.0)]
    assert told == ["seen", "cannot be told by these seeds", "not seen: it is the other way round"]


def made_study(intervals: dict[str, tuple[float, float]], verdicts: list[str]) -> dict[str, object]:
    """As much of a study's results as sentences need: one group with a variant for each interval."""
    variants = {
        name: {
            "group": "size" if name else "first",
            "title": name,
            "vs_reference": {"Student": {"percent": (low + high) / 2, "interval": [low, high]}},
        }
        for name, (low, high) in {"": (-1.0, 1.0), **intervals}.items()
    }
    claims = [{"told": f"claim {index}", "verdict": each} for index, each in enumerate(verdicts)]
    return {"variants": variants, "claims": claims, "num_seeds": 2}


def test_sentences_name_what_lies_off_zero() -> None:
    study = made_study({"2x": (-3.0, -1.0), "4x": (-1.0, 2.0), "8x": (1.0, 3.0)}, [])
    assert sentences(study) == [
        "size: with “2x” the Student is better (-2.00% [-3.00, -1.00]); with “8x” the Student is worse (+2.00% [+1.00, "
        "+3.00]); 1 of 3 changes cannot be told from none."
    ]


def test_the_tally_names_what_is_the_other_way_round() -> None:
    signs = [verdict(Change(mean=p, low=p - 1, high=p + 1), -1) for p in (-2.0, -3.0, 0.0, 2.0)]
    assert tally(made_study({}, signs)) == (
        "Of these 4 statements 2 are seen, 1 are the other way round (claim 3), and 1 cannot be told from no "
        "difference by 2 seeds."
    )


def measured_by_rate(jobs: Iterable[Job]) -> Iterator[tuple[Job, Measured]]:
    """In place of training: the lowest rate is best with the first tuning seed, the middle one with both."""
    for job in jobs:
        lr = job.training.trial.lr
        losses = {0.1: 0.3, 0.0667: 0.2, 0.15: 0.4} if job.seed == 600 else {0.1: 0.1, 0.0667: 0.5, 0.15: 0.0}
        models = {model: {"rest": lr, "parameters": 1} for model in job.training.trial.models}
        yield job, {"tuning": losses.get(lr, 0.3), "models": models}


def test_rates_are_chosen_by_both_seeds_and_teachers_take_theirs() -> None:
    trainings, tuned = tune_variants((TINY_QUALITY,), measured_by_rate)
    assert {training.trial.lr for training in trainings.values()} == {0.1}
    assert {len(losses) for _, losses in tuned[f"quality/{BOTH}"].tried} == {1, 2}
    lesson = trainings["quality/ensemble"].lesson
    assert lesson.trial == trainings[f"quality/{SHAMPOO}"].trial
    assert trainings["quality/offline"].lesson.setting == TINY_QUALITY.setting.with_size(TINY_QUALITY.setting.ta_size)


def test_fresh_seeds_are_those_of_the_study_and_equal_runs_are_run_once() -> None:
    studies = tuple(dataclasses.replace(study, search=None) for study in STUDIES)
    trainings, tuned = tune_variants(studies, measured_by_rate)
    ran = []

    def run(jobs: Iterable[Job]) -> Iterator[tuple[Job, Measured]]:
        ran.extend(jobs)
        yield from measured_by_rate(ran)

    seeds = {f"{study.name}/{each.name}": study.seeds for study in studies for each in study.variants()}
    measured = run_seeds(trainings, seeds, run)
    assert tuned == {} and len(set(ran)) == len(ran) == sum(study.num_runs for study in studies)
    assert {job.seed for job in ran} == {6000, 6001, 3000, 3001} and all(job.whole for job in ran)
    assert {len(runs) for runs in measured.values()} == {2}


def test_the_whole_command_on_made_data(bench: Bench, tmp_path: Path) -> None:
    search = Search(seeds=(600,), num_trials=1)
    studies = tuple(dataclasses.replace(study, search=search) for study in STUDIES)
    results = run_ablations(
        studies, lambda jobs: ((job, run_job(job, bench)) for job in jobs), tmp_path, Console(quiet=True)
    )
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "ablations.png"}
    assert (tmp_path / "ablations.png").stat().st_size > 10_000
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    for study in STUDIES:
        found = results["studies"][study.name]
        assert set(found["variants"]) == {each.name for each in study.variants()}
        joint, base = (found["variants"][name]["aucloss"]["Student"]["seeds"] for name in (BOTH, BASELINE))
        changes = [100 * (a / b - 1) for a, b in zip(joint, base, strict=True)]
        assert found["variants"][BOTH]["vs_alone"]["Student"]["percent"] == pytest.approx(sum(changes) / 2)
        assert found["variants"][BOTH]["vs_reference"].keys() == {"Student"}
        assert found["variants"]["unshared"]["vs_reference"].keys() == {"Student", "TA"}
        assert found["variants"]["ta_alone"]["vs_reference"].keys() == {"TA"}
        assert found["variants"][BASELINE]["vs_alone"] == {}
        assert len(claim_rows(found)) == len(CLAIMS)
        assert len(variant_rows(found)) == len(study.variants()) + len({each.group for each in study.variants()})
        assert all(sentence in text for sentence in (tally(found), *sentences(found)))
        assert f"{study.name}_ta_beyond_the_sum_interval" in results
    assert text == markdown(told(results)) and "`matta study ablations`" in text and "-8.05%" in text


@pytest.mark.stress  # the same harness as that of test_studies
def test_worker_processes_give_what_this_process_gives(bench: Bench, tmp_path: Path) -> None:
    save_data(bench.tuples, tmp_path / "tuples.safetensors")
    save_stream(bench.stream, tmp_path / "stream.safetensors")
    jobs = [Job(training=training_of(study, study.variants()[0]), seed=1, whole=True) for study in STUDIES]
    with worker_processes(run_job, load_bench, tmp_path) as run_jobs:
        found = dict(run_jobs(jobs))
    assert found == {job: run_job(job, bench) for job in jobs}


def test_plans_of_the_command_line() -> None:
    whole, quick = plan_of(AblationsSettings()), plan_of(AblationsSettings(quick=True))
    assert [(study.num_seeds, study.search is None) for study in whole] == [(6, False), (6, False)]
    assert [(study.num_seeds, study.search is None) for study in quick] == [(2, True), (2, True)]
    assert sum(study.num_runs for study in quick) < sum(study.num_runs for study in whole) / 3
    (only,) = plan_of(AblationsSettings(study="quality", seeds=4))
    assert (only.name, only.num_seeds) == ("quality", 4)


def test_the_command_line_runs_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    received = []
    monkeypatch.setattr(ablations, "run", lambda settings: received.append(settings) or {"quick": True})
    out = tmp_path / "new"
    assert main(["study", "ablations", "--quick", "--study", "quality", "--out", str(out), "--json"]) == 0
    assert received == [AblationsSettings(quick=True, study="quality", out=out)]
    assert json.loads(capsys.readouterr().out) == {"quick": True}
    monkeypatch.undo()
    assert main(["study", "ablations", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"seeds": 1}, "seeds=1: expected at least 2"), ({"study": "speed"}, "study='speed': expected both")],
    ids=["seeds", "study"],
)
def test_settings_refuse_what_cannot_work(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        AblationsSettings(**settings)
