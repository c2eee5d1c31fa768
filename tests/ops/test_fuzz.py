"""Every op on its native kernels against its oracle, over shapes, dtypes, strides and rows that nobody chose.

Each tensor lies somewhere in a larger buffer: its dimensions in any order, with gaps, an offset and expanded dimensions.
What lies between its elements is NaN, or the largest integer, so that reading it shows.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pysal import _library
from pysal.reference import gaussian_scale_space as reference
from pysal.testing import DTYPES, Backend, assert_no_worse, assert_same_layout, backends, sample

# for each backend; of the emulation a few, it takes a fibre for each CUDA thread
EXAMPLES = {"cpu": 40, "emulated": 20, "cuda": 40}
FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TOTALS = (torch.float32, torch.float64)
# in float64 the oracle's own rounding is as large as a kernel's; the ops' own tests compare in extended precision there
BELOW_FLOAT64 = tuple(dtype for dtype in DTYPES if dtype != torch.float64)
# their results are contiguous; the oracle returns a view of something larger or transposed
CONTIGUOUS = ("gaussian_noise_bits", "gaussian_scale_space")

batches, channel_counts, sides = st.integers(1, 3), st.sampled_from([1, 2, 3, 5, 8, 19]), st.integers(1, 21)
image_shapes = st.tuples(batches, channel_counts, sides, sides)


def fuzzed(shapes: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[[Backend], None]]:
    """Make body(backend, data, shape) a test on every native backend."""

    def decorate(body: Callable[..., None]) -> Callable[[Backend], None]:
        @pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
        def test(backend: Backend) -> None:
            @settings(FUZZ, max_examples=EXAMPLES[backend.name])
            @given(data=st.data(), shape=shapes)
            def run(data: st.DataObject, shape: tuple[int, ...]) -> None:
                body(backend, data, shape)

            run()

        test.__name__ = test.__qualname__ = body.__name__
        return test

    return decorate


class Drawer:
    """What a test draws, on one device."""

    def __init__(self, data: st.DataObject, device: str) -> None:
        self.data, self.device, self.seed = data, device, 0

    def __call__(self, strategy: st.SearchStrategy[Any]) -> Any:
        return self.data.draw(strategy)

    def view(self, values: Tensor, expand: bool = True) -> Tensor:
        """Return the values in a layout of their own; with expand, of some dimensions the first value alone."""
        ndim = values.ndim
        kept = [self(st.sampled_from([False, False, False, expand])) for _ in range(ndim)]
        for dim in range(ndim):
            if kept[dim] and values.shape[dim] > 0:
                values = values.narrow(dim, 0, 1)
        shape = values.shape
        order = self(st.one_of(st.just(tuple(range(ndim))), st.permutations(range(ndim))))
        gaps = [self(st.sampled_from([1, 1, 2])) for _ in range(ndim)]
        offset = self(st.integers(0, 3))
        stored = [shape[dim] * gaps[dim] for dim in order]
        fill = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
        buffer = torch.full((offset + math.prod(stored),), fill, dtype=values.dtype, device=self.device)
        spread = buffer[offset:].view(stored)[tuple(slice(None, None, gaps[dim]) for dim in order)]
        return spread.permute([order.index(dim) for dim in range(ndim)]).copy_(values)

    def floats(
        self, *shape: int, dtype: torch.dtype = torch.float32, low: float = -1.0, high: float = 1.0, expand: bool = True
    ) -> Tensor:
        """Return random numbers in a random layout."""
        self.seed += 1
        view = self.view(sample(*shape, dtype=dtype, seed=self.seed, low=low, high=high), expand)
        return view.expand(shape)

    def integers(self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Return random integers of [low, high) in a random layout."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return self.view(torch.randint(low, high, shape, generator=generator).to(dtype)).expand(shape)

    def rows(self, batch: int) -> Tensor:
        """Return rows in any order, repeated, some images never; also none at all."""
        return self.integers(self(st.sampled_from([0, 1, 2, 5, 35])), low=0, high=batch)


def in_float64(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) else value


def outputs(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    returned = call(*arguments)
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)


def agrees(backend: Backend, name: str, *arguments: Any, exact: bool = False) -> None:
    """Assert that an op that writes nothing gives what its oracle gives, in the same memory format."""
    kernel, baseline = outputs(backend.op(name), arguments), outputs(_library.REFERENCES[name], arguments)
    truth = baseline if exact else outputs(_library.REFERENCES[name], tuple(in_float64(each) for each in arguments))
    for k, r, b in zip(kernel, truth, baseline, strict=True):
        assert_same_layout(k, b.contiguous() if name in CONTIGUOUS else b)
        if exact:
            assert torch.equal(k, b)
        else:
            assert_no_worse(k, r, b)


def writes_the_same(backend: Backend, name: str, written: tuple[Tensor, ...], *arguments: Any) -> None:
    """Assert that an op that writes its first arguments leaves in them what its oracle leaves, wherever they lie."""
    truth = [value.double() if value.is_floating_point() else value.clone() for value in written]
    baseline = [value.clone() for value in written]
    _library.REFERENCES[name](*truth, *arguments)
    _library.REFERENCES[name](*baseline, *arguments)
    before = [storage_outside(value) for value in written]
    backend.op(name)(*written, *arguments)
    for k, r, b in zip(written, truth, baseline, strict=True):
        if k.is_floating_point():
            assert_no_worse(k, r, b)
        else:
            assert torch.equal(k, b)
    for value, outside in zip(written, before, strict=True):
        torch.testing.assert_close(storage_outside(value), outside, rtol=0, atol=0, equal_nan=True)


def storage_outside(view: Tensor) -> Tensor:
    """Return a copy of the buffer a view lies in, with zeros for the view's own elements."""
    buffer = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage()).clone()
    buffer.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return buffer


