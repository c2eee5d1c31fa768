"""How far what is computed another way is from what it should be."""

import torch
from torch import Tensor


def distance(got: object, expected: Tensor, norm: float = 2) -> float:
    """Return how far one tensor is from another, relative to its size; infinity for no tensor, or one of another shape."""
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return float("inf")
    size = torch.linalg.vector_norm(expected.double(), norm).clamp_min(1e-30)
    return float(torch.linalg.vector_norm(got.double() - expected.double(), norm) / size)
