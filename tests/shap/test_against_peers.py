"""The same games in shap and shapiq: Owen values on the same tree, Shapley values, and interactions of pairs."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import pysal
from pysal.engine.ablation import owen
from tests.methods.networks import images, rectified

FEATURES = 8
# of sums of at most 2^8 products of numbers around the largest worth, in both
ROUNDING = 2**FEATURES * np.finfo(np.float64).eps
BINARY: list[Any] = [
    (((0, 1), (2, 3)), ((4, 5), (6, 7))),
    (0, (1, (2, (3, (4, (5, (6, 7))))))),
    (((7, 2), 5), ((0, (6, 1)), (4, 3))),
]


def labels() -> Tensor:
    """Eight segments of different sizes."""
    found = torch.arange(8)[:, None] // 4 * 4 + torch.arange(9) // 2
    return found.clamp_max(7)


def worth_of(inputs: Tensor, fill: float) -> NDArray[np.float64]:
    """The raw score of class 1 with each set of segments shown, by the bits of its number."""
    sets = torch.arange(1 << FEATURES)
    shown = (sets[:, None, None] >> labels() & 1).bool()[:, None]
    with torch.no_grad():
        return rectified()(torch.where(shown, inputs, fill))[:, 1].numpy()


def game_of(worth: NDArray[np.float64]) -> Any:
    return lambda sets: worth[np.asarray(sets, bool).reshape(-1, FEATURES) @ (1 << np.arange(FEATURES))]


def linkage(tree: Any) -> NDArray[np.float64]:
    """A binary tree as SciPy has it: for each merge its two parts, its height and its size."""
    merges: list[tuple[float, float, float, float]] = []

    def number(node: Any) -> tuple[int, int]:
        if isinstance(node, int):
            return node, 1
        (left, one), (right, other) = number(node[0]), number(node[1])
        merges.append((left, right, 1.0 + len(merges), one + other))
        return FEATURES + len(merges) - 1, one + other

    number(tree)
    return np.array(merges)


class Masker:
    """Shows the features of a mask to a game of masks."""

    shape = (1, FEATURES)

    def __init__(self, tree: Any) -> None:
        self.clustering = linkage(tree)

    def __call__(self, mask: NDArray[np.bool_], _x: NDArray[np.float64]) -> NDArray[np.float64]:
        return mask[None].astype(np.float64)


@pytest.mark.parametrize("tree", BINARY, ids=str)
def test_owen_values_are_those_of_shaps_partition_explainer(tree: Any, peers: tuple[Any, Any]) -> None:
    inputs = images(1, 3, 8, 9)
    worth = worth_of(inputs, 0.3)
    explainer = peers[0](game_of(worth), Masker(tree))
    expected = explainer(np.ones((1, FEATURES)), max_evals=100_000, silent=True).values[0]
    given = {"shapley": {"segments": labels(), "fill": 0.3, "tree": tree}}
    found = pysal.explain(rectified(), inputs, 1, methods="shapley", score="raw", method_options=given)["shapley"]
    assert found.details["exact"].all()
    values = found.details["values"][0].numpy()
    assert np.abs(values - expected).max() <= ROUNDING * np.abs(worth).max()


def test_shapley_values_and_interactions_are_those_of_shapiq(peers: tuple[Any, Any]) -> None:
    inputs = images(1, 3, 8, 9)
    worth = worth_of(inputs, 0.3)
    exact = peers[1](n_players=FEATURES, game=game_of(worth))
    bound = ROUNDING * np.abs(worth).max()
    options = {"segments": labels(), "fill": 0.3}
    given = {"shapley": {**options, "tree": "flat"}}
    found = pysal.explain(rectified(), inputs, 1, methods="shapley", score="raw", method_options=given)["shapley"]
    values = found.details["values"][0].numpy()
    assert np.abs(values - exact("SV", order=1).get_n_order_values(1)).max() <= bound
    # second differences in the company of all others: what shapiq calls the co-Möbius transform
    interactions = pysal.interactions(rectified(), inputs, 1, score="raw", **options)
    expected = exact("Co-Moebius", order=2).get_n_order_values(2)
    matrix = interactions.matrix().numpy()
    pairs = np.array([*itertools.combinations(range(FEATURES), 2)]).T
    assert np.abs(matrix[tuple(pairs)] - expected[tuple(pairs)]).max() <= bound
    assert np.abs(expected[tuple(pairs)]).max() > 1e6 * bound, "there is something to agree on"


def test_a_budget_leaves_no_bias_where_shap_shares_the_rest_equally(peers: tuple[Any, Any]) -> None:
    """Of a game with one feature that counts, a budget too small for its branch spreads its value over others in shap."""
    worth = (np.arange(1 << FEATURES) >> 3 & 1).astype(np.float64)
    tree = BINARY[1]
    explainer = peers[0](game_of(worth), Masker(tree))
    coarse = explainer(np.ones((1, FEATURES)), max_evals=8, silent=True).values[0]
    assert np.count_nonzero(coarse) > 1
    gains = owen.sampled_gains(tree, 2, np.random.default_rng(0))
    values, errors = gains.values(worth[gains.sets])
    assert values.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert not errors.any()
