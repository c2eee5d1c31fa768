"""How the outputs of a layer along one axis depend on its inputs, and what that makes of intervals of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Reals = NDArray[np.float64]
Truths = NDArray[np.bool_]


@dataclass(frozen=True)
class Reach:
    """How outputs along one axis depend on inputs: output i reads inputs i stride - before + [0, 1, ..., taps - 1] dilation."""

    taps: int
    stride: int
    before: int
    dilation: int

    @property
    def span(self) -> int:
        """Inputs between the first and the last that one output reads, both counted."""
        return (self.taps - 1) * self.dilation + 1

    def outputs(self, low: Integers, high: Integers, size: int) -> tuple[Integers, Integers]:
        """Return the outputs [low, high) of `size` that the inputs [low, high) can reach."""
        return reached(low, high, self.stride, self.before, self.span, size)

    def inputs(self, outputs: int) -> int:
        """Return how many inputs in a row `outputs` of them read."""
        return (outputs - 1) * self.stride + self.span

    def places(self, points: Reals) -> Reals:
        """Return where points of the inputs lie among the outputs, each of which is where its window is centred.

        Pixel i is the interval [i, i + 1].
        """
        places: Reals = (points + self.before - self.span / 2) / self.stride + 0.5
        return places


def reached(
    low: Integers, high: Integers, stride: int | Integers, before: int | Integers, span: int | Integers, size: int | Integers
) -> tuple[Integers, Integers]:
    """Return the outputs [low, high) of `size` that the inputs [low, high) can reach, for one axis or for several at once."""
    first = -((span - 1 - before - low) // stride)
    last = (high - 1 + before) // stride + 1
    first = np.minimum(np.maximum(first, 0), size)  # np.clip takes four times as long on so few numbers
    return first, np.maximum(np.minimum(last, size), first)


IDENTITY = (Reach(1, 1, 0, 1), Reach(1, 1, 0, 1))
