"""Networks of every kind that the faces are compared on, with the inputs, targets and layers that suit them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """relu(conv(x)) + x, whose ReLU's input no one else uses."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.act(self.conv(inputs)) + inputs


class Functional(nn.Module):
    """ReLU as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.second(torch.relu(self.conv(images)))).mean((2, 3)))


class Shared(nn.Module):
    """relu(x) + x: the input of a ReLU is used elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        value = self.conv(images)
        return self.head((self.act(value) + value).square().mean((2, 3)))


class TwoInputs(nn.Module):
    """An image and a vector, and a further argument that scales each row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.side, self.head = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 5)

    def forward(self, images: Tensor, vectors: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        mixed = self.act(self.conv(images)).mean((2, 3)) * self.act(self.side(vectors)).sin()
        value = self.head(mixed)
        return value * (scale[:, None] if isinstance(scale, Tensor) else scale)


class Gathered(nn.Module):
    """Outputs (B, 4, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.Sigmoid())

    def forward(self, vectors: Tensor) -> Tensor:
        return self.body(vectors).unflatten(1, (4, 3))


@dataclass(frozen=True)
class Network:
    """A model and how to ask it."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    targets: Callable[[int], list[Any]]
    layers: tuple[str, ...] = ()
    relu_modules: bool = True  # captum's guided backprop is right
    further: Callable[[int], Any] = field(default=lambda _rows: None)

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.make().to(dtype).eval()

    def inputs(self, rows: int, dtype: torch.dtype = torch.float64) -> Any:
        draw = torch.Generator().manual_seed(rows)
        found = tuple(torch.randn(rows, *shape, generator=draw, dtype=torch.float64).to(dtype) for shape in self.shapes)
        return found if len(found) > 1 else found[0]


def classes(rows: int) -> list[Any]:
    """Every spelling of a target for outputs (B, 5)."""
    several = [(3 * i + 1) % 5 for i in range(rows)]
    return [2, (3,), torch.tensor(1), torch.tensor([4]), several, torch.tensor(several), [(one,) for one in several]]


def places(rows: int) -> list[Any]:
    """Targets for outputs (B, 4, 3)."""
    return [(1, 2), [(i % 4, i % 3) for i in range(rows)]]


def conv(relu: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), relu(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), relu(), nn.Flatten(), nn.Linear(16, 5)
    )


NETWORKS = {
    "conv": Network(lambda: conv(nn.ReLU), ((3, 8, 8),), classes, ("0", "1", "2", "3", "4")),
    "in_place": Network(lambda: conv(lambda: nn.ReLU(inplace=True)), ((3, 8, 8),), classes, ("0", "1", "3")),
    "residual": Network(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Residual(4), Residual(4), nn.Flatten(), nn.Linear(64, 5)),
        ((3, 6, 6),),
        classes,
        ("0", "1", "2.conv", "2.act"),
    ),
    "functional": Network(Functional, ((3, 7, 6),), classes, ("conv", "second"), relu_modules=False),
    "shared": Network(Shared, ((3, 5, 6),), classes, ("conv", "act"), relu_modules=False),
    "linear": Network(
        lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Softmax(1)), ((6,),), classes, ("0", "1")
    ),
    "one_feature": Network(lambda: nn.Sequential(nn.Linear(1, 7), nn.ReLU(), nn.Linear(7, 5)), ((1,),), classes, ("1",)),
    "sequence": Network(
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)), ((2, 8),), classes, ("0", "1")
    ),
    "volume": Network(
        lambda: nn.Sequential(nn.Conv3d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)),
        ((1, 3, 4, 3),),
        classes,
        ("0", "1"),
    ),
    "places": Network(Gathered, ((6,),), places, ("body.0",)),
    "number": Network(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0)), ((6,),), lambda _rows: [None], ("0",)
    ),
    "column": Network(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)), ((6,),), lambda _rows: [None, 0], ("0",)
    ),
    "two_inputs": Network(
        TwoInputs,
        ((2, 5, 5), (4,)),
        classes,
        ("conv",),
        further=lambda rows: torch.linspace(0.5, 1.5, rows, dtype=torch.float64),
    ),
    "two_inputs_number": Network(TwoInputs, ((2, 5, 5), (4,)), classes, ("conv",), further=lambda _rows: (0.5,)),
}
