"""Numbered features of inputs of every rank and dtype: by masks, or by boxes."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from pysal._checks import refuse

# half open in each dimension but the first, which is the batch's
Box: TypeAlias = tuple[slice, ...]


class Features(Protocol):
    """Numbered features of several inputs; one may reach into more than one input."""

    def __len__(self) -> int:
        """Return the number of features."""
        ...

    def inputs_of(self, feature: int) -> tuple[int, ...]:
        """Return which inputs a feature is in."""
        ...

    def without(self, number: int, input: Tensor, fill: Tensor, features: Sequence[int]) -> Tensor:
        """Return copies of input `number` (R, ...), one without each of the features, one after the other."""
        ...

    def spread(self, number: int, input: Tensor, drops: Tensor) -> Tensor:
        """Return drops (F, n) at the elements of input `number`: (n, ...); n is a multiple of its rows, or one for all."""
        ...


class Masks:
    """Features by masks of whole numbers: an element belongs to the feature whose number it holds.

    Args:
        masks: one for each input, of its shape or broadcast to it.
        inputs: the inputs.
    """

    def __init__(self, masks: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._masks = [
            mask.reshape((1,) * (one.ndim - mask.ndim) + tuple(mask.shape)).to(one.device)
            for mask, one in zip(masks, inputs, strict=True)
        ]
        homes: dict[int, list[int]] = {}
        for number, mask in enumerate(masks):
            for label in torch.unique(mask).tolist():
                homes.setdefault(label, []).append(number)
        self._labels = list(homes)
        self._homes = [tuple(one) for one in homes.values()]
        self._of_elements: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Return the number of features."""
        return len(self._labels)

    def inputs_of(self, feature: int) -> tuple[int, ...]:
        """Return which inputs a feature is in."""
        return self._homes[feature]

    def without(self, number: int, input: Tensor, fill: Tensor, features: Sequence[int]) -> Tensor:
        """See `Features`."""
        mask = self._masks[number]
        hit = torch.stack([mask == self._labels[feature] for feature in features])  # a GPU would wait for a list of them
        return torch.where(hit, fill, input).flatten(0, 1)

    @property
    def labels(self) -> list[int]:
        """The number that the masks have for each feature."""
        return list(self._labels)

    def of_elements(self, number: int) -> Tensor:
        """Return which feature each element of input `number` belongs to, in the shape of its mask."""
        if number not in self._of_elements:
            mask = self._masks[number]
            labels, order = torch.sort(torch.tensor(self._labels, device=mask.device))
            self._of_elements[number] = order[torch.searchsorted(labels, mask.contiguous())]
        return self._of_elements[number]

    def only(self, number: int, input: Tensor, fill: Tensor, present: Tensor) -> Tensor:
        """Return copies of input `number` (R, ...), one with each choice of features, present (n, F), one after the other."""
        kept = present.to(input.device)[:, self.of_elements(number)]
        return torch.where(kept, input, fill).flatten(0, 1)

    def spread(self, number: int, input: Tensor, drops: Tensor) -> Tensor:
        """See `Features`."""
        mask = self._masks[number]
        if not drops.shape[1] or not mask.numel():  # nothing that could be numbered
            return drops.new_zeros((drops.shape[1], *input.shape[1:]))
        feature = self.of_elements(number)
        if len(mask) == 1:
            found = drops.T[:, feature[0]]
        else:  # each row of the input has features of its own, and the same number of outputs
            if drops.shape[1] % len(mask):
                refuse("pysal", "masks", "have one row where the output is one for all rows", len(mask), RuntimeError)
            outputs = torch.arange(drops.shape[1], device=mask.device)
            rows = outputs // (len(outputs) // len(mask))
            found = drops[feature[rows], outputs.reshape(-1, *(1,) * (mask.ndim - 1))]
        return found.expand(drops.shape[1], *input.shape[1:]).contiguous()


class Boxes:
    """Features by boxes, which may overlap: an element gets the mean drop of the boxes that cover it, or their sum.

    Args:
        boxes: for each input, the boxes in it.
        mean: the mean, not the sum.
    """

    def __init__(self, boxes: Sequence[Sequence[Box]], *, mean: bool = True) -> None:
        self._mean = mean
        self._boxes = [(number, (slice(None), *box)) for number, several in enumerate(boxes) for box in several]

    def __len__(self) -> int:
        """Return the number of features."""
        return len(self._boxes)

    def inputs_of(self, feature: int) -> tuple[int, ...]:
        """Return which input a feature is in."""
        return (self._boxes[feature][0],)

    def without(self, number: int, input: Tensor, fill: Tensor, features: Sequence[int]) -> Tensor:
        """See `Features`."""
        copies = input.to(torch.result_type(input, fill)).unsqueeze(0).repeat(len(features), *(1,) * input.ndim)
        for copy, feature in zip(copies, features, strict=True):
            home, box = self._boxes[feature]
            if home == number:
                copy[box] = fill.expand_as(input)[box].to(copy.dtype)
        return copies.flatten(0, 1)

    def spread(self, number: int, input: Tensor, drops: Tensor) -> Tensor:
        """See `Features`."""
        total = drops.new_zeros((drops.shape[1], *input.shape[1:]), dtype=torch.promote_types(drops.dtype, torch.float32))
        covered = torch.zeros((1, *input.shape[1:]), dtype=torch.float32, device=input.device)
        for drop, (home, box) in zip(drops, self._boxes, strict=True):
            if home == number:
                total[box] += drop.reshape(-1, *(1,) * (input.ndim - 1))
                covered[box] += 1
        return total / covered if self._mean else total


def sliding_boxes(shape: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Iterator[Box]:
    """Return the windows over a shape, the first dimension fastest, the last window of each dimension cut at the border."""
    starts = [range(0, max(size - side + step, 1), step) for size, side, step in zip(shape, window, stride, strict=True)]
    for corner in itertools.product(*reversed(starts)):
        yield tuple(slice(at, min(at + side, size)) for at, side, size in zip(reversed(corner), window, shape, strict=True))
