"""Which classes a class is told from."""

import torch
from torch import Tensor


def most_alike(scores: Tensor, target: int | None) -> Tensor:
    """Return the classes (B, K) in the order of how far their scores are from that of a class, which comes first.

    Args:
        scores: (B, K).
        target: the class; None = each image's highest.
    """
    chosen = scores.amax(1) if target is None else scores[:, target]
    return torch.sort((scores - chosen[:, None]).abs(), dim=1, stable=True).indices
