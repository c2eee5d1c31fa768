"""`wrap`, and photos handed to `explain`: a network with what it was trained on, found where a library says it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import pysal
from pysal import targets
from pysal.models import Classifier, read_image, wrap
from tests.models.test_tasks import OPTIONS, VISION, clip, made, yolos

PHOTO = pysal.models.example_photo()
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "cow"}, "label2id": {"cat": 0, "dog": 1, "cow": 2}}


def vit() -> nn.Module:
    return made(lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, **LABELS)))


def small(channels: int) -> nn.Module:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    return made(make)


def test_a_network_of_timm() -> None:
    """Its configuration says everything; its answers are its own to what its own transform makes of a photo."""
    network = made(lambda: timm.create_model("test_resnet.r160_in1k", pretrained=False))
    model = wrap(network)
    assert (model.input_size, model.crop_fraction, model.resample) == ((160, 160), 0.95, "bilinear")
    assert (model.class_index("tabby"), model.name) == (281, "ResNet")
    image = read_image(PHOTO, model)
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(model(image), network((image - mean) / std))
    found = pysal.explain(model, PHOTO, "tabby", methods="gradient")
    assert torch.equal(found.maps["gradient"], pysal.gradient(model, image, 281))
    prepared = pysal.prepare(model, image, batch_size=2)
    assert torch.equal(pysal.explain(prepared, [PHOTO, str(PHOTO)], methods="gradient").images, image.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("source", ["path", "text", "bytes", "picture", "array"])
def test_photos_of_every_kind(source: str) -> None:
    model = wrap(vit(), size=32, normalize="imagenet")
    picture = Image.open(PHOTO)
    given: dict[str, Any] = {"path": PHOTO, "text": str(PHOTO), "bytes": PHOTO.read_bytes(), "picture": picture}
    given["array"] = np.asarray(picture)
    for photos in (given[source], [given[source]], (given[source],)):
        found = pysal.explain(model, photos, "dog", methods="gradient")
        assert torch.equal(found.images, read_image(PHOTO, model))
        assert found.target_names == ["dog"]


def test_a_network_of_transformers_and_its_processor() -> None:
    network, processor = vit(), transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3])
    model = wrap(network, processor)
    assert (model.input_size, model.class_names) == ((32, 32), ("cat", "dog", "cow"))
    square = Image.open(PHOTO).crop((0, 0, 300, 300))
    with torch.no_grad():
        own = network(**processor(square, return_tensors="pt")).logits
        torch.testing.assert_close(model(read_image(square, model)).logits, own, rtol=1e-2, atol=1e-2)
    found = pysal.explain(model, square, method_options=OPTIONS)
    assert set(found.skipped) == {"guided_backprop", "guided_grad_cam"}  # of GELU
    assert "network.model.model" in str(found.results["grad_cam"].details["layer"])

    class Both:
        image_processor = processor

    assert wrap(network, Both()).input_size == (32, 32)


def test_other_tasks_of_transformers() -> None:
    """A detector's names are those of its labels; CLIP, whose images come second, has prompts for classes."""
    detector = wrap(made(yolos), size=32, normalize="imagenet")
    assert detector.class_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert pysal.explain(detector, PHOTO, targets.Box(0, of="LABEL_2"), methods="gradient").target_names == ["box 0 of LABEL_2"]
    network = made(clip)
    assert wrap(network, size=32, normalize="imagenet").class_names == ()
    model = wrap(network, size=32, normalize="imagenet", class_names=["a cat", "a dog", "a car"])
    prompts = torch.tensor([[1, 2, 3, 29], [1, 4, 5, 29], [1, 6, 7, 29]])
    extra = {"input_ids": pysal.Shared(prompts)}
    found = pysal.explain(model, PHOTO, "a dog", methods=["gradient", "grad_cam"], extra_inputs=extra)
    mean, std = model.network.mean, model.network.std
    logits = network(input_ids=prompts, pixel_values=(found.images - mean) / std).logits_per_image
    torch.testing.assert_close(found.scores, logits.softmax(1)[:, 1].detach())


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_grey_and_many_bands(channels: int, tmp_path: Path) -> None:
    """From an array to the pictures and back, for networks of other channels than three."""
    model = wrap(small(channels), size=(12, 10), normalize=([0.5] * channels, [0.25] * channels), class_names=["a", "b"])
    assert model.channels == channels
    assert wrap(small(channels), size=12, normalize="none").channels == channels
    bands = np.random.default_rng(0).random((24, 20, channels))
    np.save(tmp_path / "bands.npy", bands)
    found = pysal.explain(model, bands, "b", score="softmax", method_options=OPTIONS)
    assert not found.skipped
    assert found.images.shape == (1, channels, 12, 10)
    assert found.save(tmp_path / "out")
    assert torch.equal(pysal.Explanation.load(found.save(tmp_path / "out")[0]).images, found.images)
    for source in (tmp_path / "bands.npy", (tmp_path / "bands.npy").read_bytes()):
        assert torch.equal(read_image(source, model), found.images)
    if channels != 1:  # of grey, files are photos
        assert torch.equal(read_image(bands.transpose(2, 0, 1), model), found.images)
        as_they_are = read_image(bands, channels=channels)
        torch.testing.assert_close(as_they_are[0], torch.from_numpy(bands).permute(2, 0, 1).float())
        whole = (bands * 65535).astype(np.uint16)
        torch.testing.assert_close(
            read_image(whole, channels=channels)[0].permute(1, 2, 0), torch.from_numpy(whole / 65535).float()
        )
        sentence = rf"source must be an array \(H, W, {channels}\), or a file .npy or .tif of one, for {channels} channels, got"
        with pytest.raises((TypeError, ValueError), match=sentence):
            pysal.explain(model, PHOTO)
        with pytest.raises(ValueError, match=rf"source must have shape \(H, W, {channels}\), got an array \(24, 20\)"):
            read_image(bands[..., 0], model)


