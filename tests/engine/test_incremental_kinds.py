"""Which operations boxes are followed through, however they are spelt, and that what is not local ends it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal.engine.boxes.clean import Nodes
from pysal.engine.boxes.incremental import Incremental
from pysal.engine.boxes.kinds import MAPPED
from pysal.engine.graph.exported import capture
from pysal.engine.graph.fold import fold_graph, trace
from pysal.engine.graph.fused_linear import FusedLinear
from pysal.engine.graph.lowered import lower
from pysal.engine.prepared.gains import Gains
from tests.engine.test_incremental import ROUNDINGS, Block, assert_exact, changed_images, outputs_of, seeded

BOXES = [(0, 0, 1, 1), (6, 5, 9, 8), (11, 8, 14, 13), (3, 0, 5, 13)]


class ConvNext(nn.Module):
    """Depthwise convolution, norm over channels, two linear layers, a scale per channel and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels)
        self.first, self.second = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.scale = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.second(F.gelu(self.first(y))) * self.scale).permute(0, 3, 1, 2)


class Placed(nn.Module):
    """Adds numbers that differ from pixel to pixel."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.places


def norm_of_channels(x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def tokens(x: Tensor, linear: nn.Module) -> Tensor:
    n, c, h, w = x.shape
    return linear(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)


def spatial_gate(x: Tensor, convolution: nn.Module) -> Tensor:
    seen = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
    return x * torch.sigmoid(convolution(seen))


def read_after_writing_a_copy(x: Tensor, pool: nn.Module) -> Tensor:
    y = pool(x)  # whose channels shuffled are a copy: what is written into that is not in y
    return shuffled(y).add_(1).relu_() + y


LOCAL: dict[str, Callable[[], nn.Module]] = {
    "ConvNeXt's block": lambda: ConvNext(4),
    "norm over channels": lambda: Block(norm_of_channels),
    "layer norm over channels": lambda: Block(
        lambda x, norm: norm(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2).contiguous(), nn.LayerNorm(4)
    ),
    "linear layer on moved axes": lambda: Block(lambda x, linear: linear(x.movedim(1, -1)).movedim(-1, 1), nn.Linear(4, 5)),
    "linear layer on tokens": lambda: Block(tokens, nn.Linear(4, 4)),
    "shuffled channels": lambda: Block(shuffled),
    "halves of the channels": lambda: Block(lambda x: (lambda parts: torch.cat([parts[1], parts[0] * 2], 1))(x.chunk(2, 1))),
    "a part of the channels, last": lambda: Block(lambda x: x.permute(0, 2, 3, 1)[..., 1:3].permute(0, 3, 1, 2)),
    "one channel": lambda: Block(lambda x: x * x[:, :1] + x.unbind(1)[2].unsqueeze(1)),
    "stacked and summed": lambda: Block(lambda x: torch.stack([x, x.exp()], 1).sum(1)),
    "soft maximum and norm of channels": lambda: Block(
        lambda x: F.normalize(x.softmax(1), dim=1) + x.norm(dim=1, keepdim=True)
    ),
    "every second pixel": lambda: Block(lambda x: torch.cat([x[:, :, ::2, 1::3], x[:, :, ::2, 1::3].neg()], 1)),
    "cut edges": lambda: Block(lambda x: x[:, :, 1:, :-2]),
    "padding": lambda: Block(lambda x: F.pad(x, (1, 2, -1, 1), value=0.5)),
    "padding before pooling": lambda: Block(lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2)),
    "padding, channels last": lambda: Block(lambda x: F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 0, 2, 1)).permute(0, 3, 1, 2)),
    "gate of one map": lambda: Block(spatial_gate, nn.Conv2d(2, 1, 7, padding=3)),
    "gated half": lambda: Block(lambda x: F.glu(x, 1)),
    "matrix of channels": lambda: Block(
        lambda x, linear: (x.permute(0, 2, 3, 1) @ linear.weight).permute(0, 3, 1, 2), nn.Linear(5, 4)
    ),
    "patches": lambda: nn.Conv2d(4, 6, 3, 3),
    "numbers of places": lambda: Placed(4, 14, 13),
    "numbers of rows": lambda: Placed(14, 1),
    "PReLU": lambda: nn.PReLU(4),
    "written into, seen through a view": lambda: Block(
        lambda x, pool: pool(x).permute(0, 2, 3, 1).relu_().permute(0, 3, 1, 2), nn.AvgPool2d(1)
    ),
    "written into a copy of what is read": lambda: Block(read_after_writing_a_copy, nn.AvgPool2d(1)),
    "shortcut seen through a view": lambda: Block(
        lambda x, a, b: (lambda y: (lambda z: F.relu(b(y) + y) + z)(y.permute(0, 2, 3, 1).permute(0, 3, 1, 2)))(a(x)),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 1),
    ),
}
NOT_LOCAL: dict[str, Callable[[], nn.Module]] = {
    "layer norm over the image": lambda: Block(lambda x: F.layer_norm(x, x.shape[1:])),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm2d(4),
    "soft maximum down": lambda: Block(lambda x: x.softmax(2)),
    "soft maximum down, channels last": lambda: Block(lambda x: x.permute(0, 2, 3, 1).softmax(1).permute(0, 3, 1, 2)),
    "transposed image": lambda: Block(lambda x: x.permute(0, 1, 3, 2) * 2),
    "mirrored image": lambda: Block(lambda x: x.flip(3)),
    "channel weights along rows": lambda: Block(
        lambda x, norm: norm(x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3), nn.BatchNorm2d(14)
    ),
    "linear layer along rows": lambda: Block(lambda x, linear: linear(x), nn.Linear(13, 13)),
    "divided by the largest of the image": lambda: Block(lambda x: x / x.amax((2, 3), keepdim=True).abs()),
    "rows among the channels": lambda: Block(lambda x: x.flatten(1, 2).unsqueeze(1).expand(-1, 4, -1, -1).relu()),
    "written into on whole maps": lambda: Block(
        lambda x, norm: F.relu(norm(x), inplace=True).add_(1).permute(0, 2, 3, 1).mul_(2).permute(0, 3, 1, 2),
        nn.GroupNorm(2, 4),
    ),
    "larger": lambda: Block(lambda x: F.interpolate(x, scale_factor=2.0)),
}
HEADS: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
    lambda x: x.flatten(2).mean(-1),
    lambda x: x.flatten(2).transpose(1, 2).mean(1, keepdim=True).flatten(1),
]


def network(make: Callable[[], nn.Module], head: int) -> tuple[nn.Module, Tensor]:
    """What is looked at between two convolutions."""
    return seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), make(), nn.LazyConv2d(5, 3, padding=1), Block(HEADS[head])),
        3,
        14,
        13,
    )


def engine_of(model: nn.Module, image: Tensor, way: str) -> Incremental:
    traced = trace(model)[0] if way == "torch.fx" else capture(model, image.repeat(2, 1, 1, 1))[0]
    graph = fold_graph(traced)
    lower(graph, image)
    return Incremental(graph, image)


@pytest.mark.parametrize("way", ["torch.fx", "torch.export"])
@pytest.mark.parametrize("name", LOCAL)
def test_what_is_local_is_followed_to_the_mean(name: str, way: str) -> None:
    model, image = network(LOCAL[name], (len(name) + len(way)) % len(HEADS))
    engine = engine_of(model, image, way)
    kinds = [operator.kind for operator in engine.operators]
    assert "mean" in kinds
    with torch.no_grad():
        values = Nodes(engine.graph).run(image)
    whole = [operator.node for operator in engine.operators[: kinds.index("mean")] if operator.kind == "whole"]
    assert not any(isinstance(values[node], Tensor) for node in whole)  # but numbers that say how large maps are
    assert_exact(engine, image, BOXES)


@pytest.mark.parametrize("way", ["torch.fx", "torch.export"])
@pytest.mark.parametrize("name", NOT_LOCAL)
def test_what_is_not_local_ends_it(name: str, way: str) -> None:
    model, image = network(NOT_LOCAL[name], len(name) % len(HEADS))
    engine = engine_of(model, image, way)
    kinds = [operator.kind for operator in engine.operators if operator.kind in (*MAPPED, "mean")]
    assert kinds[:2] == ["input", "window"]
    assert kinds.count("window") == 1  # the second convolution needs whole maps
    assert_exact(engine, image, BOXES)


def test_a_map_of_a_group_has_at_most_so_many_numbers() -> None:
    model, image = network(LOCAL["ConvNeXt's block"], 0)
    engine = engine_of(model, image, "torch.fx")
    boxes = np.array([[y, x, y + 2, x + 2] for y in range(0, 14, 2) for x in range(0, 11, 2)])
    largest = 14 * 13 * 8  # ConvNeXt's inner channels on the whole map, which the kernels of 7 pixels reach
    for images in (0.5, 1, 5, 1000):
        found = [group for group, _ in engine.groups.batches(boxes, 32, images * largest)]
        assert sorted(np.concatenate(found)) == list(range(len(boxes)))
        sizes = [engine.groups.geometry(boxes[group], image.device).sizes.prod(1) for group in found]
        channels = [int(np.prod(operator.channels)) for operator in engine.operators if operator.map >= 0]
        numbers = [len(group) * int((size * channels).max()) for group, size in zip(found, sizes, strict=True)]
        assert all(len(group) == 1 or number <= images * largest for group, number in zip(found, numbers, strict=True))
        assert max(map(len, found)) <= 32
    assert len(found) < len(engine.groups.batches(boxes, 32, largest))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("share", [None, 0.5])
def test_gelu_after_a_linear_layer_runs_with_it(approximate: str, share: float | None) -> None:
    def block(x: Tensor, linear: nn.Module, read_twice: nn.Module) -> Tensor:
        y = F.gelu(linear(x.permute(0, 2, 3, 1)), approximate=approximate)
        z = read_twice(y)
        return (F.gelu(z, approximate=approximate) + z).permute(0, 3, 1, 2)

    model, image = network(lambda: Block(block, nn.Linear(4, 16), nn.Linear(16, 4)), 0)
    exact = engine_of(model, image, "torch.fx").limited(share)
    fast = engine_of(model.float(), image.float(), "torch.fx").limited(share)
    modules = [module for module in fast.graph.modules() if isinstance(module, FusedLinear)]
    fused = [operator for operator in fast.operators if operator.gelu is not None]
    assert len(modules) == 2
    assert len(fused) == any(module.onednn for module in modules)  # not on the matrix unit
    assert [
        operator.gelu for operator in exact.operators if operator.gelu is not None
    ] == []  # float64 has no such linear layer
    images = changed_images(image, BOXES)
    expected = outputs_of(exact, image, images, BOXES)
    found = outputs_of(fast, image.float(), images.float(), BOXES)
    eps = torch.finfo(torch.float32).eps
    assert float((found - expected).abs().max()) <= ROUNDINGS * eps * float(expected.abs().max())


@pytest.mark.parametrize("mode", ["out", "both"])
def test_drops_of_a_convnext_are_those_of_whole_images(mode: str) -> None:
    stem, down = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 6, 2, 2)
    layers = [stem, Block(norm_of_channels), ConvNext(4), Block(norm_of_channels), down, ConvNext(6)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        images = torch.rand(3, 3, 61, 53, dtype=torch.float64)
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 5)).double().eval()
    prepared = pysal.prepare(model, images[:1], batch_size=2, gains=Gains(2.0, 2.0, 2.0))
    engine = prepared.incremental(images)
    assert engine is not None
    assert sum(operator.kind == "whole" for operator in engine.operators) == 4  # what comes after the mean
    fill = torch.rand(3, 61, 53, dtype=torch.float64)
    with torch.no_grad():
        allowed = 1000 * torch.finfo(torch.float64).eps * float(model(images).abs().max())
    for segments in (pysal.Window((9, 8), (5, 6)), pysal.Slic(12)):
        options: dict[str, Any] = {"segments": segments, "fill": fill, "mode": mode, "score": "logit"}
        got = pysal.leave_one_out(prepared, images, [0, 3, 1], **options)
        expected = pysal.leave_one_out(model, images, [0, 3, 1], **options)
        assert float((got - expected).abs().max()) <= allowed < 1e-6 * float(expected.abs().max())
