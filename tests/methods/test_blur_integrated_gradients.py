"""Blur IG: the formula of PAIR's implementation computed with SciPy in float64, closed forms, completeness, and PAIR itself."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from saliency.core import INPUT_OUTPUT_GRADIENTS, BlurIG
from scipy import ndimage
from torch import Tensor

import pysal
from tests.methods.networks import (
    Counting,
    assert_rounding,
    gradients,
    images,
    linear,
    rectified,
    relative_error,
    smooth,
    weights,
)

SHAPES = [(1, 3, 9, 7), (2, 1, 8, 12), (3, 4, 6, 6)]
MODES = {"constant": "constant", "reflect": "reflect"}
# What the method promises against its formula, in multiples of the largest value
FLOAT64, FLOAT32 = 1e-10, 1e-6
STEP = 0.01


def explained(model: Any, inputs: Tensor, target: Any = 1, **options: Any) -> Any:
    name = "blur_integrated_gradients"
    return pysal.explain(model, inputs, target, methods=[name], method_options={name: options}, batch_size=512)[name]


def blurred(inputs: Tensor, sigma: float, boundary: str = "constant") -> Tensor:
    """SciPy's Gaussian of an image batch along height and width."""
    if sigma == 0:
        return inputs
    filtered = ndimage.gaussian_filter(inputs.numpy(), (0, 0, sigma, sigma), mode=MODES[boundary], truncate=4.0)
    return torch.from_numpy(filtered)


# The sum of the paper and of PAIR, which is not the default.
LEFT: dict[str, Any] = {"quadrature": "left", "placement": "uniform"}


def difference_quotient(inputs: Tensor, sigma: float, boundary: str = "constant") -> Tensor:
    return (blurred(inputs, sigma + STEP, boundary) - blurred(inputs, sigma, boundary)) / STEP


def left_sigmas(max_sigma: float, steps: int, sqrt: bool) -> list[float]:
    sigmas = [i * max_sigma / steps for i in range(steps + 1)]
    return [math.sqrt(sigma) for sigma in sigmas] if sqrt else sigmas


def formula(
    model: Any,
    inputs: Tensor,
    target: int,
    sigmas: list[float],
    boundary: str = "constant",
    derivative: Callable[[Tensor, float, str], Tensor] = difference_quotient,
) -> Tensor:
    """- sum_i (sigma_{i+1} - sigma_i) D_i grad f(L(sigma_i))."""
    total = torch.zeros_like(inputs)
    for sigma, after in itertools.pairwise(sigmas):
        slope = gradients(model, blurred(inputs, sigma, boundary), target)
        total -= (after - sigma) * derivative(inputs, sigma, boundary) * slope
    return total


def assert_within(found: Tensor, expected: Tensor, share: float) -> None:
    """Assert that no value is off by more than a share of the largest one."""
    assert found.shape == expected.shape
    largest = float(expected.abs().max())
    assert largest > 0
    assert float((found.double() - expected).abs().max()) <= share * largest


