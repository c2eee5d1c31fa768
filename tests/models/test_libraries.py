"""Classifiers of torchvision, timm and transformers: their weights, preprocessing and classes; nothing fetched unless asked."""

import hashlib
import json
import pickle
import socket
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image

import pysal
from pysal.models import load, read_image
from pysal.models.classifier import Resample
from tests.models.networks import drawn

PHOTO = Path(__file__).parents[2] / "pysal/data/photos" / "chelsea.jpg"
OPTIONS = {
    "leave_one_out": {"segments": pysal.Grid(2, 2)},
    "smooth_grad": {"samples": 2},
    "integrated_gradients": {"steps": 2},
    "blur_integrated_gradients": {"steps": 2},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    """Whoever asks for a connection fails the test."""

    def connect(*_args, **_kwargs):
        pytest.fail("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def squared_photo() -> Image.Image:
    """A photo that no processor stretches."""
    with Image.open(PHOTO) as picture:
        return picture.convert("RGB").crop((50, 0, 350, 300))


def cache(monkeypatch, folder: Path, entry: object, network: torch.nn.Module) -> Path:
    """Put a network's weights where torch.hub would, as those of `entry`."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    path = folder / "weights.pth"
    torch.save(network.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    path = path.rename(folder / "checkpoints" / f"small-{digest}.pth")
    monkeypatch.setattr(entry.value, "url", f"https://weights.invalid/{path.name}")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
    return path


# --- torchvision


def test_torchvision_published_weights(monkeypatch, tmp_path) -> None:
    """Those of the cache; the preprocessing is the weights' own; the random state stays as it was."""
    entry = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
    network = drawn(torchvision.models.mobilenet_v2, seed=5)
    cache(monkeypatch, tmp_path, entry, network)
    before = torch.get_rng_state()
    model = load("torchvision:mobilenet_v2", weights="IMAGENET1K_V1")
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.name, model.input_size, model.crop_fraction) == ("mobilenet_v2", (224, 224), 224 / 256)
    assert model.class_index("tabby") == 281
    photo = squared_photo()
    with torch.no_grad():
        seen = entry.transforms()(photo)[None]
        expected = network(seen)
        ours = read_image(photo, model)
        # cropped before it is resized where torchvision crops afterwards: the pixels differ by what half a pixel's shift does
        assert float(((ours - model.network.mean) / model.network.std - seen).abs().mean()) < 0.05
        torch.testing.assert_close(model(seen * model.network.std + model.network.mean), expected, rtol=1e-3, atol=1e-3)


def test_torchvision_googlenet_as_published(monkeypatch, tmp_path) -> None:
    """Its weights were trained on images in another range, to which the network brings them itself."""
    entry = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1
    network = drawn(lambda: torchvision.models.googlenet(init_weights=False, aux_logits=True, transform_input=True))
    cache(monkeypatch, tmp_path, entry, network)
    model = load("torchvision:googlenet")
    assert model.network.model.transform_input
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), network((images - model.network.mean) / model.network.std))


def test_torchvision_weights_that_were_changed(monkeypatch, tmp_path) -> None:
    entry = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
    path = cache(monkeypatch, tmp_path, entry, torch.nn.Linear(2, 2))
    path.write_bytes(path.read_bytes() + b"more")
    found = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    with pytest.raises(ValueError) as error:
        load("torchvision:mobilenet_v2", weights="IMAGENET1K_V1")
    digits = path.stem.split("-")[1]
    expected = f"weights must have a SHA-256 that starts with {digits}, got {found}... in {path}"
    assert str(error.value) == f"pysal.models.load: {expected}"


