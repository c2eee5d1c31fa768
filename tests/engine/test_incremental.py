"""Incremental inference gives what running every image whole gives, for any graph, from the boxes alone."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pysal
from pysal import Slic, Window
from pysal.engine.boxes import groups
from pysal.engine.boxes.clean import NotIncremental
from pysal.engine.boxes.groups import Groups
from pysal.engine.boxes.incremental import Incremental
from pysal.engine.boxes.reach import Reach
from pysal.engine.boxes.run import Run
from pysal.engine.graph.fold import fold
from pysal.engine.graph.lowered import lower
from pysal.engine.prepared.gains import Gains

PROPERTY = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
# what the issue asks of drops, and the rounding of the outputs that drops are differences of
RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-10}
ROUNDINGS = 64
WHOLE_SHARES = (0.0, 0.85, 10.0)  # whole maps always, where boxes have grown, never


@contextlib.contextmanager
def whole_share(share: float) -> Iterator[None]:
    before = groups.WHOLE_SHARE
    groups.WHOLE_SHARE = share
    try:
        yield
    finally:
        groups.WHOLE_SHARE = before


def engine_of(model: nn.Module, image: Tensor) -> Incremental:
    graph = fold(model)
    lower(graph, image)
    return Incremental(graph, image)


def changed_images(image: Tensor, boxes: list[tuple[int, int, int, int]], seed: int = 0) -> Tensor:
    """Return the image once per box, with other pixels inside it."""
    generator = torch.Generator().manual_seed(seed)
    images = image.repeat(len(boxes), 1, 1, 1)
    for each, (top, left, bottom, right) in zip(images, boxes, strict=True):
        other = torch.rand(each.shape, generator=generator, dtype=torch.float64) * 6 - 3
        each[:, top:bottom, left:right] = other[:, top:bottom, left:right].to(image)
    return images


def outputs_of(engine: Incremental, image: Tensor, images: Tensor, boxes: list[tuple[int, int, int, int]]) -> Tensor:
    """Return the outputs for the images, from the patches that hold their boxes."""
    geometry = engine.groups.geometry(np.array(boxes), image.device)
    height, width = geometry.sizes[0]
    patches = torch.stack(
        [
            each[:, top : top + height, left : left + width]
            for each, (top, left) in zip(images, geometry.origins[0], strict=True)
        ]
    ).contiguous(memory_format=torch.channels_last)
    before = patches.clone()
    with torch.no_grad():
        output = engine.run(engine.keep(image), patches, geometry)
    assert torch.equal(patches, before) or engine.operators[0].node.users, "patches are the caller's"
    return output


def assert_exact(engine: Incremental, image: Tensor, boxes: list[tuple[int, int, int, int]], share: float = 0.85) -> None:
    """Assert that incremental outputs are those of whole images, within what the issue allows."""
    images = changed_images(image, boxes)
    with torch.no_grad():
        clean, expected = engine.graph(image.clone()), engine.graph(images.clone())
    with whole_share(share):
        got = outputs_of(engine, image, images, boxes)
    assert got.shape == expected.shape
    largest_drop = float((clean - expected).abs().max())
    rounding = ROUNDINGS * torch.finfo(image.dtype).eps * float(expected.abs().max())
    assert float((got - expected).abs().max()) <= RELATIVE[image.dtype] * largest_drop + rounding


# ---- random graphs


class Block(nn.Module):
    """A function of a map, with modules."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.function = nn.ModuleList(parts), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


