"""Whatever a network is put together from, prepared it gives what it gives: output, gradient, rules and leave-one-out."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pysal
from pysal.engine.graph.distance import distance

C = 6  # channels everywhere, so that any piece follows any other
# float64 rounds to 1e-16; a dozen layers, each a sum of some hundred products, multiply that
EXACT = 1e-9


def convolution(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(C, C, options.pop("kernel", 3), **options)


def norm() -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(C)
    for values in (module.weight, module.running_var):
        nn.init.uniform_(values, 0.5, 2.0)
    for values in (module.bias, module.running_mean):
        nn.init.normal_(values)
    return module


def gated(x: Tensor, layer: nn.Module) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(layer(x))
    return x * gate


def added_in_place(x: Tensor, layer: nn.Module) -> Tensor:
    y = layer(x)
    y += x
    return y


def split(x: Tensor, layer: nn.Module) -> Tensor:
    first, second = layer(x).chunk(2, dim=1)
    return torch.cat([second.relu(), first], 1)


def slices(x: Tensor, layer: nn.Module) -> Tensor:
    return torch.cat([layer(x)[:, 1:], x[:, :1]], dim=1)


def attention(x: Tensor, layer: nn.Module) -> Tensor:
    rows = layer(x).flatten(2).transpose(1, 2)
    mixed = (rows @ rows.transpose(1, 2) / 8).softmax(-1) @ rows
    return mixed.transpose(1, 2).reshape(x.shape)


def squeezed(x: Tensor, layer: nn.Module) -> Tensor:
    return x * layer(x.mean((2, 3), keepdim=True)).sigmoid()


def spectrum(x: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[2:]) + x


# what a piece does with its map, and the modules it does it with; all but the last lists keep the map's size
PIECES: list[tuple[Callable[..., Tensor], list[Callable[[], nn.Module]]]] = [
    (lambda x, c: c(x), [lambda: convolution(padding=1)]),
    (lambda x, c, n: F.relu(n(c(x))), [lambda: convolution(padding=1, bias=False), norm]),
    (lambda x, c, n, r: r(n(c(x)) + x), [lambda: convolution(padding=1), norm, nn.ReLU]),
    (lambda x, c, d: F.relu6(d(c(x).relu()) + c(x)), [lambda: convolution(kernel=1), lambda: convolution(padding="same")]),
    (lambda x, c, r: r(c(r(c(x)))), [lambda: convolution(padding=1, groups=2), lambda: nn.ReLU(inplace=True)]),
    (lambda x, c: F.conv2d(F.pad(x, (1, 1, 2, 0)), c.weight, c.bias), [convolution]),
    (lambda x, c: torch.cat([c(x), x], 1).unflatten(1, (2, C)).amax(1), [lambda: convolution(padding=1)]),
    (lambda x, n: n(x), [norm]),
    (lambda x, n: n(x), [lambda: nn.GroupNorm(2, C)]),
    (lambda x, c: c(x), [lambda: convolution(padding=2, dilation=2, padding_mode="reflect")]),
    (lambda x: F.max_pool2d(x, 3, 1, 1), []),
    (lambda x, p: p(x), [lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False)]),
    (lambda x: F.hardswish(x).clamp(max=2.0), []),
    (lambda x: x.clamp(min=0) - 0.5, []),
    (lambda x: x.permute(0, 1, 3, 2).contiguous().view(x.shape).transpose(2, 3), []),
    (gated, [lambda: convolution(padding=1)]),
    (added_in_place, [lambda: convolution(padding=1)]),
    (split, [lambda: convolution(padding=1)]),
    (slices, [lambda: convolution(padding=1)]),
    (attention, [lambda: convolution(kernel=1)]),
    (squeezed, [lambda: convolution(kernel=1)]),
    (spectrum, []),
    # which make the map smaller
    (lambda x, c: c(x).relu_(), [lambda: convolution(stride=2, padding=1)]),
    (lambda x: F.avg_pool2d(x, 2, ceil_mode=True), []),
    (lambda x, p: p(x), [lambda: nn.MaxPool2d(2, ceil_mode=True)]),
]
HEADS: list[Callable[..., Tensor]] = [
    lambda x, pool, linear: linear(torch.flatten(pool(x), 1)),
    lambda x, pool, linear: linear(x.mean((2, 3))),
    lambda x, pool, linear: linear(pool(x).squeeze(-1).squeeze(-1)),
    lambda x, pool, linear: linear(x.contiguous().view(x.size(0), -1)[:, :C]),
    lambda x, pool, linear: linear(F.adaptive_max_pool2d(x, 1).reshape(x.shape[0], -1)),
]


class Assembled(nn.Module):
    """Pieces in a row, the last of them again where they share modules, and a head."""

    def __init__(self, pieces: list[int], head: int, again: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.functions = [PIECES[n][0] for n in pieces]
        self.parts = nn.ModuleList([nn.ModuleList([make() for make in PIECES[n][1]]) for n in pieces])
        self.head, self.pool, self.linear, self.again = HEADS[head], nn.AdaptiveAvgPool2d(1), nn.Linear(C, 4), again

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for function, parts in zip(self.functions, self.parts, strict=True):
            x = function(x, *parts)
        if self.again:
            x = self.functions[-1](x, *self.parts[-1])
        return self.head(x, self.pool, self.linear)


@settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pieces=st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=5),
    head=st.integers(0, len(HEADS) - 1),
    again=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_prepared_network_is_the_network(pieces: list[int], head: int, again: bool, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Assembled(pieces, head, again).double().eval()
        x = torch.rand(2, 3, 11, 12, dtype=torch.float64)
    fast = pysal.prepare(model, x[:1], batch_size=2)
    assert fast.fused, fast.report()
    with torch.no_grad():
        assert distance(fast(x), model(x)) <= EXACT
    leaf = x.clone().requires_grad_()
    assert distance(torch.autograd.grad(fast(leaf)[:, 1].sum(), leaf)[0], pysal.gradient(model, x, 1)) <= EXACT
    for rule in ("guided", "deconvnet"):
        expected = pysal.guided_backprop(model, x, 1, rule=rule, other_activations="plain")
        assert distance(pysal.guided_backprop(fast, x, 1, rule=rule, other_activations="plain"), expected) <= EXACT
    segments = pysal.Grid(3, 4)
    drops = pysal.leave_one_out(model, x, 1, segments=segments)
    # drops are differences of outputs, and rounded as those are
    with torch.no_grad():
        size = float(model(x).abs().max())
    assert (pysal.leave_one_out(fast, x, 1, segments=segments) - drops).abs().max() <= EXACT * size
