"""Where the boxes of images lie in every map, what computing them costs, and which images run together."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pysal.engine.boxes.kinds import BoxOperator
from pysal.engine.boxes.reach import IDENTITY, Integers, Reach, Reals, Truths, reached
from pysal.engine.running.chunks import to_device
from pysal.engine.running.heap import LARGEST_BLOCK

# A box that covers this share of a map is not worth cutting out: the whole map is computed.
WHOLE_SHARE = 0.85
# Images in one group, and the least share of its cost that a split has to save, because it makes smaller batches.
CPU_GROUP_ROWS = 32
GPU_GROUP_ROWS = 256
WORTH_A_SPLIT = 0.05
# What each operator of one more group costs on a GPU, in multiplications: its kernels wait some tens of microseconds for the
# host, in which GPUs between a T4 and an H200 make 1e8 to 5e8. Estimated from data sheets, not measured.
GPU_LAUNCH = 2e8
# Numbers in the largest map of a group on a CPU, just below what the system clears anew in every pass: that takes as long as to
# compute it.
CPU_GROUP_NUMBERS = (LARGEST_BLOCK - 4096) // 4
# A group that costs more than this share of whole images runs as whole images.
PAYING_SHARE = 0.9
# One that costs less, judged by about so many images, would so even if whole images ran twice as fast.
CLEARLY_PAYING_SHARE, FEW = PAYING_SHARE / 2, 8
# Boxes on maps of at most this side are not limited: few pixels are saved, and much of what an occlusion changes is lost.
SMALL_SIDE = 8
# Tolerance in pixels when fractional lengths are rounded: 0.29 x 100 is 29.
ROUNDING = 1e-9


def group_rows(device: torch.device) -> int:
    """Return how many images at most are run together."""
    return CPU_GROUP_ROWS if device.type == "cpu" else GPU_GROUP_ROWS


def group_numbers(device: torch.device) -> float:
    """Return how many numbers at most a map of all images of a group has."""
    return CPU_GROUP_NUMBERS if device.type == "cpu" else math.inf


def launch_cost(device: torch.device) -> float:
    """Return what starting an operator costs, in multiplications."""
    return 0.0 if device.type == "cpu" else GPU_LAUNCH


@dataclass
class Geometry:
    """Where the boxes of a group of images lie in every map.

    Attributes:
        sizes: (maps, 2), height and width of the boxes of all images.
        origins: (maps, n, 2), where each box begins.
        corners: (maps, n, 2), where what windows read begins.
        on_device: origins and corners, (2, maps, n, 2) int32.
        unchanged: of maps where limited boxes differ in size: (n, 1, h, w), where a box holds what the unchanged image has.
    """

    sizes: Integers
    origins: Integers
    corners: Integers
    on_device: Tensor
    unchanged: dict[int, Tensor]


@dataclass
class _Step:
    """Maps whose boxes are the same, whatever the boxes of the image.

    What works pixel by pixel keeps the box of its source: the 311 maps of DenseNet-121 have 122 steps.

    Attributes:
        first: the map that it was made for; the others take its box as it is.
        sources: numbers of other steps, the one that windows slide over first; none of the image.
        reach: of windows, down and across.
        size: (2,), of the maps.
        cost: multiplications per pixel of all of them.
        channels: of the map that has most.
    """

    first: int
    sources: list[int]
    reach: tuple[Reach, Reach]
    size: Integers
    cost: float = 0.0
    channels: int = 1

    def __post_init__(self) -> None:
        self.stride, self.before, self.span = (
            np.array([getattr(one, name) for one in self.reach], dtype=np.int64) for name in ("stride", "before", "span")
        )


def _steps(boxed: Sequence[BoxOperator], maps: Sequence[tuple[int, int]]) -> tuple[list[_Step], Integers]:
    """Return the steps of operators that have boxes, in order, and the number of each map's step."""
    steps: list[_Step] = []
    step_of = np.zeros(len(maps), dtype=np.int64)
    for operator in boxed:
        first, *others = [int(step_of[source]) for source in operator.sources] or [-1]
        sources = [first, *dict.fromkeys(others)] if operator.sources else []
        at, size = first, maps[operator.map]
        # the image's own box is never limited, so what is made of it has another
        kept = first >= 0 and bool(steps[first].sources) and operator.reach == IDENTITY
        if not (kept and {*others} <= {first} and tuple(steps[first].size) == size):
            at = len(steps)
            steps.append(_Step(operator.map, sources, operator.reach, np.array(size, dtype=np.int64)))
        steps[at].cost += operator.cost
        steps[at].channels = max(steps[at].channels, math.prod(operator.channels))
        step_of[operator.map] = at
    return steps, step_of


