"""Guided paths: each step moves the values whose gradients are smallest, so that few large gradients are crossed."""

import math

import torch
from torch import Tensor

from pysal._library import widest

# Of the whole distance: a step that is as close as this to where it shall end is done.
CLOSE = 1e-9
# Turns of a step that a GPU takes before it is asked whether one of the paths still moves, which it answers once it has done
# all before. With the usual fraction, a quarter, five turns are the most there are.
UNASKED_TURNS = 16


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

    def advance(self, paths: Tensor, step: int, gradients: Tensor) -> None:
        """Take some paths through a step (0, 1, ...), given the gradients where they stand.

        A GPU is asked for no number in the usual case: a path that is done goes along unmoved until all are.

        Args:
            paths: (N,) which.
            step: the same for all of them.
            gradients: (N, ...).
        """
        ends, starts, before = (one[paths].reshape(len(paths), -1) for one in (self.ends, self.starts, self.places))
        gradients = gradients.reshape(len(paths), -1).to(ends.dtype)
        way = ends - starts
        whole = way.abs().sum(1, keepdim=True)
        alpha = (step + 1) / self.steps
        least = starts + way * max(alpha - self.max_distance, 0.0)
        most = starts + way * min(alpha + self.max_distance, 1.0)
        wanted = whole * (1 - alpha)

        # what has fallen too far behind is brought along, and what cannot move further is left out of the choice
        places = torch.where((before - least) * way < 0, least, before)
        sizes = gradients.abs()
        rank = max(1, math.floor(self.fraction * (sizes.shape[1] - 1)) + 1)
        going = torch.ones_like(whole, dtype=torch.bool)
        asks_after = 1 if places.device.type == "cpu" else UNASKED_TURNS
        for turn in range(
            1, math.ceil(sizes.shape[1] / rank) + 2
        ):  # each leaves at least `rank` values that cannot move further
            missing = (ends - places).abs().sum(1, keepdim=True) - wanted
            movable = places != most
            going = going & (missing > CLOSE * whole) & movable.any(1, keepdim=True)
            if turn % asks_after == 0 and not bool(going.any()):
                break
            sizes = sizes.where(movable, math.inf)
            # a gradient of NaN is chosen, and seen in the result
            chosen = going & movable & ~(sizes > sizes.kthvalue(rank, 1, keepdim=True).values)
            reach = ((most - places).abs() * chosen).sum(1, keepdim=True)
            moved = torch.where(missing > reach, most, places + (most - places) * (missing / reach))
            places = torch.where(chosen, moved, places)
            going = going & (missing > reach)
        self.places[paths] = places.reshape(len(paths), *self.places.shape[1:])
        self.total[paths] += ((places - before) * gradients).reshape(len(paths), *self.total.shape[1:])