class Scaled(nn.Module):
    """Channels times constants, and numbers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale + 0.25) / 1.5


def norm(channels: int) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels)
    for values, low, high in ((module.weight, 0.5, 1.5), (module.bias, -1, 1), (module.running_mean, -1, 1)):
        nn.init.uniform_(values, low, high)
    nn.init.uniform_(module.running_var, 0.5, 2.0)
    return module


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    lambda: nn.ReLU(inplace=True),
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Sigmoid,
    lambda: nn.LeakyReLU(0.2),
    lambda: nn.Hardtanh(-0.7, 0.9, inplace=True),
]


@st.composite
def convolutions(draw: st.DrawFn, channels: int, same: bool = False, out: int | None = None) -> nn.Module:
    """A convolution of any geometry, with padding, batch norm and activation where drawn."""
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    out = out or groups * draw(st.integers(1, 3))
    if out % groups:
        groups = 1
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    parts: list[nn.Module] = []
    if same:
        stride, padding = (1, 1), (0, 0)
        spans = [dilation[i] * (kernel[i] - 1) for i in range(2)]
        left, top = draw(st.integers(0, spans[1])), draw(st.integers(0, spans[0]))
        parts.append(nn.ZeroPad2d((left, spans[1] - left, top, spans[0] - top)))
    else:
        stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
        if draw(st.booleans()):
            parts.append(nn.ZeroPad2d(draw(st.tuples(*[st.integers(0, 3)] * 4))))
    bias = draw(st.booleans())
    parts.append(nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias))
    if draw(st.booleans()):
        parts.append(norm(out))
    parts.append(draw(st.sampled_from(ACTIVATIONS))())
    return nn.Sequential(*parts)


@st.composite
def poolings(draw: st.DrawFn) -> nn.Module:
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, side // 2)) for side in kernel)
    ceil_mode = draw(st.booleans())
    if draw(st.booleans()):
        return nn.MaxPool2d(kernel, stride, padding, draw(st.integers(1, 2)), ceil_mode=ceil_mode)
    include, divisor = draw(st.booleans()), draw(st.sampled_from([None, None, 3]))
    arguments = (kernel, stride, padding, ceil_mode, include, divisor)
    if draw(st.booleans()):
        return Block(lambda x: F.avg_pool2d(x, *arguments))
    return nn.AvgPool2d(*arguments)


def squeezed(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    return x * torch.sigmoid(second(F.relu(first(x.mean((2, 3), keepdim=True)))))


@st.composite
def blocks(draw: st.DrawFn, channels: int) -> nn.Module:
    kind = draw(st.integers(0, 11))
    if kind <= 3:
        return draw(convolutions(channels))
    if kind == 4:
        return draw(poolings())
    if kind == 5:
        conv, act = draw(convolutions(channels, same=True, out=channels)), draw(st.sampled_from([F.relu, F.relu6, F.silu]))
        return draw(st.sampled_from([Block(lambda x, c: act(c(x) + x), conv), Block(lambda x, c: x + c(x), conv)]))
    if kind == 6:
        two = [draw(convolutions(channels, same=True)) for _ in range(2)]
        return Block(lambda x, a, b: torch.cat([a(x), x, b(x)], 1), *two)
    if kind == 7:
        return Block(squeezed, nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1))
    if kind == 8:
        return nn.Sequential(norm(channels), draw(st.sampled_from(ACTIVATIONS))())
    if kind == 9:
        return Scaled(channels)
    if kind == 10:
        # adds in place, to a map whose own box is smaller than that of the sum
        return Block(lambda x, a, b: a(x).add_(b(x)), nn.AvgPool2d(1), nn.MaxPool2d(3, 1, 1))
    return draw(
        st.sampled_from(
            [
                Block(lambda x: x.flip(3)),
                Block(lambda x: F.interpolate(x, scale_factor=2.0)),
                Block(lambda x: x.softmax(1)),
                Block(lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
                Block(lambda x: x.view(x.size(0), x.shape[1], -1).cumsum(2).view(x.shape)),
            ]
        )
    )


HEADS: list[Callable[[], nn.Module]] = [
    lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3)),
    lambda: Block(lambda x, linear: linear(x.mean((2, 3))), nn.LazyLinear(3)),
    lambda: Block(lambda x, linear: linear(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)), nn.LazyLinear(3)),
    lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)),
    lambda: Block(lambda x, linear: linear(x.mean(dim=[-1, -2], keepdim=True).flatten(1)), nn.LazyLinear(3)),
    lambda: Block(lambda x: x.amax((2, 3))),
]


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A model of up to six blocks, and an image for it, both float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 1000)))
        image = torch.rand(1, draw(st.integers(1, 4)), draw(st.integers(3, 24)), draw(st.integers(3, 24)), dtype=torch.float64)
        image = image * 2 - 1
        chosen, x = [], image.float()
        for _ in range(draw(st.integers(1, 6))):
            block = draw(blocks(x.shape[1])).eval()
            try:
                with torch.no_grad():
                    result = block(x.clone())
            except (RuntimeError, ValueError, AssertionError):  # a kernel larger than its map
                continue
            if 0 < result.numel() <= 40000 and result.isfinite().all():
                chosen.append(block)
                x = result
        head = draw(st.sampled_from(HEADS))()
        with torch.no_grad():
            head(x)
        return nn.Sequential(*chosen, head).double().eval(), image


@st.composite
def boxes_in(draw: st.DrawFn, height: int, width: int) -> list[tuple[int, int, int, int]]:
    found = []
    for _ in range(draw(st.integers(1, 5))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        bottom, right = draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
        found.append(draw(st.sampled_from([(top, left, bottom, right), (top, left, top + 1, left + 1), (0, 0, height, width)])))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@PROPERTY
@given(data=st.data())
def test_random_graphs_are_exact(dtype: torch.dtype, data: st.DataObject) -> None:
    model, image = data.draw(models())
    boxes = data.draw(boxes_in(*image.shape[2:]))
    image = image.to(dtype)
    try:
        engine = engine_of(model.to(dtype), image)
    except NotIncremental:
        return
    with torch.no_grad():
        folded, plain = engine.graph(image.clone()), model(image.clone())
    if float((folded - plain).abs().max()) > 1e-3 * float(plain.abs().max()):
        return  # oneDNN is wrong for some shapes of one channel; pysal.prepare does not use such a graph
    assert_exact(engine, image, boxes, data.draw(st.sampled_from(WHOLE_SHARES)))


# ---- graphs that have gone wrong or could


def seeded(make: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.rand(1, *shape, dtype=torch.float64) * 2 - 1
        model = make().eval()
        with torch.no_grad():
            model.float()(image.float())
        return model.double(), image


def tail() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3)]


GRAPHS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU6(), *tail()),
    "depthwise": lambda: nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(3, 3, 3, 2, groups=3),
        nn.ReLU6(),
        nn.Conv2d(3, 3, 5, padding=2, groups=3),
        *tail(),
    ),
    "1 x 1 with stride": lambda: nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.Conv2d(8, 4, (1, 3), (2, 1)), *tail()),
    "shortcut that somebody needs later": lambda: nn.Sequential(
        Block(
            lambda x, a, b, c: (lambda y: torch.cat([F.relu(b(y) + y), y, c(y)], 1))(a(x)),
            nn.Conv2d(3, 5, 1),
            nn.Conv2d(5, 5, 1),
            nn.Conv2d(5, 5, 3, padding=1),
        ),
        *tail(),
    ),
    "shortcut with a larger box": lambda: nn.Sequential(
        Block(lambda x, a, b: F.relu6(b(x) + a(x)), nn.Conv2d(3, 5, 5, padding=2), nn.Conv2d(3, 5, 1)), *tail()
    ),
    "in-place sum with a larger box": lambda: nn.Sequential(
        Block(lambda x, a, b: a(x).add_(b(x)).relu_(), nn.AvgPool2d(1), nn.MaxPool2d(3, 1, 1)), *tail()
    ),
    "pooling with ceil_mode": lambda: nn.Sequential(
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), nn.MaxPool2d(2, 3, 1, ceil_mode=True), *tail()
    ),
    "pooling with ceil_mode beyond its padding": lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1, ceil_mode=True), *tail()),
    "squeeze and excitation": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), Block(squeezed, nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)), nn.Conv2d(4, 5, 3), *tail()
    ),
}


@pytest.mark.parametrize("share", WHOLE_SHARES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_are_exact_everywhere(name: str, dtype: torch.dtype, share: float) -> None:
    model, image = seeded(GRAPHS[name], 3, 17, 14)
    pixels = [(y, x, y + 1, x + 1) for y in (0, 7, 16) for x in (0, 6, 13)]
    bands = [(0, 0, 17, 2), (15, 0, 17, 14), (0, 0, 17, 14), (3, 4, 9, 11)]
    assert_exact(engine_of(model.to(dtype), image.to(dtype)), image.to(dtype), pixels + bands, share)


def test_what_is_local_is_followed_and_what_is_not_ends_it() -> None:
    kinds = {}
    for name in ("convolutions", "squeeze and excitation"):
        kinds[name] = [each.kind for each in engine_of(*seeded(GRAPHS[name], 3, 17, 14)).operators]
    assert kinds["convolutions"] == ["input", "window", "window", "mean", "whole", "whole", "whole"]
    excited = kinds["squeeze and excitation"]
    assert excited[:3] == ["input", "window", "mean"]
    assert set(excited[3:]) == {"whole"}


def test_only_what_a_box_reaches_is_computed() -> None:
    engine = engine_of(*seeded(lambda: nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)], *tail()), 3, 30, 40))
    sizes = engine.groups.geometry(np.array([[10, 20, 11, 21], [0, 0, 1, 1]]), torch.device("cpu")).sizes
    assert sizes.tolist() == [[1, 1], [3, 3], [5, 5], [7, 7]]
    assert engine.groups.geometry(np.array([[0, 39, 1, 40]]), torch.device("cpu")).sizes.tolist() == [
        [1, 1],
        [2, 2],
        [3, 3],
        [4, 4],
    ]


@PROPERTY
@given(
    st.builds(Reach, st.integers(1, 5), st.integers(1, 4), st.integers(0, 5), st.integers(1, 3)),
    st.integers(1, 12),
    st.data(),
)
def test_reach_is_that_of_its_taps(reach: Reach, size: int, data: st.DataObject) -> None:
    outputs = (size + 2 * reach.before - reach.span) // reach.stride + 1
    if outputs < 1:
        return
    low = data.draw(st.integers(0, size - 1))
    high = data.draw(st.integers(low + 1, size))
    spans = [range(i * reach.stride - reach.before, i * reach.stride - reach.before + reach.span) for i in range(outputs)]
    reached = [i for i, span in enumerate(spans) if span.start < high and span.stop > low]
    first, last = reach.outputs(np.array([low]), np.array([high]), outputs)
    assert list(range(int(first[0]), int(last[0]))) == reached
    assert reach.inputs(outputs) == spans[-1].stop - spans[0].start


@functools.cache
def small_engine() -> Incremental:
    return engine_of(*seeded(GRAPHS["convolutions"], 3, 17, 14))


@PROPERTY
@given(boxes_in(17, 14), st.integers(1, 4))
def test_groups_hold_every_image_once(boxes: list[tuple[int, int, int, int]], rows: int) -> None:
    groups = small_engine().groups.split(np.array(boxes), rows)
    assert sorted(int(n) for group in groups for n in group) == list(range(len(boxes)))
    assert max(len(group) for group in groups) <= rows


@pytest.mark.parametrize("launch", [0.0, 1e3, 1e5, 1e15])
def test_a_group_is_split_where_that_saves_more_than_launching_another(launch: float) -> None:
    graph, image = seeded(GRAPHS["convolutions"], 3, 49, 46)
    engine = engine_of(graph, image)
    tops = np.random.default_rng(0).integers(0, 38, (40, 2))
    boxes = np.concatenate([tops, tops + np.random.default_rng(1).integers(2, 8, (40, 2))], 1)
    operators, maps = engine.operators, engine._program.maps
    groups, eager = Groups(operators, maps, launch), Groups(operators, maps, 0.0)
    found, many = groups.split(boxes, 40), eager.split(boxes, 40)
    assert sorted(int(n) for group in found for n in group) == list(range(40))
    assert len(many) > 3
    assert len(found) == len(many) if launch == 0 else len(found) <= len(many)

    def cost_of(parts: list[np.ndarray]) -> float:
        return sum(groups.cost(boxes[part]) + groups._launching for part in parts)

    assert cost_of(found) <= cost_of(many)
    if launch == 1e15:
        assert len(found) == 1  # the images whole cost less than launching them
        assert [len(group) for group in groups.split(boxes, 16)] == [10] * 4  # halved as often as the rows ask for


def test_a_graph_that_changes_what_others_read_is_refused() -> None:
    def seen_before_and_after(x: Tensor, conv: nn.Module, pool: nn.Module) -> Tensor:
        y = pool(conv(x))
        kept = y + 1
        return kept * y.sigmoid_() * y

    block = Block(seen_before_and_after, nn.Conv2d(3, 3, 3), nn.AvgPool2d(2))
    model, image = seeded(lambda: nn.Sequential(block, *tail()), 3, 17, 14)
    with pytest.raises(NotIncremental, match="changes in place what others read"):
        engine_of(model, image)
    # a prepared model's graph, in which the write is a value of its own, gives the same drops
    prepared = pysal.prepare(model, image, batch_size=2)
    drops = [pysal.leave_one_out(each, image, 1, segments=Window(5)) for each in (prepared, model)]
    torch.testing.assert_close(*drops, rtol=1e-9, atol=1e-12)


# ---- leave-one-out


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.ReLU6(),
        Block(lambda x, a, b: F.relu(b(a(x)) + x), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1)),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.SiLU(),
        *tail(),
    )


def prepared_network(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, Tensor]:
    model, image = seeded(network, 3, 32, 28)
    images = torch.cat([image, image.flip(3), image * 0.5]).to(dtype)
    model = model.to(dtype)
    return model, pysal.prepare(model, images[:1], batch_size=2), images


def ragged(images: Tensor) -> list[Tensor]:
    """Labels with gaps, of as many segments as nobody expects, one of them in two pieces."""
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randint(-1, 4, (8, 7), generator=generator).repeat_interleave(4, 0).repeat_interleave(4, 1) for _ in images]
    maps[1][:3, :5] = 9
    maps[1][30:, 27:] = 9
    return maps


def found(model: Any, images: Tensor, **options: Any) -> tuple[Tensor, dict[str, Any], float]:
    given = {"leave_one_out": options}
    result = pysal.explain(model, images, 1, methods=["leave_one_out"], score="logit", method_options=given)["leave_one_out"]
    return result.map, result.details, result.passes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "segments", [Window(5, 3), Window(1, 1), Window((32, 3)), Slic(9), ragged], ids=lambda cut: str(cut).split(" at 0x")[0]
)
def test_leave_one_out_is_that_of_the_model(segments: Any, dtype: torch.dtype) -> None:
    model, prepared, images = prepared_network(dtype)
    cut = segments(images) if callable(segments) else segments
    if cut == Window(1, 1):
        images = images[:1]
    expected, details, _ = found(model, images, segments=cut, fill="mean")
    got, more, _ = found(prepared, images, segments=cut, fill="mean")
    largest = max(float(drops.abs().max()) for drops in details["drops"])
    rounding = ROUNDINGS * torch.finfo(dtype).eps * float(model(images).detach().abs().max())
    bound = RELATIVE[dtype] * largest + rounding
    assert float((got - expected).abs().max()) <= bound
    for a, b in zip([*more["drops"], *more["class_drops"]], [*details["drops"], *details["class_drops"]], strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= bound


@pytest.fixture
def whole_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many whole images each pass of a prepared graph took."""
    seen: list[int] = []
    original = pysal.engine.prepared.model.PreparedModel.__call__

    def counted(self: Any, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(images))
        return original(self, images, *args, **kwargs)

    monkeypatch.setattr(pysal.engine.prepared.model.PreparedModel, "__call__", counted)
    return seen


