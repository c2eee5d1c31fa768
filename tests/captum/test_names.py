"""Every name and path of captum's is found below pysal.captum: ours where there is one, captum's own elsewhere."""

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import captum
import pytest

import pysal.captum
import pysal.captum.attr
from pysal._elsewhere import Elsewhere
from pysal.captum._elsewhere import HOMES


def modules_of(package: ModuleType) -> Iterator[str]:
    """Every module of captum's that can be imported here."""
    for one in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            importlib.import_module(one.name)
        except ImportError:  # of what captum need not have
            continue
        yield one.name


def here(module: str) -> ModuleType:
    return importlib.import_module(f"pysal.{module}")


@pytest.mark.parametrize("module", sorted(modules_of(captum)))
def test_every_module_has_its_place(module: str) -> None:
    theirs, ours = importlib.import_module(module), here(module)
    assert ours.__name__ == f"pysal.{module}"
    for name, value in vars(theirs).items():
        if name.startswith("__"):
            continue
        found = getattr(ours, name)
        if isinstance(value, ModuleType) and value.__name__.startswith("captum"):
            assert found is here(value.__name__)
        elif isinstance(value, type) and value.__name__ in HOMES and value.__module__.startswith("captum."):
            assert found is getattr(pysal.captum, value.__name__)
        else:
            assert found is value


def test_every_class_of_ours_is_where_captum_has_it() -> None:
    for name, (_, home) in HOMES.items():
        assert getattr(importlib.import_module(f"captum.{home}"), name).__name__ == name
        assert getattr(here(f"captum.{home}"), name) is getattr(pysal.captum, name)
    assert set(HOMES) == set(pysal.captum.__all__)


def test_ways_to_import() -> None:
    """Those of captum's tutorials."""
    program = """
import captum
from captum.attr import DeepLift, IntegratedGradients, LRP
from captum.attr import visualization as viz
from captum.attr._utils.visualization import visualize_image_attr as picture
import captum.attr._core.layer.grad_cam as at_a_layer
from captum.metrics import infidelity, sensitivity_max
from captum.metrics._core.infidelity import infidelity_perturb_func_decorator
from captum.concept import TCAV, Concept
from captum.influence import TracInCP
from captum.robust import FGSM
assert captum.__version__ == "0.9.0"
assert captum.attr.IntegratedGradients is IntegratedGradients
assert viz.visualize_image_attr is picture
assert captum.metrics.infidelity is infidelity
"""
    found: dict[str, object] = {}
    for one in (program, program.replace("import captum\n", "import pysal.captum as captum\n")):
        changed = one if one is program else one.replace("from captum", "from pysal.captum").replace(
            "import captum.", "import pysal.captum."
        )  # fmt: skip
        exec(changed, found)
    assert found["IntegratedGradients"] is pysal.captum.IntegratedGradients
    assert found["at_a_layer"].LayerGradCam is pysal.captum.LayerGradCam  # type: ignore[attr-defined]


def test_all_names_at_once() -> None:
    found: dict[str, object] = {}
    exec("from pysal.captum.attr import *", found)
    assert {*captum.attr.__all__, *pysal.captum.__all__} <= set(found)
    assert found["Saliency"] is pysal.captum.Saliency
    assert set(captum.attr.__all__) <= set(dir(pysal.captum.attr))


def test_names_that_nobody_has() -> None:
    with pytest.raises(AttributeError, match=r"'pysal.captum' has no attribute 'Salency', nor has captum .*'Saliency'\?"):
        pysal.captum.Salency  # noqa: B018
    with pytest.raises(ImportError, match="no_such_thing"):
        importlib.import_module("pysal.captum.no_such_thing")
    with pytest.raises(ImportError, match="not a package"):
        importlib.import_module("pysal.captum.saliency.deeper")
    assert not hasattr(pysal.captum, "__wrapped__")


WITHOUT = """
import importlib, importlib.util, sys
sys.modules["captum"] = None  # as a program says it that wants to do without
import pysal.captum
from pysal.captum.attr import *
from pysal.captum.attr import Saliency
from pysal.captum.attr._core.saliency import Saliency as by_path
from pysal.captum.attr._core.layer.grad_cam import LayerGradCam as of_a_layer
assert by_path is Saliency is pysal.captum.Saliency and of_a_layer is LayerGradCam
for statement in sys.argv[1:]:
    try:
        exec(statement)
    except (AttributeError, ImportError) as error:
        print(type(error).__name__, error)
assert [name for name in sys.modules if name.split(".")[0] == "captum"] == ["captum"]
"""


def test_where_captum_is_not_installed() -> None:
    said = {
        "from pysal.captum import LRP": "ImportError pysal.captum has no LRP",
        "from pysal.captum.attr import TokenReferenceBase": "ImportError pysal.captum.attr has no TokenReferenceBase",
        "import pysal.captum.metrics": "ImportError pysal.captum has no metrics",
        "from pysal.captum.attr._core import lrp": "ImportError pysal.captum.attr._core has no lrp",
        "from pysal.captum.attr._core.saliency import log": "ImportError pysal.captum.attr._core.saliency has no log",
        "pysal.captum.LRP": "AttributeError pysal.captum has no LRP",
    }
    rest = " of its own: captum, whose names it hands on, must be installed (pip install captum==0.9.0)"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT, *said], capture_output=True, text=True, check=False, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [one + rest for one in said.values()]


def test_a_library_that_is_there_and_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it raises is no AttributeError, so `hasattr` of the face would raise it, too."""
    (tmp_path / "broken_library.py").write_text("raise RuntimeError('no such operator')", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    broken = Elsewhere("pysal.face", "broken_library", "broken_library", "broken-library", {})
    with pytest.raises(AttributeError) as raised:
        broken.get("Name", "pysal.face", ("broken_library",))
    why = "broken_library, whose names it hands on, must be importable, got RuntimeError: no such operator"
    assert str(raised.value) == f"pysal.face has no Name of its own: {why}"
