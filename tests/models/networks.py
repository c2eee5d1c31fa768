"""Networks with weights that are drawn, and never left at zero: what libraries begin their heads with tells no layer apart."""

import math
from collections.abc import Callable

import torch
from torch import nn

from pysal.models.spec import quietly_seeded

CLASSES = 5


class Small(nn.Module):
    """conv - BN - ReLU - conv - ReLU - mean - linear, for images of any size."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.relu, self.pool, self.head = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(6, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.relu(self.second(self.relu(self.norm(self.first(images)))))
        return self.head(self.pool(maps).flatten(1))


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Make a network in eval mode and draw all its weights, scaled so that activations keep their size (He 2015)."""
    with quietly_seeded():
        model = make().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1:
                deviation = math.sqrt(2 / parameter[0].numel())
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return model