class Groups:
    """Boxes of the image followed through all maps.

    Args:
        operators: the operators of the graph, in order.
        maps: height and width of each map.
        launch: what starting an operator costs, in multiplications.
    """

    def __init__(
        self,
        operators: Sequence[BoxOperator],
        maps: Sequence[tuple[int, int]],
        launch: float,
    ) -> None:
        boxed = [operator for operator in operators if operator.map >= 0]
        self._steps, self._step_of = _steps(boxed, maps)
        self._maps = np.array(maps, dtype=np.int64).reshape(-1, 2)
        self._sides = np.array([step.size for step in self._steps], dtype=np.int64).reshape(-1, 2)
        self._stride = np.array([[one.stride for one in operator.reach] for operator in boxed], dtype=np.int64)[:, None]
        self._before = np.array([[one.before for one in operator.reach] for operator in boxed], dtype=np.int64)[:, None]
        self._costs = np.array([step.cost for step in self._steps])
        self._weights = np.bincount(self._step_of, minlength=len(self._steps))[:, None]
        self._channels = np.array([step.channels for step in self._steps])
        self._limits = np.array(
            [operator.map == self._steps[at].first for operator, at in zip(boxed, self._step_of, strict=True)]
        )
        self._launching = launch * sum(not operator.skipped for operator in boxed)
        self._always = sum(operator.cost for operator in operators if operator.kind == "whole")
        self._whole_cost = float((self._sides.prod(1) * self._costs).sum() + self._always)
        self._share: float | None = None
        self._paying = PAYING_SHARE

    def limited(self, share: float | None, faster_whole: float = 1.0) -> "Groups":
        """Return these with boxes that grow to a share of each map's side at most, or without bounds for None.

        Args:
            share: see `Incremental.limited`.
            faster_whole: how many times as fast whole images run, by other means, as the graph runs them. With a share it says
                nothing: whole images then give something else.
        """
        limited = copy.copy(self)
        limited._share = share
        limited._paying = PAYING_SHARE / (faster_whole if share is None else 1.0)
        return limited

    def extents(self, boxes: Integers) -> Integers:
        """Return what boxes (n, 4) of the image can change of every map: (maps, n, 4) top, left, bottom, right."""
        return self.follow(boxes)[0]

    def follow(self, boxes: Integers) -> tuple[Integers, Truths]:
        """Return the extents (maps, n, 4) of boxes (n, 4), and which of them are limited (maps, n)."""
        found, limited = self._follow(boxes)
        return found[self._step_of], limited[self._step_of] & self._limits[:, None]

    def _follow(self, boxes: Integers) -> tuple[Integers, Truths]:
        """Return the same of the steps."""
        found = np.empty((len(self._steps), len(boxes), 4), dtype=np.int64)
        limited = np.zeros(found.shape[:2], dtype=bool)
        footprints = np.empty(found.shape if self._share is not None else (0,))
        for number, step in enumerate(self._steps):
            own = found[number]
            if not step.sources:
                own[:] = boxes
                if self._share is not None:
                    footprints[number] = boxes
                continue
            source, *others = step.sources
            own[:, :2], own[:, 2:] = reached(
                found[source, :, :2], found[source, :, 2:], step.stride, step.before, step.span, step.size
            )
            if others:
                np.minimum(own[:, :2], found[others, :, :2].min(0), out=own[:, :2])
                np.maximum(own[:, 2:], found[others, :, 2:].max(0), out=own[:, 2:])
            if self._share is not None:
                for axis in range(2):
                    sides = slice(axis, None, 2)
                    footprint = step.reach[axis].places(footprints[source][:, sides])
                    footprints[number][:, sides] = footprint
                    limited[number] |= _limit(own[:, sides], footprint, self._share, int(step.size[axis]))
        return found, limited

    def _sizes(self, extents: Integers) -> Integers:
        """Return the size (steps, 2) of boxes that hold the extents (steps, n, 4) of every image."""
        sizes = np.maximum((extents[..., 2:] - extents[..., :2]).max(1), 1)
        whole: Truths = sizes.prod(1) >= WHOLE_SHARE * self._sides.prod(1)
        if self._share is not None:  # of limited maps no more is computed than the limit allows
            whole &= [all(_most(self._share, side) == side for side in sides) for sides in self._sides.tolist()]
        return np.where(whole[:, None], self._sides, sizes)

    def cost(self, boxes: Integers) -> float:
        """Return what running a group of images costs, in multiplications."""
        return self._cost(self._follow(boxes)[0])

    def _cost(self, extents: Integers) -> float:
        return float(((self._sizes(extents).prod(1) * self._costs).sum() + self._always) * extents.shape[1])

    def _numbers(self, extents: Integers) -> int:
        """Return how many numbers the largest map of an image of a group has."""
        return int((self._sizes(extents).prod(1) * self._channels).max())

    def pays(self, boxes: Integers) -> bool:
        """Say whether a group of images costs clearly less than running them whole."""
        return self.cost(boxes) < self._paying * self._whole_cost * len(boxes)

    def clearly_pays(self, boxes: Integers) -> bool:
        """Say whether a few of these images, each alone, would still pay if whole ones ran twice as fast."""
        return self._costs_of_few(boxes) < CLEARLY_PAYING_SHARE * self._whole_cost

    def seem_to_pay(self, boxes: Integers) -> bool:
        """Say whether a few of these images, each alone, pay."""
        return self._costs_of_few(boxes) < self._paying * self._whole_cost

    def _costs_of_few(self, boxes: Integers) -> float:
        """Return what one of these images costs alone, the mean of about `FEW` of them; infinity without any."""
        some = boxes[:: max(1, len(boxes) // FEW)]
        return sum(self._costs_alone(some)) / len(some) if len(some) else math.inf

    def _costs_alone(self, boxes: Integers) -> list[float]:
        """Return what each image costs as a group of its own."""
        extents = self._follow(boxes)[0]
        return [self._cost(extents[:, n : n + 1]) for n in range(len(boxes))]

    def batches(self, boxes: Integers, rows: int, numbers: float = math.inf) -> list[tuple[Integers, bool]]:
        """Return the images to run together, at most `rows` in boxes at a time, and whether in boxes: else they run whole.

        No map of more than one image has more than so many `numbers`.

        Where boxes are limited, and whole images give something else, each image's own box decides, whatever the others'.
        """
        if self._share is None:
            return [(group, self.pays(boxes[group])) for group in self.split(boxes, rows, numbers)]
        paying = self._pays_alone(boxes)
        inside, outside = np.flatnonzero(paying), np.flatnonzero(~paying)
        found = [(inside[group], True) for group in self.split(boxes[inside], rows, numbers)] if len(inside) else []
        return found + ([(outside, False)] if len(outside) else [])

    def _pays_alone(self, boxes: Integers) -> Truths:
        most = PAYING_SHARE * self._whole_cost
        return np.array([cost < most for cost in self._costs_alone(boxes)])

    def approximates(self, boxes: Integers) -> Truths:
        """Say of each image whether its outputs are approximate: (n,)."""
        limited: Truths = np.any(self.follow(boxes)[1], axis=0)
        return limited & self._pays_alone(boxes) if limited.any() else limited

    def split(self, boxes: Integers, rows: int, numbers: float = math.inf) -> list[Integers]:
        """Return the images to run together: their indices, at most `rows` at a time, with so many numbers in a map.

        A set is halved by the place or the size of its boxes while that saves work, because the boxes of a group are as
        large as its largest in every map: by more than it takes to launch one more group, if the set pays as it is.
        """
        extents = self._follow(boxes)[0]
        pending, found = [np.arange(len(boxes))], []
        while pending:
            group = pending.pop()
            halves, saved = self._halves(extents, group)
            if self._launching:
                cost, whole = self._cost(extents[:, group]), self._whole_cost * len(group)
                if saved * cost <= self._launching and (cost < self._paying * whole or whole <= self._launching):
                    saved = 0.0
            most = min(rows, math.floor(min(numbers / self._numbers(extents[:, group]), len(group))))
            if halves is not None and (len(group) > most or saved > WORTH_A_SPLIT):
                pending += halves[::-1]
            else:
                found.append(group)
        return found

    def _halves(self, extents: Integers, group: Integers) -> tuple[list[Integers] | None, float]:
        """Return the better way to cut a group in two, and the share of its cost that this saves."""
        if len(group) < 2:
            return None, 0.0
        own = extents[:, group]
        before = self._cost(own)
        best: tuple[list[Integers] | None, float] = (None, -math.inf)
        for axis in range(2):
            share = self._weights * (own[..., axis + 2] - own[..., axis]) / self._sides[:, axis, None]
            for key in (own[0, :, axis] + own[0, :, axis + 2], share.sum(0)):
                order = np.argsort(key, kind="stable")
                half = (len(group) + 1) // 2
                parts = [np.sort(order[:half]), np.sort(order[half:])]
                saved = 1 - sum(self._cost(own[:, part]) for part in parts) / before
                if saved > best[1]:
                    best = [group[part] for part in parts], saved
        return best

    def geometry(self, boxes: Integers, device: torch.device) -> Geometry:
        """Return where the boxes of a group lie in every map."""
        found, of_steps = self._follow(boxes)
        own_sizes = self._sizes(found)
        own_origins = np.clip(found[..., :2], 0, (self._sides - own_sizes)[:, None])
        sizes, origins = own_sizes[self._step_of], own_origins[self._step_of]
        corners = origins * self._stride - self._before
        on_device = to_device(np.stack([origins, corners]).astype(np.int32), device)
        unchanged: dict[int, Tensor] = {}
        extents, limited = found[self._step_of], of_steps[self._step_of] & self._limits[:, None]
        for map in np.flatnonzero(limited.any(1)).tolist():
            if (extents[map, :, 2:] - extents[map, :, :2] < sizes[map]).any():
                inside = [
                    (extents[map, :, axis, None] <= places) & (places < extents[map, :, axis + 2, None])
                    for axis in range(2)
                    for places in [origins[map, :, axis, None] + np.arange(sizes[map, axis])]
                ]
                unchanged[map] = to_device(~(inside[0][:, None, :, None] & inside[1][:, None, None, :]), device)
        return Geometry(sizes, origins, corners, on_device, unchanged)


def _most(share: float, side: int) -> int:
    """Return how many pixels of a map's side a box grows to."""
    if side <= SMALL_SIDE:
        return side
    return max(1, math.floor(share * side + ROUNDING))  # 0.29 of 100 pixels is 29 of them, whatever its rounding


def _limit(extents: Integers, footprints: Reals, share: float, side: int) -> Truths:
    """Limit extents (n, 2) along one axis of a map, as `Incremental.limited` says, and return of which (n,) that took away."""
    low, high = extents.T
    first, last = footprints.T
    most = np.maximum(_most(share, side), np.ceil(last - first - ROUNDING).astype(np.int64))
    longer: Truths = high - low > most
    start = np.minimum(np.maximum(np.floor((first + last - most + 1) / 2).astype(np.int64), low), high - most)
    extents[:, 0], extents[:, 1] = np.where(longer, start, low), np.where(longer, start + most, high)
    return longer
