"""Depthwise convolutions of float64 tap by tap are torch's, forward and back."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pysal
from pysal.engine.graph.depthwise import DepthwiseByTaps, by_taps
from pysal.engine.graph.fold import fold
from pysal.engine.running.states import restoring

GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((5, 3), (2, 1), (0, 2), (1, 2)),
    ((2, 4), (3, 2), (1, 0), (2, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
]


@restoring
def run(taps: bool, x: torch.Tensor, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    if taps:
        DepthwiseByTaps().__enter__()
    output = F.conv2d(leaf, *arguments)  # type: ignore[arg-type]
    assert ("Depthwise" in type(output.grad_fn).__name__) == taps
    weights = torch.linspace(-1, 2, output.numel(), dtype=x.dtype).view(output.shape)
    return output.detach(), torch.autograd.grad((output * weights).sum(), leaf)[0]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("bias", [False, True])
def test_taps_are_torchs_convolution(geometry: tuple[tuple[int, int], ...], bias: bool) -> None:
    kernel, stride, padding, dilation = geometry
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 11, 13, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 1, *kernel, dtype=torch.float64, generator=generator)
    offset = torch.randn(5, dtype=torch.float64, generator=generator) if bias else None
    found, expected = (run(taps, x, weight, offset, stride, padding, dilation, 5) for taps in (True, False))
    roundings = 2 * weight[0].numel() * torch.finfo(torch.float64).eps
    for one, other, size in zip(found, expected, (x.abs().max(), 2.0), strict=True):
        assert (one - other).abs().max() <= roundings * (weight.abs().sum() * size + 3)


def test_nothing_else_is_taken() -> None:
    x, weight = torch.zeros(1, 4, 5, 5, dtype=torch.float64), torch.zeros(4, 1, 3, 3, dtype=torch.float64)
    assert by_taps(x, weight, 4)
    assert not by_taps(x.float(), weight.float(), 4)
    assert not by_taps(x, torch.zeros(8, 1, 3, 3, dtype=torch.float64), 4)  # two results of each channel
    assert not by_taps(x[:, :1], weight[:1], 1)
    assert not by_taps(x[0], weight, 4)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_prepared_model_of_float64_uses_them(stride: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 5, stride, 2, groups=6), nn.BatchNorm2d(6), nn.ReLU6()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval().double()
    x = torch.rand(2, 3, 12, 14, dtype=torch.float64)
    fast = pysal.prepare(model, x, batch_size=2)
    assert fast.fused
    for call in (pysal.gradient, pysal.guided_backprop):
        found, expected = call(fast, x, 1), call(model, x, 1)
        assert (found - expected).abs().max() <= 1e4 * torch.finfo(torch.float64).eps * expected.abs().max()


class Spelt(nn.Module):
    """Batch norm by its function, as timm's layers of norm and activation call it."""

    def __init__(self, *, training: bool = False, affine: bool = True) -> None:
        super().__init__()
        self.convolution, self.norm, self.by_batch = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=affine), training
        for buffer in (self.norm.running_mean, self.norm.running_var):
            assert buffer is not None
            buffer.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        x = F.batch_norm(
            self.convolution(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, self.by_batch, 0.1, 1e-3
        )
        return x.relu().mean((2, 3))


@pytest.mark.parametrize("affine", [False, True])
def test_a_batch_norm_by_its_function_is_folded(affine: bool) -> None:
    torch.manual_seed(0)
    model, x = Spelt(affine=affine).eval().double(), torch.rand(2, 3, 9, 9, dtype=torch.float64)
    graph = fold(model)
    assert not any("norm" in str(node.target) for node in graph.graph.nodes)
    assert (graph(x) - model(x)).abs().max() <= 100 * torch.finfo(torch.float64).eps * model(x).abs().max()


def test_a_batch_norm_of_the_batch_itself_is_not_folded() -> None:
    graph = fold(Spelt(training=True).eval())
    assert any(node.target is F.batch_norm for node in graph.graph.nodes)
