"""What a graph computes from its weights alone is computed once, and nothing else is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal.engine.graph.constants import fold_constants
from pysal.engine.graph.fold import Convolution, fold_graph, trace
from pysal.engine.graph.fused_linear import FusedLinear
from pysal.engine.prepared.gains import Gains
from pysal.testing import sample


class Made(nn.Module):
    """Weights that are computed in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(sample(8, 3, 3, 3, seed=1))
        self.linear, self.bias = nn.Parameter(sample(24, 8, seed=2)), nn.Parameter(sample(8, seed=3))
        self.position = nn.Parameter(sample(1, 8, 3, 3, seed=4))
        self.register_buffer("zeros", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        y = F.conv2d(x, (self.weight - mean) / (self.weight.std((1, 2, 3), keepdim=True) + 1e-6))
        y = y + F.interpolate(self.position, size=(6, 6), mode="bilinear")
        tokens = y.flatten(2).transpose(1, 2)
        bias = torch.cat([self.bias, self.zeros, self.bias.neg()])
        return F.linear(tokens, self.linear, bias).relu().mean(1)


def test_weights_that_are_computed_are_fused() -> None:
    model, x = Made().eval(), sample(2, 3, 8, 8)
    graph = fold_graph(trace(model)[0])
    assert any(isinstance(module, Convolution) for module in graph.modules())
    fast = pysal.prepare(model, x[:1], batch_size=2, gains=Gains(2.0, 2.0))
    assert fast.program is not None, fast.report()
    assert fast._graph is not None
    assert any(isinstance(module, FusedLinear) for module in fast._graph.modules())
    functions = {node.target for node in fast.program.nodes if node.op == "call_function"}
    assert functions.isdisjoint({F.interpolate, torch.cat, torch.mean})
    exact = copy.deepcopy(model).double()(x.double())
    assert (fast(x) - exact).abs().max() <= 1e-5 * exact.abs().max()


class Kept(nn.Module):
    """What looks like a constant, and is none that could be kept."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.weight = way, nn.Parameter(sample(3, 1, 1, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 2
        if self.way == "random":
            weight = F.dropout(weight, 0.5, True)
        if self.way == "written":
            weight = weight.add_(1.0)
        if self.way == "large":
            weight = weight.expand(3, 64, 64).exp()[None].repeat(4, 1, 1, 1).sum((0, 2, 3), keepdim=True)
            weight = weight.repeat(1, 1, 64, 64)[0]
        return (x * weight).sum((1, 2, 3))


@pytest.mark.parametrize("way", ["random", "written", "large"])
def test_others_stay(way: str) -> None:
    graph, _ = trace(Kept(way).eval())
    fold_constants(graph)
    fetched = [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]
    kept = [getattr(graph, name) for name in fetched if name.startswith("constant")]
    assert all(value.numel() <= 64 * 3 for value in kept)
    assert len(kept) == {"random": 1, "written": 0, "large": 0}[way]
    if way != "random":
        x = sample(2, 3, 64, 64)
        assert torch.equal(graph(x), Kept(way)(x))


def test_the_original_is_not_read_again() -> None:
    model, x = Made().eval(), sample(2, 3, 8, 8)
    graph = fold_graph(trace(model)[0])
    before = graph(x)
    with torch.no_grad():
        model.bias.add_(1.0)
        model.weight.mul_(2.0)
    assert torch.equal(graph(x), before)
