"""Gaussian noise that depends on a seed, an image's id, a sample's number and an element's place, and on nothing else."""

from typing import Any

import torch
from torch import Tensor

from pysal import _checks
from pysal._library import define, define_derivative, widest
from pysal.reference import gaussian_noise as reference

SCHEMA = (
    "(Tensor images, Tensor scales, int seed, Tensor rows, Tensor image_ids, Tensor samples, ScalarType dtype, "
    "bool channels_last) -> Tensor"
)
BITS_SCHEMA = "(int seed, Tensor image_ids, Tensor samples, SymInt elements) -> Tensor"

define("gaussian_noise", SCHEMA, reference.gaussian_noise)
define("gaussian_noise_bits", BITS_SCHEMA, reference.gaussian_noise_bits)


def _fake(
    images: Tensor,
    scales: Tensor,
    seed: int,
    rows: Tensor,
    image_ids: Tensor,
    samples: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return torch.empty(
        (rows.shape[0], *images.shape[1:]),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _fake_bits(seed: int, image_ids: Tensor, samples: Tensor, elements: int) -> Tensor:
    return image_ids.new_empty((image_ids.shape[0], elements), dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, _, ctx.seed, rows, image_ids, samples, dtype, _ = inputs
    ctx.save_for_backward(rows, image_ids, samples)
    ctx.shape, ctx.dtype = images.shape, images.dtype
    ctx.arithmetic = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, image_ids, samples = ctx.saved_tensors
    grad = grad.to(ctx.arithmetic)
    to_images = to_scales = None
    if ctx.needs_input_grad[0]:
        to_images = grad.new_zeros(ctx.shape).index_add(0, rows, grad).to(ctx.dtype)
    if ctx.needs_input_grad[1]:
        origin = grad.new_zeros((1, *ctx.shape[1:]))
        one = grad.new_ones(1, dtype=widest(grad.device))
        normals = torch.ops.pysal.gaussian_noise(
            origin, one, ctx.seed, torch.zeros_like(rows), image_ids, samples, ctx.arithmetic, False
        )
        along = (grad * normals).sum((1, 2, 3), dtype=widest(grad.device))
        to_scales = along.new_zeros(ctx.shape[0]).index_add(0, rows, along)
    return to_images, to_scales, None, None, None, None, None, None


torch.library.register_fake("pysal::gaussian_noise", _fake)
torch.library.register_fake("pysal::gaussian_noise_bits", _fake_bits)
define_derivative("gaussian_noise", _differentiate, _setup)


def gaussian_noise(
    images: Tensor,
    scales: Tensor,
    seed: int,
    rows: Tensor,
    image_ids: Tensor,
    samples: Tensor,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Return images[rows[n]] + scales[rows[n]] * normal for each n, the normals counter-based.

    Element e of an image, counted in C, H, W order, gets normal e % 4 of the four that Philox4x32-10 makes under the key
    `seed` (low, high 32 bits) and the counter (e // 4, samples[n], low and high 32 bits of image_ids[n]): its words r are
    paired, u = (r + 0.5) / 2^32, and sqrt(-2 ln u_0) (cos, sin)(2 pi u_1) are normals 0 and 1, words 2 and 3 give the
    others. So the noise does not depend on chunks, threads, layout, device or storage dtype, but for rounding.

    Args:
        images: (B, C, H, W), floating; fewer than 2^34 elements each.
        scales: (B,), floating (taken as float64): the standard deviation of each image's noise, in the images' units.
        seed: -2^63 to 2^63 - 1.
        rows: (N,), integer in [0, B): the image of each result.
        image_ids: (N,), integer: who the image is, whatever its row.
        samples: (N,), integer: which draw; its low 32 bits count.
        dtype: of the result, floating; None for that of `images`.
        channels_last: whether the result is in torch.channels_last memory format.

    Returns:
        (N, C, H, W) in `dtype` on the device of `images`; differentiable in `images` and `scales`.

    Raises:
        TypeError: not a tensor, or a dtype other than the above.
        ValueError: another rank or shape, tensors on several devices, a seed out of range, or (CPU tensors only) a row
            outside [0, B).

    Source:
        Salmon, Moraes, Dror and Shaw 2011, https://doi.org/10.1145/2063384.2063405; Box and Muller 1958.

    Deviations:
        None.

    Example:
        >>> image, first = torch.zeros(1, 1, 1, 2), torch.zeros(1, dtype=torch.int64)
        >>> gaussian_noise(image, torch.ones(1), 0, first, first, first).flatten()
        tensor([ 0.9911, -0.9247])
    """
    where = "pysal::gaussian_noise"
    _checks.check_tensor(where, "images", images, ndim=4, dtypes=_checks.FLOATING)
    _checks.check_tensor(where, "scales", scales, ndim=1, dtypes=_checks.FLOATING)
    if scales.shape[0] != images.shape[0]:
        _checks.refuse(where, "scales", f"have {images.shape[0]} elements, one per image", scales.shape[0])
    _checks.check_same_device(where, "scales", scales, "images", images.device)
    seed = _checks.check_seed(where, seed)
    rows = _checks.check_indices(where, "rows", rows, ndim=1, device=images.device, limit=images.shape[0])
    image_ids, samples = _check_draws(where, image_ids, samples)
    _checks.check_same_shape(where, "image_ids", image_ids, "rows", rows.shape)
    dtype = _checks.check_dtype(where, dtype, images.dtype)
    noisy: Tensor = torch.ops.pysal.gaussian_noise(
        images,
        scales.to(widest(scales.device)),
        seed,
        rows,
        image_ids.to(images.device),
        samples.to(images.device),
        dtype,
        channels_last,
    )
    return noisy


def gaussian_noise_bits(seed: int, image_ids: Tensor, samples: Tensor, elements: int) -> Tensor:
    """Return the 32-bit words that `gaussian_noise` makes its normals of.

    Args:
        seed: -2^63 to 2^63 - 1.
        image_ids: (N,), integer.
        samples: (N,), integer; the low 32 bits count.
        elements: words per row, 0 to 2^34 - 1.

    Returns:
        (N, elements) int64 in [0, 2^32), on the device of `image_ids`: words 0 to 3 of counter 0, then of counter 1, ...

    Raises:
        TypeError: not an integer tensor.
        ValueError: another rank or shape, tensors on several devices, or a number out of range.

    Source:
        Salmon, Moraes, Dror and Shaw 2011, https://doi.org/10.1145/2063384.2063405, section 3.3.

    Deviations:
        None.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> [hex(word) for word in gaussian_noise_bits(0, zero, zero, 4)[0].tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    where = "pysal::gaussian_noise_bits"
    seed = _checks.check_seed(where, seed)
    image_ids, samples = _check_draws(where, image_ids, samples)
    if not 0 <= elements < 2**34:
        _checks.refuse(where, "elements", "be in [0, 2^34)", elements)
    bits: Tensor = torch.ops.pysal.gaussian_noise_bits(seed, image_ids, samples, elements)
    return bits


def _check_draws(where: str, image_ids: object, samples: object) -> tuple[Tensor, Tensor]:
    ids = _checks.check_tensor(where, "image_ids", image_ids, ndim=1, dtypes=_checks.INTEGER)
    draws = _checks.check_tensor(where, "samples", samples, ndim=1, dtypes=_checks.INTEGER)
    _checks.check_same_shape(where, "samples", draws, "image_ids", ids.shape)
    _checks.check_same_device(where, "samples", draws, "image_ids", ids.device)
    return ids.to(torch.int64), draws.to(torch.int64)
