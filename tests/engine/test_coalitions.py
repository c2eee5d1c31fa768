"""Values of features in sets, and linear fits to sets, against closed forms and conditions of optimality."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal.engine.ablation.coalitions import exact_values, lasso, least_squares, sampled_values

EPS = np.finfo(np.float64).eps


def game(rule: Callable[[NDArray[np.bool_]], float]) -> Callable[[NDArray[np.bool_]], Tensor]:
    return lambda sets: torch.tensor([rule(one) for one in sets], dtype=torch.float64)


def test_gloves() -> None:
    """One left glove and two right ones make a pair worth 1: the left is worth 2/3, each right one 1/6."""
    found = exact_values(3, game(lambda one: float(one[0] and (one[1] or one[2]))))
    assert torch.allclose(found, torch.tensor([2 / 3, 1 / 6, 1 / 6], dtype=torch.float64), rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("features", [1, 2, 5])
def test_exact_values_are_the_mean_over_all_orders(features: int) -> None:
    draw = torch.Generator().manual_seed(0)
    worths = torch.randn(2**features, 3, generator=draw, dtype=torch.float64)  # three outputs of each set

    def worth(sets: NDArray[np.bool_]) -> Tensor:
        return worths[torch.from_numpy(sets.astype(np.int64) @ (2 ** np.arange(features)))]

    exact = exact_values(features, worth)
    sampled = sampled_values(list(itertools.permutations(range(features))), features, worth)
    assert exact.shape == (features, 3)
    assert float((exact - sampled).abs().max()) <= 64 * EPS * float(worths.abs().max())
    assert float((exact.sum(0) - (worths[-1] - worths[0])).abs().max()) <= 64 * EPS * float(worths.abs().max())


def test_no_set_runs_twice() -> None:
    seen: list[tuple[bool, ...]] = []

    def worth(sets: NDArray[np.bool_]) -> Tensor:
        seen.extend(map(tuple, sets.tolist()))
        return torch.from_numpy(sets.sum(1).astype(np.float64))

    orders = [np.random.default_rng(i).permutation(3).tolist() for i in range(50)]
    assert sampled_values(orders, 3, worth).tolist() == [1.0, 1.0, 1.0]
    assert len(seen) == len(set(seen)) <= 8


def table(samples: int, features: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    draw = np.random.default_rng(3)
    sets = draw.integers(0, 2, (samples, features)).astype(np.float64)
    return sets, draw.normal(size=samples), draw.uniform(0.1, 2, samples)


def test_a_linear_function_is_fitted() -> None:
    sets, _, weights = table(60, 7)
    slopes = np.arange(7.0) - 3
    found = least_squares(sets, sets @ slopes + 5, weights)
    assert np.abs(found - slopes).max() <= 1000 * EPS * np.abs(slopes).max()


def test_a_fit_leaves_nothing_along_its_columns() -> None:
    sets, values, weights = table(60, 7)
    found = least_squares(sets, values, weights)
    left = values - sets @ found
    left = left - weights @ left / weights.sum()
    centred = sets - weights @ sets / weights.sum()
    assert np.abs(centred.T @ (weights * left)).max() <= 1000 * EPS * np.abs(values).sum()


def test_of_many_fits_the_shortest_is_taken() -> None:
    sets, values, weights = table(4, 9)
    found = least_squares(sets, values, weights)
    centred = sets - weights @ sets / weights.sum()
    null = np.eye(9) - np.linalg.pinv(centred) @ centred  # what could be added without another fit
    assert np.abs(null @ found).max() <= 1000 * EPS * np.abs(found).max()


@pytest.mark.parametrize("samples", [5, 60])
@pytest.mark.parametrize("penalty", [0.001, 0.02, 0.1])
def test_a_lasso_satisfies_its_conditions(samples: int, penalty: float) -> None:
    """Karush-Kuhn-Tucker: slopes of the squares are -penalty sign(b), and within it where b is 0; to the gap's root."""
    sets, values, weights = table(samples, 7)
    found = lasso(sets, values, weights, penalty)
    share = weights / weights.sum()
    left = values - sets @ found
    left = left - share @ left
    along = (sets - share @ sets).T @ (share * left)
    allowed = 1e-4 * penalty + 1e-4 * np.sqrt(share @ values**2)
    assert (np.abs(along) <= penalty + allowed).all()
    assert (np.abs(along - penalty * np.sign(found))[found != 0] <= allowed).all()


def test_a_lasso_between_its_ends() -> None:
    sets, values, weights = table(60, 7)
    assert not lasso(sets, values, weights, 10.0).any()
    least = least_squares(sets, values, weights)
    assert np.abs(lasso(sets, values, weights, 0.0) - least).max() <= 1e-4 * np.abs(least).max()
    sets[:, 2] = 1.0  # a feature that is always there
    assert lasso(sets, values, weights, 0.001)[2] == 0.0
    assert not lasso(sets, values * 0, weights, 0.001).any()
