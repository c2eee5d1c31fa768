"""box_regions: regions of images that are one map but for a box are what slicing and convolving the whole images gives."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import pysal.ops as ops
from pysal.reference import box_regions as reference
from pysal.testing import DTYPES, Backend, assert_no_worse, assert_same_layout, backends, layouts, sample

NATIVE = pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
ALL = pytest.mark.parametrize("backend", backends(), ids=str)
# map (C, H, W), box (h, w), region (height, width), steps: one pixel, no box, more channels than a vector, borders all round
CASES = [
    ((3, 9, 7), (3, 2), (5, 6), (1, 1)),
    ((1, 1, 1), (1, 1), (3, 3), (1, 1)),
    ((16, 12, 13), (12, 13), (20, 21), (1, 1)),
    ((70, 6, 8), (0, 0), (4, 4), (1, 1)),
    ((133, 8, 9), (4, 5), (4, 3), (2, 3)),
    ((5, 11, 6), (6, 4), (0, 4), (1, 2)),
]


def places(count: int, size: tuple[int, int], beyond: int, seed: int) -> Tensor:
    """Return `count` places that lie up to `beyond` before and behind a map of that size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randint(-beyond, side + beyond, (count,), generator=generator, dtype=torch.int32) for side in size], 1
    )


def drawn(shape: tuple[int, ...], box: tuple[int, int], dtype: torch.dtype = torch.float32, count: int = 5) -> list[Tensor]:
    """Return a map, boxes inside it, their origins, and corners of regions that reach beyond it."""
    map, boxes = sample(1, *shape, dtype=dtype, seed=1), sample(count, shape[0], *box, dtype=dtype, seed=2)
    inside = (shape[1] - box[0] + 1, shape[2] - box[1] + 1)
    return [map, boxes, places(count, inside, 0, 3), places(count, shape[1:], 3, 4)]


