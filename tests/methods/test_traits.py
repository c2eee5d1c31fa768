"""What is said of the methods in one table agrees with what they take and return."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pysal
from pysal.methods.registry import METHODS
from pysal.methods.traits import TRAITS, stores_drops
from tests.methods.calls import request, row_by_row
from tests.methods.networks import images

PACKAGE = Path(pysal.__file__).parent
# The controls of the page are fields of its own, which it makes into options method by method.
OWN_WORDS = {"demo/session.py"}


def test_the_table_does_not_import_torch() -> None:
    source = "import sys, pysal.methods.traits; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True)


@pytest.mark.parametrize("name", TRAITS)
def test_traits_follow_from_the_options(name: str) -> None:
    options = inspect.signature(METHODS[name].prepare).parameters
    assert METHODS[name].title == TRAITS[name].title
    assert TRAITS[name].noisy == {"seed", "image_ids"}.issubset(options)
    assert TRAITS[name].on_path == ("quadrature" in options)
    assert TRAITS[name].per is None or TRAITS[name].per in options


@pytest.mark.parametrize("name", TRAITS)
def test_traits_follow_from_what_is_found(name: str) -> None:
    given = {"samples": 2} if TRAITS[name].noisy else {"steps": 2} if TRAITS[name].on_path else {}
    found = METHODS[name].attribute(request(row_by_row(), images(2, 3, 8, 8), 1), **given)
    assert stores_drops(name) == ("drops" in found.details)
    assert TRAITS[name].stored != "native" or found.details["native"].shape[:2] == (2, 1)
    assert (TRAITS[name].reduction == "none") == (found.map.shape[1] == 1)


def test_a_method_that_there_is_not_keeps_no_drops() -> None:
    assert not stores_drops("no such method")


def compared(source: str) -> list[str]:
    """Return the names of methods that a source compares something with."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            sides += [item for side in sides if isinstance(side, (ast.Tuple, ast.List, ast.Set)) for item in side.elts]
            found += [side.value for side in sides if isinstance(side, ast.Constant) and side.value in TRAITS]
    return found


def test_no_module_asks_for_the_name_of_a_method() -> None:
    assert compared("if name == 'smooth_grad' or name in ('grad_cam', 'x'): pass") == ["smooth_grad", "grad_cam"]
    paths = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).as_posix() not in OWN_WORDS]
    assert {path.name: names for path in paths if (names := compared(path.read_text()))} == {}
