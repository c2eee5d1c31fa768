"""Small networks whose explanations can be worked out by other means, and the one measure of rounding the tests use."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform in [0, 1], (B, C, H, W)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a network in float64 and eval mode with weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double().eval()


def linear(channels: int, height: int, width: int, classes: int = 4, seed: int = 0) -> nn.Sequential:
    """f_k(x) = <w_k, x> + c_k."""
    size = channels * height * width
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(size, classes)), seed)  # type: ignore[return-value]


def weights(model: nn.Sequential, inputs: Tensor) -> Tensor:
    """The weights of a `linear` model as images, (K, C, H, W)."""
    return model[1].weight.detach().unflatten(1, inputs.shape[1:])


def smooth(channels: int = 3, classes: int = 4, seed: int = 0) -> nn.Module:
    """A small convolutional network without a kink, for images of any size; pools, so it has a spatial layer "2"."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(6, 5, 3, stride=2),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            Scale(8.0),
            nn.Linear(5, classes),
        ),
        seed,
    )


def rectified(channels: int = 3, classes: int = 4, seed: int = 0) -> nn.Module:
    """The same with ReLUs."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 5, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            Scale(8.0),
            nn.Linear(5, classes),
        ),
        seed,
    )


class Answer(nn.Module):
    """Answers a question, a row of word numbers, about an image."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.relu = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU()
        self.words, self.head = nn.Embedding(7, 6), nn.Linear(6, 4)

    def forward(self, inputs: Tensor, question: Tensor) -> Tensor:
        seen = self.relu(self.encoder(inputs))
        asked = self.words(question).sum(1)
        return self.head(8 * (seen * asked[:, :, None, None]).mean((2, 3)))


class Scale(nn.Module):
    """Multiplies by a constant, so that averages over a few pixels still move the nonlinearity after them."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        return self.factor * values


class Counting(nn.Module):
    """Runs a model and notes how many rows each pass had, and of which passes a gradient was wanted."""

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.passes: list[int] = []
        self.differentiated: list[int] = []
        self.eval()

    def forward(self, inputs: Tensor, *rest: Any) -> Any:
        self.passes.append(len(inputs))
        if torch.is_grad_enabled() and inputs.requires_grad:
            self.differentiated.append(len(inputs))
        return self.model(inputs, *rest)


def gradients(model: Callable[..., Tensor], inputs: Tensor, target: int, *rest: Any) -> Tensor:
    """df_target/dx by plain autograd, one image at a time."""
    found = []
    for index in range(len(inputs)):
        leaf = inputs[index : index + 1].clone().requires_grad_()
        own = [value[index : index + 1] for value in rest]
        found.append(torch.autograd.grad(model(leaf, *own)[0, target], leaf)[0])
    return torch.cat(found)


def assert_rounding(actual: Tensor, expected: Tensor, operations: int, scale: float | None = None) -> None:
    """Assert that two results of the same formula differ by rounding alone.

    Every number is the end of a chain of at most `operations` roundings of partial results no larger than `scale` (by default
    the largest result), each off by at most eps/2 of it, in each of the two results: |a - e| <= operations * eps * scale.
    eps is that of the less precise of the two, and ours must be float64.
    """
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert actual.dtype == torch.float64, f"dtype {actual.dtype}"
    assert expected.isfinite().all()
    limit = operations * torch.finfo(expected.dtype).eps * (float(expected.abs().max()) if scale is None else scale)
    error = float((actual - expected).abs().max())
    assert error <= limit, f"off by {error:.3g}, more than the {limit:.3g} of {operations} roundings"


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Relative l2 error of each image's map, (B,)."""
    return (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