def whole_images(map: Tensor, boxes: Tensor, origins: Tensor) -> Tensor:
    """Return the images themselves, each box written over a copy of the map."""
    images = map.repeat(len(boxes), 1, 1, 1)
    height, width = boxes.shape[2:]
    for image, box, (top, left) in zip(images, boxes, origins.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = box
    return images


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ALL
def test_matches_reference(backend: Backend, dtype: torch.dtype) -> None:
    for shape, box, region, steps in CASES:
        map, boxes, origins, corners = drawn(shape, box, dtype)
        given = [value.to(backend.device) for value in (map, boxes, origins, corners)]
        out = backend.op("box_regions")(*given, *region, *steps, 0.25).cpu()
        # by slicing the padded images: corners and regions reach at most 25 * 3 pixels beyond
        margin = 80
        padded = F.pad(whole_images(map, boxes, origins), (margin,) * 4, value=0.25)
        for n, (y, x) in enumerate((corners + margin).tolist()):
            rows, columns = (slice(at, at + size * step, step) for at, size, step in zip((y, x), region, steps, strict=True))
            assert torch.equal(out[n], padded[n, :, rows, columns])
        assert_same_layout(out, reference.box_regions(map, boxes, origins, corners, *region, *steps, 0.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ALL
def test_depthwise_is_the_convolution_of_the_images(backend: Backend, dtype: torch.dtype) -> None:
    for (kernel, strides, dilations), (shape, box, region, _) in zip(
        [((3, 3), (1, 1), (1, 1)), ((1, 1), (1, 1), (1, 1)), ((5, 2), (2, 1), (1, 3)), ((2, 3), (1, 2), (2, 1))] * 2,
        [*CASES, CASES[0], CASES[4]],
        strict=True,
    ):
        arguments = drawn(shape, box, dtype)
        map, boxes, origins, corners = arguments
        weight, bias = sample(*kernel, shape[0], dtype=dtype, seed=5), sample(shape[0], dtype=dtype, seed=6)
        options = (*strides, *dilations, -0.5, 0.75)
        given = [value.to(backend.device) for value in (*arguments, weight, bias)]
        out = backend.op("box_regions_depthwise")(*given[:4], *region, *given[4:], *options).cpu()
        baseline = reference.box_regions_depthwise(*arguments, *region, weight, bias, *options)
        assert_same_layout(out, baseline)

        margin = 80
        padded = F.pad(whole_images(map, boxes, origins).double(), (margin,) * 4)
        expected = torch.empty(out.shape, dtype=torch.float64)
        filters = weight.double().permute(2, 0, 1)[:, None]
        for n, (y, x) in enumerate((corners + margin).tolist()):
            size = [
                (side - 1) * step + (k - 1) * dilation + 1
                for side, step, k, dilation in zip(region, strides, kernel, dilations, strict=True)
            ]
            if 0 in region:
                continue
            cut = padded[n : n + 1, :, y : y + size[0], x : x + size[1]]
            whole = F.conv2d(cut, filters, bias.double(), strides, 0, dilations, shape[0])
            expected[n] = whole.clamp(-0.5, 0.75)[0]
        assert_no_worse(out, expected, baseline)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ALL
def test_sums_are_the_difference_of_the_sums_over_the_images(backend: Backend, dtype: torch.dtype) -> None:
    for shape, box, _, _ in CASES:
        map, boxes, origins, _ = drawn(shape, box, dtype)
        out = backend.op("box_regions_sums")(*(value.to(backend.device) for value in (map, boxes, origins))).cpu()
        difference = whole_images(map, boxes, origins).double() - map.double()
        baseline = reference.box_regions_sums(map, boxes, origins)
        assert_same_layout(out, baseline)
        # float64 sums of the same numbers: what is lost is the rounding of as many additions
        terms = max(1, box[0] * box[1])
        bound = terms * torch.finfo(torch.float64).eps * difference.abs().sum((2, 3)).clamp_min(1e-300)
        assert ((out - difference.sum((2, 3))).abs() <= bound).all()


@ALL
def test_boxes_beyond_the_map_count_where_they_are_inside(backend: Backend) -> None:
    map, boxes = torch.zeros(1, 2, 3, 4, device=backend.device), torch.ones(2, 2, 2, 3, device=backend.device)
    origins = torch.tensor([[-1, -2], [2, 3]], dtype=torch.int32, device=backend.device)
    corners = torch.full((2, 2), -1, dtype=torch.int32, device=backend.device)
    out = backend.op("box_regions")(map, boxes, origins, corners, 5, 6, 1, 1, 0.5)
    assert out[:, 0].cpu().tolist() == [
        [[0.5] * 6, [0.5, 1, 0, 0, 0, 0.5], *[[0.5, 0, 0, 0, 0, 0.5]] * 2, [0.5] * 6],
        [[0.5] * 6, *[[0.5, 0, 0, 0, 0, 0.5]] * 2, [0.5, 0, 0, 0, 1, 0.5], [0.5] * 6],
    ]
    assert backend.op("box_regions_sums")(map, boxes, origins).tolist() == [[1, 1], [1, 1]]


def test_opcheck() -> None:
    arguments = drawn(*CASES[0][:2])
    weight, bias = sample(3, 2, 3, seed=5), sample(3, seed=6)
    opcheck(torch.ops.pysal.box_regions.default, (*arguments, 4, 5, 2, 3, 0.5))
    opcheck(torch.ops.pysal.box_regions_depthwise.default, (*arguments, 4, 5, weight, bias, 2, 1, 3, 2, -1.0, 0.5))
    opcheck(torch.ops.pysal.box_regions_sums.default, tuple(arguments[:3]))


@NATIVE
def test_layouts(backend: Backend) -> None:
    map, boxes, origins, corners = (value.to(backend.device) for value in drawn(*CASES[4][:2]))
    weight, bias = sample(3, 3, 133, seed=5).to(backend.device), sample(133, seed=6).to(backend.device)
    tail = (1, 1, 1, 1, -1.0, 1.0)
    copied = backend.op("box_regions")(map, boxes, origins, corners, 6, 6, 1, 1, 0.0)
    convolved = backend.op("box_regions_depthwise")(map, boxes, origins, corners, 6, 6, weight, bias, *tail)
    summed = backend.op("box_regions_sums")(map, boxes, origins)
    for _, m in layouts(map):
        for _, b in layouts(boxes):
            assert torch.equal(backend.op("box_regions")(m, b, origins, corners, 6, 6, 1, 1, 0.0), copied)
            assert torch.equal(backend.op("box_regions_sums")(m, b, origins), summed)
    for _, o in layouts(origins):
        assert torch.equal(backend.op("box_regions")(map, boxes, o, corners, 6, 6, 1, 1, 0.0), copied)
    for _, w in layouts(weight):
        again = backend.op("box_regions_depthwise")(map, boxes, origins, corners, 6, 6, w, bias, *tail)
        assert torch.equal(again, convolved)


@ALL
def test_empty_and_extremes(backend: Backend) -> None:
    map, boxes, origins, corners = (value.to(backend.device) for value in drawn(*CASES[0][:2]))
    none = (boxes[:0], origins[:0])
    assert backend.op("box_regions")(map, *none, corners[:0], 2, 3, 1, 1, 0.0).shape == (0, 3, 2, 3)
    assert backend.op("box_regions_sums")(map, *none).shape == (0, 3)
    map[0, 1, 4, 3] = torch.nan  # stays where it is
    out = backend.op("box_regions")(map, boxes[:1, :, :0], origins[:1], 0 * corners[:1], 9, 7, 1, 1, -torch.inf)
    assert out.isnan().sum() == 1
    assert out[0, 1, 4, 3].isnan()
    weight, bias = torch.ones(3, 3, 3, device=backend.device), torch.zeros(3, device=backend.device)
    convolved = backend.op("box_regions_depthwise")(
        map, boxes[:1, :, :0], origins[:1], 0 * corners[:1], 7, 5, weight, bias, 1, 1, 1, 1, 0.0, 6.0
    )
    assert convolved.isnan().nonzero()[:, 1].tolist() == [1] * 9


def test_determinism() -> None:
    map, boxes, origins, corners = drawn((70, 31, 29), (9, 8), count=40)
    weight, bias = sample(3, 3, 70, seed=5), sample(70, seed=6)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                (
                    ops.box_regions(map, boxes, origins, corners, 12, 12),
                    ops.box_regions_depthwise(map, boxes, origins, corners, 12, 12, weight, bias),
                    ops.box_regions_sums(map, boxes, origins),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


M, B, P, W, V = torch.zeros(1, 2, 4, 5), torch.zeros(3, 2, 1, 1), torch.zeros(3, 2).int(), torch.ones(3, 3, 2), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.box_regions(None, B, P, P, 1, 1),
            TypeError,
            "pysal::box_regions: map must be a torch.Tensor, got NoneType",
        ),
        (
            lambda: ops.box_regions(torch.cat([M, M]), B, P, P, 1, 1),
            ValueError,
            "pysal::box_regions: map must be one map (1, C, H, W), got shape (2, 2, 4, 5)",
        ),
        (
            lambda: ops.box_regions(M, B.double(), P, P, 1, 1),
            TypeError,
            "pysal::box_regions: boxes must have dtype float32, got float64",
        ),
        (
            lambda: ops.box_regions(M, B[:, :1], P, P, 1, 1),
            ValueError,
            "pysal::box_regions: boxes must have the 2 channels of map, got shape (3, 1, 1, 1)",
        ),
        (
            lambda: ops.box_regions(M, B, P[:2], P, 1, 1),
            ValueError,
            "pysal::box_regions: origins must have shape (3, 2), got shape (2, 2)",
        ),
        (
            lambda: ops.box_regions(M, B, P, P.float(), 1, 1),
            TypeError,
            "pysal::box_regions: corners must have dtype int32 or int64 or int16 or int8 or uint8, got float32",
        ),
        (
            lambda: ops.box_regions(M, B, P, P, 1, -1),
            ValueError,
            "pysal::box_regions: width must be at least 0, got -1",
        ),
        (
            lambda: ops.box_regions(M, B, P, P, 1, 1, row_step=0),
            ValueError,
            "pysal::box_regions: row_step must be at least 1, got 0",
        ),
        (
            lambda: ops.box_regions_depthwise(M, B, P, P, 1, 1, W[:, :, :1], V),
            ValueError,
            "pysal::box_regions_depthwise: weight must have shape (kh, kw, 2), kh and kw at least 1, got shape (3, 3, 1)",
        ),
        (
            lambda: ops.box_regions_depthwise(M, B, P, P, 1, 1, W, V[:1]),
            ValueError,
            "pysal::box_regions_depthwise: bias must have 2 elements, one per channel, got 1",
        ),
        (
            lambda: ops.box_regions_depthwise(M, B, P, P, 1, 1, W, V.to("meta")),
            ValueError,
            "pysal::box_regions_depthwise: bias must be on the device of map, cpu, got meta",
        ),
        (
            lambda: ops.box_regions_sums(M, B.to("meta"), P),
            ValueError,
            "pysal::box_regions_sums: boxes must be on the device of map, cpu, got meta",
        ),
    ],
)
def test_errors(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