def test_torchvision_weights_that_are_not_here(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        load("torchvision:resnet18")
    assert str(error.value) == (
        "pysal.models.load: weights must be on this machine, or be fetched (download=True, --download), got "
        f"ResNet18_Weights.IMAGENET1K_V1 ({tmp_path}/checkpoints/resnet18-f37072fd.pth does not exist)"
    )


def test_download_is_what_asks_the_network(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def refuse(address, *_args, **_kwargs):
        asked.append(address)
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ValueError, match=r"weights must be readable, got https://download.pytorch.org/.* \(.*no route"):
        load("torchvision:resnet18", download=True)
    assert asked == ["download.pytorch.org"]


@pytest.mark.parametrize(
    ("source", "weights", "expected"),
    [
        ("torchvision:resnet5", None, "source must be a classifier of torchvision (did you mean 'torchvision:resnet50', "
         "'torchvision:resnet152', 'torchvision:wide_resnet50_2'?), got 'torchvision:resnet5'"),
        ("torchvision:resnet18", "V7", "weights must be a file, 'random' or one of IMAGENET1K_V1, got 'V7'"),
        ("torchvision:fasterrcnn_resnet50_fpn", None, "source must be a classifier of torchvision, got "
         "'torchvision:fasterrcnn_resnet50_fpn'"),
        ("timm:rsnet18", None, "source must be a model of timm (did you mean 'timm:resnet18', "
         "'timm:resnet18d'?), got 'timm:rsnet18'"),
    ],
)  # fmt: skip
def test_unknown_names(source, weights, expected) -> None:
    with pytest.raises(ValueError) as error:
        load(source, weights=weights)
    assert str(error.value) == f"pysal.models.load: {expected}"


def test_random_weights_are_seed_zeros() -> None:
    before = torch.get_rng_state()
    first, second = (load("torchvision:squeezenet1_1", weights="random") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("source", ["torchvision:squeezenet1_1", "timm:mobilenetv3_small_050"])
def test_own_weights_of_own_classes(source, suffix, tmp_path) -> None:
    names = ["cat", "dog", "bird"]
    network = load(source, weights="random", class_names=names).network.model
    state = {name: value + 0.5 for name, value in network.state_dict().items() if value.is_floating_point()}
    state |= {name: value for name, value in network.state_dict().items() if name not in state}
    path = tmp_path / f"own{suffix}"
    if suffix == ".pth":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        __import__("safetensors.torch").torch.save_file(state, path)
    model = load(source, weights=path, class_names=names)
    assert model.class_names == tuple(names)
    assert all(torch.equal(value, state[name]) for name, value in model.network.model.state_dict().items())
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(
        ValueError, match=rf"weights must be those of {source} \(class_names= says how many classes\), got {path} \("
    ):
        load(source, weights=path)


def test_pickles_are_not_run(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Evil()))
    torch.save({"weight": Evil()}, tmp_path / "evil2.pth")
    for one in (path, tmp_path / "evil2.pth"):
        with pytest.raises(ValueError) as error:
            load("torchvision:squeezenet1_1", weights=one)
        said = f"weights must be a file of tensors, got {one} (no pickle, or one of more than tensors)"
        assert str(error.value) == f"pysal.models.load: {said}"
    assert not (tmp_path / "ran").exists()


def test_published_pickles_are_not_run_either(monkeypatch, tmp_path) -> None:
    """Though the library itself would read them."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    entry = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    path = cache(monkeypatch, tmp_path, entry, torch.nn.Linear(2, 2))
    torch.save({"weight": Evil()}, path)
    path = path.rename(path.with_name(f"evil-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))
    monkeypatch.setattr(entry.value, "url", f"https://weights.invalid/{path.name}")
    with pytest.raises(ValueError, match="weights must be readable"):
        load("torchvision:squeezenet1_1")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("library", ["torchvision", "timm", "transformers"])
def test_missing_libraries(library, monkeypatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError) as error:
        load(f"{library}:resnet18")
    package = "torchvision.models" if library == "torchvision" else library
    assert str(error.value) == (
        f"pysal.models.load: source '{library}:resnet18' must be of a library that is installed, {package}, got no {package} "
        f'(run: pip install "pysal-saliency[{library}]")'
    )


# --- timm


def test_timm_published_weights(monkeypatch, tmp_path) -> None:
    network = drawn(lambda: timm.create_model("mobilenetv3_small_050"), seed=3)
    path = tmp_path / "model.safetensors"
    __import__("safetensors.torch").torch.save_file(network.state_dict(), path)
    asked = []

    def cached(repository, name):
        asked.append((repository, name))
        return str(path)

    import huggingface_hub

    with pytest.raises(FileNotFoundError) as error:
        load("timm:mobilenetv3_small_050")
    assert str(error.value) == (
        "pysal.models.load: weights must be on this machine, or be fetched (download=True, --download), got "
        "timm/mobilenetv3_small_050.lamb_in1k (not in the cache)"
    )
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    model = load("timm:mobilenetv3_small_050.lamb_in1k")
    assert asked == [("timm/mobilenetv3_small_050.lamb_in1k", "model.safetensors")]
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.network.model.state_dict().items())
    settings = timm.data.resolve_model_data_config(network)
    assert model.input_size == settings["input_size"][1:]
    assert model.crop_fraction == settings["crop_pct"]
    assert model.resample == settings["interpolation"]
    assert torch.equal(model.network.mean.flatten(), torch.tensor(settings["mean"]))
    assert torch.equal(model.network.std.flatten(), torch.tensor(settings["std"]))
    assert model.class_index("tabby") == 281


def test_timm_classes_of_larger_imagenets() -> None:
    model = load("timm:tf_efficientnetv2_b0", weights="random", class_names=None)
    assert model.class_index("tabby") == 281
    names = load("timm:mobilenetv3_small_050", weights="random", class_names=[f"kind {i}" for i in range(7)]).class_names
    assert names[6] == "kind 6"


def test_timm_tags() -> None:
    with pytest.raises(ValueError) as error:
        load("timm:mobilenetv3_small_050.other")
    assert str(error.value) == (
        "pysal.models.load: source must be a model of timm (timm:mobilenetv3_small_050.lamb_in1k), "
        "got 'timm:mobilenetv3_small_050.other'"
    )


# --- transformers

LABELS = {0: "tench", 1: "crane", 2: "crane", 3: "Tabby, tabby cat"}
PROCESSORS = {
    "vit": ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}, (64, 64), 1.0, "bilinear"),
    "convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.8}, (64, 64), 0.8, "bicubic"),
    "mobilenet": (
        "MobileNetV2ImageProcessor",
        {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}, "resample": 3},
        (64, 64),
        0.8,
        "bicubic",
    ),
    # divides by the deviation once more, and takes no mean away, in its second normalisation
    "efficientnet": ("EfficientNetImageProcessor", {"size": {"height": 64, "width": 64}}, (64, 64), 1.0, None),
    "own": ("ViTImageProcessor", {"size": {"height": 64, "width": 64}, "do_normalize": False}, (64, 64), 1.0, "bilinear"),
}


def save(folder: Path, processor: str = "vit") -> transformers.PreTrainedModel:
    """Save a small ResNet with an image processor, as `save_pretrained` does."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=LABELS)
    network = drawn(lambda: transformers.ResNetForImageClassification(config))
    network.save_pretrained(folder)
    kind, settings, *_ = PROCESSORS[processor]
    getattr(transformers, kind)(**settings).save_pretrained(folder)
    return network


@pytest.mark.parametrize("processor", PROCESSORS)
def test_transformers_folder(processor, tmp_path) -> None:
    """What the model sees of a photo is what the processor makes of it."""
    network = save(tmp_path, processor)
    model = load(f"transformers:{tmp_path}")
    _, _, size, fraction, resample = PROCESSORS[processor]
    assert (model.name, model.input_size, model.crop_fraction) == (tmp_path.name, size, fraction)
    assert resample is None or model.resample == resample
    assert model.class_names == ("tench", "crane (1)", "crane (2)", "Tabby, tabby cat")
    photo = squared_photo()
    seen = transformers.AutoImageProcessor.from_pretrained(tmp_path)(photo, return_tensors="pt")["pixel_values"]
    normalised = (read_image(photo, model) - model.network.mean) / model.network.std
    # the same filter on the same grid, so that but for the edge, where what is cropped away counts for one of the two, they
    # differ by the rounding to 8 bits: half a level at the end and half a level between the passes of either
    levels = ((normalised - seen) * model.network.std * 255)[:, :, 2:-2, 2:-2].abs()
    assert float(levels.max()) <= 2.01
    with torch.no_grad():
        back = seen * model.network.std + model.network.mean
        torch.testing.assert_close(model(back), network(seen).logits, rtol=1e-4, atol=1e-4)
    found = pysal.explain(model, read_image(photo, model), method_options=OPTIONS)
    assert found.skipped == {}
    assert found["grad_cam"].details["layer"] == "network.model.model.resnet.encoder.stages.1.layers.0.activation"


def test_transformers_with_thousand_labels(tmp_path) -> None:
    labels = {index: f"name {index}" for index in range(1000)} | {0: "tench, Tinca tinca"}
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=labels)
    config.architectures = ["ResNetForImageClassification"]
    config.save_pretrained(tmp_path)
    model = load(f"transformers:{tmp_path}", weights="random", size=64, normalize="imagenet")
    assert model.class_index("tabby") == 281


