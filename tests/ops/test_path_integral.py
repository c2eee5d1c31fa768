"""path_integral: points, sums and moments no worse than plain torch, in order of n whatever the layout and threads."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import pysal.ops as ops
from pysal.reference import path_integral as reference
from pysal.testing import (
    DTYPES,
    Backend,
    assert_no_worse,
    assert_same_layout,
    backends,
    layouts,
    require_native,
    sample,
    with_last_row,
)

NATIVE = pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
ALL = pytest.mark.parametrize("backend", backends(), ids=str)
TOTALS = (torch.float32, torch.float64)
# odd, one pixel, one channel, more than one piece of an image, more channels than colours
SHAPES = [(2, 3, 7, 9), (1, 1, 1, 1), (3, 1, 5, 4), (2, 3, 65, 130), (2, 5, 40, 33)]


def path(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return inputs, baselines, rows and alphas."""
    generator = torch.Generator().manual_seed(count)
    return (
        sample(*shape, dtype=dtype, seed=1),
        sample(*shape, dtype=dtype, seed=2),
        torch.randint(shape[0], (count,), generator=generator, dtype=torch.int32),
        torch.rand(count, generator=generator, dtype=torch.float64),
    )


def copies(*values: Tensor) -> list[Tensor]:
    """Return clones that keep their memory format."""
    return [value.clone() for value in values]


def moments(
    op: Callable[..., None], device: str, dtype: torch.dtype, batch: int, samples: Tensor, rows: Tensor
) -> tuple[Tensor, ...]:
    """Return mean, squares and counts of samples that come in two chunks."""
    mean = torch.zeros(batch, *samples.shape[1:], dtype=dtype, device=device)
    squares, counts = torch.zeros_like(mean), torch.zeros(batch, dtype=torch.int64, device=device)
    for chunk in (slice(0, 4), slice(4, None)):
        op(mean, squares, counts, samples[chunk].to(device), rows[chunk].to(device))
    return mean.cpu(), squares.cpu(), counts.cpu()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@NATIVE
def test_points_match_reference(backend: Backend, source: torch.dtype, target: torch.dtype, channels_last: bool) -> None:
    for shape in SHAPES if source == torch.float32 else SHAPES[:1]:
        for count in (1, 37):
            inputs, baselines, rows, alphas = path(shape, count, source)
            arguments = [value.to(backend.device) for value in (inputs, baselines, rows, alphas)]
            out = backend.op("path_integral_points")(*arguments, target, channels_last).cpu()
            baseline = reference.path_integral_points(inputs, baselines, rows, alphas, target, channels_last)
            truth = reference.path_integral_points(
                inputs.double(), baselines.double(), rows, alphas, torch.float64, channels_last
            )
            assert_same_layout(out, baseline)
            assert_no_worse(out, truth, baseline)


