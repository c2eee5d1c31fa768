"""Oracle of `pysal::gaussian_scale_space` and its derivative: products with banded matrices built in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gaussian_scale_space(images: Tensor, sigmas: Sequence[float], boundary: int) -> Tensor:
    """Return L (N, C, H, W): image n blurred along H and W with standard deviation sigmas[n]."""
    kernels = [_taps(sigma, _radius(sigma)) for sigma in sigmas]
    rows, columns = (_matrices(kernels, size, boundary, images) for size in images.shape[2:])
    return _separable(rows, images, columns).to(images.dtype)


def gaussian_scale_space_derivative(
    images: Tensor, sigmas: Sequence[float], step: float, boundary: int
) -> tuple[Tensor, Tensor]:
    """Return L and D = (K' - K)/h x K'^T + K x (K' - K)^T/h, where K' is K at sigma + h; step 0 is the limit."""
    radii = [_radius(sigma + step) for sigma in sigmas]
    level = [_taps(sigma, radius) for sigma, radius in zip(sigmas, radii, strict=True)]
    after = [_taps(sigma + step, radius) for sigma, radius in zip(sigmas, radii, strict=True)]
    slope = [_slopes(sigma, step, radius) for sigma, radius in zip(sigmas, radii, strict=True)]
    height, width = images.shape[2:]
    level_rows, slope_rows = (_matrices(kernels, height, boundary, images) for kernels in (level, slope))
    level_columns, after_columns, slope_columns = (
        _matrices(kernels, width, boundary, images) for kernels in (level, after, slope)
    )
    derivatives = _separable(slope_rows, images, after_columns) + _separable(level_rows, images, slope_columns)
    return _separable(level_rows, images, level_columns).to(images.dtype), derivatives.to(images.dtype)


def _radius(sigma: float) -> int:
    return int(4 * sigma + 0.5)


def _weights(sigma: float, radius: int) -> Tensor:
    """exp(-j^2 / (2 sigma^2)) for j = -radius..radius, 0 past the radius of sigma."""
    j = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu")
    return torch.where(j.abs() <= _radius(sigma), torch.exp(-0.5 * (j / max(sigma, 1e-9)) ** 2), 0.0)


def _taps(sigma: float, radius: int) -> Tensor:
    weights = _weights(sigma, radius)
    return weights / weights.sum()


def _slopes(sigma: float, step: float, radius: int) -> Tensor:
    """(taps(sigma + step) - taps(sigma)) / step without cancellation: from g' - g = g expm1(log(g' / g))."""
    if radius == 0:
        return torch.zeros(1, dtype=torch.float64, device="cpu")
    j = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu")
    before, after = _weights(sigma, radius), _weights(sigma + step, radius)
    if step == 0:
        growth = before * j**2 / sigma**3
    elif _radius(sigma) == 0:
        growth = torch.where(j == 0, 0.0, after) / step
    else:
        ratio = j**2 * step * (2 * sigma + step) / (2 * sigma**2 * (sigma + step) ** 2)
        growth = torch.where(j.abs() <= _radius(sigma), before * torch.expm1(ratio), after) / step
    return (growth - _taps(sigma, radius) * growth.sum()) / after.sum()


def _matrices(kernels: Sequence[Tensor], size: int, boundary: int, like: Tensor) -> Tensor:
    """The (N, size, size) banded matrices of N kernels, in the arithmetic dtype of `like`."""
    empty = torch.zeros(0, size, size, dtype=torch.float64, device="cpu")
    matrices = torch.cat([empty, *(_matrix(kernel, size, boundary)[None] for kernel in kernels)])
    return matrices.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _matrix(taps: Tensor, size: int, boundary: int) -> Tensor:
    """K[i, m] = sum of the taps whose position i + j is, or under reflection becomes, m."""
    radius = len(taps) // 2
    position = torch.arange(size, device="cpu")[:, None] + torch.arange(-radius, radius + 1, device="cpu")
    weight = taps.expand(size, -1)
    if boundary == 0:
        weight = torch.where((position >= 0) & (position < size), weight, 0.0)
        position = position.clamp(0, size - 1)
    else:
        position = position % (2 * size)
        position = torch.minimum(position, 2 * size - 1 - position)
    return torch.zeros(size, size, dtype=torch.float64, device="cpu").scatter_add(1, position, weight)


def _separable(rows: Tensor, images: Tensor, columns: Tensor) -> Tensor:
    """rows[n] images[n, c] columns[n]^T."""
    return torch.einsum("ncij,nlj->ncil", torch.einsum("nij,ncjl->ncil", rows, images.to(rows.dtype)), columns)
