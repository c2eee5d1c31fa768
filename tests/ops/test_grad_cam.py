"""grad_cam: no worse than plain torch in every dtype and layout, with the derivative of its formula."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import pysal.ops as ops
from pysal.reference.grad_cam import grad_cam as reference
from pysal.testing import DTYPES, Backend, assert_no_worse, assert_same_layout, backends, layouts, require_native, sample

NATIVE = pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
ALL = pytest.mark.parametrize("backend", backends(), ids=str)
# (B, K, h, w) and (height, width): up, down, both ways, one pixel, the layer's own, more than a block of either
CASES = [
    ((2, 5, 7, 9), (22, 31)),
    ((1, 1, 1, 1), (1, 1)),
    ((3, 4, 1, 1), (5, 6)),
    ((2, 3, 9, 6), (4, 11)),
    ((2, 70, 7, 7), (7, 7)),
    ((1, 130, 12, 13), (3, 5)),
]


def layer(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return activations and gradients; the gradients' means are far from 0, where nothing cancels."""
    return sample(*shape, dtype=dtype, seed=1), sample(*shape, dtype=dtype, seed=2, low=-0.5, high=1.0)


def exact(activations: Tensor, gradients: Tensor, height: int, width: int, relu: bool) -> Tensor:
    """Return the formula in extended precision: in float64 the oracle's own rounding is as large as a kernel's."""
    a, g = (value.double().numpy().astype(np.longdouble) for value in (activations, gradients))
    cam = (g.mean(axis=(2, 3), keepdims=True) * a).sum(axis=1)
    if relu:
        cam = np.maximum(cam, 0)
    rows, columns = (shares(size, to) for size, to in zip(cam.shape[1:], (height, width), strict=True))
    return torch.from_numpy((rows @ cam @ columns.T)[:, None].astype(np.float64))