@pytest.mark.parametrize("with_factors", [False, True], ids=["plain", "factors"])
@pytest.mark.parametrize("totals", TOTALS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NATIVE
def test_accumulate_matches_reference(backend: Backend, dtype: torch.dtype, totals: torch.dtype, with_factors: bool) -> None:
    for shape in [*SHAPES, (2, 6), (3,), (2, 2, 3, 4, 5)]:
        _, _, rows, weights = path(shape, 9)
        start = sample(*shape, dtype=totals, seed=3)
        gradients = sample(9, *shape[1:], dtype=dtype, seed=4)
        factors = sample(9, *shape[1:], seed=5) if with_factors else None
        terms = (gradients, factors, rows, weights)
        kernel, truth, baseline = (
            start.to(device=device, dtype=dtype, copy=True)
            for device, dtype in ((backend.device, totals), ("cpu", torch.float64), ("cpu", totals))
        )
        on_device = (None if term is None else term.to(backend.device) for term in terms)
        backend.op("path_integral_accumulate_")(kernel, *on_device)
        reference.path_integral_accumulate_(truth, *terms)
        reference.path_integral_accumulate_(baseline, *terms)
        assert_no_worse(kernel, truth, baseline)


@pytest.mark.parametrize("totals", TOTALS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NATIVE
def test_moments_match_reference(backend: Backend, dtype: torch.dtype, totals: torch.dtype) -> None:
    for shape in [*SHAPES, (2, 6), (3,)]:
        _, _, rows, _ = path(shape, 9)
        samples = sample(9, *shape[1:], dtype=dtype, seed=4)
        kernel = moments(backend.op("path_integral_moments_"), backend.device, totals, shape[0], samples, rows)
        truth = moments(reference.path_integral_moments_, "cpu", torch.float64, shape[0], samples, rows)
        baseline = moments(reference.path_integral_moments_, "cpu", totals, shape[0], samples, rows)
        assert_no_worse(kernel[0], truth[0], baseline[0])
        assert_no_worse(kernel[1], truth[1], baseline[1])
        assert torch.equal(kernel[2], rows.bincount(minlength=shape[0]))


@pytest.mark.parametrize("totals", TOTALS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NATIVE
def test_product_matches_reference(backend: Backend, dtype: torch.dtype, totals: torch.dtype) -> None:
    for shape in SHAPES:
        inputs, baselines, _, _ = path(shape, 1, dtype)
        accumulator = sample(*shape, dtype=totals, seed=3)
        on_device = [value.to(backend.device) for value in (inputs, baselines, accumulator)]
        out = backend.op("path_integral_product")(*on_device).cpu()
        baseline = reference.path_integral_product(inputs, baselines, accumulator)
        assert_same_layout(out, baseline)
        assert_no_worse(out, reference.path_integral_product(inputs, baselines, accumulator.double()), baseline)


def gradients(call: Callable[..., Tensor], values: Sequence[Tensor], rest: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the gradients of a fixed weighting of the result."""
    leaves = [value.detach().clone().requires_grad_() for value in values]
    out = call(*leaves, *rest)
    return torch.autograd.grad(out, leaves, sample(*out.shape, seed=4).to(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_matches_reference(dtype: torch.dtype) -> None:
    inputs, baselines, rows, alphas = path((2, 3, 7, 9), 6, dtype)
    total = torch.promote_types(dtype, torch.float32)
    accumulator = sample(2, 3, 7, 9, dtype=total, seed=3)
    for name, differentiable, rest in (
        ("path_integral_points", (inputs, baselines), (rows, alphas, total, True)),
        ("path_integral_product", (inputs, baselines, accumulator), ()),
    ):
        require_native(name)
        truth_rest = tuple(torch.float64 if value is total else value for value in rest)
        oracle, in_double = getattr(reference, name), [value.double() for value in differentiable]
        kernel = gradients(getattr(torch.ops.pysal, name), differentiable, rest)
        truth, baseline = gradients(oracle, in_double, truth_rest), gradients(oracle, differentiable, rest)
        for k, r, b in zip(kernel, truth, baseline, strict=True):
            assert_no_worse(k, r, b)


def test_gradcheck() -> None:
    inputs, baselines, rows, alphas = path((2, 2, 3, 4), 3, torch.float64)
    leaves = [inputs.requires_grad_(), baselines.requires_grad_()]
    accumulator = sample(2, 2, 3, 4, dtype=torch.float64, seed=3).requires_grad_()

    def points(x: Tensor, b: Tensor) -> Tensor:
        return ops.path_integral_points(x, b, rows, alphas, channels_last=True)

    assert gradcheck(points, leaves)
    assert gradgradcheck(points, leaves)
    assert gradcheck(ops.path_integral_product, [*leaves, accumulator])
    assert gradgradcheck(ops.path_integral_product, [*leaves, accumulator])


def test_sums_refuse_to_be_recorded() -> None:
    total, gradients = torch.zeros(1, 2), torch.ones(1, 2, requires_grad=True)
    rows, weights = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    with pytest.raises(ValueError) as raised:
        ops.path_integral_accumulate_(total, gradients, None, rows, weights)
    where = "pysal::path_integral_accumulate_"
    assert str(raised.value) == (f"{where}: gradients must not require grad outside torch.no_grad(), got requires_grad=True")
    with torch.no_grad():
        ops.path_integral_accumulate_(total, gradients, None, rows, weights)
    assert torch.equal(total, torch.ones(1, 2))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_opcheck(shape: tuple[int, ...], requires_grad: bool) -> None:
    inputs, baselines, rows, alphas = path(shape, 4)
    accumulator = sample(*shape, seed=3).requires_grad_(requires_grad)
    inputs.requires_grad_(requires_grad)
    baselines.requires_grad_(requires_grad)
    opcheck(torch.ops.pysal.path_integral_points.default, (inputs, baselines, rows, alphas, torch.float32, False))
    opcheck(torch.ops.pysal.path_integral_points.default, (inputs, baselines, rows, alphas, torch.float64, True))
    opcheck(torch.ops.pysal.path_integral_product.default, (inputs, baselines, accumulator))
    if not requires_grad:
        gradients, factors = sample(4, *shape[1:], seed=4), sample(4, *shape[1:], seed=5)
        accumulate = torch.ops.pysal.path_integral_accumulate_.default
        opcheck(accumulate, (accumulator, gradients, factors, rows, alphas))
        opcheck(accumulate, (accumulator, gradients, None, rows, alphas))
        counts = torch.zeros(shape[0], dtype=torch.int64)
        moments = torch.ops.pysal.path_integral_moments_.default
        opcheck(moments, (accumulator, torch.zeros_like(accumulator), counts, gradients, rows))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@NATIVE
def test_layouts(backend: Backend, channels_last: bool) -> None:
    inputs, baselines, rows, alphas = (value.to(backend.device) for value in path((2, 3, 7, 9), 5))
    points = backend.op("path_integral_points")
    expected = points(inputs, baselines, rows, alphas, torch.float32, channels_last)
    accumulator = sample(2, 3, 7, 9, seed=3).to(backend.device)
    product = backend.op("path_integral_product")
    for name, x in layouts(inputs):
        assert torch.equal(points(x, baselines, rows, alphas, torch.float32, channels_last), expected), name
        assert torch.equal(product(x, baselines, accumulator), product(inputs, baselines, accumulator)), name
    for name, b in layouts(baselines):
        assert torch.equal(points(inputs, b, rows, alphas, torch.float32, channels_last), expected), name
    for name, total in layouts(accumulator):
        assert torch.equal(product(inputs, baselines, total), product(inputs, baselines, accumulator)), name
    one = torch.full((1, 1, 1, 1), 0.5, device=backend.device).expand_as(inputs)
    assert torch.equal(
        points(inputs, one, rows, alphas, torch.float32, channels_last),
        points(inputs, one.contiguous(), rows, alphas, torch.float32, channels_last),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@NATIVE
def test_layouts_of_sums(backend: Backend, dtype: torch.dtype) -> None:
    shape = (2, 3, 7, 9)
    _, _, rows, weights = (value.to(backend.device) for value in path(shape, 5))
    start = sample(*shape, seed=3).to(backend.device)
    gradients, factors = (sample(5, 3, 7, 9, dtype=dtype, seed=seed).to(backend.device) for seed in (4, 5))
    counts = torch.zeros(2, dtype=torch.int64, device=backend.device)
    accumulate, moments = backend.op("path_integral_accumulate_"), backend.op("path_integral_moments_")
    (expected,) = copies(start)
    accumulate(expected, gradients, factors, rows, weights)
    mean, squares, taken = copies(start, start.abs(), counts)
    moments(mean, squares, taken, gradients, rows)
    for total_name, total in layouts(start.clone()):
        for gradient_name, gradient in layouts(gradients):
            for factor_name, factor in (("contiguous", factors), *list(layouts(factors))[-1:]):
                name = f"{total_name} {gradient_name} {factor_name}"
                total.copy_(start)
                accumulate(total, gradient, factor, rows, weights)
                assert torch.equal(total, expected), name
            total.copy_(start)
            square = torch.empty_strided(total.shape, total.stride(), device=backend.device).copy_(start.abs())
            (seen,) = copies(counts)
            moments(total, square, seen, gradient, rows)
            assert torch.equal(total, mean), f"{total_name} {gradient_name}"
            assert torch.equal(square, squares), f"{total_name} {gradient_name}"
    other_format = start.abs().contiguous(memory_format=torch.channels_last)
    first, seen = copies(start, counts)
    moments(first, other_format, seen, gradients, rows)
    assert torch.equal(first, mean)
    assert torch.equal(other_format, squares)


@ALL
def test_empty_and_extremes(backend: Backend) -> None:
    inputs, baselines, rows, alphas = (value.to(backend.device) for value in path((2, 3, 4, 5), 3))
    points = backend.op("path_integral_points")
    assert points(inputs, baselines, rows[:0], alphas[:0], torch.float16, True).shape == (0, 3, 4, 5)
    flat = inputs[:, :, :0]
    assert points(flat, flat, rows, alphas, torch.float32, False).shape == (3, 3, 0, 5)
    assert backend.op("path_integral_product")(flat, flat, flat).shape == (2, 3, 0, 5)
    accumulate, moments = backend.op("path_integral_accumulate_"), backend.op("path_integral_moments_")
    (total,) = copies(inputs)
    accumulate(total, inputs[:0], None, rows[:0], alphas[:0])
    assert torch.equal(total, inputs)
    counts = torch.zeros(2, dtype=torch.int64, device=backend.device)
    moments(total, baselines, counts, inputs[:0], rows[:0])
    assert torch.equal(total, inputs)
    assert counts.tolist() == [0, 0]

    # what is not finite reaches its own element and image, and nothing else
    gradients = torch.zeros(3, 3, 4, 5, device=backend.device)
    gradients[0, 0, 0, 0] = torch.inf
    rows = torch.tensor([1, 0, 1], dtype=torch.int32, device=backend.device)
    accumulate(total, gradients, None, rows, torch.ones(3, dtype=torch.float64, device=backend.device))
    assert total[1, 0, 0, 0] == torch.inf
    assert int(total.isfinite().sum()) == total.numel() - 1
    assert torch.equal(total[0], inputs[0])
    ends = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, device=backend.device)
    out = points(gradients[:2], torch.zeros_like(gradients[:2]), rows, ends, torch.float32, False)
    assert torch.equal(out[1], gradients[0])
    assert torch.equal(out[0], torch.zeros_like(out[0]))


def test_indices_outside_are_refused_by_the_kernel() -> None:
    require_native("path_integral_points")
    inputs, baselines, rows, alphas = path((2, 3, 4, 5), 3)
    counts, before = torch.zeros(2, dtype=torch.int64), inputs.clone()
    for bad in (-1, 2, 2**31 - 1):
        rows[2] = bad
        for call in (
            lambda: torch.ops.pysal.path_integral_points(inputs, baselines, rows, alphas, torch.float32, False),
            lambda: torch.ops.pysal.path_integral_accumulate_(inputs, torch.ones(3, 3, 4, 5), None, rows, alphas),
            lambda: torch.ops.pysal.path_integral_moments_(inputs, baselines, counts, torch.ones(3, 3, 4, 5), rows),
        ):
            with pytest.raises((RuntimeError, IndexError)):
                call()
    assert torch.equal(inputs, before), "nothing is written before the rows are known to be good"
    assert counts.tolist() == [0, 0]


def test_determinism() -> None:
    shape = (2, 3, 65, 130)
    inputs, baselines, rows, alphas = path(shape, 70)
    gradients = sample(70, *shape[1:], seed=4).contiguous(memory_format=torch.channels_last)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            total, mean, squares = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
            ops.path_integral_accumulate_(total, gradients, gradients, rows, alphas)
            ops.path_integral_moments_(mean, squares, torch.zeros(2, dtype=torch.int64), gradients, rows)
            points = ops.path_integral_points(inputs, baselines, rows, alphas, channels_last=True)
            results.append((total, mean, squares, points, ops.path_integral_product(inputs, baselines, total)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@NATIVE
def test_rows_beyond_an_int32(backend: Backend) -> None:
    """The last of more images than 2^31 elements hold is found."""
    inputs = with_last_row(sample(3, 5, 7, dtype=torch.float16).to(backend.device), backend.device)
    row = torch.tensor([len(inputs) - 1], dtype=torch.int32, device=backend.device)
    one = torch.ones(1, dtype=torch.float64, device=backend.device)
    points = backend.op("path_integral_points")(inputs, inputs, row, one, torch.float16, False)
    assert torch.equal(points, inputs[-1:])


@NATIVE
def test_sums_are_taken_in_order(backend: Backend) -> None:
    # 1e8 + 1 - 1e8 is 0 in float32 from the left and 1 from any order that adds the big ones first
    accumulate = backend.op("path_integral_accumulate_")
    gradients = torch.tensor([1e8, 1.0, -1e8, 1.0], device=backend.device)[:, None]
    rows = torch.zeros(4, dtype=torch.int32, device=backend.device)
    total = torch.zeros(1, 1, device=backend.device)
    accumulate(total, gradients, None, rows, torch.ones(4, dtype=torch.float64, device=backend.device))
    assert total.item() == 1.0


X, ROWS, ALPHAS = torch.zeros(2, 3, 4, 5), torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2)
COUNTS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.path_integral_points(X[0], X[0], ROWS, ALPHAS),
            ValueError,
            "pysal::path_integral_points: inputs must have 4 dimensions, got shape (3, 4, 5)",
        ),
        (
            lambda: ops.path_integral_points(X, X.half(), ROWS, ALPHAS),
            TypeError,
            "pysal::path_integral_points: baselines must have dtype float32, got float16",
        ),
        (
            lambda: ops.path_integral_points(X, X[:1], ROWS, ALPHAS),
            ValueError,
            "pysal::path_integral_points: baselines must have the shape of inputs, (2, 3, 4, 5), got shape (1, 3, 4, 5)",
        ),
        (
            lambda: ops.path_integral_points(X, X, ROWS + 1, ALPHAS),
            ValueError,
            "pysal::path_integral_points: rows must be in [0, 2), got 2",
        ),
        (
            lambda: ops.path_integral_points(X, X, ROWS, ALPHAS[:1]),
            ValueError,
            "pysal::path_integral_points: alphas must have the shape of rows, (2,), got shape (1,)",
        ),
        (
            lambda: ops.path_integral_points(X, X, ROWS, ROWS),
            TypeError,
            "pysal::path_integral_points: alphas must have dtype float32 or float64 or float16 or bfloat16, got int32",
        ),
        (
            lambda: ops.path_integral_accumulate_(X.half(), X, None, ROWS, ALPHAS),
            TypeError,
            "pysal::path_integral_accumulate_: accumulator must have dtype float32 or float64, got float16",
        ),
        (
            lambda: ops.path_integral_accumulate_(torch.zeros(()), X, None, ROWS, ALPHAS),
            ValueError,
            "pysal::path_integral_accumulate_: accumulator must have at least 1 dimension, got shape ()",
        ),
        (
            lambda: ops.path_integral_accumulate_(X, X[:, :2], None, ROWS, ALPHAS),
            ValueError,
            "pysal::path_integral_accumulate_: gradients must have shape (N, 3, 4, 5), got shape (2, 2, 4, 5)",
        ),
        (
            lambda: ops.path_integral_accumulate_(X, X, X[:1], ROWS, ALPHAS),
            ValueError,
            "pysal::path_integral_accumulate_: factors must have the shape of gradients, (2, 3, 4, 5), got shape (1, 3, 4, 5)",
        ),
        (
            lambda: ops.path_integral_accumulate_(X, X, None, ROWS[:1], ALPHAS),
            ValueError,
            "pysal::path_integral_accumulate_: rows must have shape (2,), got shape (1,)",
        ),
        (
            lambda: ops.path_integral_accumulate_(X, X, None, ROWS - 1, ALPHAS),
            ValueError,
            "pysal::path_integral_accumulate_: rows must be in [0, 2), got -1",
        ),
        (
            lambda: ops.path_integral_moments_(X, X.double(), COUNTS, X, ROWS),
            TypeError,
            "pysal::path_integral_moments_: squares must have dtype float32, got float64",
        ),
        (
            lambda: ops.path_integral_moments_(X, X, COUNTS.int(), X, ROWS),
            TypeError,
            "pysal::path_integral_moments_: counts must have dtype int64, got int32",
        ),
        (
            lambda: ops.path_integral_moments_(X, X, COUNTS[:1], X, ROWS),
            ValueError,
            "pysal::path_integral_moments_: counts must have shape (2,), got shape (1,)",
        ),
        (
            lambda: ops.path_integral_product(X, X, X.half()),
            TypeError,
            "pysal::path_integral_product: accumulator must have dtype float32 or float64, got float16",
        ),
        (
            lambda: ops.path_integral_product(X, X, X[:1]),
            ValueError,
            "pysal::path_integral_product: accumulator must have the shape of inputs, (2, 3, 4, 5), got shape (1, 3, 4, 5)",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
