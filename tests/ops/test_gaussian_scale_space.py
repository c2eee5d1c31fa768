import functools

import numpy as np
import pytest
import torch

from pysal.ops import gaussian_scale_space, gaussian_scale_space_derivative
from pysal.reference import gaussian_scale_space as reference
from pysal.testing import DTYPES, assert_no_worse, assert_same_layout, backends, layouts, sample

BOUNDARIES = (0, 1)
STEPS = (0.0, 0.01)
# Images and their sigmas: odd sizes, narrower than a vector, one row or column, several tiles; radii past the side; 1.37,
# whose kernel is wider by a tap at sigma + h. Kernels of a quarter of the longer side and more take lines in halves.
# Enough pixels each that the largest error of plain torch, which the tolerance is made of, is not small by luck.
CASES = {
    "odd": ((5, 3, 17, 23), [0.0, 0.3, 2.0, 9.0, 60.0]),
    "narrow": ((3, 2, 21, 3), [0.8, 1.37, 6.0]),
    "one row": ((2, 16, 1, 50), [1.3, 11.0]),
    "one column": ((2, 16, 50, 1), [1.3, 11.0]),
    "wide": ((1, 1, 40, 149), [4.0]),
    "square": ((2, 1, 64, 64), [0.126, 15.9]),
    "spanned": ((3, 1, 75, 149), [11.0, 1.0, 50.0]),
    "too long to fold": ((1, 1, 64, 515), [33.0]),
}


def case(name, dtype=torch.float32):
    shape, sigmas = CASES[name]
    return sample(*shape, dtype=dtype, low=0.0), sigmas


@functools.cache
def truth(name, dtype, step, boundary):
    """A case's L and D in extended precision, where it may subtract blurs; D is None for step 0."""
    images, sigmas = case(name, dtype)
    images = images.double().numpy().astype(np.longdouble)
    levels = [blur(image, sigma, boundary) for image, sigma in zip(images, sigmas, strict=True)]
    after = [blur(image, sigma + step, boundary) for image, sigma in zip(images, sigmas, strict=True)]
    level = np.stack(levels)
    rounded = torch.from_numpy(level.astype(np.float64))
    return rounded, torch.from_numpy(((np.stack(after) - level) / step).astype(np.float64)) if step else None


def blur(image, sigma, boundary):
    radius = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1, dtype=np.longdouble) / max(sigma, 1e-9)) ** 2)
    weights /= weights.sum()
    for axis in (1, 2):
        side = image.shape[axis]
        places = np.pad(np.arange(side), radius, mode="symmetric") if boundary else np.arange(-radius, side + radius)
        taps = np.zeros((side, side), np.longdouble)  # of each pixel, at each pixel: several where it lies before an edge, too
        for pixel in range(side):
            of_pixel = places[pixel : pixel + 2 * radius + 1]
            there = (of_pixel >= 0) & (of_pixel < side)
            np.add.at(taps[pixel], of_pixel[there], weights[there])
        image = np.moveaxis(np.moveaxis(image, axis, -1) @ taps.T, -1, axis)
    return image


