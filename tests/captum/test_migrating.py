"""docs/migrating.md says what is so: its imports and functions exist, its tests are there."""

import contextlib
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/migrating.md").read_text()
IMPORTS = re.findall(r"^\| `((?:captum|saliency)[\w.]+)` \| `([\w.]+)` \| (?:`([\w.]+)`)?", PAGE, re.MULTILINE)


def find(dotted: str) -> object:
    """What a dotted name stands for, a module or a name in one."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(dotted)
    module, name = dotted.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("old", "new", "native"), IMPORTS)
def test_imports(old: str, new: str, native: str) -> None:
    assert find(old) is not find(new)
    assert old.rsplit(".", 1)[1] == new.rsplit(".", 1)[1]
    assert not native or callable(find(native))


def test_every_class_is_in_the_table() -> None:
    faces = {"pysal.captum", "pysal.pair"}
    listed = {new for _old, new, _native in IMPORTS}
    assert {one.rsplit(".", 1)[0] for one in listed} == {*faces, "pysal.pair.metrics"}
    bases = {
        "Attribution",
        "GradientAttribution",
        "InputBaselineXGradient",
        "PerturbationAttribution",
        "CoreSaliency",
        "TorchModel",
    }
    for face in faces:
        public = importlib.import_module(face).__all__
        assert {f"{face}.{one}" for one in public if one[0].isupper() and not one.isupper() and one not in bases} <= listed


def test_every_difference_has_its_test() -> None:
    named = re.findall(r"\| `(test_\w+)` \|$", PAGE, re.MULTILINE)
    files = (
        "tests/captum/test_deviations.py",
        "tests/captum/test_batches.py",
        "tests/captum/test_gradients_at_layers.py",
        "tests/captum/test_coalitions.py",
        "tests/pair/test_against_pair.py",
        "tests/pair/test_names.py",
        "tests/pair/test_pic.py",
        "tests/pytorch_grad_cam/test_deviations.py",
    )
    sources = [(ROOT / one).read_text() for one in files]
    assert len(named) == len(set(named)) >= 14
    assert [one for one in named if not any(f"def {one}(" in source for source in sources)] == []
