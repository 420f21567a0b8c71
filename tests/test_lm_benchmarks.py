"""Benchmarks: all six offline on small files in the hub's format, as lm-eval itself scores them."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import matta
from matta.cli import main
from matta.errors import RunError
from matta.lm.command_settings import EvaluateSettings

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from matta.lm.benchmark_tables import PAPER, markdown, notes, rich_tables, tables  # noqa: E402
from matta.lm.benchmarks import contestants, run  # noqa: E402
from matta.lm.bits_per_byte import bits_per_byte  # noqa: E402
from matta.lm.folders import export, is_own_code  # noqa: E402
from matta.lm.judging import BENCHMARKS, Suite, choose, load_judge, scores_of, write_tasks  # noqa: E402
from matta.lm.recipe import DataPart, FamilyPart, ModelPart, Recipe, SourcePart, TrainPart  # noqa: E402
from matta.lm.tasks.sat_math import has_content, has_letter, hub_form, process_results  # noqa: E402
from matta.lm.tokens import TextEncoder, load_tokenizer  # noqa: E402
from matta.lm.trained_runs import write_json, write_run  # noqa: E402

TEXT = "Six short benchmarks say little of a small model; a text says more. " * 8
LIMIT = 6


WORDS = ("granite", "feather", "lantern", "compass", "harvest", "cabbage", "thunder")


def questions(num: int) -> list[dict[str, Any]]:
    """Items in the form of ARC: three to five choices, short and long ones, some labelled by digits."""
    found = []
    for i in range(num):
        labels = ("12345" if i < 2 else "ABCDE")[: 3 + i % 3]
        texts = [f"{'very ' * ((i + j) % 2)}{WORDS[(i + 2 * j) % 7]}" for j in range(len(labels))]
        choices = {"text": texts, "label": list(labels)}
        found.append({"id": f"q{i}", "question": f"Which is {i}?", "choices": choices, "answerKey": labels[i % 3]})
    return found


ITEMS: dict[str, list[dict[str, Any]]] = {
    "lambada": [{"text": f"A story of {i} friends who met again {'and again ' * i}at the end"} for i in range(7)],
    "arc_easy": questions(8),
    "arc_challenge": questions(6),
    "sat_math": [
        {
            "passage": "" if i % 2 else None,
            "question": f"If ${i} + 1 = x$, what is $x$?",
            "options": [f"({letter})${i + j}$" for j, letter in enumerate("ABCD")],
            "label": "B",
            "other": {"solution": None},
        }
        for i in range(6)
    ],
    "hellaswag": [
        {
            "ind": i,
            "activity_label": "Cooking [title]",
            "ctx_a": f"A cook has {i} pots.",
            "ctx_b": "he",
            "ctx": "",
            "endings": [f"puts {j} [step] lids  on them {'slowly ' * (i - j)}." for j in range(4)],
            "split": "val",
            "label": str(i % 4),
        }
        for i in range(6)
    ],
    "boolq": [
        {"question": f"is {i} odd", "passage": f"The number {i} is what it is.", "idx": i, "label": i % 2}
        for i in range(7)
    ],
}


def write_items(folder: Path, items: Mapping[str, Sequence[Mapping[str, Any]]] = ITEMS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in items.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def tiny(*, layers: int, width: int, positions: int = 192) -> Any:
    config = transformers.GPT2Config(
        n_layer=layers, n_inner=width, n_embd=16, n_head=2, vocab_size=257, n_positions=positions,
        initializer_range=0.3, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def nesting() -> matta.Nested:
    torch.manual_seed(0)
    return matta.nest(tiny(layers=1, width=24), tiny(layers=3, width=40), layers={"transformer.h": "first"})


@pytest.fixture(scope="module", autouse=True)
def _without_a_list_of_packages() -> Iterator[None]:
    """lm-eval lists all packages with each result, which takes two seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of models, the second with code of its own, the six files, and a text."""
    path = tmp_path_factory.mktemp("benchmarks")
    write_items(path / "data")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    nested = nesting()
    models = {"student": matta.extract(nested), "k-2": matta.extract(nested, matta.wide_narrow_wide(nested, 2))}
    for name, model in models.items():
        export(model, path / name, tokenizer=load_tokenizer("bytes"))
    return path


@pytest.fixture(scope="module")
def judged(workshop: Path) -> Iterator[dict[str, Any]]:
    """Both models on all six benchmarks and the text, without a network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was asked for")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        settings = EvaluateSettings(
            models=(str(workshop / "k-2"), str(workshop / "student")),
            data=workshop / "data",
            text=workshop / "text.txt",
            limit=LIMIT,
            context=64,
            baseline="student",
            out=workshop / "out",
        )
        yield run(settings)