@pytest.mark.parametrize("backend", backends(native_only=True), ids=str)  # which varies first: truth is kept for the next
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_matches_reference(boundary, name, dtype, backend):
    images, sigmas = case(name, dtype)
    exact, exact_quotient = truth(name, dtype, 0.01, boundary)
    on_device = images.to(backend.device)
    level = backend.op("gaussian_scale_space")(on_device, sigmas, boundary)
    assert_no_worse(level, exact, reference.gaussian_scale_space(images, sigmas, boundary))

    levels, quotients = backend.op("gaussian_scale_space_derivative")(on_device, sigmas, 0.01, boundary)
    plain = reference.gaussian_scale_space_derivative(images, sigmas, 0.01, boundary)
    assert_no_worse(levels, exact, plain[0])
    for n in range(len(sigmas)):  # one by one: D falls with sigma, and a small one must be right too
        assert_no_worse(quotients[n], exact_quotient[n], plain[1][n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
def test_exact_derivative_matches_reference(backend, boundary, name, dtype):
    images, sigmas = case(name, dtype)
    exact = reference.gaussian_scale_space_derivative(images.double(), sigmas, 0.0, boundary)
    plain = reference.gaussian_scale_space_derivative(images, sigmas, 0.0, boundary)
    kernel = backend.op("gaussian_scale_space_derivative")(images.to(backend.device), sigmas, 0.0, boundary)
    for n in range(len(sigmas)):
        for k in range(2):
            assert_no_worse(kernel[k][n], exact[k][n], plain[k][n])


@pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
def test_single_pixel(backend):
    """A 1 x 1 image keeps the middle tap squared under "constant" and everything under "reflect"."""
    pixel, sigma = torch.full((1, 1, 1, 1), 0.75, dtype=torch.float64, device=backend.device), 3.0
    weights = torch.exp(-0.5 * (torch.arange(-12, 13, dtype=torch.float64) / sigma) ** 2)
    rounding = 4 * (len(weights) + 8) * torch.finfo(torch.float64).eps
    op = backend.op("gaussian_scale_space_derivative")
    level, _ = op(pixel, [sigma], 0.01, 0)
    assert abs(level.item() - 0.75 / weights.sum().item() ** 2) <= rounding
    level, slope = op(pixel, [sigma], 0.01, 1)
    assert abs(level.item() - 0.75) <= rounding
    assert abs(slope.item()) <= rounding * 2 / sigma  # |slopes| sum to 2 / sigma at most


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("backend", [each for each in backends() if each.name != "emulated"], ids=str)
def test_backward_is_the_same_blur(backend, boundary):
    images, sigmas = case("odd")
    leaf = images.to(backend.device).clone().requires_grad_()
    weights = sample(*images.shape, seed=1).to(backend.device), sample(*images.shape, seed=2).to(backend.device)
    levels, slopes = torch.ops.pysal.gaussian_scale_space_derivative(leaf, sigmas, 0.01, boundary)
    ((levels * weights[0]).sum() + (slopes * weights[1]).sum()).backward()
    exact = reference.gaussian_scale_space_derivative(weights[0].double(), sigmas, 0.01, boundary)[0]
    exact = exact + reference.gaussian_scale_space_derivative(weights[1].double(), sigmas, 0.01, boundary)[1]
    plain = images.clone().requires_grad_()
    levels, slopes = reference.gaussian_scale_space_derivative(plain, sigmas, 0.01, boundary)
    ((levels * weights[0]).sum() + (slopes * weights[1]).sum()).backward()
    assert_no_worse(leaf.grad, exact, plain.grad)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gradcheck(boundary, step):
    images, sigmas = sample(2, 1, 4, 3, dtype=torch.float64).requires_grad_(), [0.4, 2.0]
    ops = torch.ops.pysal

    def derivative(x):
        return ops.gaussian_scale_space_derivative(x, sigmas, step, boundary)

    assert torch.autograd.gradcheck(lambda x: ops.gaussian_scale_space(x, sigmas, boundary), images)
    assert torch.autograd.gradcheck(derivative, images)
    assert torch.autograd.gradcheck(lambda x: derivative(x)[1], images)
    assert torch.autograd.gradgradcheck(derivative, images)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (0, 3, 5, 4)], ids=str)