@pytest.mark.usefixtures("independence_is_known")
def test_boxes_are_used_where_they_pay(whole_passes: list[int]) -> None:
    _, prepared, images = prepared_network()
    _, _, passes = found(prepared, images, segments=Window(4))
    assert sum(whole_passes) == 3  # the clean images
    assert passes == 1 + 56 + 1  # clean, windows, kept
    whole_passes.clear()
    _, _, passes = found(prepared, images, segments=Window((32, 28)))
    assert sum(whole_passes) == 6
    assert max(whole_passes) <= 2
    assert passes == 2


@pytest.mark.usefixtures("independence_is_known")
@pytest.mark.parametrize("mode", ["out", "in", "both"])
def test_the_pass_of_a_single_image_is_kept_for_its_boxes(
    monkeypatch: pytest.MonkeyPatch, whole_passes: list[int], mode: Any
) -> None:
    model, prepared, images = prepared_network()
    kept: list[Tensor] = []
    keep = Incremental.keep
    monkeypatch.setattr(Incremental, "keep", lambda self, image: kept.append(image) or keep(self, image))
    options: dict[str, Any] = {"segments": Window(4), "fill": 0.3, "mode": mode, "score": "logit"}
    got = pysal.leave_one_out(prepared, images[:1], None, **options)
    bases = {"out": [images[:1]], "in": [torch.full_like(images[:1], 0.3)]}
    expected = bases.get(mode, bases["out"] + bases["in"])
    assert len(kept) == len(expected)
    assert all(map(torch.equal, kept, expected))
    assert sum(whole_passes) == (mode == "in")  # which class is explained, the image itself tells
    torch.testing.assert_close(got, pysal.leave_one_out(model, images[:1], None, **options), rtol=1e-8, atol=1e-12)


