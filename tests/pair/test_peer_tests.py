"""The tests that come with PAIR's wheel, run against pysal.pair: their `from . import gradients` finds ours."""

import importlib
import importlib.util
import sys
import unittest
from pathlib import Path

import pytest
import saliency

import pysal.pair

FILES = ["base_test", "gradients_test", "integrated_gradients_test", "blur_ig_test", "grad_cam_test", "occlusion_test"]
FILES += ["guided_ig_test", "xrai_test"]


@pytest.mark.filterwarnings("ignore:__package__ != __spec__.parent")
@pytest.mark.parametrize("name", FILES)
def test_pairs_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(saliency.__file__).parent / "core" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"pysal.pair.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # its mocks name what they replace by the path of the test
    monkeypatch.setitem(sys.modules, f"pysal.pair.{name}", module)
    monkeypatch.setattr(pysal.pair, name, module, raising=False)
    spec.loader.exec_module(module)
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    assert suite.countTestCases() > 0
    home = name.removesuffix("_test")
    assert getattr(module, home).__name__ == f"pysal.pair.{home}", "the file tests PAIR, not pysal.pair"
    result = unittest.TestResult()
    suite.run(result)
    assert [text for _case, text in result.failures + result.errors] == []
