"""Rules of quadrature: what they integrate exactly, and how they nest, move and share their nodes."""

import numpy as np
import pytest

from pysal.engine.paths.quadrature import QUADRATURES, Rule, in_panels, placed, refined, rule, steps_per_panel

EPS = np.finfo(np.float64).eps
STEPS = [1, 2, 3, 8, 50, 257]


def monomial(of: Rule, power: int) -> float:
    return float((of.weights * of.nodes**power).sum())


def assert_sum(value: float, expected: float, terms: int) -> None:
    """Equal but for the rounding of a sum of `terms` products of positive numbers that add up to at most 1."""
    assert abs(value - expected) <= 4 * terms * EPS


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_weights_sum_to_one_and_nodes_are_on_the_path(quadrature: str, steps: int) -> None:
    counts = np.array([steps, 1, 3])
    for one in (rule(quadrature, steps), in_panels(quadrature, counts)):
        assert_sum(one.weights.sum(), 1.0, len(one.weights))
        assert (one.weights > 0).all()
        assert (one.nodes >= 0).all()
        assert (one.nodes <= 1).all()
        assert (np.diff(one.nodes) >= 0).all()
        assert one.edges[0] == 0
        assert one.edges[-1] == 1
        assert (np.diff(one.edges) > 0).all()
    assert len(rule(quadrature, steps).nodes) == steps
    assert len(in_panels(quadrature, counts).nodes) == steps + 4


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_degree_of_exactness(quadrature: str, steps: int) -> None:
    one = rule(quadrature, steps)
    exact = {"left": 0, "right": 0, "midpoint": 1, "trapezoid": 1, "gauss_legendre": 2 * steps - 1}[quadrature]
    for power in range(min(exact, 40) + 1):
        assert_sum(monomial(one, power), 1 / (power + 1), steps)
    if exact < 40:  # and no more than that
        assert abs(monomial(one, exact + 1) - 1 / (exact + 2)) > 100 * steps * EPS


def test_left_and_right_contain_their_end() -> None:
    assert rule("left", 4).nodes.tolist() == [0, 0.25, 0.5, 0.75]
    assert rule("right", 4).nodes.tolist() == [0.25, 0.5, 0.75, 1]
    assert rule("midpoint", 2).nodes.tolist() == [0.25, 0.75]
    assert rule("trapezoid", 3).nodes.tolist() == [0, 0.5, 1]
    assert rule("trapezoid", 3).weights.tolist() == [0.25, 0.5, 0.25]
    assert rule("trapezoid", 1).nodes.tolist() == [0.5]


@pytest.mark.parametrize("steps", [1, 2, 5, 60])
@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_placed_rules_integrate_over_the_position(quadrature: str, steps: int) -> None:
    moved = placed(rule(quadrature, steps), quadrature, np.square, lambda t: 2 * t)
    assert np.array_equal(moved.nodes, rule(quadrature, steps).nodes ** 2)
    if quadrature == "gauss_legendre":  # integrates p(a(t)) a'(t) exactly: degree 2 steps - 1 in t, of which a' takes 1
        for power in range(min(steps, 20)):
            assert_sum(monomial(moved, power), 1 / (power + 1), steps)
    assert_sum(moved.weights.sum(), 1.0, steps)
    wide = placed(rule(quadrature, steps), quadrature, lambda t: 7 * t, lambda t: np.full_like(t, 7.0))
    assert_sum(wide.weights.sum() / 7, 1.0, steps)


def test_rules_converge_on_a_smooth_function() -> None:
    for quadrature, order in (("left", 1), ("right", 1), ("midpoint", 2), ("trapezoid", 2)):
        errors = [abs((rule(quadrature, n).weights * np.exp(rule(quadrature, n).nodes)).sum() - np.expm1(1)) for n in (65, 129)]
        # halving the step divides the leading term of the error by 2^order; the next term is 1/64 of it at most
        assert 0.9 * 2**order < errors[0] / errors[1] < 1.1 * 2**order, quadrature


@pytest.mark.parametrize("cells", [[1], [16], [3, 1, 4], [1] * 8])
def test_halves_of_a_refinement_interleave(cells: list[int]) -> None:
    counts = np.array(cells)
    whole = refined(0, counts)
    for level in range(1, 5):
        new = refined(level, counts)
        assert_sum(new.weights.sum(), 1.0, len(new.nodes))
        nodes = np.concatenate([whole.nodes, new.nodes])
        weights = np.concatenate([whole.weights, new.weights]) / 2
        order = np.argsort(nodes)
        whole = Rule(nodes[order], weights[order])
        expected = refined(0, counts * 2**level)
        np.testing.assert_allclose(whole.nodes, expected.nodes, rtol=0, atol=4 * EPS)
        np.testing.assert_allclose(whole.weights, expected.weights, rtol=0, atol=4 * EPS)
        assert (np.diff(whole.nodes) > 0).all(), "a node is taken twice"


def test_refinement_of_one_panel_is_the_trapezoid_rule() -> None:
    for cells in (1, 5, 16):
        first, trapezoid = refined(0, np.array([cells])), rule("trapezoid", cells + 1)
        assert np.array_equal(first.nodes, trapezoid.nodes)
        assert np.array_equal(first.weights, trapezoid.weights)


CHANGES = {
    "even": [1.0] * 8,
    "none": [0.0] * 8,
    "one": [100.0, *[0.0] * 7],
    "squares": [1.0, -4.0, 9.0, -16.0, 25.0, -36.0, 49.0, -64.0],
    "tiny": [1e-300] * 8,
    "infinite": [np.inf, *[1.0] * 7],
    "not a number": [np.nan] * 8,
}


@pytest.mark.parametrize("steps", [8, 9, 50, 333])
@pytest.mark.parametrize("name", CHANGES)
def test_steps_shared_over_panels(name: str, steps: int) -> None:
    changes = CHANGES[name]
    counts = steps_per_panel(np.array(changes, dtype=np.float64), steps)
    assert counts.sum() == steps
    assert (counts >= 1).all()
    shares = np.sqrt(np.abs(changes))
    if np.isfinite(shares).all() and shares.sum() > 0:
        exact = 1 + shares / shares.sum() * (steps - 8)
        assert (np.abs(counts - exact) < 1).all()
    else:
        assert counts.max() - counts.min() <= 1


def test_steps_go_with_the_square_root_of_the_change() -> None:
    assert steps_per_panel(np.array([1.0, -4.0, 9.0, 16.0]), 104).tolist() == [11, 21, 31, 41]
