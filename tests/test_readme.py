"""README.md says what is so: its code runs, its commands exist, its table is the registry's, its files are there."""

import re
import shlex
from pathlib import Path

import click
import pytest
import torch

from pysal.cli import main
from pysal.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_code_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(blocks("python")) >= 4
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), names)  # the reader runs it too
    assert list((tmp_path / "out").rglob("*.png"))


def test_every_block_has_a_language_that_is_checked() -> None:
    assert set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) == {"python", "bash", ""}
    assert README.count("\n```") == 2 * sum(len(blocks(language)) for language in ("python", "bash"))


def test_the_commands_exist() -> None:
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command, *arguments in map(shlex.split, lines):
        if command == "make":
            assert set(arguments) <= set(targets)
        elif command == "pysal":
            name, context = arguments[0], click.Context(main)
            found = main.get_command(context, name)
            assert found is not None, f"pysal has no command {name}"
            found.make_context(name, arguments[1:], parent=context)  # fails for an unknown option
        else:
            assert command == "pip"


def test_the_table_is_the_registry() -> None:
    rows = re.findall(r"^\| (.+) \(`(\w+)`\) \| (.+) \| (.+) \|$", README, re.MULTILINE)
    assert rows == [(method.title, method.name, method.summary, method.cost) for method in METHODS.values()]


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_the_picture_is_small_enough_for_a_page() -> None:
    assert (ROOT / "docs/pictures/panel.png").stat().st_size < 600_000
