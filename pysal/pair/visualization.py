"""PAIR's pictures of a mask: one channel with values between 0 and 1."""

import numpy as np
from numpy.typing import ArrayLike

from pysal._checks import refuse
from pysal.pair.base import Array

__all__ = ["VisualizeImageDiverging", "VisualizeImageGrayscale"]


def VisualizeImageGrayscale(image_3d: ArrayLike, percentile: float = 99) -> Array:
    """Return the strength of a mask, (H, W): the sum of |values| over channels, 0 at its least and 1 at its percentile.

    A mask whose percentile is its least value is 0 there and 1 above: the limit of its neighbours. PAIR returns NaN.

    Args:
        image_3d: (H, W, C).
        percentile: 0 to 100.

    Raises:
        ValueError: image_3d is no mask with channels, or percentile is outside 0 to 100.
    """
    strength = np.sum(np.abs(_mask(image_3d, percentile)), axis=2)
    low, high = np.min(strength), np.percentile(strength, percentile)
    return _between(strength, low, high, 0.0, 0.0)


def VisualizeImageDiverging(image_3d: ArrayLike, percentile: float = 99) -> Array:
    """Return the sum of a mask over channels, (H, W): 0.5 where it is zero and 1 at |its percentile|; at least -1, at most 1.

    A mask whose percentile is zero is 0.5 where it is zero, 1 above and -1 below: the limit of its neighbours. PAIR gives NaN.

    Args:
        image_3d: (H, W, C).
        percentile: 0 to 100.

    Raises:
        ValueError: image_3d is no mask with channels, or percentile is outside 0 to 100.
    """
    total = np.sum(_mask(image_3d, percentile), axis=2)
    span = np.abs(np.percentile(total, percentile))
    return _between(total, -span, span, 0.5, -1.0)


def _mask(image_3d: ArrayLike, percentile: float) -> Array:
    mask = np.asarray(image_3d)
    if mask.ndim != 3 or not mask.size:
        refuse("pysal.pair", "image_3d", "be a mask (H, W, C)", f"shape {mask.shape}")
    if not 0 <= percentile <= 100:
        refuse("pysal.pair", "percentile", "be 0 to 100", percentile)
    return mask


def _between(values: Array, low: float, high: float, middle: float, least: float) -> Array:
    """Return (values - low) / (high - low) within [least, 1]; `middle` where all three are equal."""
    if low == high:
        return np.where(values == low, middle, np.where(values > low, 1.0, least)).astype(np.result_type(values, np.float32))
    scaled: Array = np.clip((values - low) / (high - low), least, 1)
    return scaled
