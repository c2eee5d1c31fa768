"""Where the steps of a path integral stand and what they weigh."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Quadrature: TypeAlias = Literal["gauss_legendre", "midpoint", "left", "right", "trapezoid"]
Placement: TypeAlias = Literal["uniform", "squared", "adaptive"]
QUADRATURES: tuple[str, ...] = get_args(Quadrature)
PLACEMENTS: tuple[str, ...] = get_args(Placement)
Array: TypeAlias = NDArray[np.float64]
Map: TypeAlias = Callable[[Array], Array]

# Their nodes are eigenvalues, which take longer than a pass of a small network.
_leggauss = functools.lru_cache(np.polynomial.legendre.leggauss)


@dataclass(frozen=True)
class Rule:
    """A quadrature rule on [0, 1]: the integral of g is about sum_k weights[k] g(nodes[k]), with sum(weights) = 1."""

    nodes: Array
    weights: Array

    @property
    def edges(self) -> Array:
        """Ends of the cells whose widths are the weights, (len + 1,), from 0 to 1."""
        edges: Array = np.concatenate([[0.0], np.cumsum(self.weights)])
        edges[-1] = 1.0  # not 1 - 1e-16
        return edges


def rule(quadrature: Quadrature, steps: int) -> Rule:
    """Return the rule with `steps` nodes; the weights of every rule sum to 1.

    Source: trapezoid and Riemann sums as usual; Gauss-Legendre nodes mapped from [-1, 1] to [0, 1].
    """
    k = np.arange(steps, dtype=np.float64)
    equal = np.full(steps, 1.0 / steps)
    if quadrature == "gauss_legendre":
        nodes, weights = _leggauss(steps)
        return Rule((nodes + 1) / 2, weights / 2)
    if quadrature == "midpoint":
        return Rule((k + 0.5) / steps, equal)
    if quadrature == "left":
        return Rule(k / steps, equal)
    if quadrature == "right":
        return Rule((k + 1) / steps, equal)
    if steps == 1:  # a trapezoid needs two ends; with one node it is the midpoint rule
        return Rule(np.array([0.5]), equal)
    weights = np.full(steps, 1.0 / (steps - 1))
    weights[[0, -1]] /= 2
    return Rule(k / (steps - 1), weights)


def placed(base: Rule, quadrature: Quadrature, position: Map, slope: Map) -> Rule:
    """Move the nodes of a rule in t along the map position(t), so that it integrates over the position.

    Weights are multiplied by the slope, position'(t), which keeps the order of accuracy of the rules and of their
    combinations: error control adds up a trapezoid rule and midpoint rules. The left and right rules take the widths of their
    cells after the move, so that their weights, too, add up to position(1) - position(0).
    """
    if quadrature in ("left", "right"):
        return Rule(position(base.nodes), np.diff(position(base.edges)))
    return Rule(position(base.nodes), base.weights * slope(base.nodes))


def in_panels(quadrature: Quadrature, counts: NDArray[np.int64]) -> Rule:
    """Return the composite rule with counts[i] nodes in the i-th of len(counts) equal panels of [0, 1]."""
    panels = len(counts)
    rules = [rule(quadrature, int(count)) for count in counts]
    nodes = np.concatenate([(i + one.nodes) / panels for i, one in enumerate(rules)])
    return Rule(nodes, np.concatenate([one.weights / panels for one in rules]))


def steps_per_panel(changes: Array, steps: int) -> NDArray[np.int64]:
    """Share `steps` out over panels in proportion to sqrt(|change of f| over the panel), at least one each.

    Source: after Bhat and Raychowdhury 2023, arXiv:2302.11107.
    """
    panels = len(changes)
    share = np.sqrt(np.abs(changes))
    share = share / share.sum() if 0 < share.sum() < np.inf else np.full(panels, 1.0 / panels)
    spare = steps - panels
    exact = share * spare
    counts = np.floor(exact).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: spare - int(counts.sum())]:  # largest remainders first
        counts[i] += 1
    shared: NDArray[np.int64] = counts + 1
    return shared


def refined(level: int, cells: NDArray[np.int64]) -> Rule:
    """Return the part that level `level` adds to a nested trapezoid rule over equal panels of [0, 1].

    Level 0 is the trapezoid rule with cells[i] cells in panel i. Each further level halves the cells; its nodes are the middles
    of the cells of the level before. So the nodes so far are a trapezoid rule and the new ones a midpoint rule: two interleaved
    halves whose mean is the refined rule, and whose difference is the error estimate.
    """
    if level:
        return in_panels("midpoint", cells * 2 ** (level - 1))
    panels = [rule("trapezoid", int(count) + 1) for count in cells]
    nodes = [(i + one.nodes) / len(cells) for i, one in enumerate(panels)]
    weights = [one.weights / len(cells) for one in panels]
    for i in range(1, len(cells)):  # neighbouring panels share the node between them
        weights[i - 1][-1] += weights[i][0]
        nodes[i], weights[i] = nodes[i][1:], weights[i][1:]
    return Rule(np.concatenate(nodes), np.concatenate(weights))
