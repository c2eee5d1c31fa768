"""The documentation as a site builds without a warning, and its pages need nothing from elsewhere."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "PYSAL_SITE" in os.environ:  # which was just built, with the same flags
        return Path(os.environ["PYSAL_SITE"])
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--nitpicky", "--fail-on-warning", "--quiet", "-d", str(out / "doctrees")]
    built = subprocess.run([*command, "docs", str(out / "html")], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out / "html"


def test_no_name_in_a_docstring_is_split_over_two_lines() -> None:
    """Sphinx reads it as a reference that leads nowhere; here that is seen without a build."""
    for path in (ROOT / "pysal").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                    # a literal, in double backticks, is no reference
                    names = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"``[^`]+``", "", paragraph))
                    split = [name for name in names if "\n" in name]
                    assert not split, f"{path.relative_to(ROOT)}: {split}"


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    # addresses that a browser fetches by itself; <a href> is followed by people
    fetched = re.compile(
        r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["'](?:https?:)?//|@import|url\(["']?(?:https?:)?//"""
    )
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css"):
            assert not fetched.search(path.read_text()), path.relative_to(site)


@pytest.mark.slow
def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "methods/integrated_gradients.html").read_text()
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in page
    assert "$" not in re.sub(r"<(script|pre)\b.*?</\1>", "", page, flags=re.DOTALL)


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    import pysal

    pages = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    modules = {
        name for name in pysal.__all__ if isinstance(getattr(pysal, name), ModuleType)
    }  # whose names have pages of their own
    for name in set(pysal.__all__) - modules - {"__version__"}:
        assert f'id="pysal.{name}"' in pages, f"docs/api says nothing of pysal.{name}"
