"""Channels to one number, numbers to colours, and colours on the photo.

Nothing here changes a map: limits, clipping and desaturation belong to drawing.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import Colormap
from numpy.typing import NDArray
from torch import Tensor

from pysal._checks import check_choice, check_tensor, refuse, refuse_unknown

Array = NDArray[np.float64]
"""What pictures are made of: an array of float64."""
PERCENTILE = 99.5
"""Per cent of the pixels whose |map| lies inside the colour limits: a few outliers must not make a picture pale."""


# Numbers -------------------------------------------------------------------------------------------------------------


def reduce_channels(map: Tensor, reduction: str) -> Tensor:
    """Return one number per pixel.

    Args:
        map: (..., C, H, W), any real dtype.
        reduction: "max_abs" (largest |value| of the channels), "sum" (keeps the sign and the total), "sum_abs" (the sum of
            |value|) or "none" (C is 1).

    Returns:
        (..., H, W), floating dtype and device of `map`. NaN in any channel gives NaN.

    Raises:
        TypeError: `map` is no tensor.
        ValueError: fewer than 3 dimensions, an unknown reduction, or "none" with several channels.

    Source:
        max |.| over channels for gradients: Simonyan, Vedaldi, Zisserman 2013, arXiv:1312.6034, section 3.1.

    Example:
        >>> reduce_channels(torch.tensor([[[1.0]], [[-3.0]]]), "max_abs")
        tensor([[3.]])
    """
    where = "pysal.viz.reduce_channels"
    map = check_tensor(where, "map", map)
    if map.ndim < 3:
        refuse(where, "map", "have at least 3 dimensions (C, H, W)", f"shape {tuple(map.shape)}")
    if not map.is_floating_point():
        map = map.to(torch.float32)
    if reduction == "max_abs":
        return map.abs().amax(-3)
    if reduction == "sum":
        return map.sum(-3)
    if reduction == "sum_abs":
        return map.abs().sum(-3)
    check_choice(where, "reduction", reduction, ("max_abs", "sum", "sum_abs", "none"))
    if map.shape[-3] != 1:
        refuse(where, "map", "have 1 channel where reduction is 'none'", f"shape {tuple(map.shape)}")
    return map.squeeze(-3)


def limits(map: Tensor, percentile: float = PERCENTILE, *, signed: bool = True) -> tuple[float, float]:
    """Return the numbers that get the outermost colours.

    Args:
        map: any shape. Values that are not finite are left out.
        percentile: in (0, 100]; per cent of the finite values with |value| inside the limits. Where that many are zero,
            the largest |value| is taken instead, so that a sparse map does not vanish.
        signed: limits symmetric about 0; otherwise from 0 (or the mirrored percentile, where values are negative).

    Returns:
        (low, high), low <= 0 <= high; (0, 0) for a map that is zero, empty or nowhere finite.

    Raises:
        TypeError: `map` is no tensor.
        ValueError: `percentile` outside (0, 100].

    Example:
        >>> limits(torch.tensor([-2.0, 1.0]), 100)
        (-2.0, 2.0)
    """
    where = "pysal.viz.limits"
    map = check_tensor(where, "map", map)
    if not 0 < percentile <= 100:
        refuse(where, "percentile", "be in (0, 100]", percentile)
    values = as_numpy(map)
    values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.0, 0.0
    magnitude = np.abs(values)
    bound = float(np.percentile(magnitude, percentile)) or float(magnitude.max())
    if signed:
        return -bound, bound
    return (-bound if values.min() < 0 else 0.0), (bound if values.max() > 0 else 0.0)


# Colours -------------------------------------------------------------------------------------------------------------

DIM = (0.04, 0.44)  # grey of the dimmed photo where the photo is black, and what white adds to it
LIGHT = (0.62, 0.36)  # the same of the pale photo that lies under a map with a sign
Colours = str | Colormap


@cache
def palette(signed: bool) -> Array:
    """Return the colours of a map, from its low limit to its high one.

    Both are perceptually uniform. The signed one is white at zero, as ink on a pale photo: two straight lines in OKLab, from
    blue (against the target) over white to orange (for it), equally dark on both sides; blue against orange is the axis that
    the common colour vision deficiencies keep. The unsigned one is dark at zero, as light on a dimmed photo: matplotlib's
    inferno without its black end.

    Returns:
        (511, 3) sRGB in [0, 1].

    Source:
        Björn Ottosson, "A perceptual color space for image processing", 2020 (OKLab).
    """
    if not signed:
        return np.asarray(colormaps["inferno"](np.linspace(0.15, 1.0, 511)), np.float64)[:, :3]
    blue, white, orange = (0.55, -0.033, -0.155), (1.0, 0.0, 0.0), (0.55, 0.11, 0.105)
    t = np.linspace(0.0, 2.0, 511)
    oklab = np.stack([np.interp(t, [0.0, 1.0, 2.0], knots) for knots in zip(blue, white, orange, strict=True)], -1)
    to_lms = [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    to_linear = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    linear = (oklab @ np.array(to_lms).T) ** 3 @ np.array(to_linear).T
    linear = np.clip(linear, 0.0, 1.0)
    return cast(Array, np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def check_colours(where: str, colours: Colours | None) -> Colormap | None:
    """Return the colour map that is meant; None where pysal's own colours are."""
    if colours is None or isinstance(colours, Colormap):
        return colours
    if not isinstance(colours, str):
        refuse(where, "colours", "be the name of a matplotlib colour map, or one", type(colours).__name__, TypeError)
    if colours not in colormaps:
        known = [name for name in colormaps if not name.endswith("_r")]
        refuse_unknown(where, "colours", "be the name of a matplotlib colour map ('gray', 'viridis', 'RdBu_r')", colours, known)
    return colormaps[colours]