@pytest.mark.parametrize("batch_size", [1, 7, 40])
@pytest.mark.parametrize("sqrt", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_formula(shape: tuple[int, ...], sqrt: bool, batch_size: int) -> None:
    inputs, model = images(*shape), smooth(shape[1])
    expected = formula(model, inputs, 2, left_sigmas(5.0, 40, sqrt))
    options: dict[str, Any] = {"max_sigma": 5.0, "steps": 40, "sqrt": sqrt, "batch_size": batch_size, **LEFT}
    found = pysal.blur_integrated_gradients(model, inputs, 2, **options)
    assert_within(found, expected, FLOAT64)

    narrow = pysal.blur_integrated_gradients(smooth(shape[1]).float(), inputs.float(), 2, **options)
    assert narrow.dtype == torch.float32
    assert_within(narrow, expected, FLOAT32)


@pytest.mark.parametrize("sqrt", [False, True])
@pytest.mark.parametrize("boundary", ["constant", "reflect"])
@pytest.mark.parametrize("max_sigma", [0.4, 2.0, 50.0])
def test_is_the_formula_for_any_width_and_boundary(max_sigma: float, boundary: str, sqrt: bool) -> None:
    # up to blurs many times wider than the image
    inputs, model = images(2, 3, 9, 7), smooth()
    expected = formula(model, inputs, 1, left_sigmas(max_sigma, 10, sqrt), boundary)
    options: dict[str, Any] = {"max_sigma": max_sigma, "steps": 10, "sqrt": sqrt, "boundary": boundary, **LEFT}
    assert_within(pysal.blur_integrated_gradients(model, inputs, 1, **options), expected, FLOAT64)
    narrow = pysal.blur_integrated_gradients(smooth().float(), inputs.float(), 1, **options)
    assert_within(narrow, expected, FLOAT32)


def test_defaults() -> None:
    inputs, model = images(1, 3, 9, 7), smooth()
    t = (np.arange(100) + 0.5) / 100
    expected = torch.zeros_like(inputs)
    for sigma, width in zip((50 * t**2).tolist(), (50 * 2 * t / 100).tolist(), strict=True):
        expected -= width * difference_quotient(inputs, sigma) * gradients(model, blurred(inputs, sigma), 1)
    assert_within(pysal.blur_integrated_gradients(model, inputs, 1), expected, FLOAT64)


@pytest.mark.parametrize("boundary", ["constant", "reflect"])
def test_of_a_linear_model_telescopes(boundary: str) -> None:
    # where the steps are as long as the difference quotient's, (sigma_{i+1} - sigma_i) D_i = L(sigma_{i+1}) - L(sigma_i):
    # the sum is x - L(S) times the weights, whatever lies between
    inputs, model = images(2, 3, 9, 7), linear(3, 9, 7)
    found = explained(model, inputs, 2, max_sigma=1.5, steps=150, boundary=boundary, **LEFT)
    w = weights(model, inputs)[2]
    assert_within(found.map, w * (inputs - blurred(inputs, 1.5, boundary)), FLOAT64)
    # each of 189 numbers off by no more than that share of the largest
    assert float(found.details["residual"].abs().max()) <= 189 * FLOAT64 * float(found.map.abs().max())


@pytest.mark.parametrize("sqrt", [False, True])
def test_of_a_linear_model_is_weights_times_the_sum_of_differences(sqrt: bool) -> None:
    inputs, model = images(2, 3, 9, 7), linear(3, 9, 7)
    sigmas = left_sigmas(6.0, 12, sqrt)
    total = sum((after - sigma) * difference_quotient(inputs, sigma) for sigma, after in itertools.pairwise(sigmas))
    found = pysal.blur_integrated_gradients(model, inputs, 2, max_sigma=6.0, steps=12, sqrt=sqrt, **LEFT)
    assert_within(found, -weights(model, inputs)[2] * total, FLOAT64)


def exact_derivative(inputs: Tensor, sigma: float, boundary: str) -> Tensor:
    """dL/dsigma of the normalised, truncated kernel: k' = k (j^2 - mean of j^2) / sigma^3, and the product rule."""
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return torch.zeros_like(inputs)
    j = np.arange(-radius, radius + 1)
    kernel = np.exp(-(j**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    slope = kernel * (j**2 - (kernel * j**2).sum()) / sigma**3

    def along(values: np.ndarray, taps: np.ndarray, axis: int) -> np.ndarray:
        return ndimage.correlate1d(values, taps, axis=axis, mode=MODES[boundary])

    x = inputs.numpy()
    return torch.from_numpy(along(along(x, slope, 2), kernel, 3) + along(along(x, kernel, 2), slope, 3))


@pytest.mark.parametrize("boundary", ["constant", "reflect"])
def test_analytic_derivative(boundary: str) -> None:
    inputs, model = images(2, 3, 9, 7), smooth()
    expected = formula(model, inputs, 1, left_sigmas(5.0, 20, sqrt=False), boundary, exact_derivative)
    options: dict[str, Any] = {"max_sigma": 5.0, "steps": 20, "boundary": boundary, "derivative": "analytic", **LEFT}
    assert_within(pysal.blur_integrated_gradients(model, inputs, 1, **options), expected, FLOAT64)
    narrow = pysal.blur_integrated_gradients(smooth().float(), inputs.float(), 1, **options)
    assert_within(narrow, expected, FLOAT32)


@pytest.mark.parametrize("quadrature", ["right", "midpoint", "trapezoid", "gauss_legendre"])
def test_other_quadratures(quadrature: str) -> None:
    inputs, model = images(2, 3, 9, 7), smooth()
    nodes, heights = {
        "right": (np.arange(1, 9) / 8, np.full(8, 1 / 8)),
        "midpoint": ((np.arange(8) + 0.5) / 8, np.full(8, 1 / 8)),
        "trapezoid": (np.arange(8) / 7, np.array([0.5, *[1] * 6, 0.5]) / 7),
        "gauss_legendre": tuple(values / 2 for values in (np.polynomial.legendre.leggauss(8) + np.array([[1], [0]]))),
    }[quadrature]
    expected = torch.zeros_like(inputs)
    for node, height in zip(nodes.tolist(), heights.tolist(), strict=True):
        slope = gradients(model, blurred(inputs, 5 * node), 1)
        expected -= 5 * height * difference_quotient(inputs, 5 * node) * slope
    options: dict[str, Any] = {"max_sigma": 5.0, "steps": 8, "quadrature": quadrature, "placement": "uniform"}
    found = pysal.blur_integrated_gradients(model, inputs, 1, **options)
    assert_within(found, expected, FLOAT64)


@pytest.mark.parametrize(("placement", "steps"), [("squared", 1), ("squared", 9), ("adaptive", 8), ("adaptive", 30)])
@pytest.mark.parametrize("quadrature", ["left", "right"])
@pytest.mark.parametrize("sqrt", [False, True])
def test_cells_of_any_placement_cover_the_path(sqrt: bool, quadrature: str, placement: str, steps: int) -> None:
    # a model whose gradient does not change, and a path on which the derivative does not either: only the widths count
    inputs, model = images(2, 3, 9, 7), linear(3, 9, 7)
    options: dict[str, Any] = {"steps": steps, "quadrature": quadrature, "placement": placement, "sqrt": sqrt}

    def flat(planes: Tensor, sigmas: list[float], **_: Any) -> tuple[Tensor, Tensor]:
        return planes.clone(), torch.ones_like(planes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pysal.ops, "gaussian_scale_space_derivative", flat)
        found = pysal.blur_integrated_gradients(model, inputs, 1, max_sigma=4.0, **options)
    blurriest = 2.0 if sqrt else 4.0
    assert_rounding(found, -blurriest * weights(model, inputs)[1].expand_as(found), 4 * steps + 20)


@pytest.mark.parametrize("sqrt", [False, True])
def test_residual_falls_with_steps(sqrt: bool) -> None:
    inputs, model = images(2, 3, 9, 7), smooth()
    blurriest = math.sqrt(4.0) if sqrt else 4.0
    # Where 4 sigma passes a half the kernel grows by a tap on each side, and f jumps, by some exp(-8): no derivative sees that.
    with torch.no_grad():
        change = (model(inputs) - model(blurred(inputs, blurriest)))[:, 1]
        jumps = sum(
            model(blurred(inputs, sigma * (1 + 1e-12))) - model(blurred(inputs, sigma * (1 - 1e-12)))
            for sigma in np.arange(0.125, blurriest, 0.25).tolist()
        )[:, 1]

    def error(quadrature: str, steps: int) -> float:
        options: dict[str, Any] = {"quadrature": quadrature, "placement": "uniform", "derivative": "analytic", "sqrt": sqrt}
        found = explained(model, inputs, max_sigma=4.0, steps=steps, **options)
        assert_rounding(found.details["residual"], found.map.flatten(1).sum(1) - change, 10_000, scale=1.0)
        return float(((found.details["residual"] - jumps) / change).abs().max())

    for quadrature in ("left", "right"):
        errors = {steps: error(quadrature, steps) for steps in (50, 200, 800)}
        # like the sum of squared widths, 1 / N for equal steps and ln N / N for roots, and a fifth for the next term
        for steps in (200, 800):
            widths = (50 / steps) * (math.log(steps) / math.log(50) if sqrt else 1)
            assert errors[steps] <= 1.2 * widths * errors[50], (quadrature, errors)
        for better in ("midpoint", "trapezoid", "gauss_legendre"):
            assert error(better, 50) < errors[200], (better, quadrature)


@functools.cache
def fine_map(model: torch.nn.Module, sqrt: bool) -> Tensor:
    return explained(model, images(2, 3, 9, 7), max_sigma=4.0, sqrt=sqrt, steps=1500, quadrature="midpoint").map


@pytest.mark.parametrize("sqrt", [False, True])
@pytest.mark.parametrize("model", [smooth(), rectified()], ids=["smooth", "rectified"])
@pytest.mark.parametrize("tolerance", [5e-2, 1e-2])
def test_tolerance_is_reached(tolerance: float, model: torch.nn.Module, sqrt: bool) -> None:
    inputs = images(2, 3, 9, 7)
    truth = fine_map(model, sqrt)
    found = explained(model, inputs, max_sigma=4.0, sqrt=sqrt, tolerance=tolerance, max_steps=20_000)
    assert (found.details["error"] <= tolerance).all()
    # see test_integrated_gradients: the estimate is a bound for one jump of the gradient, and typical for many
    assert (relative_error(found.map, truth) <= 2 * tolerance).all()


def test_counts_its_steps() -> None:
    inputs, model = images(2, 3, 9, 7), Counting(rectified())
    found = explained(model, inputs, max_sigma=4.0, steps=30)
    assert sum(model.differentiated) == 60
    assert found.details["steps"].tolist() == [30, 30]
    model.differentiated.clear()
    found = explained(model, inputs, max_sigma=4.0, tolerance=1e-2, max_steps=300)
    assert sum(model.differentiated) == int(found.details["steps"].sum())
    assert max(found.details["steps"]) <= 300


# PAIR ----------------------------------------------------------------------------------------------------------------


def pairs(model: torch.nn.Module, inputs: Tensor, target: int, **options: Any) -> Tensor:
    """PAIR's maps of a batch, image by image, (B, C, H, W)."""

    def call(batch: np.ndarray, call_model_args: Any = None, expected_keys: Any = None) -> dict[str, np.ndarray]:
        points = torch.from_numpy(np.asarray(batch)).permute(0, 3, 1, 2)
        return {INPUT_OUTPUT_GRADIENTS: gradients(model, points, target).permute(0, 2, 3, 1).numpy()}

    masks = [BlurIG().GetMask(image.permute(1, 2, 0).numpy(), call, **options) for image in inputs]
    return torch.from_numpy(np.stack(masks)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("sqrt", "batch_size"), [(False, 1), (False, 7), (False, 40), (True, 1)])
@pytest.mark.parametrize("model", [smooth(), rectified()], ids=["smooth", "rectified"])
def test_equals_pair_where_pair_is_right(model: torch.nn.Module, sqrt: bool, batch_size: int) -> None:
    inputs = images(2, 3, 9, 7)
    options: dict[str, Any] = {"max_sigma": 5.0, "steps": 20, "sqrt": sqrt, "batch_size": batch_size}
    assert_within(
        pysal.blur_integrated_gradients(model, inputs, 1, **options, **LEFT), pairs(model, inputs, 1, **options), FLOAT64
    )


@pytest.mark.parametrize("batch_size", [7, 20])
def test_pair_weighs_a_batch_of_root_steps_by_its_last_width_and_this_does_not(batch_size: int) -> None:
    inputs, model = images(2, 3, 9, 7), smooth()
    options: dict[str, Any] = {"max_sigma": 5.0, "steps": 20, "sqrt": True}
    expected = formula(model, inputs, 1, left_sigmas(5.0, 20, sqrt=True))
    assert_within(pairs(model, inputs, 1, **options, batch_size=1), expected, FLOAT64)

    theirs = pairs(model, inputs, 1, **options, batch_size=batch_size)
    assert float(relative_error(theirs, expected).min()) > 0.1
    # their result is the sum with the last width of each batch in place of every step's own
    sigmas = left_sigmas(5.0, 20, sqrt=True)
    explained_away = torch.zeros_like(inputs)
    for i, sigma in enumerate(sigmas[:-1]):
        last = min(20, (i // batch_size + 1) * batch_size)
        slope = gradients(model, blurred(inputs, sigma), 1)
        explained_away -= (sigmas[last] - sigmas[last - 1]) * difference_quotient(inputs, sigma) * slope
    assert_within(theirs, explained_away, FLOAT64)

    ours = pysal.blur_integrated_gradients(model, inputs, 1, **options, **LEFT, batch_size=batch_size)
    assert_within(ours, expected, FLOAT64)
