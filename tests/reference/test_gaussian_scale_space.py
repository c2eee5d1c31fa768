"""The oracle of gaussian_scale_space against scipy, closed forms and automatic differentiation, in float64."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.autograd.functional import jvp

from pysal.reference.gaussian_scale_space import gaussian_scale_space, gaussian_scale_space_derivative
from pysal.testing import sample

MODES = ("constant", "reflect")
SIGMAS = (0.0, 0.1, 0.3, 1.0, 3.7, 20.0)
SHAPES = ((1, 2, 17, 23), (1, 1, 1, 1), (1, 1, 4, 1), (1, 1, 1, 9), (1, 1, 40, 3))
EPS = torch.finfo(torch.float64).eps


def rounding(sigma, largest=1.0):
    """Bound on |computed - exact| of a separable blur of values up to `largest`, for either of two computations.

    A sum of m products of weights that sum to 1 at most is off by at most m eps; the weights themselves (an
    exponential, a sum of m of them, a quotient) by as much again. Two passes.
    """
    taps = 2 * int(4 * sigma + 0.5) + 1
    return 2 * 2 * (taps + 8) * EPS * largest


def scipy_blur(images, sigma, mode, **options):
    sigmas = (0, 0, sigma, sigma)
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), sigmas, mode=mode, **options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_matches_scipy(sigma, shape, mode):
    images = sample(*shape, dtype=torch.float64)
    level = gaussian_scale_space(images, [sigma], MODES.index(mode))
    assert (level - scipy_blur(images, sigma, mode)).abs().max() <= 2 * rounding(sigma)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("sigma", "step"), [(0.0, 1.0), (0.1, 0.5), (0.3, 0.01), (2.0, 0.5), (9.0, 3.0)])
def test_difference_quotient_matches_scipy(sigma, step, mode):
    images = sample(1, 2, 17, 23, dtype=torch.float64)
    level, quotient = gaussian_scale_space_derivative(images, [sigma], step, MODES.index(mode))
    expected = (scipy_blur(images, sigma + step, mode) - scipy_blur(images, sigma, mode)) / step
    assert (level - scipy_blur(images, sigma, mode)).abs().max() <= 2 * rounding(sigma)
    assert (quotient - expected).abs().max() <= 4 * rounding(sigma + step) / step


def blur_by_autodiff(images, sigma, radius, mode):
    """The blur as a function of a sigma that can be differentiated, the radius held fixed."""
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    taps = weights / weights.sum()
    channels = images.shape[1]
    padded = torch.nn.functional.pad(images, (radius,) * 4) if mode == "constant" else pad_symmetric(images, radius)
    rows = torch.nn.functional.conv2d(padded, taps.reshape(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return torch.nn.functional.conv2d(rows, taps.reshape(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def pad_symmetric(images, radius):
    widths = ((0, 0), (0, 0), (radius, radius), (radius, radius))
    return torch.from_numpy(np.pad(images.numpy(), widths, mode="symmetric"))


def differentiated(images, sigma, mode):
    """dL/dsigma and d^2L/dsigma^2."""
    radius = int(4 * sigma + 0.5)
    point, one = torch.tensor(sigma, dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def first(at):
        return jvp(lambda s: blur_by_autodiff(images, s, radius, mode), at, one, create_graph=True)[1]

    return jvp(first, point, one)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.7, 9.0])
def test_derivative_matches_automatic_differentiation(sigma, mode):
    images = sample(1, 2, 17, 23, dtype=torch.float64)
    _, derivative = gaussian_scale_space_derivative(images, [sigma], 0.0, MODES.index(mode))
    expected, _ = differentiated(images, sigma, mode)
    # the slopes' absolute values sum to 2 / sigma at most, as j^2 / sigma^2 averages 1
    assert (derivative - expected).abs().max() <= 4 * rounding(sigma) * 2 / sigma


@pytest.mark.parametrize("step", [1e-5, 1e-9, 1e-13])
def test_small_steps_do_not_cancel(step):
    images, sigma = sample(1, 1, 17, 23, dtype=torch.float64), 2.0
    _, quotient = gaussian_scale_space_derivative(images, [sigma], step, 0)
    first, second = differentiated(images, sigma, "constant")
    # the remainder of Taylor's formula is half of this; subtracting two blurs would err by eps / step
    assert (quotient - first).abs().max() <= step * second.abs().max() + 4 * rounding(sigma) * 2 / sigma


def test_zero_sigma_is_the_identity():
    images = sample(2, 3, 5, 4, dtype=torch.float64)
    level, derivative = gaussian_scale_space_derivative(images, [0.0, 0.1], 0.0, 0)
    assert torch.equal(level, images)
    assert torch.equal(gaussian_scale_space(images, [0.0, 0.1], 1), images)
    assert torch.equal(derivative, torch.zeros_like(images))


def test_impulse_response_is_the_kernel():
    sigma, radius = 1.5, 6
    image = torch.zeros(1, 1, 1, 31, dtype=torch.float64)
    image[..., 15] = 1.0
    weights = [math.exp(-(j**2) / (2 * sigma**2)) for j in range(-radius, radius + 1)]
    total = math.fsum(weights)
    expected = torch.zeros(31, dtype=torch.float64)
    expected[15 - radius : 16 + radius] = torch.tensor([weights[radius] * w / total**2 for w in weights], dtype=torch.float64)
    level = gaussian_scale_space(image, [sigma], 0)[0, 0, 0]
    assert (level - expected).abs().max() <= 2 * rounding(sigma)
    assert torch.equal(level[expected == 0], torch.zeros(31 - len(weights), dtype=torch.float64))


@pytest.mark.parametrize("sigma", [0.7, 3.0, 50.0])
def test_reflection_keeps_the_mean(sigma):
    images = sample(1, 1, 9, 7, dtype=torch.float64)
    level, derivative = gaussian_scale_space_derivative(images, [sigma], 0.01, 1)
    assert abs(level.sum() - images.sum()) <= 63 * rounding(sigma)
    assert abs(derivative.sum()) <= 63 * rounding(sigma) * 2 / sigma


@pytest.mark.parametrize("boundary", [0, 1])
@pytest.mark.parametrize("sigma", [0.7, 3.0, 50.0])
def test_self_adjoint(sigma, boundary):
    x, y = sample(1, 1, 9, 7, dtype=torch.float64), sample(1, 1, 9, 7, dtype=torch.float64, seed=1)
    for blur in (
        lambda images: gaussian_scale_space(images, [sigma], boundary),
        lambda images: gaussian_scale_space_derivative(images, [sigma], 0.01, boundary)[1],
    ):
        assert abs((blur(x) * y).sum() - (x * blur(y)).sum()) <= 2 * 63 * rounding(sigma) * max(1, 2 / sigma)


def test_works_in_float64_and_differentiates():
    images = sample(2, 1, 4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gaussian_scale_space_derivative(x, [0.4, 2.0], 0.01, 1), images)
    assert gaussian_scale_space(images, [0.4, 2.0], 0).dtype == torch.float64
    assert gaussian_scale_space(images.bfloat16(), [0.4, 2.0], 0).dtype == torch.bfloat16