def test_transformers_without_a_processor(tmp_path) -> None:
    save(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError) as error:
        load(f"transformers:{tmp_path}")
    expected = f"source 'transformers:{tmp_path}' must come with an image processor, or be given size and normalize, got "
    assert str(error.value).startswith(f"pysal.models.load: {expected}")
    assert load(f"transformers:{tmp_path}", size=48, normalize="none").input_size == (48, 48)


def test_transformers_without_a_trained_head(tmp_path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        load(f"transformers:{tmp_path}", size=64, normalize="none")
    assert str(error.value) == (
        f"pysal.models.load: source 'transformers:{tmp_path}' must have trained weights for all of it, got none for "
        "classifier.1.bias, classifier.1.weight"
    )


def test_transformers_that_is_no_image_classifier(tmp_path) -> None:
    transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="must be an image classifier, got Unrecognized configuration class") as error:
        load(f"transformers:{tmp_path}")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must be a folder or repository with an image classifier, got "):
        load(f"transformers:{tmp_path.parent}")


def test_transformers_that_cannot_import_an_architecture(tmp_path, monkeypatch) -> None:
    """transformers hides why behind a question; the sentence has the reason."""
    save(tmp_path)

    def imported(*_: object, **__: object) -> None:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Are this object's requirements defined correctly?") from error

    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_pretrained", imported)
    with pytest.raises(ImportError) as error:
        load(f"transformers:{tmp_path}")
    assert str(error.value) == (
        f"pysal.models.load: source 'transformers:{tmp_path}' must be of a library that can be imported, transformers, "
        "got operator torchvision::nms does not exist"
    )


