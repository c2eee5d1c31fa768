"""Guided Integrated Gradients of one image in plain NumPy: what tests hold the method to."""

import math
from collections.abc import Generator
from typing import Any

import numpy as np


def guided_path(start: np.ndarray, end: np.ndarray, **given: Any) -> Generator[np.ndarray, np.ndarray, None]:
    """Yield the points of the authors' path, each for its gradient, and then the map.

    Value by value: sorted gradients in place of quantiles, one wave of values after the other.
    """
    steps, fraction, max_distance = given["steps"], given["fraction"], given["max_distance"]
    place, total, way = start.copy(), np.zeros(start.shape), end - start
    whole = math.fsum(np.abs(way).ravel())
    for step in range(1, steps + 1):
        found, before = (yield place.copy()), place.copy()
        least, most = (start + way * min(max(step / steps + d, 0), 1) for d in (-max_distance, max_distance))
        behind = np.abs(end - place) > np.abs(end - least)
        place[behind] = least[behind]
        size = np.abs(found)
        while (missing := math.fsum(np.abs(end - place).ravel()) - whole * (1 - step / steps)) > 1e-9 * whole:
            size[place == most] = math.inf
            limit = np.sort(size, axis=None)[int(fraction * (size.size - 1))]
            chosen = (size <= limit) & (place != most)
            reach = math.fsum(np.abs(most - place)[chosen])
            share = min(1.0, missing / reach)
            place[chosen] = most[chosen] if share == 1 else (place + share * (most - place))[chosen]
        total += (place - before) * found
    yield total
