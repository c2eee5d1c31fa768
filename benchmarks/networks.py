"""The networks that methods are timed on: one with real weights, one as large as people use."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import pysal

PHOTOS = Path(__file__).resolve().parents[1] / "pysal/data/photos"
# What torchvision's ImageNet weights want; here the numbers only have to be of that size.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut; the 3x3 one has the stride."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, images: Tensor) -> Tensor:
        shortcut = images if self.downsample is None else self.downsample(images)
        inner = self.relu(self.bn1(self.conv1(images)))
        inner = self.relu(self.bn2(self.conv2(inner)))
        return self.relu(self.bn3(self.conv3(inner)) + shortcut)


class ResNet50(nn.Module):
    """He, Zhang, Ren and Sun 2015, arXiv:1512.03385, with torchvision's names and its stride in the 3x3 convolution."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(64, 64, 3, 1)
        self.layer2 = stage(256, 128, 4, 2)
        self.layer3 = stage(512, 256, 6, 2)
        self.layer4 = stage(1024, 512, 3, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        return self.fc(self.avgpool(features).flatten(1))


def stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks of one width, the first of which may halve the map."""
    later = (Bottleneck(4 * width, width, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(channels, width, stride), *later)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights."""
    return pysal.models.load("efficientnet-lite0")


def resnet50() -> nn.Module:
    """ResNet-50 with random weights, and batch statistics of photos, without which its activations would vanish or explode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResNet50()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.normal_(module.bias, 0, 0.1)
                module.momentum = None  # the mean of what it sees: here of one batch
    model = nn.Sequential(pysal.Normalized(network, MEAN, STD)).train()
    with torch.no_grad():
        model(torch.cat([photo(name) for name in ("chelsea", "coffee", "siamese_cat", "tabby_cat")]))
    return model.eval()


class Encoder(nn.Module):
    """Attention and a perceptron, each after its norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.projection(mixed)
        return tokens + self.mlp(self.norm2(tokens))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al. 2021, arXiv:2010.11929, with the mean of the tokens in place of a class token."""

    def __init__(self, width: int = 384, heads: int = 6, depth: int = 12, side: int = 14, classes: int = 1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.position = nn.Parameter(torch.randn(1, side * side, width) / 50)
        self.blocks = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm, self.map, self.head = nn.LayerNorm(width, 1e-6), nn.Identity(), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images)
        tokens = self.norm(self.blocks(patches.flatten(2).transpose(1, 2) + self.position))
        return self.head(self.map(tokens.transpose(1, 2).unflatten(2, patches.shape[2:])).mean((2, 3)))


def vit_small() -> nn.Module:
    """ViT-S/16 with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(pysal.Normalized(VisionTransformer(), MEAN, STD)).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "efficientnet_lite0": efficientnet_lite0,
    "resnet50": resnet50,
    "vit_small": vit_small,
}
TITLES = {"efficientnet_lite0": "EfficientNet-Lite0", "resnet50": "ResNet-50", "vit_small": "ViT-S"}
# Those that are timed on a CPU; all of them are on a GPU.
ON_A_CPU = ("efficientnet_lite0", "resnet50")
# Grad-CAM's layer: the last map before pooling that every peer can be told by a module that runs once.
LAYERS = {"efficientnet_lite0": "network.model._bn1", "resnet50": "0.model.layer4", "vit_small": "0.model.map"}


def photo(name: str) -> Tensor:
    """A photo (1, 3, 224, 224) in [0, 1]."""
    return pysal.read_image(PHOTOS / f"{name}.jpg", size=224)
