"""How far what is computed another way is from what it should be."""

import torch
from torch import Tensor

from pysal._library import widened


def distance(got: object, expected: Tensor, norm: float = 2) -> float:
    """Return how far one tensor is from another, relative to its size; infinity for no tensor, or one of another shape.

    Infinities and NaN in the same places, as those of scores that a model masks, are no distance.
    """
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return float("inf")
    got, expected = widened(got), widened(expected)
    if not bool(expected.isfinite().all()):
        same = (got == expected) | (got.isnan() & expected.isnan())
        if not bool((same | expected.isfinite()).all()):
            return float("inf")
        got, expected = got.masked_fill(same, 0.0), expected.masked_fill(same, 0.0)
    size = torch.linalg.vector_norm(expected, norm).clamp_min(1e-30)
    return float(torch.linalg.vector_norm(got - expected, norm) / size)
