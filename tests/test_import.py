"""The facade: what `import matta` offers, and what it does not load."""

import ast
import inspect
import json
import subprocess
import sys

import pytest

import matta

EXTRAS = (
    "pandas",
    "transformers",
    "accelerate",
    "datasets",
    "matplotlib",
    "lightning",
    "rich",
    "tensorboard",
)


def loaded_after(code: str) -> set[str]:
    """Top-level packages that are loaded when a fresh Python has run `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps([name.split('.')[0] for name in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(json.loads(run.stdout))


@pytest.mark.parametrize("name", matta.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(matta, name) is not None
    assert name in dir(matta)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nset'"):
        matta.nset  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(matta))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: None if node.module == "matta" else node.module.removeprefix("matta.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    assert seen == {**dict.fromkeys(matta._PUBLIC_MODULES), **matta._DEFINED_IN}


@pytest.mark.parametrize("name", matta._DEFINED_IN)
def test_no_module_hides_a_name(name: str) -> None:
    """Importing `matta.fit` as a module, say, would put the module in the place of the function."""
    assert name not in matta._DEFINED_IN.values()


def test_import_matta_loads_no_torch() -> None:
    assert loaded_after("import matta").isdisjoint({"torch", "numpy", *EXTRAS})


def test_nest_loads_torch_and_no_extra() -> None:
    loaded = loaded_after("import matta; matta.nest")
    assert "torch" in loaded
    assert loaded.isdisjoint(EXTRAS)


def test_the_command_line_loads_no_torch() -> None:
    loaded = loaded_after("from matta.cli import COMMANDS, _parser; _parser(COMMANDS)")
    assert loaded.isdisjoint({"torch", "numpy", *EXTRAS})


def test_language_models_without_their_extra_name_it() -> None:
    """Each module that needs the packages says so in a line, whichever is imported first."""
    code = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(["transformers", "tokenizers", "accelerate", "datasets", "rich", "huggingface_hub"])
import matta.lm
told = set()
for module in pkgutil.iter_modules(matta.lm.__path__):
    try:
        importlib.import_module(f"matta.lm.{module.name}")
    except matta.MattaError as error:
        told.add(str(error))
    except ModuleNotFoundError:
        assert module.name == "modeling_matta"  # lies in folders, where matta is not
print(*told, sep="\\n")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    expected = "matta.lm needs transformers, which is not installed; pip install 'matta[lm]'\n"
    assert ended.stdout == expected, ended.stderr
