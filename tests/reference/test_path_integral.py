"""The oracle of path_integral against loops, NumPy and the fundamental theorem."""

import numpy as np
import pytest
import torch

from pysal.reference import path_integral as reference


def test_points_lie_on_the_path() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, baselines = torch.rand(2, 3, 2, 4, 5, generator=generator, dtype=torch.float64)
    rows = torch.tensor([2, 2, 0, 1], dtype=torch.int32)
    alphas = torch.tensor([0.0, 1.0, 0.25, 0.7], dtype=torch.float64)
    out = reference.path_integral_points(inputs, baselines, rows, alphas, torch.float64, False)

    for n, (row, alpha) in enumerate(zip(rows.tolist(), alphas.tolist(), strict=True)):
        x, b = inputs[row].numpy(), baselines[row].numpy()
        np.testing.assert_array_equal(out[n].numpy(), b + alpha * (x - b))
    assert torch.equal(out[0], baselines[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_points_come_as_the_model_wants_them(dtype: torch.dtype) -> None:
    inputs, baselines = torch.rand(2, 1, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    rows, alphas = torch.zeros(2, dtype=torch.int32), torch.tensor([0.5, 1.0], dtype=torch.float64)
    out = reference.path_integral_points(inputs, baselines, rows, alphas, dtype, True)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out[0], ((baselines + 0.5 * (inputs - baselines))[0]).to(dtype))


@pytest.mark.parametrize("with_factors", [False, True])
def test_accumulate_adds_each_row_to_its_image(with_factors: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    accumulator = torch.rand(3, 2, 4, generator=generator, dtype=torch.float64)
    gradients, factors = torch.randn(2, 5, 2, 4, generator=generator, dtype=torch.float64)
    rows = torch.tensor([0, 2, 2, 0, 2], dtype=torch.int32)
    weights = torch.rand(5, generator=generator, dtype=torch.float64)

    expected = accumulator.numpy().copy()
    for n, row in enumerate(rows.tolist()):
        term = weights[n].item() * gradients[n].numpy()
        expected[row] += term * factors[n].numpy() if with_factors else term
    reference.path_integral_accumulate_(accumulator, gradients, factors if with_factors else None, rows, weights)
    np.testing.assert_array_equal(accumulator.numpy(), expected)


def test_accumulated_gradients_of_a_cubic_integrate_to_its_difference() -> None:
    # d/da f(b + a (x - b)) is quadratic in a for f = sum z^3, so two Gauss-Legendre nodes integrate it exactly
    generator = torch.Generator().manual_seed(3)
    inputs, baselines = torch.rand(2, 2, 1, 3, 3, generator=generator, dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(2)
    alphas = torch.from_numpy(np.tile((nodes + 1) / 2, 2))
    rows = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    points = reference.path_integral_points(inputs, baselines, rows, alphas, torch.float64, False)
    accumulator = torch.zeros_like(inputs)
    steps = torch.from_numpy(np.tile(weights / 2, 2))
    reference.path_integral_accumulate_(accumulator, 3 * points**2, None, rows, steps)
    attribution = reference.path_integral_product(inputs, baselines, accumulator)
    torch.testing.assert_close(attribution, inputs**3 - baselines**3, rtol=0, atol=8 * torch.finfo(torch.float64).eps)


def test_moments_are_numpy_mean_and_variance_in_any_split() -> None:
    generator = torch.Generator().manual_seed(4)
    samples = 100 + torch.randn(11, 2, 3, generator=generator, dtype=torch.float64)
    rows = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0], dtype=torch.int32)
    mean, squares = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
    counts = torch.zeros(3, dtype=torch.int64)
    for chunk in (slice(0, 4), slice(4, 5), slice(5, 5), slice(5, 11)):
        reference.path_integral_moments_(mean, squares, counts, samples[chunk], rows[chunk])

    assert counts.tolist() == [5, 6, 0]
    for row in (0, 1):
        mine = samples[rows == row].numpy()
        np.testing.assert_allclose(mean[row].numpy(), mine.mean(0), rtol=1e-14)
        np.testing.assert_allclose(squares[row].numpy(), mine.var(0) * len(mine), rtol=1e-12)
    assert torch.all(mean[2] == 0)
    assert torch.all(squares[2] == 0)


def test_moments_of_a_constant_have_no_deviation() -> None:
    mean, squares, counts = torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    samples, rows = torch.full((7, 4), 0.1), torch.zeros(7, dtype=torch.int32)
    reference.path_integral_moments_(mean, squares, counts, samples, rows)
    assert torch.all(squares == 0)
    assert torch.all(mean == samples[0])


def test_product_is_in_the_accumulators_dtype() -> None:
    generator = torch.Generator().manual_seed(5)
    inputs, baselines = torch.rand(2, 2, 3, 4, 4, generator=generator)
    accumulator = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    out = reference.path_integral_product(inputs, baselines, accumulator)
    assert torch.equal(out, (inputs.double() - baselines.double()) * accumulator)