def photo(image: Tensor) -> Array:
    """Return an image as colours that can be shown.

    Args:
        image: (C, H, W). Three channels are red, green, blue; any other number is shown as their mean in grey. Values
            in [0, 1] are shown as they are, bytes are divided by 255, any other range is stretched to
            [0, 1]; a hundredth outside [0, 1], as resizing leaves, is cut. Values that are not finite are shown grey.

    Returns:
        (H, W, 3) in [0, 1].

    Raises:
        TypeError: `image` is no tensor.
        ValueError: `image` is not 3-D.
    """
    image = check_tensor("pysal.viz.photo", "image", image, ndim=3)
    values = as_numpy(image)
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 1.0)
    if image.dtype == torch.uint8:
        low, high = 0.0, 255.0
    elif low >= -0.01 and high <= 1.01:
        low, high = 0.0, 1.0
    values = np.where(finite, (values - low) / ((high - low) or 1.0), 0.5).clip(0.0, 1.0)
    if values.shape[0] != 3:
        values = np.broadcast_to(values.mean(0, keepdims=True), (3, *values.shape[1:]))
    return np.ascontiguousarray(values.transpose(1, 2, 0))


def overlay(
    image: Tensor,
    map: Tensor,
    *,
    signed: bool,
    alpha: float = 0.95,
    bounds: tuple[float, float] | None = None,
    colours: Colours | None = None,
    photo: bool = True,
) -> Array:
    """Return a map on the desaturated photo: as ink on a pale one where it has a sign, as light on a dim one where it has none.

    The colour tells the value, `palette` between the bounds; opacity rises from 0 at zero, so that the photo shows
    where nothing was found. Pixels that are not finite are hatched in grey.

    Args:
        image: (C, H, W), see `photo`.
        map: (H, W), one number per pixel; see `reduce_channels` and `pooled` for maps of colour channels.
        signed: diverging colours, or sequential ones.
        alpha: opacity at the bounds, in [0, 1].
        bounds: (low, high) of the colours; `limits(map)` by default.
        colours: a matplotlib colour map, or its name, for `palette`.
        photo: whether the photo lies below; without it the colours are opaque.

    Returns:
        (H, W, 3) in [0, 1], an RGB image: `(255 * overlay(...)).round().astype("uint8")` is one of bytes.

    Raises:
        TypeError: `image` or `map` is no tensor, or `colours` is of another type.
        ValueError: another number of dimensions or size, `alpha` outside [0, 1], or an unknown colour map.
    """
    where = "pysal.viz.overlay"
    map = check_tensor(where, "map", map, ndim=2)
    image = check_tensor(where, "image", image, ndim=3)
    if image.shape[1:] != map.shape:
        refuse(where, "map", f"have the size of the image, {tuple(image.shape[1:])}", f"shape {tuple(map.shape)}")
    if not 0 <= alpha <= 1:
        refuse(where, "alpha", "be in [0, 1]", alpha)
    light = layer(map, signed=signed, bounds=bounds, colours=check_colours(where, colours))
    if not photo:
        return without_photo(light, signed, colours)
    behind = backdrop(image, signed=signed)[..., None]
    finite = torch.isfinite(map).cpu().numpy()
    opacity = np.where(finite, alpha * light[..., 3], 1.0)[..., None]
    return opacity * light[..., :3] + (1 - opacity) * behind


