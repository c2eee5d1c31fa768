"""Integrates gradients along paths, for many images at once, in one queue of steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal import ops
from pysal._checks import MOST, check_count, refuse, refuse_unknown, warn
from pysal._library import widened, widest
from pysal.engine.paths.quadrature import (
    PLACEMENTS,
    QUADRATURES,
    Array,
    Placement,
    Quadrature,
    Rule,
    in_panels,
    placed,
    refined,
    steps_per_panel,
)
from pysal.engine.request.plan import Plan
from pysal.engine.running.chunks import to_device

# Cells the error-controlled rule starts with, before its first halving.
FIRST_CELLS = 16
# Intervals of the forward-only probe that decides where adaptive placement puts the steps.
PROBE_PANELS = 8

# points(paths, positions): the model's inputs at those positions of those paths, and what each gradient is multiplied by
# before it is added up (None: nothing)
Points: TypeAlias = Callable[[NDArray[np.int64], Array], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Steps:
    """How a path is integrated: the options that Integrated Gradients and Blur IG share, checked.

    Attributes:
        quadrature: the rule.
        placement: where its nodes stand on the path.
        number: of gradients per path.
        tolerance: refine each path by halving until its map's estimated relative error is below this.
        most: gradients per path with a tolerance.
    """

    quadrature: Quadrature
    placement: Placement
    number: int
    tolerance: float | None
    most: int

    @classmethod
    def check(
        cls,
        where: str,
        *,
        quadrature: Quadrature | None,
        placement: Placement,
        steps: int,
        tolerance: float | None,
        max_steps: int,
    ) -> "Steps":
        """Return the options, or refuse those that make no sense; with a tolerance only the nested trapezoid rule will do."""
        if quadrature is not None and quadrature not in QUADRATURES:
            refuse_unknown(where, "quadrature", f"be one of {', '.join(map(repr, QUADRATURES))}", quadrature, QUADRATURES)
        if tolerance is not None and quadrature not in (None, "trapezoid"):
            refuse(where, "quadrature", "be 'trapezoid' or None with a tolerance, which halves its steps", repr(quadrature))
        if placement not in PLACEMENTS:
            refuse_unknown(where, "placement", f"be one of {', '.join(map(repr, PLACEMENTS))}", placement, PLACEMENTS)
        check_count(where, "steps", steps, most=MOST)
        check_count(where, "max_steps", max_steps, 2 * FIRST_CELLS + 1)
        if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 < tolerance < 1):
            refuse(where, "tolerance", "be None or between 0 and 1", repr(tolerance))
        if placement == "adaptive" and tolerance is None and steps < PROBE_PANELS:
            refuse(where, "steps", f"be at least {PROBE_PANELS} with placement='adaptive'", steps)
        return cls(quadrature or ("midpoint" if tolerance is None else "trapezoid"), placement, steps, tolerance, max_steps)


@dataclass(frozen=True)
class Path:
    """Where the paths of a method lead.

    Attributes:
        owners: (P,) the image of the plan that each path belongs to.
        points: see `Points`.
        finish: (integrals, their paths) -> maps, whose error counts.
        position: of the places s in [0, 1], in the unit of `points`; None = s itself.
        slope: derivative of `position`.
    """

    owners: Tensor
    points: Points
    finish: Callable[[Tensor, Tensor], Tensor]
    position: Callable[[Array], Array] | None = None
    slope: Callable[[Array], Array] | None = None


@dataclass(frozen=True)
class Integral:
    """Integrals of P paths.

    Attributes:
        total: (P, C, H, W) sum of weights times gradients.
        steps: (P,) how many points each path took.
        error: (P,) estimated relative l2 error of `finish(total)`; None where it was not asked for.
    """

    total: Tensor
    steps: NDArray[np.int64]
    error: Array | None


def integrate(plan: Plan, path: Path, steps: Steps, report: bool) -> Integral:
    """Integrate the gradients along every path of a method; warn of a tolerance that is missed, unless that is reported."""
    number = len(path.owners)
    first = steps.number if steps.tolerance is None else FIRST_CELLS
    cells = [np.array([first])] * number
    if steps.placement == "adaptive":
        cells = [steps_per_panel(changes, first) for changes in _probe(plan, path)]

    def place(rule: Rule) -> Rule:
        if steps.placement == "squared":
            rule = placed(rule, steps.quadrature, np.square, lambda t: 2 * t)
        if path.position is not None and path.slope is not None:
            rule = placed(rule, steps.quadrature, path.position, path.slope)
        return rule

    if steps.tolerance is not None:
        integral = _refine(plan, path, cells, place, steps.tolerance, steps.most)
        if not report:
            _warn_of_misses(plan, integral, steps.tolerance, steps.most)
        return integral
    rules = {index: place(in_panels(steps.quadrature, counts)) for index, counts in enumerate(cells)}
    total = _add_up(plan, path, _accumulators(plan, path), rules)
    return Integral(total, np.full(number, steps.number), None)


def _accumulators(plan: Plan, path: Path) -> Tensor:
    shape = (len(path.owners), *plan.inputs.shape[1:])  # in float64: of many steps' sums float32 would keep fewer digits
    return torch.zeros(shape, dtype=widest(plan.device), device=plan.device)


def _probe(plan: Plan, path: Path) -> Array:
    """Return (P, 8): the change of f over each eighth of each path."""
    nodes = np.linspace(0.0, 1.0, PROBE_PANELS + 1)
    paths = np.repeat(np.arange(len(path.owners)), len(nodes))
    places = np.tile(nodes if path.position is None else path.position(nodes), len(path.owners))
    order = _order(plan, paths, len(path.owners))
    paths, places = paths[order], places[order]
    scores = torch.empty(len(paths), dtype=widest(plan.device), device=plan.device)

    def body(start: int, stop: int) -> None:
        rows = path.owners[to_device(paths[start:stop], plan.device)]
        batch, _ = path.points(paths[start:stop], places[start:stop])
        scores[start:stop] = plan.scores(batch, rows)[0]

    plan.run(len(paths), body)
    found = np.empty(len(paths))
    found[order] = scores.cpu().double().numpy()
    return cast(Array, np.diff(found.reshape(len(path.owners), len(nodes)), axis=1))


def added(plan: Plan, total: Tensor, gradients: Tensor, factors: Tensor | None, rows: Tensor, weights: Tensor) -> Tensor:
    """Return `total` (P, ...) with weights[n] * gradients[n] * factors[n] added to row rows[n]; itself, without a graph."""
    if not plan.keeps_graph:
        ops.path_integral_accumulate_(total, gradients, factors, rows, weights)
        return total
    shares = gradients.to(total.dtype) * weights.to(total.dtype).reshape(-1, *(1,) * (gradients.ndim - 1))
    return total.index_add(0, rows, shares if factors is None else shares * factors)


def _add_up(plan: Plan, path: Path, total: Tensor, rules: dict[int, Rule]) -> Tensor:
    """Return `total` (P, C, H, W) with the weighted gradients at every node of every path's rule, added chunk by chunk."""
    paths = np.concatenate([np.full(len(one.nodes), index, dtype=np.int64) for index, one in rules.items()])
    nodes = np.concatenate([one.nodes for one in rules.values()])
    weights = np.concatenate([one.weights for one in rules.values()])
    order = _order(plan, paths, len(total))
    paths, nodes, weights = paths[order], nodes[order], weights[order]

    def body(start: int, stop: int) -> None:
        nonlocal total
        batch, factors = path.points(paths[start:stop], nodes[start:stop])
        rows = to_device(paths[start:stop], plan.device)
        gradients = plan.gradients(batch, path.owners[rows])
        total = added(plan, total, gradients, factors, rows, to_device(weights[start:stop], plan.device))

    plan.run(len(nodes), body)
    return total


