"""The layer Grad-CAM looks at unless told, for each architecture, and how its map is read."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
import transformers
from timm.models.volo import VOLO
from torch import Tensor, nn
from torchvision.models.vgg import VGG, cfgs, make_layers

import pysal
from pysal.models.spec import Logits
from tests.models.networks import CLASSES, drawn

VISION = torchvision.models


def vgg() -> nn.Module:
    with torch.device("meta"):  # a hundred million weights of its head, which are not drawn
        model = VGG(make_layers(cfgs["A"]), num_classes=CLASSES)
    model.to_empty(device="cpu")
    model.classifier = nn.Linear(512 * 7 * 7, CLASSES)
    for parameter in model.features.parameters():
        nn.init.zeros_(parameter)
    return model


def of_transformers(name: str, **settings: object) -> Callable[[], nn.Module]:
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **settings)
    return lambda: Logits(getattr(transformers, f"{name}ForImageClassification")(config), "logits")


def vision(name: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: VISION.get_model(name, weights=None, num_classes=CLASSES, **settings)


def of_timm(name: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **settings)


VIT = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 64}

VOLO_SETTINGS = {
    "layers": (1, 1, 1, 1),
    "embed_dims": (16, 32, 32, 32),
    "num_heads": (2, 2, 2, 2),
    "stem_hidden_dim": 8,
    "use_aux_head": False,
    "img_size": 64,
}

# name -> network, size of its images, the layer, and tokens before those of the map (None: a map; "last": channels last)
ARCHITECTURES = {
    "torchvision resnet": (vision("resnet18"), (64, 96), "layer4.1.relu@1", None),
    "torchvision vgg": (vgg, (64, 96), "features.20", None),
    "torchvision densenet": (vision("densenet121"), (64, 64), "features.norm5", None),
    "torchvision googlenet": (vision("googlenet", init_weights=False), (64, 64), "inception5b", None),
    "torchvision inception": (vision("inception_v3", init_weights=False), (128, 128), "Mixed_7c", None),
    "torchvision mobilenet v2": (vision("mobilenet_v2"), (64, 64), "features.18.2", None),
    "torchvision mobilenet v3": (vision("mobilenet_v3_small"), (64, 64), "features.12.2", None),
    "torchvision efficientnet": (vision("efficientnet_b0"), (64, 64), "features.8.2", None),
    "torchvision convnext": (vision("convnext_tiny"), (64, 64), "features.7.2", None),
    "torchvision swin": (vision("swin_t"), (64, 96), "permute", None),
    "torchvision vit": (
        lambda: VISION.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=CLASSES),
        (64, 64),
        "encoder.layers.encoder_layer_1.ln_1",
        1,
    ),
    "timm resnet": (of_timm("resnet18"), (64, 64), "layer4.1.act2", None),
    "timm densenet": (of_timm("densenet121"), (64, 64), "features.norm5.act", None),
    "timm inception": (of_timm("inception_v3"), (128, 128), "Mixed_7c", None),
    "timm mobilenet": (of_timm("mobilenetv3_small_050"), (64, 64), "blocks.5.0.aa", None),
    "timm efficientnet": (of_timm("efficientnet_lite0"), (64, 64), "bn2.act", None),
    "timm convnext": (of_timm("convnext_atto"), (64, 64), "norm_pre", None),
    "timm vit": (of_timm("vit_tiny_patch16_224", depth=2, img_size=64), (64, 64), "blocks.1.norm1", 1),
    "timm vit, oblong": (of_timm("vit_tiny_patch16_224", depth=2, img_size=(64, 96)), (64, 96), "blocks.1.norm1", 1),
    "timm deit, distilled": (of_timm("deit_tiny_distilled_patch16_224", depth=2, img_size=64), (64, 64), "blocks.1.norm1", 2),
    "timm swin": (of_timm("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), img_size=128), (128, 128), "norm", "last"),
    "timm volo, without an auxiliary head": (
        lambda: VOLO(**VOLO_SETTINGS, num_classes=CLASSES),
        (64, 64),
        "post_network.1.norm1",
        1,
    ),
    "transformers resnet": (
        of_transformers("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        (64, 64),
        "model.resnet.encoder.stages.1.layers.0.activation",
        None,
    ),
    "transformers mobilenet": (
        of_transformers("MobileNetV2", depth_multiplier=0.25),
        (64, 64),
        "model.mobilenet_v2.conv_1x1.activation",
        None,
    ),
    "transformers efficientnet": (
        of_transformers("EfficientNet", width_coefficient=0.25, depth_coefficient=0.2, hidden_dim=320),
        (64, 64),
        "model.efficientnet.encoder.top_activation",
        None,
    ),
    "transformers convnext": (
        of_transformers("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
        (64, 64),
        "model.convnext.encoder.stages.1.layers.0",
        None,
    ),
    "transformers vit": (of_transformers("ViT", image_size=64, **VIT), (64, 64), "model.vit.layers.1.layernorm_before", 1),
    "transformers deit": (of_transformers("DeiT", image_size=64, **VIT), (64, 64), "model.deit.layers.1.layernorm_before", 2),
    "transformers dinov2, registers": (
        of_transformers("Dinov2WithRegisters", image_size=64, **VIT),
        (64, 64),
        "model.dinov2_with_registers.layernorm",
        5,
    ),
    "transformers swin": (of_transformers("Swin", **SWIN), (64, 64), "model.swin.layernorm", 0),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_layer(name: str) -> None:
    make, size, layer, prefix = ARCHITECTURES[name]
    model = drawn(make).double()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # of a score or of its negative: one of the two has a positive part
    expected, target = max(
        ((by_hand(model, images, score, layer, prefix), score) for score in (third, against_third)),
        key=lambda pair: pair[0].max(),
    )
    assert expected.max() > 0
    found = pysal.explain(model, images, target, methods=["grad_cam"])["grad_cam"]
    assert found.details["layer"] == layer
    torch.testing.assert_close(found.details["native"], expected, rtol=1e-9, atol=1e-12 * float(expected.max()))
    again = pysal.explain(model, images, target, methods=["grad_cam"], method_options={"grad_cam": {"layer": layer}})[
        "grad_cam"
    ]
    assert again.details["layer"] == layer
    assert torch.equal(again.map, found.map), "what is reported can be asked for"


def third(output: Tensor) -> Tensor:
    return output[:, 2]


def against_third(output: Tensor) -> Tensor:
    return -output[:, 2]


def by_hand(
    model: nn.Module, images: Tensor, target: Callable[[Tensor], Tensor], label: str, prefix: int | str | None
) -> Tensor:
    """relu(sum_k mean(G_k) A_k), with A as the module's last run returned it."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        kept.append(output.clone())  # what follows may work in place
        return kept[-1].clone()

    with model.get_submodule(label.split("@")[0]).register_forward_hook(keep):
        score = target(model(images)).sum()
    activation, gradient = kept[-1], torch.autograd.grad(score, kept[-1])[0]
    if prefix is None:
        a, g = activation, gradient
    elif prefix == "last":
        a, g = activation.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
    else:
        height, width = images.shape[2:]
        patches = activation.shape[1] - prefix
        columns = round((patches * width / height) ** 0.5)
        rows = patches // columns
        assert rows * columns == patches
        a, g = (
            value[:, prefix:].reshape(len(images), rows, columns, -1).permute(0, 3, 1, 2) for value in (activation, gradient)
        )
    return (g.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True).clamp_min(0).detach()


