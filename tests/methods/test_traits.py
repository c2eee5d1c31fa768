"""What is said of the methods in one table agrees with what they take and return."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pysal
from pysal.methods.registry import EVERY
from pysal.methods.traits import BY_NAME, TRAITS, stores_drops
from tests.methods.calls import request, row_by_row
from tests.methods.networks import images

PACKAGE = Path(pysal.__file__).parent
# The controls of the page are fields of its own, which it makes into options method by method.
OWN_WORDS = {"demo/session.py"}
NAMED = (*TRAITS, "shapley", "interactions", "rise")


def test_the_table_does_not_import_torch() -> None:
    source = "import sys, pysal.methods.traits; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True)


@pytest.mark.parametrize("name", NAMED)
def test_traits_follow_from_the_options(name: str) -> None:
    traits = (TRAITS | BY_NAME)[name]
    options = inspect.signature(EVERY[name].prepare).parameters
    assert EVERY[name].title == traits.title
    assert traits.noisy == {"seed", "image_ids"}.issubset(options)
    assert traits.on_path == ("quadrature" in options)
    assert traits.per is None or traits.per in options


@pytest.mark.parametrize("name", NAMED)
def test_traits_follow_from_what_is_found(name: str) -> None:
    traits = (TRAITS | BY_NAME)[name]
    given = (
        {"passes": 64, "segments": pysal.Grid(2, 2)}
        if traits.per == "passes"
        else {"samples": 2}
        if traits.noisy
        else {"steps": 2}
        if traits.on_path
        else {}
    )
    found = EVERY[name].attribute(request(row_by_row(), images(2, 3, 8, 8), 1), **given)
    assert stores_drops(name) == ("drops" in found.details)
    assert traits.stored != "native" or found.details["native"].shape[:2] == (2, 1)
    assert (traits.reduction == "none") == (found.map.shape[1] == 1)


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