def _order(plan: Plan, paths: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Return the order of a queue of points, given path after path: that, or the whole batch at a point, then at the next.

    Args:
        plan: whose passes may have to hold the whole batch.
        paths: (N,) the path of each point; every path has the same number of them where passes hold the whole batch.
        number: of paths; an image's lie side by side.
    """
    if plan.company != "whole":
        return np.arange(len(paths))
    many = number // plan.images
    points = np.arange(len(paths)) - np.searchsorted(paths, paths)
    return np.lexsort((paths // many, paths % many, points))


def _refine(
    plan: Plan,
    path: Path,
    cells: list[NDArray[np.int64]],
    place: Callable[[Rule], Rule],
    tolerance: float,
    most: int,
) -> Integral:
    """Refine each path on its own until the estimated relative error of its map is below `tolerance`.

    Each round halves the spacing of a trapezoid rule and reuses every gradient computed so far. The old points and the new
    ones are two interleaved halves: their mean is the refined integral, half their difference the estimate of its error.

    Args:
        plan: runs the model.
        path: what is integrated.
        cells: of each path, the cells of each of its equal panels in the first round.
        place: rule on [0, 1] -> rule along the path.
        tolerance: largest relative l2 error.
        most: points per path.
    """
    number = len(path.owners)
    total = _accumulators(plan, path)
    steps = np.zeros(number, dtype=np.int64)
    error = np.full(number, np.inf)
    active = np.arange(number)
    level = 0
    while len(active):
        rules = {int(index): place(refined(level, cells[index])) for index in active}
        if level:
            rules = {index: one for index, one in rules.items() if steps[index] + len(one.nodes) <= most}
            active = np.array(list(rules), dtype=np.int64)
            if not rules:
                break
        beside = {}
        if plan.company == "whole":  # what is done already runs along
            done = (index for index in range(number) if index not in rules)
            beside = {index: place(refined(level, cells[index])) for index in done}
        new = _add_up(plan, path, torch.zeros_like(total), dict(sorted((rules | beside).items())))
        rows = torch.from_numpy(active).to(plan.device)
        for index, one in rules.items():
            steps[index] += len(one.nodes)
        if level == 0:
            total = new
        else:
            difference = widened(path.finish((new[rows] - total[rows]) / 2, rows)).flatten(1).norm(dim=1)
            total[rows] = (total[rows] + new[rows]) / 2
            size = widened(path.finish(total[rows], rows)).flatten(1).norm(dim=1)
            relative = torch.where(size > 0, difference / size, torch.where(difference > 0, torch.inf, 0.0))
            error[active] = relative.cpu().numpy()
            active = active[error[active] > tolerance]
        level += 1
    return Integral(total, steps, error)


def _warn_of_misses(plan: Plan, integral: Integral, tolerance: float, most: int) -> None:
    assert integral.error is not None
    missed = integral.error > tolerance
    if missed.any():
        warn(
            f"{plan.where}: the tolerance of {tolerance:g} is not reached in {most} steps, the estimated error of a map is "
            f"{integral.error[missed].max():.2g}: raise max_steps"
        )
