"""A linear layer with arranged weights is the layer, on any number of tokens, and so is a transformer that is made of them."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pysal
from pysal.engine.graph.fold import Convolution
from pysal.engine.graph.fused_linear import LEAST_TOKENS, FusedLinear
from pysal.engine.graph.input_gradient import OnMatrixUnitByPhases, Patches, input_gradient
from pysal.testing import assert_no_worse, sample


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    inputs=st.sampled_from([1, 2, 15, 16, 64, 96, 200]),
    outputs=st.sampled_from([1, 3, 16, 64, 130]),
    biased=st.booleans(),
)
def test_any_linear_layer(sizes: list[int], inputs: int, outputs: int, biased: bool) -> None:
    dtype = torch.float32
    x, weight = sample(*sizes, inputs, dtype=torch.float64, seed=1), sample(outputs, inputs, dtype=torch.float64, seed=2)
    bias = sample(outputs, dtype=torch.float64, seed=3) if biased else None
    grad = sample(*sizes, outputs, dtype=torch.float64, seed=4)
    module = FusedLinear(weight.to(dtype), None if bias is None else bias.to(dtype), dtype)
    own = [each if each is None else each.to(dtype) for each in (x, weight, bias)]
    got = module(own[0])
    assert got.shape == (*sizes, outputs)
    assert module.input_gradient(grad.to(dtype)).shape == x.shape
    if x.numel():
        assert_no_worse(got, F.linear(x, weight, bias), F.linear(*own))
        assert_no_worse(module.input_gradient(grad.to(dtype)), grad @ weight, grad.to(dtype) @ own[1])


def assert_right(got: Tensor, exact: Tensor, base: Tensor) -> None:
    """Hold float32 against float64 and torch's own error; float64, of which there is no better, against itself."""
    if got.dtype == torch.float64:
        assert (got - exact).abs().max() <= 1e3 * torch.finfo(torch.float64).eps * exact.abs().max()  # of a few layers
    else:
        assert_no_worse(got, exact, base)


def test_tokens_may_lie_in_any_order() -> None:
    weight, bias = sample(24, 16, seed=1), sample(24, seed=2)
    module = FusedLinear(weight, bias, torch.float32)
    image = sample(2, 16, 5, 7, seed=3)
    for x in (image.permute(0, 2, 3, 1), image.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)):
        assert_no_worse(module(x), F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias))
        kept = x.clone()
        module.input_gradient(module(x))
        assert torch.equal(x, kept)


