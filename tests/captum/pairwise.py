"""Few combinations in which any two values of any two arguments meet: what one argument does to another shows in them."""

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return combinations of one value per axis, such that every pair of values of two axes is in one of them."""
    candidates = list(itertools.product(*(range(len(axis)) for axis in axes)))
    left = {pair for one in candidates for pair in _pairs(one)}
    found = []
    while left:
        best = max(candidates, key=lambda one: len(left.intersection(_pairs(one))))
        left.difference_update(_pairs(best))
        found.append(tuple(axis[i] for axis, i in zip(axes, best, strict=True)))
    return found


def _pairs(one: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    return list(itertools.combinations(enumerate(one), 2))
