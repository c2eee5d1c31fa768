"""docs/migrating.md says what is so: its imports and functions exist, its tests are there."""

import contextlib
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import captum
import captum.attr
import pytest
import torch

import pysal
import pysal.captum

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


def test_every_name_of_captums_is_on_the_page() -> None:
    named = set(re.findall(r"\w+", PAGE))
    assert set(captum.attr.__all__) - named == set()
    modules = {one.name for one in pkgutil.iter_modules(captum.__path__) if one.name[0] != "_"}
    assert modules - named == set()


def natively(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A map of a class of captum's, and of the native call that the page puts beside its arguments."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    ).double().eval()  # fmt: skip
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8)[:, None] // 4 * 2 + torch.arange(8) // 4)[None, None]
    face = pysal.captum
    if name == "Saliency":
        return face.Saliency(model).attribute(images, 3), pysal.gradient(model, images, 3).abs()
    if name == "InputXGradient":
        return face.InputXGradient(model).attribute(images, 3), pysal.gradient(model, images, 3) * images
    if name == "GuidedBackprop":
        return face.GuidedBackprop(model).attribute(images, 3), pysal.guided_backprop(model, images, 3)
    if name == "Deconvolution":
        return face.Deconvolution(model).attribute(images, 3), pysal.guided_backprop(model, images, 3, rule="deconvnet")
    if name == "IntegratedGradients":
        steps: dict[str, Any] = {"steps": 50, "quadrature": "gauss_legendre", "placement": "uniform"}
        theirs = face.IntegratedGradients(model).attribute(images, 0.5, [3, 1], n_steps=50, method="gausslegendre")
        return theirs, pysal.integrated_gradients(model, images, [3, 1], baseline=0.5, **steps)
    if name == "Occlusion":
        theirs = face.Occlusion(model).attribute(images, (3, 5, 5), (3, 2, 2), target=3).sum(1, keepdim=True) / 3
        return theirs, pysal.leave_one_out(model, images, 3, segments=pysal.Window(5, 2), score="logit")
    if name == "FeatureAblation":
        theirs = face.FeatureAblation(model).attribute(images, target=3, feature_mask=mask)[:, :1]
        return theirs, pysal.leave_one_out(model, images, 3, segments=mask[0, 0], score="logit")
    assert name == "LayerGradientXActivation"
    theirs = face.LayerGradientXActivation(model, model[0]).attribute(images, 3).sum(1, keepdim=True).relu()
    theirs = face.LayerAttribution.interpolate(theirs, (8, 8), "bilinear")
    return theirs, pysal.grad_cam(model, images, 3, layer="0", kind="hirescam")


@pytest.mark.parametrize(
    "name",
    ["Saliency", "InputXGradient", "GuidedBackprop", "Deconvolution", "IntegratedGradients", "Occlusion", "FeatureAblation",
     "LayerGradientXActivation"],
)  # fmt: skip
def test_native_spellings(name: str) -> None:
    face, native = natively(name)
    assert float((face - native).abs().max()) <= 1e-6 * float(face.abs().max())  # Occlusion is float32, as captum's


def test_native_words_exist() -> None:
    """Arguments that the page names as the native ones."""
    takes = {
        pysal.integrated_gradients: {"baseline", "steps", "quadrature", "placement", "tolerance", "extra_inputs", "batch_size"},
        pysal.smooth_grad: {"base", "samples", "kind", "noise"},
        pysal.leave_one_out: {"segments", "fill"},
        pysal.grad_cam: {"layer", "kind", "tokens", "fuse", "augment", "eigen_smooth"},
        pysal.blur_integrated_gradients: {"max_sigma", "derivative", "sqrt"},
        pysal.guided_integrated_gradients: {"steps", "fraction", "max_distance"},
        pysal.xrai: {"baseline", "segments", "algorithm", "min_area"},
        pysal.Explanation.plot: {"percentile"},
    }
    for function, words in takes.items():
        assert words <= set(inspect.signature(function).parameters)
        assert all(f"`{word}" in PAGE or f" {word}=" in PAGE or f"`{word}=" in PAGE for word in words - {"derivative"}), (
            function
        )


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