def test_opcheck(shape, boundary, requires_grad):
    images, sigmas = sample(*shape).requires_grad_(requires_grad), [0.5, 3.0][: shape[0]]
    torch.library.opcheck(torch.ops.pysal.gaussian_scale_space.default, (images, sigmas, boundary))
    for step in STEPS:
        arguments = (images, sigmas, step, boundary)
        torch.library.opcheck(torch.ops.pysal.gaussian_scale_space_derivative.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", backends(), ids=str)
def test_layouts(backend, dtype):
    images, sigmas = case("odd", dtype)
    images = images.to(backend.device)
    level, derivative = backend.op("gaussian_scale_space"), backend.op("gaussian_scale_space_derivative")
    expected = (level(images, sigmas, 0), *derivative(images, sigmas, 0.01, 0))
    for name, view in layouts(images):
        for actual, wanted in zip((level(view, sigmas, 0), *derivative(view, sigmas, 0.01, 0)), expected, strict=True):
            assert torch.equal(actual, wanted), name
            if backend.name != "reference":
                assert_same_layout(actual, wanted)


@pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
def test_rows_do_not_depend_on_the_batch(backend):
    """An expanded image, its copies and each row alone give the same bits."""
    (images, _), sigmas = case("odd"), [0.3, 2.0, 9.0]
    image = images[:1].to(backend.device)
    op = backend.op("gaussian_scale_space_derivative")
    expanded = op(image.expand(3, -1, -1, -1), sigmas, 0.01, 1)
    copied = op(image.repeat(3, 1, 1, 1), sigmas, 0.01, 1)
    for n, sigma in enumerate(sigmas):
        alone = op(image, [sigma], 0.01, 1)
        for k in range(2):
            assert torch.equal(expanded[k][n : n + 1], alone[k])
            assert torch.equal(copied[k][n : n + 1], alone[k])


@pytest.mark.parametrize("backend", backends(), ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty(shape, backend):
    images, sigmas = torch.zeros(shape, device=backend.device), [1.0, 2.0][: shape[0]]
    level = backend.op("gaussian_scale_space")(images, sigmas, 0)
    levels, derivatives = backend.op("gaussian_scale_space_derivative")(images, sigmas, 0.01, 1)
    assert level.shape == levels.shape == derivatives.shape == shape


@pytest.mark.parametrize("backend", backends(), ids=str)
def test_extremes(backend):
    """Sigma 0 is the identity, a huge one takes everything out of the image or to its mean; NaN stays in its plane."""
    images = sample(2, 2, 6, 7, low=0.0).to(backend.device)
    op = backend.op("gaussian_scale_space")
    assert torch.equal(op(images, [0.0, 0.12], 0), images)
    assert op(images, [1e5, 1e5], 0).max() <= images.max() * (7 / 1e5) * (6 / 1e5)
    mean = images.double().mean((2, 3), keepdim=True).expand(2, 2, 6, 7)
    flat = op(images, [1e5, 1e5], 1)
    assert_no_worse(flat, mean.cpu(), images.mean((2, 3), keepdim=True).expand(2, 2, 6, 7))
    images[0, 0, 3, 3] = float("nan")
    level = op(images, [1.0, 1.0], 0)
    assert level[0, 0].isnan().all()
    assert level[0, 1].isfinite().all()
    assert level[1].isfinite().all()


@pytest.mark.parametrize("backend", backends(), ids=str)
def test_determinism(backend):
    images, sigmas = case("odd")
    images = images.to(backend.device)
    op, threads = backend.op("gaussian_scale_space_derivative"), torch.get_num_threads()
    first = op(images, sigmas, 0.01, 0)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            again = op(images, sigmas, 0.01, 0)
            if backend.name != "reference":
                assert torch.equal(first[0], again[0])
                assert torch.equal(first[1], again[1])
    finally:
        torch.set_num_threads(threads)


IMAGES = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((IMAGES[0], [1.0] * 3), ValueError, "images must have 4 dimensions, got shape (3, 4, 5)"),
        ((IMAGES.numpy(), [1.0]), TypeError, "images must be a torch.Tensor, got ndarray"),
        (
            (IMAGES.int(), [1.0]),
            TypeError,
            "images must have dtype float32 or float64 or float16 or bfloat16, got int32",
        ),
        ((IMAGES, [1.0]), ValueError, "sigmas must have 2 elements, one per image, got 1"),
        ((IMAGES, [1.0, -0.5]), ValueError, "sigmas must be between 0 and 1e6, got -0.5"),
        ((IMAGES, [float("nan"), 1.0]), ValueError, "sigmas must be between 0 and 1e6, got nan"),
        ((IMAGES, [float("inf"), 1.0]), ValueError, "sigmas must be between 0 and 1e6, got inf"),
    ],
)
def test_errors(arguments, error, message):
    for op in (gaussian_scale_space, gaussian_scale_space_derivative):
        with pytest.raises(error) as caught:
            op(*arguments)
        assert str(caught.value) == f"pysal::{op.__name__}: {message}"
        with pytest.raises(ValueError) as caught:
            op(IMAGES, [1.0, 1.0], boundary="mirror")
        assert str(caught.value) == f"pysal::{op.__name__}: boundary must be one of constant, reflect, got 'mirror'"


@pytest.mark.parametrize("step", [-0.01, float("nan"), float("inf")])
def test_step_errors(step):
    with pytest.raises(ValueError) as caught:
        gaussian_scale_space_derivative(IMAGES, [1.0, 1.0], step)
    assert str(caught.value) == f"pysal::gaussian_scale_space_derivative: step must be between 0 and 1e6, got {step}"


@pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
def test_kernel_refuses_what_memory_safety_needs(backend):
    images = IMAGES.to(backend.device)
    for op, extra in (("gaussian_scale_space", ()), ("gaussian_scale_space_derivative", (0.01,))):
        kernel = backend.op(op)
        for sigmas, boundary in (([1.0], 0), ([1.0, -1.0], 0), ([1.0, 1e300], 0), ([1.0, 1.0], 2)):
            with pytest.raises(RuntimeError, match=f"pysal::{op}: "):
                kernel(images, sigmas, *extra, boundary)
        with pytest.raises(RuntimeError, match=f"pysal::{op}: "):
            kernel(images[0], [1.0] * 3, *extra, 0)