class Attention(nn.Module):
    """A transformer's layer: attention and two linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2)])
        self.parts, self.join = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels, bias=False)
        self.wide, self.narrow = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.parts(self.norms[0](x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value)
        x = x + self.join(heads.transpose(1, 2).flatten(2))
        return x + F.linear(F.gelu(self.wide(self.norms[1](x))), self.narrow.weight, self.narrow.bias)


class Transformer(nn.Module):
    """Patches, a class token, layers and a head, which reads one row of each image."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, channels))
        self.layers = nn.Sequential(Attention(channels), Attention(channels))
        self.head = nn.Linear(channels, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        torch._assert(x.ndim == 3, "patches in a row")
        head: Tensor = self.head(self.layers(x)[:, 0])
        return head


class Permuted(nn.Module):
    """Linear layers over the channels of a map, as ConvNeXt has them, and a second use of one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        y = self.narrow(self.wide(x.permute(0, 2, 3, 1)).sigmoid())
        return (x + self.narrow(self.wide(y)).permute(0, 3, 1, 2)).mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", [Transformer, Permuted])
def test_same_function_and_gradient(make: type[nn.Module], dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval().double()
    images = sample(3, 3, 16, 16, dtype=torch.float64)

    def pulled_back(function: nn.Module | pysal.PreparedModel, images: Tensor) -> tuple[Tensor, Tensor]:
        leaf = images.clone().requires_grad_()
        output = function(leaf)
        return output.detach(), torch.autograd.grad(output[:, 1].sum(), leaf)[0]

    exact = pulled_back(model, images)
    model, images = model.to(dtype), images.to(dtype)
    prepared = pysal.prepare(model, images[:2], batch_size=2)
    assert prepared.fused, prepared.report()
    assert "weights arranged once" in prepared.report()
    for expected, base, got in zip(exact, pulled_back(model, images), pulled_back(prepared, images), strict=True):
        assert_right(got, expected, base)
    with torch.no_grad():
        assert_right(prepared(images), exact[0], model(images))


def test_several_gradients_share_a_pass() -> None:
    model, images = Transformer().eval(), sample(2, 3, 16, 16)
    prepared = pysal.prepare(model, images, batch_size=2)
    one_by_one = [pysal.gradient(model, images, target) for target in range(5)]
    together = pysal.class_gradients(prepared, images, range(5))
    assert together.shape[1] == 5
    for image, each in itertools.product(range(2), range(5)):
        found = pysal.gradient(prepared, images, each)[image]
        assert torch.allclose(found, one_by_one[each][image], rtol=0, atol=1e-5 * float(one_by_one[each].abs().max()))


def test_few_tokens_are_left_to_torch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    prepared = pysal.prepare(model, torch.rand(1, 3, 9, 9), batch_size=1)
    assert LEAST_TOKENS > 1
    assert "weights arranged once" not in prepared.report()


def test_a_batch_norm_behind_an_assertion_is_folded() -> None:
    class Asserted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.convolution(x)
            torch._assert(y.ndim == 4, f"maps, got {y.dim()} dimensions")
            z: Tensor = self.norm(y).relu()
            torch._assert(z.dim() == 4, "maps")
            return z.mean((2, 3)) * z.ndim

    prepared = pysal.prepare(Asserted().eval(), torch.rand(1, 3, 9, 9), batch_size=1)
    assert prepared._graph is not None
    assert not any(isinstance(module, nn.BatchNorm2d) for module in prepared._graph.modules())
    assert not any(node.target is torch._assert for node in prepared._graph.graph.nodes)  # type: ignore[union-attr]


@pytest.mark.parametrize("kernel", [(2, 2), (4, 4), (3, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("size", [(12, 12), (13, 15), (4, 5)], ids=str)
@pytest.mark.parametrize("channels", [3, 40])
def test_gradients_of_windows_side_by_side(kernel: tuple[int, int], size: tuple[int, int], channels: int) -> None:
    weight = sample(24, channels, *kernel, dtype=torch.float64, seed=1).float()
    convolution = Convolution(weight, None, kernel, (0, 0, 0, 0), (1, 1), 1)
    way = input_gradient(convolution, convolution, (channels, *size), torch.float32)
    assert isinstance(way, Patches | OnMatrixUnitByPhases)
    grad = sample(3, 24, size[0] // kernel[0], size[1] // kernel[1], seed=2).contiguous(memory_format=torch.channels_last)

    def by_torch(dtype: torch.dtype) -> Tensor:
        leaf = torch.zeros(3, channels, *size, dtype=dtype, requires_grad=True)
        return torch.autograd.grad(F.conv2d(leaf, weight.to(dtype), stride=kernel), leaf, grad.to(dtype))[0]

    kept, exact, base = grad.clone(), by_torch(torch.float64), by_torch(torch.float32)
    assert_no_worse(way.run(grad, size, None), exact, base)
    for order in (torch.contiguous_format, torch.channels_last):
        onto = torch.ones(3, channels, *size).contiguous(memory_format=order)
        added = way.run(grad, size, onto)
        assert added.data_ptr() == onto.data_ptr()
        assert_no_worse(added, exact + 1, base + 1)
    assert torch.equal(grad, kept)


class Attending(nn.Module):
    """Self-attention as torch's module has it, over the pixels of a map."""

    def __init__(self, first: bool = True, **options: Any) -> None:
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 16, 3, 2), nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.head, self.first = nn.Linear(16, 5), first

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        if self.first:
            x, _ = self.attention(x, x, x, need_weights=False)
        else:
            x, weights = self.attention(x, key=x, value=x)
            x = x + weights.sum(-1, keepdim=True)
        head: Tensor = self.head(x.mean(1))
        return head


@pytest.mark.parametrize(
    ("options", "opened"),
    [
        ({}, True),
        ({"bias": False}, True),
        ({"dropout": 0.5}, True),
        ({"first": False}, False),
        ({"add_bias_kv": True}, False),
        ({"add_zero_attn": True}, False),
    ],
    ids=str,
)
def test_torchs_attention_is_opened(options: dict[str, Any], opened: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Attending(**options).eval()
        for parameter in model.attention.parameters():
            nn.init.normal_(parameter, std=0.3)
    images = sample(2, 3, 13, 11)
    prepared, exact = pysal.prepare(model, images, batch_size=2), copy.deepcopy(model).double()
    assert prepared.fused, prepared.report()
    assert prepared._graph is not None
    assert any(isinstance(module, nn.MultiheadAttention) for module in prepared._graph.modules()) != opened
    assert ("2 linear layers" in prepared.report()) == opened
    for target in range(2):
        found = pysal.gradient(prepared, images, target)
        assert_no_worse(found, pysal.gradient(exact, images.double(), target), pysal.gradient(model, images, target))
