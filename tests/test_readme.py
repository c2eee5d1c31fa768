"""README.md is right where it is not like other documents; tests/test_documents.py has what they share."""

import re
from pathlib import Path

from pysal.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_is_the_registry() -> None:
    rows = re.findall(r"^\| (.+) \(`(\w+)`\) \| (.+) \| (.+) \|$", README, re.MULTILINE)
    assert rows == [(method.title, method.name, method.summary, method.cost) for method in METHODS.values()]


def test_the_picture_is_small_enough_for_a_page() -> None:
    assert (ROOT / "docs/pictures/panel.jpg").stat().st_size < 600_000


def test_the_first_screen_says_what_for_whom_and_how() -> None:
    order = ["![", "Use it if you", "## Install", "pip install ", "## First example", "```python"]
    places = [README.index(one) for one in order]
    assert places == sorted(places)
    assert len(README[: places[-1]].split()) < 300, "somebody in a hurry wants the example"
