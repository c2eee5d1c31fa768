"""Points on a straight path, weighted sums of gradients along it, their running moments and the final product."""

from typing import Any

import torch
from torch import Tensor

from pysal import _checks
from pysal._library import define, define_derivative, widest
from pysal.reference import path_integral as reference

POINTS_SCHEMA = "(Tensor inputs, Tensor baselines, Tensor rows, Tensor alphas, ScalarType dtype, bool channels_last) -> Tensor"
ACCUMULATE_SCHEMA = "(Tensor(a!) accumulator, Tensor gradients, Tensor? factors, Tensor rows, Tensor weights) -> ()"
MOMENTS_SCHEMA = "(Tensor(a!) mean, Tensor(b!) squares, Tensor(c!) counts, Tensor samples, Tensor rows) -> ()"
PRODUCT_SCHEMA = "(Tensor inputs, Tensor baselines, Tensor accumulator) -> Tensor"

define("path_integral_points", POINTS_SCHEMA, reference.path_integral_points)
define("path_integral_accumulate_", ACCUMULATE_SCHEMA, reference.path_integral_accumulate_)
define("path_integral_moments_", MOMENTS_SCHEMA, reference.path_integral_moments_)
define("path_integral_product", PRODUCT_SCHEMA, reference.path_integral_product)

ACCUMULATORS = (torch.float32, torch.float64)