@pytest.mark.usefixtures("independence_is_known")
def test_whole_images_run_where_boxes_cannot(whole_passes: list[int]) -> None:
    model, prepared, images = prepared_network()
    larger = F.interpolate(images, size=(40, 40))
    for each in (larger, images):
        whole_passes.clear()
        got = pysal.leave_one_out(prepared, each, 1, segments=Window(8), score="logit")
        expected = pysal.leave_one_out(model, each, 1, segments=Window(8), score="logit")
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)
        assert (sum(whole_passes) > 3) == (each is larger)


@pytest.mark.usefixtures("independence_is_known")
@pytest.mark.parametrize("fill", [0.3, "blur"])
def test_gains_run_in_boxes_that_change_the_fill(whole_passes: list[int], fill: Any) -> None:
    model, prepared, images = prepared_network()
    for mode in ("in", "both"):
        whole_passes.clear()
        got = pysal.leave_one_out(prepared, images, 1, segments=Window(4), fill=fill, mode=mode, score="logit")
        assert sum(whole_passes) == 2 * len(images)  # the clean images and the fills
        expected = pysal.leave_one_out(model, images, 1, segments=Window(4), fill=fill, mode=mode, score="logit")
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


def test_batch_size_changes_chunks_and_not_the_result() -> None:
    _, prepared, images = prepared_network()
    expected, _, _ = found(prepared, images, segments=Window(4))
    for batch_size in (1, 3, 1000):
        seen: list[int] = []
        with pysal.progress(lambda _, done, total, seen=seen: seen.append(done)):
            got = pysal.leave_one_out(prepared, images, 1, segments=Window(4), score="logit", batch_size=batch_size)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        steps = np.diff([0, *seen[seen.index(len(images)) + 1 :]])
        assert steps.sum() == 3 * 56
        assert steps.max() <= batch_size


