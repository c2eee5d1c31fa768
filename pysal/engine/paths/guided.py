"""Guided paths: each step moves the values whose gradients are smallest, so that few large gradients are crossed."""

import math

import torch
from torch import Tensor

from pysal._library import widest

# Of the whole distance: a step that is as close as this to where it shall end is done.
CLOSE = 1e-9


class GuidedPaths:
    """P paths from baselines to inputs, and what the gradients on the way add up to.

    Every value may be ahead of the straight line, or behind it, by no more than `max_distance` of its own way.

    Args:
        starts: (P, ...) baselines.
        ends: (P, ...) inputs.
        steps: gradients per path.
        fraction: share of the values, 0 to 1, that move at a time: those of the smallest |gradient|.
        max_distance: 0 to 1.

    Attributes:
        places: (P, ...) where each path has got to, in the widest dtype of the device.
        total: (P, ...) sum of gradient times change, likewise.

    Source:
        Kapishnikov et al. 2021, arXiv:2106.09788, algorithm 1, and PAIR 0.2.1's code, from which `max_distance` is.
    """

    def __init__(self, starts: Tensor, ends: Tensor, *, steps: int, fraction: float, max_distance: float) -> None:
        wide = widest(ends.device)
        self.starts, self.ends = starts.to(wide), ends.to(wide)
        self.steps, self.fraction, self.max_distance = steps, fraction, max_distance
        self.places, self.total = self.starts.clone(), torch.zeros_like(self.starts)

    def advance(self, path: int, step: int, gradient: Tensor) -> None:
        """Take one path through a step (0, 1, ...), given the gradient where it stands."""
        end, start = self.ends[path].flatten(), self.starts[path].flatten()
        place, gradient = self.places[path].flatten().clone(), gradient.flatten().to(end.dtype)
        way = end - start
        whole = float(way.abs().sum())
        alpha = (step + 1) / self.steps
        least = start + way * max(alpha - self.max_distance, 0.0)
        most = start + way * min(alpha + self.max_distance, 1.0)
        wanted = whole * (1 - alpha)
        before = place.clone()

        # what has fallen too far behind is brought along, and what cannot move further is left out of the choice
        place = torch.where((place - least) * way < 0, least, place)
        sizes = gradient.abs()
        rank = math.floor(self.fraction * (len(sizes) - 1)) + 1
        while float((end - place).abs().sum()) - wanted > CLOSE * whole:
            movable = place != most
            if not bool(movable.any()):
                break
            sizes = sizes.where(movable, math.inf)
            chosen = movable & ~(sizes > sizes.kthvalue(rank).values)  # a gradient of NaN is chosen, and seen in the result
            reach = float(((most - place).abs() * chosen).sum())
            missing = float((end - place).abs().sum()) - wanted
            moved = most if missing > reach else place + (most - place) * (missing / reach)
            place = torch.where(chosen, moved, place)
            if missing <= reach:
                break
        self.places[path] = place.view_as(self.places[path])
        self.total[path] += ((place - before) * gradient).view_as(self.total[path])