@pytest.mark.parametrize("how", ["beside each other", "planes", "pages"])
@pytest.mark.parametrize("channels", [4, 13])
def test_a_tiff_of_bands(how: str, channels: int, tmp_path: Path) -> None:
    """Wherever a program put the bands."""
    import tifffile

    bands = np.random.default_rng(0).integers(0, 255, (9, 11, channels), dtype=np.uint8)
    path, planes = tmp_path / "bands.tif", np.ascontiguousarray(bands.transpose(2, 0, 1))
    if how == "beside each other":
        tifffile.imwrite(path, bands, photometric="minisblack", planarconfig="contig")
    elif how == "planes":
        tifffile.imwrite(path, planes, photometric="minisblack", planarconfig="separate")
    else:
        tifffile.imwrite(path, planes, photometric="minisblack")
    for source in (path, path.read_bytes()):
        found = read_image(source, channels=channels)
        torch.testing.assert_close(found[0].permute(1, 2, 0), torch.from_numpy(bands / 255).float())
    with pytest.raises(ValueError, match=r"for 6 channels, got .*bands.tif \(an array \("):
        read_image(path, channels=6)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="be a readable image file, got"):
        read_image(path, channels=channels)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("channels", [1, 4])
def test_a_network_of_other_channels_is_loaded_and_audited(channels: int, tmp_path: Path) -> None:
    """From a file of the network and a folder of bands to the rows and the report."""
    from pysal.audit import Job, report, verify

    torch.jit.script(small(channels)).save(tmp_path / "net.pt")
    loaded = pysal.models.load(tmp_path / "net.pt", size=12, normalize="none")
    assert loaded.channels == channels
    numbers = pysal.models.load(tmp_path / "net.pt", size=12, normalize=(0.5, [0.25] * channels))
    assert numbers.network.mean.numel() == channels
    with pytest.raises(
        ValueError, match=rf"^pysal.models.load: normalize must be 'none', .* {channels} channel.*, got 3 numbers$"
    ):
        pysal.models.load(tmp_path / "net.pt", size=12, normalize="imagenet")
    with pytest.raises(
        ValueError, match=rf"^pysal.models.wrap: normalize must be 'none', .* {channels} channel.*, got 3 numbers$"
    ):
        wrap(small(channels), size=12, normalize="imagenet")
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(2):
        values = np.random.default_rng(n).random((16, 14, channels), dtype=np.float32)
        np.save(folder / f"{n}.npy", values)
    given = {"model": str(tmp_path / "net.pt"), "model_options": {"size": 12, "normalize": "none"}, "labels": "none"}
    job = Job(str(folder), methods=["gradient"], metrics=["deletion"], out=tmp_path / "out", **given)
    assert job.manifest["model"]["channels"] == channels
    assert job.run(engine="inline").explained == 2
    assert verify(tmp_path / "out", images=True) == []
    assert "data:image/jpeg" in report(tmp_path / "out").read_text("utf-8")
    found = pysal.comparison.compare(
        loaded, folder, out=tmp_path / "compared", methods=["gradient"], metrics=["deletion"], few=0
    )
    assert [Path(row["photo"]).name for row in found.rows] == ["0.npy", "1.npy"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_network_of_any_dtype_is_given_its_own(dtype: torch.dtype) -> None:
    network = small(3).to(dtype)
    model = wrap(network, size=16, normalize="imagenet")
    found = pysal.explain(model, PHOTO, 1, methods="gradient")
    assert found.images.dtype == dtype
    mean, std = (torch.tensor(each, dtype=dtype).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    expected = network((found.images - mean) / std)
    torch.testing.assert_close(model(found.images), expected, check_dtype=True)


def test_the_normalisation_lies_where_the_network_does() -> None:
    network = nn.Conv2d(3, 4, 3, device="meta")
    model = wrap(network, size=16, normalize="imagenet")
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_mean_and_std_of_every_kind(kind: Any) -> None:
    model = wrap(small(3), size=16, normalize=(kind(IMAGENET_MEAN), kind(IMAGENET_STD)))
    same = wrap(small(3), size=16, normalize="imagenet")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model(images), same(images))


def test_the_network_stays_as_it_is() -> None:
    network = small(3)
    network[1].train()
    model = wrap(network, size=12, normalize="none")
    assert [module.training for module in network] == [False, True, False, False, False]
    assert not model.training
    assert wrap(model) is model
    network.class_names = ["yes", "no"]
    assert wrap(network, size=12, normalize="none").class_names == ("yes", "no")


WRAP = "pysal.models.wrap:"
REFUSED = [
    (
        lambda: wrap(len),
        f"{WRAP} model must be a torch.nn.Module, before it is prepared, got builtin_function_or_method",
    ),
    (lambda: wrap(small(3)), f"{WRAP} size must be given for a model that does not say it (224), got None"),
    (
        lambda: wrap(small(3), size=12),
        f"{WRAP} normalize must be given for a model that does not say it ('imagenet', 'none' or (mean, std)), got None",
    ),
    (
        lambda: wrap(vit()),
        f"{WRAP} processor must be given for a model whose own is not on this machine, or size and normalize, got None",
    ),
    (
        lambda: wrap(small(3), object()),
        f"{WRAP} processor must be None for a model that is not of transformers, got object",
    ),
    (
        lambda: wrap(wrap(small(3), size=12, normalize="none"), size=3),
        f"{WRAP} size must be None for a model that knows it already, got int",
    ),
    (
        lambda: pysal.explain(small(3), PHOTO),
        "pysal.explain: inputs must be a tensor (B, C, H, W) for a model that does not say how it wants photos "
        f"(see pysal.models.wrap), got {type(PHOTO).__name__}",
    ),
    (lambda: pysal.explain(small(3), []), "pysal.explain: inputs must be a torch.Tensor, got list"),
    (
        lambda: pysal.explain(wrap(small(3), size=12, normalize="none"), "no.jpg"),
        "pysal.read_image: source must be a readable image file, got no.jpg (no such file)",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[-60:] for _, message in REFUSED])
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        call()
    assert str(caught.value) == message


def test_a_classifier_may_have_no_classes() -> None:
    model = Classifier(small(3), name="m", class_names=[], input_size=(12, 12)).eval()
    inputs = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    found = pysal.explain(model, inputs, 1, methods="gradient", score="softmax")
    assert found.target_names == ["class 1"]
    with pytest.raises(ValueError, match="be a class index for a model that carries no class names, got 'cat'"):
        pysal.gradient(model, inputs, "cat")


def of_both(images: Tensor, other: Tensor, table: Tensor) -> Tensor:
    """A model of two images and a table of numbers: the second image is darker for the second class."""
    first, second = images.mean((1, 2, 3)), other.mean((1, 2, 3))
    return torch.stack([first * second, first - second * table.sum(1)], 1)


def test_two_images_and_a_table() -> None:
    """A map of each image input: each is explained beside the other, which goes with its row."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 3, 4, 4, generator=generator), torch.rand(2, 1, 6, 6, generator=generator)
    table = torch.rand(2, 5, generator=generator)
    maps = pysal.gradient(of_both, first, 1, extra_inputs=[pysal.PerImage(second), pysal.PerImage(table)])
    torch.testing.assert_close(maps, torch.full_like(first, 1 / 48))
    swapped = pysal.gradient(
        lambda images, other, table: of_both(other, images, table),
        second,
        1,
        extra_inputs=[pysal.PerImage(first), pysal.PerImage(table)],
    )
    torch.testing.assert_close(swapped, -table.sum(1).view(2, 1, 1, 1).expand_as(second) / 36)
