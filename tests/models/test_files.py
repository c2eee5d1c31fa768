"""Models in files: TorchScript, torch.export, ONNX, Python."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pysal
from pysal.models import load
from tests.models.networks import CLASSES, Small, drawn
from tests.models.onnx_file import write

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
OPTIONS = {
    "leave_one_out": {"segments": pysal.Grid(2, 2)},
    "smooth_grad": {"samples": 2},
    "integrated_gradients": {"steps": 2},
    "blur_integrated_gradients": {"steps": 2},
}
ABOUT = {"size": 32, "normalize": "imagenet"}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def small() -> Small:
    return drawn(Small)


@pytest.fixture(scope="module")
def files(small, tmp_path_factory) -> Path:
    """The same network in every kind of file."""
    folder = tmp_path_factory.mktemp("models")
    some = {"images": {0: torch.export.Dim("rows")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's own, of itself
        torch.jit.save(torch.jit.script(small), folder / "script.pt")
        torch.jit.save(torch.jit.trace(small, IMAGES), folder / "trace.pt")
        torch.export.save(torch.export.export(small, (IMAGES,), dynamic_shapes=some), folder / "any.pt2")
        torch.export.save(torch.export.export(small, (IMAGES[:1],)), folder / "one.pt2")
        torch.export.save(torch.export.export(small, (IMAGES[:2],)), folder / "two.pt2")
    write(small, folder / "any.onnx")
    write(small, folder / "one.onnx", batch=1, side=32)
    write(small, folder / "two.onnx", batch=2)
    torch.save(small.state_dict(), folder / "weights.pt")
    torch.save(small, folder / "pickle.pt")
    for kind in ("pt", "pt2", "onnx"):
        (folder / f"broken.{kind}").write_bytes(b"no model at all")
    (folder / "code.py").write_text(
        "import torch\nfrom pysal.models import Classifier\nfrom tests.models.networks import Small, drawn\n\n"
        "def network():\n    return drawn(Small)\n\n"
        "def classifier():\n    about = {'name': 'mine', 'class_names': list('abcde'), 'input_size': (32, 32)}\n"
        "    return Classifier(drawn(Small), **about)\n\n"
        "def fails():\n    return 1 / 0\n\n"
        "def number():\n    return 7\n"
    )
    return folder


def expected(small: Small, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return small((images - MEAN) / STD)


KINDS = ["script.pt", "trace.pt", "any.pt2", "one.pt2", "two.pt2", "any.onnx", "one.onnx", "two.onnx"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_the_network(name, small, files) -> None:
    model = load(files / name, **ABOUT)
    assert model.name == str(files / name)
    assert model.input_size == (32, 32)
    assert model.class_names == tuple(f"class {index}" for index in range(CLASSES))
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), expected(small))
        torch.testing.assert_close(model(IMAGES[:1]), expected(small, IMAGES[:1]))


# TorchScript runs no hooks, so its layers cannot be seen; a network of two images at a time has no map of one
NO_LAYERS = {"script.pt", "trace.pt", "two.pt2", "two.onnx"}


@pytest.mark.parametrize("name", KINDS)
def test_methods_are_those_of_the_network(name, small, files) -> None:
    """Whatever number of images the file takes at a time, three are explained as the network itself is."""
    model = load(files / name, **ABOUT)
    found = pysal.explain(model, IMAGES, target=2, method_options=OPTIONS)
    whole = pysal.Normalized(small, MEAN.flatten().tolist(), STD.flatten().tolist()).eval()
    truth = pysal.explain(whole, IMAGES, target=2, method_options=OPTIONS)
    assert set(found.skipped) == ({"grad_cam", "guided_grad_cam"} if name in NO_LAYERS else set())
    for method, result in found.results.items():
        scale = float(truth[method].map.abs().max())
        torch.testing.assert_close(result.map, truth[method].map, rtol=0, atol=1e-4 * scale, msg=f"{method}")


def test_sizes_that_a_file_says_need_not_be_given(files) -> None:
    for name in ("one.onnx", "any.pt2", "one.pt2"):
        assert load(files / name, normalize="none").input_size == (32, 32)
    with pytest.raises(ValueError) as error:
        load(files / "any.onnx", normalize="none")
    sentence = "pysal.models.load: size must be given for a file that does not say which images it takes (224, say), got None"
    assert str(error.value) == sentence
    assert load(files / "any.onnx", normalize="none", size=(24, 40)).input_size == (24, 40)


def test_normalisation_must_be_said(files) -> None:
    with pytest.raises(ValueError) as error:
        load(files / "script.pt", size=32)
    assert str(error.value) == (
        "pysal.models.load: normalize must be given for a file, which does not say how its images were normalised "
        "('imagenet', 'none' for images in [0, 1], or (mean, std)), got None"
    )


@pytest.mark.parametrize(
    ("normalize", "mean", "std"),
    [
        ("none", [0, 0, 0], [1, 1, 1]),
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ((0.5, 0.25), [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]),
        (([0.1, 0.2, 0.3], (1, 2, 3)), [0.1, 0.2, 0.3], [1, 2, 3]),
    ],
)
def test_normalisation(normalize, mean, std, files) -> None:
    network = load(files / "script.pt", size=32, normalize=normalize).network
    assert torch.equal(network.mean.flatten(), torch.tensor(mean, dtype=torch.float32))
    assert torch.equal(network.std.flatten(), torch.tensor(std, dtype=torch.float32))


@pytest.mark.parametrize(
    "normalize", ["Imagenet", (0.5,), (0.5, 0), ([0.5, 0.5], [1, 1, 1]), ([], 1), (float("nan"), 1), 0.5, ("0.5", "0.5")]
)
def test_bad_normalisation(normalize, files) -> None:
    with pytest.raises(ValueError) as error:
        load(files / "script.pt", size=32, normalize=normalize)
    requirement = "be 'imagenet', 'none' or (mean, std), each a number or one per channel, those of std above 0"
    assert str(error.value) == f"pysal.models.load: normalize must {requirement}, got {normalize!r}"


def test_class_names(files) -> None:
    model = load(files / "script.pt", **ABOUT, class_names=["a", "b", "c", "d", "e"])
    assert model.class_index("d") == 3
    with pytest.raises(ValueError) as error:
        load(files / "script.pt", **ABOUT, class_names=["a", "b"])
    assert str(error.value) == (
        "pysal.models.load: class_names must have one name for each of the model's 5 classes, got 2 names"
    )
    for names in ("a", [1, 2], 3):
        with pytest.raises(TypeError, match="class_names must be 'imagenet', a list of names, or a name for each index"):
            load(files / "script.pt", **ABOUT, class_names=names)


def test_a_thousand_classes_normalised_as_imagenet_are_its(tmp_path) -> None:
    path = write(drawn(lambda: Small(1000)), tmp_path / "thousand.onnx")
    assert load(path, **ABOUT).class_index("tabby") == 281
    assert load(path, size=32, normalize="none").class_names[281] == "class 281"
    assert load(path, size=32, normalize="none", class_names="imagenet").class_index("tabby") == 281


@pytest.mark.parametrize("name", ["broken.pt", "weights.pt", "pickle.pt"])
def test_what_is_no_torchscript(name, files, monkeypatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(ValueError) as error:
        load(files / name, **ABOUT)
    assert str(error.value) == (
        "pysal.models.load: source must be a TorchScript file (weights alone are loaded into an architecture: weights=, "
        f"--weights), got {files / name}"
    )


def test_broken_files(files, capfd) -> None:
    for name, kind in (("broken.pt2", "a program of torch.export"), ("broken.onnx", "an ONNX model")):
        with pytest.raises(ValueError) as error:
            load(files / name, **ABOUT)
        assert str(error.value).startswith(f"pysal.models.load: source must be {kind}, got {files / name} (")
        assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", ""), "the libraries' own complaints are not shown"


@pytest.mark.parametrize("suffix", ["pt", "pt2", "onnx"])
def test_missing_files(suffix) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load(f"nowhere/model.{suffix}", **ABOUT)
    assert str(error.value) == (
        f"pysal.models.load: source must be a readable file, got nowhere/model.{suffix} (No such file or directory)"
    )


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (torch.nn.Conv2d(3, 4, 3), "return logits (2, classes) for images (2, 3, 32, 32), got shape (2, 4, 30, 30)"),
        (torch.nn.Flatten(0), "return logits (2, classes) for images (2, 3, 32, 32), got shape (6144,)"),
        (torch.nn.Linear(7, 4), "be a classifier of images (2, 3, 32, 32), got RuntimeError: "),
    ],
)
def test_what_is_no_classifier(network, expected, tmp_path) -> None:
    path = tmp_path / "other.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network), path)
    with pytest.raises(ValueError) as error:
        load(path, **ABOUT)
    assert str(error.value).startswith(f"pysal.models.load: source {str(path)!r} must {expected}")
    assert "\n" not in str(error.value)


def test_programs_that_take_something_else(tmp_path) -> None:
    class Two(torch.nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first + second

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Two(), (IMAGES, IMAGES)), tmp_path / "two.pt2")
    with pytest.raises(ValueError, match=r"must take images \(N, C, H, W\), got 2 inputs"):
        load(tmp_path / "two.pt2", **ABOUT)


# --- ONNX without onnx2torch, and with an operator it does not know


def test_black_box(small, files, monkeypatch) -> None:
    """ONNX Runtime answers as the network; leave-one-out explains it, and the others say why they cannot."""
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    for name in ("any.onnx", "one.onnx", "two.onnx"):
        model = load(files / name, **ABOUT)
        torch.testing.assert_close(model(IMAGES), expected(small))
        found = pysal.explain(model, IMAGES, target=2, method_options=OPTIONS)
        assert list(found.results) == ["leave_one_out"]
        assert found.skipped["gradient"] == (
            "pysal.gradient: model must be differentiable, got a score that does not depend on the inputs through torch; "
            "leave_one_out explains such a model"
        )
        whole = pysal.Normalized(small, MEAN.flatten().tolist(), STD.flatten().tolist()).eval()
        drops = pysal.leave_one_out(whole, IMAGES, 2, segments=pysal.Grid(2, 2))
        scale = float(drops.abs().max())
        torch.testing.assert_close(found.maps["leave_one_out"], drops, rtol=0, atol=1e-4 * scale)


def test_neither_runtime_nor_converter(files, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError) as error:
        load(files / "any.onnx", **ABOUT)
    assert str(error.value) == (
        f"pysal.models.load: source {str(files / 'any.onnx')!r} must be of a library that is installed, onnxruntime, "
        'got no onnxruntime (run: pip install "pysal-saliency[onnx]")'
    )


def test_a_converter_that_does_not_go_with_what_else_is_installed(small, files, tmp_path, monkeypatch) -> None:
    (tmp_path / "onnx2torch.py").write_text("raise RuntimeError('no operator nms')")
    for module in [name for name in sys.modules if name.split(".")[0] == "onnx2torch"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=r"onnx2torch cannot be imported \(no operator nms\)$") as caught:
        model = load(files / "any.onnx", **ABOUT)
    assert caught[0].filename == __file__
    torch.testing.assert_close(model(IMAGES), expected(small))


def test_an_operator_that_cannot_be_converted(small, tmp_path) -> None:
    path = write(small, tmp_path / "hardmax.onnx", extra="Hardmax")
    with pytest.warns(
        UserWarning, match=r"only leave_one_out can explain '.*hardmax.onnx': onnx2torch cannot convert it \("
    ) as caught:
        model = load(path, **ABOUT)
    assert caught[0].filename == __file__
    answers = expected(small)
    assert torch.equal(model(IMAGES), torch.nn.functional.one_hot(answers.argmax(1), CLASSES).float())


# --- code


def test_code_is_run_only_when_that_is_permitted(files, monkeypatch) -> None:
    with pytest.raises(PermissionError) as error:
        load(f"{files / 'code.py'}:network", **ABOUT)
    assert str(error.value) == (
        "pysal.models.load: allow_code must be True (--allow-code) for a Python file, which will be run, "
        f"got False for {files / 'code.py'}:network"
    )


def test_code(small, files) -> None:
    path = list(sys.path)
    network = load(f"{files / 'code.py'}:network", **ABOUT, allow_code=True)
    with torch.no_grad():
        torch.testing.assert_close(network(IMAGES), expected(small))
    mine = load(f"{files / 'code.py'}:classifier", allow_code=True)
    assert (mine.name, mine.class_names, mine.training) == ("mine", tuple("abcde"), False)
    other = {name: torch.ones_like(value) for name, value in mine.state_dict().items()}
    torch.save(other, files / "mine.pth")
    changed = load(f"{files / 'code.py'}:classifier", allow_code=True, weights=files / "mine.pth")
    assert all(torch.equal(value, other[name]) for name, value in changed.state_dict().items())
    assert sys.path == path


@pytest.mark.parametrize(
    ("function", "error", "expected"),
    [
        ("fails", ValueError, "be code that runs, got {path}:fails (ZeroDivisionError: division by zero)"),
        ("number", TypeError, "return a torch.nn.Module, got int from {path}:number"),
        ("nothing", ValueError, "name a function of {path} (Classifier, Small, drawn, network, classifier, fails, number), "
         "got 'nothing'"),
    ],
)  # fmt: skip
def test_code_that_cannot_be_used(function, error, expected, files) -> None:
    path = files / "code.py"
    with pytest.raises(error) as caught:
        load(f"{path}:{function}", **ABOUT, allow_code=True)
    assert str(caught.value) == f"pysal.models.load: source must {expected.format(path=path)}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("code.py", "name a function of the file, as in code.py:classifier, got 'code.py'"),
        ("x.pth", "be an architecture, whose weights are given apart (weights=, --weights), got 'x.pth'"),
        ("tests", "say what kind of folder it is, as in transformers:tests, got 'tests'"),
        ("keras:resnet", "be efficientnet-lite0, efficientnet-lite1, torchvision:NAME, timm:NAME, transformers:NAME, or a file "
         ".pt, .pt2, .onnx or .py:FUNCTION, got 'keras:resnet'"),
    ],
)  # fmt: skip
def test_sources_that_are_none(source, expected, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(ValueError) as error:
        load(source)
    assert str(error.value) == f"pysal.models.load: source must {expected}"


def test_other_bad_arguments(files) -> None:
    with pytest.raises(TypeError, match="source must be a name or a file, got int"):
        load(7)
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        load(files / "script.pt", size=0, normalize="none")
    with pytest.raises(ValueError, match="weights must be None for a file, which has its own, got 'random'"):
        load(files / "script.pt", **ABOUT, weights="random")


# --- grad_cam on what has no layers


def test_a_layer_of_torchscript(files) -> None:
    with pytest.raises(ValueError) as error:
        pysal.grad_cam(load(files / "script.pt", **ABOUT), IMAGES, 1, layer="network.model.relu")
    assert str(error.value) == (
        "pysal.grad_cam: layer must be a module that Python runs, not one of TorchScript, got 'network.model.relu'"
    )


def test_a_layer_that_answers_for_more_images(files) -> None:
    with pytest.raises(ValueError) as error:
        pysal.grad_cam(load(files / "two.onnx", **ABOUT), IMAGES, 1, layer="network.model.model.Relu_1")
    assert str(error.value) == (
        "pysal.grad_cam: layer 'network.model.model.Relu_1' must return a map for each of 3 images, got 4 maps"
    )
