"""The Python code of README and docs runs, block after block, as a reader would type it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from matta.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
OPTION = re.compile(r"--[a-z][a-z-]+")
COMMAND = re.compile(r"(?:^[`# ]*|-m )matta ((?:study |figure )?[a-z]+)([^`\n#]*)", re.MULTILINE)
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    page
    for page in (README, *sorted((ROOT / "docs").glob("*.md")))
    if page.exists() and FENCE.search(page.read_text(encoding="utf-8"))
]


def code_of(page: Path) -> str:
    """All Python blocks of a page, at their own line numbers, so that a traceback points into the page."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for block in FENCE.finditer(text):
        first = text.count("\n", 0, block.start(1))
        body = block[1].splitlines()
        lines[first : first + len(body)] = body
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page), page.name, "exec"), {"__name__": page.stem})


def commands_shown(page: Path) -> Iterator[tuple[str, set[str]]]:
    """The command lines in the blocks, the indented lines and the inline code of a page: their words and options."""
    for number, part in enumerate(re.split(r"^```.*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)):
        is_block = number % 2 == 1
        for code in [part] if is_block else re.findall(r"`[^`]+`|^(?: {4}|# +)[^`\n]+$", part, re.MULTILINE):
            for words, rest in COMMAND.findall(code):
                yield words, set(OPTION.findall(rest))


def test_commands_shown_have_the_options_shown(capsys: pytest.CaptureFixture[str]) -> None:
    known: dict[str, set[str]] = {"study": set(), "figure": set()}
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([*command.words, "--help"])
        known[" ".join(command.words)] = set(OPTION.findall(capsys.readouterr().out))
    pages = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.toml"))]
    shown = [(page.name, words, options) for page in pages for words, options in commands_shown(page)]
    assert len(shown) > 80
    assert [each for each in shown if each[1] not in known or not each[2] <= known[each[1]]] == []


def test_the_readme_has_an_example() -> None:
    assert README in PAGES


def test_the_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 70
    assert max(map(len, lines)) <= 100


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    figures = re.findall(r"[-+]\d+\.\d+%(?: \[[^]]+\])?", README.read_text(encoding="utf-8"))
    assert len(figures) > 10
    assert [figure for figure in figures if figure not in results] == []


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_log_lists_its_sections_and_sums_up_in_twenty_lines() -> None:
    log = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    _, summary, contents, sections = re.split(
        r"^## (?:Summary|Contents|(?=The search))", log, maxsplit=3, flags=re.MULTILINE
    )
    assert re.findall(r"^(\d+)\. ", summary, re.MULTILINE) == [str(number) for number in range(1, 21)]
    assert re.findall(r"^- \[(.*)\]", contents, re.MULTILINE) == re.findall(
        r"^## (.*)$", f"## {sections}", re.MULTILINE
    )
