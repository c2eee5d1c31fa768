"""What the documents show is so: their code runs, their commands exist, their pictures and links are there.

A block that is not run here says so in the line above it: `<!-- not run: why -->`, or `<!-- run by tests/...py -->`.
"""

import ast
import doctest
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch

from pysal.cli import main
from pysal.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "TESTING.md", "benchmarks/README.md", "csrc/README.md")),
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts),
]
FENCE = re.compile(r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
# What is not run but read like a page: nothing in them is code.
TEXTS = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "RELEASING.md", "SECURITY.md", "pysal/data/photos/LICENSES.md"))]
# Most words of a paragraph or an item of a list, and of the first paragraph of a page.
MOST_WORDS, MOST_WORDS_AT_FIRST = 90, 60
# A ratio in the other direction: CONTRIBUTING.md has the rule.
OTHER_DIRECTION = re.compile(r"\btimes (?:faster|slower)\b|\bspeed-?ups?\b|\d ?x (?:faster|slower)", re.IGNORECASE)
# What needs no running: output and listings, and what Sphinx reads.
NO_CODE = {"", "text", "{toctree}", "{eval-rst}"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what the comment above it says."""

    language: str
    code: str
    mark: str

    @property
    def runs(self) -> bool:
        return not self.mark.startswith(("not run", "run by"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page, in order; those of some languages that are run, where languages are named."""
    found = [Block(match["language"], match["code"], match["mark"] or "") for match in FENCE.finditer(page.read_text())]
    return [one for one in found if one.language in languages and one.runs] if languages else found


def prose(page: Path) -> str:
    """The page without fences, comments, tables, pictures and the targets of links."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("\n", page.read_text()), flags=re.DOTALL)
    text = re.sub(r"^ *[|%].*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^][]*)\]\([^)\s]*\)", r"\1", re.sub(r"!\[[^]]*\]\([^)]*\)", "", text))


def paragraphs(page: Path) -> list[str]:
    """The paragraphs and headings of a page, each item of a list by itself."""
    blocks = re.split(r"\n\s*\n|\n(?= *(?:[-*]|\d+\.) )", prose(page))
    return [block.strip() for block in blocks if block.strip()]


def commands(page: Path) -> list[list[str]]:
    lines = [line.split("#")[0] for block in blocks(page, "bash") for line in block.code.splitlines()]
    return [shlex.split(line) for line in lines if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python", "pycon")], ids=name_of)
def test_the_code_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for number, block in enumerate(blocks(page, "python", "pycon")):
            where = f"{name_of(page)}, block {number}"
            if block.language == "python":
                exec(compile(block.code, where, "exec"), names)  # the reader runs it too
                continue
            examples = doctest.DocTestParser().get_doctest(block.code, names, where, str(page), 0)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            output: list[str] = []
            runner.run(examples, out=output.append, clear_globs=False)
            names.update(examples.globs)
            assert not runner.failures, "".join(output)
    for written in re.findall(r'\bsave\("(\w+)"\)', page.read_text()):
        assert list((tmp_path / written).rglob("*.png")), f"{name_of(page)} says that it saves a picture in {written}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_checked_or_says_why_not(page: Path) -> None:
    text = page.read_text()
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks(page)), "a fence is open, or indented"
    for block in blocks(page):
        if block.mark.startswith("run by"):
            assert (ROOT / block.mark.removeprefix("run by").strip()).is_file(), block.mark
        elif block.mark.startswith("not run"):
            assert re.fullmatch(r"not run: \w.*", block.mark), "say why it is not run"
        else:
            assert block.language in NO_CODE | {"python", "pycon", "bash"}, f"nothing checks a block of {block.language}"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_the_commands_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    stages = re.findall(r"^ *(?:\[\[ .* \]\] \|\| )?stage ([a-z-]+) ", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    for command, *arguments in commands(page):
        if command == "make":
            assert {one for one in arguments if "=" not in one} <= set(targets)
        elif command == ".ci/run":
            assert set(arguments) <= set(stages)
        elif command == "pysal":
            known: click.Command | None = main
            context, rest = click.Context(main), arguments
            while isinstance(known, click.Group) and rest:
                known, rest = known.get_command(context, rest[0]), rest[1:]
            assert known is not None, f"pysal has no command {shlex.join(arguments)}"
            options = {option for one in known.params for option in one.opts}
            unknown = {one.split("=")[0] for one in rest if one.startswith("-")} - options - {"--help"}
            assert not unknown, f"pysal {shlex.join(arguments)}: no {', '.join(unknown)}"
        else:
            assert command in ("pip", "python"), f"nothing checks {command}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_lead_somewhere(page: Path) -> None:
    """Sphinx checks anchors; this is for the pages as files, too: that they are read where the repository is."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_nothing_is_long(page: Path) -> None:
    found = paragraphs(page)
    for text in found:
        assert len(text.split()) <= MOST_WORDS, f"make two paragraphs, or a list, of: {text}"
    if found:  # a page of the site that is elsewhere in the repository holds nothing but a comment
        title, first = (*found, "#")[:2]
        assert title.startswith("# ")
        assert not first.startswith("#"), f"{title}: say first what the reader can do with the page"
        assert len(first.split()) <= MOST_WORDS_AT_FIRST, f"{title}: say in fewer words what the page is for"


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_headings_of_a_page_differ(page: Path) -> None:
    headings = [text.splitlines()[0] for text in paragraphs(page) if text.startswith("#")]
    places: list[tuple[str, ...]] = []
    for heading in headings:
        depth = len(heading.split()[0])
        places.append((*(places[-1][: depth - 1] if places else ()), heading))
    assert len(set(places)) == len(places), [place[-1] for place in places if places.count(place) > 1]


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_have_titles(page: Path) -> None:
    for words in re.findall(r"\[([^][]*)\]\([^)\s]+\)", FENCE.sub("", page.read_text())):
        assert not re.search(r"\.(?:md|html)`?$", words), f"write the title of the page instead of {words}"
    bare = re.findall(r"\bdocs/[\w/]+\.md\b", re.sub(r"`[^`]*`", "", prose(page)))
    assert not bare, f"make links of {bare}"


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_ratios_have_one_direction(page: Path) -> None:
    found = OTHER_DIRECTION.search(re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text())))
    assert found is None, f"write how many times as long it takes, or which share of the time: {found and found[0]}"


