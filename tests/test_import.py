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


@pytest.mark.parametrize("stranger", ["base.py", "explore", "lib", "model", "viz"])
def test_files_of_the_spatial_analysis_library_are_refused(stranger: str, tmp_path: Path) -> None:
    (tmp_path / "pysal").mkdir()
    shutil.copy(PACKAGE / "__init__.py", tmp_path / "pysal")
    assert run("import pysal", tmp_path).returncode == 0
    if stranger.endswith(".py"):
        (tmp_path / "pysal" / stranger).touch()
    else:
        (tmp_path / "pysal" / stranger).mkdir()
    done = run("import pysal", tmp_path)
    assert done.returncode == 1
    assert f"ImportError: pysal: {tmp_path}/pysal must hold pysal-saliency alone, got {stranger} of PySAL" in done.stderr
