"""Points on a straight path, weighted sums of gradients along it, their running moments: the formulas."""

import torch
from torch import Tensor


def path_integral_points(
    inputs: Tensor, baselines: Tensor, rows: Tensor, alphas: Tensor, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """Return b + alpha (x - b) for x = inputs[rows[n]], b = baselines[rows[n]], alpha = alphas[n]."""
    compute = torch.promote_types(inputs.dtype, torch.float32)
    x = inputs.index_select(0, rows).to(compute)
    b = baselines.index_select(0, rows).to(compute)
    alpha = alphas.to(compute)[:, None, None, None]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return (b + alpha * (x - b)).to(dtype=dtype, memory_format=memory_format, copy=True)


def path_integral_accumulate_(
    accumulator: Tensor, gradients: Tensor, factors: Tensor | None, rows: Tensor, weights: Tensor
) -> None:
    """Add weights[n] * gradients[n] * factors[n] to accumulator[rows[n]], in the accumulator's dtype."""
    compute = accumulator.dtype
    terms = weights.to(compute).reshape(-1, *[1] * (gradients.ndim - 1)) * gradients.to(compute)
    accumulator.index_add_(0, rows, terms if factors is None else terms * factors.to(compute))


def path_integral_moments_(mean: Tensor, squares: Tensor, counts: Tensor, samples: Tensor, rows: Tensor) -> None:
    """Take samples[n], n in order, into the mean and the sum of squared deviations of image rows[n] (Welford)."""
    for sample, row in zip(samples.to(mean.dtype), rows.tolist(), strict=True):
        counts[row] += 1
        deviation = sample - mean[row]
        mean[row] += deviation / counts[row]
        squares[row] += deviation * (sample - mean[row])


def path_integral_product(inputs: Tensor, baselines: Tensor, accumulator: Tensor) -> Tensor:
    """Return (x - b) * accumulator in the accumulator's dtype, contiguous."""
    compute = accumulator.dtype
    return ((inputs.to(compute) - baselines.to(compute)) * accumulator).contiguous()