def figures(score: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    return {
        (each["task"], each["metric"]): (each["value"], each["standard_error"]) for each in (score, *score["others"])
    }


def all_figures(model: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    return {key: value for score in model["scores"].values() for key, value in figures(score).items()}


# --- all six ----------------------------------------------------------------------------------------


def test_six_benchmarks_and_the_text_are_judged_offline(judged: dict[str, Any], workshop: Path) -> None:
    assert [each["name"] for each in judged["models"]] == ["student", "k-2"]
    for model in judged["models"]:
        assert list(model["scores"]) == [benchmark.name for benchmark in BENCHMARKS]
        assert all(score["num_items"] == LIMIT for score in model["scores"].values())
        assert all(value is not None and error is not None for value, error in all_figures(model).values())
        assert model["text"]["num_bytes"] == len(TEXT.encode())
    written = json.loads((workshop / "out" / "results.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(judged, allow_nan=False))
    assert (workshop / "out" / "results.md").read_text(encoding="utf-8") == markdown(judged)


@pytest.mark.stress  # half a minute; the test below compares with the function behind that command
def test_figures_equal_those_of_lm_evals_command_line(judged: dict[str, Any], tmp_path: Path) -> None:
    row = judged["models"][1]
    program, *arguments = shlex.split(row["lm_eval"])
    assert program == "lm_eval" and "trust_remote_code=True" in row["lm_eval"]
    command = [sys.executable, "-m", "lm_eval", *arguments, "--output_path", str(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text(encoding="utf-8"))["results"]
    ours = all_figures(row)
    assert len(ours) == 13
    assert ours == {
        (task, metric): (theirs[task][f"{metric},none"], theirs[task][f"{metric}_stderr,none"]) for task, metric in ours
    }


def test_figures_equal_those_of_simple_evaluate(workshop: Path, judged: dict[str, Any], tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = write_tasks(choose("hellaswag,boolq"), workshop / "data", tmp_path)
    assert names == ["hellaswag", "boolq"]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options: dict[str, Any] = {"pretrained": str(workshop / "student"), "dtype": "float32"}
    theirs = simple_evaluate("hf", options, names, batch_size=3, device="cpu", limit=LIMIT, task_manager=manager)
    assert theirs is not None
    suite = Suite(choose("hellaswag,boolq"), workshop / "data", tmp_path / "ours", limit=LIMIT)
    ours = scores_of(load_judge(str(workshop / "student"), batch=8), suite)[0]
    for name, scores in ours.items():
        assert figures(scores) == figures(judged["models"][0]["scores"][name])
        for (task, metric), (value, error) in figures(scores).items():
            row = theirs["results"][task]
            assert (value, error) == (row[f"{metric},none"], row[f"{metric}_stderr,none"])


def test_without_local_files_lm_evals_own_tasks_stay_as_they_are(tmp_path: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    names = write_tasks(BENCHMARKS, None, tmp_path)
    assert names == [
        "lambada_openai", "arc_easy", "arc_challenge", "sat_math_inclusion", "agieval_sat_math", "hellaswag", "boolq",
    ]  # fmt: skip
    import lm_eval

    own = Path(lm_eval.__file__).parent / "tasks"
    for name, file in {
        "lambada_openai": "lambada/lambada_openai",
        "arc_easy": "arc/arc_easy",
        "arc_challenge": "arc/arc_challenge",
        "agieval_sat_math": "agieval/sat-math",
        "hellaswag": "hellaswag/hellaswag",
        "boolq": "super_glue/boolq/default",
    }.items():
        assert load_yaml(tmp_path / f"{name}.yaml") == load_yaml(own / f"{file}.yaml")


def test_local_files_replace_the_data_alone(workshop: Path, tmp_path: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    changed = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"}
    write_tasks(BENCHMARKS, None, tmp_path / "hub")
    write_tasks(BENCHMARKS, workshop / "data", tmp_path / "local")
    for file in (tmp_path / "hub").iterdir():
        hub, local = load_yaml(file), load_yaml(tmp_path / "local" / file.name)
        different = {key for key in hub.keys() | local.keys() if hub.get(key) != local.get(key)}
        assert different - changed <= ({"process_docs"} if file.stem == "agieval_sat_math" else set())


# --- independent scoring ----------------------------------------------------------------------------


def nats(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, bool]:
    """Log-likelihood of an answer after a prompt, and whether each token of it is the likeliest."""
    before, after = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
    with torch.no_grad():
        scores = model(torch.tensor([before + after])).logits[0].log_softmax(-1)[len(before) - 1 : -1]
    found = sum(row[token].item() for row, token in zip(scores, after, strict=True))
    return found, all(row.argmax().item() == token for row, token in zip(scores, after, strict=True))


def load(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model.eval(), load_tokenizer("bytes")


def arc_by_hand(model: Any, tokenizer: Any) -> tuple[list[bool], list[bool]]:
    """Which items are right by likelihood, and by likelihood over the length of the choice."""
    hits, hits_norm = [], []
    for item in ITEMS["arc_easy"][:LIMIT]:
        right = item["choices"]["label"].index(item["answerKey"])
        prompt, texts = f"Question: {item['question']}\nAnswer:", item["choices"]["text"]
        scores = [nats(model, tokenizer, prompt, f" {text}")[0] for text in texts]
        hits.append(max(range(len(texts)), key=scores.__getitem__) == right)
        hits_norm.append(max(range(len(texts)), key=lambda i: scores[i] / len(texts[i])) == right)
    return hits, hits_norm


def test_arc_is_scored_as_by_hand(workshop: Path, judged: dict[str, Any]) -> None:
    hits, hits_norm = arc_by_hand(*load(workshop / "student"))
    assert hits != hits_norm, "the items tell the two apart"
    found = figures(judged["models"][0]["scores"]["arc_easy"])
    for metric, each in (("acc", hits), ("acc_norm", hits_norm)):
        share = sum(each) / LIMIT
        value, error = found["arc_easy", metric]
        assert value == pytest.approx(share)
        assert error == pytest.approx(math.sqrt(share * (1 - share) / (LIMIT - 1)))


def test_lambada_is_scored_as_by_hand(workshop: Path, judged: dict[str, Any]) -> None:
    model, tokenizer = load(workshop / "student")
    scores = []
    for item in ITEMS["lambada"][:LIMIT]:
        prompt, _, word = item["text"].rpartition(" ")
        scores.append(nats(model, tokenizer, prompt, f" {word}"))
    found = figures(judged["models"][0]["scores"]["lambada"])
    assert found["lambada_openai", "acc"][0] == pytest.approx(sum(hit for _, hit in scores) / LIMIT)
    perplexity = math.exp(-sum(score for score, _ in scores) / LIMIT)
    assert found["lambada_openai", "perplexity"][0] == pytest.approx(perplexity, rel=1e-4)


def test_changes_are_paired(workshop: Path, judged: dict[str, Any]) -> None:
    assert judged["baseline"] == "student" and list(judged["changes"]) == ["k-2"]
    change = judged["changes"]["k-2"]
    hits, _ = arc_by_hand(*load(workshop / "student"))
    other_hits, _ = arc_by_hand(*load(workshop / "k-2"))
    gains = [other - own for own, other in zip(hits, other_hits, strict=True)]
    assert any(gains), "the models differ"
    assert change["scores"]["arc_easy"]["value"] == pytest.approx(statistics.fmean(gains))
    assert change["scores"]["arc_easy"]["standard_error"] == pytest.approx(statistics.stdev(gains) / math.sqrt(LIMIT))
    student, other = judged["models"]
    for name, each in change["scores"].items():
        assert each["value"] == pytest.approx(other["scores"][name]["value"] - student["scores"][name]["value"])
    assert change["text"]["value"] == pytest.approx(other["text"]["bits_per_byte"] - student["text"]["bits_per_byte"])


# --- inclusion --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("letter", "outputs", "found"),
    [
        ("D", [" D", " (D)", "D.\nQ", " D) 10", "not (A) but (D)", "the answer is D", "Answer: D"], True),
        ("D", ["option D, since", "choice $D$", r"Choice $\mathbf{D}$ is correct", "answer is: D"], True),
        ("D", [" D minor", "(C)", "CD", "d", "", "options Do"], False),
        ("A", ["A man", "an answer", "a) 1"], False),
    ],
)
def test_letters_count_where_they_are_labels(letter: str, outputs: list[str], found: bool) -> None:
    assert [has_letter(output, letter) for output in outputs] == [found] * len(outputs)


@pytest.mark.parametrize(
    ("option", "inside", "outside"),
    [
        ("(D)10", ["it is 10", "x=10.", "10\n"], ["210", "10.5", "100", "-10", "1 0 apples of 105", ""]),
        ("(A)3", ["is 3,"], ["-3", "3.1", "x3"]),
        ("(A)-3", ["-3", "x = - 3"], ["3", "5-3"]),
        (r"(D)$\quad 20,000$", ["20000", "20,000", "about $20,000$"], ["20", "120,000"]),
        (r"(D)$\$ 3.35$", ["$ 3.35", r"\$3.35"], ["3.3", "13.35"]),
        ("(C)$5 m+4 p$", ["5m + 4p"], ["15m+4p", "5m+4px"]),
        (r"(C)$\frac{1}{2}$", ["1/2", r"\dfrac{1}{2}", "1 / 2"], ["1", "11/2"]),
        ("(C)Range", ["the RANGE of it"], ["orange", "ranges"]),
        ("(C)Males taking Geometry.", ["Males taking Geometry"], ["Females taking Geometry"]),
        ("(D)", [], ["anything", ""]),
    ],
)
def test_contents_count_as_wholes(option: str, inside: list[str], outside: list[str]) -> None:
    assert all(has_content(output, [option], 0) for output in inside)
    assert not any(has_content(output, [option], 0) for output in outside)


def test_a_part_of_another_option_does_not_count() -> None:
    options = ["(A)$3 x$", "(B)$3 x^{2}$", "(C)$18 x$", "(D)-3 and -1"]
    for j, output in enumerate(options):
        assert [has_content(output[3:], options, i) for i in range(4)] == [i == j for i in range(4)]
    assert has_content("either 3x^{2} or 3x", options, 0)


def test_inclusion_is_the_share_of_outputs_with_the_right_option(workshop: Path, tmp_path: Path) -> None:
    from lm_eval.api.model import LM

    outputs = [" (B)", " 2.", " (A)", " nothing", " C\n", "x = 6 so (D)"]  # item i: right is (B), i + 1
    suite = Suite(choose("sat_math"), workshop / "data", tmp_path)
    asked: list[tuple[str, Any]] = []

    class Told(LM):
        def generate_until(self, requests: Any) -> list[str]:
            asked.extend(request.args for request in requests)
            return outputs

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            """The likeliest is (A) in items of even number, (B) in the others."""
            firsts = [(request.args[1].lstrip()[:3], request.doc_id % 2) for request in requests]
            return [(-float(first != ("(A)", "(B)")[odd]), False) for first, odd in firsts]

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            raise AssertionError

    found = suite.evaluate(Told())["results"]  # type: ignore[arg-type]
    row = found["sat_math_inclusion"]
    names = ("inclusion", "inclusion_letter", "inclusion_content")
    assert [row[f"{name},none"] for name in names] == [3 / 6, 1 / 6, 2 / 6]
    assert row["inclusion_stderr,none"] == pytest.approx(math.sqrt(0.25 / 5))
    assert found["agieval_sat_math"]["acc,none"] == 0.5
    prompt, options = asked[0]
    choices = "(A)$0$ (B)$1$ (C)$2$ (D)$3$"
    ending = "A: Among A through D, the answer is"
    assert prompt == f"Q: If $0 + 1 = x$, what is $x$? Answer Choices: {choices}\n{ending}"
    assert options["max_gen_toks"] == 32 and options["do_sample"] is False


def test_items_in_the_hubs_form_are_scored_alike(workshop: Path, tmp_path: Path) -> None:
    items = [hub_form(item) for item in ITEMS["sat_math"]]
    write_items(tmp_path / "hub", {"sat_math": items})
    folders = {"own": workshop / "data", "hub": tmp_path / "hub"}
    scores = [
        scores_of(load_judge(str(workshop / "student"), batch=8), Suite(choose("sat_math"), data, tmp_path / name))[0]
        for name, data in folders.items()
    ]
    assert scores[0] == scores[1]
    assert process_results(items[0], [" (B)"]) == {"inclusion": 1, "inclusion_letter": 1, "inclusion_content": 0}


def test_the_name_of_a_special_token_is_text_for_the_judge_too(workshop: Path) -> None:
    judge, text = load_judge(str(workshop / "student"), batch=1), "An end <|endoftext|> in the middle, größer."
    expected = TextEncoder(load_tokenizer("bytes"))([text])[0].tolist()
    assert expected == list(text.encode())
    assert judge.tok_encode(text) == judge.tok_batch_encode([text])[0][0].tolist() == expected


# --- which models -----------------------------------------------------------------------------------


def make_run(path: Path, nested: matta.Nested) -> Path:
    recipe = Recipe(
        name="tiny",
        model=ModelPart(architecture="gpt2", student={"n_layer": 1}, ta={"n_layer": 3}),
        data=DataPart(train=SourcePart(path="pydoc"), tokenizer="bytes", context=64),
        train=TrainPart(steps=1, batch=1, learning_rate=0.1),
        family=FamilyPart(k=(0, 2)),
    )
    path.mkdir()
    write_run(path, recipe, nested, load_tokenizer("bytes"))
    matta.save(nested, path / "nested")
    return path


def test_each_model_of_a_run_is_judged_as_if_it_were_live(tmp_path: Path) -> None:
    nested = nesting()
    path = make_run(tmp_path / "run", nested)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    found = run(EvaluateSettings(models=(str(path),), tasks="none", text=tmp_path / "text.txt", context=48, batch=4))
    assert [each["name"] for each in found["models"]] == ["student", "k=0", "k=2", "ta"]
    live = {
        "student": matta.extract(nested),
        "k=0": matta.extract(nested, matta.wide_narrow_wide(nested, 0)),
        "k=2": matta.extract(nested, matta.wide_narrow_wide(nested, 2)),
        "ta": matta.extract(nested, matta.wide(nested)),
    }
    for row in found["models"]:
        model = live[row["name"]]
        score = bits_per_byte(model, load_tokenizer("bytes"), TEXT, context=48, batch=4)
        assert row["parameters"] == sum(each.numel() for each in model.parameters())
        assert row["text"]["bits_per_byte"] == score.bits_per_byte
        assert row["text"]["standard_error"] == score.standard_error


def test_models_that_a_run_holds_are_taken_from_there(tmp_path: Path) -> None:
    nested = nesting()
    path = make_run(tmp_path / "run", nested)
    for name in ("student", "k-0", "k-2", "ta", "k-1", ".k-3-half_written"):
        export(matta.extract(nested), path / "models" / name, tokenizer=load_tokenizer("bytes"))
    write_json(path / "results.json", {"models": [{"name": name} for name in ("student", "k=0", "k=2", "ta")]})
    found = contestants([str(path)])
    assert [each.name for each in found] == ["student", "k=0", "k=2", "ta", "k-1"]
    assert [Path(each.source or "").name for each in found] == ["student", "k-0", "k-2", "ta", "k-1"]
    assert all(Path(each.source or "").parent == path.resolve() / "models" for each in found)


def test_damaged_files_are_told_in_a_line(workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(tmp_path / "run", nesting())
    (path / "results.json").write_text('{"models": [{}]}')
    assert "results.json is damaged: KeyError('name'); remove it to judge" in complaint(capsys, str(path))
    shutil.copytree(workshop / "student", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    arguments = ["--tasks", "none", "--text", str(workshop / "text.txt")]
    message = complaint(capsys, str(tmp_path / "cut"), *arguments)
    assert "cut/model.safetensors is damaged: its checksum is not the one in CRC32SUMS" in message
    (tmp_path / "cut" / "CRC32SUMS").unlink()
    assert f"{tmp_path / 'cut'} cannot be loaded (" in complaint(capsys, str(tmp_path / "cut"), *arguments)


def test_models_of_one_name_are_told_apart(workshop: Path, tmp_path: Path) -> None:
    nested = nesting()
    export(matta.extract(nested), tmp_path / "student", tokenizer=load_tokenizer("bytes"))
    run_path = make_run(tmp_path / "run", nested)
    found = contestants([str(workshop / "student"), str(tmp_path / "student"), str(run_path), "gpt2"])
    assert [each.name for each in found] == [
        str(workshop / "student"), str(tmp_path / "student"), f"{run_path} student", "k=0", "k=2", "ta", "gpt2",
    ]  # fmt: skip


def test_only_mattas_own_code_is_run_unasked(workshop: Path, tmp_path: Path) -> None:
    (ours,) = contestants([str(workshop / "k-2")])
    assert ours.trust and (workshop / "k-2" / "modeling_matta.py").is_file()
    assert not contestants([str(workshop / "student")])[0].trust
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for file in (workshop / "k-2").iterdir():
        (foreign / file.name).write_bytes(file.read_bytes())
    with (foreign / "modeling_matta.py").open("a", encoding="utf-8") as code:
        code.write("\nprint('hello')\n")
    with pytest.raises(RunError, match="comes with code of its own that is not matta's.*--trust"):
        contestants([str(foreign)])
    assert contestants([str(foreign)], trust=True)[0].trust


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModelForCausalLM": "someone/else--modeling_matta.MattaGPT2LMHeadModel"}},
        {"architectures": ["NoSuchModel"]},
        {"architectures": ["GPT2Config"]},
    ],
)
def test_code_from_elsewhere_is_not_mattas(workshop: Path, change: dict[str, Any]) -> None:
    config = json.loads((workshop / "k-2" / "config.json").read_text(encoding="utf-8"))
    assert is_own_code(workshop / "k-2", config)
    assert not is_own_code(workshop / "k-2", {**config, **change})


# --- what goes wrong --------------------------------------------------------------------------------


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["evaluate", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("matta evaluate: ")]
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["student", "--tasks", "arc_esy"],
            "there is no arc_esy; expected some of lambada, arc_easy,.*did you mean arc_easy",
        ),
        (["student", "--tasks", "none"], "--tasks none without --text leaves nothing to judge by"),
        (["student", "--data", "nowhere"], "--data nowhere is not a folder; expected one with <task>.jsonl"),
        (["student", "--data", "student"], "--data student has no lambada.jsonl \\(there: none\\); add it"),
        (["no/such/model", "--data", "data"], "no/such/model is not a folder; expected a Transformers folder"),
        (["data", "--data", "data"], "data holds no model: there is no config.json"),
        (["student", "--data", "data", "--out", "data"], "--out data exists; expected a new folder"),
        (["student", "--tasks", "none", "--text", "nowhere.txt"], "nowhere.txt"),
        (["student", "--data", "data", "--limit", "0"], "limit=0: expected at least 1"),
        (["student", "--tasks", "none", "--text", "text.txt", "--context", "999"], "beyond the model's 192 positions"),
        (["a-model", "--data", "data", "--tasks", "boolq"], "a-model cannot be loaded"),
    ],
)
def test_errors_are_one_line(
    workshop: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    import re

    monkeypatch.chdir(workshop)
    assert re.search(message, complaint(capsys, *arguments))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not JSON"),
        (b"\xff\xfe", "line 2 is not JSON"),
        (b"[1]", "line 2 lacks the fields of the hub's format; expected label passage question"),
        (b'{"question": "is it"}', "line 2 lacks the fields of the hub's format; expected label passage question"),
    ],
)
def test_broken_lines_are_told(tmp_path: Path, line: bytes, message: str) -> None:
    write_items(tmp_path, {"boolq": ITEMS["boolq"][:1]})
    with (tmp_path / "boolq.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(RunError, match=message):
        Suite(choose("boolq"), tmp_path, tmp_path / "tasks")


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    write_items(tmp_path, {"boolq": []})
    with pytest.raises(RunError, match="boolq.jsonl is empty"):
        Suite(choose("boolq"), tmp_path, tmp_path / "tasks")


@pytest.mark.parametrize(
    ("name", "at", "change", "message"),
    [
        ("arc_easy", 0, {"answerKey": "Z"}, "arc_easy: its file in .* cannot be read"),
        ("arc_easy", 4, {"answerKey": "Z"}, "arc_easy, item 5 in .* cannot be asked"),
        ("boolq", 2, {"label": 2}, "boolq, item 3 in .* has the answer 2 among 2 choices"),
        ("sat_math", 0, {"label": "E"}, "sat_math_inclusion: its file in .* cannot be read"),
        ("sat_math", 3, {"label": "E"}, "sat_math_inclusion, item 4 in .* cannot be asked"),
    ],
)
def test_items_without_an_answer_are_told(
    tmp_path: Path, name: str, at: int, change: dict[str, Any], message: str
) -> None:
    items = [{**item, **(change if i == at else {})} for i, item in enumerate(ITEMS[name])]
    write_items(tmp_path, {name: items})
    with pytest.raises(RunError, match=message):
        Suite(choose(name), tmp_path, tmp_path / "tasks")


def test_a_hub_out_of_reach_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="boolq: the hub does not give its data .* expected --data DIR"):
        Suite(choose("boolq"), None, tmp_path / "tasks")


def test_answers_longer_than_the_context_leave_a_benchmark_out(workshop: Path, tmp_path: Path) -> None:
    export(tiny(layers=1, width=8, positions=32), tmp_path / "short", tokenizer=load_tokenizer("bytes"))
    settings = EvaluateSettings(
        models=(str(tmp_path / "short"), str(workshop / "student")),
        tasks="sat_math,hellaswag,boolq",
        data=workshop / "data",
        baseline="student",
        out=tmp_path / "out",
    )
    results = run(settings)
    scores = results["models"][1]["scores"]
    too_long = [any(len(f" puts {j} lids on them {'slowly ' * (i - j)}.") > 32 for j in range(4)) for i in range(6)]
    assert [scores[name]["num_unfit"] for name in scores] == [6, sum(too_long), 0]
    assert 0 < sum(too_long) < 6
    assert scores["hellaswag"]["value"] is None and scores["boolq"]["value"] is not None
    assert figures(scores["sat_math"])["agieval_sat_math", "acc"][0] is not None, "choosing needs no room to write"
    assert "--tasks agieval_sat_math,boolq " in results["models"][1]["lm_eval"]
    assert results["changes"]["short"]["scores"]["hellaswag"] == {"value": None, "standard_error": None}
    assert [row[2:5] for row in tables(results)[0].cells][1][:2] == ["–", "–"]
    told = [note for note in notes(results) if "stays empty for short" in note]
    assert f"hellaswag stays empty for short: {sum(too_long)} of its answers are longer than the 32" in told[1]


def test_a_folder_is_not_taken_by_what_fails_at_once(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(workshop / "student"), "--tasks", "none", "--text", str(workshop / "text.txt")]
    assert "beyond the model's" in complaint(capsys, *arguments, "--context", "999", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_baseline_is_one_model(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", nesting())
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(RunError, match="is several models \\(student, k=0, k=2, ta\\); expected one"):
        run(EvaluateSettings(models=(str(path),), tasks="none", text=tmp_path / "text.txt", baseline=str(path)))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "works in one process" in complaint(capsys, "gpt2")


def test_without_lm_eval_the_extra_is_named(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = complaint(capsys, str(workshop / "student"), "--data", str(workshop / "data"))
    assert "lm_eval" in line and line.endswith("pip install 'matta[eval]'")


# --- tables -----------------------------------------------------------------------------------------


def test_the_table_has_the_layout_of_table_2(judged: dict[str, Any]) -> None:
    main_table, others, changes = tables(judged)
    assert main_table.columns == [
        ("model", ""), ("size", ""), ("LAMBADA", "acc"), ("ARC-e", "acc"), ("ARC-c", "acc"), ("SAT Math", "inclusion"),
        ("HellaSwag", "acc"), ("BoolQ", "acc"), ("bits", "per byte"),
    ]  # fmt: skip
    names = [row[0] for row in main_table.cells]
    assert names == ["student (baseline)", "k-2", "guessing", *PAPER]
    assert all(name.startswith("paper: ") for name in PAPER)
    assert main_table.cells[3] == [
        "paper: GPT-2 Medium",
        "–",
        "27.56",
        "42.84",
        "23.72",
        "31.81",
        "31.61",
        "59.51",
        "–",
    ]
    score = judged["models"][0]["scores"]["arc_easy"]
    assert main_table.cells[0][3] == f"{100 * score['value']:.2f} ± {100 * score['standard_error']:.2f}"
    assert ("ARC-e", "acc_norm") in others.columns and ("SAT Math", "by letter") in others.columns
    assert changes.title.startswith("Change against student") and [row[0] for row in changes.cells] == ["k-2"]
    assert all(len(row) == len(table.columns) for table in (main_table, others, changes) for row in table.cells)


def test_only_the_benchmarks_that_were_run_have_columns(workshop: Path) -> None:
    settings = EvaluateSettings(models=(str(workshop / "student"),), tasks="boolq", data=workshop / "data", limit=2)
    results = run(settings)
    (table,) = tables(results)
    assert [head for head, _ in table.columns] == ["model", "size", "BoolQ"]
    assert table.cells[-1] == ["paper: its TA", "–", "60.00"]
    assert results["changes"] == {} and results["models"][0]["lm_eval"] is None


def test_tables_are_shown_in_markdown_and_in_the_terminal(
    judged: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    text = markdown(judged)
    assert "| model | size | LAMBADA (acc) |" in text and "| paper: its TA | – | 31.73 |" in text
    assert "no yardstick for models of another size" in text
    console = Console(width=120)
    for table in rich_tables(judged):
        console.print(table)
    shown = capsys.readouterr().out
    assert "paper: MatTA, Shampoo" in shown and "…" not in shown


def test_prompts_that_do_not_fit_are_counted(workshop: Path, tmp_path: Path) -> None:
    long = {**ITEMS["boolq"][0], "passage": "very long " * 40}
    write_items(tmp_path / "data", {"boolq": [long, *ITEMS["boolq"][1:], long]})
    results = run(EvaluateSettings(models=(str(workshop / "student"),), tasks="boolq", data=tmp_path / "data"))
    assert results["models"][0]["scores"]["boolq"]["num_cut"] == 2
    (note,) = [note for note in notes(results) if "192 tokens" in note]
    assert (
        note
        == "student read 192 tokens: too few for the prompts of 2 of 8 items of boolq; their beginnings were left out."
    )


def test_texts_read_in_portions_of_different_length_are_told(judged: dict[str, Any]) -> None:
    (note,) = [note for note in notes(judged) if "held-out" in note]
    assert note == f"The held-out text has {len(TEXT.encode())} bytes in UTF-8, read 64 tokens at a time."
    first, second = judged["models"]
    models = [first, {**second, "text": {**second["text"], "context": 32}}]
    (note,) = [note for note in notes({**judged, "models": models}) if "held-out" in note]
    assert note.endswith("at most, 32 by the model of the shortest context: --context 32 is fairer.")
    models = [first, {**second, "text": {**second["text"], "num_unknown": 7}}]
    (note,) = [note for note in notes({**judged, "models": models}) if "unknown" in note]
    told = f"{second['name']}: 7 of {second['text']['num_tokens']} tokens of the text are unknown to the tokenizer: its"
    assert note == f"{told} bits per byte are too low, and compare with no other tokenizer."


# --- real files, where they are ---------------------------------------------------------------------


@pytest.mark.skipif("MATTA_EVALS" not in os.environ, reason="MATTA_EVALS names no folder of <task>.jsonl")
def test_real_files_are_scored(workshop: Path, tmp_path: Path) -> None:
    data = Path(os.environ["MATTA_EVALS"])
    settings = EvaluateSettings(models=(str(workshop / "student"),), data=data, limit=20, out=tmp_path / "out")
    results = run(settings)
    for name, score in results["models"][0]["scores"].items():
        assert score["num_items"] == 20, name
        assert 0 <= score["value"] <= 1


@pytest.mark.skipif("MATTA_EVALS" not in os.environ, reason="MATTA_EVALS names no folder of <task>.jsonl")
def test_real_options_of_sat_math_are_told_apart() -> None:
    for line in (Path(os.environ["MATTA_EVALS"]) / "sat_math.jsonl").read_text(encoding="utf-8").splitlines():
        options = json.loads(line)["options"]
        found = [[has_content(output[3:], options, i) for i in range(len(options))] for output in options]
        assert found == [[i == j for i in range(len(options))] for j in range(len(options))], options
