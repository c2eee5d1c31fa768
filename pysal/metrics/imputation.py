"""Removed pixels filled in from those around them, so that where pixels are missing does not show."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import spsolve
from torch import Tensor

# (row, column) of a neighbour and what it counts; they add up to 1.
Neighbours = Sequence[tuple[tuple[int, int], float]]
NEIGHBOURS: Neighbours = [
    *[((row, column), 1 / 6) for row, column in ((0, 1), (0, -1), (1, 0), (-1, 0))],
    *[((row, column), 1 / 12) for row, column in ((1, 1), (-1, 1), (1, -1), (-1, -1))],
]


def linear_imputation(image: Tensor, kept: Tensor, neighbours: Neighbours = NEIGHBOURS) -> Tensor:
    """Return an image whose removed pixels are each the weighted mean of their neighbours inside the image.

    Args:
        image: (C, H, W), floating point.
        kept: (H, W), bool: the pixels that stay.
        neighbours: offsets and weights; where some lie outside, the others count the more.

    Returns:
        (C, H, W), of the image's dtype and device; NaN where nothing is kept to go by.

    Source:
        Rong et al. 2022, arXiv:2202.00449, section 4.
    """
    filled = image.clone()
    missing = ~kept.cpu().numpy()
    number = int(missing.sum())
    if not number:
        return filled
    if missing.all():
        return torch.full_like(image, torch.nan)
    row, column = np.nonzero(missing)
    height, width = missing.shape
    unknown = np.full(missing.shape, -1)
    unknown[row, column] = np.arange(number)
    values = image.detach().cpu().double().numpy()
    weights = np.zeros(number)
    right = np.zeros((number, len(image)))
    entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for (down, across), weight in neighbours:
        inside = (row + down >= 0) & (row + down < height) & (column + across >= 0) & (column + across < width)
        own = np.flatnonzero(inside)
        there = row[own] + down, column[own] + across
        weights[own] += weight
        other = unknown[there]
        known = other < 0
        right[own[known]] += weight * values[:, there[0][known], there[1][known]].T
        entries.append((own[~known], other[~known], np.full((~known).sum(), -weight)))
    entries.append((np.arange(number), np.arange(number), weights))
    rows, columns, numbers = (np.concatenate(some) for some in zip(*entries, strict=True))
    system = coo_matrix((numbers, (rows, columns)), shape=(number, number)).tocsc()
    found = np.asarray(spsolve(system, right)).reshape(number, len(image))
    filled[:, torch.from_numpy(missing).to(image.device)] = torch.from_numpy(found.T).to(filled)
    return filled
