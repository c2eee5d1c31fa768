"""Copies of whole batches, each without a feature, and maps of what that changed.

`leave_one_out` is for images: its queue mixes the rows of a batch and skips segments that change nothing. Here a feature is
left out of all rows at once, so the function may answer for the batch as a whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysal.engine.ablation.features import Features, Masks


@dataclass(frozen=True)
class Ablation:
    """Inputs, what fills a feature that is left out, and the features.

    Attributes:
        inputs: (R, ...) each; the numbers of rows may differ.
        fills: one for each input, broadcast to it.
        features: see `Features`.
    """

    inputs: tuple[Tensor, ...]
    fills: tuple[Tensor, ...]
    features: Features

    @property
    def reachable(self) -> list[bool]:
        """For each feature, whether it is in an input that has elements at all."""
        return [any(self.inputs[i].numel() for i in self.features.inputs_of(f)) for f in range(len(self.features))]

    def without(self, features: Sequence[int]) -> tuple[Tensor, ...]:
        """Return each input in copies, one without each of the features, one after the other."""
        homes = {number for feature in features for number in self.features.inputs_of(feature)}
        return tuple(
            self.features.without(number, one, fill, features) if number in homes else _copies(one, len(features))
            for number, (one, fill) in enumerate(zip(self.inputs, self.fills, strict=True))
        )

    def maps(self, drops: Tensor) -> tuple[Tensor, ...]:
        """Return drops (F, n) at the elements of each input: (n, ...)."""
        return tuple(self.features.spread(number, one, drops.to(one.device)) for number, one in enumerate(self.inputs))


@dataclass(frozen=True)
class Permuted(Ablation):
    """Inputs in which a feature is not filled, but exchanged between the rows.

    Attributes:
        features: by masks.
        exchange: (rows of an input, mask of a feature) -> those rows, with the feature of others.
    """

    features: Masks
    exchange: Callable[[Tensor, Tensor], Tensor]

    def without(self, features: Sequence[int]) -> tuple[Tensor, ...]:
        """Return each input in copies, one with each of the features exchanged, one after the other."""
        copies = []
        homes = {number for feature in features for number in self.features.inputs_of(feature)}
        for number, one in enumerate(self.inputs):
            if number not in homes:
                copies.append(_copies(one, len(features)))
                continue
            # where any of the features is in this input, all are exchanged, some with nothing: so captum draws
            of_elements = self.features.of_elements(number)
            exchanged = [self.exchange(one.clone(), of_elements == feature) for feature in features]
            copies.append(exchanged[0] if len(exchanged) == 1 else torch.cat(exchanged))
        return tuple(copies)


def _copies(input: Tensor, number: int) -> Tensor:
    """Return copies of an input (R, ...), one after the other."""
    return input.clone() if number == 1 else input.repeat(number, *(1,) * (input.ndim - 1))