def test_every_picture_is_shown() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    shown = {Path(target).name for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)}
    drawn = {path.name for path in (ROOT / "docs/figures").iterdir()}
    assert drawn <= shown, f"no page shows {drawn - shown}"


def test_every_picture_says_what_it_shows() -> None:
    for page in PAGES:
        for words, target in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", page.read_text()):
            assert len(words.split()) >= 3, f"{name_of(page)}: {target} needs a description"


def test_the_methods_are_the_registry() -> None:
    rows = re.findall(
        r"^\| \[(.+)\]\((\w+)\.md.*\) \| (.+) \| (.+) \|$", (ROOT / "docs/methods/index.md").read_text(), re.MULTILINE
    )
    assert [(title, summary, cost) for title, _, summary, cost in rows] == [
        (method.title, method.summary, method.cost) for method in METHODS.values()
    ]


def test_every_method_page_has_its_parts() -> None:
    parts = ["What it computes", "When to trust it", "Known failures", "Cost", "Options", "References"]
    for page in (ROOT / "docs/methods").glob("*.md"):
        if page.name != "index.md":
            found = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
            assert [one for one in found if one in parts] == parts, page.name
            failures = page.read_text().split("## Known failures")[1].split("\n## ")[0]
            assert "](../figures/" in failures, f"{page.name} shows no failure"


def test_troubleshooting_quotes_what_pysal_says() -> None:
    """Each quotation is found in one string of the package, so that an error that is reworded is reworded there, too."""
    said = set()
    for path in [*(ROOT / "pysal").rglob("*.py"), ROOT / "pysal_saliency.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    elsewhere = ("module 'pysal' has no attribute 'explain'", "out of memory", "(no space left on device)")  # of others
    page = re.sub(r"`[^`\n]*`", "", FENCE.sub("", (ROOT / "docs/troubleshooting.md").read_text()))
    quotations = re.findall(r'"([^"\n]+)"', page)
    assert quotations
    for piece in (piece.strip() for quotation in quotations for piece in quotation.split("...")):
        assert piece in elsewhere or any(piece in one for one in said), f"no message of pysal has the words {piece!r}"