def without_photo(light: Array, signed: bool, colours: Colours | None) -> Array:
    """Return a layer as it is without a photo: own signed colours fade to white, all others are opaque."""
    if colours is not None or not signed:
        return light[..., :3]
    return 1.0 - light[..., 3:] * (1.0 - light[..., :3])


def backdrop(image: Tensor, *, signed: bool = False) -> Array:
    """Return the photo as `overlay` shows it under a map: (H, W) grey in [0, 1] for an image (C, H, W).

    It is pale under a map with a sign, and dim under one without.
    """
    dark, more = LIGHT if signed else DIM
    return cast(Array, dark + more * (photo(image) @ np.array([0.2126, 0.7152, 0.0722])))


def layer(map: Tensor, *, signed: bool, bounds: tuple[float, float] | None = None, colours: Colours | None = None) -> Array:
    """Return what `overlay` puts on the backdrop, its opacity as fourth channel.

    Args:
        map: (H, W), one number per pixel. Pixels that are not finite are hatched in grey, opaque.
        signed: diverging colours, or sequential ones.
        bounds: (low, high) of the colours; `limits(map)` by default.
        colours: a matplotlib colour map, or its name, for `palette`.

    Returns:
        (H, W, 4) in [0, 1], colours not multiplied by the opacity.

    Raises:
        TypeError: `map` is no tensor, or `colours` is of another type.
        ValueError: `map` is not 2-D, or an unknown colour map.
    """
    where = "pysal.viz.layer"
    values = as_numpy(check_tensor(where, "map", map, ndim=2))
    finite = np.isfinite(values)
    given = check_colours(where, colours)
    shown, opacity = colours_of(np.where(finite, values, 0.0), bounds or limits(map, signed=signed), signed, given)
    rows, columns = np.indices(values.shape)
    stripe = (rows + columns) // max(2, min(values.shape) // 50) % 2
    shown = np.where(finite[..., None], shown, np.where(stripe, 0.78, 0.45)[..., None])
    return np.concatenate([shown, np.where(finite, opacity, 1.0)[..., None]], -1)


def colours_of(
    values: Array, bounds: tuple[float, float], signed: bool, colours: Colormap | None = None
) -> tuple[Array, Array]:
    """Return colour (..., 3) and opacity (...) of values."""
    low, high = bounds
    size = max(-low, high)
    if size == 0:
        return np.zeros((*values.shape, 3)), np.zeros(values.shape)
    fraction = (values - low) / (high - low)
    if signed:  # as ink: linear, so that noise stays as weak as it is
        opacity = np.abs(values / size).clip(0.0, 1.0)
    else:  # as light: weak values stay visible
        opacity = fraction.clip(0.0, 1.0) ** 0.65
    if colours is not None:
        return np.asarray(colours(fraction.clip(0.0, 1.0)), np.float64)[..., :3], opacity
    if signed:  # the ends of the palette, which opacity pales as the palette pales towards zero
        return palette(True)[np.where(values < 0, 0, 510)], opacity
    return palette(False)[np.rint(fraction.clip(0.0, 1.0) * 510).astype(np.int64)], opacity


def as_numpy(tensor: Tensor) -> Array:
    """Return a tensor of any device and real dtype as a float64 array."""
    return cast(Array, tensor.detach().cpu().double().numpy())
