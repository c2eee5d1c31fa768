"""A map in the colours of a heat map, laid over a photo, and what is drawn of other numbers than maps."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Values = NDArray[Any]


def jet(levels: Pixels) -> Pixels:
    """Return the colours (..., 3), red first, of levels 0 to 255: from blue over green to red, as OpenCV's JET."""
    level = levels.astype(np.int64)
    red = np.minimum(4 * level - 382, 1148 - 4 * level)
    green = np.minimum(4 * level - 128, 892 - 4 * level)
    blue = np.minimum(4 * level + 128, 638 - 4 * level) - (level == 159)  # OpenCV's table has 1 there, not 2
    return np.asarray(np.clip(np.stack([red, green, blue], -1), 0, 255), dtype=np.uint8)


def blended(photo: Values, colours: Pixels, weight: float) -> Pixels:
    """Return `weight` times the photo and the rest colours, as bright as its brightest value allows.

    Args:
        photo: (H, W, 3), in [0, 1].
        colours: (H, W, 3).
        weight: of the photo, in [0, 1].
    """
    mixed = (1 - weight) * (np.float32(colours) / 255) + weight * photo
    largest = float(np.max(mixed))
    return np.asarray(255 * (mixed / largest if largest > 0 else mixed)).astype(np.uint8)


def around_grey(values: Values) -> Pixels:
    """Return any numbers as a picture: their mean is grey, a standard deviation a tenth of the range."""
    spread = (values - np.mean(values)) / (np.std(values) + 1e-5)
    return np.asarray(np.clip(0.1 * spread + 0.5, 0, 1) * 255).astype(np.uint8)


def factors(photo: Values, maps: Values, colours: Sequence[Values] | None, weight: float) -> Pixels:
    """Return several maps over a photo, every pixel in the colour of the map that is largest there, as bright as that map.

    Args:
        photo: (H, W, 3), in [0, 1].
        maps: (N, H, W), in [0, 1].
        colours: N of them, (3,) or more, in [0, 1]; None = a rainbow.
        weight: of the photo, in [0, 1].
    """
    number = len(maps)
    hues = colours if colours is not None else [np.array(colormaps["gist_rainbow"](n / number)) for n in range(number)]
    full = np.stack([_at_full_brightness(one) for one in hues])
    first = maps.argmax(0)
    bright = np.floor(255 * maps.max(0)) / 255
    mixed = weight * photo + (1 - weight) * full[first] * bright[..., None]
    return np.asarray(255 * mixed).astype(np.uint8)


def _at_full_brightness(colour: Values) -> Values:
    hue, saturation, _ = colorsys.rgb_to_hsv(*(float(part) for part in colour[:3]))
    return np.array(colorsys.hsv_to_rgb(hue, saturation, 1.0))