def test_groups_halve_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _, prepared, images = prepared_network()
    expected, _, _ = found(prepared, images, segments=Window(4))
    original, together, sizes = Incremental.run, Incremental.run_groups, []

    def small_memory_together(self: Incremental, kept: Any, groups: Any) -> Tensor:
        groups = list(groups)
        if sum(len(patches) for patches, _ in groups) > 3:
            raise torch.OutOfMemoryError("no")
        sizes.extend(len(patches) for patches, _ in groups)
        return together(self, kept, groups)

    def small_memory(self: Incremental, kept: Any, patches: Tensor, geometry: Any) -> Tensor:
        if len(patches) > 3:
            raise torch.OutOfMemoryError("no")
        sizes.append(len(patches))
        return original(self, kept, patches, geometry)

    monkeypatch.setattr(Incremental, "run", small_memory)
    monkeypatch.setattr(Incremental, "run_groups", small_memory_together)
    got, _, _ = found(prepared, images, segments=Window(4))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert sum(sizes) == 3 * 56


@pytest.mark.usefixtures("independence_is_known")
@pytest.mark.parametrize("pooled", [False, True])
def test_what_follows_the_last_map_runs_once_for_many_groups(monkeypatch: pytest.MonkeyPatch, pooled: bool) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1), nn.ReLU())
            self.head = nn.Sequential(nn.Linear(4 if pooled else 4 * 64, 16), nn.ReLU(), nn.Linear(16, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.features(x)
            return self.head(x.mean((2, 3)) if pooled else x.view(x.size(0), -1))

    model, image = seeded(Small, 3, 32, 32)
    monkeypatch.setattr(groups, "PAYING_SHARE", np.inf)  # all in boxes, whatever they cost
    prepared = pysal.prepare(model, image, batch_size=2, gains=Gains(2.0, 2.0, 2.0))
    numbers: list[int] = []
    after = Run.after
    monkeypatch.setattr(Run, "after", lambda self, tail, value: numbers.append(len(value)) or after(self, tail, value))
    monkeypatch.setattr(groups, "CPU_GROUP_NUMBERS", 2000)  # small groups
    got = pysal.leave_one_out(prepared, image, 1, segments=Window(4), score="logit", batch_size=48)
    assert sum(numbers) == 64
    assert len(numbers) <= 3
    expected = pysal.leave_one_out(model, image, 1, segments=Window(4), score="logit")
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


def test_nothing_is_left_changed() -> None:
    model, prepared, images = prepared_network()
    before, state = images.clone(), copy.deepcopy(model.state_dict())
    first = pysal.leave_one_out(prepared, images, 1, segments=Window(4), score="softmax")
    with torch.inference_mode():
        second = pysal.leave_one_out(prepared, images, 1, segments=Window(4), score="softmax")
    assert torch.equal(first, second)
    assert torch.equal(images, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    gradient = pysal.gradient(prepared, images, 1)
    torch.testing.assert_close(gradient, pysal.gradient(model, images, 1), rtol=1e-8, atol=1e-12)


def test_smooth_grad_over_leave_one_out_is_that_of_the_model() -> None:
    model, prepared, images = prepared_network()
    options = {"samples": 3, "seed": 1, "base": "leave_one_out", "method_options": {"segments": Window(8)}}
    got, expected = (pysal.smooth_grad(each, images[:2], 1, **options) for each in (prepared, model))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-11)


def test_report_says_that_leave_one_out_is_incremental() -> None:
    _, prepared, _ = prepared_network()
    assert "leave-one-out recomputes what a segment reaches: 7 layers follow boxes" in prepared.report()


def test_what_runs_whole_counts_among_the_costs() -> None:
    class Whole(nn.Module):
        """A convolution that boxes follow, something that they do not, and convolutions that cost much more."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, channels, 3, padding=1)
            self.rest = nn.Sequential(*[nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = y * y.mean((2, 3), keepdim=True).sigmoid()
            return self.rest(y).mean((2, 3))

    model, image = seeded(lambda: Whole(16), 3, 32, 32)
    engine = engine_of(model, image)
    box = np.array([[4, 4, 8, 8]])
    assert engine.followed > 0
    assert not engine.groups.pays(box)  # 3 of 28 parts of the multiplications are in boxes
    less, image = seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3), *tail()), 3, 32, 32)
    assert engine_of(less, image).groups.pays(box)
