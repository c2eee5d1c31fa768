"""How the axes of a tensor are those of a map: rows and columns may come last, first, or as one axis of pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """Which axes of a tensor (N, ...) are a map's rows and columns; all others but the first are its channels.

    Attributes:
        rank: number of axes.
        first: the axis of the rows, which that of the columns follows, or the only one of the pixels.
        spatial: 2, or 1 where rows and columns are one axis of pixels, row after row.
    """

    rank: int
    first: int
    spatial: int = 2

    @property
    def places(self) -> tuple[int, ...]:
        """The axes of rows and columns."""
        return tuple(range(self.first, self.first + self.spatial))

    @property
    def after(self) -> int:
        """How many axes are after rows and columns."""
        return self.rank - self.first - self.spatial

    def channels(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the lengths of the axes of channels of a tensor of a shape."""
        return (*shape[1 : self.first], *shape[self.first + self.spatial :])

    def of(self, map: Tensor, channels: Sequence[int]) -> Tensor:
        """Return a tensor of this form that shares the memory of a map (n, C, h, w) in channels_last order."""
        if self == PLAIN:
            return map
        pixels = map.permute(0, 2, 3, 1)
        n, height, width, _ = pixels.shape
        split = pixels.reshape(n, *((height, width) if self.spatial == 2 else (height * width,)), *channels)
        behind = list(range(1 + self.spatial, split.ndim))
        before = self.first - 1
        return split.permute(0, *behind[:before], *range(1, 1 + self.spatial), *behind[before:])

    def map_of(self, tensor: Tensor, size: Sequence[int]) -> Tensor:
        """Return the map (n, C, *size), in channels_last order, of a tensor of this form."""
        if self != PLAIN:
            pixels = tensor.permute(0, *self.places, *range(1, self.first), *range(self.first + self.spatial, self.rank))
            channels = math.prod(self.channels(tensor.shape))
            tensor = pixels.reshape(len(tensor), *size, channels).permute(0, 3, 1, 2)
        return tensor.contiguous(memory_format=torch.channels_last)

    def moved(self, axes: Sequence[int]) -> "Form | None":
        """Return the form after a permutation, None where rows and columns, or images, are not in their order any more."""
        first = list(axes).index(self.first)
        if axes[0] != 0 or tuple(axes[first : first + self.spatial]) != self.places:
            return None
        return Form(self.rank, first, self.spatial)

    def reshaped(self, before: Sequence[int], after: Sequence[int], size: Sequence[int]) -> "Form | None":
        """Return the form of a tensor of shape `after` that one of this form, of shape `before`, was reshaped to.

        None where rows and columns are split up or mixed with channels.

        Args:
            before: with the numbers of images first.
            after: the same.
            size: height and width of the map.
        """
        if before[0] != after[0]:
            return None
        channels = math.prod(before[1 : self.first])
        for first in range(1, len(after)):
            if math.prod(after[1:first]) != channels:
                continue
            if tuple(after[first : first + 2]) == tuple(size):
                return Form(len(after), first)
            if after[first] == math.prod(size):
                return Form(len(after), first, 1)
        return None


PLAIN = Form(4, 2)
