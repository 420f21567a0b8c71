"""The site builds without a warning, loads nothing from elsewhere, and has every public name with an example."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import matta
import matta.ab_testing.comparison

pytest.importorskip("mkdocs")
pytest.importorskip("pyarrow")
lxml_html = pytest.importorskip("lxml.html")

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
SHOWN = {each for page in PAGES for each in re.findall(r"^::: matta\.(\S+)$", page.read_text(), re.MULTILINE)}
OBJECTIVES = [name for name in matta.objectives.__all__ if name != "Labels"]  # which is a type


def public_names() -> Iterator[str]:
    """Every name that users are to know, as they would write it after `matta.`."""
    yield from matta.__all__
    yield from (f"objectives.{name}" for name in OBJECTIVES)
    yield from (f"streams.{name}" for name in matta.streams.__all__)
    yield from (f"ab_testing.{name}" for name in matta.ab_testing.__all__)
    yield from ("ab_testing.comparison.compare", "ab_testing.comparison.AbReport")
    kinds = vars(matta.errors).items()
    yield from (
        f"errors.{name}"
        for name, kind in kinds
        if inspect.isclass(kind) and issubclass(kind, (matta.MattaError, SystemExit))
    )


def named(name: str) -> object:
    found: object = matta
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", [*public_names()])
def test_examples_run_as_copied_from_a_page(name: str) -> None:
    known = {"matta": matta, "torch": torch, "nn": torch.nn, name.split(".")[-1]: named(name)}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(named(name)) or "", known, name, None, None)
    shown: list[str] = []
    assert doctest.DocTestRunner().run(example, out=shown.append).failed == 0, "".join(shown)


@pytest.mark.parametrize("name", [*public_names()])
def test_every_public_name_is_on_a_page_with_an_example(name: str) -> None:
    assert {name, f"errors.{name}"} & SHOWN
    docstring = inspect.getdoc(named(name))
    assert docstring is not None and "Example:" in docstring and ">>>" in docstring


def test_pages_name_nothing_that_is_not_public() -> None:
    assert set(public_names()) >= SHOWN


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    loads = "//script/@src | //link[not(@rel='canonical')]/@href | //img/@src | //iframe/@src | //source/@src"
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        found = lxml_html.parse(str(page)).xpath(loads)
        assert found and [each for each in found if re.match(r"(https?:)?//", each)] == [], page.name
    styles = "\n".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert styles and re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", styles) == []


def test_examples_are_shown_as_code(site: Path) -> None:
    shown = lxml_html.parse(str(site / "reference" / "nesting.html"))
    code = "\n".join(each.text_content() for each in shown.xpath("//div[contains(@class, 'highlight')]"))
    assert ">>> nested.student[0], nested.ta[0]" in code


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {matta.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