@fuzzed(st.one_of(image_shapes, st.lists(st.integers(0, 40), min_size=1, max_size=3)))
def test_guided_relu(backend: Backend, data: st.DataObject, shape: tuple[int, ...]) -> None:
    draw = Drawer(data, backend.device)
    dtype, rule = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2))
    upper = draw(st.sampled_from([math.inf, 6.0, 0.5, 0.3]))
    x = draw.floats(*shape, dtype=dtype)
    agrees(backend, "guided_relu", x, upper, rule, exact=True)
    agrees(backend, "guided_relu_gates", x, upper, exact=True)
    gates = draw.integers((x.numel() + 7) // 8, low=0, high=256, dtype=torch.uint8)
    channels_last = x.ndim == 4 and draw(st.booleans())
    agrees(backend, "guided_relu_backward", draw.floats(*shape, dtype=dtype), gates, rule, channels_last, exact=True)
    grad = draw.floats(*shape, dtype=dtype, expand=False)
    writes_the_same(backend, "guided_relu_backward_", (grad,), gates, rule, channels_last)


@fuzzed(st.one_of(image_shapes, st.lists(st.integers(0, 40), min_size=2, max_size=3)))
def test_epilogue(backend: Backend, data: st.DataObject, shape: tuple[int, ...]) -> None:
    draw = Drawer(data, backend.device)
    dtype, activation = draw(st.sampled_from(BELOW_FLOAT64)), draw(st.integers(0, 8))
    parameter = draw(st.sampled_from([math.inf, 6.0, 0.5])) if activation == 1 else 0.25
    x = draw.floats(*shape, dtype=dtype, expand=False)
    bias = draw.floats(shape[1]) if draw(st.booleans()) else None
    shortcut = draw.floats(*shape, dtype=dtype) if draw(st.booleans()) else None
    writes_the_same(backend, "epilogue_", (x,), bias, shortcut, activation, parameter, draw(st.booleans()))
    times, channels_last = draw(st.integers(1, 3)), x.ndim == 4 and draw(st.booleans())
    if activation in (1, 8):
        kept = draw.integers((x.numel() + 7) // 8, low=0, high=256, dtype=torch.uint8)
    else:
        kept = draw.floats(*shape, dtype=dtype)
    grad, added = (draw.floats(times * shape[0], *shape[1:], dtype=dtype, expand=False) for _ in range(2))
    rest = (activation, parameter, draw(st.integers(0, 2)), shape[0], channels_last)
    writes_the_same(backend, "epilogue_backward_", (grad,), added, kept, *rest)


@fuzzed(image_shapes)
def test_box_regions(backend: Backend, data: st.DataObject, shape: tuple[int, ...]) -> None:
    draw = Drawer(data, backend.device)
    dtype, count, (_, channels, height, width) = draw(st.sampled_from(BELOW_FLOAT64)), draw(st.integers(0, 4)), shape
    map = draw.floats(1, channels, height, width, dtype=dtype)
    boxes = draw.floats(count, channels, draw(st.integers(0, height)), draw(st.integers(0, width)), dtype=dtype)
    places = [draw.integers(count, 2, low=-3, high=max(height, width) + 3) for _ in range(2)]
    size = draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    steps, dilations = (draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(2))
    agrees(backend, "box_regions", map, boxes, *places, *size, *steps, 0.5, exact=True)
    agrees(backend, "box_regions_sums", map, boxes, places[0])
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    weight, bias = draw.floats(*kernel, channels, dtype=dtype), draw.floats(channels, dtype=dtype)
    agrees(backend, "box_regions_depthwise", map, boxes, *places, *size, weight, bias, *steps, *dilations, -0.5, 0.75)


@fuzzed(image_shapes)
def test_occlusion_masks(backend: Backend, data: st.DataObject, shape: tuple[int, ...]) -> None:
    draw = Drawer(data, backend.device)
    dtype, target, channels_last = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES)), draw(st.booleans())
    batch, _, height, width = shape
    images, fills = draw.floats(*shape, dtype=dtype), draw.floats(*shape, dtype=dtype)
    labels = draw.integers(batch, height, width, low=-1, high=4)
    rows = draw.rows(batch)
    ids = draw.integers(len(rows), low=-1, high=4)
    factors: tuple[Tensor | None, Tensor | None] = (None, None)
    if draw(st.booleans()):
        channels = shape[1]
        factors = draw.floats(channels, dtype=torch.float64), draw.floats(channels, dtype=torch.float64, low=0.2)
    agrees(backend, "occlusion_masks", images, fills, labels, rows, ids, target, channels_last, *factors, exact=True)
    boxes = draw_boxes(draw, len(rows), height, width)
    agrees(backend, "occlusion_masks_boxes", images, fills, boxes, rows, target, channels_last, *factors, exact=True)


