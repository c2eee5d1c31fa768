"""Integrates gradients along paths, for many images at once, in one queue of steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal import ops
from pysal._checks import refuse
from pysal.engine.plan import Plan
from pysal.engine.quadrature import Array, Rule, refined

# Cells the error-controlled rule starts with, before its first halving.
FIRST_CELLS = 16

# points(paths, positions): the model's inputs at those positions t in [0, 1] of those paths, and what each gradient is
# multiplied by before it is added up (None: nothing)
Points: TypeAlias = Callable[[NDArray[np.int64], Array], tuple[Tensor, Tensor | None]]


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


def add_up(plan: Plan, into: Tensor, owners: Tensor, rules: dict[int, Rule], points: Points) -> None:
    """Add the weighted gradients at every node of every path's rule to `into` (P, C, H, W), chunk by chunk.

    Args:
        plan: runs the model.
        into: accumulators, one per path.
        owners: (P,) the image of the plan each path belongs to.
        rules: path -> nodes and weights.
        points: see `Points`.
    """
    paths = np.concatenate([np.full(len(one.nodes), path, dtype=np.int64) for path, one in rules.items()])
    nodes = np.concatenate([one.nodes for one in rules.values()])
    weights = np.concatenate([one.weights for one in rules.values()])

    def body(start: int, stop: int) -> None:
        batch, factors = points(paths[start:stop], nodes[start:stop])
        rows = torch.from_numpy(paths[start:stop]).to(plan.device)
        gradients = plan.gradients(batch, owners[rows])
        step_weights = torch.from_numpy(weights[start:stop]).to(plan.device)
        ops.path_integral_accumulate_(into, gradients, factors, rows, step_weights)

    plan.run(len(nodes), body)


def integrate(plan: Plan, owners: Tensor, rules: dict[int, Rule], points: Points) -> Integral:
    """Integrate with a fixed rule for each path."""
    total = plan.zeros()[owners]
    add_up(plan, total, owners, rules, points)
    return Integral(total, np.array([len(one.nodes) for one in rules.values()]), None)


def integrate_to(
    plan: Plan,
    owners: Tensor,
    cells: dict[int, NDArray[np.int64]],
    place: Callable[[int, Rule], Rule],
    points: Points,
    finish: Callable[[Tensor, Tensor], Tensor],
    *,
    tolerance: float,
    max_steps: int,
) -> Integral:
    """Refine each path on its own until the estimated relative error of its map is below `tolerance`.

    Each round halves the spacing of a trapezoid rule and reuses every gradient computed so far. The old points and the new
    ones are two interleaved halves: their mean is the refined integral, half their difference the estimate of its error.

    Args:
        plan: runs the model.
        owners: (P,) the image each path belongs to.
        cells: path -> cells of each of its equal panels in the first round.
        place: (path, rule in t) -> rule along the path.
        points: see `Points`.
        finish: (integrals, their paths) -> maps, whose error counts.
        tolerance: largest relative l2 error.
        max_steps: most points per path.
    """
    number = len(owners)
    total = plan.zeros()[owners]
    steps = np.zeros(number, dtype=np.int64)
    error = np.full(number, np.inf)
    active = np.arange(number)
    level = 0
    while len(active):
        rules = {int(path): place(int(path), refined(level, cells[int(path)])) for path in active}
        if level:
            fits = [steps[path] + len(rules[int(path)].nodes) <= max_steps for path in active]
            active = active[np.array(fits)]
            rules = {int(path): rules[int(path)] for path in active}
            if not len(active):
                break
        new = torch.zeros_like(total)
        add_up(plan, new, owners, rules, points)
        rows = torch.from_numpy(active).to(plan.device)
        for path in active:
            steps[path] += len(rules[int(path)].nodes)
        if level == 0:
            total = new
        else:
            difference = finish((new[rows] - total[rows]) / 2, rows).double().flatten(1).norm(dim=1)
            total[rows] = (total[rows] + new[rows]) / 2
            size = finish(total[rows], rows).double().flatten(1).norm(dim=1)
            relative = torch.where(size > 0, difference / size, torch.where(difference > 0, torch.inf, 0.0))
            error[active] = relative.cpu().numpy()
            active = active[error[active] > tolerance]
        level += 1
    return Integral(total, steps, error)


def check_steps(where: str, steps: object, tolerance: object, max_steps: object) -> None:
    """Refuse step counts and tolerances that make no sense."""
    for name, value, least in (("steps", steps, 1), ("max_steps", max_steps, 2 * FIRST_CELLS + 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            refuse(where, name, f"be a whole number of at least {least}", repr(value))
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 < tolerance < 1):
        refuse(where, "tolerance", "be None or between 0 and 1", repr(tolerance))