@pytest.mark.parametrize("layer", [None, "blocks.0", "blocks.1", "blocks.2"])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_tokens_in_units_are_put_back_in_their_places(size: tuple[int, int], layer: str | None) -> None:
    """Hiera keeps the tokens of a unit together and pools them between stages; its own `reroll` says where each lies."""
    network = drawn(of_timm("hiera_tiny_224", embed_dim=16, stages=(1, 1, 1, 1), img_size=size)).double()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    asked = "blocks.3" if layer is None else layer
    kept: list[Tensor] = []
    with network.get_submodule(asked).register_forward_hook(lambda _module, _inputs, output: kept.append(output)):
        score = network(images)[:, 2].sum()
    both = (kept[0], torch.autograd.grad(score, kept[0])[0])
    a, g = (network.reroll(value, int(asked[-1])).permute(0, 3, 1, 2) for value in both)
    expected = (g.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True).detach()
    for sign in (1, -1):
        found = pysal.explain(
            network,
            images,
            lambda output, sign=sign: sign * output[:, 2],
            methods=["grad_cam"],
            method_options={"grad_cam": {} if layer is None else {"layer": layer}},
        )["grad_cam"]
        assert found.details["layer"] == asked
        signed = (sign * expected).clamp_min(0)
        torch.testing.assert_close(found.details["native"], signed, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("prepared", [False, True])
def test_the_run_of_a_layer_that_runs_many_times(prepared: bool) -> None:
    """EfficientNet-Lite has one activation module for all its layers: the last of its runs is meant, and can be asked for."""
    model = pysal.models.load("efficientnet-lite0")
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    runner = pysal.prepare(model, images, batch_size=1) if prepared else model
    found = pysal.explain(runner, images, methods=["grad_cam"])["grad_cam"]
    layer = found.details["layer"]
    runs: list[Tensor] = []
    with (
        model.network.model._swish.register_forward_hook(lambda _module, _inputs, output: runs.append(output)),
        torch.no_grad(),
    ):
        model(images)
    assert layer == f"network.model._swish@{len(runs) - 1}"
    for name in (layer, "network.model._swish@-1"):
        again = pysal.explain(runner, images, methods=["grad_cam"], method_options={"grad_cam": {"layer": name}})["grad_cam"]
        assert again.details["layer"] == name
        assert torch.equal(again.map, found.map)
