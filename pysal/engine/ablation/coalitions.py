"""Sets of features that are present together: what each adds in an order, its Shapley value, and linear fits to all of them."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Of the duality gap of a lasso, relative to the variance it explains.
GAP = 1e-10
SWEEPS = 10_000


def sampled_values(orders: Sequence[Sequence[int]], features: int, worth: Callable[[NDArray[np.bool_]], Tensor]) -> Tensor:
    """Return the mean of what each feature adds to those before it, (F, ...), float64 on the CPU.

    Args:
        orders: of the features, each from nothing on; what an order lacks stays away.
        features: F.
        worth: sets of features, (n, F), each once -> (n, ...).
    """
    chains = np.zeros((len(orders), features + 1, features), dtype=bool)
    for chain, order in zip(chains, orders, strict=True):
        for step, feature in enumerate(order):
            chain[step + 1 :, feature] = True
    flat = chains.reshape(-1, features)
    chosen, places = np.unique(flat, axis=0, return_inverse=True)
    values = worth(chosen).cpu().double()
    along = values[torch.from_numpy(places.reshape(len(orders), -1))]
    total = values.new_zeros((features, *values.shape[1:]))
    for gains, order in zip(along.diff(dim=1), orders, strict=True):
        total[torch.tensor(list(order), dtype=torch.int64, device="cpu")] += gains[: len(order)]
    return total / len(orders)


def exact_values(features: int, worth: Callable[[NDArray[np.bool_]], Tensor]) -> Tensor:
    """Return the Shapley values (F, ...), float64 on the CPU, from the worth of all 2^F sets.

    Args:
        features: F.
        worth: see `sampled_values`.

    Source:
        Shapley 1953, A value for n-person games.
    """
    chosen = np.array(list(itertools.product((False, True), repeat=features)), dtype=bool).reshape(-1, features)
    values = worth(chosen).cpu().double()
    sizes = chosen.sum(1)
    found = []
    for feature in range(features):
        have = chosen[:, feature]
        with_it, without = np.flatnonzero(have), np.flatnonzero(~have)  # in the same order of all others
        others = sizes[without]
        weights = [math.factorial(n) * math.factorial(features - 1 - n) / math.factorial(features) for n in others.tolist()]
        gains = values[torch.from_numpy(with_it)] - values[torch.from_numpy(without)]
        found.append(torch.tensordot(values.new_tensor(weights), gains, 1))
    return torch.stack(found) if found else values.new_zeros((0, *values.shape[1:]))


def least_squares(sets: NDArray[np.float64], values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the coefficients (F,) of a weighted linear fit with an intercept, the shortest where there are several.

    Args:
        sets: (n, F).
        values: (n,).
        weights: (n,) >= 0.
    """
    if not np.isfinite(values).all():
        return np.full(sets.shape[1], np.nan)
    centred, target, roots = _centred(sets, values, weights)
    return np.asarray(np.linalg.lstsq(centred * roots[:, None], target * roots, rcond=None)[0], dtype=np.float64)


def lasso(
    sets: NDArray[np.float64], values: NDArray[np.float64], weights: NDArray[np.float64], penalty: float
) -> NDArray[np.float64]:
    """Return b (F,) of the least sum(w (y - X b - c)^2) / (2 sum(w)) + penalty |b|_1, by coordinate descent.

    Args:
        sets: (n, F).
        values: (n,).
        weights: (n,) >= 0.
        penalty: >= 0.

    Source:
        Tibshirani 1996; Friedman, Hastie and Tibshirani 2010, section 2.
    """
    if not np.isfinite(values).all():
        return np.full(sets.shape[1], np.nan)
    centred, target, roots = _centred(sets, values, weights)
    scale = weights.sum()
    design, goal = centred * (roots / np.sqrt(scale))[:, None], target * roots / np.sqrt(scale)
    found, left, squares = np.zeros(sets.shape[1]), goal.copy(), (design**2).sum(0)
    enough = GAP * max(float(goal @ goal), np.finfo(float).tiny)
    for _ in range(SWEEPS):
        for i in np.flatnonzero(squares):
            along = design[:, i] @ left + squares[i] * found[i]
            after = np.sign(along) * max(abs(along) - penalty, 0.0) / squares[i]
            left = left - design[:, i] * (after - found[i])
            found[i] = after
        slack = np.abs(design.T @ left).max(initial=0.0)
        shrunk = left * (min(1.0, penalty / slack) if slack > penalty else 1.0)
        gap = (left @ left + shrunk @ shrunk) / 2 - goal @ shrunk + penalty * np.abs(found).sum()
        if gap <= enough:
            break
    return found


def _centred(
    sets: NDArray[np.float64], values: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the sets and the values less their weighted means, which an intercept takes, and the roots of the weights."""
    share = weights / weights.sum()
    return sets - share @ sets, values - share @ values, np.sqrt(weights)
