"""Drawn shapes, and small networks that learn what they say of them: what the recipes' pictures are about."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

KINDS = ("disc", "square", "cross")
COLOURS = {"red": (0.9, 0.2, 0.15), "green": (0.2, 0.7, 0.25), "blue": (0.2, 0.3, 0.9)}
SIZE = 48


class Shapes(NamedTuple):
    """Images of a shape in the left and one in the right half, on noise.

    Attributes:
        images: (N, 3, SIZE, SIZE) in [0, 1].
        kinds: (N, 2), of the left and the right shape.
        colours: (N, 2).
        radii: (N, 2), pixels.
        classes: (N, SIZE, SIZE): 0 where there is nothing, else 1 + the kind.
    """

    images: Tensor
    kinds: Tensor
    colours: Tensor
    radii: Tensor
    classes: Tensor


def shapes(count: int, generator: torch.Generator, *, single: bool = False, kinds: Tensor | None = None) -> Shapes:
    """Return images; with `single` the right half is empty in half of them, and the left one in the others."""

    def drawn(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    if kinds is None:
        kinds = torch.randint(len(KINDS), (count, 2), generator=generator)
    colours = torch.randint(len(COLOURS), (count, 2), generator=generator)
    radii = drawn(5, 10, count, 2)
    centres = torch.stack([drawn(12, 36, count, 2), drawn(11, 13, count, 2) + torch.tensor([0.0, 24.0])], 2)
    there = torch.ones(count, 2, dtype=torch.bool)
    if single:
        there = nn.functional.one_hot(torch.randint(2, (count,), generator=generator), 2).bool()
    images = 0.55 + 0.12 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    classes = torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    place = torch.arange(SIZE) + 0.5
    for side in range(2):
        down = place[:, None] - centres[:, side, 0, None, None]
        right = place[None, :] - centres[:, side, 1, None, None]
        radius = radii[:, side, None, None]
        disc = down.square() + right.square() < radius.square()
        square = (down.abs() < 0.87 * radius) & (right.abs() < 0.87 * radius)
        cross = (torch.minimum(down.abs(), right.abs()) < radius / 3.2) & (torch.maximum(down.abs(), right.abs()) < radius)
        kind = kinds[:, side, None, None]
        inside = torch.where(kind == 0, disc, torch.where(kind == 1, square, cross)) & there[:, side, None, None]
        paint = torch.tensor(list(COLOURS.values()))[colours[:, side]][:, :, None, None]
        images = torch.where(inside[:, None], paint + 0.05 * torch.randn(images.shape, generator=generator), images)
        classes = torch.where(inside, kind + 1, classes)
    return Shapes(images.clamp(0, 1), kinds, colours, radii, classes)


def only(found: Shapes, values: Tensor) -> Tensor:
    """Return what is of the one shape of images that hold one: `values` (N, 2) -> (N,)."""
    left = (found.classes[:, :, : SIZE // 2] > 0).flatten(1).any(1)
    return torch.where(left, values[:, 0], values[:, 1])


def eye(channels: int = 24) -> nn.Sequential:
    """Return convolutions that keep a map of a quarter of the sides."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, channels, 2), (channels, 2 * channels, 2), (2 * channels, 2 * channels, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def classifier(outputs: int) -> nn.Sequential:
    """Return a network of a number for each of some classes, labels or measures."""
    return nn.Sequential(eye(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(48, outputs))


def learn(network: nn.Module, loss: Callable[[Shapes], Tensor], steps: int, *, single: bool = False, rate: float = 3e-3) -> Any:
    """Train a network on new shapes in each step, and return it in eval mode."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    network.train()
    for step in range(steps):
        value = loss(shapes(64, generator, single=single))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(f"  {type(network).__name__} step {step + 1}: loss {float(value.detach()):.3f}", flush=True)
    return network.eval()
