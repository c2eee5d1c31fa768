"""What is public: the names in `__all__` of pysal and of the modules that it names, each of them documented."""

import ast
import importlib
import itertools
import re
from pathlib import Path

import pytest

import pysal

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = ("pysal", *(f"pysal.{name}" for name in pysal._MODULES))
COMPILED = {"pysal._C"}


def documented() -> dict[str, set[str]]:
    """Return the names that the pages of docs/api document, by module; "*" where a directive takes all of `__all__`."""
    found: dict[str, set[str]] = {}
    for page in sorted((ROOT / "docs/api").glob("*.md")):
        module = ""
        for kind, name in re.findall(r"^\.\. (currentmodule|auto[a-z]+|py:data):: ([\w.]+)$", page.read_text(), re.MULTILINE):
            if kind == "currentmodule":
                module = name
            elif kind == "automodule":
                found.setdefault(name, set()).add("*")
            else:
                found.setdefault(module, set()).add(name)
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there_and_say_themselves(module: str) -> None:
    loaded = importlib.import_module(module)
    names = loaded.__all__
    assert len(set(names)) == len(names)
    assert [name for name in names if name.startswith("_") and name != "__version__"] == []
    assert [name for name in names if not hasattr(loaded, name)] == []
    assert loaded.__doc__


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_documented_and_nothing_else_is(module: str) -> None:
    names = set(importlib.import_module(module).__all__) - {"__version__", *pysal._MODULES}
    pages = documented().get(module, set())
    if "*" not in pages:
        assert sorted(names - pages) == [], "give each its directive on a page of docs/api"
        assert sorted(pages - names) == [], "put each into __all__, or leave it out of docs/api"


def test_constants_have_words_below_them() -> None:
    """Those that the site shows in place of the words of their type."""
    described = set()
    for path in (ROOT / "pysal").rglob("*.py"):
        for line, below in itertools.pairwise(ast.parse(path.read_text()).body):
            if (
                isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(line, ast.Assign | ast.AnnAssign)
            ):
                targets = line.targets if isinstance(line, ast.Assign) else [line.target]
                described |= {target.id for target in targets if isinstance(target, ast.Name)}
    for module in PUBLIC:
        loaded = importlib.import_module(module)
        kinds = (bool, int, float, str, tuple, list, dict, set, Path)
        constants = {name for name in loaded.__all__ if isinstance(getattr(loaded, name), kinds)} - {"__version__"}
        assert sorted(constants - described) == [], module


def test_a_page_documents_only_what_is_public() -> None:
    """Below a face, a module is public that stands where the peer has it, where a page says so."""
    others = set(documented()) - set(PUBLIC)
    assert [name for name in others if not name.startswith(tuple(f"{module}." for module in PUBLIC[1:]))] == []


def test_every_other_module_says_that_it_is_internal() -> None:
    """A module speaks for those below it; below a public one, what its `__all__` names is public and the rest is not."""
    silent = []
    for path in sorted((ROOT / "pysal").iterdir()):
        own = path.stem if path.suffix == ".py" else path.name if (path / "__init__.py").exists() else ""
        if not own or own.startswith("_") or f"pysal.{own}" in PUBLIC:
            continue
        source = path if path.suffix == ".py" else path / "__init__.py"
        if not (ast.get_docstring(ast.parse(source.read_text())) or "").startswith("Internal: "):
            silent.append(own)
    assert silent == [], "begin the first line with 'Internal: ', or make the module public in pysal/__init__.py"


def test_what_may_change_is_said() -> None:
    page = (ROOT / "docs/api/index.md").read_text()
    assert "## What is public, and what may change" in page
    for module in PUBLIC[1:]:
        assert f"`{module}`" in page, module