@fuzzed(image_shapes)
def test_occlusion_masks_maps(backend: Backend, data: st.DataObject, shape: tuple[int, ...]) -> None:
    draw = Drawer(data, backend.device)
    batch, classes, height, width = shape
    segments = draw(st.sampled_from([0, 1, 3, 40]))
    scores = draw.floats(batch, classes, segments, dtype=draw(st.sampled_from(DTYPES)))
    labels = draw.integers(batch, height, width, low=-2, high=segments + 2)
    agrees(backend, "occlusion_masks_map", scores, labels, exact=True)
    boxes = draw_boxes(draw, segments, height, width)
    agrees(backend, "occlusion_masks_boxes_map", scores, boxes, height, width)


def draw_boxes(draw: Drawer, count: int, height: int, width: int) -> Tensor:
    """Boxes inside the image, some of them empty."""
    y = draw.integers(count, 2, low=0, high=height + 1).sort(1).values
    x = draw.integers(count, 2, low=0, high=width + 1).sort(1).values
    return draw.view(torch.stack([y[:, 0], x[:, 0], y[:, 1], x[:, 1]], 1), expand=False)


@fuzzed(image_shapes)
def test_path_integral_points_and_product(backend: Backend, data: st.DataObject, shape: tuple[int, ...]) -> None:
    draw = Drawer(data, backend.device)
    dtype, target, total = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(TOTALS))
    inputs, baselines = draw.floats(*shape, dtype=dtype), draw.floats(*shape, dtype=dtype)
    rows = draw.rows(shape[0])
    alphas = draw.floats(len(rows), dtype=torch.float64, low=0.0)
    agrees(backend, "path_integral_points", inputs, baselines, rows, alphas, target, draw(st.booleans()))
    agrees(backend, "path_integral_product", inputs, baselines, draw.floats(*shape, dtype=total))


