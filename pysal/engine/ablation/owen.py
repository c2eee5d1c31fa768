"""Owen values: Shapley values of features in groups of groups, by all sets that a tree of them allows or by random orders."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

# A feature, or nodes that come and go together.
Tree: TypeAlias = "int | tuple[Tree, ...]"
CONFIDENCE = 0.95
# How many pairs of orders tell an interval: of three, all agree too often although others would not.
LEAST_FOR_INTERVALS = 4


@dataclass(frozen=True)
class Gains:
    """What features add to sets of others, each gain with its weight.

    Attributes:
        features: F.
        samples: how many independent estimates the gains are; 0 = they are exact.
        sets: the sets whose worth is needed, each once, feature f as bit f.
    """

    features: int
    samples: int
    sets: list[int] = field(default_factory=list)
    _places: dict[int, int] = field(default_factory=dict)
    _terms: list[tuple[int, int, int, int, float]] = field(default_factory=list)  # sample, feature, with it, without it

    def add(self, sample: int, feature: int, before: int, weight: float) -> None:
        """Add a gain: that of a feature which comes to a set."""
        self._terms.append((sample, feature, self._place(before | 1 << feature), self._place(before), weight))

    def _place(self, one: int) -> int:
        place = self._places.setdefault(one, len(self.sets))
        if place == len(self.sets):
            self.sets.append(one)
        return place

    def values(self, worth: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the values (F,) and their standard errors (F,), 0 where they are exact, from the worth of each set."""
        sample, feature, after, before = (np.array(column, np.int64) for column in [*zip(*self._terms, strict=True)][:4])
        weight = np.array([term[4] for term in self._terms])
        found = np.zeros((max(self.samples, 1), self.features))
        np.add.at(found, (sample, feature), weight * (worth[after] - worth[before]))
        values = found.mean(0)
        if self.samples < 2:
            return values, np.zeros_like(values)
        return values, found.std(0, ddof=1) / math.sqrt(self.samples)


def half_widths(errors: NDArray[np.float64], samples: int) -> NDArray[np.float64]:
    """Return half the width of each value's 95 % interval: 0 where values are exact, infinite where samples are too few.

    The few samples of a feature may agree by chance, and its error is then too small or 0, while that of others is not. So no
    feature's error counts for less than the root mean square of all, each weighted by its own square: features that never
    change anything do not lower that. Student's t makes up for the few samples that errors are found from.

    Args:
        errors: standard errors (F,).
        samples: how many they are found from, each independent of the others; 0 = values are exact.
    """
    if not samples:
        return np.zeros_like(errors)
    if samples < LEAST_FOR_INTERVALS:
        return np.full_like(errors, math.inf)
    scale = errors.max()
    shares = errors / scale if scale > 0 else errors  # whose fourth powers are no less than float64 can tell
    pooled = math.sqrt((shares**4).sum() / (shares**2).sum()) if scale > 0 else 0.0
    found: NDArray[np.float64] = float(stdtrit(samples - 1, (1 + CONFIDENCE) / 2)) * scale * np.maximum(shares, pooled)
    return found


def leaves(tree: Tree) -> list[int]:
    """Return the features of a tree, from left to right."""
    return [tree] if isinstance(tree, int) else [leaf for node in tree for leaf in leaves(node)]


def sets_needed(tree: Tree) -> int:
    """Return how many sets exact values need, nothing and everything among them."""
    return 2 + _sets_between(tree, 1)


def _sets_between(node: Tree, contexts: int) -> int:
    """Return how many sets a node needs beside nothing and all of it, in so many contexts."""
    if isinstance(node, int):
        return 0
    below = sum(_sets_between(child, contexts << len(node) - 1) for child in node)
    return contexts * ((1 << len(node)) - 2) + below


def exact_gains(tree: Tree) -> Gains:
    """Return the gains of the exact Owen values: at each node the children's Shapley weights, whatever else is there.

    Source:
        Owen 1977, Values of games with a priori unions; Winter 1989, A value for cooperative games with levels structure of
        cooperation.
    """
    found = Gains(len(leaves(tree)), 0)
    _add_gains(found, (tree,) if isinstance(tree, int) else tree, 0, 1.0)
    return found


def _add_gains(found: Gains, node: tuple[Tree, ...], outside: int, weight: float) -> None:
    """Add the gains below a node where `outside` is there already."""
    bits = [sum(1 << leaf for leaf in leaves(child)) for child in node]
    count = len(node)
    for child in range(count):
        others = bits[:child] + bits[child + 1 :]
        for choice in range(1 << count - 1):
            before = outside | sum(one for place, one in enumerate(others) if choice >> place & 1)
            size = choice.bit_count()
            share = weight * math.factorial(size) * math.factorial(count - 1 - size) / math.factorial(count)
            below = node[child]
            if isinstance(below, int):
                found.add(0, below, before, share)
            else:
                _add_gains(found, below, before, share)


def sampled_gains(tree: Tree, pairs: int, generator: np.random.Generator) -> Gains:
    """Return the gains along random orders, in which the features of a node follow each other, each order with its reverse.

    Every order adds up to the worth of all less that of none, so the values do, too.

    Args:
        tree: of the features.
        pairs: of orders, at least 2 for a standard error.
        generator: draws the orders.

    Source:
        Castro, Gomez and Tejada 2009, Polynomial calculation of the Shapley value based on sampling; the reverse: Mitchell,
        Cooper, Frank and Holmes 2022, arXiv:2104.12199, section 4.1.
    """
    found = Gains(len(leaves(tree)), pairs)

    for pair in range(pairs):
        drawn = _order(tree, generator)
        for one in (drawn, drawn[::-1]):
            before = 0
            for feature in one:
                found.add(pair, feature, before, 0.5)
                before |= 1 << feature
    return found


def _order(node: Tree, generator: np.random.Generator) -> list[int]:
    """Return the features of a node in a random order, in which those of each node below follow each other."""
    if isinstance(node, int):
        return [node]
    return [leaf for child in generator.permutation(len(node)) for leaf in _order(node[child], generator)]


def halves(places: NDArray[np.float64], members: Sequence[int] | None = None) -> Tree:
    """Return the tree of features at places (F, 2) that is cut in two along its longer side, and so on."""
    own = np.arange(len(places)) if members is None else np.asarray(members)
    if len(own) == 1:
        return int(own[0])
    axis = int(np.argmax(np.ptp(places[own], axis=0)))
    ordered = own[np.lexsort((own, places[own][:, 1 - axis], places[own][:, axis]))]
    middle = len(ordered) // 2
    if np.ptp(places[own][:, axis]) > 0:  # where the cut is straight, if one is near the middle
        along = places[ordered][:, axis]
        cuts = np.flatnonzero(np.diff(along) > 0) + 1
        middle = int(cuts[np.argmin(np.abs(cuts - len(ordered) / 2))])
    return (halves(places, ordered[:middle].tolist()), halves(places, ordered[middle:].tolist()))


def merged(features: NDArray[np.float64]) -> Tree:
    """Return the tree in which those of features (F, D) that are most alike are merged first, by Ward's criterion."""
    from scipy.cluster.hierarchy import linkage

    nodes: list[Tree] = list(range(len(features)))
    if len(nodes) > 1:
        for first, second, _, _ in linkage(features, "ward"):
            nodes.append((nodes[int(first)], nodes[int(second)]))
    return nodes[-1]