def test_transformers_that_is_not_here() -> None:
    with pytest.raises(FileNotFoundError) as error:
        load("transformers:somebody/resnet")
    assert str(error.value) == (
        "pysal.models.load: source 'transformers:somebody/resnet' must be a folder, or a model on this machine, or be fetched "
        "(download=True, --download), got none in the cache of the Hugging Face hub"
    )


def test_code_of_a_repository_is_not_run(tmp_path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForImageClassification": "mine.MyModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"^pysal.models.load: source 'transformers:.*' must be a folder or repository"):
        load(f"transformers:{tmp_path}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_vit_of_real_size(tmp_path) -> None:
    """86 M parameters, 224 x 224 pixels, drawn: all that applies to a transformer is explained."""
    config = transformers.ViTConfig(num_labels=1000)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    model = load(f"transformers:{tmp_path}", weights="random")
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656
    found = pysal.explain(model, read_image(PHOTO, model), method_options=OPTIONS)
    assert set(found.skipped) == {"guided_backprop", "guided_grad_cam"}
    assert all("the network has GELU" in sentence for sentence in found.skipped.values())
    assert found["grad_cam"].details["layer"] == "network.model.model.vit.layers.11.layernorm_before"
    assert found["grad_cam"].details["native"].shape == (1, 1, 14, 14)


# --- photos


@pytest.mark.parametrize("resample", Resample.__args__)
def test_photos_are_resized_as_the_model_says(resample) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = pysal.models.Classifier(
            torch.nn.Identity(), name="m", class_names=["a"], input_size=(20, 30), resample=resample
        )
    photo = squared_photo().crop((0, 0, 150, 100))
    expected = np.asarray(photo.resize((30, 20), Image.Resampling[resample.upper()]))
    assert torch.equal((read_image(photo, model)[0] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(expected.copy()))


def test_unknown_filter() -> None:
    with pytest.raises(ValueError) as error:
        pysal.models.Classifier(torch.nn.Identity(), name="m", class_names=["a"], input_size=(2, 3), resample="area")
    names = ", ".join(Resample.__args__)
    assert str(error.value) == f"pysal.models.Classifier: resample must be one of {names}, got 'area'"