@fuzzed(st.one_of(image_shapes, st.tuples(batches), st.tuples(batches, sides, sides)))
def test_path_integral_sums(backend: Backend, data: st.DataObject, shape: tuple[int, ...]) -> None:
    draw = Drawer(data, backend.device)
    dtype, total = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(TOTALS))
    rows = draw.rows(shape[0])
    count = len(rows)
    gradients = draw.floats(count, *shape[1:], dtype=dtype)
    factors = draw.floats(count, *shape[1:], dtype=draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else None
    weights = draw.floats(count, dtype=torch.float64)
    accumulator = draw.floats(*shape, dtype=total, expand=False)
    writes_the_same(backend, "path_integral_accumulate_", (accumulator,), gradients, factors, rows, weights)
    mean, squares = (draw.view(torch.zeros(shape, dtype=total), expand=False) for _ in range(2))
    counts = draw.view(torch.zeros(shape[0], dtype=torch.int64), expand=False)
    writes_the_same(backend, "path_integral_moments_", (mean, squares, counts), gradients, rows)


@fuzzed(image_shapes)
def test_gaussian_noise(backend: Backend, data: st.DataObject, shape: tuple[int, ...]) -> None:
    draw = Drawer(data, backend.device)
    dtype, target = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(-(2**63), 2**63 - 1))
    rows = draw.rows(shape[0])
    ids = draw.integers(len(rows), low=-(2**62), high=2**62, dtype=torch.int64)
    samples = draw.integers(len(rows), low=0, high=2**32, dtype=torch.int64)
    agrees(backend, "gaussian_noise_bits", seed, ids, samples, draw(st.integers(0, 70)), exact=True)
    images = draw.floats(*shape, dtype=dtype)
    scales = draw.floats(shape[0], dtype=torch.float64, low=0.0)
    agrees(backend, "gaussian_noise", images, scales, seed, rows, ids, samples, target, draw(st.booleans()))


@fuzzed(image_shapes)
def test_gaussian_scale_space(backend: Backend, data: st.DataObject, shape: tuple[int, ...]) -> None:
    draw = Drawer(data, backend.device)
    boundary = draw(st.integers(0, 1))
    images = draw.floats(*shape, dtype=draw(st.sampled_from(BELOW_FLOAT64)), low=0.0)
    sigmas = draw(st.lists(st.sampled_from([0.0, 0.126, 0.3, 0.7, 2.0, 5.5, 60.0]), min_size=shape[0], max_size=shape[0]))
    agrees(backend, "gaussian_scale_space", images, sigmas, boundary)
    step = draw(st.sampled_from([0.0, 0.01]))
    kernel = backend.op("gaussian_scale_space_derivative")(images, sigmas, step, boundary)
    truth = reference.gaussian_scale_space_derivative(images.double(), sigmas, step, boundary)
    baseline = reference.gaussian_scale_space_derivative(images, sigmas, step, boundary)
    assert_no_worse(kernel[0], truth[0], baseline[0])
    assert_same_layout(kernel[1], torch.empty_like(kernel[1], memory_format=torch.contiguous_format))
    for n, sigma in enumerate(sigmas):
        # slopes of both signs, along two axes, cancel on a flat image: what is rounded is as large as they are
        slopes = reference._slopes(sigma, step, reference._radius(sigma + step)).abs().sum()
        terms = (2 * slopes * images[n].abs().max()).reshape(1).to(images.device)
        assert_no_worse(*(torch.cat([each[1][n].flatten(), terms.to(each[1].dtype)]) for each in (kernel, truth, baseline)))


@fuzzed(image_shapes)
def test_grad_cam(backend: Backend, data: st.DataObject, shape: tuple[int, ...]) -> None:
    draw = Drawer(data, backend.device)
    dtype = draw(st.sampled_from(BELOW_FLOAT64))
    activations = draw.floats(*shape, dtype=dtype)
    gradients = draw.floats(*shape, dtype=dtype, low=-0.5)  # means far from 0, where nothing cancels
    agrees(backend, "grad_cam", activations, gradients, draw(sides), draw(sides), draw(st.booleans()))


def test_every_op_is_here() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{op}"' in text for op in _library.SCHEMAS)