def shares(size: int, to: int) -> np.ndarray:
    """Return the share of each sample in each of `to` samples between them, (to, size)."""
    matrix = np.zeros((to, size), dtype=np.longdouble)
    for i in range(to):
        at = max(Fraction(2 * i + 1, 2) * Fraction(size, to) - Fraction(1, 2), Fraction(0))
        share = np.longdouble((at - int(at)).numerator) / np.longdouble((at - int(at)).denominator)
        matrix[i, int(at)] += 1 - share
        matrix[i, min(int(at) + 1, size - 1)] += share
    return matrix


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("relu", [False, True], ids=["signed", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NATIVE
def test_matches_reference(backend: Backend, dtype: torch.dtype, relu: bool, channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for shape, size in CASES:
        activations, gradients = layer(shape, dtype)
        on_device = [value.to(backend.device, memory_format=memory_format) for value in (activations, gradients)]
        out = backend.op("grad_cam")(*on_device, *size, relu).cpu()
        baseline = reference(activations, gradients, *size, relu)
        assert_same_layout(out, baseline)
        assert_no_worse(out, exact(activations, gradients, *size, relu), baseline)


@pytest.mark.parametrize("relu", [False, True], ids=["signed", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_matches_reference(dtype: torch.dtype, relu: bool) -> None:
    require_native("grad_cam")

    def derivatives(call: Callable[..., Tensor], dtype: torch.dtype, values: tuple[Tensor, Tensor]) -> list[Tensor]:
        leaves = [value.detach().to(dtype=dtype, copy=True).requires_grad_() for value in values]
        out = call(*leaves, 11, 6, relu)
        return list(torch.autograd.grad(out, leaves, sample(*out.shape, seed=3).to(out)))

    values = layer((2, 5, 4, 3), dtype)
    kernel = derivatives(torch.ops.pysal.grad_cam, dtype, values)
    truth, baseline = derivatives(reference, torch.float64, values), derivatives(reference, dtype, values)
    for k, r, b in zip(kernel, truth, baseline, strict=True):
        assert_no_worse(k, r, b)


@pytest.mark.parametrize("relu", [False, True], ids=["signed", "relu"])
def test_gradcheck(relu: bool) -> None:
    leaves = [value.requires_grad_() for value in layer((2, 3, 2, 3), torch.float64)]
    for size in ((3, 4), (2, 3), (1, 5)):

        def call(a: Tensor, g: Tensor, size: tuple[int, int] = size) -> Tensor:
            return ops.grad_cam(a, g, *size, relu)

        assert gradcheck(call, leaves)
        assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("shape", "size"), CASES[:2], ids=str)
def test_opcheck(shape: tuple[int, ...], size: tuple[int, int], requires_grad: bool) -> None:
    activations, gradients = (value.requires_grad_(requires_grad) for value in layer(shape))
    opcheck(torch.ops.pysal.grad_cam.default, (activations, gradients, *size, True))
    opcheck(torch.ops.pysal.grad_cam.default, (activations, gradients, *size, False))


@NATIVE
def test_layouts(backend: Backend) -> None:
    activations, gradients = layer((2, 5, 7, 9))
    truth = reference(activations.double(), gradients.double(), 8, 8, True)
    baseline = reference(activations, gradients, 8, 8, True)
    op = backend.op("grad_cam")
    for _, a in layouts(activations.to(backend.device)):
        for _, g in layouts(gradients.to(backend.device)):
            assert_no_worse(op(a, g, 8, 8, True).cpu(), truth, baseline)


@ALL
def test_empty_and_extremes(backend: Backend) -> None:
    op = backend.op("grad_cam")
    activations, gradients = (value.to(backend.device) for value in layer((2, 3, 3, 3)))
    assert op(activations[:0], gradients[:0], 5, 6, True).shape == (0, 1, 5, 6)
    without_channels = op(activations[:, :0], gradients[:, :0], 5, 6, True)
    assert torch.equal(without_channels, torch.zeros(2, 1, 5, 6, device=backend.device))

    # the layer's own size changes nothing: one bad pixel stays one bad pixel, also after a ReLU
    activations[1, 0, 1, 1] = torch.nan
    out = op(activations, gradients, 3, 3, True)
    assert int(out.isnan().sum()) == 1
    assert out[1, 0, 1, 1].isnan()
    gradients[0, 2] = torch.nan
    assert op(activations, gradients, 5, 5, True)[0].isnan().all()


@ALL
def test_a_sum_of_exactly_zero_stays_zero(backend: Backend) -> None:
    activations = torch.tensor([[[[1.0]], [[-1.0]]]], device=backend.device)
    assert backend.op("grad_cam")(activations, torch.ones_like(activations), 1, 1, True).item() == 0.0


def test_determinism() -> None:
    activations, gradients = layer((3, 130, 17, 19))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(ops.grad_cam(activations, gradients, 224, 224, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


A = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.grad_cam(None, A, 4, 5, True),
            TypeError,
            "pysal::grad_cam: activations must be a torch.Tensor, got NoneType",
        ),
        (
            lambda: ops.grad_cam(A[0], A[0], 4, 5, True),
            ValueError,
            "pysal::grad_cam: activations must have 4 dimensions, got shape (3, 4, 5)",
        ),
        (
            lambda: ops.grad_cam(A, A.double(), 4, 5, True),
            TypeError,
            "pysal::grad_cam: gradients must have dtype float32, got float64",
        ),
        (
            lambda: ops.grad_cam(A, A[:1], 4, 5, True),
            ValueError,
            "pysal::grad_cam: gradients must have the shape of activations, (2, 3, 4, 5), got shape (1, 3, 4, 5)",
        ),
        (
            lambda: ops.grad_cam(A, A.to("meta"), 4, 5, True),
            ValueError,
            "pysal::grad_cam: gradients must be on the device of activations, cpu, got meta",
        ),
        (
            lambda: ops.grad_cam(A[:, :, :0], A[:, :, :0], 4, 5, True),
            ValueError,
            "pysal::grad_cam: activations must have at least one pixel, got shape (2, 3, 0, 5)",
        ),
        (
            lambda: ops.grad_cam(A, A, 0, 5, True),
            ValueError,
            "pysal::grad_cam: height must be at least 1, got 0",
        ),
    ],
)
def test_errors(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
