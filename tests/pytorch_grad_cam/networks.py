"""Networks of every kind that the peer is used with, their layers, and how these are read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Batch norm, a shortcut that is added in place, and one ReLU, in place, that runs twice."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut, self.relu = nn.Conv2d(channels, out, 1, 2), nn.ReLU(inplace=True)

    def forward(self, inputs: Tensor) -> Tensor:
        value = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(inputs)))))
        value += self.shortcut(inputs)
        return self.relu(value)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer1, self.layer2 = nn.Conv2d(3, 8, 3, 2, 1), Residual(8, 12), Residual(12, 16)
        self.fc = nn.Linear(16, 7)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(inputs).relu())).mean((2, 3)))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(nn.Linear(12 * 16, 20), nn.ReLU(inplace=True), nn.Linear(20, 7))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(inputs), 4).flatten(1))


class Block(nn.Module):
    """A transformer's block, in tokens or in maps with channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.norm1(tokens)
        flat = rows.flatten(1, -2)
        tokens = tokens + self.attn(flat, flat, flat, need_weights=False)[0].reshape(tokens.shape)
        return tokens + self.mlp(self.norm2(tokens))


class ViT(nn.Module):
    """A class token and 8 x 8 pixels a patch, of images of 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 12, 8, 8), nn.Parameter(torch.randn(1, 1, 12))
        self.position = nn.Parameter(torch.randn(1, 17, 12))
        self.blocks, self.norm, self.head = nn.Sequential(Block(12), Block(12)), nn.LayerNorm(12), nn.Linear(12, 7)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = torch.cat([self.token.expand(len(inputs), -1, -1), self.patches(inputs).flatten(2).mT], 1)
        return self.head(self.norm(self.blocks(rows + self.position))[:, 0])


class Swin(nn.Module):
    """Maps with channels last, merged between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first, self.merge = nn.Conv2d(3, 8, 4, 4), Block(8), nn.Linear(32, 12)
        self.second, self.norm, self.head = Block(12), nn.LayerNorm(12), nn.Linear(12, 7)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.first(self.patches(inputs).permute(0, 2, 3, 1))
        merged = torch.cat([maps[:, u::2, v::2] for u in (0, 1) for v in (0, 1)], 3)
        return self.head(self.norm(self.second(self.merge(merged))).mean((1, 2)))


class Segmenter(nn.Module):
    """Scores of four classes at every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 10, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.interpolate(self.head(self.down(inputs)), inputs.shape[2:], mode="bilinear")


@dataclass(frozen=True)
class Network:
    """How to make one, which layers are asked for, and how both libraries are told to read them."""

    make: Callable[[], nn.Module]
    layers: Callable[[Any], list[nn.Module]]
    reshape: Callable[[Tensor], Tensor] | None = None
    rectified: bool = True  # its layers return 0 somewhere and nothing below


def of_tokens(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].mT.unflatten(2, (4, 4))


def of_maps(maps: Tensor) -> Tensor:
    return maps.permute(0, 3, 1, 2)


NETWORKS = {
    "resnet": Network(ResNet, lambda net: [net.layer1, net.layer2]),
    "vgg": Network(VGG, lambda net: [net.features[2], net.features[-1]]),
    "vit": Network(ViT, lambda net: [net.blocks[0].norm1, net.blocks[-1].norm1], of_tokens, rectified=False),
    "swin": Network(Swin, lambda net: [net.first.norm1, net.second.norm1], of_maps, rectified=False),
    "segmenter": Network(Segmenter, lambda net: [net.down[1], net.down[3]]),
}


def seeded(make: Callable[[], nn.Module], factor: float = 1000) -> nn.Module:
    """A network of float64 in eval mode, its weights and statistics always the same, its scores made large by a factor.

    The peer adds 1e-7 to what it divides maps by, and 1e-8 to the ranges of masks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.data.uniform_(0.5, 2)
                module.bias.data.normal_()
        last = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
        last.weight.data *= factor
        return net.double()


def pictures(number: int, size: int = 32) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
