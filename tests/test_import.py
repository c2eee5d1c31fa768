"""What `import pysal` does: little, and it refuses to be mixed with the other package of that name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pysal

PACKAGE = Path(pysal.__file__).parent


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, which comes first on the path of modules."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_import_waits_for_nothing() -> None:
    heavy = {"torch", "numpy", "matplotlib", "skimage", "PIL"}
    done = run(f"import pysal, sys; print(sorted({heavy!r} & set(sys.modules)))", PACKAGE.parent)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_is_there() -> None:
    for name in pysal.__all__:
        assert getattr(pysal, name) is not None
    assert set(pysal.__all__) <= set(dir(pysal))


def test_module_of_explain_does_not_hide_the_function() -> None:
    done = run("import pysal.explain\nfrom pysal.explain import explain\nprint(pysal.explain is explain)", PACKAGE.parent)
    assert done.stdout.strip() == "True", done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'pysal' has no attribute 'weights'$"):
        _ = pysal.weights


ONE_OF_EACH = """
import {first}, {second}
import {second}.captum, {first}.captum, {first}.engine.running.chunks
from {second}.explain import explain
assert {first} is {second} and {first}.captum is {second}.captum and explain is {first}.explain
import sys
names = {{name.removeprefix("pysal_saliency").removeprefix("pysal") for name in sys.modules if name.startswith("pysal")}}
twice = [n for n in names if n and "pysal" + n in sys.modules and "pysal_saliency" + n in sys.modules]
assert all(sys.modules["pysal" + name] is sys.modules["pysal_saliency" + name] for name in twice) and ".captum" in twice
try:
    import {second}.nothing
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.mark.parametrize(("first", "second"), [("pysal", "pysal_saliency"), ("pysal_saliency", "pysal")])
def test_both_names_are_one_package(first: str, second: str) -> None:
    done = run(ONE_OF_EACH.format(first=first, second=second), PACKAGE.parent)
    assert done.stdout == f"No module named '{second}.nothing'\n", done.stderr


def test_a_checkout_found_after_the_spatial_analysis_library_says_so(tmp_path: Path) -> None:
    (tmp_path / "pysal").mkdir()
    (tmp_path / "pysal" / "__init__.py").write_text("spatial = True")
    shutil.copy(PACKAGE.parent / "pysal_saliency.py", tmp_path)
    done = run("import pysal_saliency", tmp_path)
    assert done.returncode == 1
    assert "ImportError: pysal_saliency: a checkout must not share an environment with PySAL" in done.stderr
