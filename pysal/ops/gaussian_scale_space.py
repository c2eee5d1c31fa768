"""Gaussian blurs of a batch of images, each with its own sigma, and their derivative with respect to sigma."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pysal._checks import FLOATING, check_tensor, refuse, refuse_unknown
from pysal._library import define, define_derivative
from pysal.reference import gaussian_scale_space as reference

BOUNDARIES = {"constant": 0, "reflect": 1}
MAX_SIGMA = 1e6  # pixels; a radius of 4e6 taps is past the side of any image, and still built in milliseconds

SCHEMA = "(Tensor images, float[] sigmas, int boundary) -> Tensor"
SCHEMA_DERIVATIVE = "(Tensor images, float[] sigmas, float step, int boundary) -> (Tensor levels, Tensor derivatives)"

define("gaussian_scale_space", SCHEMA, reference.gaussian_scale_space)
define("gaussian_scale_space_derivative", SCHEMA_DERIVATIVE, reference.gaussian_scale_space_derivative)


def _fake(images: Tensor, sigmas: Sequence[float], boundary: int) -> Tensor:
    torch._check(images.shape[0] == len(sigmas), lambda: "pysal::gaussian_scale_space: sigmas must be one per image")
    return images.new_empty(images.shape)


def _fake_derivative(images: Tensor, sigmas: Sequence[float], step: float, boundary: int) -> tuple[Tensor, Tensor]:
    torch._check(images.shape[0] == len(sigmas), lambda: "pysal::gaussian_scale_space_derivative: sigmas must be one per image")
    return images.new_empty(images.shape), images.new_empty(images.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Sequence[float], int], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.pysal.gaussian_scale_space(grad, *ctx.arguments), None, None  # K is symmetric


def _setup_derivative(ctx: Any, inputs: tuple[Tensor, Sequence[float], float, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.sigmas, ctx.step, ctx.boundary = inputs[1:]
    ctx.set_materialize_grads(False)


def _differentiate_derivative(
    ctx: Any, grad_levels: Tensor | None, grad_derivatives: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    grad = None
    if grad_levels is not None:
        grad = torch.ops.pysal.gaussian_scale_space(grad_levels, ctx.sigmas, ctx.boundary)
    if grad_derivatives is not None:  # L(sigma + h) - L(sigma) is a difference of symmetric maps
        ops = torch.ops.pysal
        slope = ops.gaussian_scale_space_derivative(grad_derivatives, ctx.sigmas, ctx.step, ctx.boundary)[1]
        grad = slope if grad is None else grad + slope
    return grad, None, None, None


torch.library.register_fake("pysal::gaussian_scale_space", _fake)
torch.library.register_fake("pysal::gaussian_scale_space_derivative", _fake_derivative)
define_derivative("gaussian_scale_space", _differentiate, _setup)
define_derivative("gaussian_scale_space_derivative", _differentiate_derivative, _setup_derivative)


def gaussian_scale_space(images: Tensor, sigmas: Sequence[float], boundary: str = "constant") -> Tensor:
    """Return every image blurred by a Gaussian with its own standard deviation.

    L = K x K^T along height and width, K the kernel k[j] proportional to exp(-j^2 / (2 sigma^2)), j = -r..r,
    r = int(4 sigma + 0.5), normalised in float64: what scipy.ndimage.gaussian_filter computes with its defaults.
    L(0) is the image. The map is its own adjoint, so its gradient is the same blur of the gradient.

    Args:
        images: (N, C, H, W), finite; float32, float64, float16 or bfloat16. A batch that repeats one image by `expand`
            is not copied. A pixel that is not finite spoils its surroundings, with a kernel as wide as the image its plane.
        sigmas: N standard deviations in pixels, 0 to 1e6.
        boundary: "constant", zero outside and no renormalisation, or "reflect", half-sample symmetric
            (d c b a | a b c d | d c b a), as often as the kernel reaches.

    Returns:
        (N, C, H, W) contiguous, of the dtype and device of `images`.

    Raises:
        TypeError: `images` is not a floating tensor.
        ValueError: `images` is not 4-D, `sigmas` are not N numbers from 0 to 1e6, or `boundary` is unknown.

    Source:
        Lindeberg 1994, https://doi.org/10.1080/757582976; Xu et al. 2020, arXiv:2004.03383, section 3.

    Deviations:
        The kernel is sampled and cut at 4 sigma.

    Example:
        >>> gaussian_scale_space(torch.eye(3).reshape(1, 1, 3, 3), [0.5])[0, 0, 1]
        tensor([0.1675, 0.6414, 0.1675])
    """
    where = "pysal::gaussian_scale_space"
    code = _check(where, images, sigmas, boundary)
    levels: Tensor = torch.ops.pysal.gaussian_scale_space(images, [float(sigma) for sigma in sigmas], code)
    return levels


def gaussian_scale_space_derivative(
    images: Tensor, sigmas: Sequence[float], step: float = 0.0, boundary: str = "constant"
) -> tuple[Tensor, Tensor]:
    """Return the blurred images L and the derivative or difference quotient D of L with respect to sigma.

    With step h > 0, D = (L(sigma + h) - L(sigma)) / h, computed as (K' - K)/h x K'^T + K x (K' - K)^T/h with
    difference kernels built in float64, so that float32 loses nothing by cancellation. With h = 0, D = dL/dsigma of the
    kernel cut at int(4 sigma + 0.5), that radius held fixed: 0 where it is 0, at sigma < 0.125.

    Args:
        images: (N, C, H, W), finite; float32, float64, float16 or bfloat16, as for `gaussian_scale_space`.
        sigmas: N standard deviations in pixels, 0 to 1e6.
        step: h in pixels, 0 to 1e6.
        boundary: "constant" or "reflect", as for `gaussian_scale_space`.

    Returns:
        levels: (N, C, H, W) contiguous, of the dtype and device of `images`: L.
        derivatives: the same: D, per pixel of sigma.

    Raises:
        TypeError: `images` is not a floating tensor.
        ValueError: `images` is not 4-D, `sigmas` are not N numbers from 0 to 1e6, `step` is not one, or `boundary` is
            unknown.

    Source:
        Xu et al. 2020, arXiv:2004.03383, equation 7, and its implementation in PAIR saliency (h = 0.01).

    Deviations:
        The same difference quotient as PAIR's, without the cancellation of subtracting two blurs.

    Example:
        >>> levels, derivatives = gaussian_scale_space_derivative(torch.ones(1, 1, 1, 3), [1.0], step=0.01)
        >>> derivatives.shape, bool((derivatives < 0).all())
        (torch.Size([1, 1, 1, 3]), True)
    """
    where = "pysal::gaussian_scale_space_derivative"
    code = _check(where, images, sigmas, boundary)
    if not 0 <= step <= MAX_SIGMA:
        refuse(where, "step", "be between 0 and 1e6", step)
    levels, derivatives = torch.ops.pysal.gaussian_scale_space_derivative(
        images, [float(sigma) for sigma in sigmas], float(step), code
    )
    return levels, derivatives


def _check(where: str, images: Tensor, sigmas: Sequence[float], boundary: str) -> int:
    check_tensor(where, "images", images, ndim=4, dtypes=FLOATING)
    if len(sigmas) != images.shape[0]:
        refuse(where, "sigmas", f"have {images.shape[0]} elements, one per image", len(sigmas))
    for sigma in sigmas:
        if not 0 <= sigma <= MAX_SIGMA:
            refuse(where, "sigmas", "be between 0 and 1e6", sigma)
    if boundary not in BOUNDARIES:
        refuse_unknown(where, "boundary", f"be one of {', '.join(BOUNDARIES)}", boundary, BOUNDARIES)
    return BOUNDARIES[boundary]
