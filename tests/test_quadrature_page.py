"""The page on quadratures says what its committed figures say, and the defaults are what it decides."""

import inspect
import math
from pathlib import Path

import pytest

import pysal
from benchmarks import path_error


def test_page_holds_the_committed_figures(tmp_path: Path) -> None:
    again = tmp_path / "page.md"
    again.write_text(path_error.PAGE.read_text())
    path_error.write_page(again)
    assert again.read_text() == path_error.PAGE.read_text(), "run python benchmarks/path_error.py --page"


def test_steps_are_interpolated_on_a_power_law() -> None:
    medians = {count: 7.0 / count**1.5 for count in (25, 50, 100, 200)}
    for wanted in (0.02, 0.0001, 1.0):
        assert path_error.steps_for(medians, wanted) == pytest.approx((7 / wanted) ** (1 / 1.5))
    broken = {50: 0.1, 100: 0.04, 200: 0.01}
    assert path_error.steps_for(broken, 0.04) == pytest.approx(100)
    assert path_error.steps_for(broken, 0.02) == pytest.approx(100 * math.sqrt(2))


@pytest.mark.parametrize("method", ["integrated_gradients", "blur_integrated_gradients"])
def test_defaults_are_what_the_page_decides(method: str) -> None:
    public = getattr(pysal, method)
    placement = inspect.signature(public).parameters["placement"].default
    assert f'**The default is the midpoint rule with `placement="{placement}"`**' in path_error.PAGE.read_text()