def _fake_points(
    inputs: Tensor, baselines: Tensor, rows: Tensor, alphas: Tensor, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    return torch.empty(
        (rows.shape[0], *inputs.shape[1:]),
        dtype=dtype,
        device=inputs.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _fake_accumulate(accumulator: Tensor, gradients: Tensor, factors: Tensor | None, rows: Tensor, weights: Tensor) -> None:
    return None


def _fake_moments(mean: Tensor, squares: Tensor, counts: Tensor, samples: Tensor, rows: Tensor) -> None:
    return None


def _fake_product(inputs: Tensor, baselines: Tensor, accumulator: Tensor) -> Tensor:
    return torch.empty_like(accumulator, memory_format=torch.contiguous_format)


def _setup_points(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, _, rows, alphas, _, _ = inputs
    ctx.save_for_backward(rows, alphas)
    ctx.shape, ctx.dtype = images.shape, images.dtype


def _differentiate_points(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, alphas = ctx.saved_tensors
    compute = torch.promote_types(ctx.dtype, torch.float32)
    alpha = alphas.to(compute)[:, None, None, None]
    zeros = grad.new_zeros(ctx.shape, dtype=compute)
    to_inputs, to_baselines = (
        zeros.index_add(0, rows, share * grad.to(compute)).to(ctx.dtype) if needed else None
        for share, needed in ((alpha, ctx.needs_input_grad[0]), (1 - alpha, ctx.needs_input_grad[1]))
    )
    return to_inputs, to_baselines, None, None, None, None


def _setup_product(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_product(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    inputs, baselines, accumulator = ctx.saved_tensors
    along = grad * accumulator if ctx.needs_input_grad[0] or ctx.needs_input_grad[1] else None
    return (
        along.to(inputs.dtype) if along is not None and ctx.needs_input_grad[0] else None,
        -along.to(baselines.dtype) if along is not None and ctx.needs_input_grad[1] else None,
        grad * (inputs.to(grad.dtype) - baselines.to(grad.dtype)) if ctx.needs_input_grad[2] else None,
    )


torch.library.register_fake("pysal::path_integral_points", _fake_points)
torch.library.register_fake("pysal::path_integral_accumulate_", _fake_accumulate)
torch.library.register_fake("pysal::path_integral_moments_", _fake_moments)
torch.library.register_fake("pysal::path_integral_product", _fake_product)
define_derivative("path_integral_points", _differentiate_points, _setup_points)
define_derivative("path_integral_product", _differentiate_product, _setup_product)


def path_integral_points(
    inputs: Tensor,
    baselines: Tensor,
    rows: Tensor,
    alphas: Tensor,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Return b + alpha (x - b) for each n, where x and b are row rows[n] of the inputs and baselines.

    Args:
        inputs: x, (B, C, H, W), floating.
        baselines: b, (B, C, H, W), inputs' dtype and device; may be expanded from fewer values.
        rows: (N,), integer in [0, B): the image of each point.
        alphas: (N,), floating (taken as float64): where on the path each point lies, 0 at b and 1 at x.
        dtype: of the result, floating; None for inputs' dtype.
        channels_last: whether the result is in torch.channels_last memory format.

    Returns:
        (N, C, H, W) in `dtype` on inputs' device; differentiable in inputs and baselines.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another rank or shape, tensors on several devices, or (CPU tensors only) a row outside [0, B).

    Source:
        Sundararajan, Taly and Yan 2017, arXiv 1703.01365, section 3.

    Deviations:
        None.

    Example:
        >>> inputs, rows = torch.ones(1, 1, 1, 2), torch.zeros(2, dtype=torch.int32)
        >>> path_integral_points(inputs, torch.zeros_like(inputs), rows, torch.tensor([0.25, 1.0])).flatten().tolist()
        [0.25, 0.25, 1.0, 1.0]
    """
    where = "pysal::path_integral_points"
    _checks.check_tensor(where, "inputs", inputs, ndim=4, dtypes=_checks.FLOATING)
    _checks.check_tensor(where, "baselines", baselines, dtypes=(inputs.dtype,))
    _check_like(where, "baselines", baselines, "inputs", inputs)
    rows = _checks.check_indices(where, "rows", rows, ndim=1, device=inputs.device, limit=inputs.shape[0])
    alphas = _check_numbers(where, "alphas", alphas, rows)
    dtype = _checks.check_dtype(where, dtype, inputs.dtype)
    out: Tensor = torch.ops.pysal.path_integral_points(inputs, baselines, rows, alphas, dtype, channels_last)
    return out


def path_integral_accumulate_(
    accumulator: Tensor, gradients: Tensor, factors: Tensor | None, rows: Tensor, weights: Tensor
) -> None:
    """Add weights[n] * gradients[n] * factors[n] to accumulator[rows[n]], n in order.

    The result does not depend on the number of threads. It has no derivative.

    Args:
        accumulator: (B, ...), float32 or float64, changed in place; the sum is taken in its dtype.
        gradients: (N, ...), floating, on accumulator's device, any memory format.
        factors: (N, ...), floating, the shape of gradients; None for 1.
        rows: (N,), integer in [0, B): the image each gradient belongs to.
        weights: (N,), floating (taken as float64).

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another shape, tensors on several devices, a tensor that requires grad while gradients are being
            recorded, or (CPU tensors only) a row outside [0, B).

    Source:
        Sundararajan, Taly and Yan 2017, arXiv 1703.01365, equation 3; Xu, Venugopalan and Sundararajan 2020,
        arXiv 2004.03383, equation 8 (factors).

    Deviations:
        None.

    Example:
        >>> total = torch.zeros(1, 2)
        >>> rows, weights = torch.tensor([0, 0]), torch.tensor([0.5, 0.25])
        >>> path_integral_accumulate_(total, torch.tensor([[1.0, 2.0], [4.0, 8.0]]), None, rows, weights)
        >>> total
        tensor([[1.5000, 3.0000]])
    """
    where = "pysal::path_integral_accumulate_"
    _checks.check_tensor(where, "accumulator", accumulator, dtypes=ACCUMULATORS)
    _check_rows_of(where, "gradients", gradients, "accumulator", accumulator)
    if factors is not None:
        _checks.check_tensor(where, "factors", factors, dtypes=_checks.FLOATING)
        _check_like(where, "factors", factors, "gradients", gradients)
    _refuse_recording(where, accumulator=accumulator, gradients=gradients, factors=factors)
    rows = _check_rows(where, rows, gradients.shape[0], accumulator)
    weights = _check_numbers(where, "weights", weights, rows)
    torch.ops.pysal.path_integral_accumulate_(accumulator, gradients, factors, rows, weights)


def path_integral_moments_(mean: Tensor, squares: Tensor, counts: Tensor, samples: Tensor, rows: Tensor) -> None:
    """Take samples[n] into the running mean and squared deviations of image rows[n], n in order (Welford).

    After m samples of an image, squares / m is their variance, never negative, and squares / (m - 1) / m the squared
    standard error of the mean. The result does not depend on the number of threads. It has no derivative.

    Args:
        mean: (B, ...), float32 or float64, changed in place; start with zeros.
        squares: (B, ...), mean's dtype and device, changed in place: the sum of (sample - mean)^2; start with zeros.
        counts: (B,), int64, changed in place: the samples taken so far; start with zeros.
        samples: (N, ...), floating, on mean's device, any memory format.
        rows: (N,), integer in [0, B): the image each sample belongs to.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another shape, tensors on several devices, a tensor that requires grad while gradients are being
            recorded, or (CPU tensors only) a row outside [0, B).

    Source:
        Welford 1962, Technometrics 4(3), page 419.

    Deviations:
        None.

    Example:
        >>> mean, squares, counts = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
        >>> path_integral_moments_(mean, squares, counts, torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]))
        >>> mean.item(), squares.item(), counts.item()
        (2.0, 2.0, 2)
    """
    where = "pysal::path_integral_moments_"
    _checks.check_tensor(where, "mean", mean, dtypes=ACCUMULATORS)
    _checks.check_tensor(where, "squares", squares, dtypes=(mean.dtype,))
    _check_like(where, "squares", squares, "mean", mean)
    _check_rows_of(where, "samples", samples, "mean", mean)
    _checks.check_tensor(where, "counts", counts, ndim=1, dtypes=(torch.int64,))
    if counts.shape[0] != mean.shape[0]:
        _checks.refuse(where, "counts", f"have shape ({mean.shape[0]},)", f"shape {tuple(counts.shape)}")
    _checks.check_same_device(where, "counts", counts, "mean", mean.device)
    _refuse_recording(where, mean=mean, squares=squares, samples=samples)
    rows = _check_rows(where, rows, samples.shape[0], mean)
    torch.ops.pysal.path_integral_moments_(mean, squares, counts, samples, rows)


def path_integral_product(inputs: Tensor, baselines: Tensor, accumulator: Tensor) -> Tensor:
    """Return (x - b) * accumulator, the last step of integrated gradients.

    Args:
        inputs: x, (B, C, H, W), floating.
        baselines: b, (B, C, H, W), inputs' dtype and device.
        accumulator: (B, C, H, W), float32 or float64, on inputs' device: the mean gradient along the path.

    Returns:
        (B, C, H, W) in accumulator's dtype, contiguous; differentiable in all three.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another rank or shape, or tensors on several devices.

    Source:
        Sundararajan, Taly and Yan 2017, arXiv 1703.01365, equation 3.

    Deviations:
        None.

    Example:
        >>> x, b, total = torch.full((3, 1, 1, 1, 2), 2.0)
        >>> path_integral_product(x, b - 1, total).flatten().tolist()
        [2.0, 2.0]
    """
    where = "pysal::path_integral_product"
    _checks.check_tensor(where, "inputs", inputs, ndim=4, dtypes=_checks.FLOATING)
    _checks.check_tensor(where, "baselines", baselines, dtypes=(inputs.dtype,))
    _check_like(where, "baselines", baselines, "inputs", inputs)
    _checks.check_tensor(where, "accumulator", accumulator, dtypes=ACCUMULATORS)
    _check_like(where, "accumulator", accumulator, "inputs", inputs)
    out: Tensor = torch.ops.pysal.path_integral_product(inputs, baselines, accumulator)
    return out


def _check_like(where: str, argument: str, value: Tensor, other: str, like: Tensor) -> None:
    _checks.check_same_shape(where, argument, value, other, like.shape)
    _checks.check_same_device(where, argument, value, other, like.device)


def _check_rows_of(where: str, argument: str, values: object, other: str, totals: Tensor) -> None:
    """Refuse values that are not (N, ...) beside totals (B, ...)."""
    given = _checks.check_tensor(where, argument, values, dtypes=_checks.FLOATING)
    if totals.ndim == 0:
        _checks.refuse(where, other, "have at least 1 dimension", "shape ()")
    if given.ndim != totals.ndim or given.shape[1:] != totals.shape[1:]:
        wanted = ", ".join(["N", *map(str, totals.shape[1:])])
        _checks.refuse(where, argument, f"have shape ({wanted})", f"shape {tuple(given.shape)}")
    _checks.check_same_device(where, argument, given, other, totals.device)


def _check_rows(where: str, rows: object, count: int, totals: Tensor) -> Tensor:
    checked = _checks.check_indices(where, "rows", rows, ndim=1, device=totals.device, limit=totals.shape[0])
    if checked.shape[0] != count:
        _checks.refuse(where, "rows", f"have shape ({count},)", f"shape {tuple(checked.shape)}")
    return checked


def _check_numbers(where: str, argument: str, value: object, rows: Tensor) -> Tensor:
    numbers = _checks.check_tensor(where, argument, value, ndim=1, dtypes=_checks.FLOATING)
    _checks.check_same_shape(where, argument, numbers, "rows", rows.shape)
    return numbers.to(device=rows.device, dtype=widest(rows.device))


def _refuse_recording(where: str, **tensors: Tensor | None) -> None:
    """Refuse what autograd would silently leave out of its graph: an in-place sum has no derivative here."""
    for argument, value in tensors.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            _checks.refuse(where, argument, "not require grad outside torch.no_grad()", "requires_grad=True")
